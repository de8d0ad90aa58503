"""Held deletions, as pure functions of snapshots and times."""

from __future__ import annotations

import math

import hypothesis
import pytest
from hypothesis import strategies as st
from msgspec.structs import replace

from table_consul.errors import Forbidden
from table_consul.services import Table
from table_consul.sources.hold import LEAST_DELETIONS, NEVER_HELD, Held, Terms, is_suspicious, log_lines
from table_consul.sources.mirror import Hidden, Mirror, SnapshotBuilder, adopted, wait_seconds
from tests.consul.test_mirror import waiting

TABLE = Table("mail", services=("alias", "domain", "credentials"))
PREFIX = b"mail/"
NOW, SECONDS = 1000.0, 900.0
OTHER_STORE = {"other_store": True}


def pairs(count, service="alias", start=0, value=b"gilles"):
    return [(b"mail/%s/user%d" % (service.encode(), number), value) for number in range(start, start + count)]


def read(listed, former=None, now=NOW, *, table=TABLE, seconds=SECONDS, restored=False, hidden=(), **terms):
    """The snapshot after a read that lists these pairs and proves that all others are absent."""
    builder = SnapshotBuilder(table, PREFIX, table.services, former, Terms(now, seconds, **terms))
    builder.take(sorted(listed))
    missing = builder.missing_keys()
    reasons = {name: Hidden(Forbidden("no"), missing[name]) for name in hidden}
    deleted = {name: keys for name, keys in missing.items() if name not in hidden}
    return builder.finish(reasons, deleted, restored=restored)


def held(snapshot):
    return {name: len(each.keys) for name, each in snapshot.held.items()}


def answers(snapshot, key=b"user0", service="alias"):
    return snapshot.entries[service].lookup(key)


# ---- when a hold begins ----


def test_deletion_of_a_whole_folder_is_held():
    after = read([], read(pairs(30)))
    assert (held(after), after.held["alias"].until) == ({"alias": 30}, NOW + SECONDS)
    assert all(answers(after, b"user%d" % number) == b"gilles" for number in range(30))


@pytest.mark.parametrize(
    ("deleted", "count", "suspicious"),
    [(20, 39, True), (20, 40, False), (19, 19, False), (20, 20, True), (51, 100, True), (50, 100, False)],
)
def test_more_than_half_and_at_least_20_deletions_are_suspicious(deleted, count, suspicious):
    assert LEAST_DELETIONS == 20
    assert is_suspicious(deleted, count) is suspicious


def test_few_deletions_are_suspicious_where_the_index_went_backwards():
    assert is_suspicious(3, 5, **OTHER_STORE)
    assert not is_suspicious(2, 4, **OTHER_STORE)
    assert held(read([], read(pairs(2)), **OTHER_STORE)) == {"alias": 2}
    assert held(read([], read(pairs(2)))) == {}


def test_first_load_holds_nothing():
    assert held(read(pairs(30))) == {}


def test_restored_snapshot_of_any_size_can_start_a_hold():
    small = pairs(2) + pairs(1, "domain")
    assert held(read([], read(pairs(30), restored=True))) == {"alias": 30}
    assert held(read([], read(small, restored=True))) == {"alias": 2, "domain": 1}
    assert held(read(pairs(1, "domain"), read(small, restored=True))) == {}


def test_hold_deletions_of_0_holds_nothing():
    assert held(read([], read(pairs(30)), seconds=0.0)) == {}


def test_each_folder_is_held_separately():
    everything = pairs(30) + pairs(1000, "domain")
    assert held(read(pairs(1000, "domain"), read(everything))) == {"alias": 30}


@pytest.mark.parametrize("service", sorted(NEVER_HELD))
def test_deleted_credentials_are_never_held(service):
    table = replace(TABLE, services=("alias", service))
    former = read(pairs(30, service), table=table)
    assert len(former.entries[service]) == 30
    after = read([], former, table=table, **OTHER_STORE)
    assert (held(after), len(after.entries[service])) == ({}, 0)


def test_records_shared_with_credentials_are_held_only_for_the_other_service():
    table = Table("mail", services=("credentials", "userinfo"), paths={"userinfo": "mail/credentials"})
    record = b'{"password": "$2b$10$abc", "uid": 1000, "gid": 1000, "home": "/home/u"}'
    after = read([], read(pairs(30, "credentials", value=record), table=table), table=table)
    assert held(after) == {"userinfo": 30}
    assert (answers(after, service="userinfo"), answers(after, service="credentials")) == (b"1000:1000:/home/u", None)


def test_keys_without_proven_absence_are_hidden_and_not_held():
    former = read(pairs(30))
    after = read([], former, hidden=("alias",))
    assert (held(after), len(after.hidden["alias"].missing)) == ({}, 30)


# ---- answers during a hold ----


def test_held_entries_answer_exactly_as_before():
    stored = [
        (b"mail/alias/Root", b"gilles"),
        (b"mail/alias/bad", b"|sh"),
        (b"mail/alias/odd", b"gilles eric"),
        *pairs(30),
    ]
    before, after = read(stored), read([], read(stored))
    new, old = after.entries["alias"], before.entries["alias"]
    assert (new.lookup(b"root"), sorted(new.problems)) == (b"gilles", sorted(old.problems))
    assert len(old.problems) == 2
    assert new.lookup(b"nobody") is None
    with pytest.raises(Exception, match="allow_commands"):
        new.lookup(b"bad")


def test_held_patterns_match_and_are_fetched_beside_the_others():
    stored = [*pairs(30, "domain"), (b"mail/domain/*.example.org", b"")]
    after = read([(b"mail/domain/example.net", b"")], read(stored))
    domains = after.entries["domain"]
    assert domains.find(b"www.example.org") == b"*.example.org"
    assert domains.find(b"example.net") == b"example.net"
    assert len(domains) == 32
    assert domains.next_after(None) == (b"*.example.org", b"*.example.org")


def test_absence_of_other_keys_is_proven_during_a_hold():
    mirror = Mirror(86400.0)
    mirror.state = (read([], read(pairs(30))), NOW)
    assert mirror.entries("alias", b"nobody", NOW).lookup(b"nobody") is None


def test_edit_during_a_hold_is_used_and_does_not_change_the_hold():
    first = read([], read(pairs(30)))
    second = read([(b"mail/alias/new", b"eric")], first, NOW + 10)
    assert (answers(second, b"new"), answers(second), second.held) == (b"eric", b"gilles", first.held)


def test_unchanged_read_during_a_hold_is_the_same_snapshot():
    first = read([], read(pairs(30)))
    assert read([], first, NOW + 10) is first


def test_held_keys_are_not_missing_again():
    first = read([], read(pairs(30)))
    builder = SnapshotBuilder(TABLE, PREFIX, TABLE.services, first, Terms(NOW + 10, SECONDS))
    assert builder.missing_keys()["alias"] == {}


def test_hold_continues_while_its_folder_is_hidden():
    first = read([], read(pairs(30)))
    assert answers(read([], first, NOW + 10, hidden=("alias",))) == b"gilles"


def test_further_deletions_join_a_hold_and_end_with_it():
    first = read(pairs(5), read(pairs(30)))
    second = read([], first, NOW + 10)
    assert (held(first), held(second)) == ({"alias": 25}, {"alias": 30})
    assert second.held["alias"].until == first.held["alias"].until
    assert answers(second, b"user0") == b"gilles"


# ---- when a hold ends ----


def test_hold_ends_after_its_time():
    first = read([], read(pairs(30)))
    assert answers(read([], first, NOW + SECONDS - 1)) == b"gilles"
    last = read([], first, NOW + SECONDS)
    assert (answers(last), held(last), len(last.entries["alias"])) == (None, {}, 0)


def test_deletion_in_the_read_that_ends_a_hold_is_compared_with_the_stored_keys():
    first = read(pairs(25, start=30), read(pairs(55)))
    assert held(first) == {"alias": 30}
    few = read(pairs(24, start=30), first, NOW + SECONDS)
    most = read(pairs(1, start=30), first, NOW + SECONDS)
    assert (held(few), held(most)) == ({}, {"alias": 24})
    assert (answers(most), answers(most, b"user31")) == (None, b"gilles")


def test_restored_keys_leave_the_hold_and_the_last_one_ends_it():
    first = read([], read(pairs(30)))
    some = read(pairs(10, value=b"eric"), first, NOW + 10)
    assert (held(some), answers(some), answers(some, b"user20")) == ({"alias": 20}, b"eric", b"gilles")
    assert held(read(pairs(30), some, NOW + 20)) == {}


def test_accepted_deletions_end_at_the_next_read_and_others_are_still_held():
    first = read(pairs(30, "domain"), read(pairs(30) + pairs(30, "domain")))
    accepted = first.accepted()
    assert answers(accepted) == b"gilles"
    last = read([], accepted, NOW + 10)
    assert (answers(last), held(last)) == (None, {"domain": 30})


def test_accepting_without_a_hold_changes_nothing():
    before = read(pairs(30))
    assert before.accepted() is before


def test_update_that_changes_settings_accepts_held_deletions():
    table = replace(TABLE, hold_deletions=60.0)
    taken = adopted(read([], read(pairs(30))), table, table.services)
    assert answers(taken) == b"gilles"
    last = read([], taken, NOW + 10, table=table)
    assert (answers(last), held(last)) == (None, {})


def test_wait_ends_with_the_hold():
    assert read([], read(pairs(30))).held_until == NOW + SECONDS
    assert read(pairs(30)).held_until == math.inf
    assert wait_seconds(waiting(7), 86400.0, hidden=False, held_for=4.5) == 4.5


@hypothesis.given(
    st.lists(st.tuples(st.sets(st.integers(0, 59)), st.booleans(), st.sampled_from([1.0, 400.0, 1000.0])), max_size=8)
)
def test_only_listed_and_held_entries_are_found(reads):
    before, now = read(pairs(60)), NOW
    for number, (listed, accepted, seconds) in enumerate(reads):
        now += seconds
        former = before.accepted() if accepted else before
        value = b"v%d" % number
        after = read([(b"mail/alias/user%d" % each, value) for each in listed], former, now)
        kept = set() if "alias" not in after.held else {*after.held["alias"].keys}
        names = {b"user%d" % each for each in listed}
        assert not kept & names
        assert {key: answers(after, key) for key in names} == dict.fromkeys(names, value)
        assert {key: answers(after, key) for key in kept} == {key: answers(before, key) for key in kept}
        assert len(after.entries["alias"]) == len(kept | names)
        if kept and not accepted and before.held:
            assert after.held_until == before.held_until or before.held_until <= now
        before = after


# ---- the log ----


def lines(before, after, now=NOW):
    counts = {name: len(each) for name, each in before.entries.items()}
    return list(log_lines(before.held, after.held, counts, "mail", now))


def test_log_has_a_line_when_a_hold_begins_and_none_while_it_lasts():
    former = read(pairs(40))
    first = read(pairs(10), former)
    hint = "to accept the deletion: smtpctl update table mail"
    text = f"30 of 40 entries deleted at once; serving them for another 900 s ({hint})"
    assert lines(former, first) == [("alias", text)]
    assert lines(first, read([], first, NOW + 10), NOW + 10) == []


def test_log_has_a_line_when_a_hold_ends():
    first = read([], read(pairs(30)))
    over, accepted = read([], first, NOW + SECONDS), first.accepted()
    ended = "no longer serving 30 deleted entries"
    assert lines(first, over, NOW + SECONDS) == [("alias", f"hold_deletions expired: {ended}")]
    assert lines(accepted, read([], accepted, NOW + 10)) == [("alias", f"deletion accepted: {ended}")]
    assert lines(first, read(pairs(30), first, NOW + 10)) == [("alias", "all deleted entries are back")]


def test_log_has_both_lines_when_one_hold_follows_another():
    before, after = {"alias": Held({b"a": b"a"}, 5.0)}, {"alias": Held({b"b": b"b"}, 20.0)}
    begun = "1 of 1 entry deleted at once; serving them for another 10 s"
    texts = [text.partition(" (")[0] for _, text in log_lines(before, after, {"alias": 1}, "mail", 10.0)]
    assert texts == ["hold_deletions expired: no longer serving 1 deleted entry", begun]
