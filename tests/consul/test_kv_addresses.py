from __future__ import annotations

import errno
import os
import socket
import threading
import time

import pytest

from table_consul import kv
from table_consul.config import ConsulConfig
from table_consul.errors import BadResponse, TooManyConnections, Unreachable
from table_consul.transport import Endpoint
from tests.consul.clients import GOOD, INVALID, ROOT, SLACK, Silent, closed_port, each_version, failure
from tests.fake_consul import Answer, FakeConsul, entry, html, stall, trickle

# Connections.


@each_version
def test_connection_is_reused(client, fake):
    for _ in range(5):
        client.get(ROOT, timeout=1)
        client.get(b"consul/alias/nobody", timeout=1)
        client.list(b"consul/", timeout=1)
    assert {request.connection for request in fake.requests} == {1}


@each_version
def test_closed_kept_connection_is_replaced_silently(client, fake):
    client.get(ROOT, timeout=1)
    fake.close_connections()
    assert client.get(ROOT, timeout=1).value == b"gilles"


def test_kept_connection_that_closes_on_a_request_is_replaced_silently(client, fake):
    client.get(ROOT, timeout=1)
    fake.handle = lambda request: None if request.connection == 1 else fake.consul(request)
    assert client.get(ROOT, timeout=1).value == b"gilles"
    assert [request.connection for request in fake.requests] == [1, 1, 2]


def test_new_connection_that_closes_is_not_retried(client, fake):
    fake.handle = lambda request: None
    assert "closed without a response" in str(failure(client))
    assert len(fake.requests) == 1


def test_timeout_on_a_kept_connection_is_not_retried(client, fake):
    client.get(ROOT, timeout=1)
    fake.handle = stall
    failure(client, timeout=0.3)
    assert len(fake.requests) == 2


@each_version
def test_restart_between_two_reads_goes_unnoticed(client, fake):
    client.get(ROOT, timeout=1)
    fake.stop()
    assert "connection refused" in str(failure(client))
    fake.start()
    assert client.get(ROOT, timeout=1).value == b"gilles"


def test_closed_client_opens_a_connection_for_the_next_read(client, fake):
    for _ in range(2):
        assert client.get(ROOT, timeout=1).value == b"gilles"
        client.close()
    assert [request.connection for request in fake.requests] == [1, 2]


def test_request_without_remaining_time_fails(client):
    assert isinstance(failure(client, timeout=0), Unreachable)


def test_connecting_ends_at_the_deadline(connect):
    with Silent(full=True) as dead:
        assert isinstance(failure(connect(dead.address), timeout=0.3), Unreachable)


def test_names_are_resolved(fake, connect):
    client = connect(fake.address.replace("127.0.0.1", "localhost"))
    assert client.get(ROOT, timeout=2).value == b"gilles"


def test_hanging_resolver_ends_at_the_deadline_and_uses_one_thread(fake, connect, monkeypatch):
    real = socket.getaddrinfo
    release = threading.Event()
    asked = []

    def hanging(host, *args, **kwargs):
        if kwargs.get("flags", 0) & socket.AI_NUMERICHOST:
            return real(host, *args, **kwargs)
        asked.append(host)
        release.wait(30)
        return real("127.0.0.1", *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", hanging)
    client = connect(fake.address.replace("127.0.0.1", "consul.example"))
    for _ in range(3):
        assert isinstance(failure(client, timeout=0.1), Unreachable)
    assert asked == ["consul.example"]
    release.set()
    assert client.get(ROOT, timeout=2).value == b"gilles"


@pytest.fixture
def without_ipv6(monkeypatch):
    """No IPv6 in the kernel; ``consul.example`` has the addresses that the argument names, in this order."""
    real_resolve, real_init = socket.getaddrinfo, socket.socket.__init__

    def init(self, family=-1, *args, **kwargs):
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        real_init(self, family, *args, **kwargs)

    def named(*addresses):
        def resolve(host, *args, **kwargs):
            if host != "consul.example" or kwargs.get("flags", 0) & socket.AI_NUMERICHOST:
                return real_resolve(host, *args, **kwargs)
            return [found for address in addresses for found in real_resolve(address, *args, **kwargs)]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        monkeypatch.setattr(socket.socket, "__init__", init)

    return named


def test_name_with_an_ipv6_address_is_reached_without_ipv6(fake, connect, without_ipv6):
    without_ipv6("::1", "127.0.0.1")
    client = connect(fake.address.replace("127.0.0.1", "consul.example"))
    assert client.get(ROOT, timeout=2).value == b"gilles"


def test_failure_to_reach_a_name_is_that_of_its_first_address(connect, without_ipv6):
    without_ipv6("127.0.0.1", "::1")
    assert "connection refused" in str(failure(connect(closed_port().replace("127.0.0.1", "consul.example"))))


def test_unresolvable_name_is_unreachable(connect, monkeypatch):
    def unknown(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    error = failure(connect("http://consul.example:8500"))
    assert isinstance(error, Unreachable)
    assert "name or service not known" in str(error)


def test_invalid_host_name_is_unreachable(connect):
    assert isinstance(failure(connect("http://" + "a" * 70 + ".example:8500")), Unreachable)


def test_unix_socket_is_supported(tmp_path, connect):
    with FakeConsul(unix=tmp_path / "consul.sock") as fake:
        fake.put(ROOT, b"gilles")
        client = connect(fake.address)
        assert client.get(ROOT, timeout=1).value == b"gilles"
        with client.blocking_query(b"consul/", timeout=1, index=fake.index, wait=0.05) as response:
            assert response.index == fake.index
        assert {request.connection for request in fake.requests} == {1}
        fake.handle = trickle(GOOD)
        assert isinstance(failure(client, timeout=0.3), Unreachable)
    assert isinstance(failure(client), Unreachable)


def test_missing_unix_socket_is_named(tmp_path, connect):
    error = failure(connect(f"unix://{tmp_path}/none"))
    assert str(error) == f"Consul at unix://{tmp_path}/none: no such file or directory"


def test_ipv6_literals_are_supported(connect):
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 on the loopback of this machine: enable it")
    with listener:
        port = listener.getsockname()[1]
        received = []

        def serve():
            connection, _ = listener.accept()
            with connection:
                received.append(connection.recv(10000))
                connection.sendall(GOOD.wire())

        thread = threading.Thread(target=serve)
        thread.start()
        assert connect(f"http://[::1]:{port}").get(ROOT, timeout=2).value == b"f"
        thread.join()
    assert b"Host: [::1]:%d\r\n" % port in received[0]


def test_connection_reset_while_connecting_is_an_outage(monkeypatch):
    def broken(self):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(Endpoint, "open", broken)
    with pytest.raises(Unreachable, match="broken pipe"):
        kv.Client(ConsulConfig()).get(b"t/alias/root", timeout=1.0)


# Several addresses.


@pytest.mark.parametrize(
    "invalid",
    [
        "html",
        "301",
        "500",
        "429",
        "stall",
        "end before an answer",
        "no http",
        "cut json",
        "null",
        "end within the body",
    ],
)
def test_client_fails_over_to_the_next_address_and_stays_there(fake, connect, invalid):
    with FakeConsul() as bad:
        bad.handle = INVALID[invalid][0]
        client = connect(bad.address, fake.address)
        begun = time.monotonic()
        for _ in range(3):
            assert client.get(ROOT, timeout=1).value == b"gilles"
        assert time.monotonic() - begun < 1 + SLACK
        assert len(bad.requests) == 1
        assert client.address == fake.address


def test_connection_is_closed_after_an_answer_for_another_key(client, fake):
    fake.handle = lambda request: entry(b"consul/alias/other", "Zg==")
    assert isinstance(failure(client), BadResponse)
    fake.handle = fake.consul
    assert client.get(ROOT, timeout=1).value == b"gilles"
    assert [request.connection for request in fake.requests] == [1, 2]


def test_address_is_resolved_again_after_a_thread_could_not_be_started(fake, connect, monkeypatch):
    client = connect(fake.address.replace("127.0.0.1", "localhost"))
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", lambda _self: (_ for _ in ()).throw(RuntimeError("no thread")))
        assert "cannot start another thread" in str(failure(client, timeout=1))
    assert client.get(ROOT, timeout=1).value == b"gilles"


def test_address_that_needs_no_thread_is_used_while_none_can_be_started(fake, connect, monkeypatch):
    def start(thread, real=threading.Thread.start):
        if thread.name.startswith("resolve"):
            raise RuntimeError("can't start new thread")
        real(thread)

    client = connect(fake.address.replace("127.0.0.1", "localhost"), fake.address)
    monkeypatch.setattr(threading.Thread, "start", start)
    assert client.get(ROOT, timeout=1).value == b"gilles"


def test_client_fails_over_when_an_address_refuses_connections(fake, connect):
    client = connect(closed_port(), closed_port(), fake.address)
    assert client.get(ROOT, timeout=1).value == b"gilles"


def test_client_returns_to_the_first_address_when_the_current_one_fails(fake, connect):
    with FakeConsul() as other:
        other.put(ROOT, b"eric")
        client = connect(other.address, fake.address)
        other.handle = lambda request: Answer(500)
        assert client.get(ROOT, timeout=1).value == b"gilles"
        other.handle = other.consul
        fake.stop()
        assert client.get(ROOT, timeout=1).value == b"eric"


def test_all_addresses_share_the_deadline_and_are_named(connect):
    with Silent() as one, Silent() as two:
        error = failure(connect(one.address, two.address), timeout=0.4)
        assert isinstance(error, Unreachable)
        assert one.address in str(error)
        assert two.address in str(error)


@pytest.mark.parametrize("order", [1, -1])
def test_invalid_response_from_one_address_is_not_an_outage(fake, connect, order):
    fake.handle = html
    assert isinstance(failure(connect(*[closed_port(), fake.address][::order])), BadResponse)


@pytest.mark.parametrize("invalid", ["403", "400", "invalid key name"])
def test_refusal_by_consul_does_not_fail_over(fake, connect, invalid):
    with FakeConsul() as first:
        first.handle = INVALID[invalid][0]
        failure(connect(first.address, fake.address))
        assert fake.requests == []


# Limits on connections.


@each_version
def test_connection_limit_of_consul_is_distinguished_from_an_outage(fake, connect):
    first, second = connect(fake.address), connect(fake.address)
    assert first.get(ROOT, timeout=1).value == b"gilles"
    fake.max_connections = 1
    for _ in range(10):
        error = failure(second)
        assert isinstance(error, TooManyConnections)
        assert "limits.http_max_conns_per_client" in str(error)
        assert first.get(ROOT, timeout=1).value == b"gilles"
    fake.max_connections = None
    assert second.get(ROOT, timeout=1).value == b"gilles"


def test_client_fails_over_when_an_address_has_too_many_connections(fake, connect):
    fake.max_connections = 0
    with FakeConsul() as other:
        other.put(ROOT, b"eric")
        assert connect(fake.address, other.address).get(ROOT, timeout=1).value == b"eric"


def test_connection_limit_at_one_of_several_addresses_is_not_an_outage(fake, connect):
    fake.max_connections = 0
    assert isinstance(failure(connect(closed_port(), fake.address)), TooManyConnections)


@pytest.mark.parametrize(("version", "status"), [("1.8.7", 429), ("1.22", 429)])
def test_rate_limit_is_unreachable_and_not_a_connection_limit(fake, connect, status):
    fake.rate_limited = True
    error = failure(connect(fake.address))
    assert isinstance(error, Unreachable)
    assert not isinstance(error, TooManyConnections)
    assert f"{status} " in str(error)


def test_refused_connection_is_unreachable_and_not_a_connection_limit(connect):
    assert not isinstance(failure(connect(closed_port())), TooManyConnections)
