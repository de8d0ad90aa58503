"""How long a watch waits, and what it makes of a wait that something cuts."""

from __future__ import annotations

import re
import time

import pytest
from msgspec.structs import replace

from tests.consul.watch.watching import ALIAS, PREFIX, ROOT, TABLE, ask, becomes, lines, logged, settled
from tests.dialogue import eventually
from tests.fake_consul import VERSIONS, Answer, stall


@pytest.fixture(params=VERSIONS)
def version(request):
    return request.param


def waits(fake):
    """The seconds of each wait that was asked for."""
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
    """The wait that follows an answer, and those while keys are hidden."""
    monkeypatch.setattr("table_consul.sources.mirror.SHORT_WAIT_SECONDS", 0.125)
    return 0.125


@pytest.fixture
def quick_cuts(monkeypatch):
    monkeypatch.setattr("table_consul.transport.LEAST_CUT_SECONDS", 0.05)


def test_wait_is_as_long_as_consuls_own_once_one_has_brought_nothing(fake, mirrored, short):
    settled(mirrored(fake.address))
    enough(fake, 2)
    assert waits(fake) == [short, 300.0]


def test_wait_is_a_third_of_max_age_where_that_is_short(fake, mirrored, short):
    settled(mirrored(fake.address, replace(TABLE, max_age=60.0)))
    enough(fake, 2)
    assert waits(fake) == [short, 20.0]


def test_index_that_went_back_while_nothing_waited_is_seen_after_a_short_wait(fake, mirrored, short):
    def restored(request):
        if "wait" in request.params:
            fake.handle = fake.consul
            fake.reset_index(3)
            fake.put(ROOT, b"restored")
        return fake.consul(request)

    fake.handle = restored
    becomes(mirrored(fake.address), b"restored")


@pytest.mark.parametrize("version", [each for each in VERSIONS if each != "1.8.7"])  # which reports no hidden keys
def test_wait_is_short_while_keys_are_hidden(fake, mirrored, short):
    fake.denied = (ALIAS + b"vip",)
    fake.put(ALIAS + b"vip", b"x")
    settled(mirrored(fake.address))
    enough(fake, 3)
    assert set(waits(fake)) == {short}


@pytest.mark.parametrize("version", ["1.22.4"])
@pytest.mark.parametrize("closes_late", [False, True])
@pytest.mark.usefixtures("quick_cuts")
def test_cut_wait_is_no_news_and_the_next_is_shorter(fake, mirrored, waits_of, caplog, closes_late):
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


@pytest.mark.parametrize("version", ["1.22"])
@pytest.mark.parametrize("status", [502, 504])
@pytest.mark.usefixtures("quick_cuts")
def test_wait_that_a_proxy_ends_with_a_page_of_its_own_is_no_news(fake, mirrored, waits_of, caplog, status):
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
@pytest.mark.parametrize("status", [502, 504])
def test_page_of_a_proxy_that_comes_soon_is_an_outage(fake, mirrored, status):
    source = mirrored(fake.address)
    settled(source)
    fake.handle = lambda request: Answer(status, body=b"<html>Gateway Time-out</html>")
    fake.close_connections()
    for _ in eventually("the outage is noticed", 10):
        if source.watches[0].backoff.since is not None:
            break


@pytest.mark.usefixtures("quick_cuts")
def test_cut_wait_does_not_make_the_data_younger(fake, mirrored):
    source = mirrored(fake.address)
    settled(source)
    enough(fake, 1)
    confirmed = source.watches[0].mirror.state[1]
    time.sleep(0.1)
    fake.close_connections()
    enough(fake, 2)
    assert source.watches[0].mirror.state[1] == confirmed


def test_connection_that_ends_soon_after_a_query_began_is_opened_again_without_a_line(fake, mirrored, caplog):
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
def test_server_that_goes_away_during_a_wait_is_reported_with_the_true_reason(fake, mirrored, caplog):
    source = mirrored(fake.address, replace(TABLE, deadline=0.5))
    settled(source)
    enough(fake, 1)
    time.sleep(0.6)
    fake.stop()
    logged(caplog, "; serving the last good copy")
    # Reset, where the port still took the new connection.
    assert re.search(r": connection (refused|reset by peer|closed without a response);", lines(caplog)[0])
    fake.start()
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")


@pytest.mark.parametrize("version", ["1.22"])
def test_connection_that_ends_later_than_the_deadline_is_opened_again_within_the_next(fake, mirrored, caplog):
    source = mirrored(fake.address, replace(TABLE, deadline=0.5))
    settled(source)
    enough(fake, 1)
    time.sleep(0.6)
    fake.close_connections()
    enough(fake, 2)
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    assert lines(caplog) == []


def test_table_that_nobody_edits_is_not_read_again(fake, mirrored, waits_of):
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


def test_first_key_of_an_empty_table_is_seen_and_others_edits_are_no_busy_loop(fake, mirrored):
    source = mirrored(fake.address, replace(TABLE, name="new"))
    settled(source)
    asked = len(fake.requests)
    for number in range(200):
        fake.put(b"other/%d" % number, b"x")
        time.sleep(0.001)
    assert len(fake.requests) - asked < 30
    fake.put(PREFIX.replace(b"aliases", b"new") + b"alias/root", b"eric")
    becomes(source, b"eric", table=replace(TABLE, name="new"))


def test_last_key_of_a_folder_that_is_deleted_and_comes_back_is_seen(fake, mirrored):
    source = mirrored(fake.address)
    settled(source)
    fake.delete(ROOT)
    becomes(source, None)
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")


@pytest.mark.parametrize("version", ["1.22"])
def test_body_that_does_not_arrive_after_an_early_answer_without_news_delays_no_edit(fake, mirrored):
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


def test_update_ends_a_wait_and_reads_the_token_anew(fake, mirrored, caplog):
    source = mirrored(fake.address)
    settled(source)
    enough(fake, 1)
    source.update()
    enough(fake, 2)
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    assert (waits(fake)[1], lines(caplog)) == (10.0, [])


def test_watch_that_is_stopped_during_a_wait_ends(fake, mirrored, caplog):
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
