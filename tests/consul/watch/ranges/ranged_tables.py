"""A small table that is watched in ranges, and the requests of its queries."""

from __future__ import annotations

import threading

from tests.consul.watch.watching import (
    ALIAS,
    DOMAIN,
    PREFIX,
    ask,
)
from tests.dialogue import eventually

NAMES = [bytes([letter]) + b"%d" % number for letter in b"abcdef" for number in range(6)]
LATE_SECONDS = 0.2
# For tests in which no query may count as late, even on a busy machine.
LONG_LATE_SECONDS = 1.0


def watching_threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith(("query ", "watch "))}


def ended(before):
    """Wait until there are no more watches and queries than before."""
    for _ in eventually("all threads have ended", 10):
        if watching_threads() <= before:
            return


def lists(fake):
    """The prefixes of the requested lists."""
    return [request.path.removeprefix(b"/v1/kv/") for request in fake.requests if "recurse" in request.params]


def waiting(fake):
    return [request for request in fake.requests if "index" in request.params]


def ranged_watch(fake, source, answer=b"old"):
    """Wait until ranges are watched and every query waits."""
    for _ in eventually("ranges are watched", 10):
        asked = {request.path for request in waiting(fake)}
        if {b"/v1/kv/" + ALIAS + bytes([letter]) for letter in b"abcdefr"} | {b"/v1/kv/" + DOMAIN} <= asked:
            break
    assert ask(source, b"a1") == answer
    return source


def reads_whole(fake, before):
    for _ in eventually("the whole table is read", 10):
        if PREFIX in lists(fake)[before:]:
            return


def stays_ranged(fake, before):
    assert PREFIX not in lists(fake)[before:]
