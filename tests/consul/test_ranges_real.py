"""Ranges against a real Consul: answers agree with its keys after any writes."""

from __future__ import annotations

import contextlib
import itertools
import json
from base64 import b64encode

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from table_consul import kv
from table_consul.config import ConsulConfig
from table_consul.services import Table
from table_consul.sources.watch import MirrorSource
from tests.consul.real import agent_or_skip, url
from tests.consul.watch.watching import ask, make_ranges_small
from tests.dialogue import eventually

pytestmark = pytest.mark.real

STEADY = [f"{letter}{number}" for letter in "abcdef" for number in range(8)]
numbers = itertools.count()


@pytest.fixture
def small(monkeypatch):
    make_ranges_small(monkeypatch, 8, late=0.1, soon=0.1)


KEYS = st.text("abfgz", min_size=1, max_size=3) | st.sampled_from(
    ["é", "日本", "a.b@example.org", "*", "x y", "Ab", "G"]
)
VALUES = st.sampled_from(["eric", "gilles", "root, eric", "x" * 20])
WRITES = st.tuples(KEYS, VALUES | st.none())
"""A key and its value; None deletes it."""


def write(agent, table, pairs):
    """Write all entries in one transaction."""
    operations = []
    for key, value in pairs.items():
        kind = {"Verb": "delete"} if value is None else {"Verb": "set", "Value": b64encode(value.encode()).decode()}
        operations.append({"KV": {"Key": f"{table}/alias/{key}"} | kind})
    for at in range(0, len(operations), 64):
        agent.request("PUT", "/v1/txn", json.dumps(operations[at : at + 64]).encode())


def folded(written):
    """The answers after these writes, by folded key: the lower-case key takes precedence, then the first."""
    answers = {}
    for key, value in sorted(written.items()):
        if value is not None and (key == key.lower() or answers.get(key.lower()) is None):
            answers[key.lower()] = value.encode()
        answers.setdefault(key.lower(), None)
    return answers


@pytest.fixture(scope="module")
def unlimited_consul():
    """A Consul without a low connection limit: each example leaves waits behind that count for 10 seconds."""
    with agent_or_skip(hcl="limits { http_max_conns_per_client = 5000 }") as agent:
        yield agent


@pytest.mark.usefixtures("small")
@settings(max_examples=60, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(WRITES, min_size=1, max_size=12).map(dict), min_size=1, max_size=40))
def test_answers_after_random_writes_agree_with_consul(unlimited_consul, transactions):
    table = Table(f"model{next(numbers)}", services=("alias", "domain"))
    write(unlimited_consul, table.name, dict.fromkeys(STEADY, "steady"))
    source = MirrorSource(table, lambda: kv.Client(ConsulConfig(addresses=(url(unlimited_consul),))))
    try:
        written = {}
        for pairs in transactions:
            write(unlimited_consul, table.name, pairs)
            written |= pairs
            assert all(ask(source, name.encode()) == b"steady" for name in STEADY if name not in written)
        wanted = folded(written)
        found = {}
        with contextlib.suppress(AssertionError):
            for _ in eventually("the right answers", 10):
                found = {key: ask(source, key.encode()) for key in wanted}
                if found == wanted:
                    break
        assert found == wanted
    finally:
        source.close()
