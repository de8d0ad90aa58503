from __future__ import annotations

import socket
import struct
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from table_consul import imsg, protocol, server
from table_consul.counters import Counters
from table_consul.imsg import MAX_VALUE
from table_consul.responder import Responder
from table_consul.server import Loop
from table_consul.services import SERVICES, Table
from table_consul.services.entries import Entries
from table_consul.shortcut import Known, Shortcut
from table_consul.sources.mirror import Mirror, Snapshot
from table_consul.tables import Tables
from tests.smtpd.test_imsg import CHECK, CLOSE, FETCH, LOOKUP, UPDATE, message, opening, question

TABLE = Table("consul", max_age=100.0)
HELLO = b"config|smtpd-version|7.9.0\nconfig|tablename|consul\nconfig|ready\n"
ENTRIES = {
    "alias": [(b"root", b"gilles\n"), (b"a|b", b"eric"), (b"empty", b""), (b"bad", b"|command")],
    "string": [(b"root", b"other"), (b"long", b"x" * (MAX_VALUE + 1)), (b"longest", b"x" * MAX_VALUE)],
    "domain": [(b"root", b"*")],
}


def snapshot(entries=ENTRIES):
    return Snapshot({name: Entries(TABLE, SERVICES[name], pairs) for name, pairs in entries.items()}, {})


class MirrorSource:
    """What Tables is to the loop, on one mirror and a clock that a test sets."""

    def __init__(self):
        self.now = 0.0
        self.mirror = Mirror(TABLE.max_age)
        self.mirror.confirm(snapshot(), 0.0)
        self.learned = 0

    def services(self, name):
        return list(ENTRIES)

    def prepare(self, name):
        pass

    def procexec_reply(self, name):
        return "auto"

    def table(self, name):
        return Table(name, max_age=TABLE.max_age)

    def entries(self, table, service, key, deadline):
        return self.mirror.entries(service.name, key, self.now)

    def known(self, table, service):
        self.learned += 1
        if table != "consul" or service not in ("alias", "string"):
            return None
        found, confirmed = self.mirror.state
        return Known(self.mirror, self.mirror.state, found.entries[service].values, confirmed + TABLE.max_age)


def served(source, *chunks, know=None):
    """What the loop writes when the chunks arrive one after the other."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        clock = lambda: source.now  # noqa: E731
        short = know and Shortcut(know, Counters(source.table), clock)
        loop = Loop(source, Responder(source.table, source).answer, lambda name: None, clock, short=short)
        waiting = iter(chunks)

        def read(fd):
            return next(waiting, b"")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server, "_read", read)
            loop.serve(ours.fileno(), ours.fileno())
        ours.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: theirs.recv(65536), b""))


def in_lines(shortcut, data):
    return shortcut.replies(data, protocol.Session())


def in_imsg(shortcut, data):
    session = imsg.Session()
    session.table = "consul"
    return shortcut.replies(data, session)


def lookup(key, service=b"alias", ident=b"00000001", table=b"consul", op=b"lookup"):
    return b"table|0.1|1590631921.294413|%b|%b|%b|%b|%b\n" % (table, op, service, ident, key)


LINES = st.builds(
    lookup,
    st.sampled_from([b"root", b"a|b", b"empty", b"bad", b"long", b"nobody", b"", b"x\0"]),
    st.sampled_from([b"alias", b"alias", b"alias", b"string", b"domain", b"credentials", b"nonsense"]),
    st.sampled_from([b"1", b"deadbeef", b""]),
    st.sampled_from([b"consul", b"consul", b"other"]),
    st.sampled_from([b"lookup", b"lookup", b"lookup", b"check", b"fetch"]),
) | st.sampled_from([b"\n", b"table|\n", b"config|x|y\n", b"table|0.1|0|consul|update|7\n", b"half"])


@given(st.lists(st.lists(LINES, min_size=1, max_size=4).map(b"".join), max_size=6))
def test_the_short_way_and_the_long_way_say_the_same_bytes(chunks):
    source = MirrorSource()
    assert served(source, HELLO, *chunks, know=source.known) == served(MirrorSource(), HELLO, *chunks)


QUESTIONS = st.builds(
    question,
    st.sampled_from([LOOKUP, LOOKUP, LOOKUP, CHECK, FETCH]),
    st.sampled_from([0x1, 0x1, 0x400, 0x2, 0x4, 0x4000, -1]),  # alias, string, domain, credentials, none
    st.sampled_from(
        [b"root\0", b"a|b\0", b"empty\0", b"bad\0", b"long\0", b"longest\0", b"nobody\0", b"\0", b"root", b"x\0y\0"]
    ),
    st.sampled_from([0, 0, 0, 1]),
) | st.sampled_from([b"half", message(UPDATE), message(4711), message(LOOKUP, length=3), message(CLOSE)])


@given(st.sampled_from([b"consul", b"other"]), st.lists(st.lists(QUESTIONS, max_size=2).map(b"".join), max_size=6))
def test_so_they_do_in_imsg(table, chunks):
    source = MirrorSource()
    chunks = [opening(table), *filter(None, chunks)]
    assert served(source, *chunks, know=source.known) == served(MirrorSource(), *chunks)


@pytest.fixture
def source():
    return MirrorSource()


@pytest.fixture
def shortcut(source):
    return Shortcut(source.known, Counters(source.table), lambda: source.now)


def test_a_key_in_memory_is_answered(shortcut):
    assert in_lines(shortcut, lookup(b"root")) == b"lookup-result|00000001|found|gilles\n"


@pytest.mark.parametrize(
    "data",
    [
        lookup(b"nobody"),
        lookup(b"empty"),
        lookup(b"bad"),
        lookup(b"root", b"domain"),
        lookup(b"root", op=b"check"),
        lookup(b"root", ident=b""),
        lookup(b"root", table=b"other"),
        lookup(b"root")[:-1],
        lookup(b"root") + lookup(b"nobody"),
        lookup(b"root") + lookup(b"root", b"string"),
        b"config|ready\n",
        b"\n",
    ],
)
def test_all_else_takes_the_long_way(shortcut, data):
    assert in_lines(shortcut, data) is None


def test_a_key_in_memory_is_answered_in_imsg(shortcut):
    body = struct.pack("=i", 1) + b"gilles\0"
    assert (
        in_imsg(shortcut, question(LOOKUP, 0x1, b"root\0")) == struct.pack("=IHHII", 0, 16 + len(body), 0, 0, 0) + body
    )


@pytest.mark.parametrize(
    "data",
    [
        question(LOOKUP, 0x1, b"nobody\0"),
        question(LOOKUP, 0x1, b"empty\0"),
        question(LOOKUP, 0x400, b"long\0"),  # more than a message can hold
        question(LOOKUP, 0x2, b"root\0"),
        question(LOOKUP, 0x4000, b"root\0"),
        question(CHECK, 0x1, b"root\0"),
        question(LOOKUP, 0x1, b"root"),
        question(LOOKUP, 0x1, b"root\0", count=1),
        question(LOOKUP, 0x1, b"root\0") * 2,
        question(LOOKUP, 0x1, b"root\0")[:-1],
        message(CLOSE),
    ],
)
def test_all_else_takes_the_long_way_in_imsg(shortcut, data):
    assert in_imsg(shortcut, data) is None


def test_many_lookups_of_one_service_are_one_reply(source, shortcut):
    data = lookup(b"root", ident=b"1") + lookup(b"a|b", ident=b"2")
    assert in_lines(shortcut, data) == b"lookup-result|1|found|gilles\nlookup-result|2|found|eric\n"
    assert source.learned == 1


def test_an_edit_is_seen_by_the_next_lookup(source, shortcut):
    in_lines(shortcut, lookup(b"root"))
    source.mirror.confirm(snapshot({**ENTRIES, "alias": [(b"root", b"marie")]}), 1.0)
    assert in_lines(shortcut, lookup(b"root")) == b"lookup-result|00000001|found|marie\n"


def test_data_too_old_to_be_believed_take_the_long_way_which_says_error(source, shortcut):
    in_lines(shortcut, lookup(b"root"))
    source.now = TABLE.max_age + 1
    assert in_lines(shortcut, lookup(b"root")) is None
    assert b"|error|no data from Consul" in served(source, HELLO, lookup(b"root"), know=source.known)


def test_what_was_answered_is_counted(source):
    tally = Counters(source.table)
    shortcut = Shortcut(source.known, tally, lambda: source.now)
    data = lookup(b"root") * 3
    in_lines(shortcut, data)
    shortcut.count(source.now)
    assert [(*key[:3], sum(cell[2:])) for key, cell in tally.cells().items()] == [("consul", "alias", "lookup", 3)]


def test_a_bug_in_the_shortcut_costs_no_answer(source, caplog):
    def know(table, service):
        raise RuntimeError("bug")

    assert served(source, HELLO, lookup(b"root"), know=know).endswith(b"lookup-result|00000001|found|gilles\n")
    assert "internal error" in caplog.text


def test_sources_know_only_exact_services_in_memory(source):
    sources = Tables.__new__(Tables)
    sources._tables = {"consul": TABLE}
    sources._mirrors = {"consul": SimpleNamespace(known=lambda service: Known(None, None, {}, 0.0))}
    asked = {name: sources.known("consul", name) is not None for name in SERVICES}
    assert [name for name, known in asked.items() if known] == [
        "alias",
        "credentials",
        "userinfo",
        "mailaddrmap",
        "string",
    ]
    assert sources.known("other", "alias") is None


@pytest.mark.parametrize(("home", "known"), [(b"/home/%u", False), (b"/var/vmail", True)])
def test_a_default_entry_with_something_to_fill_in_is_never_answered_as_it_stands(home, known):
    sources = Tables.__new__(Tables)
    sources._tables = {"consul": TABLE}
    values = {b"*": b"1000:1000:" + home}
    sources._mirrors = {"consul": SimpleNamespace(known=lambda service: Known(None, None, values, 0.0))}
    assert (sources.known("consul", "userinfo") is not None) is known
