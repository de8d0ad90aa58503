"""Writes to Consul's key-value store: transactions in which each key is written only if nobody has touched it since.

Every key is checked and set by the ModifyIndex it was read with, 0 for a new one. So a transaction that is sent twice
does no harm, and neither does a run that is broken off: the next one finds what is left to do.
"""

from __future__ import annotations

import json
import random
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from table_consul import kv
from table_consul.backoff import delay
from table_consul.ctl.plan import Change, Stored
from table_consul.errors import BadResponse, Forbidden, SourceError, Unreachable, printable
from table_consul.sources import PROBE
from table_consul.transport import Request

if TYPE_CHECKING:
    from table_consul.config import ConsulConfig

# Consul takes no more in one transaction (agent/txn_endpoint.go, maxTxnOps; txn_max_req_len).
OPERATIONS_MAX = 64
BODY_MAX_BYTES = 512 << 10

# A list of 100,000 entries arrives within a second or two; nobody waits for it but an operator.
READ_SECONDS = 60.0
WRITE_SECONDS = 10.0
# An election of a new leader takes less, and so does the time in which a limit of Consul's says 429.
PATIENCE_SECONDS = 15.0


class _Failed(msgspec.Struct, rename="pascal"):
    op_index: int
    what: str


class _Reply(msgspec.Struct, rename="pascal"):
    errors: list[_Failed] | None


_REPLY = msgspec.json.Decoder(_Reply)


class Store(kv.Client):
    """A client that also writes; as `kv.Client`, it has one conversation at a time."""

    def __init__(self, settings: ConsulConfig) -> None:
        super().__init__(settings)
        self._here = [("dc", settings.datacenter)] if settings.datacenter else []
        # Of an operation in another namespace its own fields tell; no parameter of the request does.
        self.scope = {
            name: value
            for name, value in (("Namespace", settings.namespace), ("Partition", settings.partition))
            if value is not None
        }

    def entries(self, path: bytes) -> list[Stored]:
        """Every entry below the path, folders included, in Consul's order.

        Raises:
            SourceError: Consul cannot tell, or does not let this token see all of them.
        """
        # ACLs make a list look shorter, or empty, without an error; only the read of one key says 403. It also tells
        # sooner than a list, which may take long, that nobody answers.
        self.get(path + PROBE, timeout=WRITE_SECONDS)
        page = self.list(path, timeout=READ_SECONDS)
        if page.filtered:
            raise Forbidden(f"Consul at {self.address} hides keys below {printable(path)} from this token")
        return [Stored(pair.key, pair.value or b"", pair.modify_index, pair.flags) for pair in page.pairs]

    def transact(self, changes: Sequence[Change], *, timeout: float) -> list[tuple[Change, str]]:
        """Write all of the changes, or none: then those that stand in the way, each with what Consul says of it.

        Raises:
            SourceError: it is not known whether they were written (Unreachable), or Consul refused them for good.
        """
        body = json.dumps([operation(change, self.scope) for change in changes]).encode()

        def build() -> Request:
            # Not by the library's own Txn.put: that of py-consul sends no token.
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
            token = {"X-Consul-Token": self._library.token} if self._library.token else {}
            return Request("/v1/txn", self._here, {**headers, **token}, "PUT", body)

        with self._send(build, timeout) as response:
            failed = response.decoded(_REPLY).errors or []
            if not all(0 <= each.op_index < len(changes) for each in failed):
                raise response.bad("speaks of operations that were not in the transaction")
        return [(changes[each.op_index], each.what) for each in failed]

    def stands(self, change: Change) -> bool:
        """Whether Consul has, by whatever hand, what the change was to bring."""
        found = self.get(change.key, timeout=WRITE_SECONDS)
        return change.value is None if found is None else (found.value or b"") == change.value


def operation(change: Change, scope: Mapping[str, str]) -> dict[str, Any]:
    """The change as an operation of a transaction (developer.hashicorp.com/consul/api-docs/txn, KV operations)."""
    fields: dict[str, Any] = {"Verb": "delete-cas" if change.value is None else "cas", "Key": change.key.decode()}
    if change.value is not None:
        fields |= {"Value": b64encode(change.value).decode(), "Flags": change.flags}
    return {"KV": {**fields, "Index": 0 if change.old is None else change.old.modified, **scope}}


def batches(changes: Sequence[Change], scope: Mapping[str, str]) -> Iterator[list[Change]]:
    """The changes, in order, in as many as Consul takes at once."""
    batch: list[Change] = []
    size = 2
    for change in changes:
        length = len(json.dumps(operation(change, scope))) + 2
        if batch and (len(batch) == OPERATIONS_MAX or size + length > BODY_MAX_BYTES):
            yield batch
            batch, size = [], 2
        batch.append(change)
        size += length
    if batch:
        yield batch


class Progress(NamedTuple):
    """What has become of some changes."""

    written: list[Change]
    conflicts: list[Change]
    """Somebody else changed these keys since they were read; they were left alone."""


def write(
    changes: Sequence[Change],
    store: Store,
    waiting: Callable[[SourceError], None] = lambda _error: None,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Progress]:
    """Write the changes, a transaction at a time; what has become of each. A conflict keeps back its key alone.

    ``waiting`` is told once when Consul does not answer; it is tried for `PATIENCE_SECONDS`.

    Raises:
        SourceError: as Store.transact; what was yielded before is written, and of the rest the transaction at hand
            perhaps.
    """
    for batch in batches(changes, store.scope):
        conflicts: list[Change] = []
        left = batch
        failures = 0
        begun = clock()
        while left:
            try:
                failed = store.transact(left, timeout=WRITE_SECONDS)
            except Unreachable as error:
                failures += 1
                wait = delay(failures, random.random())  # noqa: S311 - no secret
                if clock() - begun + wait > PATIENCE_SECONDS:
                    raise
                if failures == 1:
                    waiting(error)
                sleep(wait)
                continue
            if not failed:
                break
            stale = _stale(failed, store)
            left = [change for change in left if change not in stale]
            # Consul may have written what it could not confirm, and a second attempt finds that.
            conflicts += [change for change in stale if not store.stands(change)]
        yield Progress([change for change in batch if change not in conflicts], conflicts)


def _stale(failed: Sequence[tuple[Change, str]], store: Store) -> list[Change]:
    """The changes of keys that others have touched; raises where that is not what is wrong."""
    for change, what in failed:
        key = printable(change.key)
        if "permission denied" in what.lower():
            raise Forbidden(
                f"Consul at {store.address} does not let this token write {key}; the policy it needs: "
                "table-consulctl policy --write TABLE; with another token: --token-file"
            )
        if "index is stale" not in what:
            raise BadResponse(f"Consul at {store.address} refuses to write {key}: {printable(what)}")
    return [change for change, _ in failed]
