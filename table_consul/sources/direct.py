"""Answers by reading Consul once a request: for tables that are too large to mirror."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from table_consul import kv
from table_consul.backoff import Backoff
from table_consul.errors import SourceError, Unreachable, printable
from table_consul.refusals import BadRequest
from table_consul.services import DEFAULT_KEY, Service, Table
from table_consul.services.entries import Entries
from table_consul.sources import PROBE

T = TypeVar("T")

log = logging.getLogger("table_consul")

# Pattern services are matched against all entries, which several rules of one mail ask for in a row.
CACHE_SECONDS = 1.0
MAX_WARNINGS = 4096  # Each is logged once; a bound on how many are remembered.
# How often a folder is logged in which Consul refuses the names of keys: many are strangers' addresses.
REFUSED_NAME_SECONDS = 300.0


class DirectSource:
    """A source with one kept-alive connection, and a circuit breaker.

    While Consul is known to be down, lookups fail immediately: the six lookups of one virtual recipient (smtpd:
    aliases.c, aliases_virtual_get) must not take six deadlines.
    """

    def __init__(self, client: kv.Client, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._breaker = Backoff(f"Consul at {client.address}", "returning errors until it is back")
        self._refusals: dict[bytes, Backoff] = {}
        self._silent_until: dict[bytes, float] = {}
        self._cache: dict[tuple[str, str], tuple[float, Entries]] = {}
        self._warned: set[str] = set()

    def entries(self, table: Table, service: Service, key: bytes | None, deadline: float) -> Entries:
        """The entry of this key, and the default of the service if that may answer; all entries where those are needed.

        Raises:
            SourceError: Consul cannot be read by the deadline, or refuses.
        """
        path = table.path(service)
        if key is None or service.patterns:
            return self._list(table, service, path, deadline, cached=key is not None)
        pairs = self._read(path, key, deadline)
        entries = Entries(table, service, pairs)
        if entries.uses_default(key):
            entries = Entries(table, service, [*pairs, *self._read(path, DEFAULT_KEY, deadline)])
        return entries

    def update(self) -> None:
        """Forget cached lists, reread token and TLS files, and retry Consul immediately.

        Raises:
            SourceError: the token file cannot be used.
        """
        self._cache.clear()
        self._breaker.not_before = 0.0
        self._client.reload()

    def close(self) -> None:
        """Close the connection to Consul."""
        self._client.close()

    def _read(self, path: bytes, key: bytes, deadline: float) -> list[tuple[bytes, bytes | None]]:
        if not kv.is_url_safe(path + key):
            return []  # no key of that name can be written or read over HTTP
        pair = self._ask(path, deadline, lambda left: self._client.get(path + key, timeout=left))
        return [] if pair is None else [(key, pair.value)]

    def _list(self, table: Table, service: Service, path: bytes, deadline: float, *, cached: bool) -> Entries:
        until, entries = self._cache.get((table.name, service.name), (0.0, None))
        if cached and entries is not None and self._clock() < until:
            return entries
        pairs = self._ask(path, deadline, lambda left: self._client.list(path, timeout=left))
        if not pairs:
            self._ask(path, deadline, lambda left: self._client.get(path + PROBE, timeout=left))
        entries = Entries(table, service, ((pair.key[len(path) :], pair.value) for pair in pairs))
        self._cache[table.name, service.name] = (self._clock() + CACHE_SECONDS, entries)
        for problem in entries.problems:
            self._warn_once(printable(problem.key), problem.text)
        return entries

    def _ask(self, path: bytes, deadline: float, read: Callable[[float], T]) -> T:
        now, breaker = self._clock(), self._breaker
        if breaker.since is not None and now < breaker.not_before:
            raise Unreachable(f"Consul has been unreachable for {now - breaker.since:.0f} s: {breaker.last_error}")
        if now >= deadline:
            raise Unreachable("deadline expired before Consul could be queried")
        try:
            answer = read(deadline - now)
        except Unreachable as error:
            breaker.failure(error, self._clock(), random.random())  # noqa: S311 - jitter, not a secret
            raise
        except SourceError as error:
            breaker.success(self._clock())
            if isinstance(error, BadRequest):  # about this one key, which the next lookup does not ask for
                if now >= self._silent_until.get(path, 0.0):
                    self._silent_until[path] = now + REFUSED_NAME_SECONDS
                    log.warning("%s: %s; returning errors for such keys", printable(path), error)
            else:
                refusal = self._refusals.setdefault(path, Backoff(printable(path), "returning errors"))
                refusal.failure(error, self._clock(), 0.0)
            raise
        breaker.success(self._clock())
        if path in self._refusals:
            self._refusals.pop(path).success(self._clock())
        return answer

    def _warn_once(self, about: str, text: str) -> None:
        if about not in self._warned and len(self._warned) < MAX_WARNINGS:
            self._warned.add(about)
            log.warning("%s: %s", about, text)
