from __future__ import annotations

import threading

import pytest
from msgspec.structs import replace

from table_consul import kv
from table_consul.config import Config, ConsulConfig
from table_consul.sources.watch import MirrorSource
from table_consul.tables import Tables
from tests.consul.watch.watching import (
    DOMAIN,
    ROOT,
    TABLE,
)
from tests.fake_consul import VERSIONS, FakeConsul


@pytest.fixture(params=VERSIONS)
def version(request):
    """The version of the fake; modules and tests parametrize it if they need fewer."""
    return request.param


@pytest.fixture
def fake(version):
    with FakeConsul(version=version) as server:
        server.put(ROOT, b"gilles")
        server.put(DOMAIN + b"example.org", b"")
        yield server


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("table_consul.backoff.FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr("table_consul.backoff.LAST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr("table_consul.sources.snapshot.WRITE_SECONDS", 0.0)


@pytest.fixture
def mirrored():
    made = []

    def make(addresses, table=TABLE, former=None, **options):
        addresses = (addresses,) if isinstance(addresses, str) else tuple(addresses)
        # Consul reports hidden keys only to requests with a token.
        settings = ConsulConfig(addresses=addresses, **{"token": "any"} | options)
        made.append(MirrorSource(table, lambda: kv.Client(settings), former))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(autouse=True)
def no_thread_dies():
    failures = []
    before, threading.excepthook = threading.excepthook, failures.append
    yield
    threading.excepthook = before
    assert failures == []


@pytest.fixture
def sources(tmp_path):
    made = []

    def make(addresses, table=TABLE, **options):
        addresses = (addresses,) if isinstance(addresses, str) else tuple(addresses)
        box = [Config(None, consul=ConsulConfig(addresses=addresses, **options), defaults=table)]

        def load():
            if isinstance(box[0], Exception):
                raise box[0]
            return box[0]

        source = Tables(load)
        source.box = box
        made.append(source)
        return source

    yield make
    for source in made:
        source.close()


@pytest.fixture
def copied(tmp_path):
    return replace(TABLE, snapshot=str(tmp_path / "copy.json"))


@pytest.fixture
def waits_of(monkeypatch):
    """Set the length of every wait, in seconds, with or without hidden keys."""

    def patch(seconds):
        for name in ("MOST_WAIT_SECONDS", "SHORT_WAIT_SECONDS"):
            monkeypatch.setattr(f"table_consul.sources.mirror.{name}", seconds)

    return patch
