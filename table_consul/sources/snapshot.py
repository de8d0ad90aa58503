"""The last snapshot of a mirror on disk, for a start without Consul: when it is written, and how far it is trusted."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Sequence

from table_consul.errors import SourceError, printable
from table_consul.files import AtomicWriter, open_regular_file, read_bounded
from table_consul.services import SERVICES, Table
from table_consul.sources.export import Exported, export_entry, read_export
from table_consul.sources.mirror import Snapshot, SnapshotBuilder

log = logging.getLogger("table_consul")

# A file of 100,000 entries is not written for each of a hundred edits.
WRITE_SECONDS = 10.0


class SnapshotFile:
    """The file for one prefix of one table. A failure to write is logged once, and affects nothing else."""

    def __init__(
        self,
        path: str,
        table: Table,
        prefix: bytes,
        services: Sequence[str],
        *,
        write_seconds: float = WRITE_SECONDS,
    ) -> None:
        self._path = path
        self._table = table
        self._prefix = prefix
        self._services = services
        self._write_seconds = write_seconds
        self._write_after = 0.0
        self._fails = False
        self._writer: AtomicWriter | None = None
        self._empty = True
        self.dirty = True
        """Whether the latest snapshot has not been written."""

    @property
    def due_in(self) -> float | None:
        """Seconds until it is no longer too early to write the latest snapshot; None if that is nothing to wait for."""
        left = self._write_after - time.monotonic()
        return left if left > 0 and self.dirty and not self._fails else None

    def begin(self) -> None:
        """Start a new version, unless it is too early for one; entries, and `finish` or `discard`, follow."""
        if time.monotonic() < self._write_after:
            return
        try:
            self._writer, self._empty = AtomicWriter(self._path), True
        except OSError as error:
            self._fail(error)

    def write(self, pairs: Iterable[tuple[bytes, bytes | None]]) -> None:
        """Write entries of the version that was begun."""
        if self._writer is None:
            return
        try:
            for key, value in pairs:
                self._writer.write((b"[\n" if self._empty else b",\n") + export_entry(key, value or b""))
                self._empty = False
        except OSError as error:
            self._fail(error)

    def finish(self, snapshot: Snapshot, *, changed: bool) -> None:
        """Put the new version in place, if it is worth that; or note that the file is still true."""
        self.dirty = self.dirty or changed
        if not self.dirty:
            try:
                os.utime(self._path, follow_symlinks=False)  # the file is as old as what Consul last confirmed
            except OSError:
                self.dirty = True  # it is gone, or somebody else's: the next snapshot is written
        if not self.dirty or any(snapshot.entries[name] for name in snapshot.forbidden):
            self.discard()  # a file with a part of a service's entries would be worse than an older one
        # A folder marks a service as known wholly: without it an empty one proves nothing when this is read again.
        known = [name for name in self._services if name not in snapshot.forbidden]
        self.write((path, b"") for path in paths(self._table, known).values())
        if self._writer is None:
            return
        try:
            self._writer.write(b"[]\n" if self._empty else b"\n]\n")
            self._writer.commit()
        except OSError as error:
            self._fail(error)
            return
        self._writer = None
        self.dirty = self._fails = False
        self._write_after = time.monotonic() + self._write_seconds

    def discard(self) -> None:
        """Leave the file as it is."""
        if self._writer is not None:
            self._writer.discard()
            self._writer = None

    def _fail(self, error: OSError) -> None:
        self.discard()
        if not self._fails:
            log.warning("%s: not written: %s", self._path, error.strerror)
        self._fails = True
        self._write_after = time.monotonic() + self._write_seconds

    def load(self) -> tuple[Snapshot, float] | None:
        """The snapshot in the file and its age in seconds; None, with a log line if the file cannot be used."""
        try:
            entries, written = read_snapshot_file(self._path)
            builder = snapshot_from_export(self._table, self._prefix, self._services, entries, self._path)
        except FileNotFoundError:
            return None
        except SourceError as error:
            log.warning("%s", error)
            return None
        if builder is None:
            log.warning("%s: ignored: contains no keys under %s", self._path, printable(self._prefix))
            return None
        snapshot = builder.finish(restored=True)
        age = max(0.0, time.time() - written)
        log.info("%s: %d entries of %.0f s ago from %s", printable(self._prefix), snapshot.size, age, self._path)
        return snapshot, age


def read_snapshot_file(path: str) -> tuple[list[Exported], float]:
    """The entries of a snapshot file, in ascending order of keys, and when it was written (seconds since the epoch).

    Raises:
        FileNotFoundError: there is none yet.
        SourceError: others can read it or have written it (it may hold password hashes), or it is damaged.
    """
    try:
        with open(path, "rb", opener=open_regular_file) as file:
            status = os.fstat(file.fileno())
            data = read_bounded(file)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from None
    except SourceError as error:
        raise SourceError(f"{path}: not used: {error}") from None
    if status.st_mode & 0o077 or status.st_uid != os.geteuid():
        raise SourceError(f"{path}: not used, as it belongs to another user or others may read it (allowed: mode 0600)")
    try:
        return sorted(read_export(data)), status.st_mtime
    except SourceError as error:
        raise SourceError(f"{path}: not used, as it is damaged: {error}") from None


def snapshot_from_export(
    table: Table, prefix: bytes, services: Sequence[str], exported: Sequence[Exported], path: str
) -> SnapshotBuilder | None:
    """A builder with the entries of this file below the prefix; None if there are none.

    A service of which the file has neither an entry nor the folder is not known to be empty.

    Raises:
        SourceError: there are more entries than the table may have.
    """
    marks = {each.key for each in exported if each.key.endswith(b"/")}
    pairs = [(each.key, each.value) for each in exported if each.key.startswith(prefix) and each.key not in marks]
    folders = paths(table, services)
    missing = {
        name: SourceError(f"{printable(folder)} is not in the copy {path}")
        for name, folder in folders.items()
        if folder not in marks and not any(key.startswith(folder) for key, _ in pairs)
    }
    if len(missing) == len(folders):
        return None
    builder = SnapshotBuilder(table, prefix, services, None, missing)
    builder.take(pairs)
    return builder


def paths(table: Table, services: Iterable[str]) -> dict[str, bytes]:
    """The folder in Consul of each of these services."""
    return {name: table.path(SERVICES[name]) for name in services}
