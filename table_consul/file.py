"""Answers from a file that ``consul kv export`` wrote: for trying things, and for tests of an smtpd.conf."""

from __future__ import annotations

import logging
import os
from base64 import b64decode
from pathlib import Path

import msgspec

from table_consul.errors import SourceError
from table_consul.services import Bucket, Service, Table

log = logging.getLogger("table_consul")


class Exported(msgspec.Struct):
    """One entry of ``consul kv export`` (developer.hashicorp.com/consul/commands/kv/export)."""

    key: str
    value: str | None = None
    flags: int = 0


_decoder = msgspec.json.Decoder(list[Exported])


def read_export(data: bytes) -> list[tuple[bytes, bytes]]:
    """Keys and values of a ``consul kv export``, in its order.

    Raises:
        SourceError: this is no such file, or it was cut off.
    """
    try:
        return [(entry.key.encode(), b64decode(entry.value or "", validate=True)) for entry in _decoder.decode(data)]
    except (ValueError, RecursionError) as error:
        raise SourceError(f"this is no output of `consul kv export`: {error}") from None


class File:
    """A source that reads its file again whenever it has changed. A bad version leaves the last good one standing."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._seen: tuple[int, int, int] | None = None
        self._pairs: list[tuple[bytes, bytes]] | None = None
        self._error = SourceError("not read yet")
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def bucket(self, table: Table, service: Service, key: bytes | None, deadline: float) -> Bucket:  # noqa: ARG002
        """See responder.Source. Never waits: the file is local."""
        self._refresh()
        if self._pairs is None:
            raise self._error
        place = (table.name, service.name)
        if place not in self._buckets:
            path = table.path(service)
            entries = ((key[len(path) :], value) for key, value in self._pairs if key.startswith(path))
            self._buckets[place] = bucket = Bucket(table, service, entries)
            for problem in bucket.problems:
                log.warning("%s", problem)
        return self._buckets[place]

    def update(self, deadline: float) -> None:  # noqa: ARG002
        """Read the file again even if it looks the same.

        Raises:
            SourceError: it is no good; the last good version goes on answering.
        """
        self._seen = None
        self._refresh()
        if self._seen is None:
            raise self._error

    def _refresh(self) -> None:
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                seen = (status.st_mtime_ns, status.st_ino, status.st_size)
                if seen == self._seen:
                    return
                pairs = read_export(file.read())
        except OSError as error:
            self._complain(SourceError(f"{self._path}: {error.strerror}"))
            return
        except SourceError as error:
            self._complain(SourceError(f"{self._path}: {error}"))
            return
        self._seen, self._pairs, self._buckets = seen, pairs, {}

    def _complain(self, error: SourceError) -> None:
        if str(error) != str(self._error):
            state = "answering error" if self._pairs is None else "answering from its last good version"
            log.warning("%s; %s", error, state)
        self._seen, self._error = None, error
