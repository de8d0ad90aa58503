"""Answers every request with an error if the program cannot be imported, with the standard library alone.

A new Python, or an interrupted upgrade, must not end the mail server: mail waits until the program is reinstalled.
`make install` copies this module into the programs that it installs, so that it needs no package.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import signal
import stat
import sys
import syslog
import threading
from struct import Struct

# smtpd exits if a table registers none, or an unknown one.
SERVICES = (
    *("alias", "domain", "credentials", "netaddr", "userinfo", "source", "mailaddr"),
    *("addrname", "mailaddrmap", "relayhost", "string", "regex"),
)
READ_SIZE = 65536
OPS = (b"check", b"lookup", b"fetch", b"update")
# The binary dialect of OpenSMTPD up to 7.5; imsg.py has the details.
_HEADER, _ANSWER = Struct("=IHHII"), Struct("=IHHIIi")
_OPEN, _CLOSE, _UPDATE = 2, 3, 4


def run(module: str) -> int:
    """The exit status of ``main`` in this module; or that of `serve`, if it cannot be imported."""
    ignore_signals()
    try:
        main = importlib.import_module(module).main
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a broken package may raise anything
        return serve(error)
    return int(main())


def ignore_signals() -> None:
    """If smtpd started the process, ignore signals: only end of file may end it. At a terminal ^C still works."""
    try:
        started_by_smtpd = stat.S_ISSOCK(os.fstat(0).st_mode)
    except OSError:
        return
    if started_by_smtpd:
        # As smtpd itself ignores them (smtpd: lka.c, lka); child processes inherit this, but not the function below.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGQUIT):
            signal.signal(number, lambda *_: None)


def serve(error: BaseException) -> int:
    """Answer smtpd with this error until it closes the conversation; returns the exit status, 2 if there was none.

    Raises:
        Exception: the error itself, at a terminal or with an option.
    """
    if os.isatty(0) or "".join(sys.argv[1:2]).startswith("-"):
        raise error
    reason = explain(error)
    conversation = Conversation(reason)
    logging = threading.Thread(target=_log, args=(reason,), daemon=True)  # syslog may block
    with contextlib.suppress(RuntimeError):  # too many threads
        logging.start()
    while not conversation.closed and (data := read(0)):
        replies = conversation.receive(data)
        if not write(0 if conversation.binary else 1, replies):
            break
    if logging.ident is not None:
        logging.join(1.0)
    return 0 if conversation.begun else 2


def explain(error: BaseException) -> str:
    """The error and a hint, as one printable line."""
    text = f"table-consul cannot be loaded: {type(error).__name__}: {error}"
    text = "".join(c if c.isprintable() else "?" for c in text[:300])
    return f"{text} (reinstall it for Python {sys.version_info[0]}.{sys.version_info[1]} and restart smtpd)"


class Conversation:
    """Answers requests with errors, in the dialect that smtpd speaks."""

    def __init__(self, reason: str) -> None:
        self.begun = self.binary = self.closed = False
        self._reason = reason.encode()
        self._data = b""
        self._pipes: int | None = None
        """How many ``|`` the table's name has; None in the dialects of 2020, which have no handshake."""
        self._version = b""
        self._breaks_keys = False  # as in protocol.Session

    def receive(self, data: bytes) -> bytes:
        """The replies to this data, which may be cut anywhere."""
        if not self.begun:
            self.begun, self.binary = True, data[0] < 8
        self._data += data
        if self.binary:
            return b"".join(iter(self._next_message, b""))
        *lines, self._data = self._data.split(b"\n")
        if self._breaks_keys:
            del lines[1:]
        return b"".join(map(self._reply, lines))

    def _next_message(self) -> bytes:
        """The reply to the next message; empty if it is incomplete or has no reply."""
        if len(self._data) < _HEADER.size:
            return b""
        kind, length, *_ = _HEADER.unpack_from(self._data)
        if kind == _CLOSE:
            self.closed = True
        if self.closed or len(self._data) < length:
            return b""
        self._data = self._data[max(length, _HEADER.size) :]
        if kind == _OPEN:
            return _HEADER.pack(0, _HEADER.size, 0, 0, 0)
        return _ANSWER.pack(0, _ANSWER.size, 0, 0, 0, 0 if kind == _UPDATE else -1)

    def _reply(self, line: bytes) -> bytes:
        word, *fields = line.split(b"|")
        if word == b"config":
            self._pipes = max(len(fields) - 2, 0) if fields[:1] == [b"tablename"] else self._pipes or 0
            if fields[:1] == [b"smtpd-version"]:
                self._version = fields[-1][:3]
            if fields[:1] == [b"ready"]:
                self._breaks_keys = self._version in (b"7.6", b"7.7", b"7.8")
                return b"".join(b"register|%b\n" % name.encode() for name in (*SERVICES, "ready"))
        elif word == b"table" and self._pipes is not None:
            op, *fields = fields[3 + self._pipes :] or [b""]
            ident = fields[0 if op == b"update" else 1 :][:1]
            return b"%b-result|%b|error|%b\n" % (op, ident[0], self._reason) if ident else b""
        elif word == b"table":
            named = fields[3:4] and fields[3] in OPS
            ident = fields[4 if named else 3 :][:1]
            return b"table-%b|%b|failure\n" % (b"response" if named else b"result", ident[0]) if ident else b""
        return b""


def read(fd: int) -> bytes:
    """The next data from smtpd; empty at end of file."""
    while True:
        try:
            return os.read(fd, READ_SIZE)
        except BlockingIOError:
            _wait(fd, select.POLLIN)
        except OSError:
            return b""  # a reset, because smtpd died: the same as end of file


def _wait(fd: int, event: int) -> None:
    """Wait for an event; select(2) does not take descriptors above 1,023."""
    poll = select.poll()
    poll.register(fd, event)
    poll.poll()


def write(fd: int, data: bytes) -> bool:
    """Write all data; False if smtpd is gone."""
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            _wait(fd, select.POLLOUT)
        except OSError:
            return False
    return True


def _log(text: str) -> None:
    if os.isatty(2) or (sys.platform == "linux" and not os.path.exists("/dev/log")):
        os.write(2, f"table-consul: ERROR: {text}\n".encode("utf-8", "backslashreplace"))
    else:
        syslog.openlog("table-consul", 0, syslog.LOG_MAIL)
        syslog.syslog(syslog.LOG_ERR, text)
