"""Files as ``consul kv export`` writes them: one as a source, one that a mirror keeps for a start without Consul."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from base64 import b64decode
from pathlib import Path
from typing import BinaryIO

import msgspec

from table_consul.errors import UNDECODABLE, SourceError
from table_consul.services import Service, Table
from table_consul.services.entries import Entries

log = logging.getLogger("table_consul")

# In base64 what transport.py takes from Consul, and the keys.
FILE_LIMIT_BYTES = 256 << 20


class Exported(msgspec.Struct):
    """One entry of ``consul kv export`` (developer.hashicorp.com/consul/commands/kv/export)."""

    key: str
    value: str | None = None
    flags: int = 0


_decoder = msgspec.json.Decoder(list[Exported])
_encoder = msgspec.json.Encoder()


def read_export(data: bytes) -> list[tuple[bytes, bytes | None]]:
    """Keys and values of a ``consul kv export``, in its order.

    Raises:
        SourceError: this is no such file, or it was cut off.
    """
    try:
        return [(entry.key.encode(), b64decode(entry.value or "", validate=True)) for entry in _decoder.decode(data)]
    except UNDECODABLE as error:
        raise SourceError(f"this is no output of `consul kv export`: {error}") from None


def read_bounded(file: BinaryIO) -> bytes:
    """All of an open file.

    Raises:
        SourceError: it is larger than an export can be that a mail host should hold in memory, as /dev/zero is.
    """
    data = file.read(FILE_LIMIT_BYTES + 1)
    if len(data) > FILE_LIMIT_BYTES:
        raise SourceError(f"larger than {FILE_LIMIT_BYTES >> 20} MiB")
    return data


class AtomicWriter:
    """Writes an export in steps, under a temporary name; whoever reads the real name finds a whole file, old or new."""

    def __init__(self, path: str) -> None:
        """Start writing.

        Raises:
            OSError: as writing to files does, here and below.
        """
        self._path = path
        self._partial = f"{path}.{os.getpid()}.tmp"
        descriptor = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        os.fchmod(descriptor, 0o600)
        self._file = os.fdopen(descriptor, "wb")
        self._separator = b"[\n"

    def take(self, pairs: list[tuple[bytes, bytes | None]]) -> None:
        """Write some entries."""
        for key, value in pairs:
            self._file.write(
                self._separator + _encoder.encode({"key": key.decode(), "flags": 0, "value": value or b""})
            )
            self._separator = b",\n"

    def finish(self) -> None:
        """Put the file in its place, on disk for good."""
        with self._file as file:
            file.write(b"\n]\n" if self._separator == b",\n" else b"[]\n")
            file.flush()
            os.fsync(file.fileno())
        os.rename(self._partial, self._path)
        folder = os.open(os.path.dirname(self._path) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def abandon(self) -> None:
        """Leave the old file as it is."""
        with contextlib.suppress(OSError):  # on a full disk closing fails as writing did
            self._file.close()
        with contextlib.suppress(OSError):
            os.unlink(self._partial)


def read_snapshot_file(path: str) -> tuple[list[tuple[bytes, bytes | None]], float]:
    """What a AtomicWriter wrote, in ascending order of keys, and when (seconds since the epoch).

    Raises:
        FileNotFoundError: there is none yet.
        SourceError: others could read it or have written it (it may hold password hashes), or it is damaged.
    """
    try:
        with open(path, "rb") as file:
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


class FileSource:
    """A source that reads its file again whenever it has changed. A bad version leaves the last good one standing."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._seen: tuple[int, int, int] | None = None
        self._pairs: list[tuple[bytes, bytes | None]] | None = None
        self._error: SourceError | None = None
        self._buckets: dict[tuple[str, str], Entries] = {}

    def entries(self, table: Table, service: Service, key: bytes | None, deadline: float) -> Entries:  # noqa: ARG002
        """See responder.Source. Never waits: the file is local."""
        self._refresh()
        if self._pairs is None:
            raise self._error or SourceError(f"{self._path}: not read yet")
        place = (table.name, service.name)
        bucket = self._buckets.get(place)
        if bucket is None or bucket.table != table:
            path = table.path(service)
            entries = ((key[len(path) :], value) for key, value in self._pairs if key.startswith(path))
            self._buckets[place] = bucket = Entries(table, service, entries)
            for problem in bucket.problems:
                log.warning("%s", problem)
        return bucket

    def update(self) -> None:
        """Read the file again even if it looks the same.

        Raises:
            SourceError: it is no good; the last good version goes on answering.
        """
        self._seen = None
        self._refresh()
        if self._error is not None:
            raise self._error

    def _refresh(self) -> None:
        try:
            with open(self._path, "rb", opener=open_regular_file) as file:
                status = os.fstat(file.fileno())
                seen = (status.st_mtime_ns, status.st_ino, status.st_size)
                if seen == self._seen:
                    return
                pairs = read_export(read_bounded(file))
        except OSError as error:
            self._complain(SourceError(f"{self._path}: {error.strerror}"))
            return
        except SourceError as error:
            self._complain(SourceError(f"{self._path}: {error}"))
            return
        if self._error is not None:
            log.warning("%s: good again", self._path)
        self._seen, self._pairs, self._buckets, self._error = seen, pairs, {}, None

    def _complain(self, error: SourceError) -> None:
        if str(error) != str(self._error):
            state = "answering error" if self._pairs is None else "answering from its last good version"
            log.warning("%s; %s", error, state)
        self._seen, self._error = None, error


def open_regular_file(path: str, flags: int) -> int:
    """An opener for open() that takes nothing but files: no wait for a named pipe's writer, no device without end."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # open() itself refuses folders
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, f"a {'named pipe' if stat.S_ISFIFO(mode) else 'device'}, not a file", path)
