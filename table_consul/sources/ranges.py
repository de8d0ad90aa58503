"""The ranges of a large table, watched in parallel: an edit brings the entries of a part of one range.

Ranges are a fast path for the usual case. Anything else (a key in no range, a lower index, a hidden key, many missing
keys, any error) ends them, and the whole table is read again by the rules for one prefix.
"""

from __future__ import annotations

import math
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from msgspec.structs import replace

from table_consul import kv
from table_consul.services import SERVICES, Table
from table_consul.services.parts import REPLACEMENT
from table_consul.sources import mirror
from table_consul.sources.cut import RANGE_KEYS, Cut, Range, covers, gap
from table_consul.sources.mirror import Snapshot, SnapshotBuilder
from table_consul.sources.queries import Queries, Query
from table_consul.sources.reading import proven_snapshot, read_changes
from table_consul.transport import WaitCut

# How long a range may take to show a change that the completeness query has shown. After that the change is in no
# range, or the response of its range is slow.
LATE_SECONDS = 0.5
# After several changes, as in a transaction, the completeness query shows only the last: another may be in no range.
# Therefore all names are listed, soon after several changes and later after one, for at most a hundredth of the time.
LIST_SECONDS = 10.0
LIST_SOON_SECONDS = 1.0
LIST_SHARE = 0.01
# Each range of the rest is read whenever something changes.
MOST_REST = 64
# Consul scans all keys when the completeness query begins and when it ends, in some 0.2 ms for 1,000.
PAUSE_SECONDS_PER_KEY = 2e-6
# If a range misses so many keys, and this share of them, the whole table decides whether the deletion is held.
LEAST_LOSS = 20
LEAST_LOSS_SHARE = 0.1


class Unsettled(Exception):
    """The whole table must be read."""


class Ranges:
    """Watches the ranges of one prefix until something ends them."""

    def __init__(
        self,
        table: Table,
        prefix: bytes,
        services: Sequence[str],
        ranges: Cut,
        client: kv.Client,
        queries: Queries,
        snapshot: Snapshot,
        index: int,
    ) -> None:
        """``snapshot`` is the whole table at this index."""
        self.snapshot = snapshot
        self.index = index
        """The highest index of any range: changes up to it are known."""
        self.load_seconds = 0.0
        """From the first byte of the latest change until it was in the snapshot."""
        self.until = math.inf
        """When `run` returns."""
        self._table = table
        self._prefix = prefix
        self._services = services
        self._counts = {leaf.prefix: leaf.size for each in (*ranges.watched, *ranges.rest) for leaf in each.leaves()}
        """By prefix of a range without parts."""
        self._most = {key: 2 * max(count, RANGE_KEYS) for key, count in self._counts.items()}
        paths = {table.path(SERVICES[name]) for name in services}
        self._empty = {path for path in paths if not any(key.startswith(path) for key in self._counts)}
        self._client = client
        self._queries = queries
        self._answers = queries.answers
        # Listing the folder of one service returns all its keys; listing its own name, without the slash, returns one.
        whole = prefix.removesuffix(b"/") if prefix in paths else prefix
        self._whole = queries.watch(whole, index)
        self._ranges = {queries.watch(each.prefix, index): each for each in ranges.watched}
        self._watched = [self._whole, *self._ranges]
        self._rest = [*ranges.rest]
        self._since = index
        self._seen: dict[bytes, int] = {}
        """The latest index of each range that was read since; of all others at most `_since`."""
        self._whole_index = index
        """The latest index of the completeness query."""
        self._explained = {index}
        """Indexes that ranges have shown since: their own and those of changed entries."""
        self._reads: list[tuple[int, int, bool]] = []
        """Of each range that has changed: its index at the former read and at this one, and whether a key was deleted.
        Consul shows only the latest change of a key, and the latest deletion."""
        self._unexplained: dict[int, float] = {}
        """Indexes that the completeness query showed and no range has shown, and since when."""
        self._list_at: float | None = None
        """When to list all names after a change; None if nothing has changed."""
        self._list_after = 0.0
        self._began = 0.0
        """When the latest response began, or the latest list of names."""
        self._publish: Callable[[float | None], None]

    def interrupt(self) -> None:
        """Make `run` return soon; any thread may call this."""
        self._answers.put(None)

    def run(self, publish: Callable[[float | None], None]) -> None:
        """Keep `snapshot` up to date until `interrupt`, or until `until`.

        ``publish`` gets None when it has changed, or else the time up to which Consul has confirmed all of it.

        Raises:
            Unsettled: the whole table must be read.
            SourceError: Consul cannot be read, or refuses one of the queries.
        """
        self._publish = publish
        while (now := time.monotonic()) < self.until:
            for each in self._watched:
                if each.due is not None and each.due <= now:
                    self._ask(each)
            # Answers explain changes for less, but when a table is written all the time there is always one.
            overdue = min(self._unexplained.values(), default=now) < now - self._table.deadline
            if overdue or self._answers.empty():
                late = [index for index, since in self._unexplained.items() if self._late_at(since) <= now]
                if late and self._whole.prefix != self._prefix:
                    late = self._below(late)
                    self._confirm()
                if late or (self._list_at is not None and self._list_at <= now):
                    self._list_names()
                    self._settle(late)
                    self._confirm()
            late_at = map(self._late_at, self._unexplained.values())
            moments = [self.until, self._list_at, *late_at, *(each.due for each in self._watched)]
            first = min((each for each in moments if each is not None), default=math.inf)
            try:
                answer = self._answers.get(timeout=min(max(0.0, first - time.monotonic()), threading.TIMEOUT_MAX))
            except queue.Empty:
                continue
            if answer is None:
                return
            self._take(*answer)

    def _ask(self, query: Query) -> None:
        """Query entries, or keys where only the index of the response is used."""
        whole = query is self._whole
        keys = whole or self._ranges[query].parts != ()
        query.ask(self._table, self._queries.most_wait, keys=keys, separator="/" if whole else None)

    def _take(self, query: Query, answer: kv.Response | Exception) -> None:
        query.due = 0.0  # also if this response ends the ranges: the next ones use the query again
        if query.outdated or query not in self._watched:
            if isinstance(answer, kv.Response):
                if answer.index <= query.asked_index and time.monotonic() - query.asked < query.wait:
                    query.state = replace(query.state, index=0)  # a restored snapshot may have ended the wait
                answer.close()
            query.outdated = False
            if query not in self._watched:
                self._queries.end(query)
        elif isinstance(answer, WaitCut):
            query.state = mirror.after_cut(query.state, answer.seconds)
            query.first |= query is self._whole  # the server may have ended, and with it all queries
        elif isinstance(answer, Exception):
            raise answer
        else:
            self._began = time.monotonic()
            self._process(query, answer)
            if query is self._whole:
                self._confirm()

    def _confirm(self) -> None:
        """Publish the snapshot as confirmed up to the oldest change that no range has shown.

        If a key is rewritten again and again, there is always one: ranges show only the latest of its changes.
        """
        self._publish(min(self._unexplained.values(), default=time.monotonic()))

    def _process(self, query: Query, response: kv.Response) -> None:
        """Read a response if it brings anything new."""
        state = query.state
        with response:
            timed_out = state.index > 0 and self._began - query.asked >= query.wait
            if query.first and timed_out and query is not self._whole and response.index < state.index:
                state = replace(state, index=response.index, seen=response.index)
            query.first = False
            self._check(response, state.index)
            if early := mirror.ended_early(state, response.index, timed_out=timed_out):
                waited = self._began - query.asked
                query.state, _ = mirror.next_query(
                    state, response.index, changed=False, timed_out=False, load_seconds=0.0, waited=waited
                )
            if early or not state.index:
                # A snapshot may have entries with lower indexes anywhere.
                raise Unsettled("Consul stopped, or a snapshot was restored")
            changed = response.index != state.seen
            if changed and query is self._whole:
                self._find_new_folders(response)
            elif changed and not self._ranges[query].parts:
                self._read(query.prefix, response, query.client, state.seen)
        if changed and query is self._whole:
            self._whole_index = response.index
            self._explained = {each for each in self._explained if each >= self._whole_index}
            oldest = min(self._unexplained, default=self._whole_index)
            self._reads = [each for each in self._reads if each[1] >= oldest]
            self._read_changed(self._rest)
            if not self._is_explained(self._whole_index):
                self._unexplained[self._whole_index] = time.monotonic()
        elif changed and (parts := self._ranges[query].parts):
            found = self._read_changed(parts)
            if not found and not self._is_explained(response.index):
                self._find_new_keys(query.prefix)
        if changed:
            self._seen[query.prefix] = response.index
        ended, query.answered = time.monotonic(), query.asked
        query.state, pause = mirror.next_query(
            state, response.index, changed=changed, timed_out=timed_out, load_seconds=ended - self._began
        )
        if changed and query is self._whole:
            pause = max(pause, sum(self._counts.values()) * PAUSE_SECONDS_PER_KEY)
        query.due = ended + pause * (0.5 + random.random())  # noqa: S311 - jitter, not a secret

    def _late_at(self, since: float) -> float:
        """When a change shown at ``since`` is in no range, if none shows it by then: all have answered, or hang."""
        asked = [each for each in self._ranges if each.answered < since]
        return max(
            (max(since, each.asked) + LATE_SECONDS if each.due is None else math.inf for each in asked), default=since
        )

    def _is_explained(self, index: int) -> bool:
        return index in self._explained or any(since < index <= until for since, until, lost in self._reads if lost)

    def _check(self, response: kv.Response, index: int) -> None:
        if response.filtered:
            raise Unsettled("a response is filtered")
        if response.index < index:
            raise Unsettled("an index went backwards")

    def _find_new_folders(self, response: kv.Response) -> None:
        """Add folders that had no key and may have one now."""
        if self._empty and self._whole.prefix == self._prefix:
            found = {name.encode() for names in response.names() for name in names}
            for path in found & self._empty:
                self._empty.remove(path)
                self._add_rest(path)

    def _read_changed(self, ranges: Iterable[Range]) -> bool:
        """Read the ranges whose index has moved; whether there are any."""
        changed = False
        for each in ranges:
            known = self._seen.get(each.prefix, self._since)
            with self._client.all_names(each.prefix, timeout=self._table.deadline) as response:
                self._check(response, 0)
            self._seen[each.prefix] = response.index
            if response.index == known or response.index < known == self._since:
                continue
            if each.parts:
                changed |= self._read_changed(each.parts)
            elif not response.absent or self._counts[each.prefix]:
                changed = True
                index = response.index
                with self._client.blocking_query(each.prefix, timeout=self._table.deadline) as response:
                    self._check(response, index)
                    self._read(each.prefix, response, self._client, known)
                self._seen[each.prefix] = response.index
        return changed

    def _read(self, prefix: bytes, response: kv.Response, client: kv.Client, since: int) -> None:
        """Replace the entries below the prefix, which were last read at index ``since``."""
        before = self._counts[prefix]
        if response.absent:
            if before:
                raise Unsettled("a range is empty")
            return  # the index is that of another folder
        elsewhere = sum(self._counts.values()) - before
        builder = SnapshotBuilder(self._table, prefix, self._services, self.snapshot, elsewhere=elsewhere)
        changes = read_changes(response, builder, since)
        missing = builder.missing_keys().values()
        lost = sum(map(len, missing))
        if lost >= LEAST_LOSS and lost > before * LEAST_LOSS_SHARE:
            raise Unsettled("many keys are missing")
        if builder.count > self._most[prefix]:
            raise Unsettled("a range has grown too large")
        renamed = any(stored != folded for keys in missing for folded, stored in keys.items())
        if not builder.conclusive or renamed:  # the lower-case key may be in another range
            raise Unsettled("keys differ only in case")
        snapshot = proven_snapshot(client, response, builder, {}, {})
        if snapshot.hidden:
            raise Unsettled("keys may be hidden")
        former, self.snapshot, self._counts[prefix] = self.snapshot, snapshot, builder.count
        self.index = max(self.index, response.index)
        several = len(changes) + lost > 1 or any(each > self._whole_index for each in self._explained)
        self._explained |= {response.index, *changes}
        self._reads.append((since, response.index, lost > 0))
        self._unexplained = {each: at for each, at in self._unexplained.items() if not self._is_explained(each)}
        pause = (LIST_SOON_SECONDS if several else LIST_SECONDS) * (1 + random.random())  # noqa: S311 - jitter
        at = max(time.monotonic() + pause, self._list_after)
        self._list_at = at if self._list_at is None else min(at, self._list_at)
        if snapshot is not former:
            self.load_seconds = time.monotonic() - self._began
            self._publish(None)

    def _below(self, late: Iterable[int]) -> list[int]:
        """Those of these changes that are below the prefix; the name without the slash begins other names, too."""
        with self._client.all_names(self._prefix, timeout=self._table.deadline) as response:
            self._check(response, 0)
        self._unexplained = {each: since for each, since in self._unexplained.items() if each <= response.index}
        return [each for each in late if each in self._unexplained]

    def _settle(self, late: Iterable[int]) -> None:
        """Account for changes that no range has shown although, since the latest list of names, every key is in one.

        Raises:
            Unsettled: the change was elsewhere, or a query hangs.
        """
        for query, each in self._ranges.items() if self._unexplained.keys() & late else ():
            if query.due is None and self._read_changed([each]):
                query.overtaken = min(query.overtaken, time.monotonic())
                if time.monotonic() - query.overtaken > self._table.deadline:
                    self._queries.end(query)
                    raise Unsettled("a query hangs")
        for index in self._unexplained.keys() & late:  # unless a later change of the same key has replaced it
            if not any(since < index <= until for since, until, _ in self._reads):
                raise Unsettled("a change is in no range")
            del self._unexplained[index]

    def _list_names(self) -> None:
        """Find keys anywhere that are in no range, and read them."""
        self._began = time.monotonic()
        self._list_at = None  # what is read below may need another list
        self._find_new_keys(self._prefix)
        now = time.monotonic()
        self._list_after = now + (now - self._began) / LIST_SHARE

    def _find_new_keys(self, below: bytes) -> None:
        """Find keys below this prefix that are in no range, and read them."""
        prefixes = sorted(self._counts)
        folders = tuple(self._table.path(SERVICES[name]) for name in self._services)
        uncovered: list[bytes] = []
        with self._client.all_names(below, timeout=self._table.deadline) as response:
            self._check(response, 0)
            for names in response.names():
                keys = [name.encode() for name in names]
                if not covers(prefixes, keys):
                    entries = (key for key in keys if key.startswith(folders) and not key.endswith(b"/"))
                    uncovered += [key for key in entries if not covers(prefixes, [key])]
        for key in uncovered:
            if not covers(sorted(self._counts), [key]):
                prefix = gap(key, max((each for each in folders if key.startswith(each)), key=len), self._counts)
                if prefix is None or not can_be_listed(prefix) or len(self._rest) >= MOST_REST:
                    raise Unsettled("a key is in no range")
                self._read_changed([self._add_rest(prefix)])

    def _add_rest(self, prefix: bytes) -> Range:
        self._rest.append(Range(prefix, 0))
        self._seen[prefix], self._counts[prefix], self._most[prefix] = 0, 0, 2 * RANGE_KEYS
        return self._rest[-1]


def can_be_listed(prefix: bytes) -> bool:
    """Whether every version of Consul lists the keys below this prefix, which are not UTF-8 if it has U+FFFD."""
    return REPLACEMENT not in prefix and not kv.modern_name_problem(prefix.removesuffix(b"/"))
