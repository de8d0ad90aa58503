from __future__ import annotations

import pytest

from table_consul import kv
from tests.consul.clients import ROOT, config
from tests.fake_consul import FakeConsul


@pytest.fixture
def fake():
    with FakeConsul() as server:
        server.put(ROOT, b"gilles")
        yield server


@pytest.fixture
def connect():
    clients = []

    def make(*addresses, limits=(), **options):
        clients.append(kv.Client(config(*addresses, **options)))
        vars(clients[-1]).update(limits)
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def client(fake, connect):
    return connect(fake.address)
