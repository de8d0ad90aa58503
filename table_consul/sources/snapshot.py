"""The last snapshot of a mirror on disk, for a start without Consul: when it is written, and how far it is trusted."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import re
import time
from collections.abc import Iterable, Sequence
from itertools import islice

import msgspec

from table_consul.errors import SourceError, counted, printable
from table_consul.files import AtomicWriter, open_regular_file
from table_consul.services import SERVICES, Table
from table_consul.sources.export import Exported, export_entry, iter_export
from table_consul.sources.hold import NEVER_HELD
from table_consul.sources.mirror import Hidden, Snapshot, SnapshotBuilder

log = logging.getLogger("table_consul")

# The value of a folder in which Consul hides keys.
INCOMPLETE = b"incomplete"
# The pause after a file was written, and for each second that writing took: a hundred edits do not write 100,000
# entries each, and writing 1,000,000 takes at most a tenth of the time.
WRITE_SECONDS = 10.0
# Failures in a row double the pause at most this many times, up to some 10 minutes.
DOUBLINGS_MAX = 6
# How many entries of a file are read at a time; other threads run in between.
STEP_ENTRIES = 200
# A file system may round times up, or have a clock of its own.
CLOCK_SECONDS = 5.0
# The end of a file that `finish` has written: the name of its table.
_OWNER = re.compile(rb'"table":("(?:[^"\\]|\\.)*")\}\n\]\n\Z')
_OWNER_BYTES = 4096


class SnapshotFile:
    """The file for one prefix of one table; none if the path is empty.

    A failure to write it is logged once, and so is the recovery. It never replaces the snapshot of another table, which
    has the same path if that lacks ``{table}``.
    """

    def __init__(self, path: str, table: Table, prefix: bytes, services: Sequence[str]) -> None:
        self._path = path
        self._table = table
        self._prefix = prefix
        self._services = services
        self._write_after = 0.0
        self._began = 0.0
        self._failures = 0
        self._writer: AtomicWriter | None = None
        self.dirty = bool(path)
        """Whether the latest snapshot has not been written."""

    @property
    def due_in(self) -> float:
        """Seconds until the latest snapshot may be written; infinite if there is nothing to wait for."""
        left = self._write_after - time.monotonic()
        return left if left > 0 and self.dirty else math.inf

    @property
    def due(self) -> bool:
        """Whether the latest snapshot has not been written and may be now."""
        return self.dirty and time.monotonic() >= self._write_after

    def begin(self) -> None:
        """Start a new version, unless it is too early for one; `take`, and `finish` or `discard`, follow."""
        self._began = time.monotonic()
        if self._path and self._began >= self._write_after:
            self._write(b"[\n")

    def take(self, pairs: Iterable[tuple[bytes, bytes | None]]) -> None:
        """Write entries of the new version, so that they need not stay in memory."""
        if self._writer is not None:
            self._write(b"".join(export_entry(key, value or b"") + b",\n" for key, value in pairs))

    def _write_held(self, snapshot: Snapshot) -> None:
        """Write the held entries that the present file contains, so that a restart holds them again.

        A record that also holds a password is left out: without Consul it would let its user log in again.
        """
        revoked = tuple(self._table.path(SERVICES[name]) for name in NEVER_HELD)
        paths = {name: self._table.path(SERVICES[name]) for name in snapshot.held}
        held = {paths[name] + key for name, each in snapshot.held.items() for key in each.keys.values()}
        held = {key for key in held if not key.startswith(revoked)}
        with contextlib.suppress(OSError, SourceError), open(self._path, "rb", opener=open_regular_file) as file:
            if not _is_ours(os.fstat(file.fileno())):
                return
            pairs = ((each.key, each.value) for each in iter_export(file) if each.key in held)
            while step := [*islice(pairs, STEP_ENTRIES)]:
                self.take(step)

    def finish(self, snapshot: Snapshot, *, changed: bool) -> None:
        """Put the new version in place if anything has changed; otherwise update the time of the file."""
        if not self._path:
            return
        self.dirty = self.dirty or changed
        if not self.dirty:
            try:
                self._check_owner()
                os.utime(self._path, follow_symlinks=False)  # the time of Consul's last confirmation
            except OSError:
                self.dirty = True  # it is missing or not ours: the next snapshot is written
        if not self.dirty or (not snapshot.size and snapshot.hidden.keys() >= {*self._services}):
            self.discard()
        elif self._writer is not None:
            if snapshot.held:
                self._write_held(snapshot)
            # Each folder has a mark, without which an empty one would prove nothing when the file is read.
            *others, last = (
                (self._table.path(SERVICES[name]), INCOMPLETE if name in snapshot.hidden else b"")
                for name in self._services
            )
            marks = [export_entry(*mark) for mark in others] + [export_entry(*last, table=self._table.name)]
            self._write(b",\n".join(marks) + b"\n]\n", last=True)

    def _write(self, data: bytes, *, last: bool = False) -> None:
        try:
            self._writer = self._writer or AtomicWriter(self._path)
            self._writer.write(data)
            if not last:
                return
            self._check_owner()
            self._writer.commit()
        except OSError as error:
            self.discard()
            if not self._failures:
                log.warning("%s: not written: %s", self._path, error.strerror)
            self._failures += 1
        else:
            if self._failures:
                log.warning("%s: written again", self._path)
            self._writer, self.dirty, self._failures = None, False, 0
        now, doubled = time.monotonic(), 2.0 ** min(self._failures, DOUBLINGS_MAX)
        self._write_after = now + WRITE_SECONDS * doubled * max(1.0, now - self._began)

    def _check_owner(self) -> None:
        """Check that this file may be replaced.

        Raises:
            OSError: it names another table or, as files of older versions, none and has no keys of this one.
        """
        unread = (FileNotFoundError, PermissionError, SourceError)
        with contextlib.suppress(*unread), open(self._path, "rb", opener=open_regular_file) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _OWNER_BYTES))
            if owner := _OWNER.search(file.read()):
                name = msgspec.json.decode(owner[1], type=str)
                others = name != self._table.name
            else:
                file.seek(0)
                name, keys = "", [each.key for each in iter_export(file)]
                others = bool(keys) and not any(key.startswith(self._prefix) for key in keys)
            if others:
                whose = f"table {printable(name)}" if name else "another table"
                hint = "put {table} into the path, or remove the file"
                raise OSError(errno.EEXIST, f"it is the snapshot of {whose} ({hint})")

    def discard(self) -> None:
        """Remove the new version and leave the file unchanged."""
        if self._writer is not None:
            self._writer.discard()
            self._writer = None

    def load(self) -> tuple[Snapshot, float] | None:
        """The snapshot in the file and its age in seconds; None, with a log line if the file is ignored."""
        try:
            with open(self._path, "rb", opener=open_regular_file) as file:
                status = os.fstat(file.fileno())
                exported = iter_export(file)
                snapshot = snapshot_from_export(self._table, self._prefix, self._services, exported, self._path)
        except FileNotFoundError:
            return None
        except (OSError, SourceError) as error:
            log.warning("%s: ignored: %s", self._path, getattr(error, "strerror", error))
            return None
        if status.st_uid != os.geteuid():
            log.warning("%s: ignored: owned by another user", self._path)
            return None
        if not _is_ours(status):  # it may hold password hashes
            log.warning("%s: ignored: other users may read or write it (set mode 0600)", self._path)
            return None
        if snapshot is None:
            log.warning("%s: ignored: contains no keys under %s", self._path, printable(self._prefix))
            return None
        age = time.time() - status.st_mtime
        if age < -CLOCK_SECONDS:
            text = "%s: ignored: dated %s in the future, so its age is unknown (check the clock)"
            log.warning(text, self._path, counted(round(-age), "second", "seconds"))
            return None
        entries = counted(snapshot.size, "entry", "entries")
        log.info("%s: %s from %s (%.0f s old)", printable(self._prefix), entries, self._path, max(age, 0.0))
        return snapshot, max(age, 0.0)


def _is_ours(status: os.stat_result) -> bool:
    """Whether a file belongs to this user, and no other user may read or write it."""
    return status.st_uid == os.geteuid() and not status.st_mode & 0o077


def snapshot_from_export(
    table: Table, prefix: bytes, services: Sequence[str], exported: Iterable[Exported], path: str
) -> Snapshot | None:
    """The entries of this file below the prefix; None if there are none.

    A service with neither an entry nor a folder in the file is not known to be empty.

    Raises:
        SourceError: there are more entries than the table may have, or as `iter_export`.
    """
    builder = SnapshotBuilder(table, prefix, services, None)
    folders = {name: table.path(SERVICES[name]) for name in services}
    marks: dict[bytes, bytes] = {}
    absent, empty, exported = {*services}, True, iter(exported)
    while step := [*islice(exported, STEP_ENTRIES)]:
        marks.update((each.key, each.value) for each in step if each.key.endswith(b"/"))
        pairs = [(key, value) for key, value, _ in step if key.startswith(prefix) and not key.endswith(b"/")]
        builder.take(pairs)
        empty = empty and not pairs
        absent -= {name for name in absent if any(key.startswith(folders[name]) for key, _ in pairs)}
    hidden = {}
    for name, folder in folders.items():
        if marks.get(folder) == INCOMPLETE:
            hidden[name] = Hidden(SourceError(f"{printable(folder)} is incomplete in the snapshot {path}"), {})
        elif folder not in marks and name in absent:
            hidden[name] = Hidden(SourceError(f"{printable(folder)} is not in the snapshot {path}"), {})
    return None if empty and len(hidden) == len(services) else builder.finish(hidden, restored=True)
