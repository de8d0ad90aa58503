"""Clients of fakes, and invalid responses to feed them."""

from __future__ import annotations

import socket
import time

import pytest

from table_consul.config import ConsulConfig
from table_consul.errors import BadResponse, Forbidden, SourceError, Unreachable
from tests.fake_consul import VERSIONS, Answer, cut, entry, html, stall, trickle

ROOT = b"consul/alias/root"
# For tests in which the fake answers as Consul does.
each_version = pytest.mark.parametrize("version", VERSIONS)
# How far beyond its deadline a call may return on a busy machine before a test fails.
SLACK = 0.5
TRUE = {"X-Consul-Index": "5", "X-Consul-Knownleader": "true"}


def config(*addresses, **options):
    return ConsulConfig(addresses=addresses, **options)


class Silent:
    """A port that accepts connections and sends nothing; with `full`, its queue is full and connecting hangs."""

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
    """The error of a read, which must fail within the timeout."""
    begun = time.monotonic()
    with pytest.raises(SourceError) as caught:
        client.get(key, timeout=timeout)
    assert time.monotonic() - begun < timeout + SLACK
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 400
    return caught.value


def body(text, **headers):
    return lambda request: Answer(200, TRUE | headers, text)


def _negative_chunk(status):
    head = b"HTTP/1.1 %b\r\nX-Consul-Index: 5\r\nX-Consul-Knownleader: true\r\nTransfer-Encoding: chunked\r\n\r\n"
    return lambda request: request.send(head % status + b"-2\r\nx\r\n")


GOOD = entry(ROOT, "Zg==")
INVALID = {
    "html": (html, BadResponse),
    "html with an index": (body(b"<html>"), BadResponse),
    "no body": (body(b""), BadResponse),
    "null": (body(b"null"), BadResponse),
    "an object": (body(b'{"Key": "consul/alias/root"}'), BadResponse),
    "cut json": (body(GOOD.body[:-1]), BadResponse),
    "json and more": (body(GOOD.body + b"x"), BadResponse),
    "no utf-8": (body(GOOD.body.replace(b"root", b"r\xfft")), BadResponse),
    "a key that is not a string": (body(GOOD.body.replace(b'"consul/alias/root"', b"5")), BadResponse),
    "no value": (body(b'[{"Key":"consul/alias/root","ModifyIndex":1}]'), BadResponse),
    "a value that is not a string": (lambda request: entry(ROOT, 5), BadResponse),
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
        BadResponse,
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
    **{
        f"a negative chunk in {status}": (_negative_chunk(status), SourceError)
        for status in (b"200 OK", b"500 Internal Server Error")
    },
}


class query:  # noqa: N801 - reads like a call
    """A blocking query that was read to its end."""

    def __init__(self, client, prefix=b"consul/", **options):
        with client.blocking_query(prefix, **{"timeout": 2, **options}) as response:
            self.index, self.filtered = response.index, response.filtered
            self.batches = list(response.pairs())
        self.pairs = [(pair.key, pair.value) for batch in self.batches for pair in batch]
