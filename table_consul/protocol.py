"""The line dialects between smtpd and its tables: bytes in, events out, and replies that cannot be malformed.

Independent of sockets, Consul, and the contents of tables. There are two dialects, which the first line distinguishes
(imsg, the binary dialect of OpenSMTPD up to 7.5, is a module of its own):

``smtpd-tables``
    OpenSMTPD 7.6 and later, smtpd-tables(7). Begins with ``config|``. The service comes before the id.
``procexec``
    The prototype of 2020, with and without the table's name in a request. Begins with ``table|``. The id, there called
    token, comes before the service.

Both call themselves version 0.1. Requests are answered strictly in order, each with its own id: smtpd exits on anything
else (smtpd: table_proc.c, table_proc_recv).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import msgspec

from table_consul.errors import ReplyError, printable

# Far above what smtpd sends (a key has at most 1,023 bytes: smtpd: table.c, table_lookup), and harmless.
MAX_LINE = 65536
# How much of a longer line is parsed: enough for the id, which an error reply needs.
HEAD_BYTES = 2048

WITH_KEY = ("check", "lookup")
OPS = (*WITH_KEY, "fetch", "update")


class Request(msgspec.Struct, frozen=True, gc=False):
    """One request of smtpd. ``table`` is empty in dialects without table names, ``key`` for fetch and update."""

    op: str
    id: bytes
    table: str
    service: str
    key: bytes

    def __repr__(self) -> str:
        key = b"..." if self.service == "auth" else self.key  # it contains a password
        return f"Request({self.op!r}, {self.id!r}, {self.table!r}, {self.service!r}, {key!r})"


class Ready(NamedTuple):
    """The handshake is complete (``config|ready``); smtpd waits for ``register`` lines."""

    config: Mapping[str, str]


class Malformed(NamedTuple):
    """Invalid input from smtpd. With a ``request``, it gets an error reply."""

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
        # Numbers, because searching for one is three times as fast as searching for bytes.
        if value is not None and (not value or 10 in value or 13 in value or 0 in value):
            raise ReplyError("a value must be one line, not empty, without NUL")


class NotFound(msgspec.Struct, frozen=True, gc=False):
    """The key is not in the table. Absence must be proven: smtpd bounces the message."""


class Updated(msgspec.Struct, frozen=True, gc=False):
    """The table will read its configuration and its source again."""


class Failed(msgspec.Struct, frozen=True):
    """A temporary error: smtpd keeps the message and logs the reason. ``cause`` is for our own log."""

    reason: str
    cause: BaseException | None = None


Reply = Found | NotFound | Updated | Failed
Event = Ready | Request | Malformed
FOUND = Found()
NOT_FOUND = NotFound()


# A bound on how many combinations of table, operation and service are remembered; smtpd has some twenty.
MAX_NAMES = 1024


class Session:
    """One conversation with smtpd, in the dialect of its first line."""

    # Only end of file ends it; in imsg a message does.
    closed = False

    def __init__(self, procexec_reply: Callable[[str], str] = lambda _table: "auto") -> None:
        """``procexec_reply`` returns the first word of replies for a table in the dialect of 2020.

        ``auto`` is ``table-response`` if the request names the table, otherwise ``table-result``.
        """
        self.dialect: str | None = None
        self._procexec_reply = procexec_reply
        self._tail = b""
        self._overlong = False
        self._config: dict[str, str] = {}
        self._pipes = 0
        """How many ``|`` the table's name has; only the handshake contains the name as a whole."""
        self._breaks_keys = False
        """Whether this smtpd sends a login with a line break as several lines (before 7.8.0p1: smtpd: table_proc.c)."""
        self._seen: dict[tuple[bytes, bytes, bytes], tuple[str, str, str]] = {}
        """Table, operation and service of earlier checks and lookups, as text."""

    def receive_data(self, data: bytes) -> list[Event]:
        """The events that are complete with this data, which may be cut anywhere."""
        if self._tail:
            data = self._tail + data
        *lines, self._tail = data.split(b"\n")
        if self._overlong and lines:
            del lines[0]
            self._overlong = False
        events: list[Event] = []
        if self._breaks_keys and len(lines) > 1:
            # smtpd waits for each reply, so the other lines are a stranger's, and it would exit on a reply to them.
            events.append(self._broken_key(lines[0]))
            lines.clear()
        seen = self._seen if len(data) <= MAX_LINE else {}
        for line in lines:
            try:
                word, _, _, table, op, service, ident, key = line.split(b"|", 7)
                table_name, op_name, service_name = seen[table, op, service]
            except (ValueError, KeyError):
                word = b""
            if word == b"table" and ident:  # nearly all lines; _event would return the same
                events.append(Request(op_name, ident, table_name, service_name, key))
            elif (event := self._event(line)) is not None:
                events.append(event)
        if self._overlong:
            self._tail = b""
        elif len(self._tail) > MAX_LINE:
            events.append(self._reject(self._tail))
            self._tail = b""
            self._overlong = True
        return events

    def _event(self, line: bytes) -> Event | None:
        """The event of a line; None for a part of the handshake."""
        kind, _, rest = line.partition(b"|")
        if len(line) > MAX_LINE:
            return self._reject(line)
        if kind == b"table":
            self.dialect = self.dialect or "procexec"
            request = DIALECTS[self.dialect](line, self._pipes)
            usual = self.dialect == "smtpd-tables" and not self._pipes
            if usual and isinstance(request, Request) and request.op in WITH_KEY:
                _, _, _, table, op, service, *_ = line.split(b"|", 6)
                if len(self._seen) < MAX_NAMES:
                    self._seen[table, op, service] = (request.table, request.op, request.service)
            return request
        if kind != b"config":
            return Malformed(f"not a protocol line: {printable(line)!r}", None)
        if self.dialect == "procexec":
            return Malformed(f"unexpected config line after the first request: {printable(line)!r}", None)
        self.dialect = "smtpd-tables"
        key, _, value = rest.decode("utf-8", "backslashreplace").partition("|")
        if key == "ready":
            self._pipes = self._config.get("tablename", "").count("|")
            self._breaks_keys = "smtpd-version" in self._config and not is_7_9(self._config["smtpd-version"])
            return Ready(dict(self._config))
        if len(self._config) < 64:  # only a bound; smtpd 7.9 sends three
            self._config[key] = value
        return None

    def _reject(self, line: bytes) -> Malformed:
        head = line[:HEAD_BYTES] if line.startswith(b"table|") else b""
        event = DIALECTS[self.dialect](head, self._pipes) if self.dialect else None
        return Malformed(f"line longer than {MAX_LINE} bytes", event if isinstance(event, Request) else None)

    def _broken_key(self, line: bytes) -> Malformed:
        event = self._event(line)
        return Malformed("the key contains a line break", event if isinstance(event, Request) else None)

    def register(self, services: Iterable[str]) -> bytes:
        """The reply to Ready. smtpd exits when an unknown service is registered, or none."""
        return b"".join(f"register|{name}\n".encode() for name in [*services, "ready"])

    def send(self, request: Request, reply: Reply) -> bytes:
        """The reply to this request as bytes for smtpd.

        Raises:
            ReplyError: the reply does not fit the request.
        """
        if self.dialect == "smtpd-tables":
            head = _HEADS[request.op] if request.op in _HEADS else f"{request.op}-result|".encode()
        else:
            word = self._procexec_reply(request.table)
            if word == "auto":
                word = "table-response" if request.table else "table-result"
            head = word.encode() + b"|"
        # By class, which costs half of isinstance.
        if reply.__class__ is Found:
            value = reply.value
            if value is None:
                if request.op == "check":
                    return b"".join((head, request.id, b"|found\n"))
            elif request.op in ("lookup", "fetch"):
                return b"".join((head, request.id, b"|found|", value, b"\n"))
        elif reply.__class__ is NotFound:
            if request.op != "update":
                return b"".join((head, request.id, b"|not-found\n"))
        elif isinstance(reply, Failed):
            reason = f"|error|{printable(reply.reason, 400)}\n" if self.dialect == "smtpd-tables" else "|failure\n"
            return head + request.id + reason.encode()
        elif reply.__class__ is Updated and request.op == "update":
            return head + request.id + (b"|ok\n" if self.dialect == "smtpd-tables" else b"|updated\n")
        raise ReplyError(f"{type(reply).__name__} is not a reply to {request.op}")


def is_7_9(version: str) -> bool:
    """Whether this version of smtpd is 7.9 or later."""
    major, _, rest = version[:20].partition(".")
    minor = rest.partition(".")[0]
    return major.isdecimal() and minor.isdecimal() and (int(major), int(minor)) >= (7, 9)


_HEADS = {op: f"{op}-result|".encode() for op in OPS}


def _parse_smtpd_tables(line: bytes, pipes: int = 0) -> Request | Malformed:
    parts = line.split(b"|", 7 + pipes)
    parts[3 : 4 + pipes] = [b"|".join(parts[3 : 4 + pipes])]
    op = _text(parts[4]) if len(parts) > 5 else ""
    if op == "update":
        service, ident, key = b"", parts[5], b""
    elif len(parts) > 6:
        service, ident, key = parts[5], parts[6], b"".join(parts[7:])
    else:
        return Malformed(f"missing fields: {printable(line)!r}", None)
    return _request(op, ident, parts[3], service, key, complete=op in ("update", "fetch") or len(parts) > 7)


def _parse_procexec(line: bytes, _pipes: int = 0) -> Request | Malformed:
    parts = line.split(b"|", 7)
    words = [_text(part) for part in parts[3:5]]
    if len(parts) > 5 and words[1] in OPS:
        table, op, ident, rest = parts[3], words[1], parts[5], parts[6:]
    elif len(parts) > 4 and words[0] in OPS:
        table, op, ident, rest = b"", words[0], parts[4], line.split(b"|", 6)[5:]
    else:
        return Malformed(f"missing fields or unknown request: {printable(line)!r}", None)
    complete = len(rest) >= {"update": 0, "fetch": 1}.get(op, 2)
    return _request(op, ident, table, b"".join(rest[:1]), b"".join(rest[1:]), complete=complete)


def _request(op: str, ident: bytes, table: bytes, service: bytes, key: bytes, *, complete: bool) -> Request | Malformed:
    request = Request(op, ident, _text(table), _text(service), key if op in WITH_KEY else b"")
    if not ident:
        return Malformed("request without an id, so no reply is possible", None)
    if op not in OPS:
        # smtpd chose this word and expects it in the reply.
        return Malformed(f"unknown request {printable(op)!r}", request if op.isascii() and op.isalpha() else None)
    if not complete:
        return Malformed("missing fields", request)
    return request


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


DIALECTS: Mapping[str, Callable[..., Request | Malformed]] = {
    "smtpd-tables": _parse_smtpd_tables,
    "procexec": _parse_procexec,
}
"""The parser of each dialect, for a line and the number of ``|`` in the table's name."""
