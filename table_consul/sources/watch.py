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
from table_consul.backoff import Backoff
from table_consul.errors import BadResponse, Forbidden, SourceError, printable
from table_consul.services import SERVICES, Service, Table
from table_consul.services.entries import Entries
from table_consul.sources import PROBE
from table_consul.sources.export import AtomicWriter
from table_consul.sources.mirror import (
    AbsenceCheck,
    Mirror,
    QueryResult,
    QueryState,
    Snapshot,
    SnapshotBuilder,
    TooManyKeys,
    next_query,
    unverified_services,
    wait_seconds,
)
from table_consul.sources.snapshot import SnapshotFile

log = logging.getLogger("table_consul")

# How often a table that was too large is tried again; an update tries at once.
TOO_LARGE_SECONDS = 600.0


class Watch(threading.Thread):
    """Keeps the mirror of one prefix of one table."""

    def __init__(
        self, table: Table, prefix: bytes, services: Iterable[str], keep: str | None, connect: Callable[[], kv.Client]
    ) -> None:
        """``keep`` is the file that holds the last snapshot for a start without Consul."""
        super().__init__(name=f"watch {printable(prefix)}", daemon=True)
        self.mirror = Mirror(table.max_age)
        self.too_large = False
        self.reloads = 0
        self.index = 0
        self.took = 0.0
        self.outage = Backoff(
            f"{printable(prefix)} from Consul", "answering from the last good copy, if there is one, else error"
        )
        self._table = table
        self.prefix = prefix
        self._services = tuple(services)
        self._copy = None if keep is None else SnapshotFile(keep, table, prefix, self._services)
        self._connect = connect
        self._client = connect()
        self._renewed = False
        self._attempted = threading.Event()
        self._first_by = time.monotonic() + table.deadline
        self._wake = threading.Event()
        self._stopped = False
        self._state = QueryState()

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
        self.outage = former.outage  # so that its end is told, too
        if former.mirror.state is not None:
            snapshot, confirmed = former.mirror.state
            self.mirror.confirm(Snapshot(snapshot.entries, snapshot.forbidden, restored=True), confirmed)
        return True

    def stop(self) -> None:
        """End the thread when its query ends; nobody waits for that."""
        self._stopped = True
        self.mirror.retire()
        self._wake.set()

    def run(self) -> None:
        try:
            if self._copy is not None and self.mirror.state is None and (restored := self._copy.restored()) is not None:
                snapshot, age = restored
                self.mirror.confirm(snapshot, time.monotonic() - age)
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
            pause = self.turn()
        except TooManyKeys as error:
            self.outage.success(time.monotonic())
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
            log.warning("%s: no longer too large, answering from memory again", printable(self.prefix))
        self.too_large = False
        self.outage.success(time.monotonic())
        return pause

    def _failed(self, error: SourceError) -> float:
        self.mirror.last_error = error
        self._state = QueryState()
        return self.outage.failure(error, time.monotonic(), random.random())  # noqa: S311 - jitter, no secret

    def turn(self) -> float:
        """Ask Consul once and take over what it says; the seconds to pause afterwards.

        Raises:
            SourceError: Consul cannot tell, or what it says is not to be believed.
        """
        former = self.mirror.state[0] if self.mirror.state is not None else None
        wait = wait_seconds(0 if former is None else former.size, self._table.max_age)
        doubted = unverified_services(self._services, former)
        forbidden = {name: error for name in doubted if (error := self._refusal(name)) is not None}
        if len(forbidden) < len(doubted):
            self._state = QueryState()  # what may be read by now is to be seen now, and not when it changes
        # The same index means the same contents, which need no reading unless they are still to be written to disk.
        known = 0 if former is None or (self._copy is not None and self._copy.outdated) else self._state.index
        reading = _Reading(
            known,
            lambda: SnapshotBuilder(self._table, self.prefix, self._services, former, forbidden),
            self._copy,
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
                for doubt in reading.loading.absence_checks(kv.is_url_safe, filtered=page.filtered):
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
        self.index = page.index
        self.took = ended - reading.began
        self.mirror.confirm(snapshot, ended)
        self._report(former, snapshot)
        if self._copy is not None:
            self._copy.finish(reading.writer, snapshot, changed=snapshot is not former)
        self._state, pause = next_query(
            self._state,
            QueryResult(
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
            return Forbidden(f"{printable(path)} may not be read: {error}")
        return None

    def _prove(self, loading: SnapshotBuilder, doubt: AbsenceCheck) -> None:
        """Read one key that Consul no longer lists, or that stands for a folder of which it may hide some."""
        try:
            pair = self._read(doubt)
        except Forbidden as error:
            if doubt.held:
                raise Forbidden(f"{printable(doubt.key)} is not listed, and may not be read: {error}") from None
            path = self._table.path(SERVICES[doubt.service])
            loading.mark_forbidden(doubt.service, Forbidden(f"{printable(path)} may not be read: {error}"))
            return
        if pair is not None:
            raise BadResponse(f"{printable(doubt.key)} is there, but Consul does not list it")

    def _read(self, doubt: AbsenceCheck) -> kv.Pair | None:
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
            log.info("%s: %d entries from Consul at %s", printable(self.prefix), snapshot.size, self._client.address)
        if snapshot.forbidden.keys() != (set() if former is None else former.forbidden.keys()):
            names = ", ".join(snapshot.forbidden) or "nothing any more"
            log.warning("%s: Consul lets this token not read: %s; answering error there", printable(self.prefix), names)
        for name, bucket in snapshot.entries.items():
            told = set() if former is None else set(former.entries[name].problems)
            for problem in bucket.problems:
                if problem not in told:
                    log.warning("%s", problem)


class _Reading:
    """What one query brings, on its way into a snapshot and onto the disk."""

    def __init__(self, known: int, loading: Callable[[], SnapshotBuilder], copy: SnapshotFile | None) -> None:
        self._known = known
        self._new_loading = loading
        self._copy = copy
        self.loading: SnapshotBuilder | None = None
        self.writer: AtomicWriter | None = None
        self.began = time.monotonic()

    def begin(self, index: int) -> kv.Take | None:
        """Start over: an answer begins to arrive. What is returned takes its entries."""
        self.abandon()
        self.began = time.monotonic()
        if index == self._known:
            return None
        self.loading = loading = self._new_loading()
        copy = self._copy
        self.writer = None if copy is None else copy.writer()

        def take(pairs: list[tuple[bytes, bytes | None]]) -> None:
            loading.take(pairs)
            if self.writer is not None and copy is not None:
                try:
                    self.writer.take(pairs)
                except OSError as error:
                    self.abandon()
                    copy.failed(error)

        return take

    def abandon(self) -> None:
        if self.writer is not None:
            self.writer.abandon()
            self.writer = None


class MirrorSource:
    """A source: the mirrors of one table, one for its folder and one for each path that lies elsewhere."""

    def __init__(
        self,
        table: Table,
        connect: Callable[[], kv.Client],
        former: MirrorSource | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``former`` read the same table with other settings; its last good copy answers until there is a newer one."""
        self.table = table
        self._connect = connect
        self._clock = clock
        self._watches: dict[str, Watch] = {}
        self.watches: list[Watch] = []
        for number, (prefix, names) in enumerate(table.folders().items()):
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

    def entries(self, table: Table, service: Service, key: bytes | None, deadline: float) -> Entries:  # noqa: ARG002
        """See responder.Source. From memory; waits only while nothing has been read at all."""
        watch = self._watches[service.name]
        watch.settled(deadline)
        return watch.mirror.entries(service.name, key, self._clock())

    def mirror(self, service: Service) -> Mirror:
        """The mirror that holds the entries of this service."""
        return self._watches[service.name].mirror

    def update(self) -> None:
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
