"""A fake Consul for tests: the key-value part of its HTTP interface, over http, https or a Unix socket.

It answers as a given version of Consul does, which recorded answers of real ones (tests/consul/answers) verify. A test
of misbehaviour sets `handle`:

    with FakeConsul(version="1.8.7") as fake:
        fake.put(b"consul/alias/root", b"gilles")
        fake.tokens["s3cret"] = 'key_prefix "consul/" { policy = "read" }'
        fake.handle = html                      # an invalid response
        fake.handle = lambda request: Answer(403, body=b"Permission denied")
        fake.handle = fake.consul               # valid responses again
"""

from __future__ import annotations

from tests.fake_consul.invalid import cut, entry, html, stall, trickle
from tests.fake_consul.messages import Answer, Request
from tests.fake_consul.server import VERSIONS, FakeConsul

__all__ = ["VERSIONS", "Answer", "FakeConsul", "Request", "cut", "entry", "html", "stall", "trickle"]
