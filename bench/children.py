"""The children, how the driver measures them, and the tables in Consul and files that they serve."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench.report import Row
from bench.tables import absent, addresses, aliases, domains, expressions, networks, people, write_keys
from tests.rig.consul import ConsulAgent

HERE = Path(__file__).resolve().parent
BUILD = HERE / "build"

# Both processes share one processor, because waking another costs more than the measured work. Consul has the other,
# so that its work is not counted as ours.
OURS_CPU, CONSUL_CPU = 1, 0
# Keys of 100 bytes with a common prefix, and keys that look like real names.
SMALL, LARGE, MILLION = "t1k", "t100k", "t1M"
PEOPLE = ("p1k", "p10k", "p100k", "p1M")
SIZES = {SMALL: 1_000, LARGE: 100_000, MILLION: 1_000_000}
ALIASES: dict[str, Callable[[], dict[str, str]]] = {
    **{table: partial(aliases, count) for table, count in SIZES.items()},
    **{table: partial(people, 10**power) for power, table in enumerate(PEOPLE, 3)},
}
# The keys of the lookups: found, not found, and both. At least half of smtpd's lookups are not found.
HITS, MISSES, HALVES = "", ".misses", ".halves"
DRIVER_SECONDS = 600

Times = dict[str, Any]
PATTERNS = {"netaddr": networks, "domain": domains, "mailaddr": addresses, "regex": expressions}


class Failure(Exception):
    """A wrong or missing answer of a child; with the text of the driver."""


@dataclass
class Child:
    """A program started as smtpd starts a table."""

    name: str
    command: Callable[[str], list[str]]
    """The command line for a table."""
    dialect: str = "lines"
    """The driver's -p."""


@dataclass
class Bench:
    """Consul, the folder of all files, the children, and the rows measured so far."""

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
        """A script to start as a program: with the name of the table as argv[0], Python would not find its library."""
        path = self.folder / name
        if not path.exists():
            path.write_text(f"#!{interpreter}\n" + (HERE / f"{name}.py").read_text())
            path.chmod(0o755)
        return str(path)

    def configuration(self, mode: str, max_age: int = 86_400) -> Path:
        path = self.folder / f"{mode}-{max_age}.toml"
        path.write_text(
            f'[consul]\naddress = "http://{self.consul.address}"\n'
            f'[defaults]\nmode = "{mode}"\nmax_age = {max_age}\nmax_keys = 2_000_000\n'
            '[log]\ntarget = "stderr"\n'
        )
        return path

    def bridged(self, table: str) -> list[str]:
        """The mirror as smtpd starts it with ``procexec:``: everything after the colon is one argument."""
        return [str(Path(self.program).with_name("table-procexec")), shlex.join(self.mirror.command(table))]

    def load(self, *tables: str) -> None:
        """Store these tables in Consul, and write their keys to a file."""
        for table in tables:
            if table in self.loaded:
                continue
            asked: dict[str, str | None]
            if table in ALIASES:
                service, entries = "alias", ALIASES[table]()
                asked = {key.lower(): value for key, value in entries.items()}
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
        """The Consul key that the driver edits."""
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
        """The measurements of the driver by step name; the last of steps with the same name."""
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
            log = errors.read_text(errors="replace")[-2000:] if errors.exists() else ""
            raise Failure(f"{child.name}: {done.stderr.strip()}\n{log}".strip())
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
        """The median over the rounds of every measurement, by child. The children take turns: A B A B."""
        results: dict[str, list[dict[str, Any]]] = {child.name: [] for child in children}
        for _ in range(rounds):
            for child in children:
                results[child.name].append(self.run(child, table, *steps, **how))
        return {name: median(several) for name, several in results.items()}


def median(results: list[Any]) -> Any:
    """The median of numbers, or of each number in dictionaries of the same form."""
    first = results[0]
    if isinstance(first, dict):
        return {key: median([result[key] for result in results]) for key in first}
    return statistics.median(results) if isinstance(first, int | float) else first
