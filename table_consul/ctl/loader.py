"""Where the control command has tables from: what the daemon reads, by the daemon's own code, but read once.

Remembers what stood in the store as it stood there, which a bucket does not, for whoever explains or judges it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from table_consul import kv
from table_consul.ctl.main import duration
from table_consul.errors import SourceError, TooLarge, printable
from table_consul.services import Service, Table, fold_key
from table_consul.services.entries import Entries
from table_consul.sources import PROBE, Source
from table_consul.sources.direct import DirectSource
from table_consul.sources.export import FileSource, open_regular_file, read_bounded, read_export
from table_consul.sources.mirror import Mirror
from table_consul.sources.snapshot import paths, snapshot_from_export
from table_consul.sources.watch import load_once

if TYPE_CHECKING:
    from table_consul.config import Config, ConsulConfig

Stored = Mapping[bytes, bytes | None]
"""Whole keys and values as they stand in the store."""


class Client(kv.Client):
    """A client that remembers what it has read."""

    def __init__(self, settings: ConsulConfig) -> None:
        super().__init__(settings)
        self.entries: dict[bytes, bytes | None] = {}
        self.reads: list[bytes] = []
        """The keys and folders that were read, without those that only prove that a folder may be."""

    def get(self, key: bytes, *, timeout: float) -> kv.Pair | None:
        pair = super().get(key, timeout=timeout)
        if not key.endswith(b"/" + PROBE):
            self.reads.append(key)
        if pair is None:
            self.entries.pop(key, None)
        else:
            self.entries[key] = pair.value
        return pair

    def list(self, prefix: bytes, *, timeout: float) -> kv.Page:
        page = super().list(prefix, timeout=timeout)
        self.reads.append(prefix)
        self.entries.update((pair.key, pair.value) for pair in page.pairs)
        return page


class Place:
    """A source that was read, what stands there, and its name for a reader."""

    def __init__(self, source: Source, entries: Callable[[], Stored], origin: Callable[[], str]) -> None:
        self.source = source
        self.reads: list[bytes] | None = None
        """What was read, where that is not the folder as a whole."""
        self.large = False
        """It is read directly as it has too many keys."""
        self._entries = entries
        self._origin = origin

    @property
    def entries(self) -> Stored:
        """What stands there; of a table that is read directly, what has been read so far."""
        return self._entries()

    @property
    def origin(self) -> str:
        """Where that is, such as ``Consul at http://127.0.0.1:8500, index 17``; empty if it could not be read."""
        return self._origin()


class Kept:
    """A source that answers from a mirror, of whatever age: that of a copy is told, not judged."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror

    def entries(self, table: Table, service: Service, key: bytes | None, deadline: float) -> Entries:  # noqa: ARG002
        """See responder.Source."""
        assert self._mirror.state is not None
        return self._mirror.entries(service.name, key, self._mirror.state[1])

    def update(self) -> None:
        """See responder.Source."""


class Lost:
    """A source that could not be read, and is not tried again for each key."""

    def __init__(self, error: SourceError) -> None:
        self._error = error

    def entries(self, table: Table, service: Service, key: bytes | None, deadline: float) -> Entries:  # noqa: ARG002
        """See responder.Source."""
        raise self._error.with_traceback(None)

    def update(self) -> None:
        """See responder.Source."""


class Reading:
    """The source of every table, as sources.Tables, but for one command: each folder is read once."""

    def __init__(self, config: Config, *, live: bool = False) -> None:
        """``live`` passes by the copies on disk (``snapshot``)."""
        self._config = config
        self._live = live
        self._places: dict[tuple[str, bytes], Place] = {}
        self._direct: Place | None = None
        self._file: Place | None = None

    def entries(self, table: Table, service: Service, key: bytes | None, deadline: float) -> Entries:
        """See responder.Source."""
        return self.place(table, service).source.entries(table, service, key, deadline)

    def update(self) -> None:
        """See responder.Source."""

    def place(self, table: Table, service: Service) -> Place:
        """Where the entries of this service are read; a source that cannot be read raises when it is asked."""
        address = self._config.consul.addresses[0]
        if address.startswith("file://"):
            self._file = self._file or _file(address.removeprefix("file://"))
            return self._file
        folders = table.folders()
        number, prefix = next((n, p) for n, (p, names) in enumerate(folders.items()) if service.name in names)
        place = self._places.get((table.name, prefix))
        if place is None:
            place = self._places[table.name, prefix] = self._read(table, number, prefix, folders[prefix])
        return place

    def client(self) -> Client:
        """Another client of the configured Consul."""
        return Client(self._config.consul)

    def _read(self, table: Table, number: int, prefix: bytes, services: list[str]) -> Place:
        if table.mode == "direct":
            return self._directly()
        try:
            if table.snapshot and not self._live:
                copy = _copy(table, table.snapshot + (f".{number}" if number else ""), prefix, services)
                if copy is not None:
                    return copy
            client = self.client()
            client.entries.clear()
            found, index = load_once(client, table, prefix, services, client.entries.update)
        except TooLarge:
            return self._directly(f" (more than max_keys = {table.max_keys})")
        except SourceError as error:
            return Place(Lost(error), dict, str)
        origin = f"Consul at {client.address}, index {index}"
        client.close()
        mirror = Mirror(table.max_age)
        mirror.replace(found, 0.0)
        return Place(Kept(mirror), lambda: client.entries, lambda: origin)

    def _directly(self, why: str = "") -> Place:
        if self._direct is None:
            client = self.client()
            self._direct = Place(
                DirectSource(client), lambda: client.entries, lambda: f"Consul at {client.address}, read directly"
            )
            self._direct.reads = client.reads
        if not why:
            return self._direct
        direct = self._direct
        place = Place(direct.source, lambda: direct.entries, lambda: direct.origin + why)
        place.reads, place.large = direct.reads, True
        return place


def _file(path: str) -> Place:
    known: dict[tuple[int, int], Stored] = {}

    def entries() -> Stored:
        with open(path, "rb", opener=open_regular_file) as file:
            status = os.fstat(file.fileno())
            version = (status.st_mtime_ns, status.st_ino)
            if version not in known:
                known.clear()
                known[version] = {each.key: each.value for each in read_export(read_bounded(file))}
        return known[version]

    return Place(FileSource(path), entries, lambda: printable(path))


def _copy(table: Table, path: str, prefix: bytes, services: list[str]) -> Place | None:
    """The copy that the daemon keeps of this folder; None where the daemon, too, would go to Consul.

    What the daemon does not trust (others may have written it) is good enough to be looked at.

    Raises:
        SourceError: there is a copy, but it cannot be read.
    """
    try:
        with open(path, "rb", opener=open_regular_file) as file:
            written = os.fstat(file.fileno()).st_mtime
            kept = sorted(read_export(read_bounded(file)))
    except FileNotFoundError:
        return None
    except OSError as error:
        whose = "its owner may read it, and " if isinstance(error, PermissionError) else ""
        raise SourceError(f"{path}: {(error.strerror or str(error)).lower()}; {whose}--live asks Consul") from None
    except SourceError as error:
        raise SourceError(f"{path}: the copy is damaged, and --live asks Consul: {error}") from None
    loading = snapshot_from_export(table, prefix, services, kept, f"{path}; --live asks Consul")
    if loading is None:
        return None
    mirror = Mirror(table.max_age)
    mirror.replace(loading.finish(restored=True), 0.0)
    folders = set(paths(table, services).values())
    entries = {each.key: each.value for each in kept if each.key not in folders}
    origin = f"{printable(path)}, written {duration(time.time() - written)} ago"
    return Place(Kept(mirror), lambda: entries, lambda: origin)


def below(entries: Stored, folder: bytes) -> Iterator[tuple[bytes, bytes | None]]:
    """Those entries that stand below the folder, by their whole keys."""
    return ((key, value) for key, value in entries.items() if key.startswith(folder))


def spelled(entries: Stored, folder: bytes) -> dict[bytes, bytes]:
    """How each key of the folder that is asked for is spelled in the store; of several spellings the one that answers.

    See services.py, EntriesBuilder: the one in lower case, else the first.
    """
    found: dict[bytes, bytes] = {}
    for key, _ in below(entries, folder):
        name = key[len(folder) :]
        if fold_key(name) == name:
            found[name] = name
        else:
            found.setdefault(fold_key(name), name)
    return found
