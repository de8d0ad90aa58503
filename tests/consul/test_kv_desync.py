"""Responses with a wrong end: none may become the answer to the next request on the connection."""

from __future__ import annotations

import contextlib
import threading
import time

import msgspec
import pytest

from table_consul.connection import MAX_INTERIM
from table_consul.errors import BadResponse, SourceError, Unreachable
from tests.consul.clients import INVALID, ROOT, TRUE, failure
from tests.fake_consul import Answer, entry

ABSENT = Answer(404, TRUE)
EARLY_HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\nX-Consul-Index: 9\r\n\r\n"
NOBODY = b"consul/alias/nobody"


def interim(fake, *heads, pause=0.0):
    """Send these bytes and a pause before each answer of Consul."""

    def handle(request):
        for head in heads:
            request.send(head)
        request.stopping.wait(pause)
        return fake.consul(request)

    fake.handle = handle


@pytest.mark.parametrize("status", [b"100 Continue", b"102 Processing", b"103 Early Hints", b"199 Whatever"])
@pytest.mark.parametrize("count", [1, 2, MAX_INTERIM])
def test_interim_response_is_not_the_answer(client, fake, status, count):
    interim(fake, *[b"HTTP/1.1 " + status + b"\r\nX: y\r\n\r\n"] * count)
    assert client.get(ROOT, timeout=1).value == b"gilles"
    assert client.get(NOBODY, timeout=1) is None


def test_early_interim_response_does_not_shift_answers(client, fake):
    interim(fake, EARLY_HINTS, pause=0.1)
    for _ in range(3):
        assert client.get(NOBODY, timeout=1) is None
        assert client.get(ROOT, timeout=1).value == b"gilles"
        assert [pair.key for pair in client.list(b"consul/", timeout=1)] == [ROOT]
    assert {request.connection for request in fake.requests} == {1}


@pytest.mark.parametrize("head", [EARLY_HINTS, b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_endless_interim_responses_are_an_early_error(client, fake, head):
    interim(fake, *[head] * 1000)
    began = time.monotonic()
    assert isinstance(failure(client, timeout=5), BadResponse)
    assert time.monotonic() - began < 1
    fake.handle = fake.consul
    assert client.get(ROOT, timeout=1).value == b"gilles"


def test_interim_response_that_switches_protocols_is_an_error(client, fake):
    interim(fake, b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n")
    assert isinstance(failure(client), BadResponse)


@pytest.mark.parametrize("invalid", [name for name in INVALID if name != "stall"])
def test_connection_is_closed_after_an_invalid_response(client, fake, invalid):
    assert client.get(ROOT, timeout=1).value == b"gilles"
    fake.handle, _ = INVALID[invalid]
    failure(client, timeout=0.3)
    tried = max(request.connection for request in fake.requests)
    fake.handle = fake.consul
    assert client.get(ROOT, timeout=1).value == b"gilles"
    assert fake.requests[-1].connection > tried


@pytest.mark.parametrize("first", [Answer(500, {}, b"No cluster leader"), Answer(403, {}, b"Permission denied")])
@pytest.mark.parametrize("pause", [0.0, 0.05])
def test_second_response_to_a_request_is_not_used_for_the_next(client, fake, first, pause):
    sent = threading.Event()

    def twice(request):
        fake.handle = fake.consul
        request.send(first.wire())
        request.stopping.wait(pause)
        with contextlib.suppress(OSError):
            request.send(ABSENT.wire())
        sent.set()

    fake.handle = twice
    with pytest.raises(SourceError):
        client.get(NOBODY, timeout=1)
    assert sent.wait(10)
    assert client.get(ROOT, timeout=1).value == b"gilles"


@pytest.mark.parametrize("pause", [0.0, 0.05])
def test_second_404_to_a_request_is_not_used_for_the_next(client, fake, pause):
    sent = threading.Event()

    def twice(request):
        fake.handle = fake.consul
        request.send(ABSENT.wire())
        request.stopping.wait(pause)
        request.send(ABSENT.wire())
        sent.set()

    fake.handle = twice
    assert client.get(NOBODY, timeout=1) is None
    assert sent.wait(10)
    assert client.get(ROOT, timeout=1).value == b"gilles"


def test_late_response_after_a_timeout_is_not_used_for_the_next(client, fake):
    def late(request):
        fake.handle = fake.consul
        request.stopping.wait(0.3)
        return ABSENT

    fake.handle = late
    assert isinstance(failure(client, NOBODY, timeout=0.1), Unreachable)
    assert client.get(ROOT, timeout=1).value == b"gilles"


# Headers.


@pytest.mark.parametrize("answer", [ABSENT, entry(ROOT, "Zg==")])
def test_response_with_cut_headers_is_an_error(client, fake, answer):
    headers = {"Vary": "Accept-Encoding", **TRUE, "X-Consul-Results-Filtered-By-Acls": "true"}
    whole = Answer(answer.status, headers, answer.body).wire()
    for length in range(whole.index(b"\r\n\r\n") + 4):
        fake.handle = lambda request, length=length: request.send(whole[:length])
        with pytest.raises(SourceError):
            client.get(ROOT, timeout=1)
        with pytest.raises(SourceError):
            client.list(b"consul/", timeout=1)


@pytest.mark.parametrize("index", ["9223372036854775808", "18446744073709551615", "9" * 30])
def test_index_beyond_63_bits_is_an_error(client, fake, index):
    fake.handle = lambda request: entry(ROOT, "Zg==", index=index)
    assert isinstance(failure(client), BadResponse)


def test_index_of_63_bits_is_accepted(client, fake):
    fake.handle = lambda request: entry(ROOT, "Zg==", index=str(2**63 - 1))
    with client.blocking_query(b"consul/", timeout=1) as response:
        assert response.index == 2**63 - 1


@pytest.mark.parametrize("leader", [None, "", "TRUE?", "1"])
@pytest.mark.parametrize("status", [200, 404])
@pytest.mark.parametrize("consistency", ["default", "stale", "consistent"])
def test_answer_without_a_leader_header_is_an_error(fake, connect, leader, status, consistency):
    headers = {"X-Consul-Index": "5"} | ({} if leader is None else {"X-Consul-Knownleader": leader})
    fake.handle = lambda request: Answer(status, headers, b"[]")
    client = connect(fake.address, consistency=consistency)
    for read in (client.get, client.list, client.visible_keys):
        with pytest.raises(BadResponse, match="not from Consul's key-value store"):
            read(b"consul/alias", timeout=1)


# Bodies.


@pytest.mark.parametrize("body", [b"%b%b", b'[{"Key":"consul/alias/root","Value":null,"ModifyIndex":1,"X":%b%b}]'])
def test_deeply_nested_body_is_an_error(client, fake, body):
    depth = 1_000_000  # Python 3.14 skips 100,000 levels of an unknown field without an error, 3.13 some thousand
    fake.handle = lambda request: Answer(200, TRUE, body % (b"[" * depth, b"]" * depth))
    for read in (client.get, client.list, client.visible_keys):
        with pytest.raises(BadResponse, match="invalid response body"):
            read(b"consul/alias/root", timeout=2)


def entries(client, prefix=b"t/"):
    with client.blocking_query(prefix, timeout=5) as response:
        return [pair for pairs in response.pairs() for pair in pairs]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("step", [1 << 10, 16 << 10])
def test_keys_full_of_separators_take_no_longer_than_others(fake, connect, step):
    keys = [f"t/{number}" + "}," * (1 << 18) for number in range(14)]
    body = msgspec.json.encode([{"Key": key, "Value": "", "ModifyIndex": 1} for key in keys])
    fake.handle = lambda request: Answer(200, TRUE, body)
    assert [pair.name for pair in entries(connect(fake.address, limits={"chunk_bytes": step}))] == keys
