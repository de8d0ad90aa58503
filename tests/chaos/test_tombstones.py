"""Consul forgets deletions after 15 minutes; the index of their prefix then goes backwards, and no wait ends."""

from __future__ import annotations

import time
import urllib.request

import pytest
from msgspec.structs import replace

from table_consul import kv
from table_consul.config import ConsulConfig
from table_consul.sources.watch import MirrorSource
from tests.consul.real import TABLE, agent_or_skip, url
from tests.consul.watch.watching import ask, becomes, lines, make_ranges_small
from tests.dialogue import eventually

pytestmark = pytest.mark.real

# Consul's TombstoneTTL, its granularity of 30 seconds, and some time for a busy machine.
REAPED_SECONDS = 15 * 60 + 30 + 60
NAMES = [f"{letter}{number}" for letter in "abcdef" for number in range(6)]


def index_of(agent, prefix):
    with urllib.request.urlopen(f"{url(agent)}/v1/kv/{prefix}?keys", timeout=5) as response:
        return int(response.headers["X-Consul-Index"])


@pytest.mark.timeout(REAPED_SECONDS + 120)
def test_reaped_tombstones_hide_no_edit(monkeypatch, caplog):
    monkeypatch.setattr("table_consul.sources.mirror.MOST_WAIT_SECONDS", 20.0)
    make_ranges_small(monkeypatch, 6, late=0.5, soon=0.5)
    small, large = replace(TABLE, prefix="small"), replace(TABLE, prefix="large")
    with agent_or_skip() as agent:
        agent.kv_txn({f"small/aliases/alias/{name}": "old" for name in ("a1", "last")})
        agent.kv_txn({f"large/aliases/alias/{name}": "old" for name in (*NAMES, "last")})
        settings = ConsulConfig(addresses=(url(agent),))
        sources = [MirrorSource(table, lambda: kv.Client(settings), None) for table in (small, large)]
        try:
            for source, prefix in zip(sources, ("small/", "large/"), strict=True):
                assert ask(source, b"last") == b"old"
                agent.kv_delete(f"{prefix}aliases/alias/last")
                becomes(source, None, b"last")
            # Later writes elsewhere, so that the index of the store is not the one of a table.
            agent.kv_put("elsewhere", "x")
            before = {prefix: index_of(agent, prefix) for prefix in ("small/", "large/")}
            for prefix, index in before.items():
                for _ in eventually(f"the tombstone of {prefix} is reaped", REAPED_SECONDS):
                    if index_of(agent, prefix) < index:
                        break
                    time.sleep(1.0)
            whole = sources[0].watches[0]
            for _ in eventually("a wait ends at the lower index", 60):
                if whole.index < before["small/"]:
                    break
            for source, prefix in zip(sources, before, strict=True):
                assert (ask(source, b"a1"), ask(source, b"last")) == (b"old", None)
                agent.kv_put(f"{prefix}aliases/alias/a1", "new")
                becomes(source, b"new", b"a1")
            assert lines(caplog) == []
        finally:
            for source in sources:
                source.close()
