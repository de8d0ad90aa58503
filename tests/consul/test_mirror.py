from __future__ import annotations

import pytest
from msgspec.structs import replace

from table_consul.errors import Forbidden, SourceError, TooLarge, Unreachable
from table_consul.services import Table
from table_consul.sources.mirror import (
    LEAST_PAUSE_SECONDS,
    MAX_ABSENCE_CHECKS,
    MOST_PAUSE_SECONDS,
    MOST_WAIT_SECONDS,
    SHORT_WAIT_SECONDS,
    Hidden,
    Mirror,
    QueryState,
    SnapshotBuilder,
    Unlisted,
    after_cut,
    next_query,
    sample,
    unverified_services,
    wait_seconds,
)

TABLE = Table("aliases", prefix="mail", services=("alias", "domain"))
PREFIX = b"mail/aliases/"
ALIAS, DOMAIN = b"mail/aliases/alias/", b"mail/aliases/domain/"
ROOT = (ALIAS + b"root", b"gilles")
BOTH = [ROOT, (DOMAIN + b"example.org", b"")]


def result(index=7, *, changed=False, timed_out=False, load_seconds=0.0):
    return {
        "index": index,
        "changed": changed,
        "timed_out": timed_out,
        "load_seconds": load_seconds,
    }


def loading(pairs=(), former=None, table=TABLE):
    made = SnapshotBuilder(table, PREFIX, table.services, former)
    made.take(list(pairs))
    return made


def snapshot(pairs=(), former=None, table=TABLE, hidden=()):
    """A snapshot; ``hidden`` maps services with hidden keys to their missing keys."""
    return loading(pairs, former, table).finish({name: Hidden(Forbidden("no"), keys) for name, keys in hidden})


# ---- the index ----


def waiting(index, **more):
    """The state that waits on this index."""
    return QueryState(index, index, **more)


def test_next_query_waits_on_a_higher_index():
    assert next_query(waiting(5), **result(7, changed=True))[0] == waiting(7)


def test_index_that_goes_backwards_restarts_at_zero():
    assert next_query(waiting(7), **result(6, changed=True))[0] == QueryState()


def test_index_is_at_least_one():
    assert next_query(QueryState(), **result(0))[0] == waiting(1)
    assert next_query(waiting(1), **result(1, timed_out=True))[0] == waiting(1, gap=False)


def test_next_query_waits_on_the_same_index():
    assert next_query(waiting(7), **result(7, timed_out=True)) == (waiting(7, gap=False), 0.0)


def test_early_answer_with_the_same_index_is_followed_by_a_read_of_everything():
    state, pause = next_query(waiting(7), **result(7))
    assert (state.index, state.seen, pause > 0) == (0, 0, True)
    assert next_query(state, **result(7))[0] == waiting(7, idle=1, longest_wait=SHORT_WAIT_SECONDS)
    assert next_query(state, **result(3, changed=True))[0].index == 3


@pytest.mark.parametrize(
    ("longest", "waited", "expected"), [(300.0, 60.0, 30.0), (300.0, 0.1, SHORT_WAIT_SECONDS), (5.0, 60.0, 5.0)]
)
def test_early_end_shortens_the_next_waits(longest, waited, expected):
    state = waiting(7, longest_wait=longest)
    assert next_query(state, **result(7), waited=waited)[0].longest_wait == expected
    assert next_query(state, **result(8), waited=waited)[0].longest_wait == longest


# ---- the pause ----


def test_first_load_is_followed_by_a_wait_without_a_pause():
    assert next_query(QueryState(), **result(changed=True)) == (waiting(7), 0.0)


def test_wait_without_news_is_followed_by_another_without_a_pause():
    assert next_query(waiting(7, idle=4), **result(7, timed_out=True)) == (waiting(7, gap=False), 0.0)


def test_churn_has_a_minimum_pause():
    assert next_query(waiting(5, idle=3), **result(7, changed=True)) == (waiting(7), LEAST_PAUSE_SECONDS)


def test_reads_take_at_most_half_of_the_time():
    assert next_query(waiting(5), **result(7, changed=True, load_seconds=0.9))[1] == 0.9


def test_pause_doubles_up_to_a_limit_while_queries_return_no_news():
    state, pauses = waiting(7), []
    for index in range(8, 16):
        state, pause = next_query(state, **result(index))
        pauses.append(pause)
    assert pauses == [0.04, 0.08, 0.16, 0.32, MOST_PAUSE_SECONDS, MOST_PAUSE_SECONDS, MOST_PAUSE_SECONDS, 0.5]
    assert next_query(waiting(7, idle=10_000), **result(8))[1] == MOST_PAUSE_SECONDS


def test_alternating_index_without_news_causes_no_busy_loop():
    state, waited = QueryState(), 0.0
    for number in range(20):
        state, pause = next_query(state, **result(7 - number % 2))
        waited += pause
    assert waited > 1.0


# ---- the wait ----


def wait(max_age=86400.0, *, gap=False, hidden=False):
    return wait_seconds(waiting(7, gap=gap), max_age, hidden=hidden)


def test_wait_is_long_without_hidden_keys_and_short_with_them():
    assert (wait(), wait(hidden=True)) == (MOST_WAIT_SECONDS, SHORT_WAIT_SECONDS)
    assert MOST_WAIT_SECONDS == 300.0  # Consul's default
    assert SHORT_WAIT_SECONDS * (1 + 1 / 16) < 15.0


def test_first_wait_after_an_answer_is_short():
    state, _ = next_query(QueryState(), **result(7, changed=True))
    assert wait_seconds(state, 86400.0, hidden=False) == SHORT_WAIT_SECONDS
    state, _ = next_query(state, **result(7, timed_out=True))
    assert wait_seconds(state, 86400.0, hidden=False) == MOST_WAIT_SECONDS
    state, _ = next_query(state, **result(8, changed=True))
    assert wait_seconds(state, 86400.0, hidden=False) == SHORT_WAIT_SECONDS


@pytest.mark.parametrize(("max_age", "seconds"), [(60.0, 20.0), (15.0, 5.0), (1.0, 1 / 3), (1e-9, LEAST_PAUSE_SECONDS)])
def test_wait_stays_below_a_third_of_max_age(max_age, seconds):
    assert wait(max_age=max_age) == seconds


@pytest.mark.parametrize("limit", [5.0, 30.0, 50.0, 60.0])
def test_wait_after_a_cut_is_shorter_and_grows_again(limit):
    state, waits = after_cut(waiting(7, gap=False), limit), []
    for _ in range(100):
        waits.append(wait_seconds(state, 86400.0, hidden=False))
        if waits[-1] < limit:
            state, _ = next_query(state, **result(7, timed_out=True))
        else:
            state = after_cut(state, limit)
    cuts = sum(wait >= limit for wait in waits)
    assert waits[0] < limit
    assert 10 <= cuts <= 15
    assert sum(waits) / len(waits) > limit / 2


def test_wait_recovers_after_a_single_cut():
    state = after_cut(waiting(7), 5.0)
    for _ in range(60):
        state, _ = next_query(state, **result(7, timed_out=True))
    assert state.longest_wait == MOST_WAIT_SECONDS


# ---- a snapshot ----


def test_batch_with_entries_of_several_services_is_split():
    table = Table("aliases", prefix="mail", services=("alias", "domain", "string"))
    pairs = [
        (b"mail/aliases/", b""),
        (b"mail/aliases/aaa/x", b"1"),
        (ALIAS + b"a", b"1"),
        (ALIAS + b"b", b"2"),
        (b"mail/aliases/aliases/x", b"no"),
        (DOMAIN + b"c", b"3"),
        (b"mail/aliases/z", b"no"),
    ]
    for cut in range(len(pairs) + 1):
        made = SnapshotBuilder(table, PREFIX, table.services, None)
        made.take(pairs[:cut])
        made.take(pairs[cut:])
        found = made.finish({})
        assert {name: dict(bucket.values) for name, bucket in found.entries.items()} == {
            "alias": {b"a": b"1", b"b": b"2"},
            "domain": {b"c": b"3"},
            "string": {},
        }
        assert found.size == 3


def test_two_services_may_share_one_folder():
    table = Table("t", services=("alias", "string"), paths={"string": "t/alias"})
    made = SnapshotBuilder(table, b"t/", table.services, None)
    made.take([(b"t/alias/a", b"1")])
    assert {name: bucket.lookup(b"a") for name, bucket in made.finish({}).entries.items()} == {
        "alias": b"1",
        "string": b"1",
    }


def test_path_elsewhere_is_a_separate_prefix():
    table = Table("t", services=("alias",), paths={"alias": "shared/people"})
    made = SnapshotBuilder(table, b"shared/people/", table.services, None)
    made.take([(b"shared/people/a", b"1")])
    assert made.finish({}).entries["alias"].lookup(b"a") == b"1"


def test_same_contents_keep_the_same_snapshot():
    former = snapshot(BOTH)
    assert snapshot(BOTH, former) is former


def test_unchanged_folder_is_kept_when_another_changes():
    former = snapshot(BOTH)
    latter = snapshot([(ROOT[0], b"eric"), BOTH[1]], former)
    assert latter is not former
    assert latter.entries["domain"] is former.entries["domain"]
    assert latter.entries["alias"].lookup(b"root") == b"eric"


def test_table_may_have_at_most_max_keys_entries():
    table = Table("aliases", prefix="mail", services=("alias",), max_keys=2)
    pairs = [(ALIAS + b"%d" % number, b"x") for number in range(3)]
    assert snapshot(pairs[:2], table=table).size == 2
    made = loading(pairs[:2], table=table)
    with pytest.raises(TooLarge, match="mail/aliases/ holds more than max_keys = 2 keys"):
        made.take(pairs[2:])


# ---- absence must be proven ----


def missing(pairs, former):
    return loading(pairs, former).missing_keys()


def test_no_key_is_missing_without_a_deletion():
    assert missing([*BOTH, (DOMAIN + b"new", b"")], snapshot(BOTH)) == {"alias": {}, "domain": {}}
    assert missing(BOTH, None) == {"alias": {}, "domain": {}}


def test_missing_keys_have_their_stored_case():
    former = snapshot([(ALIAS + b"Root", b"x"), (ALIAS + b"bad", b"|sh"), BOTH[1]])
    assert missing([BOTH[1]], former) == {"alias": {b"root": b"Root", b"bad": b"bad"}, "domain": {}}


def test_keys_are_missing_from_entries_built_with_another_max_age():
    former = snapshot(BOTH, table=replace(TABLE, max_age=1.0, deadline=1.0))
    assert missing([BOTH[1]], former)["alias"] == {b"root": b"root"}


def test_missing_keys_that_may_be_hidden_stay_missing_until_they_are_listed():
    former = snapshot([BOTH[1]], hidden=[("alias", {b"root": b"Root", b"eric": b"eric"})])
    assert missing([(ALIAS + b"eric", b"x"), BOTH[1]], former)["alias"] == {b"root": b"Root"}


def test_emptied_are_the_services_with_entries_before_the_table_lost_all():
    assert loading([], snapshot(BOTH)).emptied == {"alias", "domain"}
    assert loading([], snapshot(BOTH[:1])).emptied == {"alias"}
    assert loading(BOTH[:1], snapshot(BOTH)).emptied == set()
    assert loading([], snapshot([])).emptied == set()
    assert loading([]).emptied == set()


def test_sample_is_everything_or_spread_over_the_list():
    keys = [b"%04d" % number for number in range(1000)]
    assert sample(keys[:MAX_ABSENCE_CHECKS]) == keys[:MAX_ABSENCE_CHECKS]
    found = sample(keys)
    assert (len(found), len(set(found)), found[0]) == (MAX_ABSENCE_CHECKS, MAX_ABSENCE_CHECKS, b"0000")
    assert found[-1] > b"0980"


def test_services_are_verified_at_start_after_a_restart_and_while_keys_are_hidden():
    def unverified(former, *, filtered=False):
        return unverified_services(TABLE.services, former, filtered=filtered)

    assert unverified(None) == ["alias", "domain"]
    assert unverified(snapshot(BOTH)) == []
    assert unverified(snapshot(BOTH), filtered=True) == ["alias", "domain"]
    assert unverified(snapshot(BOTH, hidden=[("alias", {})])) == ["alias"]
    assert unverified(restored(BOTH)) == ["alias", "domain"]


def test_snapshot_stays_the_same_while_the_same_keys_are_hidden():
    former = snapshot([BOTH[1]], hidden=[("alias", {})])
    assert snapshot([BOTH[1]], former, hidden=[("alias", {})]) is former
    assert snapshot([BOTH[1]], former) is not former
    assert snapshot([BOTH[1]], former, hidden=[("alias", {b"root": b"root"})]) is not former


def test_visible_entries_answer_where_others_are_hidden_and_absence_needs_a_read():
    held = Mirror(10.0)
    held.state = (snapshot(BOTH, hidden=[("alias", {b"eric": b"Eric"})]), 0.0)
    assert held.entries("domain", b"example.org", 1.0).find(b"example.org") is not None
    assert held.entries("alias", b"root", 1.0).lookup(b"root") == b"gilles"
    assert len(held.entries("alias", None, 1.0)) == 1
    for key, stored in ((b"nobody", b"nobody"), (b"eric", b"Eric")):
        with pytest.raises(Unlisted) as caught:
            held.entries("alias", key, 1.0)
        assert caught.value.stored == stored


def test_list_of_a_folder_without_a_visible_entry_is_an_error():
    held = Mirror(10.0)
    held.state = (snapshot([BOTH[1]], hidden=[("alias", {})]), 0.0)
    with pytest.raises(Unlisted):
        held.entries("alias", None, 1.0)


# ---- the on-disk snapshot proves nothing ----


def restored(pairs):
    return loading(pairs).finish({}, restored=True)


def test_unchanged_restored_contents_are_a_new_snapshot_with_the_same_folders():
    former = restored(BOTH)
    latter = snapshot(BOTH, former)
    assert latter is not former
    assert not latter.restored
    assert latter.entries["alias"] is former.entries["alias"]


# ---- the mirror ----


def test_error_before_the_first_load_has_the_reason():
    held = Mirror(10.0)
    for _ in range(3):
        with pytest.raises(Unreachable, match="no data received from Consul yet") as caught:
            held.entries("alias", b"root", 0.0)
    assert len(caught.traceback) == 2
    held.last_error = SourceError("token file: gone")
    with pytest.raises(SourceError, match="token file: gone"):
        held.entries("alias", b"root", 0.0)


def test_last_good_copy_is_served_up_to_max_age_and_then_the_error_has_its_age():
    held = Mirror(10.0)
    held.state = (snapshot(BOTH), 100.0)
    held.last_error = Unreachable("connection refused")
    assert held.entries("alias", b"root", 110.0).lookup(b"root") == b"gilles"
    with pytest.raises(Unreachable, match=r"no data from Consul for 12 s; last error: connection refused"):
        held.entries("alias", b"root", 112.0)


def test_confirmation_resets_the_age():
    held = Mirror(10.0)
    kept = snapshot(BOTH)
    held.state = (kept, 100.0)
    held.state = (kept, 200.0)
    assert held.entries("alias", b"root", 205.0) is kept.entries["alias"]


def test_reader_keeps_its_snapshot_when_it_is_replaced():
    held = Mirror(10.0)
    held.state = (snapshot(BOTH), 0.0)
    reading = held.entries("alias", b"root", 0.0)
    held.state = (snapshot([], held.state[0]), 0.0)
    assert (reading.lookup(b"root"), held.entries("alias", b"root", 0.0).lookup(b"root")) == (b"gilles", None)


def test_each_confirmation_replaces_the_state():
    mirror = Mirror(10.0)
    mirror.state = (snapshot(BOTH), 0.0)
    before = mirror.state
    mirror.state = (before[0], 0.0)
    assert mirror.state is not before
    assert mirror.state == before


def test_empty_batch_changes_nothing():
    assert snapshot([]).size == 0
