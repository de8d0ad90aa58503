"""Measures table-consul beside reference children and prints each result with its target.

``python -m bench.bench [--quick] [--json FILE] [--only ROW ...]``; bench/README.md explains the output.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import costs, report, smtpd
from bench.children import BUILD, HERE, Bench, Failure
from bench.rows import ROWS as LOOKUPS
from tests.rig import cache
from tests.rig.consul import ConsulAgent, consul_binary, consul_version

ROWS: dict[str, Callable[[Bench], None]] = {**LOOKUPS, "edit": costs.edit, "million": costs.million}
SOURCES = ("driver", "floor", "get", "walk")


def busy_seconds() -> float:
    """Busy seconds of all processors since boot, including time stolen by the host."""
    with Path("/proc/stat").open() as stat:
        user, nice, system, _idle, _waiting, irq, softirq, stolen = map(int, stat.readline().split()[1:9])
    return (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """CPU seconds of this process and its ended children."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def build() -> None:
    """Compile the C programs whose sources are newer."""
    BUILD.mkdir(exist_ok=True)
    for name in SOURCES:
        source, program = HERE / f"{name}.c", BUILD / name
        if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
            subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-o", program, source, "-lresolv"], check=True)


def enter_network(arguments: list[str]) -> None:
    """Run again in a new network namespace if possible, whose loopback counts only our bytes."""
    if os.environ.get("BENCH_OWN_NETWORK"):
        return
    consul_binary()  # a download must happen before
    for namespace in (("unshare", "--net"), ("unshare", "--net", "--map-root-user")):
        up = (*namespace, "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
        try:
            if subprocess.run((*up, "true"), capture_output=True, check=False).returncode == 0:
                command = (*up, sys.executable, "-m", "bench.bench", *arguments)
                os.execvpe(command[0], command, os.environ | {"BENCH_OWN_NETWORK": "1"})
        except FileNotFoundError:
            break
    print("no network namespace to be had here, so no bytes are counted", file=sys.stderr)


@contextlib.contextmanager
def prepared(*, quick: bool, program: Path) -> Iterator[Bench]:
    """A bench with its own Consul, which stores data as in production."""
    for name in [name for name in os.environ if name.startswith("CONSUL_")]:
        del os.environ[name]
    build()
    folder = Path(tempfile.mkdtemp(dir=BUILD))
    try:
        # All daemons of the fleet share one address here; in production each has its own.
        with ConsulAgent(hcl="limits { http_max_conns_per_client = 4000 }\n") as consul:
            yield Bench(consul, folder, quick, str(program.absolute()))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """The exit status: 0, or 1 if a measurement failed. A missed target is printed and is not a failure."""
    parser = argparse.ArgumentParser("bench.bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="about a minute, and rougher")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write everything that was measured")
    parser.add_argument("--fleet", metavar="N", type=int, help="only N daemons of one table")
    parser.add_argument("--smtpd", action="store_true", help="only RCPTs a second through a real smtpd")
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
    todo = {
        name: ROWS[name] for name in options.only or ROWS if options.only or not (options.quick and name == "million")
    }
    if options.fleet or options.smtpd:
        todo = {"fleet": costs.fleet(options.fleet)} if options.fleet else {}
        todo |= {"smtpd": smtpd.rcpts} if options.smtpd else {}
    try:
        if not options.smtpd:
            enter_network(sys.argv[1:])
        with prepared(quick=options.quick, program=options.program) as bench:
            for name, measure in todo.items():
                begun = time.monotonic()
                try:
                    measure(bench)
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
