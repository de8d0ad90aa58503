"""A large table is watched in ranges, each of which brings its edits; with every version of the fake."""

from __future__ import annotations

import threading
import time

import pytest
from msgspec.structs import replace

from table_consul.sources import queries, ranges, watch
from tests.consul.watch.ranges.ranged_tables import (
    LATE_SECONDS,
    LONG_LATE_SECONDS,
    NAMES,
    lists,
    ranged_watch,
    reads_whole,
    stays_ranged,
    waiting,
)
from tests.consul.watch.watching import (
    ALIAS,
    DOMAIN,
    PREFIX,
    TABLE,
    ask,
    becomes,
    logged,
)
from tests.dialogue import eventually
from tests.fake_consul.store import Entry


@pytest.mark.usefixtures("no_late_query")
def test_edit_reads_only_its_range(fake, source):
    before = len(lists(fake))
    fake.put(ALIAS + b"b3", b"new")
    becomes(source, b"new", b"b3")
    stays_ranged(fake, before)
    assert set(lists(fake)[before:]) <= {ALIAS + b"b"}


@pytest.mark.usefixtures("no_late_query")
def test_new_key_in_a_range_is_found(fake, source):
    before = len(lists(fake))
    fake.put(ALIAS + b"bob", b"new")
    becomes(source, b"new", b"bob")
    stays_ranged(fake, before)


@pytest.mark.usefixtures("no_late_query")
def test_deleted_key_is_not_found(fake, source):
    before = len(lists(fake))
    fake.delete(ALIAS + b"c4")
    becomes(source, None, b"c4")
    stays_ranged(fake, before)
    assert [ask(source, name) for name in NAMES if name != b"c4"] == [b"old"] * (len(NAMES) - 1)


@pytest.mark.usefixtures("no_late_query")
def test_edits_in_all_ranges_are_found(fake, source):
    before = len(lists(fake))
    for number, name in enumerate(NAMES):
        fake.put(ALIAS + name, b"%d" % number)
    for number, name in enumerate(NAMES):
        becomes(source, b"%d" % number, name)
    stays_ranged(fake, before)


@pytest.mark.usefixtures("no_late_query")
def test_key_outside_every_range_is_found(fake, source):
    before = len(lists(fake))
    fake.put(ALIAS + b"zoe", b"new")
    becomes(source, b"new", b"zoe")
    fake.put(ALIAS + b"zoe", b"newer")
    becomes(source, b"newer", b"zoe")
    stays_ranged(fake, before)


def test_key_that_is_a_prefix_of_several_ranges_reads_the_whole_table(fake, mirrored):
    for number in range(6):
        fake.put(ALIAS + b"a1%d" % number, b"old")
        fake.put(ALIAS + b"a2%d" % number, b"old")
        fake.delete(ALIAS + b"a%d" % number)
    source = mirrored(fake.address)
    for _ in eventually("ranges are watched", 10):
        if any(request.path == b"/v1/kv/" + ALIAS + b"a2" for request in waiting(fake)):
            break
    before = len(lists(fake))
    fake.put(ALIAS + b"a", b"new")
    becomes(source, b"new", b"a")
    reads_whole(fake, before)


def test_key_of_no_service_reads_the_whole_table(fake, source):
    before = len(lists(fake))
    fake.put(PREFIX + b"notes/x", b"new")
    reads_whole(fake, before)
    fake.put(ALIAS + b"a1", b"new")
    becomes(source, b"new", b"a1")


@pytest.mark.usefixtures("no_late_query")
def test_first_key_of_a_folder_is_found_without_reading_the_whole_table(fake, mirrored):
    table = replace(TABLE, services=("alias", "domain", "userinfo"))
    source = ranged_watch(fake, mirrored(fake.address, table))
    before = len(lists(fake))
    fake.put(PREFIX + b"userinfo/eric", b"1000:1000:/home/eric")
    becomes(source, b"1000:1000:/home/eric", b"eric", service="userinfo")
    fake.put(PREFIX + b"userinfo/eric", b"1001:1000:/home/eric")
    becomes(source, b"1001:1000:/home/eric", b"eric", service="userinfo")
    stays_ranged(fake, before)


@pytest.mark.usefixtures("no_late_query")
def test_edit_in_a_small_folder_is_found(fake, source):
    before = len(lists(fake))
    fake.put(DOMAIN + b"example.net", b"")
    becomes(source, b"example.net", b"example.net", service="domain")
    stays_ranged(fake, before)


def test_first_wait_of_a_range_is_shorter_than_the_max_query_time_of_an_agent(fake, mirrored, monkeypatch):
    monkeypatch.setattr(queries.Queries, "most_wait", 300.0)
    ranged_watch(fake, mirrored(fake.address))
    waits = [request.params["wait"] for request in waiting(fake) if request.path.startswith(b"/v1/kv/" + ALIAS)]
    assert waits
    assert {*waits} == {"10000ms"}


@pytest.mark.usefixtures("no_late_query")
def test_edit_in_the_rest_is_found(fake, mirrored, monkeypatch):
    monkeypatch.setattr(watch, "MOST_RANGES", 5)
    monkeypatch.setattr("table_consul.sources.cut.ASK_KEYS", 0)
    source = mirrored(fake.address)
    for _ in eventually("ranges are watched", 10):
        if len(waiting(fake)) > 4:
            break
    before = len(lists(fake))
    for name in NAMES:
        fake.put(ALIAS + name, b"new")
    for name in NAMES:
        becomes(source, b"new", name)
    stays_ranged(fake, before)


def test_key_outside_every_range_is_found_beside_an_edit_in_a_range(fake, source):
    with fake.store.changed:  # as in one transaction
        fake.put(ALIAS + b"zoe", b"new")
        fake.put(ALIAS + b"a1", b"new")
    becomes(source, b"new", b"a1")
    becomes(source, b"new", b"zoe")


@pytest.fixture
def held(fake, source):
    """An event: until it is set, no further query for the range of c1 gets a response."""
    asked, released = threading.Event(), threading.Event()

    def handle(request):
        if request.path == b"/v1/kv/" + ALIAS + b"c" and "index" in request.params:
            asked.set()
            released.wait(20)
        return fake.consul(request)

    fake.handle = handle
    fake.put(ALIAS + b"c1", b"seen")
    becomes(source, b"seen", b"c1")
    assert asked.wait(5)
    yield released
    released.set()


def test_edit_is_found_although_the_response_of_its_range_is_slow(fake, source, held):
    before = len(lists(fake))
    fake.put(ALIAS + b"c1", b"new")
    becomes(source, b"new", b"c1")
    held.set()
    fake.put(ALIAS + b"c1", b"newer")
    becomes(source, b"newer", b"c1")
    stays_ranged(fake, before)


@pytest.mark.usefixtures("held")
def test_query_that_hangs_reads_the_whole_table(fake, source):
    before = len(lists(fake))
    fake.put(ALIAS + b"c1", b"new")
    becomes(source, b"new", b"c1")
    time.sleep(1.5 * TABLE.deadline)
    stays_ranged(fake, before)
    fake.put(ALIAS + b"c1", b"newer")
    becomes(source, b"newer", b"c1")
    reads_whole(fake, before)


def test_change_replaced_before_its_range_is_read_does_not_read_the_whole_table(fake, source, held):
    before = len(lists(fake))
    fake.put(ALIAS + b"c1", b"replaced")
    for _ in eventually("the completeness query has returned", 5):
        if any("keys" in each.params and each.params["index"] == str(fake.index) for each in waiting(fake)):
            break
    fake.put(ALIAS + b"c1", b"new")
    held.set()
    becomes(source, b"new", b"c1")
    time.sleep(3 * LATE_SECONDS)
    stays_ranged(fake, before)


@pytest.mark.usefixtures("no_late_query")
def test_single_deletions_do_not_read_the_whole_table(fake, source):
    before = len(lists(fake))
    for number in range(5):
        for letter in b"abcdef":
            fake.delete(ALIAS + b"%c%d" % (letter, number))
            time.sleep(0.002)
    for letter in b"abcdef":
        becomes(source, None, b"%c4" % letter)
    time.sleep(2 * LONG_LATE_SECONDS)
    stays_ranged(fake, before)


def test_range_with_many_deletions_reads_the_whole_table(fake, source, monkeypatch):
    monkeypatch.setattr(ranges, "LEAST_LOSS", 4)
    before = len(lists(fake))
    with fake.store.changed:
        for number in range(4):
            fake.delete(ALIAS + b"d%d" % number)
    becomes(source, None, b"d3")
    reads_whole(fake, before)


def test_range_emptied_together_with_an_edit_elsewhere_is_empty(fake, source):
    left = {key: entry for key, entry in fake.store.entries.items() if not key.startswith(ALIAS + b"d")}
    fake.store.replace(left | {ALIAS + b"a1": Entry(b"new", 0, fake.index, fake.index + 1)})  # as in one transaction
    becomes(source, b"new", b"a1")
    for number in range(6):
        becomes(source, None, b"d%d" % number)


def test_table_that_grows_beyond_max_keys_is_read_directly(fake, mirrored, caplog):
    ranged_watch(fake, mirrored(fake.address, replace(TABLE, max_keys=len(fake.store.entries) + 2)))
    for number in range(6, 9):
        fake.put(ALIAS + b"e%d" % number, b"new")
    logged(caplog, "falling back to direct mode")


def test_entries_stay_confirmed_while_nothing_changes(fake, mirrored):
    table = replace(TABLE, max_age=0.9)
    source = ranged_watch(fake, mirrored(fake.address, table))
    ends = time.monotonic() + 2 * table.max_age
    while time.monotonic() < ends:
        assert ask(source, b"a1") == b"old"
        time.sleep(0.05)


def test_entries_stay_confirmed_while_one_key_is_rewritten_again_and_again(fake, mirrored):
    table = replace(TABLE, max_age=1.5)
    source = ranged_watch(fake, mirrored(fake.address, table))
    ends, count = time.monotonic() + 3 * table.max_age, 0
    while time.monotonic() < ends:
        count += 1
        fake.put(ALIAS + b"a2", b"%d" % count)
        assert ask(source, b"a1") == b"old"
        time.sleep(0.005)


@pytest.mark.usefixtures("no_late_query")
def test_edit_of_a_folder_whose_name_begins_alike_does_not_read_the_whole_table(fake, mirrored):
    for name in NAMES:
        fake.put(b"shared/all/" + name, b"old")
    source = mirrored(fake.address, replace(TABLE, services=("string",), paths={"string": "shared/all"}))
    for _ in eventually("ranges are watched", 10):
        if any(request.path == b"/v1/kv/shared/all/c" for request in waiting(fake)):
            break
    before = len(lists(fake))
    edited = time.monotonic()
    fake.put(b"shared/allowed/a1", b"new")
    for _ in eventually("the table is confirmed", 10):
        if source.watches[0].mirror.state[1] > edited:
            break
    for name in (b"a1", b"zoe"):
        fake.put(b"shared/all/" + name, b"new")
        becomes(source, b"new", name, service="string")
    assert b"shared/all/" not in lists(fake)[before:]
