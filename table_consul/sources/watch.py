"""One thread per mirror: it asks Consul one blocking query after another until the process exits.

The rules are in mirror.py; this is the only place that waits.
"""

from __future__ import annotations

import copy
import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from table_consul import kv
from table_consul.backoff import Backoff
from table_consul.errors import BadResponse, Forbidden, SourceError, TooLarge, printable
from table_consul.services import SERVICES, Service, Table
from table_consul.services.entries import Entries
from table_consul.sources import PROBE
from table_consul.sources.mirror import (
    AbsenceCheck,
    Mirror,
    QueryResult,
    QueryState,
    Snapshot,
    SnapshotBuilder,
    next_query,
    unverified_services,
    wait_seconds,
)
from table_consul.sources.snapshot import WRITE_SECONDS, SnapshotFile

log = logging.getLogger("table_consul")

# How often a table that was too large is tried again; an update tries at once.
TOO_LARGE_SECONDS = 600.0

Take = Callable[[list[tuple[bytes, bytes | None]]], None]


def load_once(
    client: kv.Client, table: Table, prefix: bytes, services: Sequence[str], take: Take | None = None
) -> tuple[Snapshot, int]:
    """The entries below the prefix as a watch would find them, and Consul's index of them.

    ``take`` gets what is stored, a few pairs at a time.

    Raises:
        SourceError: Consul cannot be read; TooLarge where a watch would have the table read directly.
    """
    builder = SnapshotBuilder(table, prefix, services, None, forbidden_services(client, table, services))
    with client.blocking_query(prefix, timeout=table.deadline) as response:
        return read_snapshot(client, table, response, builder, take), response.index


def forbidden_services(client: kv.Client, table: Table, services: Iterable[str]) -> dict[str, SourceError]:
    """Those of the services whose folder the token may not read, each with the error for its lookups.

    Raises:
        SourceError: Consul cannot be read.
    """
    forbidden: dict[str, SourceError] = {}
    for name in services:
        path = table.path(SERVICES[name])
        try:
            client.get(path + PROBE, timeout=table.deadline)
        except Forbidden as error:
            forbidden[name] = Forbidden(f"{printable(path)} may not be read: {error}")
    return forbidden


def read_snapshot(
    client: kv.Client, table: Table, response: kv.Response, builder: SnapshotBuilder, take: Take | None = None
) -> Snapshot:
    """The snapshot that the response and its builder's former one make, with the absence of keys proven.

    Raises:
        SourceError: it is not to be believed; TooManyKeys.
    """
    for pairs in response.pairs():
        builder.take(pairs)
        if take is not None:
            take(pairs)
    for check in builder.absence_checks(kv.is_url_safe, filtered=response.filtered):
        path = table.path(SERVICES[check.service])
        try:
            pair = _read_absent(client, table, check, path + PROBE)
        except Forbidden as error:
            if check.had_entries:
                raise Forbidden(f"{printable(check.key)} is not listed, and may not be read: {error}") from None
            builder.mark_forbidden(check.service, Forbidden(f"{printable(path)} may not be read: {error}"))
        else:
            if pair is not None:
                raise BadResponse(f"{printable(check.key)} is there, but Consul does not list it")
    return builder.finish()


def _read_absent(client: kv.Client, table: Table, check: AbsenceCheck, probe: bytes) -> kv.Pair | None:
    try:
        return client.get(check.key, timeout=table.deadline)
    except BadResponse:
        # Consul 1.21.5 refuses the names of most mail addresses (hashicorp/consul#22835), there or not.
        if check.key == probe:
            raise
        client.get(probe, timeout=table.deadline)
        return None


class Watch(threading.Thread):
    """Keeps the mirror of one prefix of one table.

    Its own thread alone writes what metrics and status read: ``mirror``, ``too_large`` (read directly instead),
    ``reloads`` (snapshots taken from Consul), ``index`` (Consul's, of the latest answer; 0 before the first),
    ``load_seconds`` (from the first byte of the latest answer until it was taken over) and ``backoff``. `stop`,
    `reconnect` and `wait_for_first_load` are for other threads.
    """

    def __init__(
        self,
        table: Table,
        prefix: bytes,
        services: Sequence[str],
        client: kv.Client,
        snapshot_file: SnapshotFile | None = None,
    ) -> None:
        super().__init__(name=f"watch {printable(prefix)}", daemon=True)
        self.prefix = prefix
        self.mirror = Mirror(table.max_age)
        self.too_large = False
        self.reloads = 0
        self.index = 0
        self.load_seconds = 0.0
        self.backoff = Backoff(
            f"{printable(prefix)} from Consul", "serving the last good copy if there is one, otherwise returning errors"
        )
        self._table = table
        self._services = services
        self._file = snapshot_file
        self._client = client
        self._reload = False
        self._attempted = threading.Event()
        self._first_by = time.monotonic() + table.deadline
        self._wake = threading.Event()
        self._stopping = threading.Lock()  # held by whoever stops the watch, or replaces the mirror's state
        self._stopped = False
        self._final: tuple[Snapshot, float] | None = None
        self._state = QueryState()

    def wait_for_first_load(self, deadline: float) -> None:
        """Return when the first attempt to read Consul has ended, well or not, or when it has taken too long.

        A first answer that does not come costs one deadline, not one for each question.
        """
        if not self._attempted.is_set():
            self._attempted.wait(max(0.0, min(deadline, self._first_by) - time.monotonic()))

    def reconnect(self) -> None:
        """Try again at once, whatever pause was due, on a new connection and with token and TLS files read anew."""
        self._reload = True
        self._wake.set()

    def adopt(self, former: Watch) -> bool:
        """Start from the data of a stopped watch if it watched the same entries. Return whether it did."""
        if not self._table.same_entries(former._table):
            return False
        if (self.prefix, self._services) != (former.prefix, former._services):
            return False
        self.backoff = copy.copy(former.backoff)  # so that the end of its outage is logged
        if former._final is not None:
            snapshot, confirmed = former._final
            self.mirror.replace(Snapshot(snapshot.entries, snapshot.forbidden, restored=True), confirmed)
        return True

    def stop(self) -> None:
        """End the thread when its query ends; nobody waits for that."""
        with self._stopping:
            self._stopped = True
            self._final, self.mirror.state = self.mirror.state, None
        self._wake.set()

    def run(self) -> None:
        try:
            if self._file is not None and self.mirror.state is None and (loaded := self._file.load()) is not None:
                snapshot, age = loaded
                self._replace(snapshot, time.monotonic() - age)
        except Exception:
            log.exception("internal error; please report it")
        while not self._stopped:
            pause = self._attempt()
            self._attempted.set()
            self._wake.wait(pause)
            self._wake.clear()
        self._client.close()

    def _replace(self, snapshot: Snapshot, now: float) -> bool:
        with self._stopping:
            if not self._stopped:
                self.mirror.replace(snapshot, now)
            return not self._stopped

    def _attempt(self) -> float:
        """Ask Consul once; the seconds to pause afterwards."""
        try:
            if self._reload:
                self._reload = False
                self._client.reload()
            pause = self._turn()
        except TooLarge as error:
            return self._end_too_large(error)
        except SourceError as error:
            return self._fail(error)
        except Exception as error:
            log.exception("internal error; please report it")
            return self._fail(SourceError(f"internal error ({type(error).__name__})"))
        if self._stopped:
            return 0.0  # another watch logs the outage now
        if self.too_large:
            log.warning("%s: no longer too large, serving it from memory again", printable(self.prefix))
        self.too_large = False
        self.backoff.success(time.monotonic())
        return pause

    def _end_too_large(self, error: TooLarge) -> float:
        if not self._stopped:
            self.backoff.success(time.monotonic())
            if not self.too_large:
                log.warning("%s: falling back to direct mode (one Consul read per lookup)", error)
            self.mirror.last_error, self._state = error, QueryState()
            self.too_large, self.mirror.state = True, None
        return TOO_LARGE_SECONDS

    def _fail(self, error: SourceError) -> float:
        if self._stopped:
            return 0.0
        self.mirror.last_error = error
        self._state = QueryState()
        return self.backoff.failure(error, time.monotonic(), random.random())  # noqa: S311 - jitter, not a secret

    def _turn(self) -> float:
        """Ask, look, read, swap; the seconds to pause before asking again.

        Raises:
            SourceError: Consul cannot be read, or its answer is not to be believed.
        """
        former = self.mirror.state[0] if self.mirror.state is not None else None
        unverified = unverified_services(self._services, former)
        forbidden = forbidden_services(self._client, self._table, unverified)
        if len(forbidden) < len(unverified):
            self._state = QueryState()  # what may be read by now must be seen now, and not when it changes
        state = self._state
        wait = wait_seconds(0 if former is None else former.size, self._table.max_age)
        dirty = self._file is not None and self._file.dirty
        if self._file is not None and (due_in := self._file.due_in) is not None:
            wait = min(wait, due_in)
        asked = time.monotonic()
        query = self._client.blocking_query(self.prefix, index=state.index, wait=wait, timeout=self._table.deadline)
        with query as response:
            began = time.monotonic()
            known = not dirty and (response.index, response.filtered) == (state.index, state.filtered)
            # The same index and the same ACLs mean the same contents.
            snapshot = former if former is not None and known else self._read(response, former, forbidden)
        ended = time.monotonic()
        changed = snapshot is not former
        if not self._replace(snapshot, ended):
            if self._file is not None:
                self._file.discard()  # another watch writes that file now
            return 0.0
        if changed:
            self._report(former, snapshot)
        if self._file is not None:
            self._file.finish(snapshot, changed=changed)
        self.index, self.load_seconds = response.index, ended - began
        timed_out = state.index > 0 and ended - asked >= wait
        result = QueryResult(response.index, changed, timed_out, self.load_seconds, response.filtered)
        self._state, pause = next_query(state, result)
        return pause

    def _read(self, response: kv.Response, former: Snapshot | None, forbidden: Mapping[str, SourceError]) -> Snapshot:
        builder = SnapshotBuilder(self._table, self.prefix, self._services, former, forbidden)
        if self._file is None:
            return read_snapshot(self._client, self._table, response, builder)
        self._file.begin()
        try:
            return read_snapshot(self._client, self._table, response, builder, self._file.write)
        except BaseException:
            self._file.discard()
            raise

    def _report(self, former: Snapshot | None, snapshot: Snapshot) -> None:
        self.reloads += 1
        prefix = printable(self.prefix)
        if former is None:
            line = "%s: %d entry from Consul at %s" if snapshot.size == 1 else "%s: %d entries from Consul at %s"
            log.info(line, prefix, snapshot.size, self._client.address)
        if snapshot.forbidden.keys() != (set() if former is None else former.forbidden.keys()):
            if snapshot.forbidden:
                names = ", ".join(snapshot.forbidden)
                log.warning("%s: the token may not read: %s; returning errors for these services", prefix, names)
            else:
                log.warning("%s: all services readable again", prefix)
        for name, entries in snapshot.entries.items():
            logged = set() if former is None else set(former.entries[name].problems)
            for problem in entries.problems:
                if problem not in logged:
                    log.warning("%s", problem)


class MirrorSource:
    """A source: the mirrors of one table, one for its folder and one for each path that lies elsewhere.

    ``watches`` is for metrics and status; their threads only read it.
    """

    def __init__(
        self,
        table: Table,
        connect: Callable[[], kv.Client],
        former: MirrorSource | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        write_seconds: float = WRITE_SECONDS,
    ) -> None:
        """``former`` was the source of the same table with other settings, and was closed.

        Its data answer until there are newer ones, unless a setting that changes what an entry means is another.
        """
        self.table = table
        self._connect = connect
        self._clock = clock
        self._watches: dict[str, Watch] = {}
        self.watches: list[Watch] = []
        for number, (prefix, names) in enumerate(table.folders().items()):
            file = None
            if table.snapshot:
                path = f"{table.snapshot}.{number}" if number else table.snapshot
                file = SnapshotFile(path, table, prefix, names, write_seconds=write_seconds)
            watch = Watch(table, prefix, names, connect(), file)
            for each in former.watches if former is not None else ():
                watch.adopt(each)
            self.watches.append(watch)
            self._watches.update(dict.fromkeys(names, watch))
            watch.start()

    def mirror(self, service: Service) -> Mirror:
        """The mirror that holds the entries of this service."""
        return self._watches[service.name].mirror

    def too_large(self, service: Service) -> bool:
        """Whether the table has more keys than a mirror may hold."""
        return self._watches[service.name].too_large

    def entries(self, table: Table, service: Service, key: bytes | None, deadline: float) -> Entries:  # noqa: ARG002 - a mirror has one table
        """The entries of the service, from memory; waits only while nothing has been read at all.

        Raises:
            SourceError: as `Mirror.entries`.
        """
        watch = self._watches[service.name]
        watch.wait_for_first_load(deadline)
        return watch.mirror.entries(service.name, key, self._clock())

    def update(self) -> None:
        """Have the watches read token and TLS files anew and, if any of them is pausing, try again at once.

        Raises:
            SourceError: the token file cannot be used; the data in memory are still served.
        """
        for watch in self.watches:
            watch.reconnect()
        client = self._connect()  # those of the watches belong to their threads
        try:
            client.reload()
        finally:
            client.close()

    def close(self) -> None:
        """Stop watching."""
        for watch in self.watches:
            watch.stop()
