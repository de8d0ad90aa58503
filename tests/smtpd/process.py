"""Lines that smtpd sends to table-consul, and the program started with its own configuration."""

from __future__ import annotations

from tests.dialogue import Child, write_config

ROOT = b"table|0.1|0|aliases|lookup|alias|%08x|root"
UPDATE = b"table|0.1|0|aliases|update|%08x"

NO_THREADS = """
import sys, threading

def fail(thread):
    raise RuntimeError("can't start new thread")

threading.Thread.start = fail
from table_consul import fallback
raise SystemExit(fallback.run("table_consul.cli"))
"""
"""The program on a host where no thread can be started."""


def start_child(folder, *defaults, **options):
    return Child(str(write_config(folder, *defaults, **options)))
