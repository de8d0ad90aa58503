"""Aliases that smtpd expands or rejects, for tests of lint and of a real smtpd."""

from __future__ import annotations

from typing import NamedTuple


class Expansions(NamedTuple):
    """Aliases that lead to the users gilles and eric, except for the rejected ones."""

    aliases: dict[str, str]
    rejected: set[str]


def chain(name: str, count: int, last: str = "gilles", domain: str = "") -> dict[str, str]:
    """A chain of ``count`` aliases."""
    keys = [f"{name}{number}{domain}" for number in range(1, count + 1)]
    return dict(zip(keys, [*keys[1:], last], strict=True))


LOCAL = Expansions(
    {
        **chain("short", 8),
        **chain("long", 10),
        "shortcut": "long1, long2, long3, long4, long5, long6, long7, long8, long9, long10",
        "into-long": "eric, long2",
        "a": "b",
        "b": "a",
        "into-a": "a",
        "into-a-and-out": "a, eric",
        "staff": "team, eric",
        "team": "staff, gilles",
        "eric": "eric, gilles",
        "tagged": "a+tag",
        "escaped": "\\gilles",
    },
    {"long1", "long2", "into-long", "a", "b", "into-a", "tagged"},
)
VIRTUAL = Expansions(
    {
        **chain("short", 9, domain="@example.org"),
        **chain("long", 11, domain="@example.org"),
        **chain("user", 11),
        "to-user@example.org": "user4",
        "deep-user@example.org": "user3",
        "a@example.org": "b@example.org, gilles",
        "b@example.org": "a@example.org, gilles",
        "into@example.org": "a@example.org",
        "self@example.org": "self@example.org, gilles",
        "x@example.org": "x",
        "x": "y, gilles",
        "y": "x, eric",
        "@example.org": "nobody@example.org",
        "@example.net": "gilles",
        "tag@example.org": "tag+more@example.org",
        "plus@example.org": "plain+tag@example.net",
        "plain": "gilles",
    },
    {
        "long1@example.org",
        "long2@example.org",
        "user1",
        "user2",
        "deep-user@example.org",
        "a@example.org",
        "b@example.org",
        "into@example.org",
        "self@example.org",
        "@example.org",
        "tag@example.org",
    },
)
