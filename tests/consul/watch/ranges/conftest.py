"""Fixtures of a small table that is watched in ranges."""

from __future__ import annotations

import pytest

from table_consul.sources import ranges, watch
from tests.consul.watch.ranges.ranged_tables import (
    LATE_SECONDS,
    LONG_LATE_SECONDS,
    NAMES,
    ended,
    ranged_watch,
    watching_threads,
)
from tests.consul.watch.watching import (
    ALIAS,
    make_ranges_small,
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_ranges_small(monkeypatch, 6, late=LATE_SECONDS, soon=0.1)
    monkeypatch.setattr(watch, "JITTER_SECONDS", 0.0)


@pytest.fixture
def no_late_query(small, monkeypatch):
    monkeypatch.setattr(ranges, "LATE_SECONDS", LONG_LATE_SECONDS)


@pytest.fixture(autouse=True)
def queries_end():
    before = watching_threads()
    yield
    ended(before)


@pytest.fixture
def fake(fake):
    for name in NAMES:
        fake.put(ALIAS + name, b"old")
    return fake


@pytest.fixture
def source(fake, mirrored):
    return ranged_watch(fake, mirrored(fake.address))
