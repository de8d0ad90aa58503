from __future__ import annotations

import fcntl
import logging
import os
import re
import resource
import select
import socket
import struct
import threading
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from table_consul.errors import ConfigError, EntryError, SourceError, TableConsulError, Unreachable
from table_consul.fallback import read
from table_consul.protocol import Failed, Found, NotFound, Updated
from table_consul.server import MAX_COMPLAINTS, Server
from table_consul.services import DEFAULT_SERVICES

HELLO = b"config|smtpd-version|7.9.0\nconfig|tablename|aliases\nconfig|ready\n"
ROOT = b"table|0.1|0|aliases|lookup|alias|%d|root\n"


class Scripted:
    """Tables with entries of `alias`, or errors to raise."""

    def __init__(self):
        self.values = {b"root": b"gilles"}
        self.errors: dict[bytes | None, Exception] = {}
        self.registered = ["alias"]
        self.warmed_up = []
        self.cold: Exception | None = None
        self.arrivals = []

    def services(self, name):
        return self.registered

    def answer(self, request, arrived):
        self.arrivals.append(arrived)
        error = self.errors.get(request.key if request.op != "update" else None)
        if isinstance(error, TableConsulError):
            return Failed(str(error), error)
        if error is not None:
            raise error
        if request.op == "update":
            return Updated()
        value = self.values.get(request.key)
        return NotFound() if value is None else Found(None if request.op == "check" else value)

    def warm_up(self, name):
        self.warmed_up.append(name)
        if self.cold is not None:
            raise self.cold


@pytest.fixture
def tables():
    return Scripted()


@pytest.fixture(autouse=True)
def level(caplog):
    caplog.set_level(logging.DEBUG)


def served(tables, data, named=lambda _: None, **options):
    """The replies to all these bytes in one piece, and the result of `serve`."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(data)
        ours.shutdown(socket.SHUT_WR)
        spoke = Server(tables, named, **options).serve(theirs.fileno(), theirs.fileno())
        theirs.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: ours.recv(65536), b"")), spoke


def replies(tables, *lines):
    return served(tables, HELLO + b"".join(lines))[0].split(b"register|ready\n")[1].splitlines()


def logged(caplog, level=logging.WARNING):
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


def test_server_registers_the_services_of_the_source(tables):
    tables.registered = ["alias", "domain"]
    assert served(tables, HELLO)[0] == b"register|alias\nregister|domain\nregister|ready\n"


def test_serve_returns_whether_a_dialect_was_recognized(tables):
    assert [served(tables, data)[1] for data in (HELLO, b"table|0.1|0|update|1\n", b"hello\n", b"")] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("said", "table", "dialect"),
    [
        (HELLO, "aliases", "smtpd-tables"),
        (b"table|0.1|0|old|update|1\n", "old", "procexec"),
        (b"table|0.1|0|update|1\n", "", "procexec"),
    ],
)
def test_table_name_is_reported_once_and_the_source_warms_up_after_the_first_answer(
    tables, caplog, said, table, dialect
):
    names = []
    served(tables, said + b"table|0.1|0|t|update|2\n", names.append)
    assert ([table], [table], True) == (
        names,
        tables.warmed_up,
        any(line.endswith(f"speaks {dialect}") for line in logged(caplog, logging.INFO)),
    )


def test_handshake_is_written_before_the_source_warms_up(tables):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        tables.warm_up = lambda _: seen.append(ours.recv(65536, socket.MSG_DONTWAIT))
        seen: list[bytes] = []
        ours.sendall(HELLO)
        ours.shutdown(socket.SHUT_WR)
        Server(tables, lambda _: None).serve(theirs.fileno(), theirs.fileno())
    assert seen == [b"register|alias\nregister|ready\n"]


def test_failed_warm_up_affects_no_answer(tables, caplog):
    tables.cold = RuntimeError("a bug")
    assert replies(tables, ROOT % 1) == [b"lookup-result|1|found|gilles"]
    assert logged(caplog) == ["internal error; please report it"]


@pytest.mark.parametrize("error", [RuntimeError("bug"), RecursionError(), MemoryError(), ValueError("x\n\x1b")])
def test_exception_in_an_answer_is_an_error_reply_and_the_loop_continues(tables, error):
    tables.errors[b"bug"] = error
    ask = b"table|0.1|0|aliases|lookup|alias|1|bug\n"
    name = type(error).__name__.encode()
    assert [
        b"lookup-result|1|error|internal error (%b); see the log of table-consul" % name,
        b"lookup-result|2|found|gilles",
    ] == replies(tables, ask, ROOT % 2)


def test_exception_is_logged_once_with_its_traceback(tables, caplog):
    tables.errors[b"root"] = RuntimeError("bug")
    replies(tables, *(ROOT % n for n in range(9)))
    assert [record.exc_info is not None for record in caplog.records if record.levelno >= logging.WARNING] == [True]


def test_invalid_reply_is_an_error_reply(tables, monkeypatch, caplog):
    monkeypatch.setattr(tables, "answer", lambda *_: Found(None))
    assert replies(tables, ROOT % 1) == [b"lookup-result|1|error|Found is not a reply to lookup"]
    assert logged(caplog) == ["lookup alias: Found is not a reply to lookup"]


def test_bad_entry_is_logged_once(tables, caplog):
    tables.errors[b"root"] = EntryError("aliases/alias/root: the value holds a |command")
    replies(tables, *(ROOT % n for n in range(9)))
    assert [line.startswith("aliases/alias/root: ") for line in logged(caplog)] == [True]


def test_outage_is_not_logged_by_the_server(tables, caplog):
    tables.errors[b"root"] = Unreachable("Consul is away")
    assert replies(tables, ROOT % 1) == [b"lookup-result|1|error|Consul is away"]
    assert (logged(caplog), "lookup alias: Consul is away" in logged(caplog, logging.DEBUG)) == ([], True)


@pytest.mark.parametrize("error", [ConfigError("FILE: key: no"), SourceError("token file: gone")])
def test_failed_update_has_a_reason(tables, error):
    tables.errors[None] = error
    assert [b"update-result|1|error|" + str(error).encode()] == replies(tables, b"table|0.1|0|aliases|update|1\n")


def test_line_without_an_answer_is_logged_once_and_escaped(tables, caplog):
    assert replies(tables, b"\x1b[31mhello\n" * 3) == []
    assert logged(caplog) == [r"not a protocol line: '\\x1b[31mhello'"]


def test_different_complaints_take_bounded_memory(tables, monkeypatch):
    monkeypatch.setattr(logging.getLogger("table_consul"), "disabled", True)
    lines = (b"%080d\n" % number for number in range(3 * MAX_COMPLAINTS))
    tracemalloc.start()
    Server(tables, lambda _: None).run(next(lines), lambda: next(lines, b""), lambda _: True)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 300 * MAX_COMPLAINTS


def test_all_requests_of_one_read_have_the_deadline_of_their_arrival(tables):
    ticks = iter(range(1000))
    served(tables, HELLO + ROOT % 1 + ROOT % 2, clock=lambda: float(next(ticks)))
    assert tables.arrivals == [0.0, 0.0]


class TestWrites:
    """Quick answers share one write; a slow answer does not delay others."""

    def run(self, tables, data, step, *, gone=False):
        written, now = [], [0.0]

        def clock():
            now[0] += step
            return now[0]

        server = Server(tables, lambda _: None, clock=clock)
        assert server.run(data, bytes, lambda data: written.append(data) or not gone)
        return [len(data.splitlines()) for data in written]

    def test_quick_answers_are_gathered(self, tables):
        assert self.run(tables, HELLO + b"".join(ROOT % n for n in range(10)), 0.0) == [12]

    def test_slow_answers_are_written_one_by_one(self, tables):
        answers = self.run(tables, HELLO + b"".join(ROOT % n for n in range(10)), 0.01)
        assert [each for each in answers if each] == [2, *[1] * 10]

    @pytest.mark.parametrize("step", [0.0, 0.01])
    def test_closed_peer_ends_the_loop(self, tables, step):
        self.run(tables, HELLO + ROOT % 1, step, gone=True)
        assert tables.warmed_up == []


def test_closed_descriptor_ends_the_loop(tables):
    ours, theirs = socket.socketpair()
    descriptor = theirs.detach()
    os.close(descriptor)
    ours.close()
    assert Server(tables, lambda _: None).serve(descriptor, descriptor) is False


def test_peer_closed_before_its_answer_ends_the_loop(tables):
    ours, theirs = socket.socketpair()
    ours.sendall(HELLO)
    ours.close()
    with theirs:
        assert Server(tables, lambda _: None).serve(theirs.fileno(), theirs.fileno())


def test_non_blocking_descriptors_are_waited_for(tables, monkeypatch):
    ours, theirs = socket.socketpair()
    waited = []
    with ours, theirs:
        theirs.setblocking(False)

        class Poll:
            def register(self, _fd, event):
                self.event = event

            def poll(self):
                waited.append(self.event)
                if self.event == select.POLLOUT or waited.count(select.POLLIN) == 2:
                    while len(ours.recv(65536)) == 65536:
                        pass
                if self.event == select.POLLIN:
                    (ours.sendall if len(waited) == 1 else ours.shutdown)(
                        HELLO + ROOT % 1 * 30 if len(waited) == 1 else socket.SHUT_WR
                    )

        monkeypatch.setattr("select.poll", Poll)
        tables.values[b"root"] = b"x" * 2000
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        assert Server(tables, lambda _: None).serve(theirs.fileno(), theirs.fileno())
    assert {select.POLLIN, select.POLLOUT} == {*waited}


def test_descriptor_above_1023_is_waited_for(monkeypatch):
    ours, theirs = socket.socketpair()
    honest = select.poll

    class Poll:
        def __init__(self):
            self.poller = honest()

        def register(self, fd, event):
            self.poller.register(fd, event)

        def poll(self):
            ours.sendall(b"late")
            return self.poller.poll()

    monkeypatch.setattr("select.poll", Poll)
    with ours, theirs:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 2048), limits[1]))
        high = fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD, 1500)
        try:
            theirs.setblocking(False)
            assert read(high) == b"late"
        finally:
            os.close(high)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


LINES = st.one_of(
    st.binary(max_size=40),
    st.lists(
        st.sampled_from(
            [b"table", b"config", b"ready", b"0.1", b"", b"lookup", b"check", b"fetch", b"update", b"alias"]
        )
        | st.binary(max_size=3),
        max_size=9,
    ).map(b"|".join),
).map(lambda line: line.replace(b"\n", b""))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(line=LINES, hello=st.booleans())
def test_any_line_has_one_answer_or_one_log_line_or_is_part_of_a_handshake(caplog, line, hello):
    caplog.clear()
    if hello:
        said = HELLO + line + b"\n" + ROOT % 9
    else:
        said = b"table|0.1|0|t|update|8\n" + line + b"\n" + b"table|0.1|0|t|lookup|9|alias|root\n"
    answered = served(Scripted(), said)[0]
    start = b"register|alias\nregister|ready\n" if hello else b"table-response|8|updated\n"
    end = (b"lookup-result|9|" if hello else b"table-response|9|") + b"found|gilles\n"
    assert (answered.startswith(start), answered.endswith(end)) == (True, True)
    middle = answered[len(start) : -len(end)]
    handshake = hello and line.partition(b"|")[0] == b"config"
    told = [text for text in logged(caplog) if text]
    if handshake:
        assert middle in (b"", start)
    else:
        assert middle or told
        assert middle.count(b"\n") <= 1
        outcome = rb"(found|not-found|ok|updated|failure|error\|).*"
        assert not middle or re.fullmatch(rb"[a-zA-Z-]+\|[^|\n]+\|" + outcome + rb"\n", middle, re.DOTALL)


def test_many_answers_all_arrive(tables):
    ours, theirs = socket.socketpair()
    count = 500
    with ours, theirs:
        ours.sendall(HELLO + b"".join(ROOT % n for n in range(count)))
        ours.shutdown(socket.SHUT_WR)
        Server(tables, lambda _: None).serve(theirs.fileno(), theirs.fileno())
        theirs.close()
        data = b"".join(iter(lambda: ours.recv(65536), b""))
    assert [b"lookup-result|%d|found|gilles" % n for n in range(count)] == data.splitlines()[2:]


# ---- auth ----


@pytest.mark.parametrize(
    ("version", "names"),
    [("7.9.0-portable", ["alias", "auth"]), ("7.10", ["alias", "auth"]), ("7.8.0p1", ["alias"]), ("x.9", ["alias"])],
)
def test_auth_is_registered_with_smtpd_that_keeps_the_case_of_passwords(tables, caplog, version, names):
    tables.registered = ["alias", "auth"]
    answered = served(tables, b"config|smtpd-version|%b\nconfig|ready\n" % version.encode())[0].decode()
    assert answered.split() == [*(f"register|{name}" for name in names), "register|ready"]
    assert len(logged(caplog)) == 2 - len(names)


def test_older_smtpd_gets_the_default_services_for_auth_alone(tables):
    tables.registered = ["auth"]
    answered = served(tables, b"config|smtpd-version|7.6.0\nconfig|ready\n")[0].decode()
    assert answered.split() == [*(f"register|{name}" for name in DEFAULT_SERVICES), "register|ready"]


# ---- counting ----


class Counting:
    def __init__(self):
        self.malformed, self.added, self.failures = 0, [], []
        self.error: Exception | None = None

    def add(self, request, kind, seconds):
        if self.error is not None:
            raise self.error
        self.added.append((request.id, kind))

    def failed(self, table, error, now):
        if self.error is not None:
            raise self.error
        self.failures.append((table, str(error)))


def test_answers_are_counted_by_outcome(tables):
    counters = Counting()
    tables.errors[b"away"] = Unreachable("away")
    away, short = b"table|0.1|0|aliases|lookup|alias|2|away\n", b"table|0.1|0|t|check|alias|3\n"
    served(tables, HELLO + ROOT % 1 + away + b"hello\n" + short, counters=counters)
    assert counters.added == [(b"1", Found), (b"2", Failed), (b"3", Failed)]
    assert (counters.failures, counters.malformed) == ([("aliases", "away")], 2)


def test_bug_in_counting_affects_no_answer(tables, caplog):
    counters = Counting()
    counters.error = RuntimeError("bug")
    tables.errors[b"away"] = Unreachable("away")
    away = b"table|0.1|0|aliases|lookup|alias|2|away\n"
    answered, _ = served(tables, HELLO + ROOT % 1 + away, counters=counters)
    assert answered.endswith(b"lookup-result|1|found|gilles\nlookup-result|2|error|away\n")
    assert set(logged(caplog)) == {"internal error; please report it"}


def test_bug_in_counting_invalid_requests_affects_no_reply(tables, caplog):
    counters = Counting()
    counters.error = RuntimeError("bug")
    answered, _ = served(tables, HELLO + b"hello\ntable|0.1|0|t|check|alias|3\n" + ROOT % 1, counters=counters)
    assert answered.endswith(b"check-result|3|error|missing fields\nlookup-result|1|found|gilles\n")


def test_failed_start_of_the_log_affects_no_answer(tables, caplog):
    def broken(_name):
        raise RuntimeError("bug")

    assert served(tables, HELLO + ROOT % 1, broken)[0].endswith(b"lookup-result|1|found|gilles\n")
    assert logged(caplog) == ["internal error; please report it"]


# ---- imsg ----


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 10_000])
def test_imsg_is_recognized_and_answered_on_the_socket(tables, cut):
    """smtpd: smtpd.c, fork_proc_backend of 7.5 and before: standard output is not the socket."""
    body = struct.pack("=I", 2) + b"aliases".ljust(2048, b"\0")
    opened = struct.pack("=IHHII", 2, 16 + len(body), 0, 0, 1) + body
    ours, theirs = socket.socketpair()
    with ours, theirs, open(os.devnull, "wb") as nowhere:
        ours.sendall(opened[:cut])
        rest = threading.Timer(0.01, lambda: (ours.sendall(opened[cut:]), ours.shutdown(socket.SHUT_WR)))
        rest.start()
        assert Server(tables, lambda _: None).serve(theirs.fileno(), nowhere.fileno())
        rest.join()
        answer = ours.recv(65536)
    assert struct.unpack("=IHHII", answer)[:2] == (0, 16)


def test_failed_list_of_services_registers_the_defaults(tables, monkeypatch, caplog):
    def broken(_name):
        raise RuntimeError("bug")

    monkeypatch.setattr(tables, "services", broken)
    answered, _ = served(tables, HELLO)
    assert answered.decode().split() == [*(f"register|{name}" for name in DEFAULT_SERVICES), "register|ready"]
    assert logged(caplog) == ["internal error; please report it"]


def test_version_that_is_not_a_number_registers_the_default_services(tables):
    tables.registered = ["auth"]
    hello = HELLO.replace(b"config|ready", b"config|smtpd-version|%b.9\nconfig|ready" % (b"7" * 5000))
    answered, _ = served(tables, hello)
    assert answered.decode().split() == [*(f"register|{name}" for name in DEFAULT_SERVICES), "register|ready"]
