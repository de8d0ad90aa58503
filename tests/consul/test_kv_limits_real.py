"""Limits of a real agent: on connections from one address, and lists compressed on their way over a network."""

from __future__ import annotations

import contextlib

import pytest

from table_consul import kv
from table_consul.failures import TooManyConnections
from tests.consul.clients import ROOT, config
from tests.consul.real import agent_or_skip, url
from tests.dialogue import eventually
from tests.rig.consul import free_ports

pytestmark = pytest.mark.real


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_connection_beyond_the_limit_of_a_real_consul_is_told_from_an_outage(authority, scheme):
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
        for _ in eventually("five are served, and three are refused", 20):
            refused = [error for error in map(refusal, clients) if error is not None]
            if len(refused) == 3:
                break
        assert all("limits.http_max_conns_per_client" in str(error) for error in refused)


def refusal(client):
    try:
        assert client.get(ROOT, timeout=2).value == b"gilles"
    except TooManyConnections as error:
        return error
    return None
