"""Logging to syslog (facility mail, as smtpd does) or to standard error.

A separate thread writes, because a blocked syslog or standard error must not keep smtpd waiting.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
import syslog
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from table_consul.errors import counted, printable

# Lines that wait to be written; further ones are dropped, and counted.
QUEUE_MAX = 1000
# How long the process waits for the last lines to be written when it ends.
FLUSH_SECONDS = 1.0
# How many bad entries one load logs; every entry of a table may be bad.
PROBLEMS_MAX = 30

Write = Callable[[str, str], None]
"""Writes a text, of one line or several, at a level."""


class Handler(logging.Handler):
    """Queues lines for the thread that writes them, and never waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.write: Write = _write_stderr
        self._changed = threading.Condition()
        self._queue: deque[tuple[Write, str, str]] = deque()
        self._dropped = 0
        self._writer: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception:  # noqa: BLE001 - as logging's own handlers do: a log line must not end the mail server
            return self.handleError(record)
        with self._changed:
            if len(self._queue) < QUEUE_MAX:
                self._queue.append((self.write, record.levelname, text))
            else:
                self._dropped += 1
            if self._writer is None:
                writer = threading.Thread(target=self._run, name="log", daemon=True)
                with contextlib.suppress(RuntimeError):  # too many threads; the next line tries again
                    writer.start()
                    self._writer = writer
            self._changed.notify_all()
        return None

    def flush(self) -> None:
        """Wait until all lines are written, for at most `FLUSH_SECONDS`; logging calls this when the process ends."""
        with self._changed:
            self._changed.wait_for(lambda: not self._queue or self._writer is None, FLUSH_SECONDS)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue)
                write, level, text = self._queue[0]
            with contextlib.suppress(Exception):  # there is nowhere to report it
                write(level, text)
            with self._changed:
                self._queue.popleft()
                if self._dropped and not self._queue:
                    lines, self._dropped = counted(self._dropped, "log line", "log lines"), 0
                    report = f"{lines} dropped: the log was not read in time"
                    self.emit(logging.makeLogRecord({"levelname": "WARNING", "msg": report}))
                self._changed.notify_all()


def _write_syslog(identity: str, level: str, text: str) -> None:
    """Write to syslog(3), which reopens /dev/log after a restart of the log daemon."""
    syslog.openlog(identity, 0, syslog.LOG_MAIL)  # in this thread, because it waits for a line that is being written
    priority = getattr(syslog, f"LOG_{level}", syslog.LOG_ERR)  # it has no ERROR and CRITICAL
    for line in text.split("\n"):
        syslog.syslog(priority, line)


def _write_stderr(_level: str, text: str) -> None:
    """Write without the lock of sys.stderr, for which the process would wait at its end."""
    data = f"{text}\n".encode("utf-8", "backslashreplace")
    while data and sys.stderr is not None:
        try:
            data = data[os.write(2, data) :]
        except BlockingIOError:
            select.select([], [2], [])


class OneLine(logging.Formatter):
    """Escapes control characters in messages, parts of which come from strangers."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        record.message = printable(record.message, 1000)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802, ANN401 - logging's name, and a type that only typeshed has
        # Indented, so that a line of an exception's text cannot pass for a log line.
        return "\n".join(f"    {printable(line, 1000)}" for line in super().formatException(ei).split("\n"))


def _stderr_is_read() -> bool:
    """Whether standard error is a terminal or, without syslog (as in a container), anything but /dev/null.

    That of a daemonised smtpd is /dev/null (daemon(3)), and syslog may start after smtpd.
    """
    if sys.stderr is None or sys.stderr.isatty():
        return sys.stderr is not None
    if sys.platform != "linux" or os.path.exists("/dev/log"):  # OpenBSD's syslog needs no socket
        return False
    try:
        return not os.path.samestat(os.fstat(sys.stderr.fileno()), os.stat(os.devnull))
    except (OSError, ValueError):
        return False


def start(level: str, target: str, table: str, program: str = "table-consul") -> None:
    """Set the level and the destination of the log: ``syslog``, ``stderr``, or ``auto`` for the one that is read.

    Lines start with ``<program>[<table>]``. May be called again when the table's name or the configuration is known.
    """
    identity = f"{program}[{printable(table, 60)}]" if table else program
    root = logging.getLogger()
    handler = next((each for each in root.handlers if isinstance(each, Handler)), None) or Handler()
    if target == "syslog" or (target == "auto" and not _stderr_is_read()):
        handler.write, text = partial(_write_syslog, identity), "%(message)s"
    else:
        handler.write, text = _write_stderr, f"{identity}: %(levelname)s: %(message)s"
    handler.setFormatter(OneLine(text))
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)  # libraries may warn; urllib3's debug lines contain tokens
    logging.getLogger("table_consul").setLevel(level.upper())
    logging.raiseExceptions = False


def warn_of_problems(table: str, problems: Sequence[object]) -> None:
    """Log the first `PROBLEMS_MAX` problems of a table's entries, and the number of the others."""
    log = logging.getLogger("table_consul")
    for problem in problems[:PROBLEMS_MAX]:
        log.warning("%s", problem)
    if (left := len(problems) - PROBLEMS_MAX) > 0:
        entries = counted(left, "more entry has a problem", "more entries have a problem")
        log.warning("%s: %s (list them: table-consulctl lint %s)", printable(table), entries, printable(table))
