"""Transactions: batches, retries, and concurrent edits."""

from __future__ import annotations

import base64
import json
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from table_consul.config import ConsulConfig
from table_consul.ctl import txn
from table_consul.ctl.plan import VALUE_MAX_BYTES, Change, Stored
from table_consul.errors import BadResponse, Forbidden, SourceError, Unreachable
from tests.fake_consul import VERSIONS, Answer, FakeConsul

PATH = b"aliases/alias/"
SCOPE = {"Namespace": "mail", "Partition": "west"}


def added(count):
    return [Change(PATH + b"user%05d" % number, None, b"gilles") for number in range(count)]


@pytest.fixture(params=VERSIONS)
def fake(request):
    with FakeConsul(version=request.param) as fake:
        yield fake


@pytest.fixture
def store(fake):
    store = txn.Store(ConsulConfig(addresses=(fake.address,), datacenter="dc1", token="hunter2"))
    yield store
    store.close()


def reply(*errors):
    failed = [{"OpIndex": index, "What": what} for index, what in errors]
    return Answer(409 if errors else 200, {}, json.dumps({"Results": [], "Errors": failed or None}).encode())


# Batches.


def test_batch_has_at_most_64_operations():
    assert [len(batch) for batch in txn.batches(added(130), {})] == [64, 64, 2]
    assert list(txn.batches([], {})) == []


@given(st.lists(st.integers(0, VALUE_MAX_BYTES), max_size=8))
def test_batches_fit_a_transaction_and_keep_every_operation(sizes):
    changes = [Change(PATH + "\u00e9".encode() * 511 + b"%d" % at, None, b"x" * size) for at, size in enumerate(sizes)]
    batches = list(txn.batches(changes, SCOPE))
    assert [change for batch in batches for change in batch] == changes
    for batch in batches:
        assert len(json.dumps([txn.operation(change, SCOPE) for change in batch])) <= txn.BODY_MAX_BYTES


def test_operation_checks_the_index_it_was_planned_on():
    old = Stored(PATH + b"a", b"x", 17, 42)
    assert [
        txn.operation(change, {})["KV"]
        for change in (
            Change(PATH + b"a", None, b"y"),
            Change(PATH + b"a", old, b"y", 42),
            Change(PATH + b"a", old, None),
        )
    ] == [
        {"Verb": "cas", "Key": "aliases/alias/a", "Value": "eQ==", "Flags": 0, "Index": 0},
        {"Verb": "cas", "Key": "aliases/alias/a", "Value": "eQ==", "Flags": 42, "Index": 17},
        {"Verb": "delete-cas", "Key": "aliases/alias/a", "Index": 17},
    ]


# Requests and responses.


def test_transaction_is_sent_with_token_and_datacenter_and_reads_still_work(store, fake):
    fake.put(PATH + b"a", b"x")
    fake.handle = lambda request: reply() if request.target.startswith("/v1/txn") else fake.consul(request)
    assert store.transact(added(3), timeout=5) == []
    (request,) = fake.requests
    assert (request.target, request.headers["x-consul-token"]) == ("/v1/txn?dc=dc1", "hunter2")
    assert json.loads(request.body) == [txn.operation(change, {}) for change in added(3)]
    assert [each.value for each in store.entries(PATH)] == [b"x"]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (Answer(403, {}, b"ACL not found"), Forbidden),
        (Answer(429, {}, b"Your IP is issuing too many concurrent connections"), Unreachable),
        (Answer(500, {}, b"No cluster leader"), Unreachable),
        (Answer(413, {}, b"Request body too large"), BadResponse),
        (Answer(400, {}, b"Failed to parse body"), BadResponse),
        (Answer(200, {}, b"<html>hello</html>"), BadResponse),
        (Answer(200, {}, b""), BadResponse),
        (Answer(301, {"Location": "/elsewhere"}), BadResponse),
        (reply((9, "index is stale")), BadResponse),
        (reply((-1, "index is stale")), BadResponse),
    ],
)
def test_bad_response_is_an_error_without_the_token(store, fake, answer, kind):
    fake.handle = lambda _request: answer
    with pytest.raises(kind) as caught:
        store.transact(added(3), timeout=5)
    assert "hunter2" not in str(caught.value)


def test_conflict_names_its_changes(store, fake):
    changes = added(3)
    fake.handle = lambda _request: reply((0, "index is stale"), (2, "key modified, index is stale"))
    assert store.transact(changes, timeout=5) == [changes[0], changes[2]]


# Responses of Consul 1.8.7 and 1.22 to a transaction that reads `aliases/alias/root`: gilles, or absent.
FOUND = (
    b'{"Results":[{"KV":{"LockIndex":0,"Key":"aliases/alias/root","Flags":0,"Value":"Z2lsbGVz","CreateIndex":8,'
    b'"ModifyIndex":8}}],"Errors":null,"Index":0,"LastContact":0,"KnownLeader":true,"ConsistencyLevel":""}'
)
ABSENT = b'{"Results":null,"Errors":[{"OpIndex":0,"What":"key \\"aliases/alias/root\\" doesn\'t exist"}],"Index":0}'
HIDDEN = b'{"Results":[],"Errors":null,"Index":0}'


@pytest.mark.parametrize(
    ("status", "body", "value", "written"),
    [
        (200, FOUND, b"gilles", True),
        (200, FOUND, b"eric", False),
        (200, FOUND, None, False),
        (409, ABSENT, b"gilles", False),
        (409, ABSENT, None, True),
        (200, HIDDEN, b"gilles", False),
        (200, HIDDEN, None, False),
    ],
)
def test_conflicting_key_is_read_by_a_transaction(store, fake, status, body, value, written):
    fake.handle = lambda _request: Answer(status, {}, body)
    assert store.is_written(Change(PATH + b"root", None, value)) is written
    assert json.loads(fake.requests[-1].body) == [{"KV": {"Verb": "get", "Key": "aliases/alias/root"}}]


def test_key_that_no_url_can_name_is_read_like_any_other(store, fake):
    fake.handle = lambda _request: Answer(200, {}, FOUND)
    for key in (b"a//b", b"u%20x", b"end ", b"new\nline"):
        assert not store.is_written(Change(PATH + key, None, b"gilles"))


def test_list_shortened_by_an_acl_is_an_error(store, fake):
    fake.put(PATH + b"a", b"x")
    fake.put(PATH + b"b", b"x")
    fake.denied = (PATH + b"b",)
    if fake.version == "1.8.7":  # which reports no hidden keys
        assert [each.key for each in store.entries(PATH)] == [PATH + b"a"]
        return
    with pytest.raises(Forbidden):
        store.entries(PATH)


def test_empty_list_is_valid_only_with_read_permission(store, fake):
    assert store.entries(PATH) == []
    fake.denied = (PATH,)
    with pytest.raises(Forbidden):
        store.entries(PATH)


def test_operations_carry_namespace_and_partition(fake):
    fake.handle = lambda _request: reply()
    store = txn.Store(ConsulConfig(addresses=(fake.address,), namespace="mail", partition="west"))
    store.transact(added(2), timeout=5)
    store.close()
    assert [each["KV"]["Namespace"] + each["KV"]["Partition"] for each in json.loads(fake.requests[-1].body)] == [
        "mailwest"
    ] * 2


# Retries. The clock advances only in sleep().


class Time:
    def __init__(self):
        self.now = 0.0

    def sleep(self, seconds):
        self.now += seconds

    def monotonic(self):
        return self.now


class Consul:
    """A store of keys and indexes, with faults for the next transactions."""

    address = "http://127.0.0.1:8500"

    def __init__(self, *troubles):
        self.scope = {}
        self.entries = {}
        self.index = 100
        self.troubles = list(troubles)
        self.sizes = []

    def transact(self, changes, *, timeout):
        trouble = self.troubles.pop(0) if self.troubles else None
        if isinstance(trouble, SourceError):
            raise trouble
        self.sizes.append(len(changes))
        if callable(trouble):
            trouble(self)
        stale = [
            change
            for change in changes
            if (self.entries.get(change.key) or (None, 0))[1] != (change.old.modify_index if change.old else 0)
        ]
        if not stale:
            for change in changes:
                self.put(change.key, change.value)
        if trouble == "lost":
            raise Unreachable("connection closed without a response")
        return stale

    def put(self, key, value):
        self.index += 1
        if value is None:
            self.entries.pop(key, None)
        else:
            self.entries[key] = (value, self.index)

    def is_written(self, change):
        return (self.entries.get(change.key) or (None,))[0] == change.value


def written(consul, changes, on_retry=lambda _error: None):
    with mock.patch.object(txn, "time", Time()):
        progress = list(txn.write(changes, consul, on_retry))
    return [change for each in progress for change in each.written], [c for each in progress for c in each.conflicts]


def test_write_sends_transactions_in_sequence():
    consul, changes = Consul(), added(150)
    assert written(consul, changes) == (changes, [])
    assert consul.sizes == [64, 64, 22]
    assert {key: value for key, (value, _) in consul.entries.items()} == {change.key: b"gilles" for change in changes}


def test_concurrent_edit_is_kept_and_the_others_are_written():
    changes = added(70)
    consul = Consul(lambda consul: consul.put(changes[5].key, b"by hand"))
    assert written(consul, changes) == (changes[:5] + changes[6:], [changes[5]])
    assert consul.entries[changes[5].key][0] == b"by hand"


def test_key_deleted_concurrently_is_not_restored():
    old = Stored(PATH + b"a", b"x", 17)
    consul = Consul()
    assert written(consul, [Change(old.key, old, b"y")]) == ([], [Change(old.key, old, b"y")])
    assert consul.entries == {}


def test_concurrent_write_of_the_same_value_is_not_a_conflict():
    changes = added(2)
    consul = Consul(lambda consul: consul.put(changes[0].key, b"gilles"))
    assert written(consul, changes) == (changes, [])


def test_lost_response_is_not_a_conflict():
    consul, changes = Consul("lost"), added(3)
    assert written(consul, changes) == (changes, [])


def test_write_retries_and_logs_it_once():
    reported = []
    changes = added(3)
    assert written(Consul(*[Unreachable("429")] * 5), changes, reported.append) == (changes, [])
    assert len(reported) == 1


def test_write_gives_up_after_a_while(monkeypatch):
    consul = Consul(None, *[Unreachable("no answer in time")] * 100)
    time = Time()
    monkeypatch.setattr(txn, "time", time)
    steps = txn.write(added(100), consul)
    assert len(next(steps).written) == 64
    with pytest.raises(Unreachable):
        next(steps)
    assert len(consul.entries) == 64
    assert time.now <= txn.RETRY_SECONDS


@pytest.mark.parametrize(
    ("what", "kind", "said"),
    [
        ("Permission denied", Forbidden, "policy --write"),
        (
            "rpc error: Permission denied: token with AccessorID 'x' lacks permission",
            Forbidden,
            "aliases/alias/user00000",
        ),
        ("invalid session", BadResponse, "invalid session"),
    ],
)
def test_permanent_refusal_ends_the_write(store, fake, what, kind, said):
    fake.handle = lambda _request: reply((0, what))
    with pytest.raises(kind, match=said):
        written(store, added(3))
    assert len(fake.requests) == 1


def test_entries_come_with_index_and_flags(fake, store):
    entry = {"Key": "aliases/alias/a", "Value": base64.b64encode(b"\xff").decode(), "Flags": 7, "ModifyIndex": 12}
    empty = {"Key": "aliases/alias/b", "Value": None, "Flags": 0, "ModifyIndex": 13}
    headers = {"X-Consul-Index": "20", "X-Consul-Knownleader": "true"}
    listed = Answer(200, headers, json.dumps([entry, empty]).encode())
    fake.handle = lambda request: fake.consul(request) if "recurse" not in request.params else listed
    assert store.entries(PATH) == [Stored(PATH + b"a", b"\xff", 12, 7), Stored(PATH + b"b", b"", 13, 0)]
