"""Write to Consul's key-value store in transactions that change a key only if it is unchanged since it was read.

Each operation is a check-and-set with the ModifyIndex that was read, 0 for a new key. Sending a
transaction twice is therefore harmless, and after an interruption the next run writes the rest.
"""

from __future__ import annotations

import json
import random
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

from table_consul import kv
from table_consul.backoff import delay
from table_consul.ctl.main import patience
from table_consul.ctl.plan import Change, Stored
from table_consul.errors import BadResponse, Forbidden, SourceError, Unreachable, printable
from table_consul.sources import PROBE
from table_consul.transport import Request

if TYPE_CHECKING:
    from table_consul.config import ConsulConfig

# Consul accepts no more in one transaction (agent/txn_endpoint.go, maxTxnOps; txn_max_req_len).
OPERATIONS_MAX = 64
BODY_MAX_BYTES = 512 << 10

# A list of 100,000 entries arrives within a second or two; only an operator waits for it.
READ_SECONDS = 60.0
WRITE_SECONDS = 10.0
# Longer than the election of a leader, and than the period in which Consul's rate limit answers 429.
RETRY_SECONDS = 15.0
POLICY_HINT = "for the policy it needs, run table-consulctl policy --write TABLE; for another token, use --token-file"


class _Failure(msgspec.Struct, rename="pascal"):
    op_index: int
    what: str


class _Result(msgspec.Struct, rename="pascal"):
    errors: list[_Failure] | None


class _Read(msgspec.Struct):
    pair: kv.Pair = msgspec.field(name="KV")


class _ReadResult(_Result, rename="pascal"):
    results: list[_Read] | None


_RESULT, _READ_RESULT = msgspec.json.Decoder(_Result), msgspec.json.Decoder(_ReadResult)
R = TypeVar("R", bound=_Result)


class Store(kv.Client):
    """A client that also writes; like `kv.Client`, not for use by two threads at once."""

    def __init__(self, settings: ConsulConfig) -> None:
        super().__init__(settings)
        self._datacenter = [("dc", settings.datacenter)] if settings.datacenter else []
        # The namespace is a field of each operation; Consul ignores it as a parameter of the request.
        scope = {"Namespace": settings.namespace, "Partition": settings.partition}
        self.scope = {name: value for name, value in scope.items() if value is not None}

    def entries(self, path: bytes) -> list[Stored]:
        """Every entry below the path, folders included, in Consul's order.

        Raises:
            SourceError: Consul does not answer, or this token may not read all of them.
        """
        # An ACL shortens a list without an error; only the read of one key returns 403. If Consul does not answer, the
        # read also fails sooner than a list.
        with patience(f"reading {printable(path)}"):
            self.get(path + PROBE, timeout=WRITE_SECONDS)
            pairs = self.list(path, timeout=READ_SECONDS)
            return [Stored(pair.key, pair.value or b"", pair.modify_index, pair.flags) for pair in pairs]

    def transact(self, changes: Sequence[Change], *, timeout: float) -> list[Change]:
        """Write all changes or none; if none, return those whose keys have changed since they were read.

        Raises:
            Unreachable: the changes may or may not be written.
            SourceError: Consul rejected the changes.
        """
        operations = [operation(change, self.scope) for change in changes]
        failures = self._transaction(operations, _RESULT, timeout).errors or []
        for each in failures:
            key = printable(changes[each.op_index].key)
            if "permission denied" in each.what.lower():
                raise Forbidden(f"Consul at {self.address}: the token may not write {key}", POLICY_HINT)
            if "index is stale" not in each.what:
                raise BadResponse(f"Consul at {self.address} rejects the write of {key}: {printable(each.what)}")
        return [changes[each.op_index] for each in failures]

    def is_written(self, change: Change) -> bool:
        """Whether Consul holds the result of the change, from this run or another writer.

        A transaction reads it, because no URL may be able to name the key.
        """
        read = {"KV": {"Verb": "get", "Key": change.key.decode(), **self.scope}}
        result = self._transaction([read], _READ_RESULT, WRITE_SECONDS)
        if result.errors:
            return change.value is None and "doesn't exist" in result.errors[0].what
        return [(each.pair.key, each.pair.value or b"") for each in result.results or ()] == [
            (change.key, change.value)
        ]

    def _transaction(
        self, operations: Sequence[Mapping[str, Any]], decoder: msgspec.json.Decoder[R], timeout: float
    ) -> R:
        body = json.dumps(operations).encode()

        def build() -> Request:
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
            if self._library.token:  # py-consul's own Txn.put would not send it
                headers["X-Consul-Token"] = self._library.token
            return Request("/v1/txn", self._datacenter, headers, "PUT", body)

        with kv.Response(self, self._send(build, timeout)) as response:
            result = response.decoded(decoder)
            if not all(0 <= each.op_index < len(operations) for each in result.errors or ()):
                raise response.bad("returned errors for operations that were not in the transaction")
        return result


def operation(change: Change, scope: Mapping[str, str]) -> dict[str, Any]:
    """The change as an operation of a transaction (developer.hashicorp.com/consul/api-docs/txn, KV operations)."""
    fields: dict[str, Any] = {"Verb": "delete-cas" if change.value is None else "cas", "Key": change.key.decode()}
    if change.value is not None:
        fields |= {"Value": b64encode(change.value).decode(), "Flags": change.flags}
    return {"KV": {**fields, "Index": 0 if change.old is None else change.old.modify_index, **scope}}


def batches(changes: Sequence[Change], scope: Mapping[str, str]) -> Iterator[list[Change]]:
    """Yield the changes, in order, in batches that fit one transaction."""
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
    """The outcome of one transaction."""

    written: list[Change]
    conflicts: list[Change]
    """Changes that were not written, because their keys have changed since they were read."""


def write(
    changes: Sequence[Change], store: Store, on_retry: Callable[[SourceError], None] = lambda _error: None
) -> Iterator[Progress]:
    """Write the changes, one transaction after the other. A conflict affects only its own key.

    While Consul is unreachable, a transaction is retried for `RETRY_SECONDS`; ``on_retry`` is called once.

    Raises:
        SourceError: as `Store.transact`. Yielded changes are written; those of the current transaction may be, unless
            it is Forbidden.
    """
    for batch in batches(changes, store.scope):
        conflicts: list[Change] = []
        left, failures, begun = batch, 0, time.monotonic()
        while left:
            try:
                stale = store.transact(left, timeout=WRITE_SECONDS)
            except Unreachable as error:
                failures += 1
                wait = delay(failures, random.random())  # noqa: S311 - no secret
                if time.monotonic() - begun + wait > RETRY_SECONDS:
                    raise
                if failures == 1:
                    on_retry(error)
                time.sleep(wait)
                continue
            except Forbidden as error:
                if failures:  # an attempt before may be written
                    raise SourceError(str(error)) from error
                raise
            if not stale:
                break
            left = [change for change in left if change not in stale]
            # Consul may have written a change without confirming it; a second attempt finds it written.
            conflicts += [change for change in stale if not store.is_written(change)]
        yield Progress([change for change in batch if change not in conflicts], conflicts)
