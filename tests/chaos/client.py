"""smtpd's part: asks without pause, and keeps each answer with its time for judgement."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.chaos.history import FRESH_SECONDS, HOT, Writer

if TYPE_CHECKING:
    from tests.dialogue import Child

DEADLINE_SECONDS = 2.0
# With data in memory an answer is a matter of microseconds; the rest is for a machine whose two processors are shared.
SLOW_SECONDS = 0.05
# The floor of what this machine can do while it is as busy: answers by a process that only answers.
ECHO = "import os\nwhile data := os.read(0, 4096): os.write(0, data)"
ECHO_EVERY = 4
# Three Consul servers that start or elect want more than two processors; what is measured here is not who gets them.
# Only root may go first: to others the table shows, in the column beside, what the machine made of an echo.
NICE = -15

STEADY = (
    (b"check|domain", b"example.org", (b"found",)),
    (b"lookup|alias", b"still", (b"found|gilles",)),
    (b"fetch|source", None, (b"found|192.0.2.1", b"found|192.0.2.2")),
    (b"lookup|alias", b"nobody", (b"not-found",)),
)


@dataclass
class Judgement:
    """A line of the table."""

    fault: str
    answers: int = 0
    wrong: int = 0
    absent: int = 0
    errors: int = 0
    late: int = 0
    slowest: float = 0.0
    floor: float = 0.0
    exits: int = 0
    recovered: float = float("inf")
    examples: list[str] = field(default_factory=list)

    HEAD = (
        f"{'fault':<44} {'answers':>8} {'wrong':>6} {'absent':>6} {'errors':>6} {'late':>5}"
        f" {'slowest ms':>10} {'echo ms':>8} {'exits':>5} {'recovery s':>10}"
    )

    def __str__(self) -> str:
        return (
            f"{self.fault:<44} {self.answers:>8} {self.wrong:>6} {self.absent:>6} {self.errors:>6} {self.late:>5}"
            f" {self.slowest * 1000:>10.1f} {self.floor * 1000:>8.1f} {self.exits:>5} {self.recovered:>10.2f}"
        )


def go_first(thread: int) -> None:
    """Have this thread, and those that it starts from now on, run before what else is ready to."""
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, thread, NICE)


class Client(threading.Thread):
    """Asks a child one thing after the other until it is stopped. ``answers`` may be read at any time."""

    def __init__(self, child: Child, table: bytes) -> None:
        super().__init__(name="client", daemon=True)
        self._child = child
        self._table = table
        self._end = threading.Event()
        self.answers: list[tuple[float, float, int, bytes]] = []
        self.echoes: list[float] = []
        self.newest = [0] * HOT
        self.gone: Exception | None = None

    def run(self) -> None:
        go_first(threading.get_native_id())
        questions = []
        for number in range(HOT + len(STEADY)):
            what, key = (b"lookup|alias", b"hot%d" % number) if number < HOT else STEADY[number - HOT][:2]
            parts = [b"table|0.1|0", self._table, what, b"%08x" % number]
            questions.append(b"|".join(parts if key is None else [*parts, key]) + b"\n")
        ours, theirs = socket.socketpair()
        with theirs:
            echo = subprocess.Popen([sys.executable, "-S", "-c", ECHO], stdin=theirs)
            go_first(echo.pid)
        try:
            self._ask(questions, ours)
        except (OSError, AssertionError) as error:
            self.gone = error
        finally:
            ours.close()
            echo.wait()

    def _ask(self, questions: list[bytes], echo: socket.socket) -> None:
        child, clock, answers, newest = self._child, time.monotonic, self.answers, self.newest
        turn = 0
        while not self._end.is_set():
            number = turn % len(questions)
            turn += 1
            asked = clock()
            child.say(questions[number])
            reply = child.line()
            now = clock()
            outcome = reply.split(b"|", 2)[2]
            answers.append((now, now - asked, number, outcome))
            if number < HOT and outcome.startswith(b"found|v"):
                newest[number] = int(outcome[7:])
            if turn % ECHO_EVERY == 0:
                asked = clock()
                echo.sendall(questions[number])
                echo.recv(4096)
                self.echoes.append(clock() - asked)

    def stop(self) -> None:
        self._end.set()
        self.join(60)

    def judge(self, fault: str, writer: Writer, ill: tuple[float, float]) -> Judgement:
        """What the answers are worth: while ill (from, to) any value ever written is right, else the latest."""
        result = Judgement(fault, len(self.answers), floor=max(self.echoes), exits=int(self.gone is not None))
        seen: Counter[str] = Counter()
        for when, took, number, outcome in self.answers:
            result.slowest = max(result.slowest, took)
            result.late += took > DEADLINE_SECONDS + SLOW_SECONDS
            verdict = ""
            if outcome.startswith(b"error|"):
                result.errors += 1
                verdict = "error"
            elif outcome == b"not-found" and (number < HOT or STEADY[number - HOT][2] != (b"not-found",)):
                result.absent += 1
                verdict = "false not-found"
            elif not self._right(when, number, outcome, writer, ill):
                result.wrong += 1
                verdict = "wrong"
            if verdict:
                seen[verdict] += 1
                if seen[verdict] <= 3:
                    result.examples.append(
                        f"{when - ill[0]:+.3f} s after the fault began: {number}: {outcome!r}: {verdict}"
                    )
        if self.gone:
            result.examples.append(f"gone: {self.gone}")
        return result

    @staticmethod
    def _right(when: float, number: int, outcome: bytes, writer: Writer, ill: tuple[float, float]) -> bool:
        if number >= HOT:
            return outcome in STEADY[number - HOT][2]
        if not outcome.startswith(b"found|v"):
            return False
        version = int(outcome[7:])
        if not 0 < version <= writer.attempted[number]:
            return False
        return ill[0] <= when <= ill[1] or version >= writer.newest(number, when - FRESH_SECONDS)
