"""Repeats recorded requests to two real Consuls (tests/consul/answers) on a fake, in the same order and state."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import json
import re
import threading
import time
from dataclasses import dataclass, field
from gzip import decompress
from pathlib import Path
from typing import Any

from tests.fake_consul import FakeConsul
from tests.fake_consul.acl import MANAGEMENT, accessor
from tests.fake_consul.store import Entry

VERSIONS = ("1.8.7", "1.22")
ANSWERS = Path(__file__).parent / "answers"
HASTE = 10  # Waits are this many times shorter than the recorded ones.

RULES = {
    "reader": 'key_prefix "aliases/" { policy = "read" }',
    "vip-denied": 'key_prefix "aliases/" { policy = "read" }\nkey "aliases/alias/vip" { policy = "deny" }',
    "net-denied": 'key_prefix "aliases/" { policy = "read" }\nkey_prefix "aliases/netaddr/203." { policy = "deny" }',
    "one-folder": 'key_prefix "aliases/alias/" { policy = "read" }',
    "one-key": 'key "aliases/alias/root" { policy = "read" }',
    "writer": 'key_prefix "aliases/" { policy = "write" }',
    "nothing": 'node_prefix "" { policy = "read" }',
    "management": MANAGEMENT,
}
ENTRIES = {
    b"aliases/alias/root": b"gilles",
    b"aliases/alias/vip": b"ceo",
    b"aliases/alias/user@example.org": b"gilles",
    b"aliases/alias/a+b@example.org": b'["gilles", "eric"]',
    b"aliases/alias/Root": b"eric",
    b"aliases/domain/example.org": b"",
    b"aliases/netaddr/192.0.2.0/24": b"",
    b"aliases/netaddr/203.0.113.0/24": b"",
    b"aliases/userinfo/*": b"5000:5000:/var/vmail/%u",
    b"aliases/userinfo/boss": b"1001:1001:/home/boss",
    b"aliases/empty/": b"",
    b"other/secret": b"s",
}
ODD_NAMES = ("a//b", "a/../b", "end ", " start", "u%20x", "new\nline", "é", "\u0085")


def _sets(names: Any, value: bytes = b"x") -> bytes:
    coded = base64.b64encode(value).decode()
    return json.dumps([{"KV": {"Verb": "set", "Key": name, "Value": coded}} for name in names]).encode()


# The bodies that the recording cuts.
LONG_BODIES = {
    "write/put-too-large": b"x" * 600_000,
    "txn/names-no-url-has": _sets(f"odd/alias/{name}" for name in ODD_NAMES),
    "txn/65-operations": _sets(f"odd/n/{number}" for number in range(65)),
    "txn/129-operations": _sets(f"odd/n/{number}" for number in range(129)),
    "txn/too-large": _sets(["odd/large"], b"x" * 600_000),
}
# What happened half a second after a wait began.
DURING = {
    "wait/woken-by-an-edit": lambda fake: fake.put(b"aliases/alias/root", b"eric"),
    "wait/woken-by-an-edit-recurse": lambda fake: fake.put(b"aliases/netaddr/192.0.2.0/24", b"x"),
    "wait/not-woken-by-another-folder": lambda fake: fake.put(b"aliases/alias/root", b"again"),
    "wait/woken-by-the-same-value": lambda fake: fake.put(b"aliases/alias/root", b"again"),
    "wait/woken-by-a-deletion": lambda fake: fake.delete(b"aliases/alias/new2"),
    "wait/woken-by-the-last-deletion": lambda fake: fake.delete(b"aliases/empty/"),
    "wait/absent-folder-elsewhere-written": lambda fake: fake.put(b"zzz/other", b"x"),
    "wait/absent-folder-appears": lambda fake: fake.put(b"aliases/nothing/a", b"x"),
}


@dataclass
class Exchange:
    """A recorded request with its response, and the response of the fake."""

    version: str
    row: dict[str, Any]
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""
    seconds: float = 0.0

    @property
    def agent(self) -> str:
        group = self.row["name"].partition("/")[0]
        return group if group in {"acl", "hardened", "validation-off"} else "plain"


@functools.cache
def rows(version: str) -> list[dict[str, Any]]:
    """The lines of the recording."""
    with open(ANSWERS / f"{version}.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@functools.cache
def exchanges(version: str) -> list[Exchange]:
    """Every recorded request of a version, with the response of the fake."""
    found = [Exchange(version, row) for row in rows(version)]
    for agent in ("plain", "acl", "hardened", "validation-off"):
        with FakeConsul(version=version) as fake:
            _prepare(fake, agent)
            indexes: dict[str, str] = {}
            for exchange in found:
                if exchange.agent == agent:
                    _exchange(fake, exchange, indexes)
    return found


def _prepare(fake: FakeConsul, agent: str) -> None:
    if agent == "plain":
        for key, value in ENTRIES.items():
            fake.put(key, value)
    elif agent == "acl":
        fake.tokens = {f"secret-of-{role}": rules for role, rules in RULES.items()}
        fake.policies = {f"secret-of-{role}": role for role in RULES if role != "management"}
        _transact(fake, ENTRIES)
    elif agent == "hardened":
        fake.write_allowed = False
        fake.block_endpoints = (b"/v1/txn",)
    else:
        fake.disable_kv_key_validation = True


def _transact(fake: FakeConsul, entries: dict[bytes, bytes]) -> None:
    """Store the entries as one change."""
    index = fake.index + 1
    added = {key: Entry(value, 0, index, index) for key, value in entries.items()}
    fake.store.replace(fake.store.entries | added)


def _before(fake: FakeConsul, name: str) -> None:
    """Make the changes that the recording made without a line for them."""
    if name == "size/plain":
        for first in range(0, 300, 64):
            numbers = range(first, min(first + 64, 300))
            _transact(fake, {b"many/alias/user%04d" % number: b"gilles@example.org" for number in numbers})
    elif name == "acl/changed/wait-after-lifting":
        fake.tokens["secret-of-vip-denied"] = RULES["reader"]


def _exchange(fake: FakeConsul, exchange: Exchange, indexes: dict[str, str]) -> None:
    """Ask the fake; `indexes` maps recorded indexes to those of the fake."""
    row, name = exchange.row, exchange.row["name"]
    _before(fake, name)
    path = re.sub(r"\bindex=(\d+)", lambda index: f"index={indexes.get(index[1], index[1])}", row["path"])
    path = re.sub(r"\bwait=(\d+)s", lambda wait: f"wait={int(wait[1]) * 1000 // HASTE}ms", path)
    headers = {key: _secret(value) for key, value in row.get("sent", {}).items()}
    if "token" in row:
        headers["X-Consul-Token"] = row["token"] if row["token"] == "anonymous" else f"secret-of-{row['token']}"
    body = LONG_BODIES.get(name, row.get("body", "").encode())
    timer = threading.Timer(0.5 / HASTE, DURING[name], [fake]) if name in DURING else None
    with contextlib.closing(http.client.HTTPConnection(fake.address.removeprefix("http://"), timeout=10)) as connection:
        began = time.monotonic()
        if timer:
            timer.start()
        connection.putrequest(row["method"], _secret(path), skip_accept_encoding=True)
        for key, value in headers.items():
            connection.putheader(key, value)
        if body or row["method"] in {"PUT", "POST"}:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        data = answer.read()
        exchange.seconds = time.monotonic() - began
    if timer:
        timer.join()
    exchange.status, exchange.headers = answer.status, dict(answer.getheaders())
    if exchange.headers.get("Content-Encoding") == "gzip":
        data = decompress(data)
    exchange.body = data.decode()
    for role in RULES:
        exchange.body = exchange.body.replace(accessor(f"secret-of-{role}"), f"<accessor of {role}>")
        exchange.body = exchange.body.replace(f"secret-of-{role}", f"<secret of {role}>")
    index = row["headers"].get("X-Consul-Index")
    if index is not None and "X-Consul-Index" in exchange.headers:
        indexes[index] = exchange.headers["X-Consul-Index"]


def _secret(text: str) -> str:
    return re.sub(r"<secret of ([a-z-]+)>", r"secret-of-\1", text)
