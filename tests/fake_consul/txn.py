"""Transactions: several operations on keys, applied all or not at all."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from tests.fake_consul.acl import Identity
from tests.fake_consul.messages import Answer, to_json
from tests.fake_consul.store import Entry

if TYPE_CHECKING:
    from tests.fake_consul.server import FakeConsul

WRITES = {"set", "cas", "delete", "delete-cas", "delete-tree"}


class Conflict(Exception):
    """An operation that fails, and with it the transaction."""


def most(version: tuple[int, ...]) -> int:
    """The maximum number of operations in a transaction."""
    return 128 if version >= (1, 14) else 64


def run(fake: FakeConsul, identity: Identity, body: bytes) -> Answer:
    """The response to a transaction, which validates no names."""
    operations = [each["KV"] for each in json.loads(body)]
    writes = any(each["Verb"] in WRITES for each in operations)
    errors = _refused(fake, identity, operations)
    results: list[tuple[bytes, Entry, bool]] = []
    if not errors:
        with fake.store.changed:
            entries, index = dict(fake.store.entries), fake.store.index + 1
            for at, operation in enumerate(operations):
                try:
                    results += _applied(fake.since, entries, operation, index)
                except Conflict as conflict:
                    errors.append((at, str(conflict)))
            if writes and not errors:
                fake.store.replace(entries)
    shown = [(key, entry, whole) for key, entry, whole in results if identity.allows(key)]
    outcome = {
        "Results": None if errors else [{"KV": entry.to_dict(key, with_value=whole)} for key, entry, whole in shown],
        "Errors": [{"OpIndex": at, "What": what} for at, what in errors] or None,
    }
    headers = {"Content-Type": "application/json"}
    if errors and fake.since >= (1, 20):
        headers["Content-Type"] += "; charset=utf-8"
    if not writes:
        headers |= {"X-Consul-Knownleader": "true", "X-Consul-Lastcontact": "0"}
        outcome |= {"Index": 0, "LastContact": 0, "KnownLeader": True, "ConsistencyLevel": ""}
        if fake.since >= (1, 11):
            filtered = len(shown) != len(results) and identity.named
            outcome |= {"Index": 1, "NotModified": False, "Backend": 0, "ResultsFilteredByACLs": filtered}
    return Answer(409 if errors else 200, headers, to_json(outcome))


def _refused(fake: FakeConsul, identity: Identity, operations: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [
        (at, identity.refusal(fake.since, each["Key"].encode(), "write"))
        for at, each in enumerate(operations)
        if each["Verb"] in WRITES and not identity.allows(each["Key"].encode(), "write")
    ]


def _applied(
    version: tuple[int, ...], entries: dict[bytes, Entry], operation: dict[str, Any], index: int
) -> list[tuple[bytes, Entry, bool]]:
    """The entries that an operation returns, each with whether its value is returned."""
    verb, name = operation["Verb"], operation["Key"]
    key, old = name.encode(), entries.get(name.encode())
    stale = operation.get("Index", 0) != (old.modified if old else 0)
    match verb:
        case "get" if old is None:
            raise Conflict(f'key "{name}" doesn\'t exist')
        case "get":
            return [(key, old, True)]
        case "get-or-empty" if version >= (1, 14):
            return [(key, old or Entry(None, 0, 0, 0), True)]
        case "get-tree":
            return [(each, entries[each], True) for each in sorted(entries) if each.startswith(key)]
        case "check-not-exists":
            if old is not None:
                raise Conflict(f'key "{name}" exists')
            return []
        case "cas" if stale:
            raise Conflict(f'failed to set key "{name}", index is stale')
        case "set" | "cas":
            new = Entry(base64.b64decode(operation.get("Value") or ""), operation.get("Flags", 0), index, index)
            entries[key] = new.after(old)
            return [(key, entries[key], False)]
        case "delete-cas" if stale and old is not None:
            raise Conflict(f'failed to delete key "{name}", index is stale')
        case "delete" | "delete-cas":
            entries.pop(key, None)
            return []
        case "delete-tree":
            for each in [each for each in entries if each.startswith(key)]:
                del entries[each]
            return []
    raise Conflict(f'unknown KV verb "{verb}"')
