"""Ranges and `http_max_conns_per_client` of a real Consul, which counts a closed connection until its wait ends."""

from __future__ import annotations

import http.client
import logging
import string
import threading
import time

import pytest

from table_consul.services import Table
from table_consul.sources import ranges, watch
from tests.consul.real import agent_or_skip, url
from tests.consul.watch.watching import ask, becomes, lines
from tests.dialogue import eventually

pytestmark = pytest.mark.real

TABLE = Table("large", services=("alias", "domain"))
PREFIXES = string.ascii_lowercase[:25]
# One connection for each range, the folder of domains, the completeness query, and the watch.
CONNECTIONS = len(PREFIXES) + 3
# smtpd takes this long to start its tables; an operator takes longer.
RESTART_SECONDS = 0.5


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(watch, "LEAST_KEYS", 20)
    monkeypatch.setattr("table_consul.sources.cut.RANGE_KEYS", 8)
    monkeypatch.setattr("table_consul.sources.cut.ASK_KEYS", 1)
    monkeypatch.setattr(ranges, "RANGE_KEYS", 8)


def filled(agent):
    agent.kv_txn({f"large/alias/{letter}{number}": "old" for letter in PREFIXES for number in range(9)})
    agent.kv_put("large/domain/example.org", "")


def put(agent, name, value):
    """Edit from another source address than that of the table."""
    connection = http.client.HTTPConnection(agent.bind, agent.ports["http"], source_address=("127.0.0.99", 0))
    connection.request("PUT", f"/v1/kv/large/alias/{name}", value)
    assert connection.getresponse().read() == b"true"
    connection.close()


def accepts(agent):
    """Whether the agent still accepts a connection from the address of the tables."""
    connection = http.client.HTTPConnection(agent.bind, agent.ports["http"], timeout=2)
    try:
        connection.request("GET", "/v1/status/leader")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def queries():
    return sum(thread.name.startswith("query ") for thread in threading.enumerate())


def test_table_with_too_few_connections_has_no_outage(mirrored, caplog):
    caplog.set_level(logging.INFO)
    with agent_or_skip(hcl=f"limits {{ http_max_conns_per_client = {CONNECTIONS - 6} }}") as agent:
        filled(agent)
        source = mirrored(url(agent), TABLE)
        for _ in eventually("the table is watched as a whole", 10):
            if any("reading the whole table" in line for line in lines(caplog, logging.INFO)):
                break
        for letter in PREFIXES:
            put(agent, f"{letter}1", "new")
            becomes(source, b"new", f"{letter}1".encode())
        for _ in eventually("other clients of this host get connections", 10):
            if accepts(agent):
                break
        assert lines(caplog) == []


def test_ten_consecutive_restarts_leave_connections_for_every_table(mirrored, caplog):
    with agent_or_skip() as agent:
        filled(agent)
        for _ in range(10):
            ends = time.monotonic() + RESTART_SECONDS
            source = mirrored(url(agent), TABLE)
            for _ in eventually("ranges are watched", 10):
                if queries() >= CONNECTIONS - 1 and time.monotonic() > ends:
                    break
            assert ask(source, b"a1") == b"old"
            source.close()
            for _ in eventually("the threads of the watch have ended", 10):
                if not queries():
                    break
        assert accepts(agent)
        assert lines(caplog) == []
