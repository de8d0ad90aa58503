"""The loop between smtpd's socket and whoever answers. Ends when smtpd closes it, and for no other reason."""

from __future__ import annotations

import logging
import os
import select
import time
from collections.abc import Callable
from typing import Protocol

from table_consul import imsg
from table_consul.counters import Counters
from table_consul.errors import ReplyError, SourceError, printable
from table_consul.protocol import Event, Failed, Malformed, Ready, Reply, Request, Session
from table_consul.responder import Responder
from table_consul.services import DEFAULT_SERVICES, Table
from table_consul.shortcut import Shortcut
from table_consul.tables import Tables

log = logging.getLogger("table_consul")

READ_SIZE = 65536
# When many requests wait, replies are gathered into one write, but none is held back while another takes long.
GATHER_SECONDS = 0.001
# Complaints about the same thing are logged once; a bound on how many are remembered.
REMEMBERED = 4096


class TablesByName(Protocol):
    """What the loop asks about a table by name, beside the questions of smtpd."""

    def services(self, name: str, /) -> list[str]:
        """The services to register; at least one."""
        ...

    def prepare(self, name: str, /) -> None:
        """Do what would make the first answer late."""
        ...

    def procexec_reply(self, name: str, /) -> str:
        """The first word of replies in the dialect of 2020, or ``auto``."""
        ...


class ShortWay(Protocol):
    """Who answers what is asked most without the detour of events and replies; see shortcut.py."""

    def replies(self, data: bytes, session: Session | imsg.Session, /) -> bytes | None:
        """All that is to be written, or None: then nothing has been answered."""
        ...

    def count(self, arrived: float, /) -> None:
        """Note that it has been written."""
        ...


class Loop:
    """One smtpd, one session in a dialect that its first bytes decide, and one who answers."""

    def __init__(
        self,
        tables: TablesByName,
        answer: Callable[[Request, float], Reply],
        named: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        tally: Counters | None = None,
        short: ShortWay | None = None,
    ) -> None:
        """``answer`` gets each request and the moment it arrived; what it raises becomes an error reply.

        ``named`` is told the name of the table, and thereby that smtpd has said which dialect it speaks.
        """
        self._tables = tables
        self._answer = answer
        self._named = named
        self._clock = clock
        self._session: Session | imsg.Session = Session(tables.procexec_reply)
        self._tally = tally or Counters(Table)
        self._short = short
        self._told: set[str] = set()
        self._begun = False
        self._unprepared: str | None = None

    def serve(self, read_from: int, write_to: int) -> bool:
        """Answer until smtpd closes the conversation. Whether it spoke at all, in any of its dialects."""
        data = _read(read_from)
        if imsg.speaks(data):
            self._session = imsg.Session()
            write_to = read_from  # smtpd: smtpd.c, fork_proc_backend; up to 7.5 standard output is not the socket
        while data:
            if not self._answer_at_once(data, write_to):
                self._session.receive_data(data)
                if not self._answer_all(write_to) or self._session.closed:
                    break
            data = _read(read_from)
        return self._session.dialect is not None

    def _answer_at_once(self, data: bytes, write_to: int) -> bool:
        """Whether the shortcut had all the replies; if smtpd is gone the next read tells."""
        if self._short is None or not self._session.takes_shortcuts:
            return False
        arrived = self._clock()
        try:
            replies = self._short.replies(data, self._session)
        except Exception as error:  # noqa: BLE001 - as in _answered
            self._tell_traceback(error)
            return False
        if replies is None:
            return False
        _write(write_to, replies)
        self._short.count(arrived)
        return True

    def _answer_all(self, write_to: int) -> bool:
        arrived = self._clock()
        replies: list[bytes] = []
        gathering = arrived
        while (event := self._session.next_event()) is not None:
            replies.append(self._reply(event, arrived))
            if self._clock() - gathering > GATHER_SECONDS:
                if not _write(write_to, b"".join(replies)):
                    return False
                replies.clear()
                gathering = self._clock()
        if not _write(write_to, b"".join(replies)):
            return False
        self._get_ready()
        return True

    def _reply(self, event: Event, arrived: float) -> bytes:
        if isinstance(event, Request):
            if not self._begun:
                self._begin(event.table, "")
            return self._send(event, self._answered(event, arrived), arrived)
        if isinstance(event, Ready):
            self._begin(event.config.get("tablename", ""), event.config.get("smtpd-version", ""))
            return self._session.register(self._services(event))
        return self._refused(event, arrived)

    def _answered(self, request: Request, arrived: float) -> Reply:
        try:
            reply = self._answer(request, arrived)
        except Exception as error:  # noqa: BLE001 - the process must outlive its bugs, as smtpd would not outlive the process
            self._tell_traceback(error)
            return Failed(f"internal error ({type(error).__name__}); see the log of table-consul")
        if isinstance(reply, Failed):
            if isinstance(reply.cause, SourceError):
                log.debug("%s %s: %s", request.op, request.service, reply.reason)  # the source tells outages, once each
            else:
                self._tell(reply.reason)
        return reply

    def _send(self, request: Request, reply: Reply, arrived: float) -> bytes:
        try:
            data = self._session.send(request, reply)
        except ReplyError as error:
            self._tell(f"{request.op} {request.service}: {error}")
            reply = Failed(str(error))
            data = self._session.send(request, reply)
        try:
            self._tally.add(request, reply.__class__, self._clock() - arrived)
            if isinstance(reply, Failed) and isinstance(reply.cause, SourceError):
                self._tally.failed(request.table, reply.cause, self._clock())
        except Exception as error:  # noqa: BLE001 - as in _answered
            self._tell_traceback(error)
        return data

    def _refused(self, event: Malformed, arrived: float) -> bytes:
        self._tell(event.reason)
        self._tally.malformed += 1
        return b"" if event.request is None else self._send(event.request, Failed(event.reason), arrived)

    def _begin(self, table: str, version: str) -> None:
        self._begun = True
        self._unprepared = table
        try:
            self._named(table)
        except Exception as error:  # noqa: BLE001 - as in _answered
            self._tell_traceback(error)
        log.info("smtpd%s speaks %s", f" {printable(version)}" if version else "", self._session.dialect)

    def _get_ready(self) -> None:
        """Do what would make the first answer late, now that smtpd has its handshake and asks nothing yet."""
        table, self._unprepared = self._unprepared, None
        if table is None:
            return
        try:
            self._tables.prepare(table)
        except Exception as error:  # noqa: BLE001 - as in _answered; the answers will say what is wrong
            self._tell_traceback(error)

    def _services(self, event: Ready) -> list[str]:
        services = self._tables.services(event.config.get("tablename", ""))
        if "auth" in services and not _auth_is_usable(event.config.get("smtpd-version", "")):
            # Before 7.9 smtpd lower-cases the password in the key (smtpd: table.c, table_lookup).
            log.warning("auth is not registered: this smtpd lower-cases passwords; OpenSMTPD 7.9 and later do not")
            services = [name for name in services if name != "auth"] or list(DEFAULT_SERVICES)
        return services

    def _tell(self, text: str) -> None:
        if text not in self._told:
            if len(self._told) >= REMEMBERED:
                self._told.clear()
            self._told.add(text)
            log.warning("%s", text)

    def _tell_traceback(self, error: Exception) -> None:
        at = error.__traceback__
        while at is not None and at.tb_next is not None:
            at = at.tb_next
        kind = f"{type(error).__name__} at {at and (at.tb_frame.f_code.co_filename, at.tb_lineno)}"
        if kind not in self._told:
            self._told.add(kind)
            log.error("internal error; please report it", exc_info=error)


class Daemon(Loop):
    """The loop with the responder, answering from the configured sources."""

    def __init__(
        self,
        sources: Tables,
        named: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """See Loop."""
        shortcut = Shortcut(sources.known, sources.counters, clock)
        super().__init__(sources, Responder(sources.table, sources).answer, named, clock, sources.counters, shortcut)


def claim_stdio() -> tuple[int, int]:
    """The socket to smtpd as two descriptors of our own; nothing else can write to it by accident."""
    while (nowhere := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # started without one of the three: a copy of the socket must not take its place
    read_from, write_to = os.dup(0), os.dup(1)
    os.dup2(nowhere, 0)
    os.dup2(2, 1)
    os.close(nowhere)
    return read_from, write_to


def _auth_is_usable(version: str) -> bool:
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    return major.isdecimal() and minor.isdecimal() and (int(major), int(minor)) >= (7, 9)


def _read(fd: int) -> bytes:
    while True:
        try:
            return os.read(fd, READ_SIZE)
        except BlockingIOError:
            select.select([fd], [], [])
        except OSError:
            return b""  # reset by an smtpd that died: as good as end of file


def _write(fd: int, data: bytes) -> bool:
    """Write all of it; False when smtpd is gone."""
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            select.select([], [fd], [])
        except OSError:
            return False
    return True
