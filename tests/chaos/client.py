"""Records every answer with its time, and judges it."""

from __future__ import annotations

import contextlib
import pickle
import string
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.chaos.history import FRESH_SECONDS, HOT, NAMES, Writer
from tests.chaos.witness import Witnesses, stalled

if TYPE_CHECKING:
    from tests.dialogue import Child

DEADLINE_SECONDS = 2.0
# With data in memory, and without stalls of the whole machine.
SLOW_SECONDS = 0.05

NEVER = (float("inf"), float("inf"))

STEADY = (
    (b"check|domain", b"example.org", (b"found",)),
    (b"lookup|alias", b"still", (b"found|gilles",)),
    (b"fetch|source", None, (b"found|192.0.2.1", b"found|192.0.2.2")),
    (b"lookup|alias", b"nobody", (b"not-found",)),
    (b"lookup|alias", b"leaving", (b"found|eric",)),
    (b"lookup|userinfo", b"boss", (b"found|5001:5001:/var/vmail/boss",)),
    (b"lookup|userinfo", b"staff", (b"found|5000:5000:/var/vmail",)),
)
ENTRIES = {
    "alias/still": "gilles",
    "alias/leaving": "eric",
    "domain/example.org": "",
    "source/192.0.2.1": "",
    "source/192.0.2.2": "",
    "userinfo/boss": "5001:5001:/var/vmail/boss",
    "userinfo/*": "5000:5000:/var/vmail",
}
"""Keys and values that answer the steady questions."""
LETTERS = [(letter, 20 if letter in "yz" else 400) for letter in string.ascii_lowercase if letter != "u"]
FILLER = {f"alias/user{number:06}": "filler" for number in range(9_000)} | {
    f"alias/{letter}{number:03}-filler": "filler" for letter, count in LETTERS for number in range(count)
}
"""Entries that make a table large: names that differ in the first letter, and in the last ones."""


def number_of(key: bytes) -> int:
    """The number of a steady question."""
    return HOT + [asked for _, asked, _ in STEADY].index(key)


@dataclass
class Judgement:
    """A row of the report."""

    fault: str
    answers: int = 0
    wrong: int = 0
    absent: int = 0
    errors: int = 0
    late: int = 0
    slowest: float = 0.0
    by_the_clock: float = 0.0
    """The slowest answer, stalls of the machine included."""
    stalled: float = 0.0
    exits: int = 0
    recovered: float = float("inf")
    examples: list[str] = field(default_factory=list)

    HEAD = (
        f"{'fault':<44} {'answers':>8} {'wrong':>6} {'absent':>6} {'errors':>6} {'late':>5}"
        f" {'slowest ms':>10} {'by clock':>8} {'stall ms':>8} {'exits':>5} {'recovery s':>10}"
    )

    def __str__(self) -> str:
        return (
            f"{self.fault:<44} {self.answers:>8} {self.wrong:>6} {self.absent:>6} {self.errors:>6} {self.late:>5}"
            f" {self.slowest * 1000:>10.1f} {self.by_the_clock * 1000:>8.1f} {self.stalled * 1000:>8.1f}"
            f" {self.exits:>5} {self.recovered:>10.2f}"
        )


class Client(threading.Thread):
    """Sends requests to a child one after the other until it is stopped. ``answers`` may be read at any time."""

    def __init__(self, child: Child | None, table: bytes) -> None:
        super().__init__(name="client", daemon=True)
        self._child = child
        self._table = table
        self._asker: subprocess.Popen[bytes] | None = None
        self.answers: list[tuple[float, float, int, bytes]] = []
        self.witnesses = Witnesses()
        self.newest = [0] * HOT
        self.latest = [b""] * (HOT + len(STEADY))
        self.gone: str | None = None

    def start(self) -> None:
        assert self._child is not None
        wire = self._child.wire.fileno()
        self._asker = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.asker", str(wire)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[wire],
            cwd=Path(__file__).parent.parent.parent,
        )
        assert self._asker.stdin is not None
        pickle.dump(self._questions(), self._asker.stdin)
        self.witnesses.__enter__()
        self._asker.stdin.flush()
        super().start()

    def _questions(self) -> list[bytes]:
        questions = []
        for number in range(HOT + len(STEADY)):
            what, key = (b"lookup|alias", NAMES[number].encode()) if number < HOT else STEADY[number - HOT][:2]
            parts = [b"table|0.1|0", self._table, what, b"%08x" % number]
            questions.append(b"|".join(parts if key is None else [*parts, key]) + b"\n")
        return questions

    def run(self) -> None:
        assert self._asker is not None
        assert self._asker.stdout is not None
        with contextlib.suppress(EOFError):
            while True:
                answers, self.gone = pickle.load(self._asker.stdout)
                for when, took, number, reply in answers:
                    _, ident, outcome = reply.split(b"|", 2)
                    assert int(ident, 16) == number, f"{reply!r} answers question {number}"
                    self.answers.append((when, took, number, outcome))
                    self.latest[number] = outcome
                    if number < HOT and outcome.startswith(b"found|v"):
                        self.newest[number] = int(outcome[7:])

    def stop(self) -> None:
        assert self._asker is not None
        assert self._asker.stdin is not None
        self._asker.stdin.close()
        self.join(60)
        self._asker.wait(60)
        self.witnesses.__exit__()
        assert self._asker.stdout is not None
        self._asker.stdout.close()

    def judge(self, fault: str, writer: Writer, ill: tuple[float, float]) -> Judgement:
        """Judge the answers: during the fault (from, to) any value ever written is right, otherwise only the latest."""
        stalls = self.witnesses.stalls
        longest = max((end - begin for begin, end in stalls), default=0.0)
        result = Judgement(fault, len(self.answers), stalled=longest, exits=int(self.gone is not None))
        seen: Counter[str] = Counter()
        for when, took, number, outcome in self.answers:
            ours = took if took <= SLOW_SECONDS else took - stalled(stalls, when - took, when)
            result.slowest = max(result.slowest, ours)
            result.by_the_clock = max(result.by_the_clock, took)
            result.late += ours > DEADLINE_SECONDS + SLOW_SECONDS
            verdict = _verdict(when, number, outcome, writer, ill, FRESH_SECONDS)
            if verdict == "wrong":
                fresh = FRESH_SECONDS + stalled(stalls, when - 2 * FRESH_SECONDS, when)
                verdict = _verdict(when, number, outcome, writer, ill, fresh)
            if verdict:
                seen[verdict] += 1
                if seen[verdict] <= 3:
                    result.examples.append(
                        f"{when - ill[0]:+.3f} s after the fault began: {number}: {outcome!r}: {verdict}"
                    )
        result.wrong, result.absent, result.errors = seen["wrong"], seen["false not-found"], seen["error"]
        if self.gone:
            result.examples.append(f"gone: {self.gone}")
        return result

    def is_well(self, writer: Writer, wanted: list[int]) -> bool:
        """Whether the latest answers have at least these versions, and all others are as without a fault."""
        return all(have >= want for have, want in zip(self.newest, wanted, strict=True)) and all(
            self.latest[number] in ((b"not-found",) if number in writer.deleted else expected)
            for number, (_, _, expected) in enumerate(STEADY, HOT)
        )


def _verdict(when: float, number: int, outcome: bytes, writer: Writer, ill: tuple[float, float], fresh: float) -> str:
    """The fault of an answer, empty if it is right. ``fresh``: how many seconds an edit may stay unseen."""
    is_ill = ill[0] <= when <= ill[1]
    if outcome.startswith(b"error|"):
        since, until = writer.hidden.get(number, NEVER)
        return "" if since <= when <= until else "error"
    asked, gone = writer.deleted.get(number, NEVER)
    expected = STEADY[number - HOT][2] if number >= HOT else ()
    if outcome == b"not-found" and outcome not in expected:
        return "" if asked <= when else "false not-found"
    if number >= HOT:
        return "" if outcome in expected and (is_ill or when <= gone + fresh) else "wrong"
    version = int(outcome[7:]) if outcome.startswith(b"found|v") else 0
    oldest = 1 if is_ill else max(1, writer.newest(number, when - fresh))
    return "" if oldest <= version <= writer.attempted[number] else "wrong"
