"""The order in which fetch returns the entries of a service."""

from __future__ import annotations

from itertools import cycle, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from table_consul.errors import EntryError
from tests.services.parsing import TABLE, entries


def fetched(found, count):
    last, values = None, []
    for _ in range(count):
        last, value = found.next_after(last)
        values.append(value)
    return values


def test_fetch_returns_the_keys_in_order_and_wraps():
    found = entries("source", (b"192.0.2.2", None), (b"192.0.2.1", b"x"))
    assert fetched(found, 3) == [b"192.0.2.1", b"192.0.2.2", b"192.0.2.1"]


def test_fetch_of_values_returns_the_key_of_an_entry_without_value():
    table = replace(TABLE, fetch="values")
    assert fetched(entries("source", (b"192.0.2.1", b"uplink"), (b"192.0.2.2", b""), table=table), 2) == [
        b"uplink",
        b"192.0.2.2",
    ]


def test_fetch_without_entries_is_none():
    assert (entries("source").next_after(None), entries("source").next_after(b"gone")) == (None, None)


def test_fetch_skips_keys_that_are_not_valid_replies():
    assert fetched(entries("source", (b"a", None), (b"b\n", None), (b"c", None)), 4) == [b"a", b"c"] * 2


def test_fetch_of_values_skips_bad_entries():
    table = replace(TABLE, fetch="values")
    assert fetched(entries("string", (b"a", b"x"), (b"b", b"y\nz"), (b"c", b""), table=table), 2) == [b"x", b"x"]


def test_fetch_is_an_error_if_all_entries_are_bad():
    with pytest.raises(EntryError, match=r"aliases/source/a\\n: the key contains a control character"):
        entries("source", (b"b\r", None), (b"a\n", None)).next_after(None)


KEYS = st.sampled_from([bytes([c]) for c in b"abcdefgh"])


@given(
    stays=st.sets(KEYS, min_size=1),
    changes=st.lists(st.sets(KEYS), min_size=1, max_size=40),
)
def test_fetch_returns_each_remaining_key_once_a_round_despite_changes(stays, changes):
    last, values = None, []
    for others in changes:
        last, value = entries("source", *((key, None) for key in sorted(stays | others))).next_after(last)
        values.append(value)
    steady = [value for value in values if value in stays]
    assert [*islice(cycle(sorted(stays)), len(steady))] == steady
