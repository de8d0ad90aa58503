"""The compared children and the rows with their targets, with a function for each group of rows."""

from __future__ import annotations

from collections.abc import Callable

from bench.children import HALVES, HITS, LARGE, MILLION, MISSES, PATTERNS, SMALL, Bench, Failure
from bench.report import Row

EDITED_KEY = "zz-edited@example.org"
RSS_MB = {"1k": 28, "100k": 60, "1M": 450}


def start(bench: Bench) -> None:
    """The time from start to register|ready."""
    bench.load(SMALL)
    rounds = 3 if bench.quick else 21
    times = bench.compare([bench.floor, bench.python, bench.mirror], rounds, SMALL, "warm 10")
    ours = times["mirror"]
    bench.rows += [
        Row(
            "start to register|ready",
            ours["ready_ms"],
            "ms",
            "Python floor",
            times["Python floor"]["ready_ms"],
            5,
            as_ratio=True,
        ),
        Row(
            "start to the first value",
            ours["warm"]["loaded_ms"],
            "ms",
            "Python floor",
            times["Python floor"]["warm"]["loaded_ms"],
        ),
    ]


def lookup(bench: Bench) -> None:
    """Lookups and checks: found, not found, or both alternately; with 1 and with 64 outstanding requests."""
    bench.load(SMALL, LARGE)
    rounds, many = (1, 40_000) if bench.quick else (7, 100_000)
    children = [bench.floor, bench.python, bench.minimal, bench.mirror]
    one = ("warm 30", f"lookup {many}")
    steps = (*one, f"pipe {4 * many} 64", "memory")
    hits = bench.compare(children, rounds, SMALL, *steps)
    half = bench.compare(children, rounds, SMALL, *steps, asked=HALVES)
    measured = {
        ("lookup", "hit"): hits,
        ("lookup", "miss"): bench.compare(children, rounds, SMALL, *one, asked=MISSES),
        ("lookup", "half"): half,
        ("check", "hit"): bench.compare(children, rounds, SMALL, *one, op="check"),
        ("check", "miss"): bench.compare(children, rounds, SMALL, *one, op="check", asked=MISSES),
    }
    large = bench.compare(children, rounds, LARGE, *steps)
    free = bench.compare(children, (rounds + 1) // 2, SMALL, *steps, one_cpu=False)
    targets = {("hit", "p50"): 1.3, ("miss", "p50"): 1.4, ("hit", "p99"): 1.6, ("miss", "p99"): 1.6}
    for (op, found), times in measured.items():
        for rank in ("p50", "p99"):
            with_c = [bench.floor, bench.minimal] if op == "lookup" and rank == "p50" and found != "half" else []
            for beside in [bench.python, *with_c]:
                limit = targets.get((found, rank)) if op == "lookup" and beside is bench.python else None
                ours, reference = (times[child]["lookup"][rank] for child in ("mirror", beside.name))
                bench.rows.append(
                    Row(f"{op} {rank}, 1k, {found}", ours, "us", beside.name, reference, limit, as_ratio=True)
                )
    ratio = {name: large[name]["lookup"]["p50"] / hits[name]["lookup"]["p50"] for name in hits}
    bench.rows.append(Row("lookup p50, 100k / 1k", ratio["mirror"], "x", "Python floor", ratio["Python floor"], 1.15))
    for name, times, limit in (
        ("1k, hit", hits, None),
        ("1k, half misses", half, 500_000),
        ("100k, hit", large, None),
        ("1k, hit, free", free, None),
    ):
        bench.rows.append(
            Row(
                f"pipelined 64, {name}",
                times["mirror"]["pipe"]["per_second"],
                "/s",
                "Python floor",
                times["Python floor"]["pipe"]["per_second"],
                limit,
                at_least=True,
            )
        )
    bench.rows += [
        Row(
            "lookup p50, 1k, free",
            free["mirror"]["lookup"]["p50"],
            "us",
            "Python floor",
            free["Python floor"]["lookup"]["p50"],
        ),
        Row(
            "lookup p99, 1k, free",
            free["mirror"]["lookup"]["p99"],
            "us",
            "Python floor",
            free["Python floor"]["lookup"]["p99"],
        ),
        Row(
            "RSS, 1k",
            hits["mirror"]["memory"]["rss_mb"],
            "MB",
            "Python floor",
            hits["Python floor"]["memory"]["rss_mb"],
            28,
        ),
        Row(
            "RSS, 100k",
            large["mirror"]["memory"]["rss_mb"],
            "MB",
            "Python floor",
            large["Python floor"]["memory"]["rss_mb"],
            60,
        ),
        Row("peak, 100k, before any reload", large["mirror"]["memory"]["peak_mb"], "MB", limit=150),
    ]


def reload(bench: Bench, table: str = LARGE) -> None:
    """Lookups during one edit of a large table each second."""
    bench.load(table)
    size = table[1:]
    seconds = 4 if bench.quick else 20
    warm = f"warm {120 if table == MILLION else 30}"
    edited = f"{bench.where} {table}/alias/{EDITED_KEY}"
    last_edit = f"edit {bench.where} {bench.first_path(table)} 2 10"
    for one_cpu in (True, False):
        where = "" if one_cpu else ", free"
        idle = bench.run(bench.mirror, table, warm, "sleep 1", f"soak {seconds}", one_cpu=one_cpu)["soak"]
        steps = (warm, "sleep 1", f"edited {seconds} 0 {edited}", last_edit, "memory")
        busy = bench.run(bench.mirror, table, *steps, one_cpu=one_cpu)
        base = bench.run(bench.floor, table, warm, f"edited {seconds} 0 {edited}", one_cpu=one_cpu)["edited"]
        steps = (warm, "sleep 1", f"edited {seconds} 1000 {edited}", last_edit, "memory")
        paced = bench.run(bench.mirror, table, *steps, one_cpu=one_cpu)["edited"]
        now = busy["edited"]
        bench.rows += [
            Row(f"edited each second, p99, {size}{where}", now["p99"], "us", "idle", idle["p99"], 3, as_ratio=True),
            Row(
                f"edited each second, latest, {size}{where}",
                now["max"] / 1e3,
                "ms",
                "C floor",
                base["max"] / 1e3,
                10,
                note=f"{now['late']} of {now['answers']:,} later than 25 ms; idle {idle['max'] / 1e3:.1f} ms",
            ),
            Row(f"the same at 1,000 a second, p99, {size}{where}", paced["p99"] / 1e3, "ms"),
            Row(
                f"the same at 1,000 a second, latest, {size}{where}",
                paced["max"] / 1e3,
                "ms",
                limit=10,
                note=f"{paced['late']} of {paced['answers']:,} later than 25 ms; from when they were due "
                f"{paced['due_late']}, p99 {paced['due_p99'] / 1e3:.1f}, latest {paced['due_max'] / 1e3:.1f} ms",
            ),
        ]
        if one_cpu:
            bench.rows += [
                Row(f"RSS, {size}, after reloads", busy["memory"]["rss_mb"], "MB", limit=RSS_MB[size]),
                Row(
                    f"peak, {size}, after reloads",
                    busy["memory"]["peak_mb"],
                    "MB",
                    limit=150 if table == LARGE else None,
                ),
            ]


def direct(bench: Bench) -> None:
    """One read of Consul for each request."""
    bench.load(SMALL)
    rounds, many = (1, 1_500) if bench.quick else (5, 5_000)
    steps = ("warm 10", f"lookup {many}")
    times = bench.compare([bench.get, bench.direct, bench.poc], rounds, SMALL, *steps)
    free = bench.compare([bench.get, bench.direct, bench.poc], rounds, SMALL, *steps, one_cpu=False)
    for how, where in ((times, ""), (free, ", free")):
        ours, get, poc = (how[child.name]["lookup"] for child in (bench.direct, bench.get, bench.poc))
        bench.rows += [
            Row(f"direct p50{where}", ours["p50"], "us", "C, one GET", get["p50"], 4, as_ratio=True),
            Row(f"direct p99{where}", ours["p99"], "us", "C, one GET", get["p99"]),
            Row(f"direct p50{where}", ours["p50"], "us", "2020", poc["p50"], 0.5, as_ratio=True),
        ]


def patterns(bench: Bench) -> None:
    """Checks against 100,000 networks, domains and addresses, and 1,000 expressions, beside exact keys and a walk."""
    bench.load(LARGE, *PATTERNS)
    rounds, many = (1, 20_000) if bench.quick else (5, 60_000)
    steps = ("warm 30", f"lookup {many}")
    exact = bench.compare([bench.mirror], rounds, LARGE, *steps, op="check")["mirror"]["lookup"]
    for service in PATTERNS:
        name = f"check {service} p50, {'1k' if service == 'regex' else '100k'}"
        wanted = 2 if service in ("netaddr", "domain") else None
        try:
            times = bench.compare([bench.mirror], rounds, service, *steps, op="check", service=service)
        except Failure as failure:
            bench.rows.append(
                Row(
                    name,
                    None,
                    "us",
                    "exact key",
                    exact["p50"],
                    wanted,
                    as_ratio=True,
                    note="not yet: " + str(failure).replace("\n", " ")[:500],
                )
            )
            continue
        ours = times["mirror"]["lookup"]
        bench.rows += [
            Row(name, ours["p50"], "us", "exact key", exact["p50"], wanted, as_ratio=True),
            Row(name.replace("p50", "p99"), ours["p99"], "us", "exact key", exact["p99"]),
        ]
        steps_of_a_walk = ("warm 30", f"lookup {50 if bench.quick else 500}")
        walked = bench.run(bench.walk, service, *steps_of_a_walk, op="check", service=service)["lookup"]
        bench.rows += [
            Row(name.replace("p50", rank), ours[rank], "us", "smtpd's walk", walked[rank]) for rank in ("p50", "p99")
        ]


def imsg(bench: Bench) -> None:
    """The dialect of OpenSMTPD up to 7.5, and the bridge to a child that speaks lines."""
    bench.load(SMALL)
    rounds, many = (1, 20_000) if bench.quick else (7, 60_000)
    children = [bench.mirror, bench.imsg, bench.bridge]
    for name, asked in (("hit", HITS), ("miss", MISSES)):
        times = bench.compare(children, rounds, SMALL, "warm 30", f"lookup {many}", "memory", asked=asked)
        lines, ours, bridge = (times[child.name] for child in children)
        for rank, wanted in (("p50", True), ("p99", False)):
            alone, bridged = ours["lookup"][rank], bridge["lookup"][rank]
            bench.rows += [
                Row(
                    f"imsg {rank}, 1k, {name}",
                    alone,
                    "us",
                    "lines",
                    lines["lookup"][rank],
                    1.1 if wanted else None,
                    as_ratio=True,
                ),
                Row(
                    f"bridge {rank}, 1k, {name}",
                    bridged,
                    "us",
                    "child, imsg",
                    alone,
                    2.2 if wanted else None,
                    as_ratio=True,
                ),
                Row(
                    f"bridge {rank}, 1k, {name}",
                    bridged,
                    "us",
                    "child, lines",
                    lines["lookup"][rank],
                    2.2 if wanted else None,
                    as_ratio=True,
                ),
            ]
        memory = (bridge["memory"]["rss_mb"], "MB", "child, imsg", ours["memory"]["rss_mb"])
    bench.rows.append(Row("bridge RSS, 1k", *memory))


ROWS: dict[str, Callable[[Bench], None]] = {
    row.__name__: row for row in (start, lookup, reload, direct, patterns, imsg)
}
