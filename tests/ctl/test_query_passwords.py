"""`table-consulctl query` of auth: a password comes from standard input or a prompt, and is never printed."""

from __future__ import annotations

import json

import pytest

from table_consul.errors import ConfigError
from table_consul.services import passwords
from tests.control import at_terminal
from tests.ctl.queries import HASH, query

PASSWORD = "horse: battery"


@pytest.fixture
def with_auth(conf):
    try:
        passwords._binding()
    except ConfigError as error:
        pytest.skip(f"{error}; it is built from source: apt-get install gcc python3-dev libcrypt-dev")
    conf.write_text(conf.read_text() + '[tables.aliases]\nservices = ["alias", "auth"]\n')
    return conf


def test_password_from_standard_input_is_checked_and_not_printed(with_auth):
    lines = f"vera:{PASSWORD}\nVERA:{PASSWORD}\nvera:wrong\nnobody:{PASSWORD}\nvera\n".encode()
    done = query(with_auth, "auth", "-", "--trace", stdin=lines)
    assert (done.status, done.text) == (2, "vera\tfound\nVERA\tfound\n")
    assert [line for line in done.said.splitlines() if line[0] != " "] == [
        "vera: not found",
        "nobody: not found",
        "vera: error: the service auth supports only check, with a key USER:PASSWORD",
    ]
    printed = done.text + done.said + query(with_auth, "auth", "-", "--trace", "--json", stdin=lines).text
    assert [secret for secret in (PASSWORD, "battery", "wrong", HASH.decode()) if secret in printed] == []


def test_password_on_the_command_line_is_rejected_and_not_printed(with_auth):
    done = query(with_auth, "auth", f"vera:{PASSWORD}")
    assert (done.status, done.text, "all users of this host can see" in done.said, "battery" in done.said) == (
        2,
        "",
        True,
        False,
    )


def test_password_prompt_does_not_show_what_is_typed(with_auth):
    arguments = ("-c", with_auth, "query", "aliases", "auth", "vera")
    status, shown = at_terminal(*arguments, typed=PASSWORD.encode() + b"\n", wanted=b"Password for vera: ")
    assert (status, shown) == (0, "Password for vera: \nfound\n")
    assert at_terminal(*arguments, typed=b"wrong\n", wanted=b"Password for vera: ")[0] == 1


def test_missing_password_is_an_error_without_a_terminal(with_auth):
    done = query(with_auth, "auth", "vera")
    assert (done.status, "no terminal to prompt" in done.said) == (2, True)


def test_trace_of_auth_covers_both_services(with_auth):
    done = query(with_auth, "auth", "-", "--trace", "--json", stdin=f"vera:{PASSWORD}\n".encode())
    steps = [step["text"] for step in json.loads(done.text)["trace"] if step["what"] == "entry"]
    assert steps == ["none", "mail/aliases/credentials/vera"]
