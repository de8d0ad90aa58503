"""A large table is watched in ranges until something unusual happens; with every version of the fake."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest
from msgspec.structs import replace

from table_consul.errors import EntryError, Forbidden
from table_consul.sources import ranged, ranges, watch
from tests.consul.watch.watching import (
    ALIAS,
    DOMAIN,
    PREFIX,
    TABLE,
    ask,
    becomes,
    lines,
    logged,
    make_ranges_small,
    snapshot_entries,
)
from tests.dialogue import eventually
from tests.fake_consul.messages import Answer
from tests.fake_consul.store import Entry

NAMES = [bytes([letter]) + b"%d" % number for letter in b"abcdef" for number in range(6)]
LATE_SECONDS = 0.2
# For tests in which no query may count as late, even on a busy machine.
LONG_LATE_SECONDS = 1.0


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_ranges_small(monkeypatch, 6, late=LATE_SECONDS, soon=0.1)
    monkeypatch.setattr(watch, "JITTER_SECONDS", 0.0)


@pytest.fixture
def no_late_query(small, monkeypatch):
    monkeypatch.setattr(ranged, "LATE_SECONDS", LONG_LATE_SECONDS)


@pytest.fixture(autouse=True)
def queries_end():
    before = watching_threads()
    yield
    ended(before)


def watching_threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith(("query ", "watch "))}


def ended(before):
    """Wait until there are no more watches and queries than before."""
    for _ in eventually("all threads have ended", 10):
        if watching_threads() <= before:
            return


@pytest.fixture
def fake(fake):
    for name in NAMES:
        fake.put(ALIAS + name, b"old")
    return fake


def lists(fake):
    """The prefixes of the requested lists."""
    return [request.path.removeprefix(b"/v1/kv/") for request in fake.requests if "recurse" in request.params]


def waiting(fake):
    return [request for request in fake.requests if "index" in request.params]


def ranged_watch(fake, source, answer=b"old"):
    """Wait until ranges are watched and every query waits."""
    for _ in eventually("ranges are watched", 10):
        asked = {request.path for request in waiting(fake)}
        if {b"/v1/kv/" + ALIAS + bytes([letter]) for letter in b"abcdefr"} | {b"/v1/kv/" + DOMAIN} <= asked:
            break
    assert ask(source, b"a1") == answer
    return source


@pytest.fixture
def source(fake, mirrored):
    return ranged_watch(fake, mirrored(fake.address))


def reads_whole(fake, before):
    for _ in eventually("the whole table is read", 10):
        if PREFIX in lists(fake)[before:]:
            return


def stays_ranged(fake, before):
    assert PREFIX not in lists(fake)[before:]


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
    monkeypatch.setattr(ranged.Queries, "most_wait", 300.0)
    ranged_watch(fake, mirrored(fake.address))
    waits = [request.params["wait"] for request in waiting(fake) if request.path.startswith(b"/v1/kv/" + ALIAS)]
    assert waits
    assert {*waits} == {"10000ms"}


@pytest.mark.usefixtures("no_late_query")
def test_edit_in_the_rest_is_found(fake, mirrored, monkeypatch):
    monkeypatch.setattr(watch, "MOST_RANGES", 5)
    monkeypatch.setattr(ranges, "ASK_KEYS", 0)
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


def test_edit_in_a_range_with_a_hanging_query_is_found(fake, source):
    over = threading.Event()

    def handle(request):
        answer = fake.consul(request)
        if request.path == b"/v1/kv/" + ALIAS + b"c" and "index" in request.params:
            over.wait(20)
        return answer

    def waits_for_more():
        """Whether the completeness query waits on the newest index."""
        return any("keys" in each.params and each.params.get("index") == str(fake.index) for each in fake.requests)

    fake.handle = handle
    try:
        for name, value in ((b"c1", b"seen"), (b"c1", b"new"), *((b"a1", b"%d" % number) for number in range(200))):
            fake.put(ALIAS + name, value)
            for _ in eventually("the completeness query has returned", 5):
                if waits_for_more():
                    break
            if ask(source, b"c1") == b"new":
                break
        else:
            pytest.fail("the edit is not seen")
    finally:
        over.set()


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
    monkeypatch.setattr(ranged, "LEAST_LOSS", 4)
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


def test_index_that_goes_backwards_reads_the_whole_table(fake, source):
    before = len(lists(fake))
    fake.reset_index(20)
    reads_whole(fake, before)
    fake.put(ALIAS + b"a1", b"new")
    becomes(source, b"new", b"a1")


def test_emptied_range_is_empty(fake, source):
    for number in range(6):
        fake.delete(ALIAS + b"d%d" % number)
    for number in range(6):
        becomes(source, None, b"d%d" % number)
    fake.put(ALIAS + b"d1", b"new")
    becomes(source, b"new", b"d1")


def test_range_that_grows_too_large_is_cut_again(fake, source):
    for number in range(10, 40):
        fake.put(ALIAS + b"e%d" % number, b"old")
    for _ in eventually("the range is cut", 10):
        if any(request.path == b"/v1/kv/" + ALIAS + b"e1" for request in waiting(fake)):
            break
    becomes(source, b"old", b"e39")


@pytest.mark.parametrize(
    "refusal",
    [
        Answer(429, {}, b"Your IP is issuing too many concurrent connections, please rate limit your calls\n"),
        Answer(500, {}, b"rpc error making call: EOF"),
        Answer(403, {}, b"Permission denied"),
        Answer(400, {}, b"Invalid key name. Keys should respect the following regex"),
    ],
    ids=["429", "500", "403", "400"],
)
def test_server_that_refuses_a_range_causes_no_outage(fake, mirrored, caplog, refusal):
    def handle(request):
        if "recurse" in request.params and request.path.startswith(b"/v1/kv/" + ALIAS + b"c"):
            return refusal
        return fake.consul(request)

    fake.handle = handle
    caplog.set_level(logging.INFO)
    source = mirrored(fake.address)
    for _ in eventually("the table is watched as a whole", 10):
        if any("reading the whole table" in line for line in lines(caplog, logging.INFO)):
            break
    for number, name in enumerate((b"a1", b"c1", b"f1")):
        fake.put(ALIAS + name, b"%d" % number)
        becomes(source, b"%d" % number, name)
    assert lines(caplog) == []


def test_hidden_key_in_a_range_is_read_by_name(fake, source):
    fake.denied = (ALIAS + b"b3",)
    fake.put(ALIAS + b"b4", b"new")
    becomes(source, b"new", b"b4")
    becomes(source, Forbidden, b"b3")


def test_update_reads_the_whole_table(fake, source):
    before = len(lists(fake))
    source.update()
    reads_whole(fake, before)
    ranged_watch(fake, source)
    fake.put(ALIAS + b"a1", b"new")
    becomes(source, b"new", b"a1")


def test_closing_a_watch_ends_its_queries(fake, mirrored):
    before = watching_threads()
    ranged_watch(fake, mirrored(fake.address)).close()
    ended(before)


def test_outage_ends_ranges_and_recovery_reads_the_changes(fake, source, caplog):
    fake.stop()
    for _ in eventually("the outage is noticed", 10):
        if source.watches[0].backoff.since is not None:
            break
    assert ask(source, b"a1") == b"old"
    fake.put(ALIAS + b"a1", b"new")
    fake.start()
    becomes(source, b"new", b"a1")
    logged(caplog, "recovered")
    assert len(lines(caplog)) == 2


def test_case_variants_in_kept_ranges_are_resolved(fake, mirrored):
    for name in (b"A1", b"A2", b"A3"):
        fake.put(ALIAS + name, b"capital")
    source = ranged_watch(fake, mirrored(fake.address))
    fake.delete(ALIAS + b"a1")
    becomes(source, b"capital", b"a1")
    ranged_watch(fake, source, b"capital")
    fake.put(ALIAS + b"a1", b"new")
    becomes(source, b"new", b"a1")
    ranged_watch(fake, source, b"new")
    fake.put(ALIAS + b"A1", b"other")
    fake.put(ALIAS + b"A2", b"other")
    fake.put(ALIAS + b"b1", b"new")
    becomes(source, b"new", b"b1")
    assert ask(source, b"a1") == b"new"


def test_case_variants_in_different_ranges_are_resolved(fake, source):
    fake.put(ALIAS + b"A1", b"capital")
    fake.delete(ALIAS + b"a1")
    becomes(source, b"capital", b"a1")
    fake.put(ALIAS + b"a1", b"new")
    becomes(source, b"new", b"a1")
    fake.delete(ALIAS + b"A1")
    becomes(source, b"new", b"a1")


def test_file_is_written_after_an_edit_in_a_range(fake, mirrored, copied, monkeypatch):
    monkeypatch.setattr(watch, "RANGED_WRITE_SECONDS", 0.2)
    source = ranged_watch(fake, mirrored(fake.address, copied))
    fake.put(ALIAS + b"b3", b"new")
    becomes(source, b"new", b"b3")
    path = copied.snapshot
    for _ in eventually("the file is written", 10):
        if snapshot_entries(Path(path)).get((ALIAS + b"b3").decode()) == b"new":
            return


@pytest.mark.usefixtures("no_late_query")
def test_cut_wait_is_repeated(fake, mirrored, monkeypatch):
    monkeypatch.setattr("table_consul.transport.LEAST_CUT_SECONDS", 0.1)
    fake.write_timeout = 0.4
    source = ranged_watch(fake, mirrored(fake.address))
    before = len(lists(fake))
    for _ in eventually("each wait was cut", 10):
        if len(waiting(fake)) > 30:
            break
    fake.put(ALIAS + b"b3", b"new")
    becomes(source, b"new", b"b3")
    stays_ranged(fake, before)


@pytest.mark.usefixtures("no_late_query")
@pytest.mark.parametrize("prefix", [ALIAS + b"c", PREFIX], ids=["range", "completeness"])
def test_query_with_an_error_is_sent_again(fake, source, prefix):
    refused = []

    def handle(request):
        if request.path == b"/v1/kv/" + prefix and "index" in request.params and not refused:
            refused.append(len(fake.requests))
            return Answer(500, {}, b"rpc error making call: EOF")
        return fake.consul(request)

    fake.handle = handle
    fake.put(ALIAS + b"c1", b"new")
    for _ in eventually("the query is sent again", 10):
        later = fake.requests[refused[0] :] if refused else ()
        if any(each.path == b"/v1/kv/" + prefix and "index" in each.params for each in later):
            return


@pytest.mark.usefixtures("no_late_query")
def test_snapshot_restored_while_queries_are_outdated_is_read(fake, source):
    before = len(lists(fake))
    source.update()
    reads_whole(fake, before)
    time.sleep(0.1)
    with fake.store.changed:
        fake.store.entries[ALIAS + b"a1"] = Entry(b"restored", 0, 1, 1)
        fake.reset_index(8)
    becomes(source, b"restored", b"a1")


@pytest.mark.usefixtures("no_late_query")
def test_key_that_appears_during_a_list_of_names_is_found(fake, source):
    done = []

    def handle(request):
        answer = fake.consul(request)
        names = "keys" in request.params and not {"index", "separator"} & request.params.keys()
        if names and request.path == b"/v1/kv/" + PREFIX and not done:
            done.append(request)
            with fake.store.changed:
                fake.put(ALIAS + b"yves", b"new")
                fake.put(ALIAS + b"zed", b"new")
        return answer

    fake.handle = handle
    with fake.store.changed:
        fake.put(ALIAS + b"zoe", b"new")
        fake.put(ALIAS + b"a1", b"new")
    for name in (b"zoe", b"zed", b"yves"):
        becomes(source, b"new", name)


def test_key_renamed_to_lower_case_is_always_found(fake, mirrored):
    for number in range(6):
        fake.put(ALIAS + b"Z%d" % number, b"old")
    source = ranged_watch(fake, mirrored(fake.address))
    with fake.store.changed:
        fake.delete(ALIAS + b"Z1")
        fake.put(ALIAS + b"z1", b"new")
    answers = set()
    for _ in eventually("the new key is found", 10):
        answers.add(ask(source, b"z1"))
        if b"new" in answers:
            break
    assert answers <= {b"old", b"new"}


def test_key_that_is_not_utf8_is_an_error(fake, source):
    with fake.store.changed:
        fake.put(ALIAS + b"\x80", b"new")
        fake.put(ALIAS + b"a1", b"new")
    for _ in eventually("the key is an error", 10):
        try:
            ask(source, b"\x80")
        except EntryError:
            return
