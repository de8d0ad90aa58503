"""How long a watch waits, and how it handles waits that are cut."""

from __future__ import annotations

import re
import time

import pytest
from msgspec.structs import replace

from tests.consul.watch.watching import (
    ALIAS,
    PREFIX,
    ROOT,
    TABLE,
    ask,
    becomes,
    lines,
    logged,
    reports_hidden_keys,
    settled,
)
from tests.dialogue import eventually
from tests.fake_consul import Answer, stall


def waits(fake):
    """The seconds of each requested wait."""
    asked = [request.params["wait"] for request in fake.requests if "wait" in request.params]
    return [float(each.removesuffix("ms")) / 1000 for each in asked]


def consistent_reads(fake):
    return sum("consistent" in request.params for request in fake.requests)


def enough(fake, number):
    for _ in eventually(f"{number} waits", 10):
        if len(waits(fake)) >= number:
            return


@pytest.fixture
def short(monkeypatch):
    """Shorten the wait that follows an answer and the waits while keys are hidden."""
    monkeypatch.setattr("table_consul.sources.mirror.SHORT_WAIT_SECONDS", 0.125)
    return 0.125


@pytest.fixture
def quick_cuts(monkeypatch):
    monkeypatch.setattr("table_consul.transport.LEAST_CUT_SECONDS", 0.05)


def test_wait_after_one_without_news_is_the_default_of_consul(fake, mirrored, short):
    settled(mirrored(fake.address))
    enough(fake, 2)
    assert waits(fake) == [short, 300.0]


def test_wait_is_a_third_of_a_short_max_age(fake, mirrored, short):
    settled(mirrored(fake.address, replace(TABLE, max_age=60.0)))
    enough(fake, 2)
    assert waits(fake) == [short, 20.0]


def test_index_reset_between_queries_is_seen_after_a_short_wait(fake, mirrored, short):
    def restored(request):
        if "wait" in request.params:
            fake.handle = fake.consul
            fake.reset_index(3)
            fake.put(ROOT, b"restored")
        return fake.consul(request)

    fake.handle = restored
    becomes(mirrored(fake.address), b"restored")


def test_agent_with_a_short_max_query_time_causes_few_reads(fake, mirrored, monkeypatch):
    monkeypatch.setattr("table_consul.sources.mirror.MOST_WAIT_SECONDS", 5.0)
    monkeypatch.setattr("table_consul.sources.mirror.SHORT_WAIT_SECONDS", 0.05)
    fake.max_query_time = 0.4
    settled(mirrored(fake.address))
    enough(fake, 7)
    assert [each for each in waits(fake) if each > 0.4] == [5.0]
    assert consistent_reads(fake) == 2


@reports_hidden_keys
def test_wait_is_short_while_keys_are_hidden(fake, mirrored, short):
    fake.denied = (ALIAS + b"vip",)
    fake.put(ALIAS + b"vip", b"x")
    settled(mirrored(fake.address))
    enough(fake, 3)
    assert set(waits(fake)) == {short}


@pytest.mark.parametrize("version", ["1.22.4"])
@pytest.mark.parametrize("closes_late", [False, True])
@pytest.mark.usefixtures("quick_cuts")
def test_cut_wait_is_not_an_outage_and_the_next_is_shorter(fake, mirrored, waits_of, caplog, closes_late):
    waits_of(0.5)
    fake.write_timeout, fake.closes_late = 0.2, closes_late
    source = mirrored(fake.address)
    settled(source)
    enough(fake, 8)
    asked = waits(fake)
    assert asked[0] == 0.5
    assert asked[1] < 0.3
    assert (lines(caplog), consistent_reads(fake), source.watches[0].reloads) == ([], 1, 1)
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    assert source.watches[0].backoff.total == 0


@pytest.mark.parametrize("version", ["1.22.4"])
@pytest.mark.usefixtures("quick_cuts")
def test_wait_after_a_cut_is_short(fake, mirrored, monkeypatch):
    monkeypatch.setattr("table_consul.sources.mirror.SHORT_WAIT_SECONDS", 0.2)
    monkeypatch.setattr("table_consul.sources.mirror.MOST_WAIT_SECONDS", 9.0)
    fake.write_timeout = 1.0
    settled(mirrored(fake.address))
    enough(fake, 4)
    first, cut, after, longer = waits(fake)[:4]
    assert (first, cut, after) == (0.2, 9.0, 0.2)
    assert 0.4 < longer < 0.7


@pytest.mark.parametrize("version", ["1.22"])
@pytest.mark.parametrize("status", [408, 502, 503, 504, 524])
@pytest.mark.usefixtures("quick_cuts")
def test_wait_ended_by_a_proxy_page_is_not_an_outage(fake, mirrored, waits_of, caplog, status):
    waits_of(0.5)

    def proxied(request):
        if request.params.get("wait") != "500ms":
            return fake.consul(request)
        request.stopping.wait(0.2)
        return Answer(status, body=b"<html>Gateway Time-out</html>")

    fake.handle = proxied
    source = mirrored(fake.address)
    settled(source)
    enough(fake, 4)
    assert waits(fake)[1] < 0.3
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    assert (lines(caplog), consistent_reads(fake), source.watches[0].backoff.total) == ([], 1, 0)


@pytest.mark.parametrize("version", ["1.22"])
@pytest.mark.parametrize("status", [408, 502, 503, 504, 524])
def test_immediate_proxy_page_is_an_outage(fake, mirrored, status):
    source = mirrored(fake.address)
    settled(source)
    fake.handle = lambda request: Answer(status, body=b"<html>Gateway Time-out</html>")
    fake.close_connections()
    for _ in eventually("the outage is noticed", 10):
        if source.watches[0].backoff.since is not None:
            break


@pytest.mark.usefixtures("quick_cuts")
def test_cut_wait_does_not_refresh_the_age_of_the_data(fake, mirrored):
    source = mirrored(fake.address)
    settled(source)
    enough(fake, 1)
    confirmed = source.watches[0].mirror.state[1]
    time.sleep(0.1)
    fake.close_connections()
    enough(fake, 2)
    assert source.watches[0].mirror.state[1] == confirmed


def test_connection_closed_early_in_a_wait_is_reopened_silently(fake, mirrored, caplog):
    source = mirrored(fake.address)
    settled(source)
    enough(fake, 1)
    fake.close_connections()
    enough(fake, 2)
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    assert (lines(caplog), consistent_reads(fake)) == ([], 1)


@pytest.mark.parametrize("version", ["1.22"])
@pytest.mark.usefixtures("quick_cuts")
def test_server_lost_during_a_wait_is_reported_with_its_reason(fake, mirrored, caplog):
    source = mirrored(fake.address, replace(TABLE, deadline=0.5))
    settled(source)
    enough(fake, 1)
    time.sleep(0.6)
    fake.stop()
    logged(caplog, "; serving the last good copy")
    # "reset" if the port still accepted the new connection.
    assert re.search(r": connection (refused|reset by peer|closed without a response);", lines(caplog)[0])
    fake.start()
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")


@pytest.mark.parametrize("version", ["1.22"])
def test_connection_closed_after_the_deadline_is_reopened_with_a_new_deadline(fake, mirrored, caplog):
    source = mirrored(fake.address, replace(TABLE, deadline=0.5))
    settled(source)
    enough(fake, 1)
    time.sleep(0.6)
    fake.close_connections()
    enough(fake, 2)
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    assert lines(caplog) == []


def test_unedited_table_is_not_read_again(fake, mirrored, waits_of):
    waits_of(0.1)
    for number in range(2000):
        fake.put(ALIAS + b"%04d" % number, b"x" * 50)
    source = mirrored(fake.address)
    settled(source)
    enough(fake, 5)
    assert source.watches[0].reloads == 1
    assert ask(source, b"0001") == b"x" * 50
    fake.put(ALIAS + b"0001", b"y")
    becomes(source, b"y", b"0001")


def test_edits_elsewhere_cause_no_busy_loop_for_an_empty_table(fake, mirrored):
    source = mirrored(fake.address, replace(TABLE, name="new"))
    settled(source)
    asked = len(fake.requests)
    for number in range(200):
        fake.put(b"other/%d" % number, b"x")
        time.sleep(0.001)
    assert len(fake.requests) - asked < 30
    fake.put(PREFIX.replace(b"aliases", b"new") + b"alias/root", b"eric")
    becomes(source, b"eric", table=replace(TABLE, name="new"))


def test_last_key_of_a_folder_is_seen_when_it_is_deleted_and_restored(fake, mirrored):
    source = mirrored(fake.address)
    settled(source)
    fake.delete(ROOT)
    becomes(source, None)
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")


@pytest.mark.parametrize("version", ["1.22"])
def test_stalled_body_after_an_early_answer_delays_no_edit(fake, mirrored):
    source = mirrored(fake.address)

    def stalling(request):
        if "wait" not in request.params:
            return fake.consul(request)
        fake.handle = fake.consul
        index, leader = f"X-Consul-Index: {fake.index}", "X-Consul-Knownleader: true"
        request.send(f"HTTP/1.1 200 OK\r\n{index}\r\n{leader}\r\nContent-Length: 500\r\n\r\n[".encode())
        return stall(request)

    settled(source)
    fake.handle = stalling
    fake.close_connections()
    enough(fake, 2)
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    assert source.watches[0].backoff.total == 0


def test_update_ends_a_wait_and_reads_the_token_again(fake, mirrored, caplog):
    source = mirrored(fake.address)
    settled(source)
    enough(fake, 1)
    source.update()
    enough(fake, 2)
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    assert (waits(fake)[1], lines(caplog)) == (10.0, [])


def test_closing_during_a_wait_ends_the_watch(fake, mirrored, caplog):
    source = mirrored(fake.address)
    settled(source)
    enough(fake, 1)
    source.close()
    source.watches[0].join(10)
    assert (source.watches[0].is_alive(), lines(caplog)) == (False, [])


def test_update_between_two_waits_is_not_lost(fake, mirrored, waits_of):
    waits_of(0.02)
    source = mirrored(fake.address)
    settled(source)
    for _ in range(50):
        source.update()
        time.sleep(0.005)
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    assert source.watches[0].backoff.total == 0
