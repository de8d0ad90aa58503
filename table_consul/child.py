"""A table program as smtpd's side of the conversation sees it: one process, asked in one of the line dialects.

Nothing that the process does takes longer than its asker allows, and what it says is believed only if it is an answer
to what was asked. What is to be done about a process that failed is the asker's business.
"""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from math import ceil, inf
from struct import pack

from table_consul.errors import ReplyError, SourceError, printable
from table_consul.protocol import DIALECTS, MAX_LINE, Failed, Found, NotFound, Reply, Request, Updated
from table_consul.services import SERVICES

# A child that knows smtpd-tables answers the handshake as soon as it runs. One of 2020 stays silent, or ends; it is
# found out early enough to have its first question answered within the default deadline.
HANDSHAKE_SECONDS = 1.0
# One that is known to answer the handshake may take this long to do so, while questions are answered with errors.
START_SECONDS = 30.0
# Longer lines than nearly all there are; a larger buffer costs time to make.
READ_SIZE = 4096
# The kernel is told how long to wait for an answer only when that has changed by more than this: it is the same from
# question to question, and a poll for each would be a tenth of what the whole answer takes.
GRAIN_SECONDS = 0.01
# After end of file, as after SIGKILL, nothing may hold up the end of the bridge.
END_SECONDS = 1.0

# As smtpd 7.6 says it. The smtpd behind us did not tell its version: it is one before 7.6, which asks nobody for auth.
_HANDSHAKE = "config|smtpd-version|7.5.0-procexec\nconfig|protocol|0.1\nconfig|tablename|{}\nconfig|ready\n"

_WORDS = {
    (dialect, op): (b"table-response", b"table-result") if dialect == "procexec" else (f"{op}-result".encode(),)
    for dialect in DIALECTS
    for op in ("check", "lookup", "fetch", "update")
}


class ChildError(SourceError):
    """The child ended, was silent too long, or said what answers nothing: it has to be started anew."""


class HandshakeRefused(ChildError):
    """The child ended, or said something else, when it was told the handshake: it may be one of 2020."""


class Child:
    """One process of a command, as smtpd would run it: one socket as standard input and output.

    Attributes:
        dialect: how it is spoken to; None while it may still turn out to know ``smtpd-tables``.
        proven: whether it has said something that only a child of this dialect says.
    """

    def __init__(
        self,
        command: Sequence[str],
        table: str,
        dialect: str | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start it, and tell it the handshake unless ``dialect`` is ``procexec``.

        Raises:
            ChildError: it cannot be started.
        """
        assert dialect is None or dialect in DIALECTS
        self.dialect = dialect
        self.proven = False
        self._clock = clock
        self._said = b""
        self._services: set[str] = set()
        self._shaken = dialect == "procexec"
        self._asked = 0
        self._started = clock()
        # What can be asked, with the words for it where that is asked the short way.
        self._sayable: dict[tuple[str, str], bytes | None] = {}
        self._wire, theirs = socket.socketpair()
        self._patience = inf
        # Two numbers of 4 or of 8 bytes, by the system's time_t.
        self._timeval = {8: "=ii", 16: "=qq"}[len(self._wire.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 64))]
        with theirs:
            try:
                # As smtpd does it: signals that are ignored stay so, standard error is passed through.
                self._process = subprocess.Popen(  # noqa: S603 - smtpd.conf names it
                    list(command), stdin=theirs.fileno(), stdout=theirs.fileno(), restore_signals=False
                )
            except OSError as error:
                self._wire.close()
                raise ChildError(f"cannot be run: {error.strerror}") from error
        if not self._shaken:
            with contextlib.suppress(OSError):  # what is wrong will show when it is asked
                self._wire.send(_HANDSHAKE.format(" ".join(table.splitlines())).encode(), socket.MSG_DONTWAIT)

    def offered(self, deadline: float) -> set[str]:
        """The services that it has registered by this moment; none if it has not, or is of 2020.

        Raises:
            HandshakeRefused: see there.
            ChildError: see `ask`.
        """
        return self._services if self._shaken or self._shake_hands(deadline) else set()

    def ask(self, request: Request, deadline: float) -> Reply:
        """What the child answers, or Failed for what it cannot be asked; by this moment on the clock.

        Raises:
            HandshakeRefused: see there.
            ChildError: it gave no answer, and will give none that could be told from a late one.
        """
        if not self._shaken and not self._shake_hands(deadline):
            return Failed("the table is still starting")
        if unsayable := self._unsayable(request):
            return Failed(unsayable)
        assert self.dialect is not None
        self._asked += 1
        ident = b"%08x" % self._asked
        line = self._exchange(_question(self.dialect, ident, request, time.time()), deadline)
        return self._judged(request.op, ident, line)

    def lookup(self, table: str, service: str, key: bytes, deadline: float) -> bytes | Reply | None:
        """The short way of `ask`: a value, or what else it answers; None if it cannot be asked for this so simply.

        Raises:
            ChildError: see `ask`.
        """
        head = self._sayable.get((table, service))
        if head is None or b"\n" in key or b"\r" in key:
            return None
        self._asked += 1
        ident = b"%08x" % self._asked
        line = self._exchange(b"table|0.1|%.6f|%b%b|%b\n" % (time.time(), head, ident, key), deadline)
        verdict = b"lookup-result|%b|found|" % ident
        value = line.removeprefix(verdict)
        if value and b"\0" not in value and b"\r" not in value and len(value) < len(line):
            return value
        return self._judged("lookup", ident, line)

    def _exchange(self, question: bytes, deadline: float) -> bytes:
        self._send(question, deadline)
        line = self._line(deadline)
        if line is None:
            raise ChildError("no answer in time")
        return line

    def _judged(self, op: str, ident: bytes, line: bytes) -> Reply:
        assert self.dialect is not None
        reply = _reply(self.dialect, ident, op, line)
        if reply is None:
            if line.startswith(b"register|"):
                self.dialect, self.proven = "smtpd-tables", True  # it was only slow to start
            raise ChildError(f"this does not answer {op}: {printable(line)!r}")
        self.proven = True
        return reply

    def close(self, patience: float = 0.0) -> None:
        """End it: by end of file if it listens to that within so many seconds, else by force."""
        self._wire.close()
        for seconds in (patience, END_SECONDS):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
                return
            self._process.kill()

    def _unsayable(self, request: Request) -> str:
        # smtpd itself refuses such keys before it asks (7.6 and later: table_proc.c, table_proc_lookup).
        if b"\n" in request.key or b"\r" in request.key:
            return "a key with a line break cannot be asked for"
        if (request.table, request.service) in self._sayable:
            return ""
        if any(character in request.table for character in "|\r\n"):
            return f"a table of the name {printable(request.table)!r} cannot be asked in lines"
        if request.op != "update":
            if request.service not in SERVICES:
                return f"unknown service {printable(request.service)!r}"
            if self._services and request.service not in self._services:
                return f"the table does not offer the service {request.service}"
            head = f"{request.table}|lookup|{request.service}|".encode()
            self._sayable[request.table, request.service] = head if self.dialect == "smtpd-tables" else None
        return ""

    def _shake_hands(self, deadline: float) -> bool:
        """Whether it is ready to be asked; False when that was not to be found out by the deadline."""
        while not self._shaken:
            limit = self._started + (HANDSHAKE_SECONDS if self.dialect is None else START_SECONDS)
            try:
                line = self._line(min(limit, deadline))
            except ChildError as error:
                raise HandshakeRefused(f"{error}, at the handshake") from error
            if line is None and self._clock() < limit:
                return False
            if line is None and self.dialect is None:
                self.dialect = "procexec"
                self._shaken = True
            elif line is None:
                raise ChildError(f"no answer to the handshake within {START_SECONDS:.0f} s")
            elif line == b"register|ready":
                self.dialect = "smtpd-tables"
                self._shaken = self.proven = True
            elif line.startswith(b"register|"):
                self._services.add(line[9:].decode("utf-8", "backslashreplace"))
            else:
                raise HandshakeRefused(f"this does not answer the handshake: {printable(line)!r}")
        return True

    def _send(self, data: bytes, deadline: float) -> None:
        while data:
            try:
                data = data[self._wire.send(data, socket.MSG_DONTWAIT) :]
            except BlockingIOError as error:
                writable = select.poll()
                writable.register(self._wire, select.POLLOUT)
                if not writable.poll(max(ceil((deadline - self._clock()) * 1000), 0)):
                    raise ChildError("it does not read what it is asked") from error
            except OSError as error:
                raise ChildError(self._end()) from error

    def _line(self, deadline: float) -> bytes | None:
        """The next line it says, or None when there is none by the deadline."""
        while True:
            if self._said:
                line, end, rest = self._said.partition(b"\n")
                if end:
                    self._said = rest
                    return line
                if len(line) > MAX_LINE:
                    raise ChildError(f"a line of more than {MAX_LINE} bytes: {printable(line)!r}")
            left = deadline - self._clock()
            if abs(left - self._patience) > GRAIN_SECONDS and left > 0:
                whole, fraction = divmod(left, 1)
                # None at all would be for ever.
                timeval = pack(self._timeval, int(whole), max(int(fraction * 1_000_000), 1))
                self._wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
                self._patience = left
            try:
                data = self._wire.recv(READ_SIZE, 0 if left > 0 else socket.MSG_DONTWAIT)
            except BlockingIOError:
                if left > GRAIN_SECONDS:
                    continue
                return None
            except OSError:
                data = b""
            if not data:
                raise ChildError(self._end())
            self._said += data

    def _end(self) -> str:
        status = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(0.05)  # its socket closes a moment before it ends
        if status is None:
            return "it has closed its end"
        return f"it was ended by signal {-status}" if status < 0 else f"it has ended with status {status}"


def _question(dialect: str, ident: bytes, request: Request, now: float) -> bytes:
    op, told, service = request.op, ident.decode(), request.service
    if op == "update":
        return f"table|0.1|{now:.6f}|{request.table}|update|{told}\n".encode()
    fields = f"{told}|{service}" if dialect == "procexec" else f"{service}|{told}"
    head = f"table|0.1|{now:.6f}|{request.table}|{op}|{fields}".encode()
    return head + b"\n" if op == "fetch" else head + b"|" + request.key + b"\n"


def _reply(dialect: str, ident: bytes, op: str, line: bytes) -> Reply | None:
    """The reply that this line is, or None when it answers something else, or nothing."""
    parts = line.split(b"|", 3)
    if len(parts) < 3 or parts[1] != ident or parts[0] not in _WORDS[dialect, op]:
        return None
    verdict = parts[2]
    value = parts[3] if len(parts) > 3 else b""
    if op != "update" and verdict == b"found" and (op == "check" or len(parts) > 3):
        try:
            return Found() if op == "check" else Found(value)
        except ReplyError as error:
            return Failed(f"the table answered with a value that smtpd cannot take: {error}")
    if verdict in (b"error", b"failure"):
        return Failed(f"the table says: {printable(value, 400)}" if value else "the table says that it failed")
    if op == "update":
        return Updated() if verdict in (b"ok", b"updated") else None
    return NotFound() if verdict == b"not-found" else None
