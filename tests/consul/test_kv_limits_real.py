"""A real agent: its limit on connections from one address, and compressed lists over a network."""

from __future__ import annotations

import contextlib

import pytest

from table_consul import kv
from table_consul.errors import TooManyConnections
from tests.consul.clients import ROOT, config
from tests.consul.real import agent_or_skip, url
from tests.dialogue import eventually
from tests.rig.consul import free_ports
from tests.rig.proxy import Proxy

pytestmark = pytest.mark.real


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_connection_limit_of_a_real_consul_is_distinguished_from_an_outage(authority, scheme):
    (port,), options = free_ports(1), {}
    hcl = "limits { http_max_conns_per_client = 5 }"
    if scheme == "https":
        files = {"cert_file": "server.pem", "key_file": "server.key", "ca_file": "ca.pem"}
        hcl += f"\nports {{ https = {port} }}\n"
        hcl += "".join(f'{name} = "{authority / file}"\n' for name, file in files.items())
        options = {"ca_file": str(authority / "ca.pem"), "tls_server_name": "consul.example"}
    with agent_or_skip(hcl=hcl) as agent, contextlib.ExitStack() as stack:
        agent.kv_put(ROOT.decode(), "gilles")
        address = url(agent) if scheme == "http" else f"https://127.0.0.1:{port}"
        clients = [kv.Client(config(address, **options)) for _ in range(8)]
        for client in clients:
            stack.callback(client.close)
        for _ in eventually("five connections are served and three refused", 20):
            refused = [error for error in map(refusal, clients) if error is not None]
            if len(refused) == 3:
                break
        assert all("limits.http_max_conns_per_client" in str(error) for error in refused)


class Counting(Proxy):
    """Counts the bytes of the answers."""

    count = 0

    def answer(self, data, *, first):
        self.count += len(data)
        return data


def test_list_of_a_real_consul_is_compressed_over_a_network(consul, named):
    consul.kv_txn({f"mail/aliases/alias/user{number:05}": f"someone{number}@example.org" for number in range(5_000)})
    took = {}
    with Counting(consul) as proxy:
        proxy.bad.set()
        for address in (f"http://{proxy.address}", named(f"http://{proxy.address}")):
            proxy.count = 0
            with contextlib.closing(kv.Client(config(address))) as client:
                pairs = client.list(b"mail/aliases/alias/", timeout=10)
            took[proxy.count] = pairs
    plain, compressed = took
    assert took[plain] == took[compressed]
    assert len(took[plain]) == 5_000
    assert compressed * 8 < plain


def refusal(client):
    try:
        assert client.get(ROOT, timeout=2).value == b"gilles"
    except TooManyConnections as error:
        return error
    return None
