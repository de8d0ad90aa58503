"""A table's entries in memory, and the pure functions that decide when and how to refresh them.

Knows nothing of threads, HTTP or files; moments come in as seconds on the caller's clock. The rules are those of
Consul's documentation (api-docs/features/blocking, "Implementation Details") and of consul-template's watch/view.go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import msgspec

from table_consul.errors import SourceError, TooLarge, Unreachable, printable
from table_consul.services import SERVICES, Table
from table_consul.services.entries import Entries, EntriesBuilder
from table_consul.sources import PROBE

# Between the ends of two queries: a burst of edits is read as a few. Half of the edits are seen sooner than that.
LEAST_PAUSE_SECONDS = 0.02
# Of a query that returns again and again with nothing new, as for an empty prefix when others change (consul #12363).
MOST_PAUSE_SECONDS = 0.5
# A query that brings nothing still proves that Consul is there; but it costs Consul a scan of the prefix.
LEAST_WAIT_SECONDS = 10.0
MOST_WAIT_SECONDS = 60.0
KEYS_PER_WAIT_SECOND = 1000
# How many missing keys to read when Consul filters a list: a sample that shows whether they are deleted or hidden.
MAX_ABSENCE_CHECKS = 8

Errors = Mapping[str, SourceError]


class QueryState(msgspec.Struct, frozen=True):
    """How a watch asks next: the index to wait on, and how many answers in a row have brought nothing."""

    index: int = 0
    idle: int = 0


def next_query(
    state: QueryState, index: int, *, changed: bool, timed_out: bool, load_seconds: float
) -> tuple[QueryState, float]:
    """The next state of a watch after an answer, and the seconds to pause before the next query.

    ``timed_out``: Consul held the query for as long as it was asked to. ``load_seconds`` count from the first byte.
    An index that goes backwards (a restored snapshot, a deleted newest key) restarts at 0, for waiting on a number that
    the store has yet to reach hides every edit until then. An index is at least 1.
    """
    index = 0 if index < state.index else max(index, 1)
    idle, pause = 0, 0.0
    if state.index == 0 and not timed_out:
        # An index that goes back and forth (stale servers in turn) is not a change, and must not cause a busy loop.
        idle = state.idle
    elif changed and not timed_out:
        pause = max(LEAST_PAUSE_SECONDS, load_seconds)
    elif not timed_out:
        idle = state.idle + 1
        pause = min(LEAST_PAUSE_SECONDS * 2.0 ** min(idle, 10), MOST_PAUSE_SECONDS)
    return QueryState(index, idle), pause


def wait_seconds(keys: int, max_age: float) -> float:
    """How long Consul shall hold a query when there is nothing new: well below ``max_age``, which counts from it."""
    wait = min(max(keys / KEYS_PER_WAIT_SECOND, LEAST_WAIT_SECONDS), MOST_WAIT_SECONDS)
    return max(min(wait, max_age / 3), LEAST_PAUSE_SECONDS)


class Snapshot(msgspec.Struct, frozen=True):
    """The entries below one prefix at one moment, by service. Never changed."""

    entries: Mapping[str, Entries]
    forbidden: Errors
    """Services whose folder may not be read: what looks absent from it may be there."""
    restored: bool = False
    """It comes from a file, or from a watch with other settings; Consul has confirmed nothing of it to this one."""

    @property
    def size(self) -> int:
        """How many entries there are."""
        return sum(len(entries) for entries in self.entries.values())


def unverified_services(services: Iterable[str], former: Snapshot | None) -> list[str]:
    """Those services of which it is not known whether their folder may be read at all."""
    return [name for name in services if former is None or former.restored or name in former.forbidden]


class AbsenceCheck(NamedTuple):
    """A key whose absence must be confirmed by reading it."""

    service: str
    key: bytes
    had_entries: bool
    """Its service had entries, which go on answering while this cannot be proven."""


class SnapshotBuilder:
    """A snapshot in the making: entries come in as Consul lists them, nearly always in ascending order."""

    def __init__(
        self, table: Table, prefix: bytes, services: Iterable[str], former: Snapshot | None, forbidden: Errors
    ) -> None:
        """``forbidden`` are those services whose folder could not be read when it was tried, before Consul was asked.

        Before, not after: a blocking query goes by the ACLs of its beginning, which may have changed when it ends.
        """
        self.forbidden = dict(forbidden)
        """Services whose folder the token may not read: unlisted keys may exist."""
        self._former = former
        self._builders = [
            EntriesBuilder(table, SERVICES[name], None if former is None else former.entries[name]) for name in services
        ]
        self.table = table
        self._prefix = prefix
        self._count = 0

    def take(self, pairs: Sequence[tuple[bytes, bytes | None]]) -> None:
        """Take some entries, with their full keys.

        Raises:
            TooLarge: there are more than the table's ``max_keys``.
        """
        if not pairs:
            return
        self._count += len(pairs)
        if self._count > self.table.max_keys:
            raise TooLarge(f"{printable(self._prefix)} holds more than max_keys = {self.table.max_keys} keys")
        keys = [key for key, _ in pairs]
        first, last = min(keys), max(keys)
        for builder in self._builders:
            path, start = builder.path, len(builder.path)
            if first.startswith(path) and last.startswith(path):
                builder.take([(key[start:], value) for key, value in pairs])
            elif first < path + b"\xff" and last >= path:
                builder.take([(key[start:], value) for key, value in pairs if key.startswith(path)])

    def absence_checks(self, is_url_safe: Callable[[bytes], bool], *, filtered: bool) -> Iterator[AbsenceCheck]:
        """The keys to read before the absence of others is trusted; ``filtered``: Consul reports hidden keys.

        ACLs make a list look shorter, or empty, without an error; only the read of one key returns 403.
        """
        former = self._former
        for builder in self._builders:
            name = builder.service.name
            missing = filter(is_url_safe, (builder.path + key for key in builder.missing_keys()))
            checked = list(islice(missing, MAX_ABSENCE_CHECKS if filtered else 1))
            yield from (AbsenceCheck(name, key, had_entries=True) for key in checked)
            if checked or name in self.forbidden or PROBE in builder.values:
                continue
            had_entries = former is not None and name not in former.forbidden and len(former.entries[name]) > 0
            if filtered or (had_entries and not builder.values and not builder.errors):
                yield AbsenceCheck(name, builder.path + PROBE, had_entries)

    def finish(self, *, restored: bool = False) -> Snapshot:
        """The snapshot; the former one itself if nothing has changed."""
        entries = {builder.service.name: builder.finish() for builder in self._builders}
        former, built = self._former, (entries, self.forbidden.keys(), False)
        if former is not None and (former.entries, former.forbidden.keys(), former.restored) == built:
            return former
        return Snapshot(entries, self.forbidden, restored)


class Mirror:
    """The latest snapshot of one prefix, and when Consul last confirmed it.

    One thread writes, others read: ``state`` is replaced by one assignment. It is a new tuple of the snapshot and the
    moment of its confirmation each time, or None before the first load, and while the table is too large.
    """

    def __init__(self, max_age: float) -> None:
        self.max_age = max_age
        self.state: tuple[Snapshot, float] | None = None
        self.last_error: SourceError = Unreachable("no data received from Consul yet")

    def entries(self, service: str, key: bytes | None, now: float) -> Entries:
        """The entries of this service, which prove absence for this key (None: for all keys).

        Raises:
            SourceError: there are none yet, they are older than ``max_age``, or the folder may not be read.
        """
        state = self.state
        if state is None:
            raise self.last_error.with_traceback(None)  # else it grows with each raise, as does the one below
        snapshot, confirmed = state
        if now - confirmed > self.max_age:
            raise Unreachable(f"no data from Consul for {now - confirmed:.0f} s; last error: {self.last_error}")
        if service in snapshot.forbidden and (key is None or snapshot.entries[service].find(key) is None):
            raise snapshot.forbidden[service].with_traceback(None)
        return snapshot.entries[service]
