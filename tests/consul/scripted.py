"""A client that returns scripted answers to a source."""

from __future__ import annotations

from table_consul.kv import Pair

ROOT = b"mail/aliases/alias/root"


class Client:
    """Returns values or raises errors; each read takes `takes` seconds of its own clock."""

    address = "http://consul:8500"
    consistency = "consistent"

    def __init__(self):
        self.now = 100.0
        self.takes = 0.0
        self.store: dict[bytes, bytes | None] = {ROOT: b"gilles"}
        self.error: Exception | None = None
        self.errors: dict[bytes, Exception] = {}
        self.asked = []
        self.tokens = 0
        self.hides = False
        self.closed = False

    def clock(self):
        return self.now

    def _take(self, what, key, timeout):
        self.asked.append((what, key, timeout))
        self.now += min(self.takes, timeout)
        error = self.errors.get(key, self.error)
        if error is not None:
            raise error

    def get(self, key, *, timeout, proven=False):
        self._take("get", key, timeout)
        return Pair(key.decode(), self.store[key], 1) if key in self.store else None

    def visible(self, prefix, *, timeout, proven=False):
        self._take("list", prefix, timeout)
        return [Pair(k.decode(), v, 1) for k, v in sorted(self.store.items()) if k.startswith(prefix)], self.hides

    def visible_keys(self, prefix, *, timeout, proven=False):
        self._take("keys", prefix, timeout)
        return [key for key in sorted(self.store) if key.startswith(prefix)], self.hides

    def reload(self):
        self.tokens += 1
        if self.error is not None:
            raise self.error

    def close(self):
        self.closed = True
