"""A child process that uses one of the line dialects, and its restarts.

``Child`` is one process, which gets the same lines as from smtpd; ``Bridge`` starts another when it fails. Even if a
child misbehaves, smtpd gets each reply within the deadline, and a line is a reply only if it has the id of the request.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from random import getrandbits, random
from struct import pack

from table_consul.backoff import Backoff
from table_consul.errors import ReplyError, SourceError, printable
from table_consul.protocol import MAX_LINE, OPS, Failed, Found, NotFound, Reply, Request, Updated
from table_consul.services import DEFAULT_SERVICES, SERVICES

# A child that has not answered the handshake by then is one of 2020, and can still answer before the deadline.
HANDSHAKE_SECONDS = 1.0
# How long a child may take to register, or in the dialect of 2020 to reply at all. Until then every reply is an error.
START_SECONDS = 30.0
# smtpd has 13 services. A child that keeps registering would delay the reply and exhaust the memory.
MAX_REGISTRATIONS = 100
# Nearly all lines are shorter; a larger buffer takes longer to allocate.
READ_SIZE = 4096
# How long a system call waits before the clock is read: a timeout of the socket, because poll() takes longer.
WAIT_SECONDS = 0.01
# How long to wait for the child to exit, after end of file and again after SIGKILL.
EXIT_SECONDS = 1.0

# As smtpd 7.6 sends it, with a version of our own: smtpd's is not known here. Before 7.6 smtpd asks no table for auth.
_HANDSHAKE = "config|smtpd-version|7.5.0-procexec\nconfig|protocol|0.1\nconfig|tablename|{}\nconfig|ready\n"
_NEWLINE, _RETURN = b"\n\r"  # numbers: searching for one takes a tenth of the time
Command = Callable[[], Sequence[str]]
STARTING = Failed("the table is still starting")
_RESULTS = {op: f"{op}-result".encode() for op in OPS}


class ChildError(SourceError):
    """The child exited, missed its deadline or sent an invalid reply; it must be replaced."""


class Child:
    """One process of a command, run as smtpd would run it: one socket as standard input and output.

    ``dialect`` is None while it may still answer the handshake of ``smtpd-tables``. ``confirmed`` is set when it has
    sent a line that only a child of its dialect sends.
    """

    def __init__(self, command: Command, table: str, dialect: str | None, clock: Callable[[], float]) -> None:
        """Start it, and send the handshake unless ``dialect`` is ``procexec``.

        Raises:
            ChildError: it cannot be started.
        """
        self.dialect = dialect
        self.confirmed = False
        self._clock = clock
        self._started = clock()
        self._handshake_done = dialect == "procexec"
        self.registered: list[str] = []
        self._templates: dict[tuple[str, str, str], bytes] = {}
        self._unanswered: tuple[str, bytes] | None = None
        """Operation and id of the request that a starting child of 2020 has not answered yet."""
        self._buffer = b""
        try:
            self._socket, theirs = socket.socketpair()
        except OSError as error:
            raise ChildError(f"cannot be run: {error.strerror or error}") from error
        # struct timeval: two numbers of 4 or of 8 bytes, depending on the system's time_t.
        size = len(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 64))
        timeval = pack({8: "=ii", 16: "=qq"}[size], 0, int(WAIT_SECONDS * 1_000_000))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, timeval)
        with theirs:
            try:
                # As in smtpd: ignored signals stay ignored, and standard error is inherited.
                wire = theirs.fileno()
                self._process = subprocess.Popen(command(), stdin=wire, stdout=wire, restore_signals=False)  # noqa: S603 - smtpd.conf names the command
            except OSError as error:
                self._socket.close()
                raise ChildError(f"cannot be run: {error.strerror or error}") from error
        if not self._handshake_done:
            with contextlib.suppress(OSError):  # the first read reports a child that has exited
                self._socket.send(_HANDSHAKE.format(" ".join(table.splitlines())).encode())

    def shake_hands(self, deadline: float) -> bool:
        """Whether the child accepts requests; False if that is still open at the deadline, a time on the clock.

        Raises:
            ChildError: it exited, or sent something other than its services.
        """
        while not self._handshake_done:
            limit = self._started + (HANDSHAKE_SECONDS if self.dialect is None else START_SECONDS)
            line = self._read_line(min(limit, deadline))
            if line is None:
                if self._clock() < limit:
                    return False
                if self.dialect is not None:
                    raise ChildError(f"no answer to the handshake within {START_SECONDS:.0f} s")
                self.dialect, self._handshake_done = "procexec", True
                return True
            if not line.startswith(b"register|"):
                raise ChildError(f"unexpected reply to the handshake: {printable(line)!r}")
            self.dialect = "smtpd-tables"
            self._handshake_done = self.confirmed = line == b"register|ready"
            if not self._handshake_done:
                self.registered.append(line[9:].decode("utf-8", "backslashreplace"))
            if len(self.registered) > MAX_REGISTRATIONS:
                raise ChildError(f"more than {MAX_REGISTRATIONS} services registered")
        return True

    def suits_smtpd(self, deadline: float) -> bool:
        """Whether smtpd could run it: by the deadline it registers only services of smtpd, and sends nothing else.

        Raises:
            ChildError: as `shake_hands`.
        """
        if not self.shake_hands(deadline) or not self.registered or not SERVICES.keys() >= {*self.registered}:
            return False
        return self._read_line(self._clock()) is None and not self._buffer

    def ask(self, request: Request, deadline: float) -> Reply:
        """The child's reply by the deadline, a time on the clock; Failed if it does not take this request, or not yet.

        A child of 2020 has no handshake, so it may be starting until its first reply.

        Raises:
            ChildError: no valid reply; a late one could not be distinguished from the reply to the next request.
        """
        if not self._handshake_done and not self.shake_hands(deadline):
            return STARTING
        if self._unanswered is not None and not self._catch_up(*self._unanswered):
            return STARTING
        op, key = request.op, request.key
        assert self.dialect is not None
        names = op, request.table, request.service
        template = self._templates.get(names)
        if template is None:
            if {*request.table} & {*"|\r\n"}:
                return Failed(f"invalid table name {printable(request.table)!r}: contains | or a line break")
            if op != "update" and request.service not in SERVICES.keys() & (self.registered or SERVICES):
                return Failed(f"the table has no service {printable(request.service)!r}")
            template = self._templates[names] = question_template(self.dialect, *names)
        # smtpd 7.6 and later rejects such keys itself (smtpd: table_proc.c, table_proc_lookup).
        if _NEWLINE in key or _RETURN in key:
            return Failed("a key must not contain a line break")
        ident = b"%08x" % getrandbits(32)  # a line sent before its request cannot contain it
        question = template % (time.time(), ident, key)
        while question:
            try:
                question = question[self._socket.send(question) :]
            except BlockingIOError:
                pass
            except OSError as error:
                raise ChildError(self._exit_reason()) from error
            if question and self._clock() >= deadline:
                raise ChildError("not reading its input")
        line = self._read_line(deadline)
        if line is None:
            if self.confirmed or self._buffer or self._clock() >= self._started + START_SECONDS:
                raise ChildError("no reply before the deadline")
            self._unanswered = op, ident
            return STARTING
        return self._reply(op, ident, line)

    def _reply(self, op: str, ident: bytes, line: bytes) -> Reply:
        assert self.dialect is not None
        reply = parse_reply(self.dialect, op, ident, line)
        if reply is None:
            if line.startswith(b"register|"):
                self.dialect, self.confirmed = "smtpd-tables", True  # not of 2020, only slow to start
            raise ChildError(f"unexpected reply to {op}: {printable(line)!r}")
        self.confirmed = True
        return reply

    def _catch_up(self, op: str, ident: bytes) -> bool:
        """Whether the child has now answered its first request, which got an error; the reply is dropped."""
        line = self._read_line(self._clock())
        if line is None:
            if self._clock() >= self._started + START_SECONDS:
                raise ChildError(f"no reply within {START_SECONDS:.0f} s")
            return False
        self._reply(op, ident, line)
        self._unanswered = None
        return True

    def close(self, timeout: float = 0.0) -> None:
        """End the process: by end of file, and by SIGKILL if it has not exited after so many seconds."""
        self._socket.close()
        for seconds in (timeout, EXIT_SECONDS):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
                return
            self._process.kill()

    def _read_line(self, deadline: float) -> bytes | None:
        """The next line without its newline; None if none is complete by the deadline or just after it."""
        while _NEWLINE not in self._buffer:
            if len(self._buffer) > MAX_LINE:
                raise ChildError(f"line longer than {MAX_LINE} bytes: {printable(self._buffer)!r}")
            try:
                data = self._socket.recv(READ_SIZE) or None
            except BlockingIOError:
                data = b""
            except OSError:
                data = None
            if data is None:
                raise ChildError(self._exit_reason())
            self._buffer += data
            if _NEWLINE not in data and self._clock() >= deadline:
                return None
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _exit_reason(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(0.05)  # its socket closes a moment before it exits
            return f"killed by signal {-status}" if status < 0 else f"exited with status {status}"
        return "closed its socket"


class Bridge:
    """Answers from a command: at most one process at a time, started when needed and restarted after a failure.

    Its dialect is detected once. The first process gets the handshake of ``smtpd-tables``; if it ignores that, or
    exits, the next one gets the dialect of 2020. Until a process has replied, the two dialects alternate.
    """

    def __init__(
        self,
        name: str,
        command: Command,
        dialect: str | None,
        deadline: float,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random,
    ) -> None:
        """``command`` is called for each start and may raise OSError; ``dialect`` is None to detect it.

        ``deadline`` is in seconds from the arrival of a request.
        """
        self._name, self._command, self._deadline = name, command, deadline
        self._dialect = dialect
        self._assumed_dialect: str | None = None
        self._clock, self._chance = clock, chance
        self._child: Child | None = None
        self._backoff = Backoff(name, "returning errors until it runs again")

    def suits_smtpd(self, name: str) -> bool:
        """Whether smtpd could run the command itself; if not, the process of this trial stays in use."""
        try:
            return self._running(name).suits_smtpd(self._clock() + HANDSHAKE_SECONDS)
        except ChildError as error:
            self._drop(error)
            return False

    def services(self, name: str) -> list[str]:
        """The services that the child registers within the deadline; the default ones if it registers none."""
        registered: list[str] = []
        try:
            child = self._running(name)
            registered = child.registered if child.shake_hands(self._clock() + self._deadline) else []
        except ChildError as error:
            self._drop(error)
        return [service for service in SERVICES if service in registered] or list(DEFAULT_SERVICES)

    def warm_up(self, name: str) -> None:
        """Start the child, unless `services` has started it during smtpd's handshake."""
        try:
            self._running(name)
        except ChildError as error:
            self._drop(error)

    def answer(self, request: Request, arrived: float) -> Reply:
        """The child's reply, or Failed; within the deadline either way."""
        if self._child is None and self._clock() < self._backoff.not_before:
            error = ChildError(self._backoff.last_error)
            return Failed(f"{self._name}: {error}; it will be restarted", error)
        try:
            child = self._child or self._running(request.table)
            reply = child.ask(request, arrived + self._deadline)
        except ChildError as error:
            return self.answer(request, arrived) if self._drop(error) else Failed(f"{self._name}: {error}", error)
        if (self._dialect is None or self._backoff.since is not None) and child.confirmed:
            self._dialect = child.dialect
            self._backoff.success(self._clock())
        return reply

    def close(self) -> None:
        """End the child as smtpd would, by end of file."""
        child, self._child = self._child, None
        if child is not None:
            child.close(EXIT_SECONDS)

    def _running(self, table: str) -> Child:
        if self._child is None:
            self._child = Child(self._command, table, self._dialect or self._assumed_dialect, self._clock)
        return self._child

    def _drop(self, error: ChildError) -> bool:
        """End the child after this error; True to restart it immediately as a child of 2020, False after a pause."""
        child, self._child = self._child, None
        if child is not None:
            child.close()
            if child.confirmed:
                self._dialect = child.dialect
            elif self._dialect is None:
                self._assumed_dialect = None if self._assumed_dialect or child.dialect == "smtpd-tables" else "procexec"
                if child.dialect is None:
                    return True
        self._backoff.failure(error, self._clock(), self._chance())
        return False


def question_template(dialect: str, op: str, table: str, service: str) -> bytes:
    """The line of this request, with placeholders for the time, the id and the key (empty for fetch and update)."""
    fields = "%b" if op == "update" else f"%b|{service}" if dialect == "procexec" else f"{service}|%b"
    key = "|%b" if op in ("check", "lookup") else "%b"
    return f"table|0.1|%.6f|{table.replace('%', '%%')}|{op}|{fields}{key}\n".encode()


def parse_reply(dialect: str, op: str, ident: bytes, line: bytes) -> Reply | None:
    """The reply in this line, or None if it is not a reply to this operation and id."""
    words = (b"table-response", b"table-result") if dialect == "procexec" else (_RESULTS[op],)
    parts = line.split(b"|", 3)
    if len(parts) < 3 or parts[1] != ident or parts[0] not in words:
        return None
    verdict, value = parts[2], parts[3] if len(parts) > 3 else b""
    if verdict == b"found" and op != "update" and (op == "check" or len(parts) > 3):
        try:
            return Found() if op == "check" else Found(value)
        except ReplyError as error:
            return Failed(f"the table returned an invalid value: {error}")
    if verdict in (b"error", b"failure"):
        return Failed(f"the table reported: {printable(value, 400)}" if value else "the table reported a failure")
    if op == "update":
        return Updated() if verdict in (b"ok", b"updated") else None
    return NotFound() if verdict == b"not-found" else None
