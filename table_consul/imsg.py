"""The binary dialect of OpenSMTPD up to 7.5: the same events and replies as ``protocol``, framed as imsg(3) does.

Independent of sockets, Consul, and the contents of tables. A message is a header of 16 bytes and a body; all numbers
are in the byte order of this machine, as both ends run on it (smtpd: table_proc.c; openbsd-compat/imsg.h)::

    smtpd                                            answer, always of type OK
    OPEN    uint32 version, char name[2048]          nothing
    CHECK   int32 service, size_t n, n parameters,   int32: 1 found, 0 not found, -1 error
    LOOKUP    key, NUL                               the same, and after a 1: value, NUL
    FETCH   int32 service, size_t n, n parameters    the same, and after a 1: value, NUL
    UPDATE                                           int32: 1 updated, 0 not
    CLOSE                                            none: no request follows

A parameter is two strings, each with its NUL; smtpd sends none. smtpd sends one request at a time and exits on a reply
of any other form. From the sources of 6.8.0p2 and 7.4.0p1, whose code for tables is the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct, calcsize

from table_consul.errors import ReplyError, counted, printable
from table_consul.protocol import Event, Failed, Found, Malformed, NotFound, Ready, Reply, Request, Updated
from table_consul.services import SERVICES

OK, OPEN, CLOSE, UPDATE, CHECK, LOOKUP, FETCH = 0, 2, 3, 4, 5, 6, 7
OPS = {CHECK: "check", LOOKUP: "lookup", FETCH: "fetch"}

HEADER = Struct("=IHHII")  # type, length with the header, flags, peer id, process id
_VERSION = Struct("=I")
# Service and count, a size_t of this machine; in standard sizes there is no padding between them.
_QUESTION = Struct("=i" + {4: "I", 8: "Q"}[calcsize("@N")])
_ANSWER = Struct(HEADER.format + "i")

# openbsd-compat/imsg.h, MAX_IMSGSIZE: imsg_get() at either end fails on a longer message, and smtpd exits.
MAX_MESSAGE = 16384
MAX_VALUE = MAX_MESSAGE - _ANSWER.size - len(b"\0")

NAMES = {1 << place: name for place, name in enumerate(SERVICES)}


def speaks(data: bytes) -> bool:
    """Whether a conversation that begins with these bytes is in this dialect: it begins with a number, not a letter."""
    return bool(data) and data[0] < 8


class Session:
    """One conversation with smtpd, as ``protocol.Session``. Requests carry the table's name from OPEN.

    After an impossible length the next message cannot be found. The length is reported once, and the rest of the input
    is ignored, because smtpd exits on a reply without a request. smtpd itself cannot send such a length: its own
    imsg_create() rejects it.
    """

    def __init__(self) -> None:
        self.dialect: str | None = None
        self.closed = False
        self._framing_lost = False
        self._table = ""
        self._data = b""

    def receive_data(self, data: bytes) -> list[Event]:
        """The events that are complete with this data, which may be cut anywhere. After CLOSE there are none."""
        if self._data:
            data = self._data + data
        events: list[Event] = []
        at, size = 0, len(data)
        while size - at >= HEADER.size and not self.closed and not self._framing_lost:
            kind, length, _, _, _ = HEADER.unpack_from(data, at)
            if not HEADER.size <= length <= MAX_MESSAGE:
                self._framing_lost = True
                text = f"invalid message length {length}; framing lost, ignoring all further input"
                events.append(Malformed(text, None))
            elif size - at < length:
                break
            else:
                event = self._event(kind, data[at + HEADER.size : at + length])
                if event is not None:
                    events.append(event)
                at += length
        self._data = b"" if self.closed or self._framing_lost else data[at:]
        return events

    def _event(self, kind: int, body: bytes) -> Event | None:
        self.dialect = "imsg"
        op = OPS.get(kind)
        if op is not None:
            return self._question(op, body)
        if kind == OPEN:
            return self._open(body)
        if kind == UPDATE:
            return Request("update", b"", self._table, "", b"")
        if kind == CLOSE:
            self.closed = True
            return None
        return Malformed(f"unknown message type {kind}", None)

    def _open(self, body: bytes) -> Ready:
        # Another version is reported, not rejected: smtpd waits for this reply and exits on a rejection.
        version = _VERSION.unpack_from(body)[0] if len(body) >= _VERSION.size else 0
        self._table = body[_VERSION.size :].partition(b"\0")[0].decode("utf-8", "backslashreplace")
        return Ready({"tablename": self._table, "protocol": f"imsg {version}"})

    def _question(self, op: str, body: bytes) -> Request | Malformed:
        if len(body) < _QUESTION.size:
            return self._malformed(op, "", "missing fields")
        bit, count = _QUESTION.unpack_from(body)
        service = NAMES.get(bit) or f"{bit:#x}"
        text = body[_QUESTION.size :]
        if count:
            # Each has two NULs, so a large count takes no longer than the length of the body allows.
            parts = text.split(b"\0", 2 * count if count <= len(text) else -1)
            if len(parts) <= 2 * count:
                return self._malformed(
                    op, service, f"the message is too short for its {counted(count, 'parameter', 'parameters')}"
                )
            text = parts[-1]
        if op == "fetch":
            return self._malformed(op, service, "fetch takes no key") if text else self._request(op, service, b"")
        if text.find(b"\0") == len(text) - 1 >= 0:
            return Request(op, b"", self._table, service, text[:-1])
        problem = "contains NUL" if text.endswith(b"\0") else "does not end with NUL"
        return self._malformed(op, service, f"the key {problem}: {printable(text.removesuffix(bytes(1)))!r}")

    def _request(self, op: str, service: str, key: bytes) -> Request:
        return Request(op, b"", self._table, service, key)

    def _malformed(self, op: str, service: str, reason: str) -> Malformed:
        return Malformed(reason, self._request(op, service, b""))

    def register(self, _services: Iterable[str]) -> bytes:
        """The reply to Ready. In this dialect there is no registration, and smtpd asks for any service."""
        return HEADER.pack(OK, HEADER.size, 0, 0, 0)

    def send(self, request: Request, reply: Reply) -> bytes:
        """The reply to this request as bytes for smtpd.

        Raises:
            ReplyError: the reply does not fit the request, or the value does not fit into a message.
        """
        op = request.op
        if isinstance(reply, Found):
            value = reply.value
            if value is None and op == "check":
                return _answer(1)
            if value is not None and op in ("lookup", "fetch"):
                if len(value) > MAX_VALUE:
                    raise ReplyError(f"the value has {len(value)} bytes; this smtpd accepts at most {MAX_VALUE}")
                return _answer(1, value + b"\0")
        elif op == "update":
            if isinstance(reply, (Updated, Failed)):
                return _answer(1 if isinstance(reply, Updated) else 0)
        elif isinstance(reply, (NotFound, Failed)):
            return _answer(0 if isinstance(reply, NotFound) else -1)
        raise ReplyError(f"{type(reply).__name__} is not a reply to {op}")


def _answer(verdict: int, value: bytes = b"") -> bytes:
    return _ANSWER.pack(OK, _ANSWER.size + len(value), 0, 0, 0, verdict) + value
