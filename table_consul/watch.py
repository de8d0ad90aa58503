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
from table_consul.mirror import (
    PROBE,
    Doubt,
    Loading,
    Mirror,
    Snapshot,
    TooManyKeys,
    Turn,
    WatchState,
    advance,
    unproven,
    wait_seconds,
)
from table_consul.outage import Outage
from table_consul.services import SERVICES, Bucket, Service, Table
from table_consul.shortcut import Known

log = logging.getLogger("table_consul")

# A file of 100,000 entries is not written for each of a hundred edits.
WRITE_SECONDS = 10.0
# How often a table that was too large is tried again; an update tries at once.
TOO_LARGE_SECONDS = 600.0


class Watch(threading.Thread):
    """Keeps the mirror of one prefix of one table."""

    def __init__(
        self, table: Table, prefix: bytes, services: Iterable[str], keep: str | None, connect: Callable[[], kv.Client]
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
        self.prefix = prefix
        self._services = tuple(services)
        self._keep = keep
        self._kept_at = -WRITE_SECONDS
        self._unkept = keep is not None
        self._keeping_fails = False
        self._connect = connect
        self._client = connect()
        self._renewed = False
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

    def renew(self) -> None:
        """Have another try at once, whatever pause was due, on a connection that reads token and TLS files anew."""
        self._renewed = True
        self._wake.set()

    def takes_over(self, former: Watch) -> bool:
        """Answer from what another watch of the same entries has, until this one has read them; whether they are."""
        if (self._table, self.prefix, self._services) != (former._table, former.prefix, former._services):
            return False
        if former.mirror.state is not None:
            snapshot, confirmed = former.mirror.state
            self.mirror.confirm(Snapshot(snapshot.buckets, snapshot.hidden, restored=True), confirmed)
        return True

    def stop(self) -> None:
        """End the thread when its query ends; nobody waits for that."""
        self._stopped = True
        self.mirror.retire()
        self._wake.set()

    def run(self) -> None:
        try:
            self._restore()
        except Exception:
            log.exception("internal error; please report it")
        while not self._stopped:
            pause = self._attempt()
            self._attempted.set()
            self._wake.wait(pause)
            self._wake.clear()
        self._client.close()

    def _attempt(self) -> float:
        """Ask Consul once; the seconds to pause afterwards."""
        try:
            if self._renewed:
                self._renewed = False
                self._client.close()
                self._client = self._connect()
            pause = self._turn()
        except TooManyKeys as error:
            self.outage.worked(time.monotonic())
            if not self.too_large:
                log.warning("%s: every answer reads Consul from now on (mode direct)", error)
            self.too_large = True
            self.mirror.retire()
            return TOO_LARGE_SECONDS
        except SourceError as error:
            return self._failed(error)
        except Exception as error:
            log.exception("internal error; please report it")
            return self._failed(SourceError(f"internal error ({type(error).__name__})"))
        if self.too_large:
            log.warning("%s: no longer too large, answering from memory again", shown(self.prefix))
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
        doubted = unproven(self._services, former)
        forbidden = {name: error for name in doubted if (error := self._refusal(name)) is not None}
        if len(forbidden) < len(doubted):
            self._state = WatchState()  # what may be read by now is to be seen now, and not when it changes
        # The same index means the same contents, which need no reading unless they are still to be written to disk.
        known = 0 if former is None or self._unkept else self._state.index
        reading = _Reading(
            known,
            lambda: Loading(self._table, self.prefix, self._services, former, forbidden),
            self._writer,
            self._not_kept,
        )
        started = time.monotonic()
        try:
            page = self._client.watch(
                self.prefix,
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
        if self._stopped:
            reading.abandon()  # another watch writes that file now
            return 0.0
        ended = time.monotonic()
        snapshot = former if reading.loading is None else reading.loading.finish()
        assert snapshot is not None
        self.mirror.confirm(snapshot, ended)
        self._report(former, snapshot)
        self._finish_keeping(reading, snapshot, changed=snapshot is not former)
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

    def _refusal(self, service: str) -> SourceError | None:
        """Why nothing can be told of this service's folder; None if it may be read."""
        path = self._table.path(SERVICES[service])
        try:
            self._client.get(path + PROBE, timeout=self._table.deadline)
        except Forbidden as error:
            return Forbidden(f"{shown(path)} may not be read: {error}")
        return None

    def _prove(self, loading: Loading, doubt: Doubt) -> None:
        """Read one key that Consul no longer lists, or that stands for a folder of which it may hide some."""
        try:
            pair = self._read(doubt)
        except Forbidden as error:
            if doubt.held:
                raise Forbidden(f"{shown(doubt.key)} is not listed, and may not be read: {error}") from None
            path = self._table.path(SERVICES[doubt.service])
            loading.hide(doubt.service, Forbidden(f"{shown(path)} may not be read: {error}"))
            return
        if pair is not None:
            raise BadResponse(f"{shown(doubt.key)} is there, but Consul does not list it")

    def _read(self, doubt: Doubt) -> kv.Pair | None:
        try:
            return self._client.get(doubt.key, timeout=self._table.deadline)
        except BadResponse:
            # Consul 1.21.5 refuses the names of most mail addresses (hashicorp/consul#22835), there or not.
            probe = self._table.path(SERVICES[doubt.service]) + PROBE
            if doubt.key == probe:
                raise
            self._client.get(probe, timeout=self._table.deadline)
            return None

    def _report(self, former: Snapshot | None, snapshot: Snapshot) -> None:
        if snapshot is former:
            return
        self.reloads += 1
        if former is None:
            log.info("%s: %d entries from Consul at %s", shown(self.prefix), snapshot.size, self._client.address)
        if snapshot.hidden.keys() != (set() if former is None else former.hidden.keys()):
            names = ", ".join(snapshot.hidden) or "nothing any more"
            log.warning("%s: Consul lets this token not read: %s; answering error there", shown(self.prefix), names)
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

    def _finish_keeping(self, reading: _Reading, snapshot: Snapshot, *, changed: bool) -> None:
        self._unkept = self._keep is not None and (self._unkept or changed)
        if reading.writer is None:
            return
        hidden = snapshot.hidden
        if not self._unkept or any(snapshot.buckets[name] for name in hidden):
            reading.abandon()  # of a bucket that is known in part the copy would be worse than an older one
            return
        try:
            # A folder marks a bucket as known wholly: without it an empty one proves nothing when this is read again.
            known = self._paths(name for name in self._services if name not in hidden)
            reading.writer.take([(path, b"") for path in known])
            reading.writer.finish()
        except OSError as error:
            reading.abandon()
            self._not_kept(error)
            return
        self._unkept = self._keeping_fails = False
        self._kept_at = time.monotonic()

    def _not_kept(self, error: OSError) -> None:
        if not self._keeping_fails:
            log.warning("%s: not written: %s", self._keep, error.strerror)
        self._keeping_fails = True
        self._kept_at = time.monotonic()

    def _paths(self, services: Iterable[str]) -> list[bytes]:
        return [self._table.path(SERVICES[name]) for name in services]

    def _restore(self) -> None:
        if self._keep is None or self.mirror.state is not None:
            return
        try:
            kept, written = read_kept(self._keep)
            marks = {key for key, _ in kept if key.endswith(b"/")}
            pairs = [pair for pair in kept if pair[0].startswith(self.prefix) and pair[0] not in marks]
            paths = dict(zip(self._services, self._paths(self._services), strict=True))
            missing = {
                name: SourceError(f"{shown(path)} is not in the copy {self._keep}")
                for name, path in paths.items()
                if path not in marks and not any(key.startswith(path) for key, _ in pairs)
            }
            loading = Loading(self._table, self.prefix, self._services, None, missing)
            loading.take(pairs)
        except FileNotFoundError:
            return
        except SourceError as error:
            log.warning("%s", error)
            return
        if len(missing) == len(paths):
            log.warning("%s: not used, as it holds nothing of %s", self._keep, shown(self.prefix))
            return
        age = max(0.0, time.time() - written)
        self.mirror.confirm(loading.finish(restored=True), time.monotonic() - age)
        log.info("%s: %d entries of %.0f s ago from %s", shown(self.prefix), len(pairs), age, self._keep)


class _Reading:
    """What one query brings, on its way into a snapshot and onto the disk."""

    def __init__(
        self,
        known: int,
        loading: Callable[[], Loading],
        writer: Callable[[], Writer | None],
        not_written: Callable[[OSError], None],
    ) -> None:
        self._known = known
        self._not_written = not_written
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
                except OSError as error:
                    self.abandon()
                    self._not_written(error)

        return take

    def abandon(self) -> None:
        if self.writer is not None:
            self.writer.abandon()
            self.writer = None


class Mirrored:
    """A source: the mirrors of one table, one for its folder and one for each path that lies elsewhere."""

    def __init__(
        self,
        table: Table,
        connect: Callable[[], kv.Client],
        former: Mirrored | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``former`` read the same table with other settings; its last good copy answers until there is a newer one."""
        self.table = table
        self._connect = connect
        self._clock = clock
        self._watches: dict[str, Watch] = {}
        prefixes: dict[bytes, list[str]] = {}
        for name in table.services:
            path = table.path(SERVICES[name])
            prefixes.setdefault(table.root if path.startswith(table.root) else path, []).append(name)
        self.watches: list[Watch] = []
        for number, (prefix, names) in enumerate(prefixes.items()):
            keep = table.snapshot and (table.snapshot if number == 0 else f"{table.snapshot}.{number}")
            watch = Watch(table, prefix, names, keep, connect)
            for other in former.watches if former is not None else ():
                watch.takes_over(other)
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
        return watch.mirror.bucket(service.name, key, self._clock())

    def known(self, service: str) -> Known | None:
        """The values of this service and how long they are good for; see shortcut.py."""
        mirror = self._watches[service].mirror
        state = mirror.state
        if state is None or self._watches[service].too_large:
            return None
        snapshot, confirmed = state
        if service in snapshot.hidden or snapshot.restored:
            return None
        return Known(mirror, state, snapshot.buckets[service].values, confirmed + mirror.max_age)

    def update(self, deadline: float) -> None:  # noqa: ARG002
        """Have the watches read token and TLS files anew and, if any of them is pausing, try again at once.

        Raises:
            SourceError: the token file cannot be used; the data at hand go on answering.
        """
        for watch in self.watches:
            watch.renew()
        client = self._connect()  # those of the watches are theirs
        try:
            client.reload_token()
        finally:
            client.close()

    def close(self) -> None:
        """Stop watching."""
        for watch in self.watches:
            watch.stop()
