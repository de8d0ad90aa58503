"""Answers by reading Consul once a request: for tables that are too large to mirror."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from table_consul import kv
from table_consul.backoff import Backoff
from table_consul.errors import Forbidden, SourceError, Unreachable, printable
from table_consul.services import Service, Table
from table_consul.services.entries import Entries
from table_consul.services.values import DEFAULT_KEY
from table_consul.sources import PROBE

T = TypeVar("T")

log = logging.getLogger("table_consul")

# Pattern services are matched against the whole bucket, which several rules of one mail ask for in a row.
KEEP_SECONDS = 1.0
# Problems are told once; a bound on how many are remembered.
REMEMBERED = 4096


class DirectSource:
    """A source with one kept-alive connection, and a circuit breaker.

    While Consul is known to be down the answer is an error at once, so that the six lookups which one virtual recipient
    costs (smtpd: aliases.c, aliases_virtual_get) do not cost six deadlines.
    """

    def __init__(self, client: kv.Client, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._breaker = Backoff(f"Consul at {client.address}", "answering error until it is back")
        self._refusals: dict[bytes, Backoff] = {}
        self._kept: dict[tuple[str, str], tuple[float, Entries]] = {}
        self._told: set[str] = set()

    def entries(self, table: Table, service: Service, key: bytes | None, deadline: float) -> Entries:
        """See responder.Source. One key is read where that is enough, or two if there may be a default; else all."""
        path = table.path(service)
        if key is None or service.patterns:
            return self._listed(table, service, path, deadline, keep=key is not None)
        pairs = self._read(path, key, deadline)
        bucket = Entries(table, service, pairs)
        if bucket.uses_default(key):
            bucket = Entries(table, service, [*pairs, *self._read(path, DEFAULT_KEY, deadline)])
        return bucket

    def _read(self, path: bytes, key: bytes, deadline: float) -> list[tuple[bytes, bytes | None]]:
        if not kv.is_url_safe(path + key):
            return []  # no key of that name can be written or read over HTTP
        pair = self._ask(path, deadline, lambda left: self._client.get(path + key, timeout=left))
        return [] if pair is None else [(key, pair.value)]

    def update(self) -> None:
        """Forget what is kept, read the token anew, and try Consul again at once."""
        self._kept.clear()
        self._breaker.not_before = 0.0
        self._client.reload_token()

    def close(self) -> None:
        """Close the connection to Consul."""
        self._client.close()

    def _listed(self, table: Table, service: Service, path: bytes, deadline: float, *, keep: bool) -> Entries:
        place = (table.name, service.name)
        if keep and place in self._kept and self._clock() < self._kept[place][0]:
            return self._kept[place][1]
        page = self._ask(path, deadline, lambda left: self._client.list(path, timeout=left))
        if page.filtered:
            raise Forbidden(f"Consul hides keys under {printable(path)} from this token")
        if not page.pairs:
            self._ask(path, deadline, lambda left: self._client.get(path + PROBE, timeout=left))
        bucket = Entries(table, service, ((pair.key[len(path) :], pair.value) for pair in page.pairs))
        self._kept[place] = (self._clock() + KEEP_SECONDS, bucket)
        for problem in bucket.problems:
            if str(problem) not in self._told and len(self._told) < REMEMBERED:
                self._told.add(str(problem))
                log.warning("%s", problem)
        return bucket

    def _ask(self, path: bytes, deadline: float, read: Callable[[float], T]) -> T:
        now = self._clock()
        breaker = self._breaker
        if now < breaker.not_before:
            raise Unreachable(f"Consul is away for {now - (breaker.since or now):.0f} s: {breaker.last_error}")
        if now >= deadline:
            raise Unreachable("no time is left to ask Consul")
        try:
            answer = read(deadline - now)
        except Unreachable as error:
            breaker.failure(error, self._clock(), random.random())  # noqa: S311 - jitter, no secret
            raise
        except SourceError as error:
            breaker.success(self._clock())
            refusal = self._refusals.setdefault(path, Backoff(f"{printable(path)}", "answering error"))
            refusal.failure(error, self._clock(), 0.0)
            raise
        breaker.success(self._clock())
        if path in self._refusals:
            self._refusals.pop(path).success(self._clock())
        return answer
