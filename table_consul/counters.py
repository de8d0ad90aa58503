"""Counters of requests and replies, at the cost of one dictionary lookup and two additions a request."""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Callable, Mapping

from table_consul.errors import ConfigError, SourceError
from table_consul.protocol import OPS, Failed, Found, NotFound, Request, Updated
from table_consul.services import SERVICES, Table

# From a reply out of memory to the longest deadline that is likely to be configured.
BOUNDS_SECONDS = (0.00001, 0.000025, 0.0001, 0.00025, 0.001, 0.0025, 0.01, 0.05, 0.25, 1.0, 2.5)
OUTCOMES: Mapping[type, str] = {Found: "found", NotFound: "not-found", Failed: "error", Updated: "ok"}
# In the dialects of 2020 each request names a table: a bound on how many names are counted separately.
SUMS_MAX = 512
OTHER = "(other)"

Labels = tuple[str, str, str, type]
"""Table, service, operation, and type of the reply."""
Sums = list[float]
"""Seconds in total, replies that missed the deadline, then replies per interval: BOUNDS_SECONDS are the inclusive upper
ends, and the last interval has none. CPython is faster at small positive indices, hence the order."""


class Counters:
    """Only the server loop may write; other threads read copies and never make it wait."""

    def __init__(self, tables: Callable[[str], Table]) -> None:
        """``tables`` returns the table of that name or raises ConfigError; called in the server loop."""
        self._tables = tables
        self._sums: dict[Labels, Sums] = {}
        self.malformed = 0
        self.failures: dict[str, tuple[int, str, str, float, float]] = {}
        """By table: how often its source failed, kind and text of the last error, its time on the loop's clock, and
        `answers` then."""

    def add(self, request: Request, reply: type, seconds: float) -> None:
        """Count a request by the type of its reply; ``seconds`` passed from reading it until the reply was ready."""
        try:
            sums = self._sums[request.table, request.service, request.op, reply]
        except KeyError:
            table = request.table if len(self._sums) < SUMS_MAX else OTHER
            service = request.service if request.service in SERVICES or not request.service else OTHER
            labels = (table, service, request.op if request.op in OPS else OTHER, reply)
            sums = self._sums.setdefault(labels, [0.0, 0] + [0] * (len(BOUNDS_SECONDS) + 1))
        sums[0] += seconds
        if seconds <= 0.00001:  # BOUNDS_SECONDS[0], the usual case
            sums[2] += 1
        else:
            sums[2 + bisect_left(BOUNDS_SECONDS, seconds)] += 1
            if seconds >= 0.05:  # the shortest deadline that can be configured
                with contextlib.suppress(ConfigError):
                    sums[1] += seconds >= self._tables(request.table).deadline

    def failed(self, table: str, error: SourceError, now: float) -> None:
        """Count a failure of the source of this table."""
        total = self.failures[table][0] if table in self.failures else 0
        if total or len(self.failures) < SUMS_MAX:
            self.failures[table] = (total + 1, error.kind, str(error), now, self.answers(table))

    def answers(self, table: str) -> float:
        """The number of replies about this table that were not errors; a source that recovers makes it grow."""
        return sum(sum(sums[2:]) for (t, *_, reply), sums in self.sums().items() if t == table and reply is not Failed)

    def sums(self) -> dict[Labels, Sums]:
        """A copy of all sums, for any thread."""
        return {labels: sums[:] for labels, sums in self._sums.copy().items()}
