"""Replies to smtpd: a request and its entries in, a reply out; and their counts.

Decides between ``not-found``, which bounces the message, and ``error``, which keeps it. Independent of the wire and of
the source of entries; the caller passes the time as a number.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Callable, Mapping
from functools import partial

from table_consul.errors import ConfigError, EntryError, SourceError, printable
from table_consul.protocol import FOUND, NOT_FOUND, OPS, Failed, Found, NotFound, Reply, Request, Updated
from table_consul.services import SERVICES, Service, Table, fold_key
from table_consul.services.entries import Entries
from table_consul.services.passwords import Verifier
from table_consul.services.values import MissingFields

Read = Callable[[Service, bytes | None], Entries]
"""Returns the entries of a service for a key (None: all)."""

# From a reply out of memory to the longest deadline that is likely to be configured.
BOUNDS_SECONDS = (0.00001, 0.000025, 0.0001, 0.00025, 0.001, 0.0025, 0.01, 0.05, 0.25, 1.0, 2.5)
OUTCOMES: Mapping[type, str] = {Found: "found", NotFound: "not-found", Failed: "error", Updated: "ok"}
# In the dialects of 2020 each request names a table: a bound on how many names are counted separately.
SUMS_MAX = 512
OTHER = "(other)"

Labels = tuple[str, str, str, type]
"""Table, service, operation, and type of the reply."""
Sums = list[float]
"""Seconds in total, replies that missed the deadline, then replies per interval: BOUNDS_SECONDS are the inclusive upper
ends, and the last interval has none. CPython is faster at small positive indices, hence the order."""


def replies_from(
    entries: Entries, op: str, seconds_left: Callable[[], float] | None = None
) -> Callable[[bytes], Reply]:
    """A function from a key to the reply to a check or a lookup; the entries must include everything for the key.

    It raises EntryError if the matching entry cannot be used, or cannot be found in the time left.
    """
    contains, lookup = entries.contains, entries.values.get if entries.plain else entries.lookup
    if seconds_left is not None and entries.timed:
        contains = partial(contains, seconds_left=seconds_left)
        lookup = partial(entries.lookup, seconds_left=seconds_left)
    if op == "check":
        return lambda key: FOUND if contains(key) else NOT_FOUND

    def reply(key: bytes) -> Reply:
        value = lookup(key)
        return NOT_FOUND if value is None else Found(value)

    return reply


class Responder:
    """Replies for any number of tables. It stores only the position of each fetch and the cost of verifying a hash."""

    def __init__(self, verifier: Verifier | None = None) -> None:
        self._last_fetched: dict[tuple[str, str], bytes] = {}
        self._verifier = verifier or Verifier()

    def _fetch(self, entries: Entries) -> Reply:
        which = (entries.table.name, entries.service.name)
        found = entries.next_after(self._last_fetched.get(which))
        if found is None:
            return NOT_FOUND
        self._last_fetched[which], value = found
        return Found(value)

    def answer(
        self, request: Request, table: Table, read: Read, seconds_left: Callable[[], float] | None = None
    ) -> Reply:
        """The reply to a request about this table; ``seconds_left`` of its deadline, all if None.

        Raises:
            SourceError: ``read`` has no answer now.
            EntryError: the matching entry cannot be used.
        """
        service = SERVICES.get(request.service)
        if service is None:
            return Failed(f"unknown service {printable(request.service)!r}")
        if service.name not in table.services:
            return Failed(f"service {service.name} is not among the services of table {printable(table.name)!r}")
        if service.answers == "check":
            return self._authenticate(request, table, read, seconds_left or (lambda: table.deadline))
        if request.op == "fetch":
            return self._fetch(read(service, None))
        return replies_from(read(service, request.key), request.op, seconds_left)(request.key)

    def _authenticate(self, request: Request, table: Table, read: Read, seconds_left: Callable[[], float]) -> Reply:
        """Whether the password is the user's. Neither of them is logged or stored.

        smtpd puts a colon between the two (smtpd: lka.c, lka_authenticate), so no user name can contain one. User names
        are looked up in lower case like all keys; passwords are not changed. Both services are read for every user:
        in direct mode the time of a missing read would reveal who is in the first.
        """
        user, colon, password = request.key.partition(b":")
        if request.op != "check" or not colon:
            return Failed("the service auth supports only check, with a key USER:PASSWORD")
        user = fold_key(user)
        sources: list[Entries] = []
        stored: bytes | None = None
        path = b""
        incomplete: MissingFields | None = None
        for name in ("auth", "credentials"):
            try:
                entries = read(SERVICES[name], user)
            except SourceError:
                if stored is None:
                    raise
                continue
            sources.append(entries)
            if stored is not None:
                continue
            path = entries.path
            try:
                stored = entries.lookup(user)
            except MissingFields as error:
                incomplete = error
        if stored is None and incomplete is not None:
            raise incomplete
        others = [value for entries in sources for _, value in entries.kinds.values()]
        complete = any(len(entries) > 1 for entries in sources)  # false where Consul is read key by key
        try:
            left = seconds_left()
            verified = self._verifier.verify(
                table.name, stored, password, others, table.deadline, left, complete=complete
            )
        except EntryError as error:  # the entry in Consul is invalid, so its key may be named
            raise EntryError(f"{printable(path + user)}: {error}") from None
        return FOUND if verified else NOT_FOUND


class Counters:
    """Counts of requests and replies, at the cost of one dictionary lookup and two additions a request.

    Only the server loop may write; other threads read copies and never make it wait.
    """

    def __init__(self, tables: Callable[[str], Table]) -> None:
        """``tables`` returns the table of that name or raises ConfigError; called in the server loop."""
        self._tables = tables
        self._sums: dict[Labels, Sums] = {}
        self.malformed = 0
        self.failures: dict[str, tuple[int, str, str, float, float]] = {}
        """By table: how often its source failed, kind and text of the last error, its time on the loop's clock, and
        `answers` then."""

    def add(self, request: Request, reply: type, seconds: float) -> None:
        """Count a request by the type of its reply; ``seconds`` passed from reading it until the reply was ready."""
        try:
            sums = self._sums[request.table, request.service, request.op, reply]
        except KeyError:
            table = request.table if len(self._sums) < SUMS_MAX else OTHER
            service = request.service if request.service in SERVICES or not request.service else OTHER
            labels = (table, service, request.op if request.op in OPS else OTHER, reply)
            sums = self._sums.setdefault(labels, [0.0, 0] + [0] * (len(BOUNDS_SECONDS) + 1))
        sums[0] += seconds
        if seconds <= 0.00001:  # BOUNDS_SECONDS[0], the usual case
            sums[2] += 1
        else:
            sums[2 + bisect_left(BOUNDS_SECONDS, seconds)] += 1
            if seconds >= 0.05:  # the shortest deadline that can be configured
                with contextlib.suppress(ConfigError):
                    sums[1] += seconds >= self._tables(request.table).deadline

    def failed(self, table: str, error: SourceError, now: float) -> None:
        """Count a failure of the source of this table."""
        total = self.failures[table][0] if table in self.failures else 0
        if total or len(self.failures) < SUMS_MAX:
            self.failures[table] = (total + 1, error.kind, str(error), now, self.answers(table))

    def answers(self, table: str) -> float:
        """The number of replies about this table that were not errors; a source that recovers makes it grow."""
        return sum(sum(sums[2:]) for (t, *_, reply), sums in self.sums().items() if t == table and reply is not Failed)

    def sums(self) -> dict[Labels, Sums]:
        """A copy of all sums, for any thread."""
        return {labels: sums[:] for labels, sums in self._sums.copy().items()}
