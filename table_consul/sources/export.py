"""The format of ``consul kv export``, and a file in it as the source of a table (``address = "file://..."``)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO, NamedTuple

import msgspec

from table_consul.body import split_list
from table_consul.errors import UNDECODABLE, SourceError, counted
from table_consul.files import open_regular_file, version_of
from table_consul.log import warn_of_problems
from table_consul.services import Service, Table
from table_consul.services.entries import Entries

log = logging.getLogger("table_consul")


class Exported(NamedTuple):
    """One entry of an export, with its whole key."""

    key: bytes
    value: bytes
    flags: int = 0


class _Entry(msgspec.Struct):
    """As the file has it (developer.hashicorp.com/consul/commands/kv/export)."""

    key: str
    value: bytes | None = None  # msgspec decodes base64
    flags: int = 0


# As in kv.py: decoding holds Python's lock, which other threads need for replies.
STEP_BYTES = 16 << 10

_decoder = msgspec.json.Decoder(list[_Entry])
_encoder = msgspec.json.Encoder()


def iter_export(file: BinaryIO) -> Iterator[Exported]:
    """The entries of a ``consul kv export``, in its order; no more than one step of the file is in memory.

    Raises:
        OSError: the file cannot be read.
        SourceError: it is not an export, or is cut off.
    """
    count = 0
    try:
        for piece in split_list(iter(partial(file.read, STEP_BYTES), b"")):
            entries = _decoder.decode(piece)
            yield from (Exported(each.key.encode(), each.value or b"", each.flags) for each in entries)
            count += len(entries)
    except UNDECODABLE as error:
        after = f", after {counted(count, 'entry', 'entries')}" if count else ""
        raise SourceError(f"not the output of `consul kv export`: {error}{after}") from None


def export_entry(key: bytes, value: bytes, flags: int = 0, **more: str) -> bytes:
    """One entry as JSON; an export is a JSON list of them. Consul ignores fields that it does not know."""
    return _encoder.encode({"key": key.decode(), "flags": flags, "value": value, **more})


class FileSource:
    """A source that rereads its file when it changes; if that version is invalid, the last good one is served."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._version: tuple[int, int, int] | None = None
        """The version that was read last, good or bad."""
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
            warn_of_problems(table.name, entries.problems)
        return entries

    def update(self) -> None:
        """Read the file again even if it looks the same.

        Raises:
            SourceError: it cannot be used; the last good version is still served.
        """
        self._version = None
        self._refresh()
        if self._error is not None:
            raise self._error.with_traceback(None)

    def _refresh(self) -> None:
        try:
            with open(self._path, "rb", opener=open_regular_file) as file:
                version = version_of(os.fstat(file.fileno()))
                if version == self._version:
                    return
                self._version = version
                pairs = [*iter_export(file)]
        except (OSError, SourceError) as error:
            if isinstance(error, OSError):
                self._version = None
            text = f"{self._path}: {getattr(error, 'strerror', error)}"
            if text != str(self._error):
                consequence = "returning errors" if self._pairs is None else "serving its last good version"
                log.warning("%s; %s", text, consequence)
            self._error = SourceError(text)
        else:
            if self._error is not None:
                log.warning("%s: readable again", self._path)
            self._pairs, self._entries, self._error = pairs, {}, None
