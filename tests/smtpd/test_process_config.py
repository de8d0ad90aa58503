"""The configuration of the running program: errors, updates and registered services."""

from __future__ import annotations

import re

import pytest

from tests.dialogue import Child, write_config, write_source
from tests.smtpd.process import ROOT, UPDATE, start_child


def test_bad_configuration_is_reported_in_replies_until_an_update_fixes_it(tmp_path):
    path = write_config(tmp_path)
    good = path.read_text()
    path.write_text("[consul]\naddres = 1\n")
    with Child(str(path)) as child:
        assert b"alias" in child.handshake()
        reason = b"error|%b: consul.addres: unknown key" % str(path).encode()
        for answer in (child.ask(ROOT % 1), child.ask(UPDATE % 2)):
            assert answer.split(b"|", 2)[2].startswith(reason)
        path.write_text(good)
        assert child.ask(UPDATE % 3) == b"update-result|00000003|ok"
        assert child.ask(ROOT % 4) == b"lookup-result|00000004|found|gilles"
        assert child.end() == 0


def test_update_with_a_bad_configuration_keeps_the_old_one(tmp_path):
    path = write_config(tmp_path)
    with Child(str(path)) as child:
        child.handshake()
        path.write_text("[consul]\naddress = 1\n")
        assert child.ask(UPDATE % 1).startswith(b"update-result|00000001|error|")
        assert child.ask(ROOT % 2) == b"lookup-result|00000002|found|gilles"


def test_update_applies_a_new_configuration(tmp_path):
    path = write_config(tmp_path)
    ask = b"table|0.1|0|aliases|lookup|alias|%08x|command"
    with Child(str(path)) as child:
        child.handshake()
        refused = child.ask(ask % 1)
        path.write_text(path.read_text().replace("[defaults]", "[defaults]\nallow_commands = true"))
        assert (refused.split(b"|")[2], child.ask(UPDATE % 2).split(b"|")[2]) == (b"error", b"ok")
        assert child.ask(ask % 3) == b"lookup-result|00000003|found||/bin/sh"


def test_update_applies_a_new_log_level(tmp_path):
    path = write_config(tmp_path, more='[log]\nlevel = "error"\ntarget = "stderr"\n')
    write_source(tmp_path, {"aliases/netaddr/quiet": b""})
    with Child(str(path)) as child:
        child.handshake()
        child.ask(b"table|0.1|0|aliases|check|netaddr|1|quiet")
        path.write_text(path.read_text().replace('"error"', '"warning"'))
        write_source(tmp_path, {"aliases/netaddr/loud": b""})
        child.ask(UPDATE % 2)
        child.ask(b"table|0.1|0|aliases|check|netaddr|3|loud")
        child.end()
        assert re.findall("netaddr/[a-z]+", child.log()) == ["netaddr/loud"]


def test_reply_word_may_differ_by_table(tmp_path):
    more = '[tables.old]\nprocexec_reply = "table-result"'
    with start_child(tmp_path, more=more) as child:
        assert [child.ask(b"table|0.1|0|%b|lookup|%d|alias|x" % asked) for asked in ((b"new", 1), (b"old", 2))] == [
            b"table-response|1|not-found",
            b"table-result|2|not-found",
        ]


def test_changed_file_is_used_for_the_next_request(tmp_path):
    with start_child(tmp_path) as child:
        child.handshake()
        before = child.ask(ROOT % 1)
        write_source(tmp_path, {"aliases/alias/root": b"marie"})
        assert (before, child.ask(ROOT % 2)) == (
            b"lookup-result|00000001|found|gilles",
            b"lookup-result|00000002|found|marie",
        )


@pytest.mark.parametrize(
    ("version", "auth"),
    [
        (b"7.9.0-portable", True),
        (b"7.10", True),
        (b"8.0", True),
        (b"7.8.0p1", False),
        (b"7.6.0", False),
        (b"x", False),
        (b"", False),
    ],
)
def test_auth_is_registered_only_with_smtpd_that_keeps_the_case_of_passwords(tmp_path, version, auth):
    with start_child(tmp_path, 'services = ["alias", "auth"]') as child:
        assert [b"alias", b"auth"][: 1 + auth] == child.handshake(version=version)


def test_older_smtpd_gets_the_default_services_if_only_auth_is_configured(tmp_path):
    with start_child(tmp_path, 'services = ["auth"]') as child:
        names = child.handshake(version=b"7.6.0")
        assert (b"alias" in names, b"auth" in names) == (True, False)
