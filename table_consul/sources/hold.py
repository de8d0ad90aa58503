"""Held deletions: which entries are still served after most of a folder was deleted in Consul, and for how long.

Independent of threads, HTTP and files; times are seconds on the caller's clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec

from table_consul.errors import counted

# People delete fewer entries in the UI; a wrong command deletes this many and most of a folder.
LEAST_DELETIONS = 20
# A deletion here withdraws a permission.
NEVER_HELD = frozenset({"auth", "credentials"})
# The end of an accepted hold.
ACCEPTED = 0.0


class Held(msgspec.Struct, frozen=True):
    """The deleted entries of one service that are still served."""

    keys: Mapping[bytes, bytes]
    """Folded keys to stored ones, relative to the folder."""
    until: float
    """On the caller's clock; `ACCEPTED` after ``smtpctl update table``."""


class Terms(NamedTuple):
    """The terms on which a read may begin to hold deletions."""

    now: float
    seconds: float
    """0: nothing new is held."""
    other_store: bool = False
    """The index went backwards, so this may be another cluster, or one that has lost its data."""


def is_suspicious(deleted: int, count: int, *, other_store: bool = False) -> bool:
    """Whether so many deletions in one read, out of ``count`` entries of a folder, may be a mistake."""
    return deleted * 2 > count and (deleted >= LEAST_DELETIONS or other_store)


def next_held(service: str, held: Held | None, deleted: Mapping[bytes, bytes], count: int, terms: Terms) -> Held | None:
    """The held deletions of a service after a read, None if there are none.

    ``held`` is the former hold, unless it has expired. Further deletions join it, because a wrong command may take
    effect in several steps. ``deleted`` are the keys whose absence is proven, with those that were held; ``count``
    is the former number of entries, without those of an expired hold.
    """
    if not deleted:
        return None
    if held is not None:
        return Held(deleted, held.until)
    if service in NEVER_HELD or not terms.seconds:
        return None
    suspicious = is_suspicious(len(deleted), count, other_store=terms.other_store)
    return Held(deleted, terms.now + terms.seconds) if suspicious else None


def log_lines(
    before: Mapping[str, Held], after: Mapping[str, Held], counts: Mapping[str, int], table: str, now: float
) -> Iterator[tuple[str, str]]:
    """A service and a log text for each hold that has ended or begun; ``counts`` are former numbers of entries."""
    for service, held in before.items():
        if service not in after or after[service].until != held.until:
            entries = counted(len(held.keys), "deleted entry", "deleted entries")
            if held.until == ACCEPTED:
                yield service, f"deletion accepted: no longer serving {entries}"
            elif held.until <= now:
                yield service, f"hold_deletions expired: no longer serving {entries}"
            else:
                yield service, "all deleted entries are back"
    for service, held in after.items():
        if service not in before or before[service].until != held.until:
            entries = f"{len(held.keys)} of {counted(counts[service], 'entry', 'entries')}"
            seconds = f"{held.until - now:.0f} s"
            hint = f"to accept the deletion: smtpctl update table {table}"
            yield service, f"{entries} deleted at once; serving them for another {seconds} ({hint})"
