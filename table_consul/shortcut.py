"""The one place where the way of an answer is written out, in both dialects of today: a key found in memory.

Nearly all that a mail server asks a healthy table is this: `lookup`, a service of exact keys, the key is there. Going
through Session, Responder and Sources for it costs four microseconds in place of one (bench/). All else, absence
included, takes the long way; and a test holds that both say the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from table_consul.imsg import ANSWER, LOOKUP, MAX_MESSAGE, MAX_VALUE, NAMES, OK, USUAL
from table_consul.protocol import Found, Request
from table_consul.tally import Tally


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

    def __init__(self, know: Callable[[str, str], Known | None], tally: Tally, clock: Callable[[], float]) -> None:
        """``know`` gives the values of a table's service, or None where they are not simply in memory."""
        self._know = know
        self._tally = tally
        self._clock = clock
        self._asked: tuple[bytes | str, bytes | int] | None = None
        self._known: Known | None = None
        self._request = Request("lookup", b"", "", "", b"")

    def replies_in_lines(self, data: bytes) -> bytes | None:
        """All replies at once, or None: then nothing has been answered, and the long way is to be taken."""
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
        return b"".join(replies)

    def reply_in_imsg(self, data: bytes, table: str) -> bytes | None:
        """The same for imsg, where one question comes at a time, and OPEN has told the table."""
        size = len(data)
        if not USUAL.size < size <= MAX_MESSAGE:
            return None
        kind, length, _, _, _, bit, count = USUAL.unpack_from(data)
        if kind != LOOKUP or length != size or count or data.find(b"\0", USUAL.size) != size - 1:
            return None
        known = self._known
        now = self._clock()
        if known is None or known.memory.state is not known.state or now > known.until or self._asked != (table, bit):
            known = self._learn(table, bit) if bit in NAMES else None
            if known is None or now > known.until:
                return None
        value = known.values.get(data[USUAL.size : -1])
        if not value or len(value) > MAX_VALUE:
            return None
        return ANSWER.pack(OK, ANSWER.size + len(value) + 1, 0, 0, 0, 1) + value + b"\0"

    def count(self, number: int, arrived: float) -> None:
        """Note that so many replies have been written."""
        seconds = self._clock() - arrived
        for _ in range(number):
            self._tally.add(self._request, Found, seconds)

    def _learn(self, table: bytes | str, service: bytes | int) -> Known | None:
        names = _text(table), _text(service)
        self._known = self._know(*names)
        self._asked = (table, service)
        self._request = Request("lookup", b"", *names, b"")
        return self._known


def _text(name: bytes | str | int) -> str:
    if isinstance(name, int):
        return NAMES[name]
    return name if isinstance(name, str) else name.decode("utf-8", "backslashreplace")
