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

numbers = itertools.count()


# Keys for each letter, which make a range without parts or with three.
SIZES = {"whole": 8, "in parts": 25}


@pytest.fixture(params=SIZES.values(), ids=SIZES)
def steady(request, monkeypatch):
    make_ranges_small(monkeypatch, request.param, late=0.1, soon=0.1)
    return {f"{letter}{number:02}" for letter in "abcdef" for number in range(request.param)}


KEYS = st.text("abfgz", min_size=1, max_size=3) | st.sampled_from(
    ["é", "日本", "a.b@example.org", "*", "x y", "Ab", "G", "a01", "b13", "B13", "f24", "f25", "f30"]
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
    """A Consul with a high connection limit, because the waits that each example leaves behind count for 10 seconds."""
    with agent_or_skip(hcl="limits { http_max_conns_per_client = 5000 }") as agent:
        yield agent


@settings(max_examples=40, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(WRITES, min_size=1, max_size=12).map(dict), min_size=25, max_size=40))
def test_answers_after_random_writes_agree_with_consul(unlimited_consul, steady, transactions):
    table = Table(f"model{next(numbers)}", services=("alias", "domain"))
    written = dict.fromkeys(steady, "steady")
    write(unlimited_consul, table.name, written)
    untouched = steady
    source = MirrorSource(table, lambda: kv.Client(ConsulConfig(addresses=(url(unlimited_consul),))))
    try:
        for pairs in transactions:
            write(unlimited_consul, table.name, pairs)
            written |= pairs
            untouched = untouched - {key.lower() for key in pairs}
            assert all(ask(source, name.encode()) == b"steady" for name in untouched)
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
