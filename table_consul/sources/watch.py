"""One thread per mirror: it sends Consul one blocking query after another until the process exits.

The rules are in mirror.py.
"""

from __future__ import annotations

import copy
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from table_consul import kv
from table_consul.backoff import Backoff
from table_consul.errors import SourceError, TooLarge, counted, printable
from table_consul.log import warn_of_problems
from table_consul.services import SERVICES, Service, Table
from table_consul.services.entries import Entries, Problem
from table_consul.sources import hold, mirror
from table_consul.sources.cut import LEAST_KEYS, MOST_RANGES, cut
from table_consul.sources.direct import DirectSource
from table_consul.sources.mirror import Mirror, QueryState, Snapshot, SnapshotBuilder, Unlisted
from table_consul.sources.queries import NO_THREAD, Queries
from table_consul.sources.ranges import Ranges, Unsettled, can_be_listed
from table_consul.sources.reading import hidden_services, read_snapshot
from table_consul.sources.snapshot import SnapshotFile
from table_consul.transport import WaitCut

log = logging.getLogger("table_consul")

# How often a table that was too large is retried; an update retries immediately.
TOO_LARGE_SECONDS = 600.0
# If ranges end sooner than this, the next ones start after this time, and after twice as long each time.
RANGED_SECONDS = 60.0
RANGED_PAUSE_MAX = 3600.0
# How often a large table is read as a whole to write its file.
RANGED_WRITE_SECONDS = 300.0
# Spreads the daemons that must all read the whole table.
JITTER_SECONDS = 0.05

Connect = Callable[[], kv.Client]


class Watch(threading.Thread):
    """Keeps the mirror of one prefix of one table.

    Only its thread writes what others read: ``mirror``, ``too_large`` (direct mode instead), ``reloads`` (snapshots
    loaded from Consul), ``index`` (Consul's, of the latest response; 0 before the first), ``load_seconds`` (from the
    first byte of that response until its snapshot was in use), ``backoff``. Other threads may call `stop`, `reconnect`
    and `wait_for_first_load`.
    """

    def __init__(
        self, table: Table, prefix: bytes, services: Sequence[str], connect: Connect, snapshot_file: SnapshotFile
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
        self._client = connect()
        self._queries = Queries(connect)
        self._ranges: Ranges | None = None
        self._most_ranges = MOST_RANGES
        self._cut_after = 0.0
        self._cut_pause = RANGED_SECONDS
        self._reload = False
        self._attempted = threading.Event()
        self._first_by = time.monotonic() + table.deadline
        self._wake = threading.Event()
        self._stopped = False
        self._state = QueryState()

    def wait_for_first_load(self, deadline: float) -> None:
        """Wait until the first attempt to read Consul has ended; if it hangs, for one deadline in all."""
        if not self._attempted.is_set():
            self._attempted.wait(max(0.0, min(deadline, self._first_by) - time.monotonic()))

    def reconnect(self) -> None:
        """Read again immediately, on a new connection and with token and TLS files reread; deletions are accepted."""
        self._reload = True
        self._interrupt()

    def adopt(self, former: Watch) -> None:
        """Start from the data of a stopped watch, as far as it watched the same entries.

        If there were too many, they are still read directly until this watch has listed them.
        """
        if self.prefix != former.prefix:
            return
        self.too_large = former.too_large
        self.backoff = copy.copy(former.backoff)  # so that the end of its outage is logged
        if (state := former.mirror.state) is not None:
            snapshot, confirmed = state
            adopted = mirror.adopted(snapshot, self._table, self._services)
            self.mirror.state = None if adopted is None else (adopted, confirmed)
            self._reload = True  # deletions that the update finds are accepted

    def stop(self) -> None:
        """End the thread soon, without waiting for it; the result of its query is ignored."""
        self._stopped = True
        self._interrupt()

    def _interrupt(self) -> None:
        self._client.interrupt()
        self._wake.set()
        if (ranges := self._ranges) is not None:
            ranges.interrupt()

    def run(self) -> None:
        try:
            if self.mirror.state is None and not self.too_large and (loaded := self._file.load()) is not None:
                snapshot, age = loaded
                self.mirror.state = (snapshot, time.monotonic() - age)
        except Exception:
            log.exception("internal error; please report it")
        while not self._stopped:
            try:
                pause = self._turn() * (0.5 + random.random())  # noqa: S311 - jitter, not a secret
                if (ranges := self._cut()) is not None:
                    pause = self._watch_ranges(ranges)
                else:
                    self._queries.end_idle()
            except SourceError as error:
                pause = self._fail(error)
            except Exception as error:
                log.exception("internal error; please report it")
                pause = self._fail(SourceError(f"internal error ({type(error).__name__})"))
            self._wake.wait(pause)
            self._wake.clear()
        self._file.discard()
        self._queries.close()
        self._client.close()

    def _fail(self, error: SourceError) -> float:
        """Note why a turn failed; returns the seconds to pause before the next."""
        self._file.discard()
        if self._stopped:
            return 0.0  # another watch logs the outage now
        self.mirror.last_error = error
        self._state = QueryState(longest_wait=self._state.longest_wait)
        if isinstance(error, TooLarge):
            self.backoff.success(time.monotonic())
            if not self.too_large:
                log.warning("%s: falling back to direct mode (one Consul read per lookup)", error)
            self.too_large, self.mirror.state = True, None
            self._queries.close()
            pause = TOO_LARGE_SECONDS
        else:
            pause = self.backoff.failure(error, time.monotonic(), random.random())  # noqa: S311 - jitter, not a secret
        self._attempted.set()
        return pause

    def _begin_update(self) -> bool:
        """Whether an update was requested. It accepts held deletions, and those that this turn finds."""
        if not self._reload:
            return False
        self._reload = False
        if self.mirror.state is not None:
            self.mirror.state = (self.mirror.state[0].accepted(), self.mirror.state[1])
        self._client.reload()
        self._queries.reload()
        self._state = replace(self._state, index=0)  # a waiting query would also accept later deletions
        return True

    def _turn(self) -> float:
        """Query Consul and swap in the snapshot; returns the seconds to pause before the next query."""
        accepting = self._begin_update()
        state, table = self._state, self._table
        former = self.mirror.state[0] if self.mirror.state is not None else None
        held_for = math.inf if former is None else former.held_until - time.monotonic()
        if held_for <= 0:
            state = replace(state, index=0, seen=0)
        former_hidden = {} if former is None else former.hidden
        unverified = mirror.unverified_services(self._services, former, filtered=state.filtered)
        before = hidden_services(self._client, table, unverified, former_hidden, filtered=state.filtered)
        if not former_hidden.keys() <= before.keys():
            state = replace(state, index=0, seen=0)  # a newly granted permission changes no index
        asked = time.monotonic()
        wait = mirror.wait_seconds(state, table.max_age, hidden=bool(former_hidden), held_for=held_for)
        wait = min(wait, self._file.due_in)
        try:
            query = self._client.blocking_query(self.prefix, index=state.index, wait=wait, timeout=table.deadline)
        except WaitCut as cut:
            self._state = mirror.after_cut(state, cut.seconds)
            return 0.0
        with query as response:
            began = time.monotonic()
            timed_out = state.index > 0 and began - asked >= wait
            seen = replace(state, filtered=response.filtered)
            self._state, pause = mirror.next_query(seen, response.index, changed=False, timed_out=False, load_seconds=0)
            if seen.filtered and not state.filtered:
                # The folders with hidden keys must be known before they are listed.
                self._state = replace(self._state, index=0, seen=0)
                return 0.0
            if response.index < state.index:
                return pause  # keys that a stale server lacks are not deleted
            if former is not None and (seen, response.index) == (state, state.seen) and not self._file.due:
                snapshot = former  # same index, same ACLs: same contents
            else:
                self._file.begin()
                terms = hold.Terms(began, 0.0 if accepting else table.hold_deletions, response.index < self.index)
                builder = SnapshotBuilder(table, self.prefix, self._services, former, terms)
                snapshot = read_snapshot(self._client, response, builder, before, former_hidden, self._file.take)
        if self._stopped:
            return 0.0  # another watch now serves, logs and writes the file
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
        self.index, self.load_seconds = response.index, ended - began
        self._state, pause = mirror.next_query(
            seen,
            self.index,
            changed=changed,
            timed_out=timed_out,
            load_seconds=self.load_seconds,
            waited=began - asked,
        )
        self._attempted.set()
        return pause

    def _cut(self) -> Ranges | None:
        """The ranges of a large table that was just read as a whole; None if watching them is not worthwhile."""
        state = self._state
        if self.mirror.state is None or not state.seen or state.filtered:
            return None
        snapshot, _ = self.mirror.state
        if (
            snapshot.size < LEAST_KEYS
            or snapshot.hidden
            or snapshot.held
            or snapshot.restored
            or time.monotonic() < self._cut_after
        ):
            return None
        folders = {}
        for each in snapshot.entries.values():
            stored = each.original_case.get
            keys = [stored(key, key) for mapping in (each.values, each.errors) for key in mapping]
            folders[each.path] = keys + [key for _, note in each.parts.notes() for key in note.variants]
        outer = tuple(folders)
        for path in outer:
            direct = path.startswith(self.prefix) and path.count(b"/") == self.prefix.count(b"/") + 1
            inside = any(path.startswith(other) and path != other for other in outer)
            if inside or (direct and not folders[path]):
                del folders[path]
        ranges = cut(folders, can_be_listed, self._most_ranges)
        if ranges is None:
            self._cut_after = time.monotonic() + self._cut_pause
            return None
        return Ranges(
            self._table, self.prefix, self._services, ranges, self._client, self._queries, snapshot, state.seen
        )

    def _watch_ranges(self, ranges: Ranges) -> float:
        """Watch the ranges while possible; returns the seconds to pause before the whole table is read."""
        began = time.monotonic()
        if self._file.dirty:
            ranges.until = began + RANGED_WRITE_SECONDS

        def publish(confirmed: float | None) -> None:
            if self._stopped or self.mirror.state is None:
                return
            (former, moment), snapshot = self.mirror.state, ranges.snapshot
            self.mirror.state = (snapshot, moment if confirmed is None else max(moment, confirmed))
            self.index, self.load_seconds = ranges.index, ranges.load_seconds
            changed = snapshot is not former
            if changed:
                self._report(former, snapshot)
            self._file.finish(snapshot, changed=changed)
            if self._file.dirty:
                ranges.until = min(ranges.until, time.monotonic() + RANGED_WRITE_SECONDS)

        self._ranges = ranges
        if self._reload or self._stopped:
            ranges.interrupt()
        try:
            ranges.run(publish)
        except (Unsettled, SourceError) as reason:
            log.info("%s: reading the whole table: %s", printable(self.prefix), reason)
            now = time.monotonic()
            if isinstance(reason, SourceError):
                self._most_ranges = max(self._most_ranges // 2, 1)
            if now - began < RANGED_SECONDS:
                self._cut_after, self._cut_pause = now + self._cut_pause, min(self._cut_pause * 2, RANGED_PAUSE_MAX)
                self._queries.close()  # Consul counts them among the connections of this host
            else:
                self._cut_pause, self._most_ranges = RANGED_SECONDS, min(self._most_ranges * 2, MOST_RANGES)
            return random.random() * JITTER_SECONDS  # noqa: S311 - not a secret
        finally:
            self._ranges = None
            self._state = QueryState(longest_wait=self._state.longest_wait)
        return 0.0

    def _report(self, former: Snapshot | None, snapshot: Snapshot) -> None:
        self.reloads += 1
        prefix = printable(self.prefix)
        if former is None:
            count = counted(snapshot.size, "entry", "entries")
            log.info("%s: %s from Consul at %s", prefix, count, self._client.address)
        before = {} if former is None else former.hidden
        if snapshot.hidden.keys() != {name for name, each in before.items() if each.error is not mirror.NOTHING_YET}:
            if names := ", ".join(snapshot.hidden):
                reason = next(iter(snapshot.hidden.values())).error
                text = "%s: keys may be hidden under: %s; reading Consul for each key that is not listed there (%s)"
                log.warning(text, prefix, names, reason)
            else:
                log.warning("%s: all services readable again", prefix)
        self._warn_of_losses(former, snapshot)
        self._warn_of_holds(former, snapshot)
        new: list[Problem] = []
        for name, entries in snapshot.entries.items():
            before_it = None if former is None else former.entries[name]
            new += entries.problems_since(before_it) if entries is not before_it else []
        warn_of_problems(self._table.name, new)

    def _warn_of_losses(self, former: Snapshot | None, snapshot: Snapshot) -> None:
        """Log possible mistakes: a wrong prefix, or a folder deleted in Consul."""
        if former is None and not snapshot.size and not snapshot.hidden:
            text = "%s: no entries: every lookup returns not-found (check the names of prefix and table in Consul)"
            log.warning(text, printable(self.prefix))
        for name, entries in snapshot.entries.items():
            count, left = 0 if former is None else len(former.entries[name]), len(entries)
            held = former is not None and name in former.held
            if left * 2 < count and name not in snapshot.hidden and not held:
                path = printable(self._table.path(SERVICES[name]))
                former_entries, rest = counted(count, "entry", "entries"), counted(left, "is", "are")
                log.warning("%s: %d of %s deleted at once; %s left", path, count - left, former_entries, rest)

    def _warn_of_holds(self, former: Snapshot | None, snapshot: Snapshot) -> None:
        """Log the holds that have begun or ended."""
        if former is not None:
            counts = {name: len(entries) for name, entries in former.entries.items()}
            name = printable(self._table.name)
            for service, text in hold.log_lines(former.held, snapshot.held, counts, name, time.monotonic()):
                log.warning("%s: %s", printable(self._table.path(SERVICES[service])), text)


class MirrorSource:
    """A source: the mirrors of one table, one for its folder and one for each path elsewhere.

    ``watches`` is for metrics and status; their threads only read it.
    """

    def __init__(self, table: Table, connect: Connect, former: MirrorSource | None = None) -> None:
        """``former`` is the closed source of the same table with other settings.

        Its data are served until newer ones arrive, unless a setting has changed that changes what an entry means.
        """
        self.table = table
        self._connect = connect
        self._direct: DirectSource | None = None
        self.by_service: dict[str, Watch] = {}
        self.watches: list[Watch] = []
        for number, (prefix, names) in enumerate(table.folders().items()):
            path = f"{table.snapshot}.{number}" if number and table.snapshot else table.snapshot or ""
            file = SnapshotFile(path, table, prefix, names)
            watch = Watch(table, prefix, names, connect, file)
            for each in former.watches if former is not None else ():
                watch.adopt(each)
            self.watches.append(watch)
            self.by_service.update(dict.fromkeys(names, watch))
        try:
            for watch in self.watches:
                watch.start()
        except RuntimeError:
            self.close()
            raise SourceError(*NO_THREAD) from None

    def entries(self, table: Table, service: Service, key: bytes | None, deadline: float) -> Entries:
        """The entries of the service, from memory; waits only before the first load.

        If an ACL hides some, a key that is not in memory is read from Consul.

        Raises:
            SourceError: as `Mirror.entries`, or as `DirectSource.entries`.
        """
        watch = self.by_service[service.name]
        watch.wait_for_first_load(deadline)
        try:
            return watch.mirror.entries(service.name, key, time.monotonic())
        except Unlisted as unlisted:
            if self._direct is None:
                self._direct = DirectSource(self._connect())
            return self._direct.entries_hidden(unlisted, table, service, key, deadline)

    def update(self) -> None:
        """Make the watches reread token and TLS files and, if one of them pauses, retry immediately.

        Raises:
            SourceError: the token file cannot be used; the data in memory are still served.
        """
        for watch in self.watches:
            watch.reconnect()
        if self._direct is not None:
            self._direct.update()
        self._connect().reload()  # the clients of the watches belong to their threads

    def close(self) -> None:
        """Stop watching."""
        for watch in self.watches:
            watch.stop()
        if self._direct is not None:
            self._direct.close()
