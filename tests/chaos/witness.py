"""Tells when the machine itself stood still: on each processor a process that wants to run every millisecond.

    python -m tests.chaos.witness PROCESSOR

It goes first as the asker and the child do. What holds it up for longer than a turn among its equals is the host, or
the kernel, and holds up the others as well: an answer is not late for as long as no process could have given it.

Standard output, at the end of standard input: the moments from and to which nothing ran, pickled.
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

from tests.chaos.asker import go_first

if TYPE_CHECKING:
    from typing import Self

WISH_SECONDS = 0.001
STALL_SECONDS = 0.005

Stall = tuple[float, float]


class Witnesses:
    """One on each processor that the tests may use, as a context manager; ``stalls`` are what all of them saw."""

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
    """The same moments, none of them twice, in their order."""
    result: list[Stall] = []
    for begin, end in sorted(stalls):
        if result and begin <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((begin, end))
    return result


def stalled(stalls: list[Stall], begin: float, end: float) -> float:
    """For how many seconds between these moments the machine stood still."""
    return sum(max(0.0, min(end, to) - max(begin, since)) for since, to in stalls)


def main() -> None:
    os.sched_setaffinity(0, {int(sys.argv[1])})
    go_first(0)
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
