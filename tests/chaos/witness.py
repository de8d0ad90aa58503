"""Records stalls of the machine: a process on each processor tries to run every millisecond.

    python -m tests.chaos.witness PROCESSOR

It has the priority of the asker and of the child. A delay longer than their turns comes from the host or the kernel and
delays them too: the time in which no process could have answered does not make an answer late.

Standard output, at the end of standard input: start and end of each stall, pickled.
"""

from __future__ import annotations

import os
import pickle
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.chaos.asker import raise_priority

if TYPE_CHECKING:
    from typing import Self

WISH_SECONDS = 0.001
STALL_SECONDS = 0.005

Stall = tuple[float, float]


class Witnesses:
    """A witness on each processor of the tests, as a context manager; ``stalls`` are those seen by any of them."""

    def __init__(self) -> None:
        self.stalls: list[Stall] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        for processor in os.sched_getaffinity(0):
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.chaos.witness", str(processor)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    cwd=Path(__file__).parent.parent.parent,
                )
            )
        for process in self._processes:
            assert process.stdout is not None
            assert process.stdout.read(1) == b"!", "a witness did not start"
        return self

    def __exit__(self, *_: object) -> None:
        seen = []
        for process in self._processes:
            out, _ = process.communicate()
            seen += pickle.loads(out)
        self.stalls = merged(seen)


def merged(stalls: list[Stall]) -> list[Stall]:
    """The stalls in order, with overlaps merged."""
    result: list[Stall] = []
    for begin, end in sorted(stalls):
        if result and begin <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((begin, end))
    return result


def stalled(stalls: list[Stall], begin: float, end: float) -> float:
    """The seconds of stalls between these times."""
    return sum(max(0.0, min(end, to) - max(begin, since)) for since, to in stalls)


def main() -> None:
    os.sched_setaffinity(0, {int(sys.argv[1])})
    raise_priority(0)
    stalls: list[Stall] = []
    sys.stdout.buffer.write(b"!")
    sys.stdout.flush()
    last = time.monotonic()
    while not select.select([sys.stdin], [], [], WISH_SECONDS)[0]:
        now = time.monotonic()
        if now - last > STALL_SECONDS:
            stalls.append((last + WISH_SECONDS, now))
        last = now
    pickle.dump(stalls, sys.stdout.buffer)


if __name__ == "__main__":
    main()
