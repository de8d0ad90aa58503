"""Runs `table-consulctl query`, and the entries that it looks up."""

from __future__ import annotations

import json

from tests.control import control

HASH = b"$6$saltsalt$hAzWx3ml3yFuEQKiNa01wOw1/Opb7vJFfeTIDFuZfx4Ifv.aO8KNOJLMbBKSfHIiqyPDl8uE5M3GwEaybYmqf/"
MARKED = b"{SHA512-CRYPT}" + HASH
STORE: dict[bytes, bytes] = {
    b"mail/aliases/alias/root": b"gilles\n",
    b"mail/aliases/alias/Staff": b"gilles\neric # no\n# none\n",
    b"mail/aliases/alias/listed": b'["gilles", "eric"]',
    b"mail/aliases/alias/command": b"|/bin/sh",
    b"mail/aliases/alias/odd": b"ok, \x1b[2J@example.org",
    b"mail/aliases/alias/latin": b"gr\xfc\xdfe",
    b"mail/aliases/domain/*.example.org": b"",
    b"mail/aliases/userinfo/*": b"1000:1000:/home/%u",
    b"mail/aliases/userinfo/vera": b'{"uid": 7, "gid": 8, "home": "/home/v", "password": "' + HASH + b'"}',
    b"mail/aliases/userinfo/admin": b"0:0:/root",
    b"mail/aliases/credentials/vera": MARKED,
    b"mail/aliases/source/192.0.2.1": b"",
    b"mail/aliases/source/192.0.2.2": b"",
    b"mail/aliases/string/list": b'["a", "b"]',
}
"""With `prefix = "mail"`."""


def query(conf, *arguments, **options):
    return control("-c", conf, "query", "aliases", *arguments, **options)


def traced(conf, *arguments):
    """The trace of one key, as ``what text`` lines."""
    (line,) = query(conf, *arguments, "--trace", "--json").text.splitlines()
    return [f"{step['what']} {step['text']}" for step in json.loads(line)["trace"]]
