"""Entries with a replaced part share the others with the former ones and equal those of a full read."""

from __future__ import annotations

from unittest.mock import patch

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from table_consul.services import SERVICES, fold_key, forms, parts
from table_consul.services.entries import Entries, EntriesBuilder
from tests.services.parsing import TABLE, entries
from tests.services.state import CASE_VARIANTS, PATTERN_KEYS, REUSING_TABLES, STORED, state


@pytest.fixture(autouse=True)
def small_parts():
    with patch.object(parts, "PART_SIZE", 3), patch.object(forms, "SHARD_SIZE", 2):
        yield


def build(former, *pairs, below=b"", table=TABLE, service="alias"):
    builder = EntriesBuilder(table, SERVICES[service], former, below)
    for pair in pairs:
        builder.take([pair])
    return builder


def named(*names):
    return [(name, b"to-%b@example.org" % name) for name in names]


USERS = [b"user%02d" % number for number in range(30)]


def test_edit_shares_all_other_parts():
    former = entries("alias", *named(*USERS))
    new = build(former, *named(*USERS[:7]), (USERS[7], b"new"), *named(*USERS[8:])).finish()
    assert len(former.parts.parts) >= 10
    assert len([*new.parts.not_in(former.parts)]) == 1
    assert (new.lookup(USERS[7]), new.lookup(USERS[8])) == (b"new", b"to-user08@example.org")


def test_replaced_prefix_does_not_affect_the_others():
    former = entries("alias", *named(*USERS))
    builder = build(former, (b"user10", b"new"), (b"user1a", b"more"), below=b"user1")
    assert sorted(builder.missing_keys()) == USERS[11:20]
    new = builder.finish()
    left = {**dict(named(*USERS[:10], *USERS[20:])), b"user10": b"new", b"user1a": b"more"}
    assert (dict(new.values), len(new)) == (left, len(left))


def test_unchanged_prefix_is_the_former_object():
    former = entries("alias", *named(*USERS))
    assert build(former, *named(*USERS[10:20]), below=b"user1").finish() is former


def test_unchanged_entries_in_mixed_case_are_the_former_object():
    pairs = sorted(named(*(key.title() if key[-1] % 2 else key for key in USERS)))
    former = entries("alias", *pairs)
    assert build(former, *pairs).finish() is former


def test_deleted_folder_has_no_entry_left():
    new = build(entries("alias", *named(*USERS))).finish()
    assert (len(new), dict(new.values), new.next_after(None), new.lookup(b"user00")) == (0, {}, None, None)


def test_folder_that_shrinks_has_one_part_again():
    former = entries("alias", *named(*USERS))
    new = build(former, (b"user29", b"x")).finish()
    assert (len(new.parts.parts), new.values, new.lookup(b"user29")) == (1, {b"user29": b"x"}, b"x")


def test_fetch_goes_through_all_parts_and_wraps():
    former, last, fetched = entries("source", *((key, None) for key in USERS)), b"user27", []
    for _ in USERS:
        last, value = former.next_after(last)
        fetched.append(value)
    assert fetched == [*USERS[28:], *USERS[:28]]


def test_kept_entries_answer_as_before():
    former = entries("alias", (b"Upper", b"x"), (b"bad", b"|sh"), (b"blank", None), *named(*USERS))
    builder = build(former, *named(*USERS[:2]))
    assert len(builder.missing_keys()) == 31
    builder.keep([b"upper", b"bad", b"blank", *USERS[2:-1]])
    assert builder.missing_keys() == {USERS[-1]: USERS[-1]}
    whole = [(b"Upper", b"x"), (b"bad", b"|sh"), (b"blank", None), *named(*USERS[:-1])]
    assert state(builder.finish()) == state(entries("alias", *whole))


def test_all_kept_entries_are_the_former_object():
    former = entries("alias", (b"bad", b"|sh"), *named(*USERS))
    builder = build(former)
    builder.keep(builder.missing_keys())
    assert builder.finish() is former


def test_kept_key_still_takes_precedence_over_its_variant_elsewhere():
    former = entries("alias", (b"Root", b"x"), (b"root", b"gilles"))
    builder = build(former, below=b"r")
    assert (builder.conclusive, builder.missing_keys()) == (False, {b"root": b"root"})
    builder.keep([b"root"])
    assert (builder.conclusive, builder.finish() is former) == (True, True)


@pytest.mark.parametrize(
    ("former", "below", "taken", "conclusive"),
    [
        ([b"Root", b"root"], b"r", [], False),  # the value of Root is no longer in memory
        ([b"Root", b"root"], b"R", [], True),
        ([b"Root", b"root"], b"r", [b"root"], True),
        ([b"Root"], b"r", [b"root"], True),
        ([b"ROOT", b"Root"], b"RO", [], False),
        ([b"ROOT", b"Root"], b"Ro", [], True),
        ([b"Root", b"vera"], b"v", [], True),
    ],
)
def test_replacement_reports_whether_precedence_is_known(former, below, taken, conclusive):
    former = entries("alias", *named(*former))
    assert build(former, *named(*taken), below=below).conclusive is conclusive


def test_part_of_a_folder_is_not_enough_after_a_change_of_settings():
    former = entries("alias", *named(*USERS))
    table = replace(TABLE, allow_commands=True)
    assert not build(former, *named(*USERS[10:20]), below=b"user1", table=table).conclusive
    assert build(former, *named(*USERS), table=table).conclusive


def test_new_problems_are_those_of_changed_entries():
    hosts = [(b"10.0.0.%d" % number, None) for number in range(20)] + [(b"host", None), (b"list", b'["a", "b"]')]
    former = entries("netaddr", *hosts)
    new = build(former, *hosts, (b"more", None), (b"next", b'["a", "b"]'), service="netaddr").finish()
    assert {problem.key[16:] for problem in former.problems} == {b"host", b"list"}
    assert {problem.key[16:] for problem in new.problems_since(former)} == {b"more", b"next"}
    assert new.problems_since(None) == new.problems


# Keys that are prefixes of each other, differ in case, or are not UTF-8; and patterns.
KEYS = st.one_of(
    st.sampled_from([*CASE_VARIANTS, *PATTERN_KEYS]),
    st.lists(
        st.sampled_from([b"a", b"b", b"A", b"B", b"*", b".", b"@", "\ufffd".encode()]), min_size=1, max_size=4
    ).map(b"".join),
)
BELOW = st.lists(st.sampled_from([b"a", b"b", b"A", b"B", b"r", b"R", b"*", b"1"]), max_size=2).map(b"".join)
PAIRS = st.lists(st.tuples(KEYS, STORED), max_size=14)


def listed(pairs):
    """Pairs as Consul lists them: in order, and repeated only for keys that are not UTF-8."""
    known, found = set(), []
    for key, value in sorted(pairs, key=lambda pair: pair[0]):
        if key not in known or b"\xef\xbf\xbd" in key:
            found.append((key, value))
        known.add(key)
    return found


@pytest.mark.parametrize("service", SERVICES)
@given(table=REUSING_TABLES, pairs=PAIRS, stages=st.lists(st.tuples(BELOW, PAIRS), min_size=1, max_size=4))
@example(table=TABLE, pairs=[(b"Root", b"x"), (b"root", b"y")], stages=[(b"r", []), (b"R", [])])
@example(table=TABLE, pairs=[(b"ROOT", b"x"), (b"Root", b"y")], stages=[(b"RO", [(b"ROOT", b"z")])])
def test_replaced_parts_equal_entries_built_from_scratch(service, table, pairs, stages):
    stored = listed(pairs)
    former = Entries(table, SERVICES[service], stored)
    for below, more in stages:
        outside = [pair for pair in stored if not pair[0].startswith(below)]
        inside = listed((below + key, value) for key, value in more)
        one_case = len({fold_key(key) for key, _ in stored}) == len({key for key, _ in stored})
        stored = sorted([*outside, *inside], key=lambda pair: pair[0])
        builder = build(former, *inside, below=below, table=table, service=service)
        missing = builder.missing_keys()
        taken = {fold_key(key) for key, _ in inside if not key.endswith(b"/")}
        spelled = {key: former.original_case.get(key, key) for key in (*former.values, *former.errors)}
        gone = {key: spelled[key] for key in spelled if spelled[key].startswith(below) and key not in taken}
        assert missing == gone
        if not builder.conclusive:
            assert not one_case
            builder = build(former, *stored, table=table, service=service)
            assert builder.conclusive
        former = builder.finish()
        scratch = Entries(table, SERVICES[service], stored)
        assert state(former) == state(scratch)
        assert former.next_after(None) == scratch.next_after(None) if former.values else True


@given(pairs=PAIRS, more=PAIRS, chunk=st.integers(1, 5))
def test_chunks_of_any_size_give_the_same_entries(pairs, more, chunk):
    former = Entries(TABLE, SERVICES["alias"], listed(pairs))
    builder, taken = EntriesBuilder(TABLE, SERVICES["alias"], former), listed(more)
    for start in range(0, len(taken), chunk):
        builder.take(taken[start : start + chunk])
    assert state(builder.finish()) == state(entries("alias", *taken))
