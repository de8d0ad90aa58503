"""RCPT commands per second through a real smtpd, with the same virtual addresses in a file, SQLite and Consul."""

from __future__ import annotations

import contextlib
import random
import socket
import sqlite3
import statistics
import sys
import tempfile
import time
from pathlib import Path

from bench.children import Bench, Failure
from bench.report import Row
from tests.rig import cache
from tests.rig.consul import free_ports
from tests.rig.opensmtpd import CONFIG, LIBEXEC, Smtpd
from tests.rig.root import File, Root

RELEASES = {"7.9": ("opensmtpd-table-sqlite", "forky"), "6.8": ("opensmtpd-extras", "bookworm")}
"""Debian's package of table-sqlite, by release of OpenSMTPD."""
SIZES = {"1k": 1_000, "10k": 10_000, "100k": 100_000}
OURS, FILE, SQLITE = "consul", "file:", "table-sqlite"
GOALS = {FILE: 1.0, SQLITE: 1.1}
# smtpd takes 1,000 recipients in a message by default, and 100 messages in a session.
RECIPIENTS = 100
VISIT_SECONDS = 0.4


class Session:
    """One SMTP session that waits for each reply."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), 60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._replies = self._socket.makefile("rb")
        self._replies.readline()
        self.command("HELO bench.example", "250")

    def command(self, line: str, expected: str) -> None:
        self._socket.sendall(f"{line}\r\n".encode())
        reply = self._replies.readline().decode()
        if not reply.startswith(expected):
            raise Failure(f"{line}: {reply.strip()}, expected {expected}")

    def rcpts(self, addresses: list[str], expected: str) -> float:
        """The duration of the RCPT commands in seconds."""
        self.command("MAIL FROM:<>", "250")
        begun = time.monotonic()
        for address in addresses:
            self.command(f"RCPT TO:<{address}>", expected)
        seconds = time.monotonic() - begun
        self.command("RSET", "250")
        return seconds

    def close(self) -> None:
        self._replies.close()
        self._socket.close()


def database(entries: dict[str, str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "addresses.sqlite"
        with contextlib.closing(sqlite3.connect(path)) as base, base:
            base.execute("CREATE TABLE addresses (address TEXT PRIMARY KEY, value TEXT NOT NULL)")
            base.executemany("INSERT INTO addresses VALUES (?, ?)", entries.items())
        return path.read_bytes()


def table_sqlite(release: str) -> bytes | None:
    """Debian's table-sqlite; None if unavailable, with the reason printed."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            cache.download(*RELEASES[release], Path(folder))
            return (Path(folder) / LIBEXEC / "table-sqlite").read_bytes()
    except (cache.Unavailable, OSError) as error:
        print(f"no table-sqlite for OpenSMTPD {release}: {error}", file=sys.stderr)
        return None


def rcpts(bench: Bench) -> None:
    """Rows for each release and size."""
    for release in ("7.9",) if bench.quick else RELEASES:
        root, program = Root(release), table_sqlite(release)
        for size, count in SIZES.items():
            entries = {f"user{number:07}@example.org": "gilles" for number in range(count)}
            bench.consul.kv_txn({f"consul{size}/alias/{address}": user for address, user in entries.items()})
            measured = compare(bench, root, program, f"consul{size}", entries)
            for (found, table), rate in measured.items():
                if table != OURS:
                    name = f"RCPTs a second, {size}, {found}, OpenSMTPD {release}"
                    ours = measured[found, OURS]
                    bench.rows.append(Row(name, ours, "/s", table, rate, GOALS[table], at_least=True, as_ratio=True))


def compare(
    bench: Bench, root: Root, program: bytes | None, table: str, entries: dict[str, str]
) -> dict[tuple[str, str], float]:
    """RCPT commands per second, by hits or misses and by table; listeners take turns."""
    tables = {
        FILE: "table listed file:/etc/mail/addresses",
        SQLITE: "table stored sqlite:/etc/mail/sqlite.conf",
        OURS: f"table {table} consul:{CONFIG}",
    }
    if program is None:
        del tables[SQLITE]
    ports = dict(zip(tables, free_ports(len(tables)), strict=True))
    lines = ["listen on 127.0.0.1 port $smtp_port", *tables.values()]
    for port, text in zip(ports.values(), tables.values(), strict=True):
        name = text.split()[1]
        lines += [
            f"listen on 127.0.0.1 port {port} tag {name}",
            f'action "{name}" maildir virtual <{name}>',
            f'match tag {name} from any for domain "example.org" action "{name}"',
        ]
    files: dict[str, File | str | bytes] = {
        "/etc/mail/addresses": "".join(f"{address}: {user}\n" for address, user in entries.items()),
        "/etc/mail/sqlite.conf": "dbpath /etc/mail/addresses.sqlite\n"
        "query_alias SELECT value FROM addresses WHERE address=?\n",
        "/etc/mail/addresses.sqlite": database(entries),
        CONFIG: f'[consul]\naddress = "http://{bench.consul.address}"\n',
    }
    if program is not None:
        files[f"/{LIBEXEC}/table-sqlite"] = File(program, 0o755)
    chance, known = random.Random(table), list(entries)
    rates: dict[tuple[str, str], list[float]] = {}
    with contextlib.closing(Smtpd(root, "\n".join(lines) + "\n", files)) as smtpd:
        smtpd.start(trace="")
        for number in range(3 if bench.quick else 11):
            for found, expected in (("hits", "250"), ("misses", "5")):
                for each, port in ports.items():
                    count, seconds = 0, 0.0
                    with contextlib.closing(Session(port)) as session:
                        while seconds < VISIT_SECONDS:
                            asked = chance.sample(known, RECIPIENTS)
                            if found == "misses":
                                asked = [f"absent-{address}" for address in asked]
                            seconds += session.rcpts(asked, expected)
                            count += RECIPIENTS
                    if number:  # the first round warms up
                        rates.setdefault((found, each), []).append(count / seconds)
    return {where: statistics.median(several) for where, several in rates.items()}
