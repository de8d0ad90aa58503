"""Queries that are interrupted, and lists that Consul takes long to begin."""

from __future__ import annotations

import time

import pytest

from table_consul.errors import Unreachable
from table_consul.transport import Endpoint, WaitCut
from tests.consul.clients import ROOT, SLACK, Silent, query
from tests.fake_consul import stall


def test_interrupt_that_comes_while_a_wait_is_still_connecting_ends_it(fake, client, monkeypatch):
    connect = Endpoint.open

    def interrupted(endpoint):
        opened = connect(endpoint)
        client.interrupt()
        return opened

    monkeypatch.setattr(Endpoint, "open", interrupted)
    begun = time.monotonic()
    with pytest.raises(WaitCut):
        client.blocking_query(b"consul/", index=fake.index, wait=10.0, timeout=1.0)
    assert time.monotonic() - begun < 5.0
    monkeypatch.undo()
    assert client.get(ROOT, timeout=1.0) is not None


def after(seconds, fake):
    """Consul, but each list takes so long to begin."""

    def handle(request):
        if "recurse" in request.params and request.stopping.wait(seconds):
            return None
        return fake.consul(request)

    fake.handle = handle


@pytest.mark.parametrize("index", [0, 1])
def test_list_that_begins_later_each_time_than_its_timeout_arrives_in_the_end(fake, client, index):
    fake.put(b"t/a", b"x")
    after(0.4, fake)
    failures = 0
    while True:
        try:
            read = query(client, b"t/", timeout=0.1, index=index, wait=0.01)
            break
        except Unreachable:
            failures += 1
            assert failures < 6
    assert failures
    assert read.pairs == [(b"t/a", b"x")]
    assert query(client, b"t/", timeout=0.1, index=index, wait=0.01).pairs == read.pairs


def test_list_that_began_soon_has_its_own_timeout_again(fake, client):
    after(0.15, fake)
    with pytest.raises(Unreachable):
        query(client, timeout=0.1)
    assert query(client, timeout=0.1).pairs
    fake.handle = fake.consul
    query(client, timeout=0.1)
    fake.handle = stall
    began = time.monotonic()
    with pytest.raises(Unreachable):
        query(client, timeout=0.1)
    assert time.monotonic() - began < 0.1 + SLACK


def test_list_whose_connection_closes_before_it_begins_is_unreachable_and_no_cut_wait(fake, client, monkeypatch):
    monkeypatch.setattr("table_consul.transport.LEAST_CUT_SECONDS", 0.05)
    fake.handle = stall
    with pytest.raises(Unreachable):
        query(client, timeout=0.1)
    fake.handle = lambda request: request.stopping.wait(0.12) and None
    with pytest.raises(Unreachable) as caught:
        query(client, timeout=0.1)
    assert not isinstance(caught.value, WaitCut)


def test_address_that_does_not_connect_gets_no_longer_timeout(connect):
    with Silent(full=True) as dead:
        client = connect(dead.address)
        for _ in range(3):
            began = time.monotonic()
            with pytest.raises(Unreachable):
                query(client, timeout=0.1)
            assert time.monotonic() - began < 0.1 + SLACK
