from __future__ import annotations

import pytest
from msgspec.structs import replace

from table_consul.errors import Forbidden, SourceError, TooLarge, Unreachable
from table_consul.kv import is_url_safe
from table_consul.services import Table
from table_consul.sources.mirror import (
    LEAST_PAUSE_SECONDS,
    LEAST_WAIT_SECONDS,
    MAX_ABSENCE_CHECKS,
    MOST_PAUSE_SECONDS,
    MOST_WAIT_SECONDS,
    AbsenceCheck,
    Mirror,
    QueryState,
    Snapshot,
    SnapshotBuilder,
    next_query,
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


def loading(pairs=(), former=None, table=TABLE, forbidden=None):
    made = SnapshotBuilder(table, PREFIX, table.services, former, forbidden or {})
    made.take(list(pairs))
    return made


def snapshot(pairs=(), former=None, table=TABLE):
    return loading(pairs, former, table).finish()


def checks(pairs, former, *, filtered=False):
    return list(loading(pairs, former).absence_checks(is_url_safe, filtered=filtered))


# ---- the index ----


def test_a_higher_index_is_the_one_to_wait_on_next():
    assert next_query(QueryState(5), **result(7, changed=True))[0] == QueryState(7)


def test_an_index_that_goes_backwards_restarts_at_zero():
    assert next_query(QueryState(7), **result(6, changed=True))[0] == QueryState(0)


def test_an_index_is_at_least_one():
    assert next_query(QueryState(0), **result(0))[0] == QueryState(1)


def test_the_same_index_is_kept():
    assert next_query(QueryState(7), **result(7, timed_out=True)) == (QueryState(7), 0.0)


# ---- the pause ----


def test_after_the_first_load_the_wait_for_changes_begins_at_once():
    assert next_query(QueryState(), **result(changed=True)) == (QueryState(7), 0.0)


def test_after_a_wait_without_news_the_next_begins_at_once_and_churn_is_forgotten():
    assert next_query(QueryState(7, idle=4), **result(7, timed_out=True)) == (QueryState(7), 0.0)


def test_under_churn_there_is_a_least_pause():
    assert next_query(QueryState(5, idle=3), **result(7, changed=True)) == (QueryState(7), LEAST_PAUSE_SECONDS)


def test_reading_takes_at_most_half_of_the_time():
    assert next_query(QueryState(5), **result(7, changed=True, load_seconds=0.9))[1] == 0.9


def test_queries_that_return_with_nothing_new_are_asked_ever_more_rarely_up_to_a_limit():
    state, pauses = QueryState(7), []
    for _ in range(8):
        state, pause = next_query(state, **result(7))
        pauses.append(pause)
    assert pauses == [0.04, 0.08, 0.16, 0.32, MOST_PAUSE_SECONDS, MOST_PAUSE_SECONDS, MOST_PAUSE_SECONDS, 0.5]
    assert next_query(QueryState(7, idle=10_000), **result(7))[1] == MOST_PAUSE_SECONDS


def test_an_index_that_goes_to_and_fro_without_news_is_no_busy_loop():
    state, waited = QueryState(), 0.0
    for number in range(20):
        state, pause = next_query(state, **result(7 - number % 2))
        waited += pause
    assert waited > 1.0


# ---- the wait ----


@pytest.mark.parametrize(
    ("keys", "seconds"),
    [(0, LEAST_WAIT_SECONDS), (10_000, 10.0), (20_000, 20.0), (100_000, MOST_WAIT_SECONDS)],
)
def test_the_wait_grows_with_the_table_between_two_limits(keys, seconds):
    assert wait_seconds(keys, 86400.0) == seconds


@pytest.mark.parametrize(("max_age", "seconds"), [(30.0, 10.0), (15.0, 5.0), (1.0, 1 / 3), (1e-9, LEAST_PAUSE_SECONDS)])
def test_the_wait_stays_below_a_third_of_max_age(max_age, seconds):
    assert wait_seconds(100_000, max_age) == seconds


# ---- a snapshot ----


def test_entries_go_to_the_bucket_of_their_service_across_borders_in_one_batch():
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
        made = SnapshotBuilder(table, PREFIX, table.services, None, {})
        made.take(pairs[:cut])
        made.take(pairs[cut:])
        found = made.finish()
        assert {name: dict(bucket.values) for name, bucket in found.entries.items()} == {
            "alias": {b"a": b"1", b"b": b"2"},
            "domain": {b"c": b"3"},
            "string": {},
        }
        assert found.size == 3


def test_two_services_may_share_one_folder():
    table = Table("t", services=("alias", "string"), paths={"string": "t/alias"})
    made = SnapshotBuilder(table, b"t/", table.services, None, {})
    made.take([(b"t/alias/a", b"1")])
    assert {name: bucket.lookup(b"a") for name, bucket in made.finish().entries.items()} == {
        "alias": b"1",
        "string": b"1",
    }


def test_a_path_elsewhere_is_a_prefix_of_its_own():
    table = Table("t", services=("alias",), paths={"alias": "shared/people"})
    made = SnapshotBuilder(table, b"shared/people/", table.services, None, {})
    made.take([(b"shared/people/a", b"1")])
    assert made.finish().entries["alias"].lookup(b"a") == b"1"


def test_the_same_contents_keep_the_same_snapshot():
    former = snapshot(BOTH)
    assert snapshot(BOTH, former) is former


def test_a_bucket_that_has_not_changed_is_kept_when_another_has():
    former = snapshot(BOTH)
    latter = snapshot([(ROOT[0], b"eric"), BOTH[1]], former)
    assert latter is not former
    assert latter.entries["domain"] is former.entries["domain"]
    assert latter.entries["alias"].lookup(b"root") == b"eric"


def test_a_table_may_have_max_keys_entries_and_not_one_more():
    table = Table("aliases", prefix="mail", services=("alias",), max_keys=2)
    pairs = [(ALIAS + b"%d" % number, b"x") for number in range(3)]
    assert snapshot(pairs[:2], table=table).size == 2
    made = loading(pairs[:2], table=table)
    with pytest.raises(TooLarge, match="mail/aliases/ holds more than max_keys = 2 keys"):
        made.take(pairs[2:])


# ---- absence is proven ----


def test_nothing_lost_is_nothing_doubted():
    assert checks([*BOTH, (DOMAIN + b"new", b"")], snapshot(BOTH)) == []


def test_of_the_lost_keys_one_of_each_service_is_doubted():
    former = snapshot([*((ALIAS + b"%02d" % number, b"x") for number in range(20)), BOTH[1]])
    assert checks([], former) == [
        AbsenceCheck("alias", ALIAS + b"00", had_entries=True),
        AbsenceCheck("domain", DOMAIN + b"example.org", had_entries=True),
    ]


def test_absence_is_checked_with_the_key_as_it_was_stored():
    former = snapshot([(ALIAS + b"Root", b"x"), BOTH[1]])
    assert checks([BOTH[1]], former) == [AbsenceCheck("alias", ALIAS + b"Root", had_entries=True)]


def test_absence_is_checked_against_entries_built_with_another_max_age():
    former = snapshot(BOTH, table=replace(TABLE, max_age=1.0, deadline=1.0))
    assert checks([BOTH[1]], former) == [AbsenceCheck("alias", ROOT[0], had_entries=True)]


def test_where_consul_says_that_it_hides_keys_more_of_the_lost_are_doubted():
    former = snapshot([*((ALIAS + b"%02d" % number, b"x") for number in range(20)), BOTH[1]])
    found = [check for check in checks([BOTH[1]], former, filtered=True) if check.service == "alias"]
    assert found == [
        AbsenceCheck("alias", ALIAS + b"%02d" % number, had_entries=True) for number in range(MAX_ABSENCE_CHECKS)
    ]


def test_where_consul_says_that_it_hides_keys_a_bucket_that_lost_none_is_doubted_as_well():
    assert checks(BOTH, snapshot(BOTH), filtered=True) == [
        AbsenceCheck("alias", ALIAS + b"-", had_entries=True),
        AbsenceCheck("domain", DOMAIN + b"-", had_entries=True),
    ]
    assert checks(BOTH, None, filtered=True) == [
        AbsenceCheck("alias", ALIAS + b"-", had_entries=False),
        AbsenceCheck("domain", DOMAIN + b"-", had_entries=False),
    ]


def test_a_listed_key_of_the_name_of_the_probe_is_proof_enough():
    assert checks([(ALIAS + b"-", b"x"), BOTH[1]], None, filtered=True) == [
        AbsenceCheck("domain", DOMAIN + b"-", had_entries=False)
    ]


def test_a_lost_key_that_no_url_can_name_is_no_proof_so_the_folder_is_asked_for():
    former = snapshot([(ALIAS + b"a//b", b"x"), BOTH[1]])
    assert checks([BOTH[1]], former) == [AbsenceCheck("alias", ALIAS + b"-", had_entries=True)]


def test_a_bucket_that_is_empty_is_believed_to_be_where_its_folder_may_be_read():
    assert checks([BOTH[1]], None) == []
    assert unverified_services(TABLE.services, None) == ["alias", "domain"]
    assert unverified_services(TABLE.services, snapshot([BOTH[1]])) == []


def hidden(pairs=(BOTH[1],), former=None):
    return loading(pairs, former, forbidden={"alias": Forbidden("may not be read")}).finish()


def test_a_bucket_is_hidden_whose_folder_could_not_be_read_before_and_is_tried_again_each_time():
    assert list(hidden().forbidden) == ["alias"]
    assert unverified_services(TABLE.services, hidden()) == ["alias"]
    made = loading([BOTH[1]], hidden(), forbidden={"alias": Forbidden("still")})
    assert list(made.absence_checks(is_url_safe, filtered=True)) == [
        AbsenceCheck("domain", DOMAIN + b"-", had_entries=True)
    ]


def test_a_bucket_may_turn_out_to_be_hidden_afterwards():
    made = loading([BOTH[1]], snapshot([BOTH[1]]))
    assert next(made.absence_checks(is_url_safe, filtered=True)) == AbsenceCheck(
        "alias", ALIAS + b"-", had_entries=False
    )
    made.forbidden["alias"] = Forbidden("may not be read")
    assert list(made.finish().forbidden) == ["alias"]


def test_what_is_hidden_still_is_no_change_and_what_is_no_longer_is_one():
    former = hidden()
    assert hidden(former=former) is former
    assert snapshot([BOTH[1]], former) is not former


def test_a_hidden_bucket_is_an_error_and_the_others_answer():
    held = Mirror(10.0)
    held.state = (hidden(), 0.0)
    assert held.entries("domain", b"example.org", 1.0).find(b"example.org") is not None
    for _ in range(3):
        with pytest.raises(Forbidden, match="may not be read") as caught:
            held.entries("alias", b"root", 1.0)
    assert len(caught.traceback) == 2


def test_of_a_bucket_that_is_hidden_in_part_the_rest_answers_and_absence_is_an_error():
    held = Mirror(10.0)
    held.state = (hidden(BOTH), 0.0)
    assert held.entries("alias", b"root", 1.0).lookup(b"root") == b"gilles"
    for key in (b"nobody", None):
        with pytest.raises(Forbidden):
            held.entries("alias", key, 1.0)


# ---- a copy from disk proves nothing ----


def restored(pairs):
    return loading(pairs).finish(restored=True)


def test_what_comes_from_disk_is_all_unproven():
    assert unverified_services(TABLE.services, restored(BOTH)) == ["alias", "domain"]


def test_the_same_contents_as_on_disk_are_a_new_snapshot_with_the_same_buckets():
    former = restored(BOTH)
    latter = snapshot(BOTH, former)
    assert latter is not former
    assert not latter.restored
    assert latter.entries["alias"] is former.entries["alias"]


# ---- the mirror ----


def test_before_anything_was_read_the_last_error_says_why():
    held = Mirror(10.0)
    for _ in range(3):
        with pytest.raises(Unreachable, match="no data received from Consul yet") as caught:
            held.entries("alias", b"root", 0.0)
    assert len(caught.traceback) == 2
    held.last_error = SourceError("token file: gone")
    with pytest.raises(SourceError, match="token file: gone"):
        held.entries("alias", b"root", 0.0)


def test_the_last_good_copy_answers_up_to_max_age_and_then_the_error_says_since_when():
    held = Mirror(10.0)
    held.state = (snapshot(BOTH), 100.0)
    held.last_error = Unreachable("connection refused")
    assert held.entries("alias", b"root", 110.0).lookup(b"root") == b"gilles"
    with pytest.raises(Unreachable, match=r"no data from Consul for 12 s; last error: connection refused"):
        held.entries("alias", b"root", 112.0)


def test_a_confirmation_makes_it_young_again():
    held = Mirror(10.0)
    kept = snapshot(BOTH)
    held.state = (kept, 100.0)
    held.state = (kept, 200.0)
    assert held.entries("alias", b"root", 205.0) is kept.entries["alias"]


def test_a_reader_keeps_its_snapshot_while_another_takes_its_place():
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


def test_a_batch_of_nothing_is_nothing():
    assert snapshot([]).size == 0
    assert isinstance(snapshot([]), Snapshot)
