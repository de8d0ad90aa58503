"""The one place where the way of an answer is written out, in both dialects of today: a key found in memory.

Nearly all that a mail server asks a healthy table is this: `lookup`, a service of exact keys, the key is there. Going
through Session, Responder and Tables for it costs four microseconds in place of one (bench/). All else, absence
included, takes the long way; and a test holds that both say the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from table_consul import imsg
from table_consul.counters import Counters
from table_consul.imsg import LOOKUP, MAX_VALUE, found, usual
from table_consul.protocol import Found, Request, Session


class Memory(Protocol):
    """Where the present state of a mirror stands: the same object for as long as nothing has changed."""

    @property
    def state(self) -> object:
        """What is compared by identity."""


class Known(NamedTuple):
    """The values of one service, good for as long as ``memory`` still is in that ``state``, and until a moment."""

    memory: Memory
    state: object
    values: Mapping[bytes, bytes]
    until: float


class Shortcut:
    """Replies to a chunk of bytes from smtpd, if it consists of such lookups of one service and nothing else."""

    def __init__(self, know: Callable[[str, str], Known | None], tally: Counters, clock: Callable[[], float]) -> None:
        """``know`` gives the values of a table's service, or None where they are not simply in memory."""
        self._know = know
        self._tally = tally
        self._clock = clock
        self._asked: tuple[bytes | str, bytes | str] | None = None
        self._known: Known | None = None
        self._request = Request("lookup", b"", "", "", b"")
        self._number = 0

    def replies(self, data: bytes, session: Session | imsg.Session) -> bytes | None:
        """All replies at once, or None: then nothing has been answered, and the long way is to be taken."""
        if isinstance(session, imsg.Session):
            return self._in_imsg(data, session.table)
        return self._in_lines(data)

    def _in_lines(self, data: bytes) -> bytes | None:
        now = self._clock()
        replies: list[bytes] = []
        if data[-1:] != b"\n":
            return None
        for line in data[:-1].split(b"\n"):
            parts = line.split(b"|", 7)
            if len(parts) != 8 or parts[4] != b"lookup" or parts[0] != b"table" or not parts[6]:
                return None
            known = self._known
            if (
                known is None
                or known.memory.state is not known.state
                or now > known.until
                or (parts[3], parts[5]) != self._asked
            ):
                known = None if replies else self._learn(parts[3], parts[5])
                if known is None or now > known.until:
                    return None
            value = known.values.get(parts[7])
            if not value:
                return None
            replies.append(b"lookup-result|" + parts[6] + b"|found|" + value + b"\n")
        self._number = len(replies)
        return b"".join(replies)

    def _in_imsg(self, data: bytes, table: str) -> bytes | None:
        asked = usual(data)
        if asked is None or asked[0] != LOOKUP:
            return None
        _, service, key = asked
        known = self._known
        now = self._clock()
        if (
            known is None
            or known.memory.state is not known.state
            or now > known.until
            or self._asked != (table, service)
        ):
            known = self._learn(table, service)
            if known is None or now > known.until:
                return None
        value = known.values.get(key)
        if not value or len(value) > MAX_VALUE:
            return None
        self._number = 1
        return found(value)

    def count(self, arrived: float) -> None:
        """Note that the replies have been written."""
        seconds = self._clock() - arrived
        for _ in range(self._number):
            self._tally.add(self._request, Found, seconds)

    def _learn(self, table: bytes | str, service: bytes | str) -> Known | None:
        names = _text(table), _text(service)
        self._known = self._know(*names)
        self._asked = (table, service)
        self._request = Request("lookup", b"", *names, b"")
        return self._known


def _text(name: bytes | str) -> str:
    return name if isinstance(name, str) else name.decode("utf-8", "backslashreplace")
