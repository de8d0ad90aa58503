"""The state of a Consul: entries, indexes, tombstones, and the changes that end a wait."""

from __future__ import annotations

import base64
import threading
import time
from dataclasses import dataclass, replace

from tests.fake_consul.messages import text


@dataclass(frozen=True)
class Entry:
    value: bytes | None
    flags: int
    created: int
    modified: int

    def to_dict(self, key: bytes, *, with_value: bool = True) -> dict[str, object]:
        """The entry in JSON; an empty value is null."""
        value = base64.b64encode(self.value).decode() if self.value and with_value else None
        indexes = {"CreateIndex": self.created, "ModifyIndex": self.modified}
        return {"LockIndex": 0, "Key": text(key), "Flags": self.flags, "Value": value, **indexes}

    def after(self, old: Entry | None) -> Entry:
        """This entry as the successor of an old one; the old one if they are equal."""
        if old is None:
            return self
        if (old.value or b"", old.flags) == (self.value or b"", self.flags):
            return old
        return replace(self, created=old.created)


class Store:
    """Shared by all threads of a fake; `changed` guards everything, and is notified of each change."""

    def __init__(self) -> None:
        self.index = 10
        self.entries: dict[bytes, Entry] = {}
        self.changed = threading.Condition()
        self._tombstones: dict[bytes, int] = {}
        self._history: list[bytes] = []  # The key of each change, b"" for a change of everything.

    def put(self, key: bytes, value: bytes | None, flags: int = 0) -> None:
        """Store an entry; the same value moves no index and ends no wait, as in Consul."""
        with self.changed:
            old, index = self.entries.get(key), self.index + 1
            self._change(index, key, Entry(value, flags, index, index).after(old))

    def delete(self, key: bytes) -> None:
        """Delete an entry, if it exists; a tombstone keeps the index of its prefix from falling."""
        with self.changed:
            self._change(self.index + 1, key, None)

    def replace(self, entries: dict[bytes, Entry]) -> None:
        """Replace all entries, under one new index."""
        with self.changed:
            index = self.index + 1
            for key in self.entries.keys() | entries.keys():
                self._change(index, key, entries.get(key))

    def _change(self, index: int, key: bytes, new: Entry | None) -> None:
        if new is self.entries.get(key):
            return
        self.index = index
        if new is None:
            del self.entries[key]
            self._tombstones[key] = index
        else:
            self.entries[key] = new
        self._notify(key)

    def reap(self) -> None:
        """Drop the tombstones, as Consul does after 15 minutes: the index of a prefix may fall. No wait ends."""
        with self.changed:
            self._tombstones.clear()

    def restore(self, index: int) -> None:
        """Set the index of the store and of all entries, as a restored snapshot does.

        Every wait ends immediately and returns the former state, as in Consul 1.8.7 and 1.22.
        """
        with self.changed:
            self.index = index
            self._tombstones.clear()
            for key, entry in self.entries.items():
                self.entries[key] = replace(entry, created=min(entry.created, index), modified=index)
            self._notify(b"")

    def restore_entries(self, entries: dict[bytes, Entry]) -> None:
        """Replace all entries, with their indexes, as a restored snapshot does; every wait ends, as in `restore`."""
        with self.changed:
            self.entries = dict(entries)
            self._tombstones.clear()
            self._notify(b"")

    def listed(self, prefix: bytes, after: int, end: float, stopping: threading.Event) -> Listing:
        """The entries below a prefix once its index exceeds `after`, or when the wait ends."""
        with self.changed:
            while True:
                listing = self._now(prefix)
                if not 0 < listing.index <= after:
                    return listing
                seen, watched = len(self._history), self._watched(prefix)
                while not any(not key or key.startswith(watched) for key in self._history[seen:]):
                    if stopping.is_set() or not self.changed.wait(end - time.monotonic()):
                        return replace(listing, timed_out=True)
                if b"" in self._history[seen:]:
                    return listing

    def _now(self, prefix: bytes) -> Listing:
        found = {key: self.entries[key] for key in sorted(self.entries) if key.startswith(prefix)}
        graves = [index for key, index in self._tombstones.items() if key.startswith(prefix)]
        below = [entry.modified for entry in found.values()] + graves
        return Listing(max(below) if below and prefix else self.index, found)

    def _watched(self, prefix: bytes) -> bytes:
        """The prefix whose changes wake a wait.

        If nothing is below `prefix`, Consul watches the nearest node that exists: what `prefix` shares with other keys.
        """
        return prefix[: max((_shared(prefix, key) for key in self.entries), default=0)]

    def _notify(self, key: bytes) -> None:
        self._history.append(key)
        self.changed.notify_all()


def _shared(one: bytes, other: bytes) -> int:
    """How many bytes at the start are the same."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))


@dataclass(frozen=True)
class Listing:
    index: int
    entries: dict[bytes, Entry]
    timed_out: bool = False
