"""The copy of a mirror on disk, for a start without Consul: when it is written, and what may be believed of it.

Knows neither Consul nor threads. The file is as ``consul kv export`` writes it (file.py).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Sequence

from table_consul.errors import SourceError, printable
from table_consul.services import SERVICES, Table
from table_consul.sources.export import AtomicWriter, read_snapshot_file
from table_consul.sources.mirror import Snapshot, SnapshotBuilder

log = logging.getLogger("table_consul")

# A file of 100,000 entries is not written for each of a hundred edits.
WRITE_SECONDS = 10.0
# How often a file whose contents are still true is said to be: its time is what Consul last confirmed.
TOUCH_SECONDS = 60.0

Pairs = list[tuple[bytes, bytes | None]]


class SnapshotFile:
    """The file for one prefix of one table. That it cannot be written is told once, and keeps nothing from working."""

    def __init__(self, path: str, table: Table, prefix: bytes, services: Sequence[str]) -> None:
        self._path = path
        self._table = table
        self._prefix = prefix
        self._services = services
        self._written_at = -WRITE_SECONDS
        self._touched_at = 0.0
        self._fails = False
        self.outdated = True
        """Whether there is something that has not been written."""

    def writer(self) -> AtomicWriter | None:
        """What takes the entries of the next snapshot; None while it is too early for one, or there can be none."""
        if time.monotonic() - self._written_at < WRITE_SECONDS:
            return None
        try:
            return AtomicWriter(self._path)
        except OSError as error:
            self.failed(error)
            return None

    def failed(self, error: OSError) -> None:
        """Note that writing failed, and that it will for a while."""
        if not self._fails:
            log.warning("%s: not written: %s", self._path, error.strerror)
        self._fails = True
        self._written_at = time.monotonic()

    def finish(self, writer: AtomicWriter | None, snapshot: Snapshot, *, changed: bool) -> None:
        """Put what the writer took in its place, if it is worth that; or note that what is there still holds."""
        self.outdated = self.outdated or changed
        if not self.outdated:
            self._touch()
        if writer is None:
            return
        if not self.outdated or any(snapshot.entries[name] for name in snapshot.forbidden):
            writer.abandon()  # of a bucket that is known in part the copy would be worse than an older one
            return
        try:
            # A folder marks a bucket as known wholly: without it an empty one proves nothing when this is read again.
            known = (name for name in self._services if name not in snapshot.forbidden)
            writer.take([(path, b"") for path in paths(self._table, known).values()])
            writer.finish()
        except OSError as error:
            writer.abandon()
            self.failed(error)
            return
        self.outdated = self._fails = False
        self._written_at = self._touched_at = time.monotonic()

    def _touch(self) -> None:
        if time.monotonic() - self._touched_at < TOUCH_SECONDS:
            return
        self._touched_at = time.monotonic()
        try:
            os.utime(self._path, follow_symlinks=False)
        except OSError:
            self.outdated = True  # it is gone, or somebody else's: the next snapshot is written

    def restored(self) -> tuple[Snapshot, float] | None:
        """What the file holds, and how old that is in seconds; None, and a line in the log, if it is not to be used."""
        try:
            kept, written = read_snapshot_file(self._path)
            loading = loaded(self._table, self._prefix, self._services, kept, self._path)
        except FileNotFoundError:
            return None
        except SourceError as error:
            log.warning("%s", error)
            return None
        if loading is None:
            log.warning("%s: not used, as it holds nothing of %s", self._path, printable(self._prefix))
            return None
        snapshot = loading.finish(restored=True)
        age = max(0.0, time.time() - written)
        log.info("%s: %d entries of %.0f s ago from %s", printable(self._prefix), snapshot.size, age, self._path)
        return snapshot, age


def loaded(table: Table, prefix: bytes, services: Sequence[str], kept: Pairs, path: str) -> SnapshotBuilder | None:
    """What this file holds of the prefix, in the making; None if that is nothing.

    A service of which it neither has an entry nor says that there is none is not known to be empty.

    Raises:
        SourceError: there are more entries than the table may have.
    """
    marks = {key for key, _ in kept if key.endswith(b"/")}
    pairs = [pair for pair in kept if pair[0].startswith(prefix) and pair[0] not in marks]
    folders = paths(table, services)
    missing = {
        name: SourceError(f"{printable(folder)} is not in the copy {path}")
        for name, folder in folders.items()
        if folder not in marks and not any(key.startswith(folder) for key, _ in pairs)
    }
    if len(missing) == len(folders):
        return None
    loading = SnapshotBuilder(table, prefix, services, None, missing)
    loading.take(pairs)
    return loading


def paths(table: Table, services: Iterable[str]) -> dict[str, bytes]:
    """The folder in Consul of each of these services."""
    return {name: table.path(SERVICES[name]) for name in services}
