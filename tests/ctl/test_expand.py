"""The output of `table-consulctl expand`; tests/e2e/test_expand.py compares its lookups with those of smtpd."""

from __future__ import annotations

import json
import subprocess

import pytest

from table_consul.ctl import recipients
from table_consul.protocol import NOT_FOUND, Found
from tests.control import control, start
from tests.dialogue import TIMEOUT_SECONDS, write_config, write_source

STORE = {
    "t/alias/root": "staff, eric@example.com",
    "t/alias/staff": "vera, again",
    "t/alias/again": "VERA+news, :include:/nonexistent/list",
    "t/alias/gone": "error:550 left the company",
    "t/alias/later": "error:451 try again",
    "t/alias/loop": "loop2",
    "t/alias/loop2": "loop",
    "t/alias/run": "|/bin/sh",
    "t/alias/odd": "vera, \x1b[2J",
    "v/alias/vera@example.org": "vera",
    "v/alias/team@example.net": "vera@example.org, out@example.com",
    "v/domain/*.example.com": "",
    "v/alias/@": "vera",
    "u/userinfo/vera": "1000:1000:/home/vera",
}


@pytest.fixture
def expand(tmp_path):
    """Runs it on `STORE`, or on other entries."""

    def run(*arguments, store=STORE, more="allow_commands = true"):
        source = write_source(tmp_path, {key: value.encode() for key, value in store.items()})
        path = write_config(tmp_path, more, address=f"file://{source}")
        return control("-c", path, "expand", *arguments)

    return run


def test_expand_prints_lookups_as_they_nest_and_the_recipients(expand):
    done = expand("t", "Root@localhost", "--userinfo", "u", more="allow_commands = true")
    assert done.text.splitlines() == [
        "Root@localhost",
        "    t/alias: root: staff, eric@example.com",
        "      t/alias: staff: vera, again",
        "        t/alias: again: VERA+news, :include:/nonexistent/list",
        "          /nonexistent/list: no such file or directory; smtpd ignores it",
        "        t/alias: vera: not found",
        "        u/userinfo: vera: 1000:1000:/home/vera",
        "          t/alias: vera+news: not found",
        "          t/alias: vera: not found",
        "          u/userinfo: vera: 1000:1000:/home/vera",
        "  -> eric@example.com (another domain: smtpd.conf decides)",
        "  -> user vera",
        "  -> user VERA",
    ]
    assert (done.status, done.said) == (0, "")


@pytest.mark.parametrize(
    ("address", "status", "end"),
    [
        ("gone", 1, "rejected: 550 left the company; an alias has this error as its value"),
        ("later", 2, "rejected: 451 try again; an alias has this error as its value"),
        ("nobody-here", 1, "rejected: 550 Invalid recipient; no alias and no user nobody-here"),
        ("loop", 1, "rejected: 524 5.2.4 Mailing list expansion problem; no recipient is left"),
        ("odd", 2, r"rejected: 424 4.2.4 Mailing list expansion problem; odd: "),
    ],
)
def test_rejected_address_has_the_reply_of_smtpd_and_its_cause(expand, address, status, end):
    done = expand("t", address, "--userinfo", "u")
    assert (done.status, done.text.splitlines()[-1].startswith(f"  -> {end}")) == (status, True), done.text
    assert "\x1b" not in done.text


def test_value_that_the_daemon_refuses_is_a_temporary_error_with_the_hint(expand):
    done = expand("t", "run", more="")
    assert (done.status, "set allow_commands = true" in done.text) == (2, True)
    assert "    t/alias: run: error\n" in done.text


def test_exit_status_is_that_of_the_worst_address(expand):
    assert expand("t", "gone", "root", "later", "--userinfo", "u").status == 2


def test_without_userinfo_users_are_those_of_the_system(expand):
    done = expand("t", "daemon")
    assert (done.status, "the system: daemon: " in done.text, "-> user daemon" in done.text) == (0, True, True)


@pytest.mark.parametrize(
    ("address", "asked", "relayed"),
    [
        ("vera+tag@example.org", ["vera+tag@example.org", "vera@example.org", "vera@", "vera", "vera"], []),
        ("team@example.net", ["team@example.net", "vera@example.org", "vera@", "vera", "vera"], ["out@example.com"]),
        ("x@a.example.com", ["x@a.example.com", "x", "@a.example.com", "@", "vera@", "vera", "vera"], []),
        ("root", ["root", "staff", "again", "/nonexistent/list", "vera"], ["eric@example.com"]),
    ],
)
def test_virtual_addresses_come_from_options_domains_or_keys(expand, address, asked, relayed):
    answer = json.loads(expand("t", address, "--virtual", "v", "--userinfo", "u", "--json").text)
    assert [each["key"] for each in answer["lookups"]][: len(asked)] == asked
    assert [each["name"] for each in answer["recipients"] if each["kind"] == "address"] == relayed


def test_virtual_table_that_does_not_serve_aliases_is_a_temporary_error(expand):
    answer = expand("t", "vera@example.org", "--virtual", "v", more='[tables.v]\nservices = ["domain"]')
    assert (answer.status, answer.err) == (2, b"")
    assert "service alias is not among the services of table 'v'" in answer.text


def test_json_has_a_line_for_each_address(expand):
    first, second = map(json.loads, expand("t", "gone", "vera", "--userinfo", "u", "--json").text.splitlines())
    assert (first["accepted"], first["reply"], first["recipients"]) == (False, "550 left the company", [])
    assert (second["accepted"], second["reply"], second["cause"]) == (True, None, None)
    assert second["recipients"] == [{"kind": "user", "name": "vera"}]
    lookup = {"table": "u", "service": "userinfo", "key": "vera", "result": "found", "nested": 1}
    assert second["lookups"][-1] == {**lookup, "answer": "1000:1000:/home/vera"}


def test_unreachable_consul_is_a_temporary_error(tmp_path):
    done = control("-c", write_config(tmp_path, address="http://127.0.0.1:9"), "expand", "t", "root", "--virtual", "v")
    assert (done.status, "  -> rejected: 424 " in done.text) == (2, True)


@pytest.mark.slow
def test_expand_of_100000_entries_takes_one_pass(expand):
    store = {f"v/alias/u{number}@example.org": "vera" for number in range(99_000)}
    lists = [",".join(f"u{n}@example.org" for n in range(start, start + 100)) for start in range(0, 99_000, 100)]
    store |= {
        "u/userinfo/*": "1:1:/home",
        **{f"v/alias/list{number}@example.org": value for number, value in enumerate(lists)},
    }
    done = expand(
        "t", "list7@example.org", "u1@example.org", "--virtual", "v", "--userinfo", "u", "--json", store=store
    )
    first, second = map(json.loads, done.text.splitlines())
    assert (len(first["lookups"]), len(second["lookups"])) == (101 + 300, 4)


@pytest.mark.slow
def test_endless_expansion_is_cut():
    everyone = ",".join(f"a{number}@d" for number in range(100)).encode()

    def lookup(_table, key):
        return Found(everyone) if b"@d" in key else NOT_FOUND

    outcome = recipients.expand(b"a@d", recipients.Tables(lookup, lambda _: False, lambda _: True))
    assert (outcome.rejection, outcome.cause.startswith("more than 200000 recipients")) == ("", True)


def test_closed_pipe_ends_expand_without_a_message(tmp_path):
    source = write_source(tmp_path, {key: value.encode() for key, value in STORE.items()})
    path = write_config(tmp_path, address=f"file://{source}")
    with start("-c", path, "expand", "t", *["daemon"] * 20_000, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"daemon\n"
        process.stdout.close()
        assert (process.stderr.read(), process.wait(TIMEOUT_SECONDS)) == (b"", 2)
