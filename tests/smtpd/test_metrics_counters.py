"""Counters of replies and failures, and the metrics collected from them."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from table_consul.backoff import Backoff
from table_consul.child import ChildError
from table_consul.errors import BadName, Forbidden, SourceError, TooLarge, Unreachable
from table_consul.metrics import Exporter
from table_consul.protocol import Failed, Found, NotFound, Request, Updated
from table_consul.responder import SUMS_MAX, Counters
from table_consul.sources.hold import ACCEPTED, Held
from table_consul.sources.mirror import Mirror, Snapshot
from tests.smtpd.metrics import fake_tables, parse_samples, table_layout


def request(service="alias", op="lookup", table="aliases"):
    return Request(op, b"1", table, service, b"root")


def count_replies(counters, seconds, *replies):
    for asked, reply in replies:
        counters.add(asked, reply, seconds)


def counts(counters):
    return {labels: sum(sums[2:]) for labels, sums in counters.sums().items()}


# ---- counters ----


def test_requests_are_counted_by_table_service_operation_and_reply():
    counters = Counters(table_layout)
    count_replies(counters, 0.0, (request(), Found), (request(), Found), (request("domain", "check"), NotFound))
    count_replies(counters, 0.0, (request("", "update"), Updated), (request(), Failed))
    assert counts(counters) == {
        ("aliases", "alias", "lookup", Found): 2,
        ("aliases", "domain", "check", NotFound): 1,
        ("aliases", "", "update", Updated): 1,
        ("aliases", "alias", "lookup", Failed): 1,
    }


@pytest.mark.parametrize(
    ("seconds", "interval"), [(0.0, 0), (0.00001, 0), (0.00002, 1), (0.05, 7), (1.5, 10), (99.0, 11)]
)
def test_histogram_bucket_includes_its_upper_bound(seconds, interval):
    counters = Counters(table_layout)
    count_replies(counters, seconds, (request(), Found), (request(), Found))
    ((total, _, *intervals),) = counters.sums().values()
    assert intervals == [2 if number == interval else 0 for number in range(12)]
    assert total == pytest.approx(2 * seconds)


def test_unknown_services_and_operations_share_one_series():
    counters = Counters(table_layout)
    for number in range(10):
        count_replies(counters, 0.0, (request(f"service{number}", f"op{number}"), Failed))
    assert counts(counters) == {("aliases", "(other)", "(other)", Failed): 10}


def test_tables_beyond_the_limit_share_one_series():
    counters = Counters(table_layout)
    for number in range(SUMS_MAX + 10):
        count_replies(counters, 3.0, (request(table=f"table{number}"), Found))
        counters.failed(f"table{number}", Unreachable("away"), 0.0)
    assert len(counters.sums()) == SUMS_MAX + 1
    assert counts(counters)["(other)", "alias", "lookup", Found] == 10
    assert len(counters.failures) == SUMS_MAX


def test_counters_can_be_read_while_requests_are_counted():
    counters, stop = Counters(table_layout), threading.Event()

    def count():
        while not stop.is_set() and len(counters.sums()) < SUMS_MAX:
            count_replies(counters, 0.0, (request(table=f"table{len(counters.sums())}"), Found))

    thread = threading.Thread(target=count)
    thread.start()
    try:
        sizes = [len(counts(counters))]
        while thread.is_alive():
            sizes.append(len(counts(counters)))
    finally:
        stop.set()
        thread.join()
    assert sizes == sorted(sizes)


# ---- collector ----


def collect(tables):
    return parse_samples(Exporter("aliases", tables).text().decode())


def watch(**more):
    return SimpleNamespace(
        **{
            "prefix": b"aliases/",
            "too_large": False,
            "backoff": Backoff("aliases/", "error"),
            "index": 7,
            "reloads": 3,
            "load_seconds": 0.5,
            "mirror": SimpleNamespace(state=None, max_age=86400.0),
            **more,
        }
    )


def test_failures_of_several_outages_add_up():
    outage = Backoff("aliases/", "error")
    tables = fake_tables(watch(backoff=outage))
    seen = []
    for failures in (0, 2, 1, 0, 3):
        for number in range(failures):
            outage.failure(Unreachable("away"), 100.0 + number, 0.0)
        samples = collect(tables)
        seen.append(
            (
                samples["table_consul_failures_total"]["aliases/", "aliases"],
                samples["table_consul_up"]["aliases/", "aliases"],
            )
        )
        if failures == 1:
            outage.success(200.0)
    assert seen == [(0, 1), (2, 0), (3, 0), (3, 1), (6, 0)]


def test_long_prefixes_have_series_of_their_own():
    prefixes = [b"/".join((b"mail" * 40, last)) for last in (b"a/", b"b/")]
    samples = collect(fake_tables(*(watch(prefix=prefix) for prefix in prefixes)))
    assert samples["table_consul_up"] == {(prefix.decode(), "aliases"): 1 for prefix in prefixes}


def test_table_too_large_to_mirror_is_published_as_direct():
    tables = fake_tables(watch(too_large=True, index=0))
    count_replies(tables.counters, 0.0, (request(), Found))
    samples = collect(tables)
    assert samples["table_consul_up"] == {("aliases/", "aliases"): 1}
    assert "table_consul_reloads_total" not in samples
    assert samples["table_consul_too_large"] == {("aliases/", "aliases"): 1}


def test_direct_table_is_down_from_a_failure_to_the_next_answer():
    tables, seen = fake_tables(), []
    count_replies(tables.counters, 0.0, (request(), Found))
    for reply in (Found, Failed, Failed, NotFound):
        count_replies(tables.counters, 0.0, (request(), reply))
        if reply is Failed:
            tables.counters.failed("aliases", Unreachable("away"), 0.0)
        samples = collect(tables)
        seen.append((samples["table_consul_up"], samples["table_consul_failures_total"]))
    labels = ("aliases/", "aliases")
    assert seen == [({labels: up}, {labels: failures}) for up, failures in ((1, 0), (0, 1), (0, 2), (1, 2))]


def test_errors_are_counted_by_table_and_begin_at_zero():
    tables, seen = fake_tables(), []
    for replies in ([], [(request(), Found), (request(), Failed)], [(request("domain", "check"), Failed)]):
        count_replies(tables.counters, 0.0, *replies)
        seen.append(collect(tables)["table_consul_errors_total"])
    assert seen == [{("aliases",): 0}, {("aliases",): 1}, {("aliases",): 2}]


def test_replies_that_missed_the_deadline_are_counted_by_table():
    tables = fake_tables()
    for seconds in (1.99, 2.0, 3.0):
        count_replies(tables.counters, seconds, (request(), Failed))
    count_replies(tables.counters, 3.0, (request(table=".."), Failed))
    assert collect(tables)["table_consul_deadline_hits_total"] == {("aliases",): 2, ("..",): 0}


def test_requests_without_a_table_name_count_for_the_table_of_the_process():
    tables = fake_tables()
    count_replies(tables.counters, 3.0, (request(table=""), Found), (request(table="aliases"), Found))
    samples = collect(tables)
    assert samples["table_consul_requests_total"] == {("lookup", "found", "alias", "aliases"): 2}
    assert samples["table_consul_deadline_hits_total"] == {("aliases",): 2}
    assert samples["table_consul_up"] == {("aliases/", "aliases"): 1}


def test_histogram_adds_up_all_operations_of_a_service():
    tables = fake_tables()
    count_replies(tables.counters, 0.00002, (request(), Found), (request(op="check"), NotFound))
    count_replies(tables.counters, 99.0, (request(), Failed))
    samples = collect(tables)
    buckets = {le: count for (le, _, _), count in samples["table_consul_request_seconds_bucket"].items()}
    assert [buckets[le] for le in ("1e-05", "2.5e-05", "2.5", "+Inf")] == [0, 2, 2, 3]
    assert samples["table_consul_request_seconds_sum"] == {("alias", "aliases"): pytest.approx(99.00004)}


def test_last_error_of_a_mirror_has_its_time_and_stays_after_recovery():
    outage = Backoff("aliases/", "error")
    tables = fake_tables(watch(backoff=outage))
    assert "table_consul_last_error_timestamp_seconds" not in collect(tables)
    outage.failure(Unreachable("no leader"), time.monotonic() - 200, 0.0)
    outage.failure(Unreachable("connection refused"), time.monotonic() - 100, 0.0)
    outage.success(time.monotonic())
    assert collect(tables)["table_consul_last_error_timestamp_seconds"] == {
        ("unreachable", "aliases/", "aliases"): pytest.approx(time.time() - 100, abs=5)
    }


@pytest.mark.parametrize("address", ["http://127.0.0.1:8500", "file:///export.json"])
def test_last_error_of_a_direct_or_file_table_is_published(address):
    tables = fake_tables(address=address)
    count_replies(tables.counters, 0.0, (request(), Failed))
    tables.counters.failed("aliases", Unreachable("no answer in time"), time.monotonic() - 50)
    tables.counters.failed("..", Unreachable("not a table"), 0.0)
    assert collect(tables)["table_consul_last_error_timestamp_seconds"] == {
        ("unreachable", "aliases/", "aliases"): pytest.approx(time.time() - 50, abs=5)
    }


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Unreachable("no leader"), "unreachable"),
        (Forbidden("403 for aliases/alias/stranger@example.org"), "forbidden"),
        (BadName("name of stranger@example.org refused"), "bad-response"),
        (TooLarge("more than 128 MiB of data"), "too-large"),
        (SourceError("token file: gone"), "other"),
        (ChildError("exited with status 1"), "other"),
        (ZeroDivisionError("a bug"), "other"),
    ],
)
def test_label_of_an_error_is_its_kind_and_no_part_of_its_text(error, kind):
    outage = Backoff("aliases/", "error")
    outage.failure(error, 100.0, 0.0)
    tables = fake_tables(watch(backoff=outage))
    assert list(collect(tables)["table_consul_last_error_timestamp_seconds"]) == [(kind, "aliases/", "aliases")]


def test_errors_with_text_from_requests_add_no_series():
    tables = fake_tables()
    count_replies(tables.counters, 0.0, (request(), Failed))
    for number in range(50):
        tables.counters.failed("aliases", Forbidden(f"403 for aliases/alias/stranger{number}"), 100.0)
    samples = collect(tables)
    assert list(samples["table_consul_last_error_timestamp_seconds"]) == [("forbidden", "aliases/", "aliases")]
    assert "stranger" not in str(samples)


def test_text_of_the_last_error_is_a_comment_without_a_token():
    outage = Backoff("aliases/", "error")
    outage.failure(Unreachable('500 "of"\n0123456f-89ab-cdef-0123-456789abcdef ' + "a1" * 20), 100.0, 0.0)
    comments = Exporter("aliases", fake_tables(watch(backoff=outage))).comments()
    text = r"500 \"of\"\\n... ..."
    assert comments.decode() == f'# table_consul_last_error ["aliases","aliases/","{text}"]\n'
    assert Exporter("aliases", fake_tables(watch())).comments() == b""


def test_forbidden_services_are_published_by_name():
    snapshot = SimpleNamespace(
        entries={"alias": SimpleNamespace(refused=0), "domain": SimpleNamespace(refused=0)},
        hidden={"domain": 1},
        size=1,
        held={},
    )
    mirror = SimpleNamespace(state=(snapshot, time.monotonic() - 30), max_age=600.0)
    samples = collect(fake_tables(watch(mirror=mirror)))
    assert samples["table_consul_service_hidden"] == {
        ("aliases/", "alias", "aliases"): 0,
        ("aliases/", "domain", "aliases"): 1,
    }
    assert samples["table_consul_snapshot_max_age_seconds"] == {("aliases/", "aliases"): 600}
    assert samples["table_consul_snapshot_age_seconds"]["aliases/", "aliases"] == pytest.approx(30, abs=5)


def test_held_deletions_are_published_with_the_time_left():
    def published(until):
        held = {"alias": Held(dict.fromkeys([b"a", b"b"], b""), until), "domain": Held({b"c": b"c"}, until + 100)}
        mirror = Mirror(600.0)
        mirror.state = (Snapshot({}, {}, held=held), time.monotonic())
        samples = collect(fake_tables(watch(mirror=mirror)))
        names = ("deletions_held", "deletions_held_seconds")
        return tuple(samples[f"table_consul_{name}"]["aliases/", "aliases"] for name in names)

    assert published(time.monotonic() + 50) == (3, pytest.approx(50, abs=5))
    assert published(ACCEPTED) == (3, 0.0)


def test_time_left_of_a_hold_is_0_without_held_deletions():
    mirror = Mirror(600.0)
    mirror.state = (Snapshot({}, {}), time.monotonic())
    samples = collect(fake_tables(watch(mirror=mirror)))
    assert samples["table_consul_deletions_held"] == {("aliases/", "aliases"): 0}
    assert samples["table_consul_deletions_held_seconds"] == {("aliases/", "aliases"): 0}
