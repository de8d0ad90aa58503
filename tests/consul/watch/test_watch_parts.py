"""A watched range has parts, of which only changed ones are read; with every version of the fake."""

from __future__ import annotations

import pytest

from tests.consul.watch.watching import ALIAS, PREFIX, ask, becomes, make_ranges_small
from tests.dialogue import eventually

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
    source = mirrored(fake.address)
    for _ in eventually("ranges are watched", 10):
        if {ALIAS + each for each in (b"a", b"b", b"c")} <= {folder(each) for each in queries(fake)}:
            break
    assert ask(source, b"a01") == b"old"
    return source


def folder(request):
    return request.path.removeprefix(b"/v1/kv/")


def queries(fake):
    """The blocking queries."""
    return [request for request in fake.requests if "index" in request.params]


def read_since(fake, before):
    """The prefixes of list requests without a wait."""
    return [folder(each) for each in fake.requests[before:] if "recurse" in each.params and "index" not in each.params]


def test_query_for_a_range_with_parts_returns_only_names(fake, source):
    waits = [each for each in queries(fake) if folder(each) == ALIAS + b"a"]
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
