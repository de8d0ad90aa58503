"""Dialogues between smtpd and its table as text files, and the parties that replay them.

A transcript holds requests of smtpd (`> `), replies (`< `), comments (`# `), and lines of the configuration's
`[defaults]` (`#: `). `\\xNN` stands for a byte, `\\\\` for a backslash. The table answers from `ENTRIES`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from table_consul import config
from table_consul.server import Server
from table_consul.tables import Tables

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

TRANSCRIPTS = sorted((Path(__file__).parent / "transcripts").glob("*.txt"))
TIMEOUT_SECONDS = 30

ENTRIES: dict[str, bytes] = {
    **{
        f"{table}/{key}": value
        for table in ("aliases", "consul", "table-name")
        for key, value in {
            "alias/root": b"gilles\n",
            "alias/staff": b"gilles\neric\n",
            "alias/quoted": b'"gilles"',
            "alias/command": b"|/bin/sh",
            "alias/a|b": b"pipes",
            "domain/example.org": b"",
            "credentials/gilles": b"$6$salt$hash",
            "credentials/broken": b"$6$salt$hash\n$6$other$hash",
            "mailaddr/gilles@poolp.org": b"",
            "source/192.0.2.1": b"",
            "source/192.0.2.2": b"",
            "string/empty": b"",
        }.items()
    }
}


def write_source(folder: Path, entries: dict[str, bytes] = ENTRIES) -> Path:
    """The path of a new file with these entries in the format of `consul kv export`."""
    path = folder / "export.json"
    fields = ({"key": key, "flags": 0, "value": base64.b64encode(value).decode()} for key, value in entries.items())
    path.write_text(json.dumps([*fields]))
    return path


def write_config(folder: Path, *defaults: str, more: str = "", address: str | None = None) -> Path:
    """The path of a new configuration that answers from `ENTRIES`, with these lines in `[defaults]`."""
    address = address or f"file://{write_source(folder)}"
    path = folder / "table-consul.toml"
    lines = ["[consul]", f'address = "{address}"', "[defaults]", *defaults, more]
    path.write_text("\n".join([*lines, '[log]\ntarget = "stderr"' if "[log]" not in more else "", ""]))
    return path


@dataclass(frozen=True)
class Dialogue:
    name: str
    defaults: tuple[str, ...]
    turns: tuple[tuple[bytes, bytes], ...]
    """Requests of smtpd, each with the replies that precede the next request."""

    @property
    def said(self) -> bytes:
        return b"".join(said for said, _ in self.turns)

    @property
    def answered(self) -> bytes:
        return b"".join(answered for _, answered in self.turns)


def _bytes(line: str) -> bytes:
    return re.sub(
        rb"\\(\\|x[0-9a-f]{2})",
        lambda match: b"\\" if match[1] == b"\\" else bytes.fromhex(match[1][1:].decode()),
        line.encode(),
    )


def read_transcript(path: Path) -> Dialogue:
    defaults: list[str] = []
    turns: list[list[bytes]] = []
    for line in path.read_text().split("\n"):
        mark, text = line[:2], line[2:]
        if mark == "> ":
            turns.append([_bytes(text) + b"\n", b""])
        elif mark == "< ":
            turns[-1][1] += _bytes(text) + b"\n"
        elif line.startswith("#: "):
            defaults.append(line[3:])
        else:
            assert line == "" or line.startswith("#"), f"{path}: {line!r}"
    return Dialogue(path.stem, tuple(defaults), tuple((said, answered) for said, answered in turns))


def converse(tables: Tables, chunks: Iterable[bytes]) -> bytes:
    """All bytes that the server writes when it reads these chunks one at a time."""
    written: list[bytes] = []
    arriving = filter(None, chunks)
    server = Server(
        tables, lambda _name: None, counters=tables.counters, procexec_reply=tables.procexec_reply, clock=lambda: 0.0
    )
    server.run(next(arriving, b""), lambda: next(arriving, b""), lambda data: written.append(data) or True)
    return b"".join(written)


def open_tables(path: Path, environ: dict[str, str] | None = None) -> Tables:
    return Tables(lambda: config.load(str(path), environ or {}))


class Child:
    """The program as smtpd starts it: one socket as standard input and output, in `/`, with signals ignored."""

    def __init__(self, *arguments: str, environ: dict[str, str] | None = None, command: Iterable[str] = ()) -> None:
        self.wire, theirs = socket.socketpair()
        self.wire.settimeout(TIMEOUT_SECONDS)
        self._said, self._log = b"", b""
        with theirs:
            self.process = subprocess.Popen(
                [*(command or [sys.executable, "-m", "table_consul"]), *arguments],
                stdin=theirs,
                stdout=theirs,
                stderr=subprocess.PIPE,
                cwd="/",
                env={**{k: v for k, v in os.environ.items() if not k.startswith("CONSUL_")}, **(environ or {})},
                preexec_fn=_ignore_signals,  # noqa: PLW1509 - one system call each, and no other way to ignore
                restore_signals=False,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.wire.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(TIMEOUT_SECONDS)
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def say(self, data: bytes) -> None:
        self.wire.sendall(data)

    def line(self) -> bytes:
        """The next reply line, without its line end."""
        while b"\n" not in self._said:
            data = self.wire.recv(65536)
            assert data, f"the child is gone after {self._said!r}: {self.log()}"
            self._said += data
        line, _, self._said = self._said.partition(b"\n")
        return line

    def ask(self, line: bytes) -> bytes:
        self.say(line + b"\n")
        return self.line()

    def handshake(self, table: bytes = b"aliases", version: bytes = b"7.9.0-portable") -> list[bytes]:
        """The names of the registered services."""
        self.say(
            b"config|smtpd-version|%b\nconfig|protocol|0.1\nconfig|tablename|%b\nconfig|ready\n" % (version, table)
        )
        names = []
        while (line := self.line()) != b"register|ready":
            names.append(line.removeprefix(b"register|"))
        return names

    def quiet(self) -> bool:
        """Whether no unread reply is pending."""
        return not self._said and not select.select([self.wire], [], [], 0)[0]

    def rest(self) -> bytes:
        """All remaining replies after end of file."""
        with contextlib.suppress(OSError):
            self.wire.shutdown(socket.SHUT_WR)
        while data := self.wire.recv(65536):
            self._said += data
        return self._said

    def end(self) -> int:
        """The exit status after end of file."""
        self.rest()
        return self.process.wait(TIMEOUT_SECONDS)

    def log(self) -> str:
        """All of standard error; the child must be about to end."""
        assert self.process.stderr is not None
        if not self.process.stderr.closed:
            self._log += self.process.stderr.read()
        return self._log.decode()


def _ignore_signals() -> None:
    """Ignore the signals that smtpd ignores before it forks (smtpd: lka.c, lka); exec keeps them ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)


def eventually(what: object, timeout: float = TIMEOUT_SECONDS) -> Iterator[None]:
    """Yield until the caller leaves the loop.

    Raises:
        AssertionError: the caller is still waiting for ``what`` after ``timeout`` seconds.
    """
    by = time.monotonic() + timeout
    while time.monotonic() < by:
        yield
        time.sleep(0.01)
    raise AssertionError(f"not within {timeout} s: {what}")
