from __future__ import annotations

import socket
import time

import pytest
from msgspec.structs import replace

from table_consul import kv
from table_consul.errors import SourceError, Unreachable
from tests.consul.clients import closed_port
from tests.consul.watch.watching import (
    ALIAS,
    ROOT,
    SLACK,
    TABLE,
    ask,
    becomes,
    lines,
    settled,
)
from tests.dialogue import eventually
from tests.fake_consul import Answer, FakeConsul, cut, html, stall


@pytest.mark.parametrize("version", ["1.22"])
def test_first_answer_waits_for_the_first_load(fake, mirrored):
    fake.handle = lambda request: time.sleep(0.1) or fake.consul(request)
    assert ask(mirrored(fake.address)) == b"gilles"


@pytest.mark.parametrize("version", ["1.22"])
def test_only_the_first_answer_waits_and_no_longer_than_the_deadline(fake, mirrored):
    fake.handle = stall
    source = mirrored(fake.address)
    for least, most in ((0.0, 0.5 + SLACK), (0.0, SLACK), (0.0, SLACK)):
        began = time.monotonic()
        with pytest.raises(Unreachable):
            ask(source)
        assert least <= time.monotonic() - began < most


def test_failed_first_load_returns_errors_immediately(mirrored):
    source = mirrored(closed_port())
    becomes(source, Unreachable)
    assert source.by_service["alias"].mirror.state is None
    began = time.monotonic()
    for _ in range(20):
        with pytest.raises(Unreachable, match="connection refused"):
            ask(source)
    assert time.monotonic() - began < SLACK


def test_no_key_is_absent_before_a_load(fake, mirrored):
    assert ask(mirrored(fake.address), b"nobody") is None


LIST = Answer(200, {"X-Consul-Index": "5", "X-Consul-Knownleader": "true"}, b'[{"Key":"mail/aliases/alias/eric"')


@pytest.mark.parametrize(
    "invalid",
    [
        html,
        cut(LIST, 130),
        lambda request: Answer(404, {}, b"not found"),
        lambda request: Answer(500, {}, b"No cluster leader"),
        lambda request: Answer(200, {"X-Consul-Index": "0"}, b"[]"),
        lambda request: Answer(403, {}, b"ACL not found"),
    ],
)
def test_invalid_response_is_never_absence(fake, mirrored, invalid):
    fake.handle = invalid
    source = mirrored(fake.address)
    with pytest.raises(SourceError):
        ask(source, b"nobody")
    fake.handle = fake.consul
    becomes(source, None, b"nobody")


def test_edits_additions_and_deletions_are_seen(fake, mirrored):
    source = mirrored(fake.address)
    assert ask(source) == b"gilles"
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    fake.put(ALIAS + b"new", b"x")
    becomes(source, b"x", b"new")
    fake.delete(ROOT)
    becomes(source, None)


def test_index_that_goes_backwards_is_seen(fake, mirrored):
    # A change between two queries is seen when the next wait ends.
    source = mirrored(fake.address, replace(TABLE, max_age=1.0))
    settled(source)
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    with fake.store.changed:
        fake.put(ROOT, b"from the snapshot")
        fake.reset_index(3)
    becomes(source, b"from the snapshot")
    fake.put(ROOT, b"after it")
    becomes(source, b"after it")


def test_unchanged_index_is_not_read_again(fake, mirrored):
    source = mirrored(fake.address, replace(TABLE, max_age=0.3))
    (one,) = source.watches
    settled(source)
    kept, asked = one.mirror.state[0], len(fake.requests)
    for _ in eventually("several waits", 10):
        if len(fake.requests) > asked + 5:
            break
    assert (one.mirror.state[0], one.reloads) == (kept, 1)
    assert ask(source) == b"gilles"


def test_first_read_is_consistent_and_the_wait_is_not(fake, mirrored):
    settled(mirrored(fake.address))
    for _ in eventually("the wait began", 10):
        lists = [request.params for request in fake.requests if "recurse" in request.params]
        if len(lists) > 1:
            break
    assert ("consistent" in lists[0], "index" in lists[0]) == (True, False)
    assert ("consistent" in lists[1], "index" in lists[1]) == (False, True)


def test_consistency_stale_is_used_for_every_read(fake, mirrored):
    settled(mirrored(fake.address, consistency="stale"))
    assert all("stale" in request.params and "consistent" not in request.params for request in fake.requests)


def test_bad_entry_is_logged_once_and_again_when_it_changes(fake, mirrored, caplog):
    fake.put(ALIAS + b"bad", b"|sh")
    source = mirrored(fake.address)
    settled(source)
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    assert len([line for line in lines(caplog) if "alias/bad" in line]) == 1


def test_last_good_copy_is_served_through_an_outage_without_a_restart(fake, mirrored):
    source = mirrored(fake.address)
    assert ask(source) == b"gilles"
    fake.stop()
    for _ in eventually("the outage is noticed", 10):
        if source.watches[0].backoff.since is not None:
            break
    assert (ask(source), ask(source, b"nobody")) == (b"gilles", None)
    fake.start()
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")


def test_last_good_copy_older_than_max_age_is_an_error_until_recovery(fake, mirrored):
    source = mirrored(fake.address, replace(TABLE, max_age=0.5))
    assert ask(source) == b"gilles"
    fake.stop()
    becomes(source, Unreachable)
    with pytest.raises(Unreachable, match="no data from Consul for"):
        ask(source, b"nobody")
    fake.start()
    becomes(source, b"gilles")


def test_outage_logs_one_line_at_its_start_and_one_at_its_end(fake, mirrored, caplog):
    source = mirrored(fake.address)
    assert ask(source) == b"gilles"
    fake.stop()
    for _ in eventually("several failures", 10):
        if source.watches[0].backoff.failures > 5:
            break
    fake.start()
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    for _ in eventually("the end of the outage is logged", 10):
        if len(lines(caplog)) > 1:
            break
    begin, end = lines(caplog)
    assert begin.startswith("mail/aliases/ from Consul: Consul at http://127.0.0.1:")
    assert begin.endswith("; serving the last good copy if there is one, otherwise returning errors")
    assert end.startswith("mail/aliases/ from Consul: recovered after ")


def test_bug_is_an_outage_and_does_not_end_the_watch(fake, mirrored, monkeypatch, caplog):
    settled(source := mirrored(fake.address))

    def broken(*_arguments, **_options):
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(kv.Client, "blocking_query", broken)
        fake.put(ROOT, b"eric")
        for _ in eventually("the bug is logged", 10):
            if "internal error; please report it" in lines(caplog):
                break
        assert ask(source) in (b"gilles", b"eric")
    becomes(source, b"eric")


@pytest.mark.parametrize("version", ["1.22"])
def test_first_answer_fails_over_within_the_deadline(fake, mirrored):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hangs = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        assert ask(mirrored([hangs, fake.address], replace(TABLE, deadline=2.0))) == b"gilles"
        assert time.monotonic() - began < 2.0


def test_working_address_is_kept_until_it_fails(fake, mirrored):
    with FakeConsul() as other:
        other.put(ROOT, b"eric")
        other.index = 500
        source = mirrored([closed_port(), fake.address, other.address])
        assert ask(source) == b"gilles"
        fake.put(ROOT, b"robert")
        becomes(source, b"robert")
        assert other.requests == []
        fake.stop()
        becomes(source, b"eric")


def test_closing_ends_the_threads(fake, mirrored):
    source = mirrored(fake.address)
    settled(source)
    source.close()
    fake.put(ROOT, b"eric")
    for each in source.watches:
        each.join(10)
        assert not each.is_alive()
