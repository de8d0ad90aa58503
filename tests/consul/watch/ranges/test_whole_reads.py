"""Something unusual ends the ranges, and the whole table is read; with every version of the fake."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
from msgspec.structs import replace

from table_consul.errors import EntryError, Forbidden
from table_consul.sources import queries, ranges, watch
from tests.consul.watch.ranges.ranged_tables import (
    NAMES,
    ended,
    lists,
    ranged_watch,
    reads_whole,
    stays_ranged,
    waiting,
    watching_threads,
)
from tests.consul.watch.watching import (
    ALIAS,
    PREFIX,
    TABLE,
    ask,
    becomes,
    lines,
    logged,
    snapshot_entries,
    written,
)
from tests.dialogue import eventually
from tests.fake_consul.messages import Answer
from tests.fake_consul.store import Entry


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


def test_table_is_watched_as_a_whole_if_threads_cannot_start(fake, mirrored, caplog, monkeypatch):
    start, starts = queries.Query.start, []

    def start_two(query):
        starts.append(query)
        if len(starts) > 2:
            raise RuntimeError("can't start new thread")
        start(query)

    monkeypatch.setattr(queries.Query, "start", start_two)
    monkeypatch.setattr(watch, "RANGED_SECONDS", 60.0)
    caplog.set_level(logging.INFO)
    source = mirrored(fake.address)
    for _ in eventually("the table is watched as a whole", 10):
        if any("reading the whole table: cannot start another thread" in line for line in lines(caplog, logging.INFO)):
            break
    for number, name in enumerate((b"a1", b"c1", b"f1")):
        fake.put(ALIAS + name, b"%d" % number)
        becomes(source, b"%d" % number, name)
    assert len(lists(fake)) < 10
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


def test_queries_end_when_the_table_is_small_again(fake, mirrored, waits_of):
    waits_of(0.3)
    before = watching_threads()
    source = ranged_watch(fake, mirrored(fake.address, replace(TABLE, hold_deletions=0.0)))
    for name in NAMES[:20]:
        fake.delete(ALIAS + name)
    becomes(source, None, NAMES[19])
    ended({*before, *source.watches})


def test_queries_end_when_the_table_is_too_large(fake, mirrored):
    before = watching_threads()
    source = ranged_watch(fake, mirrored(fake.address, replace(TABLE, max_keys=len(NAMES) + 3)))
    for number in range(3):
        fake.put(ALIAS + b"a2%d" % number, b"new")
    for _ in eventually("the table is too large", 10):
        if source.watches[0].too_large:
            break
    ended({*before, *source.watches})


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


def test_removed_file_is_written_again_without_an_edit(fake, mirrored, copied, monkeypatch, waits_of):
    waits_of(0.3)
    monkeypatch.setattr(watch, "RANGED_WRITE_SECONDS", 0.2)
    ranged_watch(fake, mirrored(fake.address, copied))
    path = Path(copied.snapshot)
    written(path, {(ALIAS + b"a1").decode(): b"old"})
    path.unlink()
    written(path, {(ALIAS + b"a1").decode(): b"old"})


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


def test_restored_snapshot_with_the_same_index_returns_a_deleted_key(fake, mirrored, monkeypatch):
    monkeypatch.setattr("table_consul.sources.mirror.MOST_WAIT_SECONDS", 0.3)
    fake.put(ALIAS + b"f5", b"newest")
    source = ranged_watch(fake, mirrored(fake.address))
    index, saved = source.watches[0].index, dict(fake.store.entries)
    fake.delete(ALIAS + b"b3")
    becomes(source, None, b"b3")
    fake.store.reap()
    for _ in eventually("the index is that of the snapshot", 10):
        if source.watches[0].index == index:
            break
    for _ in eventually("the key is back", 10):
        fake.store.restore_entries(saved)  # repeated, because one between two waits ends neither
        if ask(source, b"b3") == b"old":
            break


def test_early_end_of_a_wait_is_logged_with_both_possible_causes(fake, mirrored, caplog):
    caplog.set_level(logging.INFO)
    ranged_watch(fake, mirrored(fake.address))
    for _ in eventually("a wait ends early", 10):
        fake.store.restore_entries(dict(fake.store.entries))  # a server that stops ends its waits in the same way
        if any("the whole table: Consul stopped, or a snapshot was restored" in each for each in caplog.messages):
            break


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


def test_keys_that_differ_only_in_case_are_in_ranges(fake, mirrored, monkeypatch):
    monkeypatch.setattr(ranges, "MOST_REST", 4)
    for name in NAMES:
        fake.put(ALIAS + name.upper(), b"capital")
    source = ranged_watch(fake, mirrored(fake.address))
    before = len(lists(fake))
    with fake.store.changed:  # names are listed soon after several changes
        fake.put(ALIAS + b"a1", b"new")
        fake.put(ALIAS + b"a2", b"new")
    becomes(source, b"new", b"a2")
    for _ in eventually("all names are listed", 10):
        late = [
            each for each in fake.requests if "keys" in each.params and not {"index", "separator"} & each.params.keys()
        ]
        if any(each.path == b"/v1/kv/" + PREFIX for each in late):
            break
    fake.put(ALIAS + b"f1", b"new")
    becomes(source, b"new", b"f1")
    stays_ranged(fake, before)
