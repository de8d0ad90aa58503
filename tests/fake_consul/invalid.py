"""Invalid responses for `FakeConsul.handle`."""

from __future__ import annotations

import json
from collections.abc import Callable

from tests.fake_consul.messages import Answer, Request


def html(_request: Request) -> Answer:
    """The error page of a proxy without a backend."""
    return Answer(200, {"Content-Type": "text/html"}, b"<html><title>Welcome to nginx!</title></html>")


def stall(request: Request) -> None:
    """Read the request and never answer."""
    request.stopping.wait(60)


def trickle(answer: Answer, *, pause: float = 0.05) -> Callable[[Request], None]:
    """Send headers and body one byte at a time, with a pause after each."""

    def handle(request: Request) -> None:
        for byte in answer.wire():
            request.send(bytes([byte]))
            if request.stopping.wait(pause):
                return

    return handle


def cut(answer: Answer, length: int) -> Callable[[Request], None]:
    """Send the first bytes of the response, then close the connection."""
    return lambda request: request.send(answer.wire()[:length])


def entry(key: bytes, value: object, *, status: int = 200, index: str = "5") -> Answer:
    """The response for one key with this Value, which may be invalid base64."""
    body = json.dumps([{"Key": key.decode(), "Value": value, "ModifyIndex": 5}]).encode()
    return Answer(status, {"X-Consul-Index": index, "X-Consul-Knownleader": "true"}, body)
