"""Measures table-consul beside reference children and prints what was measured, with what is wanted.

``python -m bench.bench [--quick] [--json FILE] [--only ROW ...]``; bench/README.md says how to read what it prints.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import alone, report
from bench.report import Row
from bench.tables import absent, addresses, aliases, domains, expressions, networks, write_keys
from tests.rig import cache
from tests.rig.consul import ConsulAgent, consul_version

HERE = Path(__file__).resolve().parent
BUILD = HERE / "build"
SOURCES = ("driver", "floor", "get", "walk")

# Both processes on one processor: the wake-up of another costs more than all that is to be measured. Consul has the
# other, so that its work is not taken for ours.
OURS_CPU, CONSUL_CPU = 1, 0
SMALL, LARGE = "t1k", "t100k"
SIZES = {SMALL: 1_000, LARGE: 100_000}
EDITED_KEY = "zz-edited@example.org"
# The keys of the lookups: found, not found, and both; at least half of smtpd's lookups find nothing.
HITS, MISSES, HALVES = "", ".misses", ".halves"
DRIVER_SECONDS = 600

Times = dict[str, Any]
PATTERNS = {"netaddr": networks, "domain": domains, "mailaddr": addresses, "regex": expressions}


class Failure(Exception):
    """A child answered wrongly, or not at all: the driver's words."""


@dataclass
class Child:
    """A program that is started as smtpd starts a table."""

    name: str
    command: Callable[[str], list[str]]
    """By the table it serves."""
    dialect: str = "lines"
    """What it is spoken to in: the driver's -p."""


@dataclass
class Bench:
    """Where everything is, and how much of it is asked."""

    consul: ConsulAgent
    folder: Path
    quick: bool
    program: str
    rows: list[Row] = field(default_factory=list)
    raw: list[dict[str, Any]] = field(default_factory=list)
    loaded: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        host, port = self.consul.address.split(":")
        python = os.path.realpath(sys.executable)
        self.where = f"{host} {port}"
        self.floor = Child("C floor", lambda table: [str(BUILD / "floor"), str(self.keys(table))])
        self.python = Child(
            "Python floor", lambda table: [self.script("floor", f"{python} -IS"), str(self.keys(table))]
        )
        self.minimal = Child("minimal child", lambda table: [self.script("own", sys.executable), str(self.keys(table))])
        self.get = Child("C, one GET", lambda table: [str(BUILD / "get"), host, port, f"{table}/alias"])
        self.poc = Child(
            "2020", lambda table: [self.script("poc", sys.executable), f"http://{host}:{port}/v1/kv/{table}/alias"]
        )
        self.mirror = Child("mirror", lambda _table: [self.program, str(self.configuration("mirror"))])
        self.imsg = Child("imsg", self.mirror.command, "imsg")
        self.bridge = Child("bridge", self.bridged, "imsg")
        self.walk = Child("C, a walk", lambda table: [str(BUILD / "walk"), table, str(self.entries(table))])
        self.direct = Child("direct", lambda _table: [self.program, str(self.configuration("direct"))])

    def keys(self, table: str, asked: str = HITS) -> Path:
        return self.folder / f"{table}{asked}.keys"

    def entries(self, table: str) -> Path:
        return self.folder / f"{table}.entries"

    def script(self, name: str, interpreter: str) -> str:
        """A copy to run as a program: with the table's name as argv[0], Python itself does not find its library."""
        path = self.folder / name
        if not path.exists():
            path.write_text(f"#!{interpreter}\n" + (HERE / f"{name}.py").read_text())
            path.chmod(0o755)
        return str(path)

    def configuration(self, mode: str) -> Path:
        path = self.folder / f"{mode}.toml"
        path.write_text(
            f'[consul]\naddress = "http://{self.consul.address}"\n'
            f'[defaults]\nmode = "{mode}"\n'
            '[log]\ntarget = "stderr"\n'
        )
        return path

    def bridged(self, table: str) -> list[str]:
        """The mirror as smtpd starts it with ``procexec:``: all that stands behind the colon is one argument."""
        return [str(Path(self.program).with_name("table-procexec")), shlex.join(self.mirror.command(table))]

    def load(self, *tables: str) -> None:
        """Have these tables in Consul, and their keys in a file."""
        for table in tables:
            if table in self.loaded:
                continue
            asked: dict[str, str | None]
            if table in SIZES:
                service, entries = "alias", aliases(SIZES[table])
                asked = dict(entries)
            else:
                service, (entries, asked) = table, PATTERNS[table](SIZES[LARGE])
            write_keys(self.keys(table), asked)
            misses = absent(len(asked))
            write_keys(self.keys(table, MISSES), misses)
            write_keys(self.keys(table, HALVES), asked | misses)
            self.entries(table).write_text("".join(f"{key}\n" for key in sorted(entries)))
            self.consul.kv_txn({f"{table}/{service}/{key}": value for key, value in entries.items()})
            self.loaded.add(table)

    def first_path(self, table: str) -> str:
        """The path in Consul of the key that the driver edits."""
        with self.keys(table).open() as keys:
            return f"{table}/alias/{next(keys).partition(chr(9))[0]}"

    def run(
        self,
        child: Child,
        table: str,
        *steps: str,
        one_cpu: bool = True,
        op: str = "lookup",
        service: str = "alias",
        asked: str = HITS,
    ) -> dict[str, Any]:
        """What the driver measured, its steps by their names; of steps of one name, the last."""
        pins = ["-d", str(OURS_CPU), "-c", str(OURS_CPU)] if one_cpu else []
        errors = self.folder / "stderr"
        command = [str(BUILD / "driver"), *pins, "-p", child.dialect, "-o", op, "-s", service, "-t", table]
        command += ["-e", str(errors), "-k", str(self.keys(table, asked))]
        command += [*(part for step in steps for part in ("-x", step)), "--"]
        self.pin_consul(one_cpu=one_cpu)
        errors.unlink(missing_ok=True)
        done = subprocess.run(
            command + child.command(table), capture_output=True, text=True, check=False, timeout=DRIVER_SECONDS
        )
        if done.returncode:
            told = errors.read_text(errors="replace")[-2000:] if errors.exists() else ""
            raise Failure(f"{child.name}: {done.stderr.strip()}\n{told}".strip())
        result = json.loads(done.stdout)
        self.raw.append({"child": child.name, "table": table, "one_cpu": one_cpu, **result})
        if result["exit"] != 0:
            raise Failure(f"{child.name} ended with {result['exit']}")
        return {"ready_ms": result["ready_ms"]} | {step["step"]: step for step in result["steps"]}

    def pin_consul(self, *, one_cpu: bool) -> None:
        for thread in os.listdir(f"/proc/{self.consul.pid}/task"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), {CONSUL_CPU} if one_cpu else set(range(os.cpu_count() or 1)))

    def compare(self, children: list[Child], rounds: int, table: str, *steps: str, **how: Any) -> dict[str, Times]:
        """By child, the median over the rounds of everything measured. The children take turns: A B A B."""
        results: dict[str, list[dict[str, Any]]] = {child.name: [] for child in children}
        for _ in range(rounds):
            for child in children:
                results[child.name].append(self.run(child, table, *steps, **how))
        return {name: median(several) for name, several in results.items()}


def median(results: list[Any]) -> Any:
    """The median of numbers, and of each number in dictionaries alike."""
    first = results[0]
    if isinstance(first, dict):
        return {key: median([result[key] for result in results]) for key in first}
    return statistics.median(results) if isinstance(first, int | float) else first


# ---- rows ----


def start(bench: Bench) -> None:
    """Start to register|ready."""
    bench.load(SMALL)
    rounds = 3 if bench.quick else 21
    times = bench.compare([bench.floor, bench.python, bench.mirror], rounds, SMALL, "warm 10")
    ours = times["mirror"]
    bench.rows += [
        Row("start to register|ready", ours["ready_ms"], "ms", "Python floor", times["Python floor"]["ready_ms"], 5,
            as_ratio=True),
        Row("start to the first value", ours["warm"]["loaded_ms"], "ms", "Python floor",
            times["Python floor"]["warm"]["loaded_ms"]),
    ]  # fmt: skip


def lookup(bench: Bench) -> None:
    """Lookups and checks that find something, nothing, or both by turns; one request outstanding, and 64."""
    bench.load(SMALL, LARGE)
    rounds, many = (1, 40_000) if bench.quick else (7, 100_000)
    children = [bench.floor, bench.python, bench.minimal, bench.mirror]
    one = ("warm 30", f"lookup {many}")
    steps = (*one, f"pipe {4 * many} 64", "memory")
    hits = bench.compare(children, rounds, SMALL, *steps)
    others = {
        "miss": bench.compare(children, rounds, SMALL, *one, asked=MISSES),
        "half": bench.compare(children, rounds, SMALL, *steps, asked=HALVES),
        "check": bench.compare(children, rounds, SMALL, *one, op="check"),
        "check, miss": bench.compare(children, rounds, SMALL, *one, op="check", asked=MISSES),
    }
    large = bench.compare(children, rounds, LARGE, *steps)
    free = bench.compare(children, (rounds + 1) // 2, SMALL, *steps, one_cpu=False)
    for name, times in {"hit": hits, **others}.items():
        for rank in ("p50", "p99"):
            wanted = {("hit", "p50"): 1.3, ("miss", "p50"): 1.4, ("hit", "p99"): 1.6, ("miss", "p99"): 1.6}
            for beside in (bench.python, bench.floor, bench.minimal):
                if beside is not bench.python and (rank == "p99" or name not in ("hit", "miss")):
                    continue
                limit = wanted.get((name, rank)) if beside is bench.python else None
                bench.rows.append(
                    Row(f"lookup {rank}, 1k, {name}".replace("lookup p50, 1k, check", "check p50, 1k")
                        .replace("lookup p99, 1k, check", "check p99, 1k"),
                        times["mirror"]["lookup"][rank], "us", beside.name, times[beside.name]["lookup"][rank], limit,
                        as_ratio=True)
                )  # fmt: skip
    ratio = {name: large[name]["lookup"]["p50"] / hits[name]["lookup"]["p50"] for name in hits}
    bench.rows.append(Row("lookup p50, 100k / 1k", ratio["mirror"], "x", "Python floor", ratio["Python floor"], 1.15))
    for name, times, limit in (
        ("1k, hit", hits, None),
        ("1k, half misses", others["half"], 500_000),
        ("100k, hit", large, None),
        ("1k, hit, free", free, None),
    ):
        bench.rows.append(
            Row(f"pipelined 64, {name}", times["mirror"]["pipe"]["per_second"], "/s", "Python floor",
                times["Python floor"]["pipe"]["per_second"], limit, at_least=True)
        )  # fmt: skip
    bench.rows += [
        Row("lookup p50, 1k, free", free["mirror"]["lookup"]["p50"], "us", "Python floor",
            free["Python floor"]["lookup"]["p50"]),
        Row("lookup p99, 1k, free", free["mirror"]["lookup"]["p99"], "us", "Python floor",
            free["Python floor"]["lookup"]["p99"]),
        Row("RSS, 1k", hits["mirror"]["memory"]["rss_mb"], "MB", "Python floor",
            hits["Python floor"]["memory"]["rss_mb"], 29),
        Row("RSS, 100k", large["mirror"]["memory"]["rss_mb"], "MB", "Python floor",
            large["Python floor"]["memory"]["rss_mb"], 60),
        Row("peak, 100k, before any reload", large["mirror"]["memory"]["peak_mb"], "MB", limit=150),
    ]  # fmt: skip


def edit(bench: Bench) -> None:
    """From an edit in Consul to the answer that holds it."""
    bench.load(SMALL, LARGE)
    for table, edits, think in ((SMALL, 100 if bench.quick else 300, 100), (LARGE, 4 if bench.quick else 15, 2000)):
        path = bench.first_path(table)
        own = alone.edits(bench.consul, table, f"{table}/alias/{EDITED_KEY}", edits)
        step = f"edit {bench.where} {path} {edits} {think}"
        seen = bench.run(bench.mirror, table, "warm 30", "sleep 1", step, "lookup 5000", "memory")["edit"]
        limits = (20, 50) if table == SMALL else (1000, 1000)
        size = table[1:]
        for rank, limit in zip(("p50", "p99"), limits, strict=True):
            bench.rows.append(
                Row(f"edit seen {rank}, {size}", seen[f"returned_{rank}"] / 1e3, "ms", "Consul alone", own[rank], limit,
                    note=f"from the PUT's return; from its sending {seen[f'sent_{rank}'] / 1e3:.1f}")
            )  # fmt: skip


def reload(bench: Bench) -> None:
    """Lookups while a table of 100,000 keys is edited once a second."""
    bench.load(LARGE)
    seconds = 4 if bench.quick else 20
    edited = f"{bench.where} {LARGE}/alias/{EDITED_KEY}"
    last_edit = f"edit {bench.where} {bench.first_path(LARGE)} 2 10"
    for one_cpu in (True, False):
        where = "" if one_cpu else ", free"
        idle = bench.run(bench.mirror, LARGE, "warm 30", "sleep 1", f"soak {seconds}", one_cpu=one_cpu)["soak"]
        steps = ("warm 30", "sleep 1", f"edited {seconds} 0 {edited}", last_edit, "memory")
        busy = bench.run(bench.mirror, LARGE, *steps, one_cpu=one_cpu)
        base = bench.run(bench.floor, LARGE, "warm 30", f"edited {seconds} 0 {edited}", one_cpu=one_cpu)["edited"]
        steps = ("warm 30", "sleep 1", f"edited {seconds} 1000 {edited}", last_edit, "memory")
        paced = bench.run(bench.mirror, LARGE, *steps, one_cpu=one_cpu)["edited"]
        now = busy["edited"]
        bench.rows += [
            Row(f"edited each second, p99, 100k{where}", now["p99"], "us", "idle", idle["p99"], 3, as_ratio=True),
            Row(f"edited each second, latest, 100k{where}", now["max"] / 1e3, "ms", "C floor", base["max"] / 1e3, 25,
                note=f"{now['late']} of {now['answers']:,} later than 25 ms; idle {idle['max'] / 1e3:.1f} ms"),
            Row(f"the same at 1,000 a second, p99{where}", paced["p99"] / 1e3, "ms"),
            Row(f"the same at 1,000 a second, latest{where}", paced["max"] / 1e3, "ms", limit=25,
                note=f"{paced['late']} of {paced['answers']:,} later than 25 ms; from when they were due "
                     f"{paced['due_late']}, p99 {paced['due_p99'] / 1e3:.1f}, latest {paced['due_max'] / 1e3:.1f} ms"),
        ]  # fmt: skip
        if one_cpu:
            bench.rows += [
                Row("RSS, 100k, after reloads", busy["memory"]["rss_mb"], "MB", limit=68),
                Row("peak, 100k, after reloads", busy["memory"]["peak_mb"], "MB", limit=150),
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
            Row(f"direct p50{where}", ours["p50"], "us", "C, one GET", get["p50"], 4.5, as_ratio=True),
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
        wanted = 3 if service in ("netaddr", "domain") else None
        try:
            times = bench.compare([bench.mirror], rounds, service, *steps, op="check", service=service)
        except Failure as failure:
            bench.rows.append(Row(name, None, "us", "exact key", exact["p50"], wanted, as_ratio=True,
                                  note="not yet: " + str(failure).replace("\n", " ")[:500]))  # fmt: skip
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
    """The dialect of OpenSMTPD up to 7.5, and the bridge that lets a child of lines serve it."""
    bench.load(SMALL)
    rounds, many = (1, 20_000) if bench.quick else (7, 60_000)
    children = [bench.mirror, bench.imsg, bench.bridge]
    for name, asked in (("hit", HITS), ("miss", MISSES)):
        times = bench.compare(children, rounds, SMALL, "warm 30", f"lookup {many}", "memory", asked=asked)
        lines, ours, bridge = (times[child.name] for child in children)
        for rank, wanted in (("p50", True), ("p99", False)):
            alone, bridged = ours["lookup"][rank], bridge["lookup"][rank]
            bench.rows += [
                Row(f"imsg {rank}, 1k, {name}", alone, "us", "lines", lines["lookup"][rank], 1.1 if wanted else None,
                    as_ratio=True),
                Row(f"bridge {rank}, 1k, {name}", bridged, "us", "child, imsg", alone, 2.2 if wanted else None,
                    as_ratio=True),
                Row(f"bridge {rank}, 1k, {name}", bridged, "us", "child, lines", lines["lookup"][rank],
                    2.2 if wanted else None, as_ratio=True),
            ]  # fmt: skip
        memory = (bridge["memory"]["rss_mb"], "MB", "child, imsg", ours["memory"]["rss_mb"])
    bench.rows.append(Row("bridge RSS, 1k", *memory))


ROWS: dict[str, Callable[[Bench], None]] = {
    row.__name__: row for row in (start, lookup, edit, reload, direct, patterns, imsg)
}


def busy_seconds() -> float:
    """What all processors have worked since the start of the machine, what the host took from it included."""
    with Path("/proc/stat").open() as stat:
        user, nice, system, _idle, _waiting, irq, softirq, stolen = map(int, stat.readline().split()[1:9])
    return (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """What this process and its children that have ended have worked."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def build() -> None:
    """The C programs, compiled where their sources are newer."""
    BUILD.mkdir(exist_ok=True)
    for name in SOURCES:
        source, program = HERE / f"{name}.c", BUILD / name
        if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
            subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-o", program, source, "-lresolv"], check=True)


@contextlib.contextmanager
def prepared(*, quick: bool, program: Path) -> Iterator[Bench]:
    """A bench with a Consul of its own, which keeps its data as one in production does."""
    for name in [name for name in os.environ if name.startswith("CONSUL_")]:
        del os.environ[name]
    build()
    folder = Path(tempfile.mkdtemp(dir=BUILD))
    try:
        with ConsulAgent() as consul:
            yield Bench(consul, folder, quick, str(program.absolute()))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """0; 1 if something could not be measured. A target that is missed is told, and is no failure of the bench."""
    parser = argparse.ArgumentParser("bench.bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="about a minute, and rougher")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write everything that was measured")
    parser.add_argument("--only", metavar="ROW", choices=ROWS, action="append", help=f"one of {', '.join(ROWS)}")
    parser.add_argument(
        "--program",
        metavar="PATH",
        type=Path,
        default=Path(sys.executable).with_name("table-consul"),
        help="the table-consul to measure; the one beside this Python by default",
    )
    options = parser.parse_args()
    busy_before, own_before, begin = busy_seconds(), own_seconds(), time.monotonic()
    failures = []
    try:
        with prepared(quick=options.quick, program=options.program) as bench:
            for name in options.only or ROWS:
                begun = time.monotonic()
                try:
                    ROWS[name](bench)
                except Failure as failure:
                    failures.append(f"{name}: {failure}")
                print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr)
    except cache.Unavailable as missing:
        print(missing, file=sys.stderr)
        return 1
    others = (busy_seconds() - busy_before) - (own_seconds() - own_before)
    share = max(0.0, others / (time.monotonic() - begin))
    consul = ".".join(map(str, consul_version()))
    print(
        f"Consul {consul}, Python {sys.version.split()[0]}, {os.cpu_count()} processors; others took {share:.0%} of one"
    )
    print("Driver and child share one processor unless the row says free.\n")
    print(report.table(bench.rows))
    for text in failures:
        print(f"\nFAILED {text}")
    if options.json:
        rows = [vars(row) | {"ratio": row.ratio, "met": row.met} for row in bench.rows]
        everything = {"taken_by_others": share, "rows": rows, "failures": failures, "runs": bench.raw}
        options.json.write_text(json.dumps(everything, indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
