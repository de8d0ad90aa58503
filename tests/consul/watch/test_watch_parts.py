"""A watched range has parts, of which only changed ones are read; with every version of the fake."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from tests.consul.watch.ranges.ranged_tables import waiting
from tests.consul.watch.watching import ALIAS, PREFIX, ask, becomes, make_ranges_small
from tests.dialogue import eventually
from tests.fake_consul.store import Entry

NAMES = [bytes([letter]) + b"%02d" % number for letter in b"abc" for number in range(30)]
# Longer than any wait of a test.
NEVER_SECONDS = 60.0


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_ranges_small(monkeypatch, 30, late=1.0, soon=NEVER_SECONDS)


@pytest.fixture
def fake(fake):
    for name in NAMES:
        fake.put(ALIAS + name, b"old")
    return fake


@pytest.fixture
def source(fake, mirrored):
    return ready(fake, mirrored(fake.address))


def ready(fake, source):
    """Wait until ranges are watched."""
    for _ in eventually("ranges are watched", 10):
        if {ALIAS + each for each in (b"a", b"b", b"c")} <= {folder(each) for each in waiting(fake)}:
            break
    assert ask(source, b"a01") == b"old"
    return source


def folder(request):
    return request.path.removeprefix(b"/v1/kv/")


def read_since(fake, before):
    """The prefixes of list requests without a wait."""
    return [folder(each) for each in fake.requests[before:] if "recurse" in each.params and "index" not in each.params]


def test_query_for_a_range_with_parts_returns_only_names(fake, source):
    waits = [each for each in waiting(fake) if folder(each) == ALIAS + b"a"]
    assert waits
    assert all("keys" in each.params and "recurse" not in each.params for each in waits)


def test_edit_reads_only_its_part(fake, source):
    before = len(fake.requests)
    fake.put(ALIAS + b"b13", b"new")
    becomes(source, b"new", b"b13")
    assert read_since(fake, before) == [ALIAS + b"b1"]
    fake.put(ALIAS + b"b13", b"newer")
    becomes(source, b"newer", b"b13")
    assert read_since(fake, before) == [ALIAS + b"b1"] * 2


def test_deleted_key_of_a_part_is_not_found(fake, source):
    before = len(fake.requests)
    fake.delete(ALIAS + b"b13")
    becomes(source, None, b"b13")
    assert read_since(fake, before) == [ALIAS + b"b1"]
    assert [ask(source, name) for name in NAMES if name != b"b13"] == [b"old"] * (len(NAMES) - 1)


def test_edits_of_several_parts_in_one_transaction_are_found(fake, source):
    before = len(fake.requests)
    with fake.store.changed:
        for name in (b"a01", b"b01", b"b21"):
            fake.put(ALIAS + name, b"new")
    for name in (b"a01", b"b01", b"b21"):
        becomes(source, b"new", name)
    assert PREFIX not in read_since(fake, before)


def test_new_key_outside_every_part_is_found_by_the_names_of_its_range(fake, source):
    before = len(fake.requests)
    fake.put(ALIAS + b"bob", b"new")
    becomes(source, b"new", b"bob")
    fake.put(ALIAS + b"bob", b"newer")
    becomes(source, b"newer", b"bob")
    assert set(read_since(fake, before)) == {ALIAS + b"bo"}


def test_emptied_part_is_empty(fake, source):
    for number in range(10):
        fake.delete(ALIAS + b"b1%d" % number)
    for number in range(10):
        becomes(source, None, b"b1%d" % number)
    fake.put(ALIAS + b"b13", b"new")
    becomes(source, b"new", b"b13")


def test_part_with_a_lower_index_is_read(fake, source):
    fake.put(ALIAS + b"b13", b"new")
    becomes(source, b"new", b"b13")
    fake.delete(ALIAS + b"b13")
    becomes(source, None, b"b13")
    fake.store.reap()
    fake.put(ALIAS + b"b01", b"new")
    becomes(source, b"new", b"b01")
    assert ask(source, b"b13") is None


def test_part_with_too_many_new_keys_is_cut_again(fake, source):
    before = len(fake.requests)
    for number in range(100):
        fake.put(ALIAS + b"b1x%02d" % number, b"new")
    for number in range(100):
        becomes(source, b"new", b"b1x%02d" % number)
    assert PREFIX in read_since(fake, before)


def both_edits_are_found(fake, source):
    """Edit two parts in one transaction, the later one first."""
    with fake.store.changed:
        fake.put(ALIAS + b"b21", b"new")
        fake.put(ALIAS + b"b01", b"new")
    becomes(source, b"new", b"b01")
    becomes(source, b"new", b"b21")


def test_edit_in_a_part_whose_index_a_late_server_returned_is_found(fake, mirrored):
    source = ready(fake, mirrored(fake.address))
    known = str(fake.index)

    def handle(request):
        answer = fake.consul(request)
        if "keys" in request.params and folder(request) == ALIAS + b"b2" and "consistent" not in request.params:
            answer.headers["X-Consul-Index"] = known
        return answer

    fake.handle = handle
    both_edits_are_found(fake, source)


def test_entries_of_a_part_that_are_older_than_its_index_are_not_used(fake, mirrored):
    source = ready(fake, mirrored(fake.address, consistency="stale"))
    late = []

    def handle(request):
        answer = fake.consul(request)
        if "recurse" in request.params and folder(request) == ALIAS + b"b2" and not late:
            late.append(answer)
            return old
        return answer

    old = fake.consul(next(each for each in fake.requests if folder(each) == PREFIX and "recurse" in each.params))
    entries = [each for each in json.loads(old.body) if each["Key"].encode().startswith(ALIAS + b"b2")]
    old.body = json.dumps(entries).encode()
    old.headers["X-Consul-Index"] = str(max(each["ModifyIndex"] for each in entries))
    fake.handle = handle
    both_edits_are_found(fake, source)


def test_snapshot_with_older_parts_is_read(fake, source):
    for _ in eventually("each range waits on an index of its own", 10):
        latest = {folder(each): each.params["index"] for each in waiting(fake)}
        if [*latest.values()].count(str(fake.index)) <= 2:  # that of the newest range, and that of the whole table
            break
    time.sleep(0.2)
    with fake.store.changed:
        for key, entry in fake.store.entries.items():
            fake.store.entries[key] = replace(entry, modified=8)
        fake.store.entries[ALIAS + b"b23"] = Entry(b"restored", 0, 8, 8)
        fake.store.entries[ALIAS + b"root"] = Entry(b"gilles", 0, 9, 9)
        fake.store.index = 9
        fake.store._notify(b"")
    becomes(source, b"restored", b"b23")
