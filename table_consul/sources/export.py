"""The format of ``consul kv export``, and a file in it as the source of a table (``address = "file://..."``)."""

from __future__ import annotations

import logging
import os
from base64 import b64decode
from typing import NamedTuple

import msgspec

from table_consul.errors import UNDECODABLE, SourceError
from table_consul.files import AtomicWriter, open_regular_file, read_bounded
from table_consul.services import Service, Table
from table_consul.services.entries import Entries

__all__ = ["AtomicWriter", "Exported", "FileSource", "export_entry", "open_regular_file", "read_bounded", "read_export"]

log = logging.getLogger("table_consul")


class Exported(NamedTuple):
    """One entry of an export, with its whole key."""

    key: bytes
    value: bytes
    flags: int = 0


class _Entry(msgspec.Struct):
    """As the file has it (developer.hashicorp.com/consul/commands/kv/export)."""

    key: str
    value: str | None = None  # not bytes: msgspec would refuse the line breaks that b64decode refuses, but say less
    flags: int = 0


_decoder = msgspec.json.Decoder(list[_Entry])
_encoder = msgspec.json.Encoder()


def read_export(data: bytes) -> list[Exported]:
    """The entries of a ``consul kv export``, in its order.

    Raises:
        SourceError: the data are something else, or were cut off.
    """
    try:
        return [
            Exported(entry.key.encode(), b64decode(entry.value or "", validate=True), entry.flags)
            for entry in _decoder.decode(data)
        ]
    except UNDECODABLE as error:
        raise SourceError(f"not the output of `consul kv export`: {error}") from None


def export_entry(key: bytes, value: bytes, flags: int = 0) -> bytes:
    """One entry as JSON; an export is a JSON list of them."""
    return _encoder.encode({"key": key.decode(), "flags": flags, "value": value})


class FileSource:
    """A source that reads its file again whenever it has changed. A bad version leaves the last good one answering."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        """Of the version that was read last, good or bad."""
        self._pairs: list[Exported] | None = None
        self._error: SourceError | None = None
        self._entries: dict[tuple[str, str], Entries] = {}

    def entries(self, table: Table, service: Service, key: bytes | None, deadline: float) -> Entries:  # noqa: ARG002 - never waits: the file is local
        """All entries of the service.

        Raises:
            SourceError: there has been no good version of the file yet.
        """
        self._refresh()
        if self._pairs is None:
            raise (self._error or SourceError(f"{self._path}: not read yet")).with_traceback(None)
        entries = self._entries.get((table.name, service.name))
        if entries is None or entries.table != table:
            path = table.path(service)
            below = ((each.key[len(path) :], each.value) for each in self._pairs if each.key.startswith(path))
            self._entries[table.name, service.name] = entries = Entries(table, service, below)
            for problem in entries.problems:
                log.warning("%s", problem)
        return entries

    def update(self) -> None:
        """Read the file again even if it looks the same.

        Raises:
            SourceError: it cannot be used; the last good version goes on answering.
        """
        self._stamp = None
        self._refresh()
        if self._error is not None:
            raise self._error.with_traceback(None)

    def _refresh(self) -> None:
        try:
            with open(self._path, "rb", opener=open_regular_file) as file:
                status = os.fstat(file.fileno())
                stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
                if stamp == self._stamp:
                    return
                self._stamp = stamp
                pairs = read_export(read_bounded(file))
        except OSError as error:
            self._stamp = None
            self._fail(SourceError(f"{self._path}: {error.strerror}"))
        except SourceError as error:
            self._fail(SourceError(f"{self._path}: {error}"))
        else:
            if self._error is not None:
                log.warning("%s: readable again", self._path)
            self._pairs, self._entries, self._error = pairs, {}, None

    def _fail(self, error: SourceError) -> None:
        if str(error) != str(self._error):
            consequence = "returning errors" if self._pairs is None else "serving its last good version"
            log.warning("%s; %s", error, consequence)
        self._error = error
