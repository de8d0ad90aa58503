"""table-procexec: runs a program that speaks one of the line dialects as a table of any OpenSMTPD.

smtpd 7.6 and later speak lines, and a program that registers with it replaces this one. smtpd up to 7.5 speaks imsg,
and no smtpd speaks the dialect of 2020: then, and with --restart, this program translates, and smtpd gets each reply in
time.
"""

from __future__ import annotations

import argparse
import os
import select
import shlex
import socket
import stat
import sys
from collections.abc import Sequence

from table_consul import __version__, fallback

# Where OpenSMTPD keeps its tables: Debian, OpenBSD, FreeBSD, Alpine, Arch. The folder of this program comes first.
LIBEXEC = (
    "/usr/libexec/opensmtpd",
    "/usr/local/libexec/smtpd",
    "/usr/local/libexec/opensmtpd",
    "/usr/lib/opensmtpd",
    "/usr/lib/smtpd/opensmtpd",
)

USAGE = """\
table-procexec [--dialect DIALECT] [--deadline SECONDS] [--restart]
                      COMMAND [ARGUMENT ...]"""
DESCRIPTION = """\
Runs COMMAND as a table for any version of OpenSMTPD. COMMAND speaks the
protocol of smtpd-tables(7) or that of table-procexec as of 2020. In smtpd.conf:

  table users "procexec:/usr/libexec/opensmtpd/table-users /etc/mail/users.conf"
"""
EPILOG = """\
COMMAND is looked up beside table-procexec, in OpenSMTPD's libexec folders and
in PATH. If it registers with OpenSMTPD 7.6 or later within a second, OpenSMTPD
talks to it directly and exits when it exits. Otherwise, and with --restart,
table-procexec translates between the two. smtpd.conf takes no options: put them
into a script that runs table-procexec.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "table-procexec",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dialect", choices=("smtpd-tables", "procexec"), help="protocol of COMMAND (default: detect)")
    parser.add_argument(
        "--deadline", metavar="SECONDS", type=float, default=2.0, help="limit for each reply (default: 2)"
    )
    parser.add_argument("--restart", action="store_true", help="always translate; restart COMMAND if it exits")
    parser.add_argument("--version", action="version", version=f"table-procexec {__version__}")
    parser.add_argument("command", metavar="COMMAND", nargs=argparse.REMAINDER, help="the program and its arguments")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns 0, 2 for a wrong command line, or 127 for a command that cannot be run."""
    parser = _parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        # smtpd passes everything after the colon as one argument (smtpd: smtpd.c, fork_proc_backend).
        options = parser.parse_args(shlex.split(words[0]) if len(words) == 1 else words)
    except ValueError as error:
        parser.error(f"{error}: {words[0]}")
    if not 0 < options.deadline <= 60:
        parser.error(f"argument --deadline: must be above 0 and at most 60 seconds: {options.deadline:g}")
    if not options.command:
        parser.error("missing COMMAND")
    if os.isatty(0):
        parser.error("standard input is a terminal (only smtpd starts table-procexec: see table-procexec(8))")
    hello = _peek(0)
    beside = os.path.dirname(sys.argv[0])
    if hello == b"":
        return 0
    if hello is not None:
        stays = hello < b"\x08" or options.restart or options.dialect == "procexec"
        on_trial = not stays and options.dialect is None and hello.startswith(b"config|")
        if (stays or on_trial) and _bridge(options, beside, hello if on_trial else b""):
            return 0
    try:
        os.execv(find(options.command[0], beside), options.command)  # noqa: S606 - smtpd.conf names it
    except OSError as error:
        sys.stderr.write(f"table-procexec: {options.command[0]}: {error.strerror}\n")
        return 127


def _peek(fd: int) -> bytes | None:
    """The first bytes from the peer, left unread; empty at end of file, None if this is not a socket."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return None
    with socket.socket(fileno=os.dup(fd)) as peer:
        while True:
            try:
                return peer.recv(4096, socket.MSG_PEEK)
            except BlockingIOError:
                select.select([fd], [], [])
            except OSError:
                return b""


def find(name: str, beside: str) -> str:
    """The path of a command: unchanged if it has a slash, otherwise from ``beside``, the libexec folders, and PATH.

    Raises:
        FileNotFoundError: it is in none of them.
    """
    if "/" in name:
        return name
    folders = [beside] if os.path.isabs(beside) else []
    for folder in (*folders, *LIBEXEC, *os.get_exec_path()):
        path = os.path.join(folder, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    raise FileNotFoundError(2, "not found in OpenSMTPD's libexec folders or in PATH", name)


def _bridge(options: argparse.Namespace, beside: str, hello: bytes) -> bool:
    """Serve smtpd from a child until smtpd exits; False, with nothing served, if smtpd can run the command itself.

    ``hello`` is smtpd's handshake (smtpd: table_proc.c, table_proc_open sends it whole), empty for no trial.
    """
    # Imported here because this takes longest, and a command without a trial must not wait for it.
    try:
        import logging

        from table_consul.child import Bridge
        from table_consul.log import start as start_log
        from table_consul.server import Server, claim_stdio
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a broken package may raise anything
        fallback.serve(error)
        return True

    name, *arguments = options.command
    table = hello.partition(b"config|tablename|")[2].partition(b"\n")[0].decode("utf-8", "backslashreplace")
    start_log("info", "auto", table, "table-procexec")
    bridge = Bridge(name, lambda: [find(name, beside), *arguments], options.dialect, options.deadline)
    try:
        if hello:
            if bridge.suits_smtpd(table):
                return False
            logging.getLogger("table_consul").info("%s: does not register with smtpd; translating its replies", name)
        Server(bridge, lambda table: start_log("info", "auto", table, "table-procexec")).serve(*claim_stdio())
    finally:
        bridge.close()
    return True
