"""The tree in which smtpd looks for duplicates (openbsd-compat/sys/tree.h, RB_INSERT).

Pure. smtpd changes the keys of nodes that are in the tree, but does not move the nodes. It then misses some duplicates,
and which ones depends on the shape of the tree.
"""

from __future__ import annotations

from typing import NamedTuple


class Key(NamedTuple):
    """The fields in the order of expand.c, expand_cmp."""

    kind: int
    same_user: bool
    real: int
    """1 as soon as this user is found, otherwise 0."""
    text: bytes
    domain: bytes
    by_address: int
    """The number of the address that this belongs to."""
    by_user: int
    """The number of the user that a command or a file belongs to."""


class Entry:
    """A node of the tree; ``key`` may be changed."""

    __slots__ = ("children", "key", "parent", "red")

    def __init__(self, key: Key, parent: Entry | None) -> None:
        self.key = key
        self.parent = parent
        self.children: list[Entry | None] = [None, None]
        self.red = True


class Tree:
    """A red-black tree."""

    def __init__(self) -> None:
        self._root: Entry | None = None

    def insert(self, key: Key) -> Entry | None:
        """The new entry, None if the search meets an equal key."""
        parent, here, side = None, self._root, False
        while here is not None:
            if key == here.key:
                return None
            parent, side = here, key > here.key
            here = here.children[side]
        entry = Entry(key, parent)
        if parent is None:
            self._root = entry
        else:
            parent.children[side] = entry
        self._balance(entry)
        return entry

    def _balance(self, entry: Entry) -> None:
        while (parent := entry.parent) is not None and parent.red and (above := parent.parent) is not None:
            side = parent is above.children[True]
            uncle = above.children[not side]
            above.red = True
            if uncle is not None and uncle.red:
                uncle.red = parent.red = False
                entry = above
                continue
            if entry is parent.children[not side]:
                self._rotate(parent, side)
                entry, parent = parent, entry
            parent.red = False
            self._rotate(above, not side)
        if entry.parent is None:
            entry.red = False

    def _rotate(self, entry: Entry, side: bool) -> None:  # noqa: FBT001 - False is left
        """Move the entry down to this side, and its other child up."""
        rising = entry.children[not side]
        assert rising is not None
        inner, above = rising.children[side], entry.parent
        entry.children[not side] = inner
        if inner is not None:
            inner.parent = entry
        rising.parent = above
        if above is None:
            self._root = rising
        else:
            above.children[entry is above.children[True]] = rising
        rising.children[side] = entry
        entry.parent = rising
