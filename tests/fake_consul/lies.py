"""Answers that Consul would not give, for `FakeConsul.handle`."""

from __future__ import annotations

import json
from collections.abc import Callable

from tests.fake_consul.messages import Answer, Request


def html(_request: Request) -> Answer:
    """The page of a proxy that knows no Consul behind it."""
    return Answer(200, {"Content-Type": "text/html"}, b"<html><title>Welcome to nginx!</title></html>")


def stall(request: Request) -> None:
    """Read the request and never answer."""
    request.stopping.wait(60)


def trickle(answer: Answer, *, pause: float = 0.05) -> Callable[[Request], None]:
    """The answer, headers too, a byte at a time with a pause after each."""

    def handle(request: Request) -> None:
        for byte in answer.wire():
            request.send(bytes([byte]))
            if request.stopping.wait(pause):
                return

    return handle


def cut(answer: Answer, length: int) -> Callable[[Request], None]:
    """The first bytes of the answer, then the end of the connection."""
    return lambda request: request.send(answer.wire()[:length])


def entry(key: bytes, value: object, *, status: int = 200, index: str = "5") -> Answer:
    """An answer to one key whose Value is just what is given, be it base64 or not."""
    body = json.dumps([{"Key": key.decode(), "Value": value, "ModifyIndex": 5}]).encode()
    return Answer(status, {"X-Consul-Index": index, "X-Consul-Knownleader": "true"}, body)
