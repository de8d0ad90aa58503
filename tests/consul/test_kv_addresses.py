from __future__ import annotations

import errno
import socket
import threading
import time

import pytest

from table_consul import kv
from table_consul.config import ConsulConfig
from table_consul.errors import BadResponse, Unreachable
from table_consul.failures import TooManyConnections
from table_consul.transport import Endpoint
from tests.consul.clients import GOOD, LIES, ROOT, SLACK, Silent, closed_port, each_version, failure
from tests.fake_consul import Answer, FakeConsul, entry, html, stall, trickle

# Connections.


@each_version
def test_the_connection_is_kept(client, fake):
    for _ in range(5):
        client.get(ROOT, timeout=1)
        client.get(b"consul/alias/nobody", timeout=1)
        client.list(b"consul/", timeout=1)
    assert {request.connection for request in fake.requests} == {1}


@each_version
def test_a_kept_connection_that_was_closed_is_replaced_silently(client, fake):
    client.get(ROOT, timeout=1)
    fake.close_connections()
    assert client.get(ROOT, timeout=1).value == b"gilles"


def test_a_kept_connection_that_closes_on_the_next_request_is_replaced_silently(client, fake):
    client.get(ROOT, timeout=1)
    fake.handle = lambda request: None if request.connection == 1 else fake.consul(request)
    assert client.get(ROOT, timeout=1).value == b"gilles"
    assert [request.connection for request in fake.requests] == [1, 1, 2]


def test_a_new_connection_that_closes_is_not_tried_again(client, fake):
    fake.handle = lambda request: None
    assert "closed without a response" in str(failure(client))
    assert len(fake.requests) == 1


def test_a_time_out_on_a_kept_connection_is_not_tried_again(client, fake):
    client.get(ROOT, timeout=1)
    fake.handle = stall
    failure(client, timeout=0.3)
    assert len(fake.requests) == 2


@each_version
def test_a_restart_between_two_reads_goes_unnoticed(client, fake):
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


def test_no_time_is_no_answer(client):
    assert isinstance(failure(client, timeout=0), Unreachable)


def test_connecting_does_not_outlive_the_deadline(connect):
    with Silent(full=True) as dead:
        assert isinstance(failure(connect(dead.address), timeout=0.3), Unreachable)


def test_names_are_resolved(fake, connect):
    client = connect(fake.address.replace("127.0.0.1", "localhost"))
    assert client.get(ROOT, timeout=2).value == b"gilles"


def test_a_resolver_that_hangs_costs_the_deadline_and_one_thread(fake, connect, monkeypatch):
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


def test_a_name_that_does_not_resolve_is_unreachable(connect, monkeypatch):
    def unknown(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    error = failure(connect("http://consul.example:8500"))
    assert isinstance(error, Unreachable)
    assert "name or service not known" in str(error)


def test_a_name_that_is_no_name_is_unreachable(connect):
    assert isinstance(failure(connect("http://" + "a" * 70 + ".example:8500")), Unreachable)


def test_a_unix_socket_serves(tmp_path, connect):
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


def test_a_unix_socket_that_is_not_there_is_named(tmp_path, connect):
    error = failure(connect(f"unix://{tmp_path}/none"))
    assert str(error) == f"Consul at unix://{tmp_path}/none: no such file or directory"


def test_ipv6_literals_are_reached(connect):
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


def test_a_connection_that_breaks_before_it_stands_is_an_outage_and_no_bug(monkeypatch):
    def broken(self):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(Endpoint, "open", broken)
    with pytest.raises(Unreachable, match="broken pipe"):
        kv.Client(ConsulConfig()).get(b"t/alias/root", timeout=1.0)


# Several addresses.


@pytest.mark.parametrize(
    "lie",
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
def test_an_address_that_fails_gives_way_to_the_next_which_is_kept(fake, connect, lie):
    with FakeConsul() as bad:
        bad.handle = LIES[lie][0]
        client = connect(bad.address, fake.address)
        begun = time.monotonic()
        for _ in range(3):
            assert client.get(ROOT, timeout=1).value == b"gilles"
        assert time.monotonic() - begun < 1 + SLACK
        assert len(bad.requests) == 1
        assert client.address == fake.address


def test_a_connection_is_closed_after_an_answer_that_is_not_to_the_question(client, fake):
    fake.handle = lambda request: entry(b"consul/alias/other", "Zg==")
    assert isinstance(failure(client), BadResponse)
    fake.handle = fake.consul
    assert client.get(ROOT, timeout=1).value == b"gilles"
    assert [request.connection for request in fake.requests] == [1, 2]


def test_an_address_is_resolved_again_after_a_thread_could_not_be_started(fake, connect, monkeypatch):
    client = connect(fake.address.replace("127.0.0.1", "localhost"))
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", lambda _self: (_ for _ in ()).throw(RuntimeError("no thread")))
        with pytest.raises(RuntimeError):
            client.get(ROOT, timeout=1)
    assert client.get(ROOT, timeout=1).value == b"gilles"


def test_an_address_that_refuses_connections_gives_way_to_the_next(fake, connect):
    client = connect(closed_port(), closed_port(), fake.address)
    assert client.get(ROOT, timeout=1).value == b"gilles"


def test_when_the_kept_address_fails_the_first_is_asked_again(fake, connect):
    with FakeConsul() as other:
        other.put(ROOT, b"eric")
        client = connect(other.address, fake.address)
        other.handle = lambda request: Answer(500)
        assert client.get(ROOT, timeout=1).value == b"gilles"
        other.handle = other.consul
        fake.stop()
        assert client.get(ROOT, timeout=1).value == b"eric"


def test_all_addresses_together_stay_within_the_deadline_and_are_all_named(connect):
    with Silent() as one, Silent() as two:
        error = failure(connect(one.address, two.address), timeout=0.4)
        assert isinstance(error, Unreachable)
        assert one.address in str(error)
        assert two.address in str(error)


@pytest.mark.parametrize("order", [1, -1])
def test_an_address_that_answers_wrongly_makes_a_failure_no_outage(fake, connect, order):
    fake.handle = html
    assert isinstance(failure(connect(*[closed_port(), fake.address][::order])), BadResponse)


@pytest.mark.parametrize("lie", ["403", "400", "invalid key name"])
def test_what_consul_itself_refuses_is_not_asked_of_another_address(fake, connect, lie):
    with FakeConsul() as first:
        first.handle = LIES[lie][0]
        failure(connect(first.address, fake.address))
        assert fake.requests == []


# Limits on connections.


@each_version
def test_connection_beyond_the_limit_of_consul_is_told_from_an_outage(fake, connect):
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


def test_next_address_is_asked_when_one_takes_no_more_connections(fake, connect):
    fake.max_connections = 0
    with FakeConsul() as other:
        other.put(ROOT, b"eric")
        assert connect(fake.address, other.address).get(ROOT, timeout=1).value == b"eric"


def test_too_many_connections_at_one_of_several_addresses_is_no_outage(fake, connect):
    fake.max_connections = 0
    assert isinstance(failure(connect(closed_port(), fake.address)), TooManyConnections)


@pytest.mark.parametrize(("version", "status"), [("1.8.7", 429), ("1.22", 429)])
def test_rate_limit_is_unreachable_and_not_a_matter_of_connections(fake, connect, status):
    fake.rate_limited = True
    error = failure(connect(fake.address))
    assert isinstance(error, Unreachable)
    assert not isinstance(error, TooManyConnections)
    assert f"{status} " in str(error)


def test_refused_connection_is_unreachable_and_not_a_matter_of_connections(connect):
    assert not isinstance(failure(connect(closed_port())), TooManyConnections)
