"""One thread per mirror: it asks Consul one blocking query after another until the process exits.

The rules are in mirror.py; this is the only place that waits.
"""

from __future__ import annotations

import copy
import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from table_consul import kv
from table_consul.backoff import Backoff
from table_consul.errors import BadResponse, Forbidden, SourceError, TooLarge, printable
from table_consul.refusals import BadName
from table_consul.services import SERVICES, Service, Table
from table_consul.services.entries import Entries
from table_consul.sources import PROBE, mirror
from table_consul.sources.mirror import Mirror, QueryState, Snapshot, SnapshotBuilder
from table_consul.sources.snapshot import WRITE_SECONDS, SnapshotFile

log = logging.getLogger("table_consul")

# How often a table that was too large is retried; an update retries immediately.
TOO_LARGE_SECONDS = 600.0

Connect = Callable[[], kv.Client]
Take = Callable[[list[tuple[bytes, bytes | None]]], None]


def load_once(client: kv.Client, table: Table, prefix: bytes, names: Sequence[str], take: Take) -> tuple[Snapshot, int]:
    """The entries below the prefix as a watch would find them, and Consul's index; ``take`` gets what is stored.

    Raises:
        SourceError: Consul cannot be read; TooLarge where a watch would have the table read directly.
    """
    builder = SnapshotBuilder(table, prefix, names, None, _forbidden_services(client, table, names))
    with client.blocking_query(prefix, timeout=table.deadline) as response:
        return _read_snapshot(client, response, builder, take), response.index


def _forbidden_services(client: kv.Client, table: Table, services: Iterable[str]) -> dict[str, SourceError]:
    """Those of the services whose folder the token may not read, each with the error for its lookups."""
    forbidden: dict[str, SourceError] = {}
    for name in services:
        path = table.path(SERVICES[name])
        try:
            client.get(path + PROBE, timeout=table.deadline)
        except Forbidden as error:
            forbidden[name] = Forbidden(f"{printable(path)} may not be read: {error}")
    return forbidden


def _read_snapshot(client: kv.Client, response: kv.Response, builder: SnapshotBuilder, take: Take) -> Snapshot:
    """The snapshot that the response and its builder's former one make, with the absence of keys proven."""
    for found in response.pairs():
        pairs = [(pair.name.encode(), pair.value) for pair in found]
        builder.take(pairs)
        take(pairs)
    for check in builder.absence_checks(kv.is_url_safe, filtered=response.filtered):
        if not check.had_entries:
            builder.forbidden |= _forbidden_services(client, builder.table, [check.service])
            continue
        try:
            pair = _read_absent(client, builder.table, check)
        except Forbidden as error:
            raise Forbidden(f"{printable(check.key)} is not listed, and may not be read: {error}") from None
        if pair is not None:
            raise BadResponse(f"{printable(check.key)} is there, but Consul does not list it")
    return builder.finish()


def _read_absent(client: kv.Client, table: Table, check: mirror.AbsenceCheck) -> kv.Pair | None:
    try:
        return client.get(check.key, timeout=table.deadline)
    except BadName:
        # Consul 1.21.5 refuses the names of most mail addresses (hashicorp/consul#22835).
        client.get(table.path(SERVICES[check.service]) + PROBE, timeout=table.deadline)
        return None


class Watch(threading.Thread):
    """Keeps the mirror of one prefix of one table.

    Its thread alone writes what others read: ``mirror``, ``too_large`` (read directly instead), ``reloads`` (snapshots
    taken from Consul), ``index`` (Consul's, of the latest answer; 0 before the first), ``load_seconds`` (from the first
    byte of that answer until it was swapped in), ``backoff``. Others may `stop`, `reconnect`, `wait_for_first_load`.
    """

    def __init__(
        self, table: Table, prefix: bytes, services: Sequence[str], client: kv.Client, snapshot_file: SnapshotFile
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
        self._stopped = False
        self._state = QueryState()
        self._filtered = False

    def wait_for_first_load(self, deadline: float) -> None:
        """Return when the first attempt to read Consul has ended; if it hangs, that costs one deadline in all."""
        if not self._attempted.is_set():
            self._attempted.wait(max(0.0, min(deadline, self._first_by) - time.monotonic()))

    def reconnect(self) -> None:
        """Retry immediately, ending any pause, on a new connection and with token and TLS files reread."""
        self._reload = True
        self._wake.set()

    def adopt(self, former: Watch) -> None:
        """Start from the data of a stopped watch if it watched the same entries."""
        same_keys = (self.prefix, self._services) == (former.prefix, former._services)
        if not same_keys or not self._table.same_entries(former._table):
            return
        self.backoff = copy.copy(former.backoff)  # so that the end of its outage is logged
        if (state := former.mirror.state) is not None:
            snapshot, confirmed = state
            self.mirror.state = (Snapshot(snapshot.entries, snapshot.forbidden, restored=True), confirmed)

    def stop(self) -> None:
        """End the thread when its query ends, without waiting for it; the result of the query is ignored."""
        self._stopped = True
        self._wake.set()

    def run(self) -> None:
        try:
            if self.mirror.state is None and (loaded := self._file.load()) is not None:
                snapshot, age = loaded
                self.mirror.state = (snapshot, time.monotonic() - age)
        except Exception:
            log.exception("internal error; please report it")
        while not self._stopped:
            try:
                pause = self._turn()
            except SourceError as error:
                pause = self._fail(error)
            except Exception as error:
                log.exception("internal error; please report it")
                pause = self._fail(SourceError(f"internal error ({type(error).__name__})"))
            self._attempted.set()
            self._wake.wait(pause)
            self._wake.clear()
        self._file.discard()
        self._client.close()

    def _fail(self, error: SourceError) -> float:
        """Note why a turn failed; the seconds to pause before the next."""
        self._file.discard()
        if self._stopped:
            return 0.0  # another watch logs the outage now
        self.mirror.last_error, self._state = error, QueryState()
        if not isinstance(error, TooLarge):
            return self.backoff.failure(error, time.monotonic(), random.random())  # noqa: S311 - jitter, not a secret
        self.backoff.success(time.monotonic())
        if not self.too_large:
            log.warning("%s: falling back to direct mode (one Consul read per lookup)", error)
        self.too_large, self.mirror.state = True, None
        return TOO_LARGE_SECONDS

    def _turn(self) -> float:
        """Ask, look, read, swap; the seconds to pause before asking again."""
        if self._reload:
            self._reload = False
            self._client.reload()
        former = self.mirror.state[0] if self.mirror.state is not None else None
        unverified = mirror.unverified_services(self._services, former)
        forbidden = _forbidden_services(self._client, self._table, unverified)
        if len(forbidden) < len(unverified):
            self._state = QueryState()  # a newly granted permission changes no index, so read everything
        state = self._state
        wait = min(mirror.wait_seconds(0 if former is None else former.size, self._table.max_age), self._file.due_in)
        asked = time.monotonic()
        query = self._client.blocking_query(self.prefix, index=state.index, wait=wait, timeout=self._table.deadline)
        with query as response:
            began = time.monotonic()
            known = not self._file.dirty and (response.index, response.filtered) == (state.index, self._filtered)
            if former is not None and known:
                snapshot = former  # the same index and the same ACLs mean the same contents
            else:
                self._file.begin()
                builder = SnapshotBuilder(self._table, self.prefix, self._services, former, forbidden)
                snapshot = _read_snapshot(self._client, response, builder, self._file.take)
        if self._stopped:
            return 0.0  # another watch answers, logs and writes the file now
        ended = time.monotonic()
        changed = snapshot is not former
        self.mirror.state = (snapshot, ended)
        if changed:
            self._report(former, snapshot)
        self._file.finish(snapshot, changed=changed)
        if self.too_large:
            log.warning("%s: no longer too large, serving it from memory again", printable(self.prefix))
        self.too_large = False
        self.backoff.success(ended)
        self.index, self._filtered, self.load_seconds = response.index, response.filtered, ended - began
        timed_out = state.index > 0 and ended - asked >= wait
        self._state, pause = mirror.next_query(
            state, self.index, changed=changed, timed_out=timed_out, load_seconds=self.load_seconds
        )
        return pause

    def _report(self, former: Snapshot | None, snapshot: Snapshot) -> None:
        self.reloads += 1
        prefix = printable(self.prefix)
        if former is None:
            noun = "entry" if snapshot.size == 1 else "entries"
            log.info("%s: %d %s from Consul at %s", prefix, snapshot.size, noun, self._client.address)
        if snapshot.forbidden.keys() != (set() if former is None else former.forbidden.keys()):
            if names := ", ".join(snapshot.forbidden):
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
        self, table: Table, connect: Connect, former: MirrorSource | None = None, write_seconds: float = WRITE_SECONDS
    ) -> None:
        """``former`` was the source of the same table with other settings, and was closed.

        Its data answer until there are newer ones, unless a setting that changes what an entry means is another.
        """
        self.table = table
        self._connect = connect
        self.by_service: dict[str, Watch] = {}
        self.watches: list[Watch] = []
        for number, (prefix, names) in enumerate(table.folders().items()):
            path = f"{table.snapshot}.{number}" if number and table.snapshot else table.snapshot or ""
            file = SnapshotFile(path, table, prefix, names, write_seconds)
            watch = Watch(table, prefix, names, connect(), file)
            for each in former.watches if former is not None else ():
                watch.adopt(each)
            self.watches.append(watch)
            self.by_service.update(dict.fromkeys(names, watch))
            watch.start()

    def entries(self, table: Table, service: Service, key: bytes | None, deadline: float) -> Entries:  # noqa: ARG002 - a mirror has one table
        """The entries of the service, from memory; waits only while nothing has been read at all.

        Raises:
            SourceError: as `Mirror.entries`.
        """
        watch = self.by_service[service.name]
        watch.wait_for_first_load(deadline)
        return watch.mirror.entries(service.name, key, time.monotonic())

    def update(self) -> None:
        """Have the watches reread token and TLS files and, if any of them is pausing, retry immediately.

        Raises:
            SourceError: the token file cannot be used; the data in memory are still served.
        """
        for watch in self.watches:
            watch.reconnect()
        self._connect().reload()  # the clients of the watches belong to their threads

    def close(self) -> None:
        """Stop watching."""
        for watch in self.watches:
            watch.stop()
