"""The rows of edits: the time until daemons use an edit, and the cost of edits and of idle time."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from bench import alone
from bench.children import LARGE, MILLION, PEOPLE, SMALL, Bench, Child, Failure
from bench.fleet import (
    IDLE_MAX_AGE,
    IDLE_WAIT,
    KINDS,
    LONG_WAIT,
    Fleet,
    edits,
    idle,
    quietly,
    reference,
    through_agent,
)
from bench.report import Row
from bench.rows import RSS_MB, reload

EDITS = {"1k": 60, "10k": 30, "100k": 8, "1M": 3}
# Targets by number of keys: milliseconds until an edit takes effect.
P50_MS, P99_MS = {"1k": 10, "100k": 25, "1M": 100}, {"1k": 30}


def one(bench: Bench, table: str) -> None:
    """One pinned daemon: edits of three kinds, then idle time."""
    bench.load(table)
    size = table[1:]
    where = f"{size}{', people' if table.startswith('p') else ''}"
    count = 4 if bench.quick else EDITS[size]
    own = alone.edits(bench.consul, table, f"{table}/alias/zz-edited@example.org", count)
    base = reference(bench, table)
    full = base.recurse
    with Fleet(bench, table, 1, bench.mirror, pinned=True) as fleet:
        loaded = fleet.rss_mb()
        times: dict[str, list[float]] = {}
        for kind in KINDS:
            times[kind] = []
            for key, value in edits(fleet.keys, kind, count):
                pause(times[kind])
                times[kind] += fleet.seen(key, value)
        every = sorted(each for several in times.values() for each in several)
        spent = quietly(
            fleet,
            base.base,
            [edit for kind in KINDS for edit in edits(fleet.keys, kind, count)],
            0.2 + 3 * every[-1] / 1e3,
        )
        reloaded = fleet.rss_mb()
    quiet = Child("mirror", lambda _table: [bench.program, str(bench.configuration("mirror", IDLE_MAX_AGE))])
    with Fleet(bench, table, 1, quiet, pinned=True) as unedited:
        time.sleep(IDLE_WAIT)
        still = idle(unedited, base.base, IDLE_WAIT * (4 if bench.quick else 12))
    share = IDLE_WAIT / LONG_WAIT
    medians = ", ".join(f"{kind} {statistics.median(times[kind]):.1f}" for kind in KINDS)
    limited = size in ("1k", "100k")
    rows = [
        Row("edit seen p50", every[len(every) // 2], "ms", "Consul alone", own["p50"], P50_MS[size], note=medians),
        Row("edit seen p99", every[len(every) * 99 // 100], "ms", "Consul alone", own["p99"], P99_MS.get(size)),
        Row("an edit, daemon's CPU", spent.daemons * 1e3, "ms", limit=30 if size == "100k" else None),
        Row(
            "an edit, Consul's CPU",
            spent.consul * 1e3,
            "ms",
            "?recurse",
            full.consul * 1e3,
            0.8 if size == "100k" else None,
            as_ratio=True,
        ),
        received("an edit, received", spent.received, 1e6, "MB", full.received, 2 if size == "100k" else None),
        received("idle, received", still.received, 1 / share, "bytes/s", None, 1000 if limited else None),
        Row("idle, Consul's CPU", still.consul * share * 1e3, "ms/s", limit=0.5 if limited else None),
        Row("start to the first answer", fleet.load_seconds * 1e3, "ms"),
        Row("RSS, loaded", loaded, "MB", limit=None if "people" in where else RSS_MB[size]),
        Row("RSS, after edits", reloaded, "MB", limit=None if "people" in where else RSS_MB[size]),
    ]
    bench.rows += [replace(row, name=f"{row.name}, {where}") for row in rows]


def received(name: str, count: float | None, per: float, unit: str, full: float | None, limit: float | None) -> Row:
    """A row of bytes beside those of a ``?recurse``, without numbers if other programs share the loopback."""
    other = None if full is None else full / per
    return Row(name, None if count is None else count / per, unit, "?recurse" if full else "", other, limit)


def pause(times: list[float]) -> None:
    """Wait a random time, at least until the daemon reads again: it pauses for as long as the last read took."""
    last = times[-1] / 1e3 if times else 1.0
    time.sleep(0.05 + last * random.uniform(1.5, 2.5))


def edit(bench: Bench) -> None:
    """The cost of an edit for one daemon and for Consul."""
    for table in (SMALL, LARGE) if bench.quick else (SMALL, PEOPLE[0], LARGE, PEOPLE[2]):
        one(bench, table)


def million(bench: Bench) -> None:
    """The cost of an edit among 1,000,000 keys, and lookups during edits."""
    one(bench, MILLION)
    reload(bench, MILLION)
    one(bench, PEOPLE[3])


def fleet(count: int) -> Callable[[Bench], None]:
    """Rows for ``count`` daemons of one table."""

    def measure(bench: Bench) -> None:
        for table in PEOPLE[:2] if bench.quick else PEOPLE[:3]:
            many(bench, table, count)

    return measure


def many(bench: Bench, table: str, count: int) -> None:
    bench.load(table)
    size = table[1:]
    base = reference(bench, table)
    full = base.recurse
    forwarded = through_agent(bench, table, base.base)
    todo = 3 if bench.quick else min(10, EDITS[size] // 2)
    try:
        with Fleet(bench, table, count, bench.mirror, pinned=False, together=True) as daemons:
            together, why = daemons.load_seconds, ""
    except Failure as failure:
        together, why = None, str(failure).partition("\n")[0]
    with Fleet(bench, table, count, bench.mirror, pinned=False) as daemons:
        time.sleep(2)
        times, lasts, harness = [], [daemons.load_seconds / count * 1e3], 0.0
        for key, value in edits(daemons.keys, "changed", todo):
            pause(lasts)
            before = time.process_time()
            times.append(daemons.seen(key, value))
            harness += time.process_time() - before
            lasts.append(times[-1][-1])
        share = harness / sum(lasts[1:]) * 1e3
        spent = quietly(daemons, base.base, edits(daemons.keys, "changed", todo), 0.3 + 2 * max(lasts[1:]) / 1e3)
        time.sleep(12)  # the short wait after an edit
        still = idle(daemons, base.base, 5 if bench.quick else 15)
        rss = daemons.rss_mb()
    first, median, last = (statistics.median(rank(each) for each in times) for rank in (min, statistics.median, max))
    note = f"asked every {daemons.resolution:.0f} ms; the harness took {share:.0%} of one processor"
    each = spent.consul / count * 1e3
    rows = [
        Row("edit seen by the first", first, "ms", note=note),
        Row("edit seen by the median", median, "ms"),
        Row("edit seen by the last", last, "ms"),
        Row(
            "an edit, Consul's CPU, each",
            each,
            "ms",
            "?recurse",
            full.consul * 1e3,
            {"10k": 5, "100k": 0.8}.get(size),
            as_ratio=size == "100k",
            note=f"{spent.consul * 1e3:.0f} ms in all",
        ),
        Row("an edit, daemon's CPU", spent.daemons / count * 1e3, "ms"),
        received(
            "an edit, received, each",
            None if spent.received is None else spent.received / count,
            1e6,
            "MB",
            full.received,
            2 if size == "100k" else None,
        ),
        Row("idle, Consul's CPU, all", still.consul * 1e3, "ms/s", "nobody", base.base.consul * 1e3),
        received(
            "idle, received, each", None if still.received is None else still.received / count, 1, "bytes/s", None, None
        ),
        Row("idle, daemon's CPU", still.daemons / count * 1e3, "ms/s"),
        Row("RSS, each", rss, "MB"),
        Row("started together, the last has loaded", together, "s", note=why),
        Row(
            "?recurse through a client agent, server's CPU",
            forwarded.consul * 1e3,
            "ms",
            "without",
            full.consul * 1e3,
        ),
    ]
    bench.rows += [replace(row, name=f"{count} daemons, {size}: {row.name}") for row in rows]
