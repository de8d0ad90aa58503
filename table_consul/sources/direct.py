"""The source that reads Consul for each request, for tables that are too large to mirror."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from table_consul import kv
from table_consul.backoff import Backoff
from table_consul.errors import BadRequest, Forbidden, SourceError, TooLarge, Unreachable, printable
from table_consul.log import warn_of_problems
from table_consul.services import DEFAULT_KEY, Service, Table, fold_key
from table_consul.services.entries import Entries
from table_consul.sources import PROBE
from table_consul.sources.mirror import Unlisted

T = TypeVar("T")

log = logging.getLogger("table_consul")

# Pattern services need all entries, and several rules look them up in a row for one message.
CACHE_SECONDS = 1.0
# How often refusals of single keys of a folder are logged: strangers' addresses cause many.
REFUSED_KEY_SECONDS = 300.0


class DirectSource:
    """A source with one kept-alive connection, and a circuit breaker.

    While Consul is known to be down, lookups fail immediately: the six lookups of one virtual recipient (smtpd:
    aliases.c, aliases_virtual_get) must not take six deadlines.
    """

    def __init__(self, client: kv.Client, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._breaker = Backoff("lookups from Consul", "returning errors until it is back")
        self._refusals: dict[bytes, Backoff] = {}
        self._next_refusal_log: dict[bytes, float] = {}
        self._cache: dict[tuple[str, str, bool], tuple[float, Entries, SourceError | None]] = {}
        self._original_cases: dict[bytes, tuple[float, Mapping[bytes, bytes] | TooLarge]] = {}

    def entries(self, table: Table, service: Service, key: bytes | None, deadline: float) -> Entries:
        """The entry of this key, and the default entry if that may apply; all entries for patterns and for a fetch.

        In mode mirror, for a table that is too large, keys in any case are found, as in memory.

        Raises:
            SourceError: Consul cannot be read by the deadline, or refuses, or may hide an entry that matches.
        """
        path = table.path(service)
        if key is None or service.patterns:
            cached = key is not None
            entries, hidden = self._list(table, service, path, deadline, cached=cached)
            if hidden is None and self._client.consistency == "stale" and not entries.has_answer(key):
                entries, hidden = self._list(table, service, path, deadline, cached=cached, proven=True)
            if hidden is not None and not entries.has_answer(key):
                raise hidden.with_traceback(None)
            return entries
        pairs = self._read(path, key, deadline)
        if not pairs and table.mode == "mirror" and key.upper() != key:
            original_case = self._original_case(path, deadline)
            pairs = self._read(path, original_case[key], deadline) if key in original_case else []
        return self._with_default(table, service, key, pairs, deadline)

    def entries_hidden(
        self, unlisted: Unlisted, table: Table, service: Service, key: bytes | None, deadline: float
    ) -> Entries:
        """As `entries`, for a key that Consul does not list and may hide; it is read in its stored case.

        Raises:
            SourceError: as `entries`, or reading one key is not enough.
        """
        if key is None or service.patterns or unlisted.stored is None:
            raise unlisted.error.with_traceback(None)
        pairs = self._read(table.path(service), unlisted.stored, deadline)
        if not pairs and unlisted.listed.contains(key):  # by the default entry, whose name Consul 1.21.5 rejects
            return unlisted.listed
        return self._with_default(table, service, key, pairs, deadline)

    def _with_default(
        self, table: Table, service: Service, key: bytes, pairs: list[tuple[bytes, bytes | None]], deadline: float
    ) -> Entries:
        entries = Entries(table, service, pairs)
        if entries.uses_default(key):
            entries = Entries(table, service, [*pairs, *self._read(table.path(service), DEFAULT_KEY, deadline)])
        return entries

    def update(self) -> None:
        """Forget cached lists, reread token and TLS files, and retry Consul immediately.

        Raises:
            SourceError: the token file cannot be used.
        """
        self._cache.clear()
        self._original_cases.clear()
        self._breaker.not_before = 0.0
        self._client.reload()

    def close(self) -> None:
        """Close the connection to Consul."""
        self._client.close()

    def _read(self, path: bytes, key: bytes, deadline: float) -> list[tuple[bytes, bytes | None]]:
        if not key or key.endswith(b"/"):
            return []  # only a folder; smtpd looks up the tag of each listener, which may be empty
        if not kv.is_url_safe(path + key):
            # A transaction can write such a key (api-docs/txn), but no URL can read it.
            raise SourceError(f"{printable(path + key)}: cannot be read from Consul: no URL can contain this key")
        read = partial(self._client.get, path + key)
        pair = self._ask(path, deadline, lambda left: read(timeout=left), one_key=True)
        if pair is None and self._client.consistency != "consistent":
            pair = self._ask(path, deadline, lambda left: read(timeout=left, proven=True), one_key=True)
        return [] if pair is None else [(key, pair.value)]

    def _list(
        self, table: Table, service: Service, path: bytes, deadline: float, *, cached: bool, proven: bool = False
    ) -> tuple[Entries, SourceError | None]:
        """All entries, and an error if some are missing; ``proven`` as in `kv.Client.visible`."""
        until, former, error = self._cache.get((table.name, service.name, proven), (0.0, None, None))
        began = self._clock()
        if former is not None and began < until and (cached or isinstance(error, TooLarge)):
            return former, error
        pairs: Sequence[kv.Pair] = ()
        try:
            read = partial(self._client.visible, path, proven=proven)
            pairs, hides = self._ask(path, deadline, lambda left: read(timeout=left))
            error = Forbidden(f"Consul hides keys under {printable(path)} from the token") if hides else None
            if not pairs:
                self._ask(path, deadline, lambda left: self._client.get(path + PROBE, timeout=left))
        except TooLarge as too_large:
            error = too_large
        entries = Entries(table, service, ((pair.key[len(path) :], pair.value) for pair in pairs))
        self._cache[table.name, service.name, proven] = (self._expiry(began), entries, error)
        logged = set() if former is None else set(former.problems)
        warn_of_problems(table.name, [problem for problem in entries.problems if problem not in logged])
        return entries, error

    def _expiry(self, began: float) -> float:
        """When a list expires that took from ``began`` to now: listing takes at most a fifth of the time."""
        now = self._clock()
        return now + max(CACHE_SECONDS, 4 * (now - began))

    def _original_case(self, path: bytes, deadline: float) -> Mapping[bytes, bytes]:
        """The keys of this folder that are not stored in lower case, from folded to stored."""
        until, found = self._original_cases.get(path, (0.0, {}))
        began = self._clock()
        if began >= until:
            try:
                read = partial(self._client.visible_keys, path, proven=True)
                keys, _ = self._ask(path, deadline, lambda left: read(timeout=left))
                stored = (key[len(path) :] for key in reversed(keys))  # the first variant takes precedence
                found = {fold_key(key): key for key in stored if fold_key(key) != key}
            except TooLarge as error:
                found = error
            self._original_cases[path] = (self._expiry(began), found)
        if isinstance(found, TooLarge):
            raise found.with_traceback(None)
        return found

    def _ask(self, path: bytes, deadline: float, read: Callable[[float], T], *, one_key: bool = False) -> T:
        """The result of ``read`` for one key or the folder; errors that would affect other lookups are logged."""
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
            if isinstance(error, BadRequest | TooLarge) or (one_key and isinstance(error, Forbidden)):
                if now >= self._next_refusal_log.get(path, 0.0):
                    self._next_refusal_log[path] = now + REFUSED_KEY_SECONDS
                    where = "for such keys"
                    if isinstance(error, TooLarge):
                        where = 'for lookups that need all keys (set mode = "mirror" and max_keys above their number)'
                    log.warning("%s: %s; returning errors %s", printable(path), error, where)
            else:
                refusal = self._refusals.setdefault(path, Backoff(printable(path), "returning errors"))
                refusal.failure(error, self._clock(), 0.0)
            raise
        breaker.success(self._clock())
        if path in self._refusals:
            self._refusals.pop(path).success(self._clock())
        return answer
