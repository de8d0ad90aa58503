"""Daemons of one table, started and queried as by smtpd, and the cost of an edit for them and for Consul."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import selectors
import signal
import socket
import statistics
import subprocess
import time
import urllib.parse
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

from bench.children import OURS_CPU, Bench, Child, Failure
from tests.rig.consul import ConsulAgent

AGENT_ADDRESS = "127.0.0.5"
LOAD_SECONDS, SEEN_SECONDS = 60.0, 60.0
# The wait for an unedited table lasts 5 minutes; with this max_age, 2 seconds.
IDLE_MAX_AGE, IDLE_WAIT, LONG_WAIT = 6, 2, 300


class Spent(NamedTuple):
    """CPU seconds and bytes, since the start or between two times."""

    consul: float
    daemons: float
    received: float | None
    at: float

    def __sub__(self, other: Spent) -> Spent:
        received = None if self.received is None or other.received is None else self.received - other.received
        return Spent(self.consul - other.consul, self.daemons - other.daemons, received, self.at - other.at)


def cpu_seconds(pid: int) -> float:
    """The CPU time of a process, its ended threads included, to the nanosecond: clock_getcpuclockid(3)."""
    return time.clock_gettime(~pid << 3 | 2)


def loopback_bytes() -> float | None:
    """Bytes over the loopback of our network namespace; None if other programs share it."""
    if not os.environ.get("BENCH_OWN_NETWORK"):
        return None
    lines = (line.split() for line in Path("/proc/net/dev").read_text().splitlines())
    return next(float(words[1]) for words in lines if words[0] == "lo:")


class Daemon:
    """A child of one table, after the handshake."""

    def __init__(self, command: list[str], table: str, errors: Path) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs, errors.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=log, cwd="/", restore_signals=False
            )
        hello = ("smtpd-version|7.9.0-portable", "protocol|0.1", f"tablename|{table}", "ready")
        self.socket.sendall("".join(f"config|{line}\n" for line in hello).encode())
        self._table = table
        self._unread = b""

    def lines(self) -> Iterator[bytes]:
        """The lines that have arrived.

        Raises:
            Failure: end of file.
        """
        data = self.socket.recv(65536)
        if not data:
            raise Failure(f"a daemon ended with {self.process.wait()}")
        *whole, self._unread = (self._unread + data).split(b"\n")
        yield from whole

    def ask(self, key: str) -> None:
        self.socket.sendall(f"table|0.1|0|{self._table}|lookup|alias|00000001|{key.lower()}\n".encode())

    def rss_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1.024 / 1e3


class Fleet:
    """``count`` daemons of a table, as a context manager that waits until all have loaded.

    ``pinned``: they and we share one processor, and Consul has the other. ``together``: all start at the same time;
    otherwise each after the last has loaded.
    """

    def __init__(
        self, bench: Bench, table: str, count: int, child: Child, *, pinned: bool, together: bool = False
    ) -> None:
        self.bench = bench
        self.table = table
        self.resolution = max(1.0, count / 5)
        """Milliseconds between the answer of a daemon and its next lookup."""
        self.load_seconds = 0.0
        self._daemons: list[Daemon] = []
        self._command = child.command(table)
        self._count = count
        self._pinned = pinned
        self._together = together
        self._selector = selectors.DefaultSelector()
        self._former: dict[str, bytes | None] = {}
        host, _, port = bench.consul.address.partition(":")
        self._editor = http.client.HTTPConnection(host, int(port), timeout=30)
        self.keys = bench.entries(table).read_text().splitlines()

    def __enter__(self) -> Self:
        self.bench.pin_consul(one_cpu=self._pinned)
        os.sched_setaffinity(0, {OURS_CPU} if self._pinned else range(os.cpu_count() or 1))
        errors = self.bench.folder / "stderr"
        errors.write_text("")
        try:
            self._load(errors)
        except Failure as failure:
            self.__exit__()
            raise Failure(f"{failure}\n{errors.read_text(errors='replace')[-2000:]}") from failure
        except BaseException:
            self.__exit__()
            raise
        return self

    def _load(self, errors: Path) -> None:
        begun, key = time.monotonic(), self.keys[0]
        value = self.bench.consul.kv_get(self.path(key))
        for number in range(self._count):
            daemon = Daemon(self._command, self.table, errors)
            self._daemons.append(daemon)
            self._selector.register(daemon.socket, selectors.EVENT_READ, daemon)
            if not self._together or number == self._count - 1:
                waiting = self._daemons if self._together else [daemon]
                self._until_answered(waiting, key, value, LOAD_SECONDS, pause=0.02)
        self.load_seconds = time.monotonic() - begun
        if "falling back to direct mode" in errors.read_text():
            raise Failure(f"{self.table} is too large to be mirrored")

    def __exit__(self, *_error: object) -> None:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
        for daemon in self._daemons:
            daemon.socket.close()
        for daemon in self._daemons:
            try:
                daemon.process.wait(10)
            except subprocess.TimeoutExpired:
                daemon.process.send_signal(signal.SIGKILL)
                daemon.process.wait()
        for path, value in self._former.items():
            self.put(path, value)
        self._editor.close()

    def path(self, key: str) -> str:
        return f"{self.table}/alias/{key}"

    def put(self, path: str, value: bytes | None) -> None:
        """Store a value, or delete the key."""
        self._editor.request("DELETE" if value is None else "PUT", "/v1/kv/" + urllib.parse.quote(path), value)
        if self._editor.getresponse().read().strip() != b"true":
            raise Failure(f"Consul refuses an edit of {path}")

    def edit(self, key: str, value: bytes | None) -> None:
        """Like `put`, but the former value is restored at the end."""
        if self.path(key) not in self._former:
            self._former[self.path(key)] = self.bench.consul.kv_get(self.path(key))
        self.put(self.path(key), value)

    def seen(self, key: str, value: bytes | None) -> list[float]:
        """Edit; the milliseconds from Consul's response until each daemon uses the edit, in ascending order."""
        self.edit(key, value)
        return self._until_answered(self._daemons, key, value, SEEN_SECONDS, pause=self.resolution / 1e3)

    def wait_for(self, key: str, value: bytes | None) -> None:
        """Return once all daemons have this value; takes one lookup each if they already do."""
        self._until_answered(self._daemons, key, value, SEEN_SECONDS, pause=0.1)

    def _until_answered(
        self, daemons: list[Daemon], key: str, value: bytes | None, seconds: float, *, pause: float
    ) -> list[float]:
        result = b"not-found" if value is None else b"found|" + value
        expected = b"lookup-result|00000001|" + result
        begun = time.monotonic()
        waiting = deque((begun, daemon) for daemon in daemons)
        times: list[float] = []
        while len(times) < len(daemons):
            now = time.monotonic()
            if now > begun + seconds:
                raise Failure(f"{len(times)} of {len(daemons)} daemons have {self.path(key)} after {seconds} s")
            while waiting and waiting[0][0] <= now:
                waiting.popleft()[1].ask(key)
            for event, _ in self._selector.select(max(0.0, waiting[0][0] - now) if waiting else 1.0):
                daemon: Daemon = event.data
                for line in daemon.lines():
                    if line == expected:
                        times.append((time.monotonic() - begun) * 1e3)
                    elif line.startswith(b"lookup-result|"):
                        waiting.append((time.monotonic() + pause, daemon))
        return times

    def spent(self) -> Spent:
        daemons = sum(cpu_seconds(daemon.process.pid) for daemon in self._daemons)
        return Spent(cpu_seconds(self.bench.consul.pid), daemons, loopback_bytes(), time.monotonic())

    def rss_mb(self) -> float:
        return statistics.median(daemon.rss_mb() for daemon in self._daemons)


class Reference(NamedTuple):
    """The cost of an idle second for Consul, and of one ``?recurse`` of the table."""

    base: Spent
    recurse: Spent


NOTHING = Spent(0, 0, 0, 0)


def reference(bench: Bench, table: str) -> Reference:
    """Measure the costs of Consul without other clients."""
    nobody = Fleet(bench, table, 0, bench.mirror, pinned=False)
    before = nobody.spent()
    time.sleep(2 if bench.quick else 10)
    spent = nobody.spent() - before
    base = each(spent, NOTHING, spent.at)
    return Reference(base, recurse(bench, table, bench.consul.address, base))


def recurse(bench: Bench, table: str, address: str, base: Spent) -> Spent:
    """The cost of one ``?recurse`` for the server, requested at this address."""
    nobody = Fleet(bench, table, 0, bench.mirror, pinned=False)
    count = 3 if bench.quick else 10
    with contextlib.closing(http.client.HTTPConnection(address, timeout=60)) as client:
        before = nobody.spent()
        for _ in range(count):
            client.request("GET", f"/v1/kv/{table}/?recurse")
            client.getresponse().read()
            time.sleep(0.2)
        return each(nobody.spent() - before, base, count)


def through_agent(bench: Bench, table: str, base: Spent) -> Spent:
    """The cost of one ``?recurse`` through the agent of a mail host."""
    server = f"{bench.consul.bind}:{bench.consul.ports['serf_lan']}"
    arguments = ("-node=client", f"-retry-join={server}")
    with ConsulAgent(bind=AGENT_ADDRESS, arguments=arguments, server=False) as agent:
        time.sleep(2)
        return recurse(bench, table, agent.address, base)


def each(spent: Spent, base: Spent, count: float) -> Spent:
    """The cost of each of ``count`` operations, without that of idle time."""
    consul = max(0.0, spent.consul - base.consul * spent.at)
    received = None
    if spent.received is not None:
        received = max(0.0, spent.received - (base.received or 0) * spent.at) / count
    return Spent(consul / count, spent.daemons / count, received, spent.at / count)


KINDS = ("changed", "added", "deleted")
Edit = tuple[str, bytes | None]


def edits(keys: list[str], kind: str, count: int) -> list[Edit]:
    """Random keys with new values; new keys beside random ones; the same deleted."""
    chance = random.Random(count)
    chosen = [chance.choice(keys) for _ in range(count)]
    if kind == "changed":
        # Never the stored value, which would not be an edit to Consul.
        return [(key, f"edited-{random.getrandbits(64):016x}@example.net".encode()) for key in chosen]
    beside = [f"{key[:12]}-{number}{key[12:]}" for number, key in enumerate(chosen)]
    return [(key, b"added@example.net" if kind == "added" else None) for key in beside]


def quietly(fleet: Fleet, base: Spent, todo: list[Edit], pause: float) -> Spent:
    """The cost of one edit without lookups; after each, a pause until all daemons have read it."""
    before = fleet.spent()
    for key, value in todo:
        fleet.edit(key, value)
        time.sleep(pause)
    fleet.wait_for(*todo[-1])
    return each(fleet.spent() - before, base, len(todo))


def idle(fleet: Fleet, base: Spent, seconds: float) -> Spent:
    """The cost of a second without lookups and edits."""
    before = fleet.spent()
    time.sleep(seconds)
    return each(fleet.spent() - before, base, seconds)
