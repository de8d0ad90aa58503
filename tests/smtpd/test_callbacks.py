from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from table_consul import callbacks
from table_consul.callbacks import Callbacks
from table_consul.errors import ReplyError
from table_consul.protocol import Failed, Found, NotFound, Request, Updated
from table_consul.server import Server
from table_consul.services import DEFAULT_SERVICES
from tests.dialogue import Child
from tests.smtpd.imsg import ALIAS, CHECK, FETCH, LOOKUP, SOURCE, UPDATE
from tests.smtpd.procexec import ABSENT, OK, RUN, Smtpd

DUMMY = (sys.executable, str(Path(__file__).parents[2] / "contrib" / "table-dummy.py"))
MAILADDR = 0x40
ME = b"gilles@poolp.org"


def asked(op, key=b"root", service="alias"):
    return Request(op, b"1", "users", service, key)


def answered(request, services=DEFAULT_SERVICES, **functions):
    given = dict.fromkeys(("check", "lookup", "fetch", "update")) | functions
    return Callbacks(*given.values(), services).answer(request, 0.0)


# ---- the example ----


@pytest.mark.parametrize("command", [DUMMY, (*RUN, *DUMMY)], ids=["itself", "table-procexec"])
def test_example_answers_an_smtpd_of_imsg(command):
    with Smtpd(*command) as smtpd:
        assert smtpd.ask(CHECK, MAILADDR, ME) == (OK, b"")
        assert smtpd.ask(CHECK, MAILADDR, b"eric@poolp.org") == (ABSENT, b"")
        assert smtpd.ask(LOOKUP, ALIAS, b"root") == (OK, ME)
        assert smtpd.ask(LOOKUP, ALIAS, b"eric") == (ABSENT, b"")
        assert smtpd.ask(FETCH, SOURCE, b"") == (OK, ME)
        assert smtpd.ask(UPDATE) == (OK, b"")
        assert smtpd.end()[:2] == (0, b"")


@pytest.mark.parametrize("command", [DUMMY, (*RUN, *DUMMY)], ids=["itself", "table-procexec"])
def test_example_answers_an_smtpd_of_lines(command):
    with Child(command=command) as child:
        assert child.handshake() == [name.encode() for name in DEFAULT_SERVICES]
        assert child.ask(b"table|0.1|0|t|check|mailaddr|1|" + ME) == b"check-result|1|found"
        assert child.ask(b"table|0.1|0|t|lookup|alias|2|root") == b"lookup-result|2|found|" + ME
        assert child.ask(b"table|0.1|0|t|lookup|alias|3|eric") == b"lookup-result|3|not-found"
        assert child.ask(b"table|0.1|0|t|fetch|source|4") == b"fetch-result|4|found|" + ME
        assert child.ask(b"table|0.1|0|t|update|5") == b"update-result|5|ok"
        assert child.end() == 0


@pytest.mark.parametrize("command", [DUMMY, (*RUN, *DUMMY)], ids=["itself", "table-procexec"])
def test_example_answers_the_dialects_of_2020(command):
    with Child(command=command) as child:
        for name, word in ((b"t|", b"table-response"), (b"", b"table-result")):
            assert child.ask(b"table|0.1|0|%bcheck|1|mailaddr|%b" % (name, ME)) == word + b"|1|found"
            assert child.ask(b"table|0.1|0|%blookup|2|alias|root" % name) == word + b"|2|found|" + ME
            assert child.ask(b"table|0.1|0|%bfetch|3|source" % name) == word + b"|3|found|" + ME
        assert child.end() == 0


# ---- return values of functions ----


def test_functions_get_the_table_the_service_and_the_key_as_text():
    seen = []

    def record(*arguments):
        seen.append(arguments)
        return "v"

    answered(asked("check", "ß".encode()), check=record)
    answered(asked("lookup", b"\xff"), lookup=record)
    answered(asked("fetch", b""), fetch=record)
    answered(asked("update", b"", ""), update=record)
    assert seen == [("users", "alias", "ß"), ("users", "alias", "\udcff"), ("users", "alias"), ("users",)]


@pytest.mark.parametrize(
    ("request_", "functions", "reply"),
    [
        (asked("check"), {"check": lambda *_: True}, Found()),
        (asked("check"), {"check": lambda *_: False}, NotFound()),
        (asked("check"), {"lookup": lambda *_: "gilles"}, Found()),
        (asked("check"), {"lookup": lambda *_: None}, NotFound()),
        (asked("check"), {"fetch": lambda *_: "gilles"}, Failed("this table does not implement check")),
        (asked("lookup"), {"lookup": lambda *_: "gilles"}, Found(b"gilles")),
        (asked("lookup"), {"lookup": lambda *_: "\udcff"}, Found(b"\xff")),
        (asked("lookup"), {"lookup": lambda *_: None}, NotFound()),
        (asked("lookup"), {"check": lambda *_: True}, Failed("this table does not implement lookup")),
        (asked("fetch"), {"fetch": lambda *_: "192.0.2.1"}, Found(b"192.0.2.1")),
        (asked("fetch"), {"fetch": lambda *_: None}, NotFound()),
        (asked("fetch"), {}, Failed("this table does not implement fetch")),
        (asked("update"), {}, Updated()),
    ],
)
def test_return_value_becomes_a_reply(request_, functions, reply):
    assert answered(request_, **functions) == reply


def test_only_chosen_services_are_registered_and_answered():
    chosen = Callbacks(None, lambda *_: "gilles", None, None, ("alias",))
    assert chosen.services("users") == ["alias"]
    reply = chosen.answer(asked("lookup", service="domain"), 0.0)
    assert reply == Failed("service domain is not among the services of this table")


def replies_to(lines, caplog, services=DEFAULT_SERVICES, level=logging.ERROR, **functions):
    """The replies of a server over these functions to these lines."""
    given = dict.fromkeys(("check", "lookup", "fetch", "update")) | functions
    answerer = Callbacks(*given.values(), services)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(lines)
        ours.shutdown(socket.SHUT_WR)
        caplog.set_level(level)
        Server(answerer, lambda _: None).serve(theirs.fileno(), theirs.fileno())
        theirs.shutdown(socket.SHUT_WR)
        return ours.makefile("rb").read()


LOOKUPS = b"config|ready\n" + b"".join(b"table|0.1|0|t|lookup|alias|%d|k\n" % number for number in (1, 2))


def test_exception_is_an_error_and_is_logged_once(caplog):
    answers = replies_to(LOOKUPS, caplog, lookup=lambda *_: {}["k"]).splitlines()[-2:]
    assert answers == [
        b"lookup-result|1|error|the function for lookup raised KeyError: 'k'",
        b"lookup-result|2|error|the function for lookup raised KeyError: 'k'",
    ]
    assert [record.exc_info[0] for record in caplog.records] == [KeyError]
    assert caplog.messages == ["the function for lookup raised KeyError: 'k'"]


def test_another_text_of_an_exception_is_logged_too(caplog):
    texts = iter(["the database is locked", "the database has no such table"])

    def lookup(*_):
        raise OSError(next(texts))

    replies_to(LOOKUPS, caplog, level=logging.WARNING, lookup=lookup)
    assert caplog.messages == [
        "the function for lookup raised OSError: the database is locked",
        "the function for lookup raised OSError: the database has no such table",
    ]
    assert [bool(record.exc_info) for record in caplog.records] == [True, False]


def test_log_of_an_exception_contains_no_password(caplog):
    login = b"config|smtpd-version|7.9.0\nconfig|ready\ntable|0.1|0|t|check|auth|1|gilles:hunter2\n"
    answers = replies_to(login, caplog, services=["auth"], check=lambda _table, _service, key: {}[key])
    assert answers.splitlines()[-1] == b"check-result|1|error|the function for check raised KeyError"
    assert ("KeyError at " in caplog.text, __file__ in caplog.text, "hunter2" in caplog.text) == (True, True, False)


def test_log_of_an_exception_contains_no_value_of_credentials(caplog):
    def lookup(*_):
        raise ValueError("gilles:$6$hash is not a hash")

    replies_to(LOOKUPS.replace(b"|alias|", b"|credentials|"), caplog, services=["credentials"], lookup=lookup)
    assert ("ValueError at " in caplog.text, "$6$hash" in caplog.text) == (True, False)


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError(), GeneratorExit()])
def test_exception_that_would_end_the_process_is_an_error(error, caplog):
    def lookup(*_):
        raise error

    answers = replies_to(LOOKUPS, caplog, lookup=lookup).splitlines()[-2:]
    assert [answer.split(b": ")[0] for answer in answers] == [
        b"lookup-result|1|error|the function for lookup raised " + type(error).__name__.encode(),
        b"lookup-result|2|error|the function for lookup raised " + type(error).__name__.encode(),
    ]
    assert [record.exc_info[0] for record in caplog.records] == [type(error)]


@pytest.mark.parametrize("value", ["", "a\nb", "a\rb", "a\0b", "\ud800", b"bytes", 7, ["gilles"]])
def test_invalid_reply_value_is_an_error(value, caplog):
    answers = replies_to(LOOKUPS, caplog, lookup=lambda *_: value).splitlines()[-2:]
    assert [b"|error|a value must be " in answer for answer in answers] == [True, True]


def test_each_invalid_reply_value_is_logged(caplog):
    values = iter([b"gilles", 7])
    replies_to(LOOKUPS, caplog, level=logging.WARNING, lookup=lambda *_: next(values))
    assert caplog.messages == [
        "lookup alias: a value must be a string or None: 'bytes' object has no attribute 'encode'",
        "lookup alias: a value must be a string or None: 'int' object has no attribute 'encode'",
    ]


@pytest.mark.parametrize(
    ("op", "name"),
    [("check", "check"), ("check", "lookup"), ("lookup", "lookup"), ("fetch", "fetch"), ("update", "update")],
)
def test_coroutine_is_an_error(op, name):
    coroutine = asyncio.sleep(0)
    with pytest.raises(ReplyError, match="returns a coroutine"):
        answered(asked(op), **{name: lambda *_: coroutine})
    coroutine.close()


def test_serve_answers_on_standard_input(tmp_path):
    program = tmp_path / "table-x"
    program.write_text(
        "from table_consul import callbacks\n"
        "callbacks.serve(lookup=lambda t, s, k: print('stray') or k.upper(), services=['alias'], program='table-x')\n"
    )
    with Child(command=[sys.executable, str(program)]) as child:
        assert child.handshake() == [b"alias"]
        assert child.ask(b"table|0.1|0|t|lookup|alias|1|root") == b"lookup-result|1|found|ROOT"
        assert child.rest() == b""


FORKS = """
import os, signal, sys
from table_consul import callbacks

def lookup(table, service, key):
    number = os.fork()
    if number == 0:
        if key == "exit":
            sys.exit(0)
        if key == "stay":
            signal.pause()
        return "child"
    if key != "stay":
        os.waitpid(number, 0)
    return f"parent of {number}"

callbacks.serve(lookup=lookup)
"""


@pytest.mark.parametrize("key", [b"return", b"exit"])
def test_forked_process_does_not_answer(key):
    with Child(command=[sys.executable, "-c", FORKS]) as child:
        child.handshake()
        assert child.ask(b"table|0.1|0|t|lookup|alias|1|" + key).startswith(b"lookup-result|1|found|parent of ")
        assert (child.rest(), child.end()) == (b"", 0)


def test_forked_process_does_not_keep_the_socket_open():
    with Child(command=[sys.executable, "-c", FORKS]) as child:
        child.handshake()
        forked = int(child.ask(b"table|0.1|0|t|lookup|alias|1|stay").rpartition(b" ")[2])
        child.process.kill()
        try:
            assert child.rest() == b""
        finally:
            os.kill(forked, signal.SIGKILL)


@pytest.mark.parametrize("services", ["alias", ["aliases"], ["alias", ""]])
def test_services_that_smtpd_does_not_know_are_not_registered(services):
    with pytest.raises(ValueError, match="services must be a list of alias, domain,"):
        callbacks.serve(lookup=lambda *_: None, services=services)


def test_example_in_the_documentation_runs(monkeypatch):
    served = {}
    monkeypatch.setattr(callbacks, "serve", lambda **functions: served.update(functions))
    lines = callbacks.__doc__.splitlines()
    exec("\n".join(line[4:] for line in lines if line.startswith("    ")))
    lookup = served["lookup"]
    assert (lookup("users", "alias", "root"), lookup("users", "alias", "eric")) == ("gilles", None)
