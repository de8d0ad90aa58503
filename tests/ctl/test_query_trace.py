"""`table-consulctl query --trace`: the entry and the rules behind an answer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from table_consul.ctl.query import explain_value
from table_consul.services import SERVICES, Table
from tests.control import at_terminal
from tests.ctl.queries import MARKED, query, traced


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        (["alias", "root"], ["entry mail/aliases/alias/root", "value trailing white space is dropped"]),
        (
            ["alias", "STAFF"],
            [
                "asked staff: smtpd looks up keys in lower case",
                "entry mail/aliases/alias/Staff, stored in another case",
                "value trailing white space is dropped",
                "value lines are joined into one list, without comments",
                (
                    "problem element 2 of the value contains white space (is a comma missing?); "
                    "smtpd rejects the whole alias because of it"
                ),
            ],
        ),
        (
            ["alias", "listed"],
            [
                "entry mail/aliases/alias/listed",
                "value decoded from JSON (value_format = auto)",
                "value lines are joined into one list, without comments",
            ],
        ),
        (
            ["alias", "command"],
            ["entry mail/aliases/alias/command", "safety allow_commands = false rejects commands and files"],
        ),
        (["alias", "nobody"], ["entry none"]),
        (
            ["domain", "mail.example.org"],
            [
                "entry mail/aliases/domain/*.example.org, which matches mail.example.org",
                "value empty, so the key itself is the answer",
            ],
        ),
        (
            ["domain", "mail.example.org", "--op", "check"],
            ["entry mail/aliases/domain/*.example.org, which matches mail.example.org"],
        ),
        (
            ["userinfo", "eric"],
            [
                "entry mail/aliases/userinfo/*, the default for users without an entry",
                "value %u, %n and %d in the home directory are expanded",
            ],
        ),
        (
            ["userinfo", "vera"],
            ["entry mail/aliases/userinfo/vera", "value uid, gid, home of the JSON object (value_format = auto)"],
        ),
        (
            ["userinfo", "admin"],
            ["entry mail/aliases/userinfo/admin", "safety allow_root = false rejects uid or gid 0"],
        ),
        (
            ["credentials", "vera"],
            ["entry mail/aliases/credentials/vera", "value the {SCHEME}, $2y$ or lock is rewritten for crypt(3)"],
        ),
        (["string", "list"], ["entry mail/aliases/string/list"]),
        (
            ["source", "--op", "fetch"],
            ["value each fetch returns the next of the keys, in the order of the keys (fetch = keys)"],
        ),
    ],
)
def test_trace_names_entry_and_rules(conf, arguments, steps):
    source, read, *rest = traced(conf, *arguments)
    assert source == f"source {conf.parent}/export.json"
    assert read.startswith(f"read mail/aliases/{arguments[0]}/ (")
    assert rest == steps


def test_trace_is_printed_on_standard_error(conf):
    done = query(conf, "alias", "root", "--trace")
    assert (done.text, done.said.splitlines()[1:]) == (
        "gilles\n",
        [
            "  read     mail/aliases/alias/ (6 entries)",
            "  entry    mail/aliases/alias/root",
            "  value    trailing white space is dropped",
        ],
    )


def test_trace_wraps_at_a_terminal_of_40_columns(conf):
    arguments = ("-c", conf, "query", "aliases", "alias", "staff", "--trace")
    status, shown = at_terminal(*arguments, COLUMNS="40")
    first, *lines = shown.splitlines()
    assert (status, first, [line for line in lines if len(line) > 40]) == (
        2,
        "gilles, eric # no",
        lines[:1],
    )
    assert {line[:11].strip() for line in lines[1:]} == {"", "source", "read", "entry", "value", "problem"}


def test_trace_names_the_option_that_permits_a_value(conf):
    conf.write_text(conf.read_text() + "allow_commands = true\nallow_root = true\n")
    assert "safety allow_commands = true permits commands and files" in traced(conf, "alias", "command")
    assert "safety allow_root = true permits uid or gid 0" in traced(conf, "userinfo", "admin")


BYTES = st.one_of(
    st.binary(max_size=30),
    st.sampled_from([b"a\nb", b"# c", b' "x" ', b'["a","b"]', b"|sh", b"/f", b"0:0:/", b"1:1:/h", b"!", b"{CRYPT}*"]),
    st.sampled_from([b"$2y$10$x", MARKED, b'{"uid":0,"gid":1,"home":"/"}', b'{"password":"!"}', b"{", b"null", b"a,b"]),
    st.just(b'{"password":"$6$secretsecret"}'),
)


@settings(max_examples=3 * settings().max_examples)
@given(
    raw=BYTES,
    service=st.sampled_from([*SERVICES.values()]),
    form=st.sampled_from(["auto", "text", "json"]),
    allowed=st.booleans(),
)
def test_trace_explains_any_value_without_quoting_it(raw, service, form, allowed):
    table = Table("t", value_format=form, allow_commands=allowed, allow_root=allowed)
    steps = [*explain_value(table, service, b"key", raw)]
    assert {step.what for step in steps} <= {"value", "safety"}
    assert not any("secret" in step.text for step in steps)
    if form == "text":
        assert not any("JSON" in step.text for step in steps)
    if allowed:
        assert not any("refuses" in step.text for step in steps)
