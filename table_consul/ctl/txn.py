"""Write to Consul's key-value store in transactions that change a key only if nobody else has since it was read.

Each operation is a check-and-set with the ModifyIndex that was read, 0 for a new key. A transaction that is sent twice
therefore does no harm, and after an interruption the next run finds what is left to do.
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
from table_consul.transport import Answer, Transport

if TYPE_CHECKING:
    from table_consul.config import ConsulConfig

# Consul takes no more in one transaction (agent/txn_endpoint.go, maxTxnOps; txn_max_req_len).
OPERATIONS_MAX = 64
BODY_MAX_BYTES = 512 << 10

# A list of 100,000 entries arrives within a second or two; only an operator waits for it.
READ_SECONDS = 60.0
WRITE_SECONDS = 10.0
# Longer than the election of a leader, and than the period in which Consul's rate limit answers 429.
RETRY_SECONDS = 15.0


class _Entry(msgspec.Struct, rename="pascal", gc=False):
    key: str
    value: bytes | None
    modify_index: int
    flags: int = 0


class _Failure(msgspec.Struct, rename="pascal"):
    op_index: int
    what: str


class _Result(msgspec.Struct, rename="pascal"):
    errors: list[_Failure] | None


_ENTRIES = msgspec.json.Decoder(list[_Entry])
_RESULT = msgspec.json.Decoder(_Result)


class _Transport(Transport):
    """Sends transactions as well as reads."""

    def send(self, path: str, body: bytes, token: str | None) -> object:
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        if token is not None:
            headers["X-Consul-Token"] = token
        parameters = [("dc", self._settings.datacenter)] if self._settings.datacenter else []
        self._request.method, self._request.body = "PUT", body
        try:
            return self.get(None, path, parameters, headers)
        finally:
            self._request.method, self._request.body = "GET", None

    def _judge(self, status: int, headers: Mapping[str, str], body: bytes) -> Answer:
        if self._request.method == "GET":
            return super()._judge(status, headers, body)
        if status not in (200, 409):  # 409: nothing was written, and the body has the reasons
            raise self._failure(status, body)
        return Answer(body, 0, filtered=False)


class Store(kv.Client):
    """A client that also writes; like `kv.Client`, it has one conversation at a time."""

    transport = _Transport

    def __init__(self, settings: ConsulConfig) -> None:
        super().__init__(settings)
        # The namespace is a field of each operation; Consul ignores it as a parameter of the request.
        scope = {"Namespace": settings.namespace, "Partition": settings.partition}
        self.scope = {name: value for name, value in scope.items() if value is not None}

    def entries(self, path: bytes) -> list[Stored]:
        """Every entry below the path, folders included, in Consul's order.

        Raises:
            SourceError: Consul does not answer, or this token may not read all of them.
        """

        def accept(answer: Answer) -> list[Stored]:
            if answer.filtered:
                raise Forbidden(f"Consul at {self.address} hides keys below {printable(path)} from this token")
            found = [] if answer.body is None else self._transport.decoded(_ENTRIES, answer.body)
            self._check_below(path, [each.key.encode() for each in found])
            return [Stored(each.key.encode(), each.value or b"", each.modify_index, each.flags) for each in found]

        # An ACL makes a list shorter, or empty, without an error; only the read of one key answers 403. It also finds
        # sooner than a list, which may take long, that Consul does not answer.
        self.get(path + PROBE, timeout=WRITE_SECONDS)
        return self._read(path, accept, READ_SECONDS, recurse=True)

    def transact(self, changes: Sequence[Change], *, timeout: float) -> list[tuple[Change, str]]:
        """Write all of the changes, or none; if none, the changes that Consul refused, each with its reason.

        Raises:
            SourceError: they may or may not be written (Unreachable), or Consul refused the request as a whole.
        """

        def accept(answer: Answer) -> list[tuple[Change, str]]:
            failures = self._transport.decoded(_RESULT, answer.body or b"").errors or []
            if not all(0 <= each.op_index < len(changes) for each in failures):
                raise BadResponse(f"Consul at {self.address} reports operations that were not in the transaction")
            return [(changes[each.op_index], each.what) for each in failures]

        body = json.dumps([operation(change, self.scope) for change in changes]).encode()
        transport = self._transport
        assert isinstance(transport, _Transport)
        # Not by the library's own Txn.put: that of py-consul sends no token.
        return self._ask(lambda: transport.send("/v1/txn", body, self._library.token), accept, timeout)

    def is_written(self, change: Change) -> bool:
        """Whether Consul holds the result of the change, whoever wrote it."""
        found = self.get(change.key, timeout=WRITE_SECONDS)
        return change.value is None if found is None else (found.value or b"") == change.value


def operation(change: Change, scope: Mapping[str, str]) -> dict[str, Any]:
    """The change as an operation of a transaction (developer.hashicorp.com/consul/api-docs/txn, KV operations)."""
    fields: dict[str, Any] = {"Verb": "delete-cas" if change.value is None else "cas", "Key": change.key.decode()}
    if change.value is not None:
        fields |= {"Value": b64encode(change.value).decode(), "Flags": change.flags}
    return {"KV": {**fields, "Index": 0 if change.old is None else change.old.modify_index, **scope}}


def batches(changes: Sequence[Change], scope: Mapping[str, str]) -> Iterator[list[Change]]:
    """The changes, in order, in batches of at most as many and as large as one transaction takes."""
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
    """Keys that somebody else changed after they were read; they were not written."""


def write(
    changes: Sequence[Change],
    store: Store,
    on_retry: Callable[[SourceError], None] = lambda _error: None,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Progress]:
    """Write the changes, one transaction after the other. A conflict affects only its own key.

    While Consul is unreachable a transaction is repeated for `RETRY_SECONDS`; ``on_retry`` is called once for it.

    Raises:
        SourceError: as Store.transact. What was yielded is written; the current transaction may be.
    """
    for batch in batches(changes, store.scope):
        conflicts: list[Change] = []
        left, failures, begun = batch, 0, clock()
        while left:
            try:
                refused = store.transact(left, timeout=WRITE_SECONDS)
            except Unreachable as error:
                failures += 1
                wait = delay(failures, random.random())  # noqa: S311 - no secret
                if clock() - begun + wait > RETRY_SECONDS:
                    raise
                if failures == 1:
                    on_retry(error)
                sleep(wait)
                continue
            if not refused:
                break
            _check_stale(refused, store)
            stale = [change for change, _ in refused]
            left = [change for change in left if change not in stale]
            # Consul may have written what it could not confirm, and a second attempt finds that.
            conflicts += [change for change in stale if not store.is_written(change)]
        yield Progress([change for change in batch if change not in conflicts], conflicts)


def _check_stale(refused: Sequence[tuple[Change, str]], store: Store) -> None:
    """Raise SourceError if a change was refused for another reason than that its key changed since it was read."""
    for change, reason in refused:
        key = printable(change.key)
        if "permission denied" in reason.lower():
            raise Forbidden(
                f"Consul at {store.address}: the token may not write {key} (for the policy it needs, run"
                " table-consulctl policy --write TABLE; for another token, use --token-file)"
            )
        if "index is stale" not in reason:
            raise BadResponse(f"Consul at {store.address} refuses to write {key}: {printable(reason)}")
