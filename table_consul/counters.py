"""What was asked, and how it was answered: counters that cost an answer a dictionary lookup and two additions.

Knows neither who reads them nor how; see metrics.py.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Callable, Mapping

from table_consul.errors import ConfigError
from table_consul.protocol import Failed, Found, NotFound, Request, Updated
from table_consul.services import SERVICES, Table

# From an answer out of memory to one that took the longest deadline many would set.
BOUNDS_SECONDS = (0.00001, 0.000025, 0.0001, 0.00025, 0.001, 0.0025, 0.01, 0.05, 0.25, 1.0, 2.5)
# No deadline is shorter (services.Table), so quicker answers need no comparison with theirs.
LEAST_DEADLINE_SECONDS = 0.05
OUTCOMES: Mapping[type, str] = {Found: "found", NotFound: "not-found", Failed: "error", Updated: "ok"}
# In the dialects of 2020 a request brings the table's name: a bound on how many are told apart.
CELLS_MAX = 512
OTHER = "(other)"
OPS = frozenset({"check", "lookup", "fetch", "update"})

Cell = tuple[str, str, str, type]


class Counters:
    """What was asked and how it was answered. Written by the loop alone; readers take copies and never wait for it."""

    def __init__(self, tables: Callable[[str], Table]) -> None:
        """``tables`` tells how the table of that name is laid out; it may raise ConfigError."""
        self._tables = tables
        self._cells: dict[Cell, list[float]] = {}
        self.malformed = 0
        self.deadline_hits: dict[str, int] = {}
        self.failures: dict[str, tuple[int, float]] = {}
        """Answers that the source could not give, by table; and how many it had given before the last of them."""
        self.last_errors: dict[str, tuple[str, float]] = {}
        """Why it could not the last time, by table; and that moment on the clock of the loop."""

    def add(self, request: Request, kind: type, seconds: float) -> None:
        """Count a request, by the type of its reply, which was there so long after the request was read."""
        try:
            cell = self._cells[request.table, request.service, request.op, kind]
        except KeyError:
            cell = self._cell(request, kind)
        cell[-1] += seconds
        if seconds <= 0.00001:  # BOUNDS_SECONDS[0], the usual case
            cell[0] += 1
        else:
            cell[bisect_left(BOUNDS_SECONDS, seconds)] += 1
            if seconds >= LEAST_DEADLINE_SECONDS:
                self._slow(request.table, seconds)

    def failed(self, table: str, error: Exception, now: float) -> None:
        """Note that the source of this table could not tell, and why."""
        count, _ = self.failures.get(table, (0, 0.0))
        if count or len(self.failures) < CELLS_MAX:
            self.failures[table] = (count + 1, self._given(table))
            self.last_errors[table] = (str(error), now)

    def recovered(self, table: str) -> bool:
        """Whether the source of this table has told anything since it last could not."""
        _, before = self.failures.get(table, (0, -1.0))
        return self._given(table) > before

    def cells(self) -> dict[Cell, list[float]]:
        """A copy: answers in each of the intervals that end at BOUNDS_SECONDS, slower ones, and the sum of seconds."""
        return {key: cell[:] for key, cell in self._cells.copy().items()}

    def _cell(self, request: Request, kind: type) -> list[float]:
        table = request.table if len(self._cells) < CELLS_MAX else OTHER
        service = request.service if request.service in SERVICES or not request.service else OTHER
        key = (table, service, request.op if request.op in OPS else OTHER, kind)
        return self._cells.setdefault(key, [0] * (len(BOUNDS_SECONDS) + 1) + [0.0])

    def _given(self, table: str) -> float:
        return sum(
            sum(cell[:-1]) for (name, *_, kind), cell in self.cells().items() if name == table and kind is not Failed
        )

    def _slow(self, table: str, seconds: float) -> None:
        with contextlib.suppress(ConfigError):
            if seconds >= self._tables(table).deadline and (
                table in self.deadline_hits or len(self.deadline_hits) < CELLS_MAX
            ):
                self.deadline_hits[table] = self.deadline_hits.get(table, 0) + 1
