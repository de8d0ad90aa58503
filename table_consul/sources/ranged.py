"""The ranges of a large table, watched at the same time: an edit brings the entries of one range instead of all.

Ranges are a faster way for what is usual. Whatever is not (a key where no range is, a lower index, a hidden key, many
keys lost, any error) ends them, and the whole table is read again, by the rules for one prefix.
"""

from __future__ import annotations

import math
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from msgspec.structs import replace

from table_consul import kv
from table_consul.errors import printable
from table_consul.services import SERVICES, Table
from table_consul.sources import mirror
from table_consul.sources.mirror import QueryState, Snapshot, SnapshotBuilder
from table_consul.sources.ranges import RANGE_KEYS, Cut, covers, gap
from table_consul.sources.reading import proven_snapshot, read_changes
from table_consul.transport import WaitCut

# How long a range may take to show a change that the completeness query has shown already; else it is in no range, or
# the query for its range hangs.
LATE_SECONDS = 0.5
# Of several changes, as in a transaction, the completeness query shows only the last: another may be where no range is.
# All names are listed, soon after several changes and a while after one, for at most a hundredth of the time.
LIST_SECONDS = 10.0
LIST_SOON_SECONDS = 1.0
LIST_SHARE = 0.01
# Each of the rest is asked for whenever something changes.
MOST_REST = 64
# The completeness query makes Consul pass over all keys when it begins and when it ends, in some 0.2 ms for 1,000.
PAUSE_SECONDS_PER_KEY = 2e-6
# Of a new process, which may be ended as soon as it began.
LEAST_WAIT_SECONDS = 1.0
# `queue.get` takes no infinite timeout.
STEP_SECONDS = 3600.0
# Where a range has lost so many keys, and this share of them, whether the folder is held is for the whole to say.
LEAST_LOSS = 20
LEAST_LOSS_SHARE = 0.1


Answer = tuple["Query", "kv.Response | Exception"]


class Publish(Protocol):
    def __call__(self, *, confirmed: bool) -> None: ...


class Unsettled(Exception):
    """Something that only a look at the whole table can settle."""


class Query(threading.Thread):
    """A blocking query on a connection of its own: it waits where the watch cannot, and hands over the answers."""

    def __init__(self, prefix: bytes, client: kv.Client, answers: queue.SimpleQueue[Answer | None]) -> None:
        super().__init__(name=f"query {printable(prefix)}", daemon=True)
        self.prefix = prefix
        self.client = client
        client.transport.narrow = True
        self.state = QueryState()
        self.due: float | None = 0.0
        """When to ask; None while it waits for an answer."""
        self.asked = self.wait = 0.0
        self.outdated = False
        """It waits for an answer that proves nothing any more."""
        self.reload = False
        """Token and TLS files are to be read before it asks again."""
        self.first = True
        """The index that it waits on is the whole table's, and may be above its own."""
        self._answers = answers
        self._questions: queue.SimpleQueue[Callable[[], kv.Response] | None] = queue.SimpleQueue()
        self.start()

    def ask(self, table: Table, most_wait: float, **options: bool) -> None:
        """Ask what comes after the index that is known."""
        self.due, self.asked = None, time.monotonic()
        # While this one does not wait the others do: a snapshot that is restored then ends theirs.
        state = replace(self.state, gap=False)
        self.wait = min(mirror.wait_seconds(state, table.max_age, hidden=False), most_wait)
        ask, index = self.client.blocking_query, self.state.index
        self._questions.put(partial(ask, self.prefix, index=index, wait=self.wait, timeout=table.deadline, **options))

    def run(self) -> None:
        answer: kv.Response | Exception | None = None
        while (question := self._questions.get()) is not None:
            try:
                if self.reload:
                    self.reload = False
                    self.client.reload()
                answer = question()
            except Exception as error:  # noqa: BLE001 - the watch raises it
                answer = error
            self._answers.put((self, answer))
        if isinstance(answer, kv.Response):
            answer.close()
        self.client.close()

    def stop(self) -> None:
        """End the thread soon, without waiting for it."""
        self._questions.put(None)
        self.client.interrupt()


class Queries:
    """The queries of one watch, which outlive its ranges.

    Consul (1.8 to 1.22) does not notice that a client closes a connection on which a query waits: until the wait ends
    it counts among those that it grants an address.
    """

    def __init__(self, connect: Callable[[], kv.Client]) -> None:
        self.answers: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self._connect = connect
        self._by_prefix: dict[bytes, Query] = {}
        self._since = time.monotonic()

    def watch(self, prefix: bytes, index: int) -> Query:
        """The query for this prefix, a new one if there is none, for what comes after the index."""
        query = self._by_prefix.get(prefix)
        if query is not None and query.due is None and query.state.index > index:
            self.end(query)  # it would wait for an index that may be long in coming
            query = None
        if query is None:
            query = self._by_prefix[prefix] = Query(prefix, self._connect(), self.answers)
        query.outdated, query.first = query.due is None, True
        query.state = QueryState(index=index, seen=index, longest_wait=query.state.longest_wait)
        return query

    @property
    def most_wait(self) -> float:
        """In seconds: what a process that is started again and again leaves behind lives no longer than it did."""
        return max(LEAST_WAIT_SECONDS, time.monotonic() - self._since)

    def reload(self) -> None:
        """Have each query read token and TLS files before it asks again."""
        for query in self._by_prefix.values():
            query.reload = True

    def end(self, query: Query) -> None:
        """End this query."""
        query.stop()
        if self._by_prefix.get(query.prefix) is query:
            del self._by_prefix[query.prefix]

    def close(self) -> None:
        """End all."""
        for query in [*self._by_prefix.values()]:
            self.end(query)


class Ranges:
    """The ranges of one prefix, until something ends them."""

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
        """``snapshot`` is all there was at this index."""
        self.snapshot = snapshot
        self.index = index
        """The highest of any range: changes up to there are known."""
        self.load_seconds = 0.0
        """From the first byte of the latest change until it was in the snapshot."""
        self.until = math.inf
        """When `run` shall return."""
        self._table = table
        self._prefix = prefix
        self._services = services
        self._counts = {each.prefix: each.size for each in (*ranges.watched, *ranges.rest)}
        self._most = {key: 2 * max(count, RANGE_KEYS) for key, count in self._counts.items()}
        paths = {table.path(SERVICES[name]) for name in services}
        self._empty = {path for path in paths if not any(key.startswith(path) for key in self._counts)}
        self._client = client
        self._queries = queries
        self._answers = queries.answers
        # The names in the folder of one service are all its keys; its own name is shorter.
        whole = prefix.removesuffix(b"/") if prefix in paths else prefix
        self._whole = queries.watch(whole, index)
        self._watched = [self._whole, *(queries.watch(each.prefix, index) for each in ranges.watched)]
        self._rest = {each.prefix: index for each in ranges.rest}
        self._shown = index
        """The index that the completeness query showed."""
        self._explained = {index}
        """Those that ranges showed since, of their own and of the entries that changed."""
        self._deletions: list[tuple[int, int]] = []
        """The same: after the first and up to the second something was deleted; Consul shows the latest alone."""
        self._unexplained: dict[int, float] = {}
        """Those that the completeness query showed and no range has, and by when one must have."""
        self._list_at: float | None = None
        """When to list all names, as something has changed."""
        self._list_after = 0.0

    def interrupt(self) -> None:
        """Have `run` return soon; any thread may call this."""
        self._answers.put(None)

    def run(self, publish: Publish) -> None:
        """Keep `snapshot` true until `interrupt`, or until `until`.

        ``publish`` is called when it has changed, and when Consul has ``confirmed`` all of it.

        Raises:
            Unsettled: the whole table must be read.
            SourceError: Consul cannot be read, or refuses one of the queries.
        """
        while (now := time.monotonic()) < self.until:
            for each in self._watched:
                if each.due is not None and each.due <= now:
                    each.ask(self._table, self._queries.most_wait, folders_only=each is self._whole)
            if self._answers.empty():
                late = [index for index, by in self._unexplained.items() if by <= now]
                if late or (self._list_at is not None and self._list_at <= now):
                    self._list_names()
                    if not self._unexplained.keys().isdisjoint(late):
                        raise Unsettled("a change is in no range")
                    publish(confirmed=not self._unexplained)
            moments = [self.until, self._list_at, *self._unexplained.values(), *(each.due for each in self._watched)]
            first = min((each for each in moments if each is not None), default=math.inf)
            try:
                answer = self._answers.get(timeout=min(max(0.0, first - time.monotonic()), STEP_SECONDS))
            except queue.Empty:
                continue
            if answer is None:
                return
            self._take(*answer, publish)

    def _take(self, query: Query, answer: kv.Response | Exception, publish: Publish) -> None:
        if query.outdated or query not in self._watched:
            if isinstance(answer, kv.Response):
                answer.close()
            query.outdated, query.due = False, 0.0
            if query not in self._watched:
                self._queries.end(query)
        elif isinstance(answer, WaitCut):
            query.state, query.due = mirror.after_cut(query.state, answer.seconds), 0.0
        elif isinstance(answer, Exception):
            raise answer
        else:
            before, began = self.snapshot, time.monotonic()
            self._look(query, answer, began)
            ended = time.monotonic()
            if self.snapshot is not before:
                self.load_seconds = ended - began
                publish(confirmed=False)
            if query is self._whole and not self._unexplained:
                publish(confirmed=True)

    def _look(self, query: Query, response: kv.Response, began: float) -> None:
        """Read an answer if it brings anything new."""
        state = query.state
        with response:
            timed_out = state.index > 0 and began - query.asked >= query.wait
            if query.first and timed_out and response.index < state.index:
                state = replace(state, index=response.index, seen=response.index)
            query.first = False
            self._check(response, state.index)
            changed = response.index != state.seen
            if changed and query is self._whole:
                self._find_new_folders(response)
            elif changed:
                self._read(query.prefix, response, query.client, state.seen)
        if changed and query is self._whole:
            self._shown = response.index
            self._explained = {each for each in self._explained if each >= self._shown}
            self._deletions = [each for each in self._deletions if each[1] >= self._shown]
            for prefix in self._rest:
                self._read_rest(prefix)
            if not self._is_explained(self._shown):
                self._unexplained[self._shown] = time.monotonic() + LATE_SECONDS
        ended = time.monotonic()
        query.state, pause = mirror.next_query(
            state, response.index, changed=changed, timed_out=timed_out, load_seconds=ended - began
        )
        if changed and query is self._whole:
            pause = max(pause, sum(self._counts.values()) * PAUSE_SECONDS_PER_KEY)
        query.due = ended + pause * (0.5 + random.random())  # noqa: S311 - jitter, not a secret

    def _is_explained(self, index: int) -> bool:
        return index in self._explained or any(since < index <= until for since, until in self._deletions)

    def _check(self, response: kv.Response, index: int) -> None:
        if response.filtered or response.behind:
            raise Unsettled("a response is filtered or stale")
        if response.index < index:
            raise Unsettled("an index went backwards")

    def _find_new_folders(self, response: kv.Response) -> None:
        """Note folders that had no key, and may have one now."""
        if self._empty and self._whole.prefix == self._prefix:
            found = {name.encode() for names in response.names() for name in names}
            for path in found & self._empty:
                self._empty.remove(path)
                self._add_rest(path)

    def _read_rest(self, prefix: bytes) -> None:
        with self._client.blocking_query(prefix, timeout=self._table.deadline) as response:
            self._check(response, 0)
            if response.index != self._rest[prefix]:
                self._read(prefix, response, self._client, self._rest[prefix])
            self._rest[prefix] = response.index

    def _read(self, prefix: bytes, response: kv.Response, client: kv.Client, since: int) -> None:
        """Replace what lies below the prefix, and is known as of an index."""
        before = self._counts[prefix]
        if response.absent:
            if before:
                raise Unsettled("a range is empty")
            return  # the index is that of some other folder
        elsewhere = sum(self._counts.values()) - before
        builder = SnapshotBuilder(self._table, prefix, self._services, self.snapshot, elsewhere=elsewhere)
        changes = read_changes(response, builder, since)
        lost = sum(map(len, builder.missing_keys().values()))
        if lost >= LEAST_LOSS and lost > before * LEAST_LOSS_SHARE:
            raise Unsettled("many keys are missing")
        if builder.count > self._most[prefix]:
            raise Unsettled("a range has grown too large")
        if not builder.conclusive:
            raise Unsettled("keys differ only in case")
        snapshot = proven_snapshot(client, response, builder, {}, {})
        if snapshot.hidden:
            raise Unsettled("keys may be hidden")
        self.snapshot, self._counts[prefix] = snapshot, builder.count
        self.index = max(self.index, response.index)
        several = len(changes) + lost > 1 or any(each > self._shown for each in self._explained)
        self._explained |= {response.index, *changes}
        if lost:
            self._deletions.append((since, response.index))
        self._unexplained = {each: by for each, by in self._unexplained.items() if not self._is_explained(each)}
        pause = (LIST_SOON_SECONDS if several else LIST_SECONDS) * (1 + random.random())  # noqa: S311 - jitter
        at = max(time.monotonic() + pause, self._list_after)
        self._list_at = at if self._list_at is None else min(at, self._list_at)

    def _list_names(self) -> None:
        """Look for keys that are in no range, and read them."""
        began = time.monotonic()
        prefixes = sorted(self._counts)
        folders = tuple(self._table.path(SERVICES[name]) for name in self._services)
        uncovered: list[bytes] = []
        with self._client.all_names(self._prefix, timeout=self._table.deadline) as response:
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
                self._add_rest(prefix)
                self._read_rest(prefix)
        now = time.monotonic()
        self._list_at = None
        self._list_after = now + (now - began) / LIST_SHARE

    def _add_rest(self, prefix: bytes) -> None:
        self._rest[prefix], self._counts[prefix], self._most[prefix] = 0, 0, 2 * RANGE_KEYS


def can_be_listed(prefix: bytes) -> bool:
    """Whether every Consul lists what is below this prefix."""
    return not kv.modern_name_problem(prefix.removesuffix(b"/"))
