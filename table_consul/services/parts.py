"""The entries of a folder, in parts of some thousand keys each: a new version shares unchanged parts.

A lookup finds the part by its first key and the entry in a dict.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import islice

import msgspec

from table_consul.services.passwords import Kind

REPLACEMENT = "\ufffd".encode()


class Note(msgspec.Struct, frozen=True, gc=False):
    """The unusual properties of an entry; most entries have no note."""

    stored: bytes
    """The key as it is stored, relative to the folder."""
    error: str | None = None
    """Why its lookup is an error."""
    incomplete: bool = False
    """It is a record without any field of this service, which another service may use."""
    warning: str | None = None
    """Why smtpd would reject or misread the value, which is served."""
    variants: tuple[bytes, ...] = ()
    """Stored keys that are never looked up, because this one, which differs only in case, takes precedence."""


class Part:
    """Entries whose keys follow each other. Never changed once built; any thread may read it."""

    __slots__ = ("_order", "errors", "flawed", "kinds", "notes", "plain", "undecodable", "values", "varied")

    def __init__(
        self, values: dict[bytes, bytes | None], notes: dict[bytes, Note], kinds: Mapping[Kind, tuple[bytes, bytes]]
    ) -> None:
        self.values = values
        """Folded key to value; ``b""`` where the entry has none, None where its lookup is an error."""
        self.notes = notes
        """By folded key."""
        self.kinds = kinds
        """An entry and its value for each kind of hash, where passwords are verified here."""
        self.errors = 0
        self.varied = False
        """Whether there are keys that differ only in case."""
        self.flawed = False
        """Whether there is a problem that is not one of the index."""
        undecodable = []
        for key, note in notes.items():
            if note.error is not None:
                self.errors += 1
                if REPLACEMENT in key:
                    undecodable.append(key)
            if note.variants:
                self.varied = True
            self.flawed = self.flawed or note.error is not None or note.warning is not None or self.varied
        self.undecodable = min(undecodable, default=None)
        self.plain = all(values.values())
        """Every entry has a value."""
        self._order: list[bytes] | None = None

    @property
    def order(self) -> list[bytes]:
        """The keys in ascending order."""
        if self._order is None:
            self._order = sorted(self.values)
        return self._order

    def stored(self, key: bytes) -> bytes:
        """The key of this entry as it is stored."""
        note = self.notes.get(key)
        return key if note is None else note.stored


class Parts(Mapping[bytes, bytes]):
    """All parts of a folder, in order; as a mapping, the values of the entries that are not errors."""

    def __init__(self, starts: list[bytes], parts: list[Part]) -> None:
        """A part holds all keys from its start on, and before the next one's; the first start is empty."""
        self.starts, self.parts = starts, parts
        self._cuts = starts[1:]
        self._values = [part.values for part in parts]

    def of(self, key: bytes) -> Part:
        """The part that contains this folded key, if any does."""
        return self.parts[bisect_right(self._cuts, key)]

    def get(self, key: bytes, default: bytes | None = None) -> bytes | None:  # type: ignore[override]
        """The value of this folded key, ``b""`` if the entry has none; the default for errors and unknown keys."""
        value = self._values[bisect_right(self._cuts, key)].get(key)
        return default if value is None else value

    def has(self, key: bytes) -> bool:
        """Whether there is an entry, good or bad, of this folded key."""
        return key in self._values[bisect_right(self._cuts, key)]

    def is_pattern(self, key: bytes) -> bool:
        """Whether there is an entry that may match. A key that Consul lists with other bytes must not."""
        return key in self._values[bisect_right(self._cuts, key)] and REPLACEMENT not in key

    def patterns(self) -> Iterator[bytes]:
        """The entries that may match, as `is_pattern`."""
        return (key for part in self.parts for key in part.values if REPLACEMENT not in key)

    def notes(self) -> Iterator[tuple[bytes, Note]]:
        """The notes, by folded key."""
        return (noted for part in self.parts for noted in part.notes.items())

    def after(self, last: bytes | None) -> Iterator[bytes]:
        """All keys in ascending order, wrapping, from the one after ``last`` on."""
        number = 0 if last is None else bisect_right(self._cuts, last)
        order = self.parts[number].order
        start = 0 if last is None else bisect_right(order, last)
        yield from (order[place] for place in range(start, len(order)))
        for part in (*self.parts[number + 1 :], *self.parts[:number]):
            yield from part.order
        yield from islice(order, start)

    def not_in(self, other: Parts) -> Iterator[Part]:
        """The parts that the other version does not share."""
        shared = {*map(id, other.parts)}
        return (part for part in self.parts if id(part) not in shared)

    def patterns_not_in(self, other: Parts) -> list[bytes]:
        """The `patterns` that the other version does not have."""
        keys: list[bytes] = []
        for part in self.not_in(other):
            for first in islice(part.values, 1):  # comparing with the likely part is quick
                keys += [key for key in part.values.keys() - other.of(first).values.keys() if not other.has(key)]
        return [key for key in keys if REPLACEMENT not in key]

    def __getitem__(self, key: bytes) -> bytes:
        value = self.get(key)
        if value is None:
            raise KeyError(key)
        return value

    def __iter__(self) -> Iterator[bytes]:
        return (key for values in self._values for key, value in values.items() if value is not None)

    def __len__(self) -> int:
        return sum(len(part.values) - part.errors for part in self.parts)


NO_PARTS = Parts([b""], [Part({}, {}, {})])
