"""A table program for tests, an smtpd that speaks imsg, and a clock that tests advance."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import time

from table_consul.backoff import LAST_PAUSE_SECONDS
from table_consul.imsg import MAX_VALUE
from table_consul.protocol import Failed, Request
from tests.dialogue import TIMEOUT_SECONDS, eventually
from tests.smtpd.imsg import ALIAS, LOOKUP, UPDATE, message, opening, question

RUN = (sys.executable, "-c", "import sys; from table_consul.procexec import main; sys.exit(main())")
ROOT = Request("lookup", b"", "t", "alias", b"root")
OK, ABSENT, ERROR = 1, 0, -1

# A table program of the current dialect that starts quickly; each test supplies its actions before a reply.
TABLE = """\
import os, sys, time
config, number = {}, 0
for line in sys.stdin:
    word, *rest = line.rstrip("\\n").split("|")
    if word == "config":
        if rest == ["ready"]:
            print("register|alias\\nregister|source\\nregister|ready", flush=True)
        else:
            config[rest[0]] = rest[1]
        continue
    _, _, table, op, *rest = rest
    service, ident, key = (["", *rest, ""] if op == "update" else [*rest, ""])[:3]
    answer = "ok" if op == "update" else "found" if op == "check" else "found|gilles"
    number += 1
    answer = {
        "nobody": "not-found",
        "pid": f"found|{os.getpid()}",
        "number": f"found|{number}",
        "config": f"found|{config}",
        "arguments": f"found|{sys.argv[1:]}",
        "empty": "found|",
        "return": "found|a\\rb",
        "nul": "found|a\\0b",
        "pipes": "found|a|b",
        "longest": "found|" + "x" * MOST,
        "too long": "found|" + "x" * (MOST + 1),
        "error": "error|no idea",
    }.get(key, answer)
    if key == "stderr":
        print("hello from below", file=sys.stderr, flush=True)
    BEFORE_THE_REPLY
    print(f"{op}-result|{ident}|{answer}", flush=True)
""".replace("MOST", str(MAX_VALUE))
OF_TODAY = TABLE.replace("BEFORE_THE_REPLY", "pass")


def table_program(action):
    return TABLE.replace("BEFORE_THE_REPLY", action)


class Smtpd:
    """smtpd up to 7.5 as its child sees it: a socket as standard input, and no socket as standard output."""

    def __init__(self, *command, environ=None, begin=True):
        self.wire, theirs = socket.socketpair()
        self.wire.settimeout(TIMEOUT_SECONDS)
        with theirs:
            self.process = subprocess.Popen(
                command,
                stdin=theirs,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, **(environ or {})},
                cwd="/",
            )
        if begin:
            self.wire.sendall(opening(b"users"))
            assert self.message() == b""

    def message(self):
        head = self.exactly(16)
        kind, length, flags, _, _ = struct.unpack("=IHHII", head)
        assert (kind, flags) == (0, 0)
        return self.exactly(length - 16)

    def exactly(self, size):
        data = b""
        while len(data) < size:
            more = self.wire.recv(size - len(data))
            assert more, f"it is gone after {data!r}: {self.process.stderr.read().decode()}"
            data += more
        return data

    def ask(self, kind=LOOKUP, bit=ALIAS, key=b"root"):
        self.wire.sendall(message(UPDATE) if kind == UPDATE else question(kind, bit, key + b"\0" if key else b""))
        body = self.message()
        return struct.unpack_from("=i", body)[0], body[4:].rstrip(b"\0")

    def end(self):
        """The exit status after end of file, standard output, and standard error."""
        self.wire.close()
        output, log = self.process.communicate(timeout=TIMEOUT_SECONDS)
        return self.process.returncode, output, log.decode()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wire.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(TIMEOUT_SECONDS)
        self.process.kill()
        self.process.communicate()


def bridged(*command, **options):
    return Smtpd(*RUN, *command, **options)


def wait_for_answer(smtpd):
    for _ in eventually("an answer"):
        if smtpd.ask()[0] == OK:
            return


def first_answer(made, clock, key=b"root"):
    """The first answer of this bridge other than Failed, after any pauses between starts of its child."""
    for _ in eventually("an answer"):
        reply = made.answer(Request("lookup", b"", "t", "alias", key), clock())
        if not isinstance(reply, Failed):
            return reply
        clock.ahead += LAST_PAUSE_SECONDS
    return None


class Clock:
    """Real time plus the seconds that a test adds; after ``stopped``, a stopped clock."""

    def __init__(self):
        self.ahead = 0.0
        self.now = None

    def __call__(self):
        return time.monotonic() + self.ahead if self.now is None else self.now

    def stopped(self):
        self.now = self()
        return self.now

    def run_on(self, seconds):
        self.ahead = self.now + seconds - time.monotonic()
        self.now = None
