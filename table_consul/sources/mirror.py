"""A table's entries in memory, and the pure functions that decide when and how to refresh them.

Independent of threads, HTTP and files; times are seconds on the caller's clock. The rules are those of Consul's
documentation (api-docs/features/blocking, "Implementation Details") and of consul-template's watch/view.go.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from msgspec.structs import replace

from table_consul.errors import SourceError, TooLarge, Unreachable, printable
from table_consul.services import SERVICES, Table
from table_consul.services.entries import Entries, EntriesBuilder
from table_consul.sources.hold import ACCEPTED, Held, Terms, next_held

# Between the ends of two queries, so that a burst of edits takes few reads. Half of the edits are seen sooner.
LEAST_PAUSE_SECONDS = 0.02
# For a query that keeps returning nothing new, as for an empty prefix when other keys change (consul #12363).
MOST_PAUSE_SECONDS = 0.5
# Consul's own default. A query without news proves that Consul is up, but makes it scan the prefix.
MOST_WAIT_SECONDS = 300.0
# While keys are hidden, because a change of ACLs changes no index and ends no query. Also for the first query after a
# response, because a snapshot that is restored before it may have a lower index, and does not end it either.
SHORT_WAIT_SECONDS = 10.0
# How fast the wait grows after one was cut: 1.1 probes a proxy's limit of 60 seconds about once in six minutes.
WAIT_GROWTH = 1.1
# How many missing keys to read; of more, a sample spread over the list shows whether they are deleted or hidden.
MAX_ABSENCE_CHECKS = 64


class QueryState(msgspec.Struct, frozen=True):
    """The state of a watch between its latest response and its next query."""

    index: int = 0
    """The index to wait on; at 0 Consul responds immediately."""
    seen: int = 0
    """The index of the data in memory; at 0 everything is read, whatever its index."""
    idle: int = 0
    """How many responses in a row have brought nothing new."""
    gap: bool = True
    """The next query does not immediately follow the latest response."""
    filtered: bool = False
    """Consul reported that an ACL hides keys."""
    longest_wait: float = MOST_WAIT_SECONDS
    """In seconds; lowered after a proxy or Consul has cut a wait."""


def next_query(
    state: QueryState, index: int, *, changed: bool, timed_out: bool, load_seconds: float, waited: float = 0.0
) -> tuple[QueryState, float]:
    """The next state of a watch after a response, and the seconds to pause before the next query.

    ``timed_out``: Consul held the query for the whole wait. ``load_seconds`` count from the first byte. The index to
    wait on restarts at 0 if the index goes backwards (a restored snapshot, a deleted newest key), because waiting for a
    number that the store has yet to reach hides every edit until then. It also restarts, and everything is read, if a
    wait `ended_early`; the next waits are shorter than the ``waited`` seconds, because an agent's max_query_time ends
    waits in the same way. Indexes are at least 1.
    """
    backwards = index < state.index
    early = ended_early(state, index, timed_out=timed_out)
    idle, pause, longest = 0, 0.0, state.longest_wait
    if early:
        longest = min(longest, max(waited / 2, SHORT_WAIT_SECONDS))
    if timed_out:
        longest = min(longest * WAIT_GROWTH, MOST_WAIT_SECONDS)
    elif state.index == 0:
        # An index that goes back and forth (stale servers in turn) is not a change, and must not cause a busy loop.
        idle = state.idle
    elif changed:
        pause = max(LEAST_PAUSE_SECONDS, load_seconds)
    else:
        idle = state.idle + 1
        pause = min(LEAST_PAUSE_SECONDS * 2.0 ** min(idle, 10), MOST_PAUSE_SECONDS)
    seen = 0 if backwards or early else max(index, 1)
    return replace(state, index=seen, seen=seen, idle=idle, gap=not timed_out, longest_wait=longest), pause


def ended_early(state: QueryState, index: int, *, timed_out: bool) -> bool:
    """Whether a wait ended early with the index that it waited on: Consul stopped, or a snapshot was restored.

    The response has the former contents. Those of the snapshot may have the same index, and keys that were deleted: the
    index falls when Consul forgets a deletion, after 15 minutes.
    """
    return index == state.index > 0 and not timed_out


def after_cut(state: QueryState, waited: float) -> QueryState:
    """The next state of a watch whose query was cut after so many seconds, by a proxy's or Consul's own timeout.

    Or its server ended, and a load balancer sends the next query to one with a lower index, which lets it wait.
    """
    return replace(state, gap=True, longest_wait=min(state.longest_wait, waited / 2))


def wait_seconds(state: QueryState, max_age: float, *, hidden: bool, held_for: float = math.inf) -> float:
    """How long Consul holds a query without news: well below ``max_age``, which counts from its end."""
    most = SHORT_WAIT_SECONDS if hidden or state.gap else MOST_WAIT_SECONDS
    return max(min(most, state.longest_wait, max_age / 3, held_for), LEAST_PAUSE_SECONDS)


class Hidden(msgspec.Struct, frozen=True):
    """Why the absence of a key from a folder proves nothing, and which keys were listed there before."""

    error: SourceError
    missing: Mapping[bytes, bytes]
    """Folded keys to stored ones: they were listed once, and their absence is not proven."""


class Unlisted(SourceError):
    """A key is not among those ``listed``, and may be in Consul as ``stored`` (None: for all keys)."""

    def __init__(self, error: SourceError, listed: Entries, stored: bytes | None) -> None:
        super().__init__(str(error))
        self.error = error
        self.listed = listed
        self.stored = stored


class Snapshot(msgspec.Struct, frozen=True):
    """The entries below one prefix at one moment, by service. Never changed."""

    entries: Mapping[str, Entries]
    hidden: Mapping[str, Hidden]
    """Services in whose folder the token may not read everything."""
    restored: bool = False
    """It comes from a file, or from a watch with other settings; Consul has not confirmed it to this watch."""
    held: Mapping[str, Held] = {}
    """By service the entries that are deleted in Consul and still served."""

    @property
    def size(self) -> int:
        """How many entries there are."""
        return sum(len(entries) for entries in self.entries.values())

    @property
    def held_until(self) -> float:
        """When the first hold ends; infinite if nothing is held."""
        return min((each.until for each in self.held.values()), default=math.inf)

    def accepted(self) -> Snapshot:
        """The same entries; the next read drops those that are held."""
        if not self.held:
            return self
        return replace(self, held={name: replace(each, until=ACCEPTED) for name, each in self.held.items()})


NOTHING_YET = Unreachable("no data received from Consul yet")


def adopted(former: Snapshot, table: Table, services: Iterable[str]) -> Snapshot | None:
    """The entries of a snapshot with other settings that are valid for these; None if there are none.

    For the other services it proves no absence.
    """
    entries = {name: Entries(table, SERVICES[name]) for name in services}
    hidden = dict.fromkeys(entries, Hidden(NOTHING_YET, {}))
    for name, old in former.entries.items():
        if name in entries and old.path == entries[name].path and old.table.same_entries(table):
            entries[name] = old
            del hidden[name]
    if len(hidden) == len(entries):
        return None
    still_hidden = {name: each for name, each in former.hidden.items() if name in entries and name not in hidden}
    held = {name: each for name, each in former.accepted().held.items() if name in entries and name not in hidden}
    return Snapshot(entries, {**hidden, **still_hidden}, restored=True, held=held)


def unverified_services(services: Iterable[str], former: Snapshot | None, *, filtered: bool) -> list[str]:
    """The services whose folder may be unreadable; all of them if Consul filters the list."""
    return [name for name in services if filtered or former is None or former.restored or name in former.hidden]


def sample(keys: Sequence[bytes]) -> Sequence[bytes]:
    """All of the keys; if there are more than `MAX_ABSENCE_CHECKS`, so many from all over the list."""
    most = MAX_ABSENCE_CHECKS
    return keys if len(keys) <= most else [keys[number * len(keys) // most] for number in range(most)]


class SnapshotBuilder:
    """Builds a snapshot: entries come in as Consul lists them, and replace those below the prefix."""

    def __init__(
        self,
        table: Table,
        prefix: bytes,
        services: Iterable[str],
        former: Snapshot | None,
        terms: Terms | None = None,
        *,
        elsewhere: int = 0,
    ) -> None:
        """Without ``terms`` no deletion is held. ``elsewhere``: how many keys are not below the prefix."""
        self.table = table
        self._former = former
        self._terms = terms
        self._builders = []
        for name in services:
            path = table.path(SERVICES[name])
            if path.startswith(prefix) or prefix.startswith(path):
                entries = None if former is None else former.entries[name]
                self._builders.append(EntriesBuilder(table, SERVICES[name], entries, prefix[len(path) :]))
        self._prefix = prefix
        self._elsewhere = elsewhere
        self._count = elsewhere

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

    @property
    def emptied(self) -> set[str]:
        """The services that had entries before, if there are none of any service now."""
        if self._former is None or self._count:
            return set()
        return {name for name, entries in self._former.entries.items() if entries}

    @property
    def count(self) -> int:
        """How many keys below the prefix were taken."""
        return self._count - self._elsewhere

    @property
    def conclusive(self) -> bool:
        """Whether the keys below the prefix are enough for a snapshot; if not, the whole table must be read."""
        return all(builder.conclusive for builder in self._builders)

    def missing_keys(self) -> dict[str, dict[bytes, bytes]]:
        """By service the keys that were listed before and are not now, from folded to stored, relative to the folder.

        Held keys are left out, because their absence is proven. ACLs shorten or empty a list without an error; only
        a read of one key returns 403.
        """
        former = self._former
        missing = {}
        for builder in self._builders:
            name = builder.service.name
            before = former.hidden[name].missing if former is not None and name in former.hidden else {}
            lost = {**{key: before[key] for key in before if not builder.has(key)}, **builder.missing_keys()}
            held = self._held(name)
            missing[name] = lost if held is None else {key: lost[key] for key in lost if key not in held.keys}
        return missing

    def _held(self, service: str) -> Held | None:
        """The hold of this service, unless it has expired."""
        held = None if self._former is None else self._former.held.get(service)
        return held if held is not None and self._terms is not None and held.until > self._terms.now else None

    def _hold(self, deleted: Mapping[str, Mapping[bytes, bytes]]) -> dict[str, Held]:
        """Keep deleted entries by the rule of `next_held`; returns the holds by service."""
        former, terms = self._former, self._terms
        if former is None or terms is None:
            return {}
        if former.restored and self.emptied:  # a file has no index to compare
            terms = terms._replace(other_store=True)
        held: dict[str, Held] = {}
        for builder in self._builders:
            name = builder.service.name
            former_hold, before = former.held.get(name, Held({}, ACCEPTED)), self._held(name)
            gone = {
                key: stored for key, stored in former_hold.keys.items() if before is not None and not builder.has(key)
            }
            gone |= {key: stored for key, stored in deleted.get(name, {}).items() if key not in former_hold.keys}
            count = len(former.entries[name]) - len(former_hold.keys)
            if (after := next_held(name, before, gone, count, terms)) is not None:
                builder.keep(after.keys)
                held[name] = after
        return held

    def finish(
        self,
        hidden: Mapping[str, Hidden],
        deleted: Mapping[str, Mapping[bytes, bytes]] | None = None,
        *,
        restored: bool = False,
    ) -> Snapshot:
        """The snapshot; the former one itself if nothing has changed.

        ``deleted`` are those of the missing keys whose absence is proven, which may be held.
        """
        held = self._hold(deleted or {})
        former = self._former
        entries = {} if former is None else {**former.entries}
        entries |= {builder.service.name: builder.finish() for builder in self._builders}
        built = (entries, _missing(hidden), False, held)
        if former is not None and (former.entries, _missing(former.hidden), former.restored, former.held) == built:
            return former
        return Snapshot(entries, hidden, restored, held)


def _missing(hidden: Mapping[str, Hidden]) -> Mapping[str, Mapping[bytes, bytes]]:
    return {name: each.missing for name, each in hidden.items()}


class Mirror:
    """The latest snapshot of one prefix, and when Consul last confirmed it.

    One thread writes, others read: one assignment replaces ``state`` by a new tuple of the snapshot and the time of its
    confirmation. It is None before the first load and while the table is too large.
    """

    def __init__(self, max_age: float) -> None:
        self.max_age = max_age
        self.state: tuple[Snapshot, float] | None = None
        self.last_error: SourceError = NOTHING_YET

    def entries(self, service: str, key: bytes | None, now: float) -> Entries:
        """The entries of this service, which prove absence for this key (None: for all keys).

        Raises:
            Unlisted: some entries are hidden, and none of the others matches.
            SourceError: there are none yet, or they are older than ``max_age``.
        """
        state = self.state
        if state is None:
            raise self.last_error.with_traceback(None)  # or its traceback grows; also below
        snapshot, confirmed = state
        if now - confirmed > self.max_age:
            raise Unreachable(f"no data from Consul for {now - confirmed:.0f} s; last error: {self.last_error}")
        entries, hidden = snapshot.entries[service], snapshot.hidden.get(service)
        if hidden is not None and not entries.has_answer(key):
            raise Unlisted(hidden.error, entries, None if key is None else hidden.missing.get(key, key))
        return entries
