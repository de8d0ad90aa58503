"""table-consulctl in tests: within this process, where that shows all there is to see, or as a program of its own."""

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
    """Run it within this process, its output into pipes; of Consul's variables it sees these alone."""
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
    """The program itself, not waited for; standard error into a pipe."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("CONSUL_")}
    return subprocess.Popen(
        [sys.executable, "-c", START, *map(str, arguments)],
        **{"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, "env": environ, **options},
    )


def finished(process: subprocess.Popen[bytes]) -> Done:
    """What became of a program that was started."""
    out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    return Done(process.returncode, out or b"", err or b"")


def _take_the_terminal():
    """Whatever terminal the first process of a session opens becomes the terminal of that session."""
    os.close(os.open(os.ttyname(0), os.O_RDWR))


def at_terminal(*arguments, typed=b"", wanted=b"", turns=(), **environ):
    """All that appears on a terminal; what is typed is typed when the wanted text has appeared.

    ``turns`` are pairs of a wanted text and what is typed then, one after the other.
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
    except OSError:  # how a terminal says that nobody is left
        pass
    finally:
        os.close(ours)
    return process.wait(TIMEOUT_SECONDS), shown.replace(b"\r\n", b"\n").decode()
