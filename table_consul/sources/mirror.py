"""A copy of one table's entries, and every rule of keeping it true, as arithmetic.

Knows nothing of threads, HTTP or files; moments come in as seconds on the caller's clock. The rules are those of
Consul's documentation (api-docs/features/blocking, "Implementation Details") and of consul-template's watch/view.go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec

from table_consul.errors import SourceError, Unreachable, printable
from table_consul.services import SERVICES, Table
from table_consul.services.entries import Entries, EntriesBuilder
from table_consul.sources import PROBE

# Between the ends of two queries: a burst of edits is read as a few. Half of the edits are seen sooner than that.
LEAST_PAUSE_SECONDS = 0.02
# Of a query that returns again and again with nothing new, as for an empty prefix when others change (consul #12363).
MOST_PAUSE_SECONDS = 0.5
# A query that brings nothing still proves that Consul is there; but with it comes the whole table again.
LEAST_WAIT_SECONDS = 10.0
MOST_WAIT_SECONDS = 60.0
KEYS_PER_WAIT_SECOND = 1000
# How many lost keys are asked for where Consul says that it hides some: a guess at what was deleted and what is hidden.
PROOFS = 8


class TooManyKeys(SourceError):
    """The table has more than ``max_keys`` entries."""


class QueryState(msgspec.Struct, frozen=True):
    """Where a watch stands: the index to ask with, and how many answers in a row have brought nothing."""

    index: int = 0
    idle: int = 0


class QueryResult(msgspec.Struct, frozen=True):
    """One answer to a blocking query."""

    index: int
    changed: bool
    waited_out: bool
    """Consul held the query for as long as it was asked to."""
    took: float
    """Seconds from its first byte to its last, decoding included."""


def next_query(state: QueryState, turn: QueryResult) -> tuple[QueryState, float]:
    """The next state of the watch, and the seconds to pause before the next query.

    An index that goes backwards (a restored snapshot, a deleted newest key) restarts at 0, for waiting on a number that
    the store has yet to reach hides every edit until then. An index is at least 1.
    """
    index = 0 if turn.index < state.index else max(turn.index, 1)
    if turn.waited_out:
        return QueryState(index), 0.0
    if state.index == 0:
        # An index that goes to and fro (stale servers by turns) is no news, and must not make this a busy loop.
        return QueryState(index, state.idle), 0.0
    if turn.changed:
        return QueryState(index), max(LEAST_PAUSE_SECONDS, turn.took)
    idle = state.idle + 1
    return QueryState(index, idle), min(LEAST_PAUSE_SECONDS * 2.0 ** min(idle, 10), MOST_PAUSE_SECONDS)


def wait_seconds(keys: int, max_age: float) -> float:
    """How long Consul shall hold a query when there is nothing new: well below ``max_age``, which counts from it."""
    wait = min(max(keys / KEYS_PER_WAIT_SECOND, LEAST_WAIT_SECONDS), MOST_WAIT_SECONDS)
    return max(min(wait, max_age / 3), LEAST_PAUSE_SECONDS)


class Snapshot(msgspec.Struct, frozen=True):
    """The buckets below one prefix at one moment, by the name of their service. Never changed."""

    entries: Mapping[str, Entries]
    forbidden: Mapping[str, SourceError]
    """Services whose bucket may not be read: what looks absent from it may be there."""
    restored: bool = False
    """It comes from a copy on disk; Consul has proven nothing of it to this process."""

    @property
    def size(self) -> int:
        """How many entries there are."""
        return sum(len(bucket) for bucket in self.entries.values())


def unverified_services(services: Iterable[str], former: Snapshot | None) -> list[str]:
    """Those services of which it is not known whether their folder may be read at all."""
    return [name for name in services if former is None or former.restored or name in former.forbidden]


class AbsenceCheck(NamedTuple):
    """A key whose absence is to be proven by reading it."""

    service: str
    key: bytes
    held: bool
    """Its bucket had entries, which go on answering while this cannot be proven."""


class SnapshotBuilder:
    """A snapshot in the making: entries come in as Consul lists them, in ascending order."""

    def __init__(
        self,
        table: Table,
        prefix: bytes,
        services: Iterable[str],
        former: Snapshot | None,
        forbidden: Mapping[str, SourceError],
    ) -> None:
        """``forbidden`` are those services whose folder could not be read when it was tried, before Consul was asked.

        Before, not after: a blocking query goes by the ACLs of its beginning, which may have changed when it ends.
        """
        self._former = former
        self._builders = [
            EntriesBuilder(table, SERVICES[name], None if former is None else former.entries[name]) for name in services
        ]
        self._prefix = prefix
        self._limit = table.max_keys
        self._count = 0
        self._hidden = dict(forbidden)

    def take(self, pairs: list[tuple[bytes, bytes | None]]) -> None:
        """Take some entries, with their full keys.

        Raises:
            TooManyKeys: there are more than the table's ``max_keys``.
        """
        if not pairs:
            return
        self._count += len(pairs)
        if self._count > self._limit:
            raise TooManyKeys(f"{printable(self._prefix)} holds more than max_keys = {self._limit} keys")
        first, last = pairs[0][0], pairs[-1][0]
        for builder in self._builders:
            path = builder.path
            start = len(path)
            if first.startswith(path) and last.startswith(path):
                builder.take([(key[start:], value) for key, value in pairs])
            elif first < path + b"\xff" and last >= path:
                builder.take([(key[start:], value) for key, value in pairs if key.startswith(path)])

    def absence_checks(self, is_url_safe: Callable[[bytes], bool], *, filtered: bool) -> Iterator[AbsenceCheck]:
        """The keys to read before the absence of others is believed; ``filtered``: Consul says that it hides some.

        ACLs make a list look shorter, or empty, without an error; only the read of one key says 403.
        """
        former = self._former
        for builder in self._builders:
            name = builder.service.name
            lost = (builder.path + key for key in builder.missing_keys())
            asked = [key for key, _ in zip(filter(is_url_safe, lost), range(PROOFS if filtered else 1), strict=False)]
            for key in asked:
                yield AbsenceCheck(name, key, held=True)
            if asked or name in self._hidden or PROBE in builder.values:
                continue
            held = former is not None and name not in former.forbidden and len(former.entries[name]) > 0
            if filtered or (held and not builder.values and not builder.errors):
                yield AbsenceCheck(name, builder.path + PROBE, held)

    def mark_forbidden(self, service: str, error: SourceError) -> None:
        """Note that the bucket of this service could not be read: what is not in it may be there all the same."""
        self._hidden[service] = error

    def finish(self, *, restored: bool = False) -> Snapshot:
        """The snapshot; the former one itself if nothing has changed."""
        buckets = {builder.service.name: builder.finish() for builder in self._builders}
        former = self._former
        if (
            former is not None
            and not former.restored
            and former.forbidden.keys() == self._hidden.keys()
            and all(bucket is former.entries[name] for name, bucket in buckets.items())
        ):
            return former
        return Snapshot(buckets, self._hidden, restored)


class Mirror:
    """The latest snapshot and when Consul last confirmed it. Readers take one reference; a swap is one assignment."""

    def __init__(self, max_age: float) -> None:
        self.max_age = max_age
        self.state: tuple[Snapshot, float] | None = None
        self.last_error: SourceError = Unreachable("nothing has been read from Consul yet")

    def confirm(self, snapshot: Snapshot, now: float) -> None:
        """From now on answer from this snapshot, true at this moment."""
        self.state = (snapshot, now)

    def retire(self) -> None:
        """Have whoever goes by the identity of the state look again: another source answers from now on."""
        if self.state is not None:
            snapshot, confirmed = self.state
            self.state = (snapshot, confirmed)

    def entries(self, service: str, key: bytes | None, now: float) -> Entries:
        """The bucket of this service, which is true of this key (None: of all there are).

        Raises:
            SourceError: nothing has been read yet, it is too old to be believed, or it may not be read.
        """
        state = self.state
        if state is None:
            raise self.last_error.with_traceback(None)  # else it grows with each raise, as does the one below
        snapshot, confirmed = state
        if now - confirmed > self.max_age:
            raise Unreachable(f"no data from Consul for {now - confirmed:.0f} s; last error: {self.last_error}")
        if service in snapshot.forbidden and (key is None or not snapshot.entries[service].has_own_entry(key)):
            raise snapshot.forbidden[service].with_traceback(None)
        return snapshot.entries[service]
