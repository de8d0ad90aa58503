"""The loop between smtpd's socket and the backend that answers. Only smtpd ends it, by closing the socket."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol, TypeVar

from table_consul.errors import FunctionError, ReplyError, SourceError, TableConsulError, printable
from table_consul.fallback import ignore_signals, read, write
from table_consul.imsg import Session as BinarySession
from table_consul.imsg import speaks
from table_consul.protocol import Event, Failed, Malformed, Ready, Reply, Request, Session, is_7_9
from table_consul.responder import Counters
from table_consul.services import DEFAULT_SERVICES

A = TypeVar("A")
T = TypeVar("T")

log = logging.getLogger("table_consul")

# Replies to many waiting requests are gathered into one write, until this much time has passed.
GATHER_SECONDS = 0.001
# Each complaint is logged once; a bound on how many are remembered.
MAX_COMPLAINTS = 4096


class Answerer(Protocol):
    """The backend that answers: the configured tables, a child process, or functions of another program."""

    def services(self, name: str, /) -> list[str]:
        """The services to register for the table of this name; at least one."""
        ...

    def answer(self, request: Request, arrived: float, /) -> Reply:
        """The reply to a request that arrived at this moment; an exception becomes an error reply."""
        ...

    def warm_up(self, name: str, /) -> None:
        """Do all that would delay the first reply; called after the handshake, while smtpd sends no request."""
        ...


class Server:
    """One conversation with smtpd, in the dialect that its first bytes decide, answered by one `Answerer`."""

    def __init__(
        self,
        answerer: Answerer,
        on_table_name: Callable[[str], None],
        *,
        counters: Counters | None = None,
        procexec_reply: Callable[[str], str] = lambda _table: "auto",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``on_table_name`` is called once, when the dialect is known, with the table's name, which may be empty.

        ``procexec_reply`` is as for `protocol.Session`.
        """
        self._answerer = answerer
        self._on_table_name = on_table_name
        self._counters = counters
        self._clock = clock
        self._session: Session | BinarySession = Session(procexec_reply)
        self._complaints: set[str] = set()
        self._begun = False
        self._to_warm_up: str | None = None

    def serve(self, read_from: int, write_to: int) -> bool:
        """Answer on these descriptors until smtpd closes the conversation; False if it used none of its dialects."""
        data = read(read_from)
        # smtpd: smtpd.c, fork_proc_backend; up to 7.5 standard output is not the socket.
        wire = read_from if speaks(data) else write_to
        return self.run(data, partial(read, read_from), partial(write, wire))

    def run(  # noqa: PLR0912 - one loop: a call for each request would be a tenth of what it costs
        self, data: bytes, read: Callable[[], bytes], write: Callable[[bytes], bool]
    ) -> bool:
        """As `serve`; ``read`` returns what follows the first data, nothing at the end; ``write`` as in `fallback`."""
        if speaks(data):
            self._session = BinarySession()
        session, answer, counters, clock = self._session, self._answerer.answer, self._counters, self._clock
        while data:
            arrived = last_write = clock()
            events = session.receive_data(data)
            if not self._begun:
                self._begin(events)
            replies: list[bytes] = []
            for event in events:
                if event.__class__ is Request:
                    try:
                        reply = answer(event, arrived)
                        replies.append(session.send(event, reply))
                    except BaseException as error:  # noqa: BLE001 - also sys.exit(): smtpd would not outlive the process
                        reply = _failure(error)
                        replies.append(session.send(event, reply))
                    now = clock()
                    try:
                        if counters is not None:
                            counters.add(event, reply.__class__, now - arrived)
                        if reply.__class__ is Failed:
                            self._report(event, reply)
                    except Exception as error:  # noqa: BLE001 - as above
                        self._log_traceback(error)
                else:
                    replies.append(self._other(event))
                    now = clock()
                if now - last_write > GATHER_SECONDS:
                    if not write(b"".join(replies)):
                        return True
                    replies.clear()
                    last_write = clock()
            if (replies and not write(b"".join(replies))) or session.closed:
                break
            if self._to_warm_up is not None:
                self._guarded(self._answerer.warm_up, self._to_warm_up)
                self._to_warm_up = None
            data = read()
        return session.dialect is not None

    def _other(self, event: Event) -> bytes:
        """The reply to a handshake, or to an invalid request."""
        if isinstance(event, Ready):
            return self._session.register(self._guarded(self._services, event.config) or DEFAULT_SERVICES)
        assert isinstance(event, Malformed)
        self._guarded(self._note, event)
        return b"" if event.request is None else self._session.send(event.request, Failed(event.reason))

    def _note(self, event: Malformed) -> None:
        self._warn_once(event.reason)
        if self._counters is not None:
            self._counters.malformed += 1
            if event.request is not None:
                self._counters.add(event.request, Failed, 0.0)

    def _report(self, request: Request, reply: Failed) -> None:
        """Log why this is an error, once for each reason."""
        cause = reply.cause
        if isinstance(cause, SourceError):
            log.debug("%s %s: %s", request.op, request.service, reply.reason)  # the source logs its own outages
            if self._counters is not None:
                self._counters.failed(request.table, cause, self._clock())
        elif isinstance(cause, ReplyError):
            self._warn_once(f"{request.op} {request.service}: {reply.reason}")
        elif isinstance(cause, FunctionError):
            self._log_traceback(cause.__cause__ or cause, reply.reason, secret=has_secrets(request.service))
        elif cause is None or isinstance(cause, TableConsulError):
            self._warn_once(reply.reason)
        else:
            self._log_traceback(cause, secret=has_secrets(request.service))

    def _begin(self, events: list[Event]) -> None:
        """Note the table's name when the dialect is known, at the end of the handshake or with the first request."""
        first = next((event for event in events if not isinstance(event, Malformed)), None)
        if first is None:
            return
        version = ""
        if isinstance(first, Ready):
            table, version = first.config.get("tablename", ""), first.config.get("smtpd-version", "")
        else:
            table = first.table
        self._begun = True
        self._to_warm_up = table
        self._guarded(self._on_table_name, table)
        log.info("smtpd%s speaks %s", f" {printable(version)}" if version else "", self._session.dialect)

    def _services(self, config: Mapping[str, str]) -> list[str]:
        services = self._answerer.services(config.get("tablename", ""))
        if "auth" in services and not is_7_9(config.get("smtpd-version", "")):  # smtpd: table.c, table_lookup
            log.warning("not registering auth: OpenSMTPD before 7.9 lower-cases the password")
            services = [name for name in services if name != "auth"]
        return services

    def _guarded(self, call: Callable[[A], T], argument: A) -> T | None:
        """The result of the call; if it raises, None and a log line: the process must survive its bugs."""
        try:
            return call(argument)
        except TableConsulError as error:
            self._warn_once(str(error))
        except Exception as error:  # noqa: BLE001 - smtpd would not outlive the process
            self._log_traceback(error)
        return None

    def _warn_once(self, text: str) -> None:
        if text not in self._complaints:
            if len(self._complaints) >= MAX_COMPLAINTS:
                self._complaints.clear()
            self._complaints.add(text)
            log.warning("%s", text)

    def _log_traceback(
        self, error: BaseException, reason: str = "internal error; please report it", *, secret: bool = False
    ) -> None:
        """Log each kind of exception once with its traceback, if ``secret`` without its text; then each new reason."""
        at = error.__traceback__
        while at is not None and at.tb_next is not None:
            at = at.tb_next
        kind = f"{type(error).__name__} at {at and (at.tb_frame.f_code.co_filename, at.tb_lineno)}"
        if kind in self._complaints:
            self._warn_once(reason)
            return
        self._complaints.update((kind, reason))
        if secret:
            log.error("%s: %s", reason, kind)
        else:
            log.error("%s", reason, exc_info=error)


def has_secrets(service: str) -> bool:
    """Whether the text of an exception may contain a password or a hash."""
    return service in ("auth", "credentials")


def claim_stdio() -> tuple[int, int]:
    """Two descriptors of our own for the socket to smtpd, which nothing else can write to; signals are ignored."""
    ignore_signals()
    while (nowhere := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # started without one of the three: a copy of the socket must not take its place
    read_from, write_to = os.dup(0), os.dup(1)
    os.dup2(nowhere, 0)
    os.dup2(2, 1)
    os.close(nowhere)
    os.register_at_fork(after_in_child=partial(_leave_socket, read_from, write_to))
    return read_from, write_to


def _leave_socket(*descriptors: int) -> None:
    """In a process that a function of `callbacks` forks: only the process that smtpd started may answer it."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor, inheritable=False)
    os.close(nowhere)


def _failure(error: BaseException) -> Failed:
    if isinstance(error, KeyboardInterrupt):  # at a terminal; smtpd has its tables ignore the signal
        raise error
    if isinstance(error, TableConsulError):
        return Failed(str(error), error)
    return Failed(f"internal error ({type(error).__name__}); see the log of table-consul", error)
