"""The threads that keep mirrors true: each asks Consul one blocking query after another, for as long as smtpd lives.

The rules are in mirror.py; this is the only place that waits.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable

from table_consul import kv
from table_consul.errors import BadResponse, Forbidden, SourceError, shown
from table_consul.file import Writer, read_kept
from table_consul.mirror import Doubt, Loading, Mirror, Snapshot, TooManyKeys, Turn, WatchState, advance, wait_seconds
from table_consul.outage import Outage
from table_consul.services import SERVICES, Bucket, Service, Table

log = logging.getLogger("table_consul")

# A file of 100,000 entries is not written for each of a hundred edits.
WRITE_SECONDS = 10.0
# How often a table that was too large is tried again; an update tries at once.
TOO_LARGE_SECONDS = 600.0


class Watch(threading.Thread):
    """Keeps the mirror of one prefix of one table."""

    def __init__(
        self, table: Table, prefix: bytes, services: Iterable[str], keep: str | None, client: kv.Client
    ) -> None:
        """``keep`` is the file that holds the last snapshot for a start without Consul."""
        super().__init__(name=f"watch {shown(prefix)}", daemon=True)
        self.mirror = Mirror(table.max_age)
        self.too_large = False
        self.reloads = 0
        self.index = 0
        self.took = 0.0
        self.outage = Outage(
            f"{shown(prefix)} from Consul", "answering from the last good copy, if there is one, else error"
        )
        self._table = table
        self._prefix = prefix
        self._services = tuple(services)
        self._keep = keep
        self._kept_at = -WRITE_SECONDS
        self._unkept = keep is not None
        self._client = client
        self._attempted = threading.Event()
        self._first_by = time.monotonic() + table.deadline
        self._wake = threading.Event()
        self._stopped = False
        self._state = WatchState()

    def settled(self, deadline: float) -> None:
        """Return once the first attempt to read Consul has ended, well or not, or when it has taken too long.

        A first answer that does not come costs one deadline, not one for each question.
        """
        if not self._attempted.is_set():
            self._attempted.wait(max(0.0, min(deadline, self._first_by) - time.monotonic()))

    def wake(self) -> None:
        """Have another try at once, whatever pause was due."""
        self._wake.set()

    def stop(self) -> None:
        """End the thread when its query ends; nobody waits for that."""
        self._stopped = True
        self._wake.set()

    def run(self) -> None:
        self._restore()
        while not self._stopped:
            pause = self._attempt()
            self._attempted.set()
            self._wake.wait(pause)
            self._wake.clear()
        self._client.close()

    def _attempt(self) -> float:
        """Ask Consul once; the seconds to pause afterwards."""
        try:
            pause = self._turn()
        except TooManyKeys as error:
            if not self.too_large:
                log.warning("%s: every answer reads Consul from now on (mode direct)", error)
            self.too_large = True
            return TOO_LARGE_SECONDS
        except SourceError as error:
            return self._failed(error)
        except Exception as error:
            log.exception("internal error; please report it")
            return self._failed(SourceError(f"internal error ({type(error).__name__})"))
        self.too_large = False
        self.outage.worked(time.monotonic())
        return pause

    def _failed(self, error: SourceError) -> float:
        self.mirror.last_error = error
        self._state = WatchState()
        return self.outage.failed(error, time.monotonic(), random.random())  # noqa: S311 - jitter, no secret

    def _turn(self) -> float:
        former = self.mirror.state[0] if self.mirror.state is not None else None
        wait = wait_seconds(0 if former is None else former.size, self._table.max_age)
        # The same index means the same contents, which need no reading unless they are still to be written to disk.
        known = 0 if former is None or self._unkept else self._state.index
        reading = _Reading(known, lambda: Loading(self._table, self._prefix, self._services, former), self._writer)
        started = time.monotonic()
        try:
            page = self._client.watch(
                self._prefix,
                reading.begin,
                index=self._state.index,
                wait=wait,
                timeout=self._table.deadline,
            )
            if reading.loading is not None:
                for doubt in reading.loading.doubts(kv.addressable, filtered=page.filtered):
                    self._prove(reading.loading, doubt)
        except BaseException:
            reading.abandon()
            raise
        ended = time.monotonic()
        snapshot = former if reading.loading is None else reading.loading.finish()
        assert snapshot is not None
        self.mirror.confirm(snapshot, ended)
        self._report(former, snapshot)
        self._finish_keeping(reading, changed=snapshot is not former)
        self.index = page.index
        self.took = ended - reading.began
        self._state, pause = advance(
            self._state,
            Turn(
                index=page.index,
                changed=snapshot is not former,
                waited_out=self._state.index > 0 and ended - started >= wait,
                took=self.took,
            ),
        )
        return pause

    def _prove(self, loading: Loading, doubt: Doubt) -> None:
        """Read one key that Consul no longer lists, or a folder that it lists nothing of."""
        try:
            pair = self._client.get(doubt.key, timeout=self._table.deadline)
        except Forbidden as error:
            if doubt.held:
                raise Forbidden(f"{shown(doubt.key)} is no longer listed, and may not be read: {error}") from None
            loading.hide(doubt.service, Forbidden(f"{shown(doubt.key[:-1])} looks empty, and may not be read: {error}"))
            log.debug("%s", error)
            return
        if pair is not None and doubt.held:
            raise BadResponse(f"{shown(doubt.key)} is there, but Consul does not list it")

    def _report(self, former: Snapshot | None, snapshot: Snapshot) -> None:
        if snapshot is former:
            return
        self.reloads += 1
        if former is None:
            log.info("%s: %d entries from Consul at %s", shown(self._prefix), snapshot.size, self._client.address)
        for name, bucket in snapshot.buckets.items():
            told = set() if former is None else set(former.buckets[name].problems)
            for problem in bucket.problems:
                if problem not in told:
                    log.warning("%s", problem)

    # ---- the copy on disk ----

    def _writer(self) -> Writer | None:
        if self._keep is None or time.monotonic() - self._kept_at < WRITE_SECONDS:
            return None
        try:
            return Writer(self._keep)
        except OSError as error:
            self._not_kept(error)
            return None

    def _finish_keeping(self, reading: _Reading, *, changed: bool) -> None:
        self._unkept = self._keep is not None and (self._unkept or changed)
        if reading.writer is None:
            return
        if not self._unkept:
            reading.abandon()
            return
        try:
            reading.writer.finish()
        except OSError as error:
            self._not_kept(error)
        else:
            self._unkept = False
        self._kept_at = time.monotonic()

    def _not_kept(self, error: OSError) -> None:
        if self._kept_at < 0 or self._unkept:
            log.warning("%s: not written: %s", self._keep, error.strerror)
        self._kept_at = time.monotonic()

    def _restore(self) -> None:
        if self._keep is None:
            return
        try:
            pairs, written = read_kept(self._keep)
            loading = Loading(self._table, self._prefix, self._services, None)
            loading.take(pairs)
        except FileNotFoundError:
            return
        except SourceError as error:
            log.warning("%s", error)
            return
        age = max(0.0, time.time() - written)
        self.mirror.confirm(loading.finish(), time.monotonic() - age)
        log.info("%s: %d entries of %.0f s ago from %s", shown(self._prefix), len(pairs), age, self._keep)


class _Reading:
    """What one query brings, on its way into a snapshot and onto the disk."""

    def __init__(self, known: int, loading: Callable[[], Loading], writer: Callable[[], Writer | None]) -> None:
        self._known = known
        self._new_loading = loading
        self._new_writer = writer
        self.loading: Loading | None = None
        self.writer: Writer | None = None
        self.began = time.monotonic()

    def begin(self, index: int) -> kv.Take | None:
        """Start over: an answer begins to arrive. What is returned takes its entries."""
        self.abandon()
        self.began = time.monotonic()
        if index == self._known:
            return None
        self.loading = loading = self._new_loading()
        self.writer = self._new_writer()

        def take(pairs: list[tuple[bytes, bytes | None]]) -> None:
            loading.take(pairs)
            if self.writer is not None:
                try:
                    self.writer.take(pairs)
                except OSError:
                    self.abandon()

        return take

    def abandon(self) -> None:
        if self.writer is not None:
            self.writer.abandon()
            self.writer = None


class Mirrored:
    """A source: the mirrors of one table, one for its folder and one for each path that lies elsewhere."""

    def __init__(
        self, table: Table, client: Callable[[], kv.Client], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._watches: dict[str, Watch] = {}
        prefixes: dict[bytes, list[str]] = {}
        for name in table.services:
            path = table.path(SERVICES[name])
            prefixes.setdefault(table.root if path.startswith(table.root) else path, []).append(name)
        self.watches: list[Watch] = []
        for number, (prefix, names) in enumerate(prefixes.items()):
            keep = table.snapshot and (table.snapshot if number == 0 else f"{table.snapshot}.{number}")
            watch = Watch(table, prefix, names, keep, client())
            self.watches.append(watch)
            self._watches.update(dict.fromkeys(names, watch))
            watch.start()

    def too_large(self, service: Service) -> bool:
        """Whether the table has more keys than a mirror shall hold."""
        return self._watches[service.name].too_large

    def bucket(self, table: Table, service: Service, key: bytes | None, deadline: float) -> Bucket:  # noqa: ARG002
        """See responder.Source. From memory; waits only while nothing has been read at all."""
        watch = self._watches[service.name]
        watch.settled(deadline)
        return watch.mirror.bucket(service.name, self._clock())

    def update(self, deadline: float) -> None:  # noqa: ARG002
        """Have the watches try again at once, if any of them is pausing."""
        for watch in self.watches:
            watch.wake()

    def close(self) -> None:
        """Stop watching."""
        for watch in self.watches:
            watch.stop()
