"""Lists with gzip: when they are requested, and that decompression is bounded in memory."""

from __future__ import annotations

import gzip
import random
import socket
import tracemalloc
import zlib
from itertools import cycle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from table_consul.errors import BadResponse, Forbidden, TooLarge, Unreachable
from tests.consul.clients import ROOT, TRUE, each_version
from tests.consul.test_kv_queries import KEYS, listing, query
from tests.fake_consul import Answer, FakeConsul

GZIP = {**TRUE, "Content-Encoding": "gzip"}


@pytest.fixture
def remote(fake, connect, named):
    """Makes a client that connects to the fake, or to other servers, by host name."""
    return lambda *servers, **options: connect(
        *(named(each.address) for each in servers or (fake,)), token="any", **options
    )


def compressed(fake, body, headers=GZIP, **options):
    fake.handle = lambda request: Answer(200, headers, body, **options)


def asked(fake):
    return [request.headers["accept-encoding"] for request in fake.requests]


@each_version
def test_list_over_a_network_is_requested_with_gzip_and_a_key_is_not(remote, fake):
    for number in range(2000):
        fake.put(b"t/user%d" % number, b"x" * 100)
    client = remote()
    assert len(query(client, b"t/").pairs) == len(client.list(b"t/", timeout=5)) == 2000
    assert len(client.visible_keys(b"t/", timeout=5)[0]) == 2000
    assert client.get(b"t/user0", timeout=5).value == b"x" * 100
    assert asked(fake) == ["gzip", "gzip", "gzip", "identity"]


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize(
    ("host", "coding"),
    [("127.0.0.1", "identity"), ("localhost", "identity"), ("consul.localhost", "identity"), ("consul.test", "gzip")],
)
def test_coding_depends_on_the_configured_address(fake, connect, monkeypatch, host, coding):
    real = socket.getaddrinfo
    aliases = {"localhost": "127.0.0.1", "consul.localhost": "127.0.0.1"}
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda name, *args, **kwargs: real(aliases.get(name, name), *args, **kwargs)
    )
    client = connect(fake.address.replace("127.0.0.1", host))
    client.list(b"consul/", timeout=1)
    assert asked(fake) == [coding]


def test_list_over_a_unix_socket_is_not_compressed(tmp_path, connect):
    with FakeConsul(unix=tmp_path / "consul.sock") as fake:
        connect(fake.address).list(b"consul/", timeout=1)
        assert asked(fake) == ["identity"]


def test_each_address_has_its_own_coding(named, fake, connect):
    fake.handle = lambda request: Answer(500)
    with FakeConsul() as near:
        connect(named(fake.address), near.address).list(b"t/", timeout=1)
        assert (asked(fake), asked(near)) == (["gzip"], ["identity"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.dictionaries(KEYS, st.binary(max_size=40) | st.integers(0, 2000).map(bytes), max_size=8),
    step=st.integers(1, 200),
    level=st.integers(0, 9),
    chunked=st.booleans(),
    cuts=st.lists(st.integers(1, 500), min_size=1, max_size=5),
)
def test_any_compressed_list_in_any_pieces_gives_the_same_pairs(remote, fake, entries, step, level, chunked, cuts):
    pairs = sorted((("t/" + key).encode(), value or None) for key, value in entries.items())
    body = gzip.compress(listing(*((key.decode(), value) for key, value in pairs)), level)
    wire = Answer(200, GZIP, body, chunked=chunked).wire()

    def in_pieces(request):
        at = 0
        for size in cycle(cuts):
            if at >= len(wire):
                return
            request.send(wire[at : at + size])
            at += size

    fake.handle = in_pieces
    assert query(remote(limits={"chunk_bytes": step}), b"t/").pairs == pairs


BODY = listing(*((f"t/{number}", b"x" * 50) for number in range(50)))
WHOLE = gzip.compress(BODY)
BROKEN = {
    "not gzip": BODY,
    "nothing": b"",
    "raw deflate": zlib.compress(BODY, wbits=-15),
    "zlib": zlib.compress(BODY),
    "a wrong checksum": WHOLE[:-8] + b"\0\0\0\0" + WHOLE[-4:],
    "a byte after the end": WHOLE + b"\0",
    "a second member": WHOLE + gzip.compress(b" "),
    "an empty second member": WHOLE + gzip.compress(b""),
    "much after the end": WHOLE + b" " * 100_000,
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("step", [7, 16 << 10])
def test_invalid_gzip_is_a_failure_and_the_next_request_succeeds(remote, fake, fault, chunked, step):
    client = remote(limits={"chunk_bytes": step})
    compressed(fake, BROKEN[fault], chunked=chunked)
    with pytest.raises(BadResponse, match="invalid gzip"):
        query(client, b"t/")
    compressed(fake, WHOLE, chunked=chunked)
    assert len(query(client, b"t/").pairs) == 50


def test_truncated_gzip_is_a_failure(remote, fake):
    client = remote()
    for length in range(len(WHOLE)):
        compressed(fake, WHOLE[:length])
        with pytest.raises(BadResponse, match="invalid gzip"):
            query(client, b"t/")
        compressed(fake, WHOLE[:length], length=len(WHOLE))
        fake.handle = lambda request, answer=fake.handle: request.send(answer(request).wire()) or None
        with pytest.raises(Unreachable):
            query(client, b"t/")


def test_garbled_gzip_is_a_failure_or_the_same_list(remote, fake):
    choose = random.Random(7)
    client = remote()
    for _ in range(100):
        garbled = bytearray(WHOLE)
        garbled[choose.randrange(len(garbled))] = choose.randrange(256)
        compressed(fake, bytes(garbled))
        try:
            assert len(query(client, b"t/").pairs) == 50
        except BadResponse:
            continue


@pytest.mark.parametrize("coding", ["deflate", "br", "gzip, gzip", "x-gzip", ""])
def test_unrequested_coding_is_a_failure(remote, fake, coding):
    compressed(fake, WHOLE, {**TRUE, "Content-Encoding": coding})
    with pytest.raises(BadResponse, match="unrequested compression"):
        query(remote(), b"t/")


def test_unrequested_gzip_is_a_failure(remote, fake, client):
    compressed(fake, WHOLE)
    with pytest.raises(BadResponse, match="unrequested compression"):
        query(client, b"t/")
    with pytest.raises(BadResponse, match="unrequested compression"):
        remote().get(ROOT, timeout=1)


def test_uncompressed_response_is_read(remote, fake):
    compressed(fake, BODY, TRUE)
    assert len(query(remote(), b"t/").pairs) == 50


def test_compressed_error_response_is_read(remote, fake):
    refusal = gzip.compress(b"Permission denied")
    fake.handle = lambda request: Answer(403, {"Content-Encoding": "gzip"}, refusal)
    with pytest.raises(Forbidden, match="403 Permission denied"):
        query(remote(), b"t/")
    fake.handle = lambda request: Answer(403, {"Content-Encoding": "gzip"}, refusal[:9])
    with pytest.raises(Forbidden, match="403"):
        query(remote(), b"t/")


def bomb(piece, times, start=b"", end=b""):
    """A gzip body of ``count`` equal pieces."""
    writer = zlib.compressobj(9, wbits=31)
    return b"".join(map(writer.compress, (start, *[piece] * times, end))) + writer.flush()


@pytest.mark.slow
def test_decompression_bomb_fails_over_in_bounded_memory(remote, fake):
    with FakeConsul() as other:
        compressed(fake, bomb(b" " * (1 << 20), 256, b"[", b"]"))
        compressed(other, WHOLE)
        client = remote(fake, other)
        tracemalloc.start()
        with pytest.raises(BadResponse, match="8 MiB without an entry"):
            query(client, b"t/")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 32 << 20
        assert len(query(client, b"t/").pairs) == 50


def test_decompression_bomb_of_large_values_is_too_large(remote, fake):
    piece = listing(("t/a", b"x" * (256 << 10)))[1:-1]
    compressed(fake, bomb(b"," + piece, 20, b"[" + piece, b"]"))
    with pytest.raises(TooLarge, match=r"4 MiB in \d+ entries is more than smtpd can use"):
        query(remote(limits={"body_bytes": 4 << 20}), b"t/")


def test_decompression_bomb_in_place_of_keys_is_an_error(remote, fake):
    compressed(fake, bomb(b" " * (1 << 20), 64, b"[", b"]"))
    with pytest.raises(BadResponse, match="8 MiB without an entry"):
        remote().visible_keys(b"t/", timeout=5)


@pytest.mark.parametrize(("entries", "kept"), [(50, True), (2000, True), (200_000, False)])
def test_small_unread_compressed_response_keeps_its_connection(remote, fake, entries, kept):
    body = listing(*((f"t/{number}", b"x") for number in range(entries)))
    compressed(fake, gzip.compress(body))
    client = remote()
    for _ in range(2):
        with client.blocking_query(b"t/", timeout=2) as response:
            assert response.index == 5
    assert [request.connection for request in fake.requests] == ([1, 1] if kept else [1, 2])
