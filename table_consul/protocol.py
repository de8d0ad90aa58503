"""The line dialects between smtpd and its tables: bytes in, events out, and replies that cannot be malformed.

Knows nothing of sockets, of Consul, or of what a table holds. Two dialects, told apart by the first line (imsg, the
binary dialect of OpenSMTPD up to 7.5, is not made of lines and has a module of its own):

``smtpd-tables``
    OpenSMTPD 7.6 and later, smtpd-tables(7). Begins with ``config|``. The service comes before the id.
``procexec``
    The prototype of 2020, with and without the table's name in a request. Begins with ``table|``. The id, there called
    token, comes before the service.

Both say that they are version 0.1. Requests are answered strictly in order, each with its own id: smtpd takes anything
else as reason to exit (smtpd: table_proc.c, table_proc_recv).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

import msgspec

from table_consul.errors import ReplyError, printable

# Far above what smtpd sends (a key has at most 1,023 bytes: smtpd: table.c, table_lookup), far below what hurts.
MAX_LINE = 65536

WITH_KEY = (b"check", b"lookup")
OPS = (b"check", b"lookup", b"fetch", b"update")


class Request(msgspec.Struct, frozen=True, gc=False):
    """One question of smtpd. ``table`` is empty where the dialect brings no name; ``key`` for fetch and update."""

    op: str
    id: bytes
    table: str
    service: str
    key: bytes

    def __repr__(self) -> str:
        key = b"..." if self.service == "auth" else self.key  # it holds a password
        return f"Request({self.op!r}, {self.id!r}, {self.table!r}, {self.service!r}, {key!r})"


class Ready(NamedTuple):
    """smtpd has said all about itself (``config|ready``) and waits for the services to be registered."""

    config: Mapping[str, str]


class Malformed(NamedTuple):
    """smtpd sent what its protocol does not know. ``request`` is there when an error can be answered."""

    reason: str
    request: Request | None


class Found(msgspec.Struct, frozen=True, gc=False):
    """The key is in the table; for lookup and fetch with its value, which is one line and never empty.

    Raises:
        ReplyError: the value would break smtpd (smtpd: table_proc.c, "empty response", and one getline per reply).
    """

    value: bytes | None = None

    def __post_init__(self) -> None:
        value = self.value
        if value is not None and (not value or b"\n" in value or b"\r" in value or b"\0" in value):
            raise ReplyError("a value is one line, not empty, without NUL")


class NotFound(msgspec.Struct, frozen=True, gc=False):
    """The key is not in the table: proven, for smtpd bounces the mail."""


class Updated(msgspec.Struct, frozen=True, gc=False):
    """The table has been told to read its configuration and its source anew."""


class Failed(msgspec.Struct, frozen=True):
    """The table cannot tell now: smtpd keeps the mail, and logs the reason. ``cause`` is for our own log."""

    reason: str
    cause: Exception | None = None


Reply = Found | NotFound | Updated | Failed
Event = Ready | Request | Malformed


class Session:
    """One conversation with smtpd, in a dialect that its first line decides."""

    # End of file alone ends it; in imsg there is a message for that.
    closed = False

    def __init__(self, procexec_reply: Callable[[str], str] = lambda _table: "auto") -> None:
        """``procexec_reply`` tells for a table the first word of replies in the dialect of 2020.

        ``auto`` goes by the request: ``table-response`` if it names the table, else ``table-result``.
        """
        self.dialect: str | None = None
        self._procexec_reply = procexec_reply
        self._lines: deque[bytes] = deque()
        self._tail = b""
        self._overlong = False
        self._config: dict[str, str] = {}

    @property
    def takes_shortcuts(self) -> bool:
        """Whether smtpd is at the beginning of a line, in the dialect ``smtpd-tables``."""
        return self.dialect == "smtpd-tables" and not self._tail and not self._lines and not self._overlong

    def receive_data(self, data: bytes) -> None:
        """Take what was read from smtpd, in any cut."""
        lines = (self._tail + data).split(b"\n")
        self._tail = lines.pop()
        if self._overlong and lines:
            del lines[0]
            self._overlong = False
        self._lines.extend(lines)
        if self._overlong:
            self._tail = b""
        elif len(self._tail) > MAX_LINE:
            self._lines.append(self._tail)
            self._tail = b""
            self._overlong = True

    def next_event(self) -> Event | None:
        """What smtpd said next, or None when that has not arrived yet."""
        while self._lines:
            line = self._lines.popleft()
            kind = line.partition(b"|")[0]
            if len(line) > MAX_LINE:
                return self._refuse(line[:2048], f"a line of more than {MAX_LINE} bytes")
            if kind == b"table":
                self.dialect = self.dialect or "procexec"
                return DIALECTS[self.dialect].parse(line)
            if kind != b"config":
                return Malformed(f"this is no line of smtpd's: {printable(line)!r}", None)
            if self.dialect == "procexec":
                return Malformed(f"a handshake in the middle of the conversation: {printable(line)!r}", None)
            self.dialect = "smtpd-tables"
            key, _, value = line[7:].decode("utf-8", "backslashreplace").partition("|")
            if key == "ready":
                return Ready(dict(self._config))
            if len(self._config) < 64:  # a bound only; smtpd 7.9 sends three
                self._config[key] = value
        return None

    def _refuse(self, head: bytes, reason: str) -> Malformed:
        event = DIALECTS[self.dialect].parse(head) if self.dialect and head.startswith(b"table|") else None
        return Malformed(reason, event if isinstance(event, Request) else None)

    def register(self, services: Iterable[str]) -> bytes:
        """The reply to Ready. smtpd exits when it is told an unknown service, or none."""
        return b"".join(f"register|{name}\n".encode() for name in [*services, "ready"])

    def send(self, request: Request, reply: Reply) -> bytes:
        """The reply to this request as bytes for smtpd.

        Raises:
            ReplyError: there is no such reply to such a request.
        """
        if isinstance(reply, Updated) is not (request.op == "update") and not isinstance(reply, Failed):
            raise ReplyError(f"{type(reply).__name__} does not answer {request.op}")
        if isinstance(reply, Found) and (reply.value is None) is not (request.op == "check"):
            raise ReplyError(f"{request.op} is answered {'without' if reply.value else 'with'} a value")
        return DIALECTS[self.dialect or "procexec"].format(request, reply, self._procexec_reply)


def _parse_smtpd_tables(line: bytes) -> Request | Malformed:
    parts = line.split(b"|", 7)
    if len(parts) == 8 and parts[6] and parts[4] in WITH_KEY:  # nearly all of them; what follows would say the same
        return Request(_text(parts[4]), parts[6], _text(parts[3]), _text(parts[5]), parts[7])
    op = parts[4] if len(parts) > 5 else b""
    if op == b"update":
        service, ident, key = b"", parts[5], b""
    elif len(parts) > 6:
        service, ident, key = parts[5], parts[6], b"".join(parts[7:])
    else:
        return Malformed(f"fields are missing: {printable(line)!r}", None)
    return _request(op, ident, parts[3], service, key, complete=op in (b"update", b"fetch") or len(parts) > 7)


def _parse_procexec(line: bytes) -> Request | Malformed:
    parts = line.split(b"|", 7)
    if len(parts) > 5 and parts[4] in OPS:
        table, op, ident, rest = parts[3], parts[4], parts[5], parts[6:]
    elif len(parts) > 4 and parts[3] in OPS:
        table, op, ident, rest = b"", parts[3], parts[4], line.split(b"|", 6)[5:]
    else:
        return Malformed(f"fields are missing, or the request is unknown: {printable(line)!r}", None)
    complete = len(rest) >= {b"update": 0, b"fetch": 1}.get(op, 2)
    return _request(op, ident, table, b"".join(rest[:1]), b"".join(rest[1:]), complete=complete)


def _request(
    op: bytes, ident: bytes, table: bytes, service: bytes, key: bytes, *, complete: bool
) -> Request | Malformed:
    request = Request(_text(op), ident, _text(table), _text(service), key if op in WITH_KEY else b"")
    if not ident:
        return Malformed("a request without id cannot be answered", None)
    if op not in OPS:
        # A word that smtpd itself chose: it will look for the same word in the reply.
        return Malformed(f"unknown request {printable(op)!r}", request if op.isalpha() else None)
    if not complete:
        return Malformed("fields are missing", request)
    return request


@lru_cache(1024)
def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def _format_smtpd_tables(request: Request, reply: Reply, _procexec_reply: Callable[[str], str]) -> bytes:
    head = request.op.encode() + b"-result|" + request.id + b"|"
    if isinstance(reply, Found):
        return head + (b"found\n" if reply.value is None else b"found|" + reply.value + b"\n")
    if isinstance(reply, NotFound):
        return head + b"not-found\n"
    if isinstance(reply, Updated):
        return head + b"ok\n"
    return head + b"error|" + printable(reply.reason, 400).encode() + b"\n"


def _format_procexec(request: Request, reply: Reply, procexec_reply: Callable[[str], str]) -> bytes:
    word = procexec_reply(request.table)
    if word == "auto":
        word = "table-response" if request.table else "table-result"
    head = word.encode() + b"|" + request.id + b"|"
    if isinstance(reply, Found):
        return head + (b"found\n" if reply.value is None else b"found|" + reply.value + b"\n")
    if isinstance(reply, NotFound):
        return head + b"not-found\n"
    return head + (b"updated\n" if isinstance(reply, Updated) else b"failure\n")


class Dialect(NamedTuple):
    """How a request is read, and how a reply is written."""

    parse: Callable[[bytes], Request | Malformed]
    format: Callable[[Request, Reply, Callable[[str], str]], bytes]


DIALECTS: Mapping[str, Dialect] = {
    "smtpd-tables": Dialect(_parse_smtpd_tables, _format_smtpd_tables),
    "procexec": Dialect(_parse_procexec, _format_procexec),
}
