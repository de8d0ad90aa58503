from __future__ import annotations

import base64
import errno
import json
import os
import random
import socket
import ssl
import string
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from table_consul import kv, transport
from table_consul.config import ConsulConfig
from table_consul.connection import Endpoint
from table_consul.errors import BadResponse, Forbidden, SourceError, Unreachable
from tests import fake_consul
from tests.fake_consul import Answer, FakeConsul, cut, entry, html, stall, trickle

ROOT = b"consul/alias/root"
# What a call may take beyond its deadline on a busy machine, before a test calls it late.
SLACK = 0.5
TRUE = {"X-Consul-Index": "5", "X-Consul-Knownleader": "true"}

UNADDRESSABLE = [
    b"",
    b"/",
    b".",
    b"..",
    b"/a",
    b"a/",
    b"a//b",
    b"consul/alias/../../other/secret",
    b"consul/alias/a/../../../other/secret",
    b"../../../agent/self",
    b"a/./b",
    b"a/..",
    b"a\0b",
    b"a\nb",
    b"a\x7fb",
    b"a\xc2\x85b",
    b"a\xffb",
    b"\xed\xa0\x80",  # A lone surrogate.
    b"\xc0\xae\xc0\xae/x",  # `..` in overlong UTF-8.
]
ODD = [
    b"..%2f..%2fother%2fsecret",
    b"%2e%2e/%2e%2e/other/secret",
    b"consul/alias/root?raw",
    b"consul/alias/root?recurse",
    b"?keys",
    b"consul/alias/root#x",
    b"user+tag@example.org",
    b"[2001:db8::/32]",
    b"*.example.org",
    b"...",
    b"..a/b..",
    b"a;b=c&d",
    b" a ",
    b"a\\..\\b",
    b"~!$'()*,|{}^`\"<>",
    "gr\u00fc\u00dfe@\u00e9t\u00e9.example".encode(),
]


def config(*addresses, **options):
    given = {
        "token": None,
        "token_file": None,
        "ca_file": None,
        "ca_path": None,
        "cert_file": None,
        "key_file": None,
        "tls_server_name": None,
        "tls_verify": True,
        "datacenter": None,
        "namespace": None,
        "partition": None,
        "consistency": "default",
    }
    return SimpleNamespace(addresses=addresses, **(given | options))


@pytest.fixture
def fake():
    with FakeConsul() as server:
        server.put(ROOT, b"gilles")
        yield server


@pytest.fixture
def connect():
    clients = []

    def make(*addresses, **options):
        clients.append(kv.Client(config(*addresses, **options)))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def client(fake, connect):
    return connect(fake.address)


class Silent:
    """A port that takes connections and says nothing; with `full`, one that does not even take them."""

    def __init__(self, *, full=False):
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=0)
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.fillers = []
        while full:
            filler = socket.socket()
            filler.settimeout(0.1)
            self.fillers.append(filler)
            try:
                filler.connect(self.listener.getsockname())
            except TimeoutError:
                break

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        for filler in self.fillers:
            filler.close()
        self.listener.close()


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def failure(client, key=ROOT, *, timeout=1.0):
    """The error of a read, which must come within the time-out."""
    begun = time.monotonic()
    with pytest.raises(SourceError) as caught:
        client.get(key, timeout=timeout)
    assert time.monotonic() - begun < timeout + SLACK
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 400
    return caught.value


# Reads.


def test_get_returns_the_entry_of_a_key(client, fake):
    assert client.get(ROOT, timeout=2) == kv.Pair(ROOT, b"gilles", fake.index)


def test_get_of_a_key_that_is_not_there_is_none(client):
    assert client.get(b"consul/alias/nobody", timeout=2) is None


def test_an_empty_value_is_none_as_in_json(client, fake):
    fake.put(b"consul/domain/example.org", b"")
    pair = client.get(b"consul/domain/example.org", timeout=2)
    assert pair is not None
    assert pair.value is None


def test_values_are_bytes_of_any_kind(client, fake):
    fake.put(ROOT, bytes(range(256)))
    assert client.get(ROOT, timeout=2).value == bytes(range(256))


def test_list_returns_what_is_below_a_prefix(client, fake):
    fake.put(b"consul/alias/a", None)
    fake.put(b"consul/domain/x", b"1")
    page = client.list(b"consul/alias/", timeout=2)
    assert page == kv.Page([kv.Pair(b"consul/alias/a", None, 12), kv.Pair(ROOT, b"gilles", 11)], 13, filtered=False)


def test_list_of_nothing_is_an_empty_page_with_an_index(client, fake):
    assert client.list(b"consul/domain/", timeout=2) == kv.Page([], fake.index, filtered=False)


def test_list_takes_the_empty_prefix_and_one_without_slash(client):
    assert [pair.key for pair in client.list(b"", timeout=2).pairs] == [ROOT]
    assert [pair.key for pair in client.list(b"consul/al", timeout=2).pairs] == [ROOT]


def test_list_says_when_an_acl_hid_entries(client, fake):
    fake.denied = (b"consul/alias/root",)
    assert client.list(b"consul/alias/", timeout=2) == kv.Page([], fake.index, filtered=True)


def test_list_returns_keys_that_no_url_can_name(client, fake):
    fake.put(b"consul/alias/a//b\n", b"x")
    assert client.list(b"consul/alias/", timeout=2).pairs[0].key == b"consul/alias/a//b\n"


def test_keys_are_listed_in_order(client, fake):
    fake.put(b"consul/alias/a", None)
    assert client.keys(b"consul/alias/", timeout=2) == [b"consul/alias/a", ROOT]


def test_keys_of_nothing_are_none(client):
    assert client.keys(b"consul/domain/", timeout=2) == []


def test_keys_that_an_acl_hides_are_an_error(client, fake):
    fake.denied = (ROOT,)
    with pytest.raises(Forbidden):
        client.keys(b"consul/alias/", timeout=2)


def test_a_large_page_arrives_whole(client, fake):
    for number in range(5000):
        fake.put(b"consul/alias/%d" % number, b"x" * 100)
    assert len(client.list(b"consul/", timeout=10).pairs) == 5001


# Blocking queries.


def test_a_blocking_list_returns_when_something_changes(client, fake):
    index = client.list(b"consul/", timeout=2).index
    change = threading.Timer(0.1, fake.put, (b"consul/alias/new", b"x"))
    change.start()
    page = client.list(b"consul/", timeout=10, index=index, wait=8)
    change.join()
    assert [pair.key for pair in page.pairs] == [b"consul/alias/new", ROOT]
    assert fake.requests[-1].params == {"index": str(index), "wait": "8000ms", "recurse": "1"}


def test_a_blocking_list_returns_the_same_after_its_wait(client, fake):
    assert client.list(b"consul/", timeout=2, index=fake.index, wait=0.1).index == fake.index


def test_a_blocking_list_shows_an_index_that_went_back(client, fake):
    change = threading.Timer(0.1, fake.reset_index, (3,))
    change.start()
    assert client.list(b"consul/", timeout=10, index=fake.index, wait=8).index == 3
    change.join()


def test_a_blocking_list_that_is_not_answered_ends_at_its_deadline(client, fake):
    fake.handle = stall
    begun = time.monotonic()
    with pytest.raises(Unreachable):
        client.list(b"consul/", timeout=0.4, index=5, wait=0.2)
    assert 0.3 < time.monotonic() - begun < 0.4 + SLACK


def test_a_healthy_blocking_list_is_not_cut_short_for_a_second_address(fake, connect):
    client = connect(fake.address, closed_port())
    assert client.list(b"consul/", timeout=1.0, index=fake.index, wait=0.8).index == fake.index
    assert client.address == fake.address


def test_a_blocking_list_passes_over_an_address_that_does_not_connect(fake, connect):
    with Silent(full=True) as dead:
        client = connect(dead.address, fake.address)
        assert client.list(b"consul/", timeout=2, index=fake.index, wait=0.5).index == fake.index
        assert client.address == fake.address


def test_after_a_blocking_list_that_was_not_answered_the_next_address_is_asked(fake, connect):
    with Silent() as dead:
        client = connect(dead.address, fake.address)
        with pytest.raises(Unreachable):
            client.list(b"consul/", timeout=0.3, index=5, wait=0.2)
        assert client.list(b"consul/", timeout=0.3).index == fake.index


def test_nothing_is_ever_written(client, fake):
    with pytest.raises(NotImplementedError):
        client._library.kv.put("a", "b")
    with pytest.raises(NotImplementedError):
        client._library.kv.delete("a")
    assert fake.requests == []


# Keys stay data.


@pytest.mark.parametrize("key", UNADDRESSABLE)
def test_a_key_that_no_url_can_name_is_refused_before_any_request(client, fake, key):
    assert not kv.is_url_safe(key)
    with pytest.raises(ValueError, match="no URL can name"):
        client.get(key, timeout=1)
    assert fake.requests == []


@pytest.mark.parametrize("prefix", [b"/", b"a//", b"../", b"a/../", b"a\n/", b"\xff/"])
def test_a_prefix_that_no_url_can_name_is_refused_before_any_request(client, fake, prefix):
    with pytest.raises(ValueError, match="no URL can name"):
        client.list(prefix, timeout=1)
    with pytest.raises(ValueError, match="no URL can name"):
        client.keys(prefix, timeout=1)
    assert fake.requests == []


@pytest.mark.parametrize("key", ODD)
def test_an_odd_key_is_read_as_it_stands_and_nothing_else(client, fake, key):
    assert kv.is_url_safe(key)
    assert client.get(key, timeout=1) is None
    fake.put(key, b"odd")
    assert client.get(key, timeout=1).value == b"odd"
    assert {request.key for request in fake.requests} == {key}
    assert {tuple(request.params) for request in fake.requests} == {()}


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example("a/%2e%2e/b")
@example("\u2028")
@given(st.text(min_size=1))
def test_no_key_changes_which_key_is_read(client, fake, text):
    key = b"consul/alias/" + text.encode("utf-8", "surrogatepass")
    fake.requests.clear()
    if not kv.is_url_safe(key):
        return
    fake.put(key, b"mine")
    assert client.get(key, timeout=2).key == key
    (request,) = fake.requests
    assert request.key == key
    assert set(request.target) <= set(string.ascii_letters + string.digits + "-._~/%")
    assert b"/" + key in request.path


def test_an_answer_for_another_key_is_refused(client, fake):
    fake.handle = lambda request: entry(b"consul/alias/eric", "Zg==")
    assert isinstance(failure(client), BadResponse)


@pytest.mark.parametrize("body", [b"[]", b'[{"Key":"consul/alias/root","Value":null,"ModifyIndex":1}]' * 2])
def test_an_answer_with_other_than_one_entry_is_refused(client, fake, body):
    fake.handle = lambda request: Answer(200, TRUE, body)
    assert isinstance(failure(client), BadResponse)


def test_entries_from_outside_the_prefix_are_refused(client, fake):
    fake.handle = lambda request: entry(b"other/secret", "Zg==")
    with pytest.raises(BadResponse, match="not below"):
        client.list(b"consul/", timeout=1)
    fake.handle = lambda request: Answer(200, TRUE, b'["consul/a", "other/secret"]')
    with pytest.raises(BadResponse, match="not below"):
        client.keys(b"consul/", timeout=1)


@pytest.mark.parametrize("status", [301, 302, 303, 304, 307, 308])
def test_a_redirect_is_a_failure_and_never_followed(client, fake, status):
    fake.put(b"other/secret", b"x")
    fake.handle = lambda request: Answer(status, {"Location": "/v1/kv/other/secret", **TRUE})
    assert isinstance(failure(client), BadResponse)
    assert len(fake.requests) == 1


# Absence is proven.


@pytest.mark.parametrize("index", [None, "0", "-1", "x", "", "1.5", "\u00b2", "9" * 30])
@pytest.mark.parametrize("status", [200, 404])
def test_an_answer_without_a_valid_index_is_not_believed(client, fake, status, index):
    answer = entry(ROOT, "Zg==", status=status)
    answer.headers = {"X-Consul-Knownleader": "true"} | ({} if index is None else {"X-Consul-Index": index})
    fake.handle = lambda request: answer
    assert isinstance(failure(client), BadResponse)
    with pytest.raises(BadResponse):
        client.list(b"consul/", timeout=1)


@pytest.mark.parametrize("consistency", ["default", "stale", "consistent"])
def test_a_404_without_a_leader_is_not_believed(fake, connect, consistency):
    fake.handle = lambda request: Answer(404, {"X-Consul-Index": "5", "X-Consul-Knownleader": "false"})
    assert isinstance(failure(connect(fake.address, consistency=consistency)), Unreachable)


def test_a_404_that_breaks_off_within_its_headers_is_not_believed(client, fake):
    whole = Answer(404, TRUE).wire()
    for length in range(whole.index(b"true") + 4):
        fake.handle = cut(Answer(404, TRUE), length)
        with pytest.raises((BadResponse, Unreachable)):
            client.get(ROOT, timeout=1)


def test_old_data_are_accepted_from_a_server_without_leader_only_if_stale_is_asked_for(fake, connect):
    fake.leader = False
    assert isinstance(failure(connect(fake.address)), Unreachable)
    assert connect(fake.address, consistency="stale").get(ROOT, timeout=1).value == b"gilles"
    fake.handle = lambda request: fake_consul.entry(ROOT, "Zg==", index="5")
    fake.handle = lambda request: Answer(200, TRUE | {"X-Consul-Knownleader": "false"}, entry(ROOT, "Zg==").body)
    assert isinstance(failure(connect(fake.address)), Unreachable)


# Lies, and the truth after them.


def body(text, **headers):
    return lambda request: Answer(200, TRUE | headers, text)


GOOD = entry(ROOT, "Zg==")
LIES = {
    "html": (html, BadResponse),
    "html with an index": (body(b"<html>"), BadResponse),
    "no body": (body(b""), BadResponse),
    "null": (body(b"null"), BadResponse),
    "an object": (body(b'{"Key": "consul/alias/root"}'), BadResponse),
    "cut json": (body(GOOD.body[:-1]), BadResponse),
    "json and more": (body(GOOD.body + b"x"), BadResponse),
    "no utf-8": (body(GOOD.body.replace(b"root", b"r\xfft")), BadResponse),
    "a key that is no string": (body(GOOD.body.replace(b'"consul/alias/root"', b"5")), BadResponse),
    "no value": (body(b'[{"Key":"consul/alias/root","ModifyIndex":1}]'), BadResponse),
    "a value that is no string": (lambda request: entry(ROOT, 5), BadResponse),
    "no base64": (lambda request: entry(ROOT, "Z"), BadResponse),
    "base64 with a newline": (lambda request: entry(ROOT, "Zg==\n"), BadResponse),
    "url-safe base64": (lambda request: entry(ROOT, "_-__"), BadResponse),
    "compressed": (body(GOOD.body, **{"Content-Encoding": "gzip"}), BadResponse),
    "204": (lambda request: Answer(204, TRUE), BadResponse),
    "301": (lambda request: Answer(301, {"Location": "/v1/kv/other"}), BadResponse),
    "400": (lambda request: Answer(400, {}, b"Bad Request"), BadResponse),
    "401": (lambda request: Answer(401), Forbidden),
    "403": (lambda request: Answer(403, {}, b"Permission denied"), Forbidden),
    "405": (lambda request: Answer(405), BadResponse),
    "429": (lambda request: Answer(429, {"Retry-After": "30"}), Unreachable),
    "500": (lambda request: Answer(500, {}, b"No cluster leader"), Unreachable),
    "503": (lambda request: Answer(503, {"Retry-After": "30"}), Unreachable),
    "invalid key name": (lambda request: Answer(500, {}, b"Invalid key name"), BadResponse),
    "stall": (stall, Unreachable),
    "trickle": (trickle(GOOD), Unreachable),
    "endless headers": (
        lambda request: [request.send(b"HTTP/1.1 100 Continue\r\n\r\n") for _ in iter(int, 1)],
        Unreachable,
    ),
    "end before an answer": (cut(GOOD, 0), Unreachable),
    "end within the status": (cut(GOOD, 5), SourceError),
    "end within the body": (cut(GOOD, len(GOOD.wire()) - 1), Unreachable),
    "end within a chunk": (cut(Answer(200, TRUE, GOOD.body, chunked=True), 150), SourceError),
    "no http": (lambda request: request.send(b"220 mx.example.org ESMTP\r\n"), BadResponse),
    "too long a header": (lambda request: request.send(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70000), BadResponse),
    "a bad chunk": (
        lambda request: request.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
        SourceError,
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_a_clear_error_in_time_and_the_next_good_answer_is_good(client, fake, lie):
    fake.handle, kind = LIES[lie]
    error = failure(client, timeout=0.4)
    assert isinstance(error, kind)
    assert client.address in str(error)
    fake.handle = fake.consul
    assert client.get(ROOT, timeout=2).value == b"gilles"


def test_any_bytes_for_an_answer_are_an_error_of_the_source(client, fake):
    choose = random.Random(7)
    whole = GOOD.wire()
    for _ in range(300):
        garbled = bytearray(whole)
        for _ in range(choose.randrange(1, 6)):
            garbled[choose.randrange(len(garbled))] = choose.randrange(256)
        fake.handle = lambda request, data=bytes(garbled): request.send(data)
        try:
            pair = client.get(ROOT, timeout=1)
        except SourceError:
            continue
        assert pair is None or pair.key == ROOT


def test_the_trickling_of_a_body_does_not_outlive_the_deadline(client, fake):
    def handle(request):
        request.send(b"HTTP/1.1 200 OK\r\nX-Consul-Index: 5\r\nContent-Length: 1000000\r\n\r\n")
        while not request.stopping.wait(0.02):
            request.send(b" ")

    fake.handle = handle
    assert isinstance(failure(client, timeout=0.3), Unreachable)


def test_a_body_beyond_the_bound_is_refused(client, fake, monkeypatch):
    monkeypatch.setattr(transport, "BODY_LIMIT_BYTES", 100)
    fake.put(ROOT, b"x" * 200)
    assert "more than" in str(failure(client))


def test_a_key_outside_the_alphabet_of_consul_1_21_5_is_no_outage(client, fake):
    fake.charset = fake_consul.CONSUL_1_21_5
    assert "1.21.5" in str(failure(client, b"consul/alias/user@example.org"))
    fake.put(b"consul/alias/user@example.org", b"x")
    assert len(client.list(b"consul/alias/", timeout=1).pairs) == 2


def test_messages_show_control_characters_and_bound_what_they_quote(client, fake):
    fake.handle = lambda request: Answer(403, {}, b"\x1b[2Jno\r\nway \xff" + b"x" * 5000)
    assert "\\x1b[2Jno way" in str(failure(client))


def test_messages_never_hold_values(client, fake):
    secret = base64.b64encode(b"$6$salt$hash").decode()
    for answer in (Answer(200, {}, entry(ROOT, secret).body), Answer(200, TRUE, entry(ROOT, secret).body[:-1])):
        fake.handle = lambda request, answer=answer: answer
        assert secret[:8] not in str(failure(client))


# Connections.


def test_the_connection_is_kept(client, fake):
    for _ in range(5):
        client.get(ROOT, timeout=1)
        client.get(b"consul/alias/nobody", timeout=1)
        client.list(b"consul/", timeout=1)
    assert {request.connection for request in fake.requests} == {1}


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
    assert "closed without an answer" in str(failure(client))
    assert len(fake.requests) == 1


def test_a_time_out_on_a_kept_connection_is_not_tried_again(client, fake):
    client.get(ROOT, timeout=1)
    fake.handle = stall
    failure(client, timeout=0.3)
    assert len(fake.requests) == 2


def test_a_restart_between_two_reads_goes_unnoticed(client, fake):
    client.get(ROOT, timeout=1)
    fake.stop()
    assert "connection refused" in str(failure(client))
    fake.start()
    assert client.get(ROOT, timeout=1).value == b"gilles"


def test_a_closed_client_reads_nothing_more(client):
    client.get(ROOT, timeout=1)
    client.close()
    assert isinstance(failure(client), Unreachable)


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
        assert client.list(b"consul/", timeout=1, index=fake.index, wait=0.05).index == fake.index
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


# Several addresses.


@pytest.mark.parametrize("lie", ["html", "301", "500", "429", "stall", "end before an answer", "no http"])
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


# Token, parameters, environment.


def test_the_configured_token_is_sent_in_its_header_only(fake, connect):
    fake.token = "s3cret"
    assert connect(fake.address, token="s3cret").get(ROOT, timeout=1).value == b"gilles"
    assert fake.requests[-1].headers["x-consul-token"] == "s3cret"
    assert "s3cret" not in fake.requests[-1].target


def test_without_a_token_none_is_sent(client, fake):
    client.get(ROOT, timeout=1)
    assert "x-consul-token" not in fake.requests[-1].headers


def test_a_token_that_is_echoed_does_not_show_in_the_message(fake, connect):
    fake.handle = lambda request: Answer(403, {}, b"no such token: s3cret")
    assert "s3cret" not in str(failure(connect(fake.address, token="s3cret")))


def write(path, text):
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.rename(path)


def test_the_token_file_wins_and_is_read_again_when_it_changes(fake, connect, tmp_path):
    path = tmp_path / "token"
    path.write_text("first \r\n\n")
    fake.token = "first"
    client = connect(fake.address, token="other", token_file=str(path))
    assert client.get(ROOT, timeout=1).value == b"gilles"
    write(path, "second")
    fake.token = "second"
    assert client.get(ROOT, timeout=1).value == b"gilles"
    assert [request.headers["x-consul-token"] for request in fake.requests] == ["first", "second"]


def test_after_a_403_the_token_file_is_read_again_and_the_read_repeated(fake, connect, tmp_path):
    path = tmp_path / "token"
    path.write_text("first")
    stamp = path.stat()
    fake.token = "first"
    client = connect(fake.address, token_file=str(path))
    client.get(ROOT, timeout=1)
    path.write_text("other")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    fake.token = "other"
    assert client.get(ROOT, timeout=1).value == b"gilles"


def test_a_403_with_an_unchanged_token_file_is_not_repeated(fake, connect, tmp_path):
    path = tmp_path / "token"
    path.write_text("wrong")
    fake.token = "right"
    assert isinstance(failure(connect(fake.address, token_file=str(path))), Forbidden)
    assert len(fake.requests) == 1


def test_a_token_file_that_cannot_be_read_is_an_error_until_it_can(fake, connect, tmp_path):
    path = tmp_path / "token"
    client = connect(fake.address, token_file=str(path))
    assert str(path) in str(failure(client))
    with pytest.raises(SourceError, match="token"):
        client.reload_token()
    path.write_text("\n")
    assert "empty" in str(failure(client))
    assert fake.requests == []
    path.write_text("t")
    assert client.get(ROOT, timeout=1).value == b"gilles"
    client.reload_token()


@pytest.mark.parametrize("text", ["two\nlines", "sp ace", "t\u00f6ken", "nul\0"])
def test_a_token_that_no_header_can_carry_is_refused_and_not_shown(fake, connect, tmp_path, text):
    path = tmp_path / "token"
    path.write_text(text)
    assert text[:3] not in str(failure(connect(fake.address, token_file=str(path)))).replace(str(path), "")
    with pytest.raises(SourceError):
        connect(fake.address, token=text)


def test_datacenter_namespace_partition_and_consistency_are_parameters(fake, connect):
    client = connect(fake.address, datacenter="dc 1&x", namespace="ns", partition="p", consistency="stale")
    client.get(ROOT, timeout=1)
    expected = {"dc": "dc 1&x", "ns": "ns", "partition": "p", "stale": "1"}
    assert fake.requests[-1].params == expected
    client.list(b"consul/", timeout=1)
    assert fake.requests[-1].params == expected | {"recurse": "1"}
    connect(fake.address, consistency="consistent").keys(b"consul/", timeout=1)
    assert fake.requests[-1].params == {"consistent": "1", "keys": "True"}


@pytest.mark.parametrize("address", ["http://[::1]:1", "unix:///none", "127.0.0.1:1", "a:b:c:d", "https://x:1"])
def test_the_environment_does_not_count(fake, connect, monkeypatch, tmp_path, address):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login a password b\n")
    for name, value in {
        "CONSUL_HTTP_ADDR": address,
        "CONSUL_HTTP_TOKEN": "environment",
        "CONSUL_HTTP_SSL": "true",
        "CONSUL_HTTP_SSL_VERIFY": "1",
        "HTTP_PROXY": "http://127.0.0.1:1",
        "ALL_PROXY": "http://127.0.0.1:1",
        "NETRC": str(netrc),
    }.items():
        monkeypatch.setenv(name, value)
    assert connect(fake.address).get(ROOT, timeout=1).value == b"gilles"
    assert not {"x-consul-token", "authorization"}.intersection(fake.requests[-1].headers)


# Watching: a list in pieces.


class Watched:
    """What `Client.watch` was given; each answer that begins starts over."""

    def __init__(self, client, prefix=b"t/", **options):
        self.begun = []
        self.pairs = []
        self.seen = client.watch(prefix, self.begin, **{"timeout": 2, **options})

    def begin(self, index):
        self.begun.append(index)
        self.pairs = []
        return self.pairs.extend


def listing(*pairs, indent=None):
    """The body of a list as Consul spells it."""
    entries = [
        {
            "LockIndex": 0,
            "Key": key,
            "Flags": 0,
            "Value": base64.b64encode(value).decode() if value else None,
            "CreateIndex": 4,
            "ModifyIndex": 5,
        }
        for key, value in pairs
    ]
    return json.dumps(entries, indent=indent, separators=(",", ": ") if indent else (",", ":")).encode()


def whole(fake, body, **options):
    fake.handle = lambda request: Answer(200, TRUE, body, **options)


TRAPS = [
    't/a},{"Key":"t/b"',
    't/}, {"',
    "t/},",
    't/"},{"K',
    "t/\\",
    't/\\"},{"A',
    "t/[{",
    "t/}]",
    "t/\u2028},{",
    "t/" + '},{"Aa' * 50,
    "t/\U0001f600",
]


@pytest.mark.parametrize("indent", [None, 4])
@pytest.mark.parametrize("step", [1, 2, 3, 7, 64, 1 << 20])
def test_a_watch_brings_whole_entries_however_the_body_is_cut(fake, client, monkeypatch, step, indent):
    pairs = sorted((key, b"x" * (number * 7)) for number, key in enumerate(TRAPS))
    whole(fake, listing(*pairs, indent=indent))
    monkeypatch.setattr(transport, "STEP_BYTES", step)
    watched = Watched(client)
    assert watched.pairs == sorted((key.encode(), value or None) for key, value in pairs)
    assert (watched.begun, watched.seen) == ([5], kv.Seen(5, False))


KEYS = st.text(st.sampled_from('ab/},{"Key:[]\\ \n') | st.characters(codec="utf-8"), max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.dictionaries(KEYS, st.binary(max_size=40), max_size=12),
    step=st.integers(1, 200),
    indent=st.sampled_from([None, 0, 1, 4]),
    chunked=st.booleans(),
)
def test_any_list_in_any_pieces_gives_the_same_pairs(fake, client, entries, step, indent, chunked):
    pairs = sorted((("t/" + key).encode(), value or None) for key, value in entries.items())
    whole(fake, listing(*((key.decode(), value) for key, value in pairs), indent=indent), chunked=chunked)
    before, transport.STEP_BYTES = transport.STEP_BYTES, step
    try:
        assert Watched(client).pairs == pairs
    finally:
        transport.STEP_BYTES = before


def test_a_watch_hands_on_a_long_list_piece_by_piece(fake, client):
    pairs = [(f"t/{number:05}", b"x" * 50) for number in range(2000)]
    whole(fake, listing(*pairs))
    pieces = []
    client.watch(b"t/", lambda index: lambda piece: pieces.append(len(piece)), timeout=2)
    assert sum(pieces) == 2000
    assert max(pieces) < 400


def test_a_watch_reads_the_largest_value_of_consul(fake, client):
    whole(fake, listing(("t/a", b"1"), ("t/b", b"x" * (512 << 10)), ("t/c", b"2")))
    assert [(key, len(value)) for key, value in Watched(client).pairs] == [
        (b"t/a", 1),
        (b"t/b", 512 << 10),
        (b"t/c", 1),
    ]


@pytest.mark.parametrize("step", [1, 1 << 20])
@pytest.mark.parametrize("keys", [("t/b", "t/a"), ("t/a", "t/c", "t/b"), ("t/a", "u/b"), ("s/a", "t/b"), ("t",)])
def test_a_watch_refuses_keys_out_of_order_or_below_another_prefix(fake, client, monkeypatch, keys, step):
    monkeypatch.setattr(transport, "STEP_BYTES", step)
    whole(fake, listing(*((key, b"x") for key in keys)))
    with pytest.raises(BadResponse, match=r"order|below"):
        Watched(client)


@pytest.mark.parametrize(
    "body", [b"", b"[", b"{}", b"null", b'[{"Key":"t/a"}]', b"[]]", b"[] []", listing(("t/a", b"x"))[:-1],
             listing(("t/a", b"x")) + b"x", listing(("t/a", b"x")).replace(b'"eA=="', b'"e*=="'),
             listing(("t/a", b"x"), ("t/b", b"y")).replace(b"},{", b"},,{")]
)  # fmt: skip
@pytest.mark.parametrize("step", [1, 1 << 20])
def test_a_watch_refuses_a_body_that_is_no_list_of_entries(fake, client, monkeypatch, body, step):
    monkeypatch.setattr(transport, "STEP_BYTES", step)
    whole(fake, body)
    with pytest.raises(BadResponse):
        Watched(client)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_watch_whose_body_breaks_off_anywhere_fails(fake, client, chunked):
    answer = Answer(200, TRUE, listing(("t/a", b"x"), ("t/b", b"y"), ("t/c", b"z")), chunked=chunked)
    for length in range(answer.wire().rindex(b"]") + 1):
        fake.handle = cut(answer, length)
        with pytest.raises((Unreachable, BadResponse)):
            Watched(client, timeout=1)


def test_a_watch_that_broke_off_on_a_kept_connection_starts_over(fake, client):
    answer = Answer(200, TRUE, listing(("t/a", b"x"), ("t/b", b"y")))
    fake.handle = lambda request: answer
    Watched(client)
    fake.handle = lambda request: (
        setattr(fake, "handle", lambda request: answer), fake_consul.cut(answer, len(answer.wire()) - 9)(request)
    )[1]  # fmt: skip
    watched = Watched(client)
    assert watched.begun == [5, 5]
    assert watched.pairs == [(b"t/a", b"x"), (b"t/b", b"y")]


def test_a_watch_of_nothing_is_an_answer_with_an_index_and_no_entries(fake, client):
    watched = Watched(client)
    assert (watched.begun, watched.pairs, watched.seen) == ([fake.index], [], kv.Seen(fake.index, False))
    whole(fake, b"[]")
    assert Watched(client).pairs == []


def test_a_watch_takes_no_404_but_consuls_for_emptiness(fake, client):
    for headers in ({}, {"X-Consul-Index": "5"}, {"X-Consul-Index": "5", "X-Consul-Knownleader": "false"}):
        fake.handle = lambda request, headers=headers: Answer(404, headers)
        with pytest.raises((Unreachable, BadResponse)):
            Watched(client)


def test_a_watch_drops_what_nobody_wants_and_is_ready_for_more(fake, client):
    whole(fake, b"what it is does not matter" * 100_000)
    assert client.watch(b"t/", lambda index: None, timeout=2) == kv.Seen(5, False)
    connections = {request.connection for request in fake.requests}
    whole(fake, listing(("t/a", b"x")))
    assert Watched(client).pairs == [(b"t/a", b"x")]
    assert {request.connection for request in fake.requests} == connections


@pytest.mark.parametrize("wanted", [True, False])
def test_a_watch_has_a_bound_on_the_body(fake, client, monkeypatch, wanted):
    monkeypatch.setattr(transport, "BODY_LIMIT_BYTES", 100_000)
    whole(fake, listing(*((f"t/{number:05}", b"x" * 50) for number in range(2000))), chunked=True)
    with pytest.raises(BadResponse, match="more than"):
        client.watch(b"t/", lambda index: (lambda pairs: None) if wanted else None, timeout=2)


def test_a_watch_tells_when_an_acl_hides_some(fake, client):
    fake.put(b"t/a", b"x")
    fake.put(b"t/secret", b"y")
    fake.denied = (b"t/secret",)
    watched = Watched(client)
    assert (watched.pairs, watched.seen.filtered) == ([(b"t/a", b"x")], True)


def test_a_watch_waits_on_its_index_and_brings_the_edit(fake, client):
    fake.put(b"t/a", b"x")
    index = Watched(client).seen.index
    timer = threading.Timer(0.1, fake.put, (b"t/a", b"y"))
    timer.start()
    watched = Watched(client, index=index, wait=20, timeout=0.5)
    timer.join()
    assert (watched.pairs, watched.seen.index) == ([(b"t/a", b"y")], index + 1)
    assert fake.requests[-1].params == {"recurse": "1", "index": str(index), "wait": "20000ms"}


@pytest.mark.parametrize(
    ("consistency", "params"),
    [("default", {"consistent": "1"}), ("stale", {"stale": "1"}), ("consistent", {"consistent": "1"})],
)
def test_the_first_answer_of_a_watch_comes_from_a_leader_that_has_caught_up(fake, connect, consistency, params):
    client = connect(fake.address, consistency=consistency)
    index = Watched(client).seen.index
    assert fake.requests[-1].params == {"recurse": "1", **params}
    Watched(client, index=index, wait=0.05)
    waiting = {"recurse": "1", "index": str(index), "wait": "50ms"}
    assert fake.requests[-1].params == {**waiting, **({consistency: "1"} if consistency != "default" else {})}


def test_a_watch_that_is_held_longer_than_agreed_is_unreachable(fake, client):
    fake.handle = stall
    began = time.monotonic()
    with pytest.raises(Unreachable):
        Watched(client, index=5, wait=0.3, timeout=0.2)
    assert 0.5 <= time.monotonic() - began < 0.5 + SLACK


def test_the_body_of_a_watch_may_take_longer_than_the_deadline_and_not_for_ever(fake, client, monkeypatch):
    body = listing(*((f"t/{number}", b"x") for number in range(9)))
    slow = trickle(Answer(200, TRUE, body), pause=0.0005)

    def late(request):
        time.sleep(0.15)
        slow(request)

    fake.handle = late
    assert len(Watched(client, timeout=0.4).pairs) == 9
    monkeypatch.setattr(transport, "BODY_SECONDS", 0.2)
    fake.handle = trickle(Answer(200, {}, body).wire() and Answer(200, TRUE, body * 50), pause=0.002)
    began = time.monotonic()
    with pytest.raises(Unreachable):
        Watched(client, timeout=1)
    assert time.monotonic() - began < 1.2 + SLACK


# TLS.


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A private authority, a server certificate for consul.example, and a client certificate."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(arguments):
        subprocess.run(["openssl", *arguments.split()], cwd=folder, check=True, capture_output=True)

    key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
    try:
        openssl(f"req -x509 {key} -days 2 -keyout ca.key -out ca.pem -subj /CN=test-authority")
    except FileNotFoundError:
        pytest.skip("no openssl command: apt-get install openssl")
    (folder / "san").write_text("subjectAltName=DNS:consul.example\n")
    for name in ("server", "client"):
        openssl(f"req {key} -keyout {name}.key -out {name}.csr -subj /CN={name}")
        openssl(
            f"x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile san -out {name}.pem"
        )
    openssl("rehash .")
    return folder


@pytest.fixture
def secure(authority):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "server.pem", authority / "server.key")
    with FakeConsul(tls=context) as server:
        server.put(ROOT, b"gilles")
        server.context = context
        yield server


def test_tls_with_a_private_authority_and_a_server_name(secure, connect, authority):
    for trust in ({"ca_file": str(authority / "ca.pem")}, {"ca_path": str(authority)}):
        client = connect(secure.address, tls_server_name="consul.example", **trust)
        secure.requests.clear()
        assert client.get(ROOT, timeout=2).value == b"gilles"
        assert client.list(b"consul/", timeout=2).index == secure.index
        assert len({request.connection for request in secure.requests}) == 1


def test_tls_sends_the_server_name_it_checks(secure, connect, authority):
    seen = []
    secure.context.sni_callback = lambda sock, name, context: seen.append(name)
    client = connect(secure.address, tls_server_name="consul.example", ca_file=str(authority / "ca.pem"))
    client.get(ROOT, timeout=2)
    assert seen == ["consul.example"]


def test_tls_refuses_an_unknown_authority_and_another_name(secure, connect, authority):
    for options in ({"tls_server_name": "consul.example"}, {"ca_file": str(authority / "ca.pem")}):
        error = failure(connect(secure.address, **options), timeout=2)
        assert isinstance(error, Unreachable)
        assert "not to be trusted" in str(error)
    assert secure.requests == []


def test_tls_without_verification_takes_anything(secure, connect):
    assert connect(secure.address, tls_verify=False).get(ROOT, timeout=2).value == b"gilles"


def test_tls_with_a_client_certificate(secure, connect, authority):
    secure.context.verify_mode = ssl.CERT_REQUIRED
    secure.context.load_verify_locations(authority / "ca.pem")
    trust = {"tls_server_name": "consul.example", "ca_file": str(authority / "ca.pem")}
    assert isinstance(failure(connect(secure.address, **trust), timeout=2), Unreachable)
    own = {"cert_file": str(authority / "client.pem"), "key_file": str(authority / "client.key")}
    assert connect(secure.address, **trust, **own).get(ROOT, timeout=2).value == b"gilles"


@pytest.mark.parametrize("option", ["ca_file", "cert_file"])
def test_a_tls_file_that_cannot_be_used_is_named(secure, connect, tmp_path, option):
    path = tmp_path / "none.pem"
    assert str(path) in str(failure(connect(secure.address, **{option: str(path)})))
    path.write_text("no certificate")
    assert str(path) in str(failure(connect(secure.address, **{option: str(path)})))


def test_tls_handshake_and_answer_do_not_outlive_the_deadline(secure, connect):
    with Silent() as dead:
        client = connect(dead.address.replace("http:", "https:"), tls_verify=False)
        assert isinstance(failure(client, timeout=0.3), Unreachable)
    client = connect(secure.address, tls_verify=False)
    for lie in (stall, trickle(GOOD)):
        secure.handle = lie
        assert isinstance(failure(client, timeout=0.4), Unreachable)


def test_plain_http_to_a_tls_port_and_tls_to_a_plain_one_are_errors(secure, fake, connect):
    failure(connect(secure.address.replace("https:", "http:")))
    told = failure(connect(fake.address.replace("http:", "https:"), tls_verify=False))
    assert str(told).endswith("no TLS there (is it an http:// address?)")


# The other library.


@pytest.mark.real
def test_all_of_this_holds_under_py_consul(tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*pip, "--target", tmp_path, "py-consul"], check=True)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    found = [sys.executable, "-c", "import consul.base; print(consul.base.__file__)"]
    library = subprocess.run(found, env=environment, cwd=root, check=True, capture_output=True, text=True).stdout
    assert library.startswith(str(tmp_path))
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not real", "--no-cov"]
    tests += [__file__, str(Path(__file__).with_name("test_ctl_writing.py"))]
    done = subprocess.run(tests, env=environment, cwd=root, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_connection_that_breaks_before_it_stands_is_an_outage_and_no_bug(monkeypatch):
    def broken(self, deadline):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(Endpoint, "open", broken)
    with pytest.raises(Unreachable, match="broken pipe"):
        kv.Client(ConsulConfig()).get(b"t/alias/root", timeout=1.0)
