"""The state of a table and of the folders that it is read from, as ``table-consulctl status`` shows it."""

from __future__ import annotations

import msgspec


class Prefix(msgspec.Struct):
    """A folder of Consul that a table is read from; None where a value is unknown or does not apply."""

    prefix: str
    state: str
    healthy: bool | None
    index: int | None = None
    age: float | None = None
    """Seconds from when Consul confirmed the data until the metrics were taken."""
    keys: int | None = None
    refused: int | None = None
    held: int | None = None
    """Entries that still answer although they are deleted in Consul."""
    held_seconds: float | None = None
    """How much longer they answer, from when the metrics were taken."""
    hidden: list[str] = []
    """Services whose folder the token may not read."""
    last_error: str | None = None
    last_error_at: float | None = None
    consul_index: int | None = None
    ahead: bool | None = None
    """Whether Consul has changes that the table lacks."""
    remarks: list[str] = []


class Status(msgspec.Struct):
    """One table; times in seconds since the epoch. ``healthy`` is None if unknown."""

    table: str
    state: str
    healthy: bool | None
    version: str | None = None
    started: float | None = None
    place: str | None = None
    taken: float | None = None
    """When the metrics were written or fetched."""
    live: bool = False
    """The metrics come from a socket, not from a file."""
    remarks: list[str] = []
    prefixes: list[Prefix] = []
