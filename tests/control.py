"""Run table-consulctl in tests: within this process where that suffices, or as a child process."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from typing import NamedTuple
from unittest import mock

from table_consul.ctl import main
from tests.dialogue import TIMEOUT_SECONDS

START = "import sys; from table_consul.ctl.main import main; sys.exit(main())"


class Done(NamedTuple):
    status: int
    out: bytes
    err: bytes

    @property
    def text(self) -> str:
        return self.out.decode()

    @property
    def said(self) -> str:
        """Standard error."""
        return self.err.decode()


def control(*arguments: object, stdin: bytes = b"", **environ: str) -> Done:
    """Run the command within this process, its output captured; ``CONSUL_`` variables come only from ``environ``."""
    streams = [io.TextIOWrapper(io.BytesIO(data), encoding="utf-8") for data in (stdin, b"", b"")]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CONSUL_")}
    with (
        mock.patch.dict(os.environ, {**clean, **environ}, clear=True),
        mock.patch.object(sys, "stdin", streams[0]),
        mock.patch.object(sys, "stdout", streams[1]),
        mock.patch.object(sys, "stderr", streams[2]),
        mock.patch("logging.basicConfig"),
    ):
        status = main.main([str(argument) for argument in arguments])
        for stream in streams[1:]:
            stream.flush()
    return Done(status, *(stream.buffer.getvalue() for stream in streams[1:]))


def start(*arguments: object, **options) -> subprocess.Popen[bytes]:
    """Start the program with standard error in a pipe."""
    # The installed program ignores PYTHONUNBUFFERED.
    unwanted = ("CONSUL_", "PYTHONUNBUFFERED")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    return subprocess.Popen(
        [sys.executable, "-c", START, *map(str, arguments)],
        **{"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, "env": environ, **options},
    )


def finished(process: subprocess.Popen[bytes]) -> Done:
    """Wait for a started program; its status and output."""
    out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    return Done(process.returncode, out or b"", err or b"")


def _take_the_terminal():
    """Make the terminal that of a new session: the first terminal a session leader opens becomes its own."""
    os.close(os.open(os.ttyname(0), os.O_RDWR))


def at_terminal(*arguments, typed=b"", wanted=b"", turns=(), **environ):
    """The exit status, and everything that appears on a terminal.

    ``turns`` are pairs: a text to wait for, and the input to type after it.
    """
    left = [*turns, *([(wanted, typed)] if typed else [])]
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", START, *map(str, arguments)],
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
        start_new_session=True,
        env={**os.environ, "TERM": "xterm", **environ},
        preexec_fn=_take_the_terminal,  # noqa: PLW1509 - two system calls, and no other way
    )
    os.close(theirs)
    shown, seen = b"", 0
    try:
        while True:
            shown += os.read(ours, 4096)
            while left and (at := shown.find(left[0][0], seen)) >= 0:
                seen = at + len(left[0][0])
                os.write(ours, left.pop(0)[1])
    except OSError:  # a terminal without any process left reports this
        pass
    finally:
        os.close(ours)
    return process.wait(TIMEOUT_SECONDS), shown.replace(b"\r\n", b"\n").decode()
