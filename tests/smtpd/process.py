"""Lines that smtpd sends to table-consul, and the program started with its own configuration."""

from __future__ import annotations

from tests.dialogue import Child, write_config

ROOT = b"table|0.1|0|aliases|lookup|alias|%08x|root"
UPDATE = b"table|0.1|0|aliases|update|%08x"


def start_child(folder, *defaults, **options):
    return Child(str(write_config(folder, *defaults, **options)))
