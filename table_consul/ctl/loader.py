"""Load the tables of one command, each once: from Consul, a snapshot file, or the file of a file:// address."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from msgspec.structs import replace

from table_consul import kv
from table_consul.config import Config
from table_consul.ctl.main import duration, patience
from table_consul.errors import SourceError, TooLarge, printable
from table_consul.files import open_regular_file
from table_consul.services import Service, Table
from table_consul.services.entries import Entries
from table_consul.sources import direct, export, mirror, reading, snapshot

# How long a command waits for the first byte of a large table, after Consul has returned one key.
LOAD_SECONDS = 30.0

Pairs = Mapping[bytes, bytes | None]
"""Whole keys and values, as they are stored."""


class Loaded(NamedTuple):
    """The entries of some services of a table, and the pairs that they come from."""

    origin: Callable[[], str]
    """Such as ``Consul at http://127.0.0.1:8500, index 17``."""
    pairs: Pairs
    """Everything that was read; if ``direct``, everything so far."""
    entries: Callable[[Table, Service, bytes | None, float], Entries]
    """As `Source.entries`."""
    direct: bool = False
    """Each lookup reads a key or a folder from Consul, as configured or because of ``max_keys``."""
    saved: bool = False
    """Read from the snapshot file of the daemon, which may be some seconds older than Consul."""


class Loader:
    """Loads tables for one command; with ``live``, from Consul even if there is a snapshot file.

    Failures are cached: they cost one timeout, not one per key.
    """

    def __init__(self, config: Config, *, live: bool = False) -> None:
        self._config = config
        self._live = live
        self._source: direct.DirectSource
        self._loaded: dict[tuple[str, bytes], Loaded | SourceError] = {}
        self._read_file = functools.cache(read_file)

    def load(self, table: Table, service: Service) -> Loaded:
        """The data with the entries of this service.

        Raises:
            SourceError: the data cannot be read.
        """
        folders = enumerate(table.folders().items())
        number, prefix, services = next((n, p, names) for n, (p, names) in folders if service.name in names)
        at = (table.name, prefix)
        if at not in self._loaded:
            try:
                with patience(f"reading {printable(prefix)}"):
                    self._loaded[at] = self._load(table, number, prefix, services)
            except TooLarge:
                origin = f"{self._direct.origin()} (more than max_keys = {table.max_keys})"
                self._loaded[at] = self._direct._replace(origin=lambda: origin)
            except SourceError as error:
                self._loaded[at] = error
        if isinstance(found := self._loaded[at], SourceError):
            raise found.with_traceback(None)  # each raise would extend the traceback
        return found

    def _load(self, table: Table, number: int, prefix: bytes, services: Sequence[str]) -> Loaded:
        file = self._config.consul.file
        if file is not None:
            pairs = [(each.key, each.value) for each in self._read_file(file)[0]]
            builder = mirror.SnapshotBuilder(replace(table, max_keys=len(pairs)), prefix, services, None)
            builder.take(pairs)
            return self._mirrored(builder.finish({}), printable(file), dict(pairs))
        if table.mode == "direct":
            return self._direct
        if table.snapshot and not self._live:
            path, hint = table.snapshot + (f".{number}" if number else ""), " (use --live to read Consul)"
            exported, written = self._read_file(path, hint)
            kept = snapshot.snapshot_from_export(table, prefix, services, exported, path + hint)
            if kept is not None:  # otherwise the file has no keys of this table
                age = time.time() - written
                when = f"written {duration(age)} ago" if age >= 0 else "dated in the future"
                origin = f"{printable(path)}, {when}"
                loaded = self._mirrored(kept, origin, {each.key: each.value for each in exported})
                return loaded._replace(saved=True)
        stored: dict[bytes, bytes | None] = {}
        with contextlib.closing(kv.Client(self._config.consul)) as client:
            found, index = load_once(client, table, prefix, services, stored.update)
            return self._mirrored(found, f"Consul at {client.address}, index {index}", stored)

    @functools.cached_property
    def _direct(self) -> Loaded:
        client = _RecordingClient(self._config.consul)
        client.pairs = {}
        origin = lambda: f"Consul at {client.address}, read directly"  # noqa: E731 - the address may change
        self._source = direct.DirectSource(client)
        return Loaded(origin, client.pairs, self._source.entries, direct=True)

    def _mirrored(self, found: mirror.Snapshot, origin: str, pairs: dict[bytes, bytes | None]) -> Loaded:
        latest = mirror.Mirror(max_age=0.0)  # the age of a snapshot file is printed, not checked
        latest.state = (found, 0.0)

        def entries(table: Table, service: Service, key: bytes | None, deadline: float) -> Entries:
            try:
                return latest.entries(service.name, key, 0.0)
            except mirror.Unlisted as unlisted:
                directly = self._direct
                try:
                    return self._source.entries_hidden(unlisted, table, service, key, deadline)
                finally:
                    pairs.update(directly.pairs)

        return Loaded(lambda: origin, pairs, entries)


def load_once(
    client: kv.Client, table: Table, prefix: bytes, names: Sequence[str], take: reading.Take
) -> tuple[mirror.Snapshot, int]:
    """The entries below the prefix as a watch would find them, and Consul's index; ``take`` gets the pairs.

    Raises:
        SourceError: Consul cannot be read; TooLarge if a watch would fall back to direct mode.
    """
    before = reading.hidden_services(client, table, names, {}, filtered=True)
    builder = mirror.SnapshotBuilder(table, prefix, names, None)
    with client.blocking_query(prefix, timeout=LOAD_SECONDS) as response:
        return reading.read_snapshot(client, response, builder, before, {}, take), response.index


def read_file(path: str, hint: str = "") -> tuple[list[export.Exported], float]:
    """The sorted entries of an export, and its modification time.

    Unlike the daemon, this accepts a snapshot file that others can read. With a ``hint``, which ends the text of an
    error, a missing file has no entries.

    Raises:
        SourceError: the file cannot be read.
    """
    try:
        with open(path, "rb", opener=open_regular_file) as file:
            return sorted(export.iter_export(file)), os.fstat(file.fileno()).st_mtime
    except (OSError, SourceError) as error:
        if hint and isinstance(error, FileNotFoundError):
            return [], 0.0
        raise SourceError(f"{path}: {getattr(error, 'strerror', error)}{hint}") from None


class _RecordingClient(kv.Client):
    """A client that keeps the pairs it has read."""

    pairs: dict[bytes, bytes | None]

    def get(self, key: bytes, **options: Any) -> kv.Pair | None:  # noqa: ANN401 - passed on
        pair = super().get(key, **options)
        if pair is not None:
            self.pairs[key] = pair.value
        return pair

    def visible(self, prefix: bytes, **options: Any) -> tuple[Sequence[kv.Pair], bool]:  # noqa: ANN401 - passed on
        found, hides = super().visible(prefix, **options)
        self.pairs.update((pair.key, pair.value) for pair in found)
        return found, hides
