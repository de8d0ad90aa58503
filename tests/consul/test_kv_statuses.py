"""How each HTTP status of Consul, or of a proxy before it, affects a message."""

from __future__ import annotations

import pytest
import responses

from table_consul import kv
from table_consul.config import ConsulConfig
from table_consul.errors import BadResponse, Forbidden, Unreachable

ADDRESS = "http://consul.test:8500"
URL = f"{ADDRESS}/v1/kv/consul/alias/root"
GOOD = {"X-Consul-Index": "7", "X-Consul-Knownleader": "true"}
ENTRY = [{"Key": "consul/alias/root", "Value": "Z2lsbGVz", "ModifyIndex": 7, "Flags": 0}]


@pytest.fixture
def consul():
    with responses.RequestsMock() as mocked:
        yield mocked


def read():
    return kv.Client(ConsulConfig(addresses=(ADDRESS,))).get(b"consul/alias/root", timeout=1.0)


def test_200_returns_the_value(consul):
    consul.get(URL, json=ENTRY, headers=GOOD)
    assert read() == kv.Pair("consul/alias/root", b"gilles", 7)


def test_404_with_an_index_is_absence(consul):
    consul.get(URL, status=404, headers=GOOD)
    assert read() is None


@pytest.mark.parametrize("status", [201, 204, 206, 300, 301, 302, 307, 308, 400, 402, 404, 405, 410, 418, 451])
def test_other_responses_are_never_absence(consul, status):
    consul.get(URL, status=status, headers={"Location": f"{ADDRESS}/v1/kv/other/secret"})
    with pytest.raises(BadResponse):
        read()


@pytest.mark.parametrize("status", [401, 403])
def test_403_is_forbidden(consul, status):
    consul.get(URL, status=status, body="Permission denied")
    with pytest.raises(Forbidden):
        read()


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_temporary_error_is_unreachable(consul, status):
    consul.get(URL, status=status, body="No cluster leader")
    with pytest.raises(Unreachable):
        read()
