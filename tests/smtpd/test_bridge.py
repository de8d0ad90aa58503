"""The bridge's short way, on a child without a process: what the long way says, it says too."""

from __future__ import annotations

import socket
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from table_consul import bridge, imsg, server
from table_consul.bridge import Bridge
from table_consul.child import Child
from table_consul.server import Loop
from tests.smtpd.test_imsg import CHECK, CLOSE, FETCH, LOOKUP, UPDATE, message, opening, question

ANSWERS = {
    b"root": b"lookup-result|%b|found|gilles\n",
    b"bar": b"lookup-result|%b|found|a|b\n",
    b"longest": b"lookup-result|%b|found|" + b"x" * imsg.MAX_VALUE + b"\n",
    b"long": b"lookup-result|%b|found|" + b"x" * (imsg.MAX_VALUE + 1) + b"\n",
    b"empty": b"lookup-result|%b|found|\n",
    b"return": b"lookup-result|%b|found|a\rb\n",
    b"nul": b"lookup-result|%b|found|a\0b\n",
    b"nobody": b"lookup-result|%b|not-found\n",
    b"error": b"lookup-result|%b|error|no idea\n",
    b"other": b"lookup-result|1%b|found|gilles\n",
    b"nonsense": b"hello\n",
    b"end": b"",
}


class Wire:
    """The socket to a child that answers by ANSWERS, and ends when there is nothing to say."""

    def __init__(self):
        self.said = []
        self.waiting = b""

    def send(self, data, flags=0):
        for line in data.splitlines():
            parts = line.split(b"|", 7)
            if parts[0] == b"table":
                answer = ANSWERS.get(parts[7] if len(parts) > 7 else b"", b"%b-result|%%b|found\n" % parts[4])
                self.said.append(parts[3:6] + parts[7:])
                self.waiting += answer % parts[6] if b"%" in answer and parts[4] != b"update" else answer
            elif line == b"config|ready":
                self.waiting += b"register|alias\nregister|ready\n"
        return len(data)

    def setsockopt(self, *_):
        pass

    def recv(self, size, flags=0):
        data, self.waiting = self.waiting[:size], self.waiting[size:]
        return data


class Scripted(Child):
    def __init__(self, command, table, dialect, clock):
        self.dialect, self.proven, self._clock, self._said = dialect, False, clock, b""
        self._services, self._shaken, self._asked, self._started = set(), False, 0, clock()
        self._sayable, self._wire, self._patience, self._timeval = {}, command[0], inf, "=qq"
        self._wire.send(b"config|ready")

    def close(self, patience=0.0):
        self._wire.waiting = b""

    def _end(self):
        return "it has ended"


def served(chunks, *, short):
    """What smtpd is told, and what the child was asked."""
    wire = Wire()
    now = iter(range(100_000))
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.MonkeyPatch.context() as patch:
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        patch.setattr(bridge, "Child", Scripted)
        made = Bridge("table-x", lambda: [wire], "smtpd-tables", 1e9, lambda: next(now) / 1000, lambda: 0.0)
        waiting = iter(chunks)
        patch.setattr(server, "_read", lambda fd: next(waiting, b""))
        Loop(made, made.answer, lambda name: None, short=made if short else None).serve(ours.fileno(), ours.fileno())
        ours.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: theirs.recv(65536), b"")), wire.said


QUESTIONS = st.builds(
    question,
    st.sampled_from([LOOKUP, LOOKUP, LOOKUP, LOOKUP, CHECK, FETCH]),
    st.sampled_from([0x1, 0x1, 0x1, 0x400, 0x4000]),  # alias, string, none
    st.sampled_from([*(key + b"\0" for key in ANSWERS), b"\0", b"root", b"a\nb\0", b"a\rb\0"]),
    st.sampled_from([0, 0, 0, 1]),
) | st.sampled_from([message(UPDATE), message(4711), message(CLOSE), opening(b"other"), b"half"])


@given(st.lists(st.lists(QUESTIONS, min_size=1, max_size=2).map(b"".join), max_size=8))
def test_the_short_way_and_the_long_way_say_and_ask_the_same(chunks):
    chunks = [opening(), question(LOOKUP, 0x1, b"root\0"), *chunks]
    assert served(chunks, short=True) == served(chunks, short=False)


def test_a_second_lookup_takes_the_short_way(monkeypatch):
    asked = []
    ask = Child.ask
    monkeypatch.setattr(Child, "ask", lambda self, *arguments: asked.append(1) or ask(self, *arguments))
    replies, _ = served([opening(), *[question(LOOKUP, 0x1, b"root\0")] * 3], short=True)
    assert (replies.count(b"gilles\0"), len(asked)) == (3, 1)


@pytest.mark.parametrize("key", [b"nobody", b"error", b"long", b"nonsense", b"end"])
def test_what_the_short_way_cannot_say_is_asked_only_once(key):
    chunks = [opening(), question(LOOKUP, 0x1, b"root\0"), question(LOOKUP, 0x1, key + b"\0")]
    assert [each[-1] for each in served(chunks, short=True)[1]] == [b"root", key]
