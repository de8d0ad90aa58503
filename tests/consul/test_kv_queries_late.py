"""Queries that are interrupted, and lists whose first byte is late."""

from __future__ import annotations

import contextlib
import time

import pytest

from table_consul.errors import Unreachable
from table_consul.transport import Endpoint, WaitCut
from tests.consul.clients import ROOT, SLACK, Silent, query
from tests.fake_consul import stall


def test_interrupt_ends_a_query_that_is_still_connecting(fake, client, monkeypatch):
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
    """Consul, except that the first byte of each list comes after these seconds."""

    def handle(request):
        if "recurse" in request.params and request.stopping.wait(seconds):
            return None
        return fake.consul(request)

    fake.handle = handle


@pytest.mark.parametrize("index", [0, 1])
def test_timeout_grows_until_a_late_list_arrives(fake, client, index):
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


def test_prompt_list_restores_the_timeout(fake, client):
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


def test_prompt_list_of_another_prefix_keeps_the_timeout_of_a_late_one(fake, client):
    fake.put(b"t/a", b"x")
    fake.handle = lambda request: (request.path == b"/v1/kv/t/" and request.stopping.wait(0.3)) or fake.consul(request)
    with pytest.raises(Unreachable):
        query(client, b"t/", timeout=0.1)
    for _ in range(4):
        query(client, b"t/a", timeout=0.1)
        with contextlib.suppress(Unreachable):
            assert query(client, b"t/", timeout=0.1).pairs == [(b"t/a", b"x")]
            return
    pytest.fail("the late list never arrives")


def test_list_closed_before_its_first_byte_is_unreachable_and_not_a_cut_wait(fake, client, monkeypatch):
    monkeypatch.setattr("table_consul.transport.LEAST_CUT_SECONDS", 0.05)
    fake.handle = stall
    with pytest.raises(Unreachable):
        query(client, timeout=0.1)
    fake.handle = lambda request: request.stopping.wait(0.12) and None
    with pytest.raises(Unreachable) as caught:
        query(client, timeout=0.1)
    assert not isinstance(caught.value, WaitCut)


def test_address_that_does_not_connect_keeps_its_timeout(connect):
    with Silent(full=True) as dead:
        client = connect(dead.address)
        for _ in range(3):
            began = time.monotonic()
            with pytest.raises(Unreachable):
                query(client, timeout=0.1)
            assert time.monotonic() - began < 0.1 + SLACK
