"""`table-consulctl query`: replies on standard output, and exit statuses."""

from __future__ import annotations

import json
import os

import pytest

from tests.control import at_terminal, control
from tests.ctl.queries import query
from tests.dialogue import write_config, write_source

# ---- answers and exit statuses ----


def test_one_key_prints_its_value_alone(conf):
    assert query(conf, "alias", "root") == (0, b"gilles\n", b"")


def test_several_keys_print_a_line_each_with_key_and_value(conf):
    assert query(conf, "alias", "root", "listed") == (0, b"root\tgilles\nlisted\tgilles, eric\n", b"")


def test_missing_key_is_reported_and_exits_with_1(conf):
    assert query(conf, "alias", "nobody") == (1, b"", b"nobody: not found\n")


def test_error_is_reported_and_outweighs_other_answers(conf):
    done = query(conf, "alias", "command", "root", "nobody")
    assert (done.status, done.text) == (2, "root\tgilles\n")
    assert done.said.startswith("command: error: mail/aliases/alias/command: the value contains a |command")
    assert done.said.endswith("nobody: not found\n")


def test_standard_input_has_one_key_a_line(conf):
    done = query(conf, "alias", "-", stdin=b"root\r\n\nnobody\nlisted")
    assert done == (1, b"root\tgilles\nlisted\tgilles, eric\n", b"nobody: not found\n")


def test_keys_are_looked_up_in_lower_case_as_smtpd_does(conf):
    assert query(conf, "alias", "ROOT", "STAFF").text == "ROOT\tgilles\nSTAFF\tgilles, eric # no\n"


def test_key_that_is_not_utf_8_is_looked_up_unchanged(conf):
    done = query(conf, "alias", os.fsdecode(b"gr\xfc\xdfe\x1b"))
    assert (done.status, done.said) == (1, "gr\\xfc\\xdfe\\x1b: not found\n")


def test_key_that_is_too_long_for_smtpd_is_an_error(conf):
    done = query(conf, "alias", "x" * 1024)
    assert (done.status, "smtpd looks up at most 1023" in done.said) == (2, True)
    assert query(conf, "alias", "x" * 1023).status == 1


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["domain", "mail.example.org"], (0, b"*.example.org\n")),
        (["domain", "mail.example.org", "--op", "check"], (0, b"found\n")),
        (["domain", "example.org", "--op", "check"], (1, b"")),
        (
            ["domain", "a.example.org", "b.example.org", "--op", "check"],
            (0, b"a.example.org\tfound\nb.example.org\tfound\n"),
        ),
        (["userinfo", "eric"], (0, b"1000:1000:/home/eric\n")),
        (["source", "--op", "fetch"], (0, b"192.0.2.1\n")),
        (["source", "--op", "fetch", "--count", "3"], (0, b"192.0.2.1\n192.0.2.2\n192.0.2.1\n")),
        (["relayhost", "--op", "fetch"], (1, b"")),
    ],
)
def test_each_operation_answers(conf, arguments, answer):
    assert query(conf, *arguments)[:2] == answer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["alias"], "lookup requires a KEY"),
        (["source", "x", "--op", "fetch"], "fetch takes no KEY"),
        (["alias", "x", "--count", "2"], "--count requires --op fetch"),
        (["source", "--op", "fetch", "--count", "0"], "--count"),
        (["alias", "x", "--op", "update"], "--op"),
    ],
)
def test_conflicting_arguments_are_a_usage_error(conf, arguments, message):
    done = query(conf, *arguments)
    assert (done.status, done.text, message in done.said) == (2, "", True), done.said


def test_service_missing_from_the_table_is_an_error(tmp_path):
    path = write_config(tmp_path, 'services = ["alias"]')
    done = query(path, "domain", "example.org")
    assert (done.status, "domain is not among the services of table 'aliases'" in done.said) == (2, True)


# ---- for programs, and for terminals ----


def test_json_is_one_object_a_line(conf):
    done = query(conf, "alias", "root", "nobody", "command", "latin", "--json")
    answers = [json.loads(line) for line in done.text.splitlines()]
    common = {"table": "aliases", "service": "alias", "op": "lookup"}
    assert answers[0] == {**common, "key": "root", "result": "found", "value": "gilles"}
    assert answers[1] == {**common, "key": "nobody", "result": "not-found"}
    assert (answers[2].pop("reason")[:26], answers[2]["result"]) == ("mail/aliases/alias/command", "error")
    assert answers[3]["value"] == "gr\\xfc\\xdfe"
    assert (done.status, done.said) == (2, "")


def test_control_characters_are_escaped_on_a_terminal_only(conf):
    arguments = ("-c", conf, "query", "aliases", "alias", "odd", "latin")
    assert control(*arguments).out == b"odd\tok, \x1b[2J@example.org\nlatin\tgr\xfc\xdfe\n"
    status, shown = at_terminal(*arguments)
    assert (status, shown.replace("\t", "\\t").splitlines()[::2]) == (
        2,  # smtpd can use neither
        ["odd\\tok, \\x1b[2J@example.org", "latin\\tgr\\xfc\\xdfe"],
    )


def test_value_that_smtpd_cannot_use_is_printed_with_a_warning_and_exits_with_2(conf):
    done = query(conf, "alias", "staff", "root")
    assert (done.status, done.text) == (2, "staff\tgilles, eric # no\nroot\tgilles\n")
    assert done.said == (
        "staff: warning: smtpd cannot use this value: mail/aliases/alias/Staff: element 2 of the value contains white "
        "space (is a comma missing?); smtpd rejects the whole alias because of it\n"
    )
    answer = json.loads(query(conf, "alias", "staff", "--json").text)
    assert (answer["result"], answer["warning"][:25]) == ("found", "mail/aliases/alias/Staff:")
    assert query(conf, "alias", "staff", "--op", "check") == (0, b"found\n", b"")


@pytest.mark.parametrize(
    ("fetch", "value", "status"), [("keys", "", 2), ("values", "192.0.2.7", 0), ("values", "mx", 2)]
)
def test_fetched_value_that_smtpd_cannot_use_exits_with_2(conf, tmp_path, fetch, value, status):
    source = write_source(tmp_path, {"aliases/source/mx.example.org": value.encode()})
    conf.write_text(f'[consul]\naddress = "file://{source}"\n[defaults]\nfetch = "{fetch}"\n')
    done = query(conf, "source", "--op", "fetch")
    assert (done.status, "not an address to send mail from" in done.said) == (status, status == 2)
