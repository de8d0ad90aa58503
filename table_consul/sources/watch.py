"""One thread per mirror: it asks Consul one blocking query after another until the process exits.

The rules are in mirror.py; this is the only place that waits.
"""

from __future__ import annotations

import copy
import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from msgspec.structs import replace

from table_consul import kv
from table_consul.backoff import Backoff
from table_consul.errors import BadResponse, Forbidden, SourceError, TooLarge, Unreachable, printable
from table_consul.failures import BadName
from table_consul.log import warn_of_problems
from table_consul.services import SERVICES, Service, Table, fold_key
from table_consul.services.entries import Entries, Problem
from table_consul.sources import PROBE, mirror
from table_consul.sources.direct import DirectSource
from table_consul.sources.mirror import Hidden, Mirror, QueryState, Snapshot, SnapshotBuilder, Unlisted
from table_consul.sources.snapshot import WRITE_SECONDS, SnapshotFile
from table_consul.transport import WaitCut

log = logging.getLogger("table_consul")

# How often a table that was too large is retried; an update retries immediately.
TOO_LARGE_SECONDS = 600.0
# What a command gives a large table to begin arriving, after Consul answered for one key.
LOAD_SECONDS = 30.0

Connect = Callable[[], kv.Client]
Take = Callable[[list[tuple[bytes, bytes | None]]], None]


def load_once(client: kv.Client, table: Table, prefix: bytes, names: Sequence[str], take: Take) -> tuple[Snapshot, int]:
    """The entries below the prefix as a watch would find them, and Consul's index; ``take`` gets what is stored.

    Raises:
        SourceError: Consul cannot be read; TooLarge where a watch would have the table read directly.
    """
    before = _hidden_services(client, table, names, {}, filtered=True)
    builder = SnapshotBuilder(table, prefix, names, None)
    with client.blocking_query(prefix, timeout=LOAD_SECONDS) as response:
        return _read_snapshot(client, response, builder, before, {}, take), response.index


def _hidden_services(
    client: kv.Client, table: Table, services: Iterable[str], known: Mapping[str, Hidden], *, filtered: bool
) -> dict[str, SourceError]:
    """Those of the services in whose folder the token may not read everything, each with the reason."""
    hidden: dict[str, SourceError] = {}
    for name in services:
        reason = _why_hidden(client, table, name, filtered=filtered)
        missing = known[name].missing.values() if name in known and reason is None else ()
        reads = _read_each(client, table, name, missing)
        reason = next((found for _, found in reads if isinstance(found, Forbidden)), reason)
        if reason is not None:
            hidden[name] = reason
    return hidden


def _why_hidden(client: kv.Client, table: Table, service: str, *, filtered: bool) -> Forbidden | None:
    """Why the absence of a key from the folder of this service proves nothing, if the folder alone shows it.

    ``filtered``: Consul reports that it hides keys, of this folder or another.
    """
    path = table.path(SERVICES[service])
    try:
        client.get(path + PROBE, timeout=table.deadline)
        hides = filtered and client.hides_keys(path, timeout=table.deadline)
    except Forbidden as error:
        return Forbidden(f"the token may not read everything under {printable(path)}: {error}")
    return Forbidden(f"Consul hides keys under {printable(path)} from this token") if hides else None


def _read_each(
    client: kv.Client, table: Table, service: str, stored: Iterable[bytes]
) -> Iterator[tuple[bytes, kv.Pair | Forbidden | None]]:
    """What a read of each of these keys brings, as they are stored; nothing of those that no URL can name."""
    path = table.path(SERVICES[service])
    for key in stored:
        if not kv.is_url_safe(path + key):
            continue
        try:
            yield key, client.get(path + key, timeout=table.deadline)
        except Forbidden as error:
            yield key, Forbidden(f"the token may not read everything under {printable(path)}: {error}")
        except BadName:
            pass  # Consul 1.21.5 refuses the names of most mail addresses (hashicorp/consul#22835).


def _read_snapshot(
    client: kv.Client,
    response: kv.Response,
    builder: SnapshotBuilder,
    hidden: Mapping[str, SourceError],
    known: Mapping[str, Hidden],
    take: Take,
) -> Snapshot:
    """The snapshot that the response and its builder's former one make, with the absence of keys proven.

    ``hidden`` are the services that were so before the query. Before and after: a blocking query goes by the ACLs of
    its beginning, which may have changed when it ends. ``known`` are those of the former snapshot. A key that is gone
    is read at once, also from a hidden folder: later it would be one of many that are not known to be deleted.
    """
    for found in response.pairs():
        pairs = [(pair.name.encode(), pair.value) for pair in found]
        builder.take(pairs)
        take(pairs)
    reasons = dict(hidden)
    missing = builder.missing_keys()
    for name, keys in missing.items():
        if response.behind:
            reasons[name] = Unreachable(f"Consul at {client.address} may lack the latest entries")
            continue
        suspects = known[name].missing if name in known else {}
        gone = mirror.sample([stored for key, stored in keys.items() if key not in suspects])
        if name not in reasons and (keys or response.filtered):
            reason = _why_hidden(client, builder.table, name, filtered=response.filtered)
            if reason is not None:
                reasons[name] = reason
                continue
            gone = [*gone, *(stored for key, stored in keys.items() if key in suspects)]
        for key, answer in _read_each(client, builder.table, name, gone):
            if isinstance(answer, Forbidden):
                reasons.setdefault(name, answer)
            elif answer is None:
                del keys[fold_key(key)]
            else:
                path = printable(builder.table.path(SERVICES[name]) + key)
                raise BadResponse(f"{path} is there, but Consul does not list it")
    if builder.lost_everything and len(reasons) == len(missing) and not response.behind:
        raise Forbidden(f"the token may no longer read anything: {next(iter(reasons.values()))}")
    return builder.finish({name: Hidden(reason, missing[name]) for name, reason in reasons.items()})


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

    def wait_for_first_load(self, deadline: float) -> None:
        """Return when the first attempt to read Consul has ended; if it hangs, that costs one deadline in all."""
        if not self._attempted.is_set():
            self._attempted.wait(max(0.0, min(deadline, self._first_by) - time.monotonic()))

    def reconnect(self) -> None:
        """Retry immediately, ending any pause, on a new connection and with token and TLS files reread."""
        self._reload = True
        self._client.interrupt()
        self._wake.set()

    def adopt(self, former: Watch) -> None:
        """Start from the data of a stopped watch, as far as it watched the same entries."""
        if self.prefix != former.prefix:
            return
        self.backoff = copy.copy(former.backoff)  # so that the end of its outage is logged
        if (state := former.mirror.state) is not None:
            snapshot, confirmed = state
            adopted = mirror.adopted(snapshot, self._table, self._services)
            self.mirror.state = None if adopted is None else (adopted, confirmed)

    def stop(self) -> None:
        """End the thread soon, without waiting for it; the result of its query is ignored."""
        self._stopped = True
        self._client.interrupt()
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
            self._wake.wait(pause)
            self._wake.clear()
        self._file.discard()
        self._client.close()

    def _fail(self, error: SourceError) -> float:
        """Note why a turn failed; the seconds to pause before the next."""
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
            pause = TOO_LARGE_SECONDS
        else:
            pause = self.backoff.failure(error, time.monotonic(), random.random())  # noqa: S311 - jitter, not a secret
        self._attempted.set()
        return pause

    def _turn(self) -> float:
        """Ask, look, read, swap; the seconds to pause before asking again."""
        if self._reload:
            self._reload = False
            self._client.reload()
        state, table = self._state, self._table
        former = self.mirror.state[0] if self.mirror.state is not None else None
        known = {} if former is None else former.hidden
        before: dict[str, SourceError] = {}
        if not state.behind:  # else nothing is proven anyway
            unverified = mirror.unverified_services(self._services, former, filtered=state.filtered)
            before = _hidden_services(self._client, table, unverified, known, filtered=state.filtered)
            if not known.keys() <= before.keys():
                state = replace(state, index=0, seen=0)  # a newly granted permission changes no index
        wait = min(mirror.wait_seconds(state, table.max_age, hidden=bool(known)), self._file.due_in)
        asked = time.monotonic()
        try:
            query = self._client.blocking_query(self.prefix, index=state.index, wait=wait, timeout=table.deadline)
        except WaitCut as cut:
            self._state = mirror.after_cut(state, cut.seconds)
            return 0.0
        with query as response:
            began = time.monotonic()
            timed_out = state.index > 0 and began - asked >= wait
            seen = replace(state, filtered=response.filtered, behind=response.behind)
            self._state, pause = mirror.next_query(seen, response.index, changed=False, timed_out=False, load_seconds=0)
            if (seen.filtered and not state.filtered) or (state.behind and not seen.behind):
                # In which folders keys are hidden must be known before they are listed.
                self._state = replace(self._state, index=0, seen=0)
                return 0.0
            if response.index < state.index:
                return pause  # what a server that is behind lacks is not deleted
            if former is not None and (seen, response.index) == (state, state.seen) and not self._file.due:
                snapshot = former  # the same index and the same ACLs mean the same contents
            else:
                self._file.begin()
                builder = SnapshotBuilder(table, self.prefix, self._services, former)
                snapshot = _read_snapshot(self._client, response, builder, before, known, self._file.take)
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
        self.index, self.load_seconds = response.index, ended - began
        self._state, pause = mirror.next_query(
            seen, self.index, changed=changed, timed_out=timed_out, load_seconds=self.load_seconds
        )
        self._attempted.set()
        return pause

    def _report(self, former: Snapshot | None, snapshot: Snapshot) -> None:
        self.reloads += 1
        prefix = printable(self.prefix)
        if former is None:
            noun = "entry" if snapshot.size == 1 else "entries"
            log.info("%s: %d %s from Consul at %s", prefix, snapshot.size, noun, self._client.address)
        before = {} if former is None else former.hidden
        if snapshot.hidden.keys() != {name for name, each in before.items() if each.error is not mirror.NOTHING_YET}:
            if names := ", ".join(snapshot.hidden):
                reason = next(iter(snapshot.hidden.values())).error
                text = "%s: keys may be hidden under: %s; reading Consul for each key that is not listed there (%s)"
                log.warning(text, prefix, names, reason)
            else:
                log.warning("%s: all services readable again", prefix)
        self._warn_of_losses(former, snapshot)
        new: list[Problem] = []
        for name, entries in snapshot.entries.items():
            logged = set() if former is None else set(former.entries[name].problems)
            new += [problem for problem in entries.problems if problem not in logged]
        warn_of_problems(self._table.name, new)

    def _warn_of_losses(self, former: Snapshot | None, snapshot: Snapshot) -> None:
        """Log what may be a mistake: a wrong prefix, or a folder deleted in Consul."""
        if former is None and not snapshot.size and not snapshot.hidden:
            text = "%s: no entries: every lookup returns not-found (check the names of prefix and table in Consul)"
            log.warning(text, printable(self.prefix))
        for name, entries in snapshot.entries.items():
            count, left = 0 if former is None else len(former.entries[name]), len(entries)
            if left * 2 < count and name not in snapshot.hidden:
                path = printable(self._table.path(SERVICES[name]))
                noun, verb = "entry" if count == 1 else "entries", "is" if left == 1 else "are"
                log.warning("%s: %d of %d %s deleted at once; %d %s left", path, count - left, count, noun, left, verb)


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
        self._direct: DirectSource | None = None
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

    def entries(self, table: Table, service: Service, key: bytes | None, deadline: float) -> Entries:
        """The entries of the service, from memory; waits only while nothing has been read at all.

        Where an ACL hides some, Consul is asked for a key that is not in memory.

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
        """Have the watches reread token and TLS files and, if any of them is pausing, retry immediately.

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
