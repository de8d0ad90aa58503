"""Log lines go to syslog, facility mail, like those of smtpd, or to standard error."""

from __future__ import annotations

import logging
import os
import sys
import syslog
from typing import Any

from table_consul.errors import printable


class SyslogHandler(logging.Handler):
    """syslog(3), which finds /dev/log again by itself when the log daemon was restarted."""

    def emit(self, record: logging.LogRecord) -> None:
        priority = getattr(syslog, f"LOG_{record.levelname}", syslog.LOG_ERR)  # it has no ERROR and CRITICAL
        try:
            for line in self.format(record).split("\n"):
                syslog.syslog(priority, line)
        except Exception:  # noqa: BLE001 - as logging's own handlers do: no log line is worth the mail server
            self.handleError(record)


class OneLine(logging.Formatter):
    """Messages whose control characters are made visible: part of them comes from strangers."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        record.message = printable(record.message, 1000)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802, ANN401 - logging's name, and a type that only typeshed has
        # Indented, so that a line within the text of an exception passes for no log line.
        return "\n".join(f"    {printable(line, 1000)}" for line in super().formatException(ei).split("\n"))


def _stderr_is_read() -> bool:
    """Whether standard error is a terminal or, without syslog (as in a container), anything but /dev/null.

    That of a daemonised smtpd leads to /dev/null (daemon(3)), and syslog may be started after it.
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
    """Log from now on at this level to ``syslog``, ``stderr``, or (``auto``) whichever of them somebody reads.

    Lines carry ``<program>[<table>]``. May be called again when the table's name or the configuration is known.
    """
    identity = f"{program}[{printable(table, 60)}]" if table else program
    handler: logging.Handler
    if target == "syslog" or (target == "auto" and not _stderr_is_read()):
        syslog.openlog(identity, 0, syslog.LOG_MAIL)
        handler, text = SyslogHandler(), "%(message)s"
    else:
        handler, text = logging.StreamHandler(sys.stderr), f"{identity}: %(levelname)s: %(message)s"
    handler.setFormatter(OneLine(text))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)  # libraries may warn; urllib3's debug lines would hold tokens
    logging.getLogger("table_consul").setLevel(level.upper())
    logging.raiseExceptions = False
