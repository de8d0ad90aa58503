"""Backoff after failures. Nothing here waits: time and randomness are arguments."""

from __future__ import annotations

import logging

from table_consul.errors import SourceError, counted

log = logging.getLogger("table_consul")

FIRST_PAUSE_SECONDS = 0.25
# A recovery is noticed within this time, however long the outage. A table never stops retrying.
LAST_PAUSE_SECONDS = 4.0


def delay(failures: int, chance: float) -> float:
    """Seconds to wait after a number of failures in a row: doubling up to a cap, then 0-25 % off by ``chance`` in 0..1.

    The jitter comes after the cap (as in Consul's own lib/retry), so that tables that lose Consul together do not
    reconnect together.
    """
    return min(FIRST_PAUSE_SECONDS * 2.0 ** min(max(failures, 1) - 1, 16), LAST_PAUSE_SECONDS) * (1 - chance / 4)


class Backoff:
    """The state of an outage: since when, how many failures, and when to retry; times in seconds on one clock.

    Logs one line when an outage starts, and one when it ends.
    """

    def __init__(self, what: str, consequence: str) -> None:
        """The log line of an outage consists of ``what``, the error, and the ``consequence``."""
        self.what = what
        self.consequence = consequence
        self.since: float | None = None
        self.failures = 0
        self.total = 0
        self.not_before = 0.0
        self.last_error = ""
        self.last_kind = ""
        self.failed_at = 0.0  # when ``last_error`` occurred

    def failure(self, error: Exception, now: float, chance: float) -> float:
        """Record a failure, and return the pause until the next attempt, in seconds."""
        self.failures += 1
        self.total += 1
        self.last_error, self.last_kind = str(error), getattr(error, "kind", SourceError.kind)
        self.failed_at = now
        if self.since is None:
            self.since = now
            log.warning("%s: %s; %s", self.what, error, self.consequence)
        wait = delay(self.failures, chance)
        self.not_before = now + wait
        return wait

    def success(self, now: float) -> None:
        """Record a success, which ends an outage."""
        if self.since is None:
            return
        attempts = counted(self.failures, "failed attempt", "failed attempts")
        log.warning("%s: recovered after %.1f s (%s)", self.what, now - self.since, attempts)
        self.since, self.failures, self.not_before = None, 0, 0.0
