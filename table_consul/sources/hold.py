"""Held deletions: which entries go on answering after most of a folder was deleted in Consul, and for how long.

Knows nothing of threads, HTTP or files; moments come in as seconds on the caller's clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec

from table_consul.errors import counted

# Fewer deletions are what people do in the UI; most of a folder and this many is what a wrong command does.
LEAST_DELETIONS = 20
# Here a deletion withdraws a permission.
NEVER_HELD = frozenset({"auth", "credentials"})
# The moment at which an accepted hold ended.
ACCEPTED = 0.0


class Held(msgspec.Struct, frozen=True):
    """The deleted entries of one service that go on answering."""

    keys: Mapping[bytes, bytes]
    """Folded keys to stored ones, relative to the folder."""
    until: float
    """On the caller's clock; `ACCEPTED` after ``smtpctl update table``."""


class Terms(NamedTuple):
    """On which terms a read may begin to hold deletions."""

    now: float
    seconds: float
    """0: nothing new is held."""
    other_store: bool = False
    """The index went backwards, so this may be another cluster, or one that has lost its data."""


def is_suspicious(deleted: int, count: int, *, other_store: bool = False) -> bool:
    """Whether so many deletions at once, of so many entries of a folder, may be a mistake."""
    return deleted * 2 > count and (deleted >= LEAST_DELETIONS or other_store)


def next_held(service: str, held: Held | None, deleted: Mapping[bytes, bytes], count: int, terms: Terms) -> Held | None:
    """What is held of a service after a read.

    ``held`` is what was held before and is not over. Further deletions join it, because a wrong command may arrive in
    several steps. ``deleted`` are the keys whose absence is proven, with those that were held; ``count`` is the number
    of entries there were, without those of a hold that is over.
    """
    if not deleted:
        return None
    if held is not None:
        return Held(deleted, held.until)
    if service in NEVER_HELD or not terms.seconds:
        return None
    suspicious = is_suspicious(len(deleted), count, other_store=terms.other_store)
    return Held(deleted, terms.now + terms.seconds) if suspicious else None


def news(
    before: Mapping[str, Held], after: Mapping[str, Held], counts: Mapping[str, int], table: str, now: float
) -> Iterator[tuple[str, str]]:
    """A service and a text for the log for each hold that has ended or begun; ``counts`` were there before."""
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
