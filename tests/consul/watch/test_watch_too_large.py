from __future__ import annotations

import threading
from pathlib import Path

import pytest
from msgspec.structs import replace

from table_consul import kv
from table_consul.config import Config, ConsulConfig
from table_consul.errors import TooLarge
from table_consul.sources.watch import MirrorSource
from table_consul.tables import MAX_MIRRORED_TABLES
from tests.consul.watch.watching import (
    ALIAS,
    ROOT,
    TABLE,
    ask,
    ask_table,
    becomes,
    lines,
    settled,
    written,
)
from tests.dialogue import eventually

pytestmark = pytest.mark.parametrize("version", ["1.22"])


def test_table_that_stays_too_large_is_logged_once(fake, mirrored, caplog):
    source = mirrored(fake.address, replace(TABLE, max_keys=1))
    for _ in range(3):
        asked = len(fake.requests)
        source.update()
        for _ in eventually("the mirror is tried again", 10):
            if len(fake.requests) > asked and source.watches[0].too_large:
                break
    source.close()
    source.watches[0].join(10)
    assert len(lines(caplog)) == 1
    assert source.by_service["alias"].mirror.state is None


def test_table_above_max_keys_is_read_directly_from_the_first_answer(fake, sources, caplog):
    source = sources(fake.address, replace(TABLE, max_keys=1))
    assert [ask_table(source), ask_table(source, b"nobody"), ask_table(source)] == [b"gilles", None, b"gilles"]
    assert [line for line in lines(caplog) if "max_keys" in line] == [
        "mail/aliases/ holds more than max_keys = 1 keys: falling back to direct mode (one Consul read per lookup)"
    ]


def test_table_that_grows_too_large_is_read_directly_until_it_shrinks(fake, sources, caplog):
    source = sources(fake.address, replace(TABLE, max_keys=2))
    assert ask_table(source) == b"gilles"
    fake.put(ALIAS + b"one too many", b"x")
    ((_, one),) = source.watches()
    for _ in eventually("too large", 10):
        if one.too_large:
            break
    asked = len(fake.requests)
    assert (ask_table(source), ask_table(source, b"4"), len(fake.requests) - asked) == (b"gilles", None, 3)
    fake.delete(ALIAS + b"one too many")
    source.update()
    for _ in eventually("no longer too large", 10):
        if not one.too_large:
            break
    asked = len(fake.requests)
    assert ask_table(source) == b"gilles"
    assert [request for request in fake.requests[asked:] if "recurse" not in request.params] == []
    assert "mail/aliases/: no longer too large, serving it from memory again" in lines(caplog)


def test_update_of_an_unrelated_setting_keeps_reading_a_table_that_is_too_large_directly(fake, sources, copied):
    table = replace(copied, max_keys=2)
    source = sources(fake.address, table)
    assert ask_table(source) == b"gilles"
    written(Path(copied.snapshot), {"mail/aliases/alias/root": b"gilles"})
    fake.put(ALIAS + b"newer", b"eric")
    ((_, one),) = source.watches()
    for _ in eventually("too large", 10):
        if one.too_large:
            break
    assert ask_table(source, b"newer") == b"eric"
    slow = threading.Event()

    def handle(request):
        if "recurse" in request.params:
            slow.wait(10)
        return fake.consul(request)

    fake.handle = handle
    source.box[0] = Config(None, consul=ConsulConfig(addresses=(fake.address,)), defaults=replace(table, max_age=60.0))
    source.update()
    try:
        assert [ask_table(source, b"newer") for _ in range(2)] == [b"eric", b"eric"]
    finally:
        slow.set()


def state_is_none(source):
    for _ in eventually("the state is None", 10):
        if source.by_service["alias"].mirror.state is None:
            return


def test_state_of_a_mirror_is_none_when_the_table_grew_too_large(fake, mirrored):
    source = mirrored(fake.address, replace(TABLE, max_keys=2))
    settled(source)
    assert source.by_service["alias"].mirror.state is not None
    fake.put(ALIAS + b"one too many", b"x")
    state_is_none(source)
    assert source.by_service["alias"].too_large
    with pytest.raises(TooLarge):
        ask(source)


def test_state_of_a_mirror_does_not_change_after_it_was_closed(fake, mirrored):
    held = threading.Event()
    source = mirrored(fake.address)
    settled(source)
    fake.handle = lambda request: held.wait(10) and fake.consul(request)
    source.update()
    source.close()
    state = source.by_service["alias"].mirror.state
    held.set()
    fake.put(ROOT, b"eric")
    source.watches[0].join(10)
    assert source.by_service["alias"].mirror.state is state


def test_table_with_too_much_data_is_read_directly(fake):
    client = kv.Client(ConsulConfig(addresses=(fake.address,)))
    client.body_bytes = client.entry_bytes = 1000
    fake.put(ALIAS + b"large", b"x" * 4000)
    source = MirrorSource(TABLE, lambda: client)
    for _ in eventually("too large", 10):
        if source.by_service["alias"].too_large:
            break
    source.close()


def test_path_elsewhere_has_its_own_watch(fake, mirrored):
    fake.put(b"shared/people/root", b"robert")
    source = mirrored(fake.address, replace(TABLE, paths={"alias": "shared/people"}))
    assert sorted(each.name for each in source.watches) == ["watch mail/aliases/", "watch shared/people/"]
    assert (ask(source), ask(source, b"example.org", "domain")) == (b"robert", b"example.org")
    fake.put(b"shared/people/root", b"eric")
    becomes(source, b"eric")


def test_tables_beyond_the_limit_of_mirrors_are_read_directly(fake, sources):
    source = sources(fake.address)
    for number in range(MAX_MIRRORED_TABLES + 3):
        fake.put(b"mail/table%d/alias/root" % number, b"%d" % number)
    for number in range(MAX_MIRRORED_TABLES + 3):
        assert ask_table(source, name=f"table{number}") == b"%d" % number
    assert len(source.watches()) == MAX_MIRRORED_TABLES


def test_table_too_large_for_a_mirror_finds_keys_in_any_case(fake, sources):
    fake.put(ALIAS + b"Postmaster", b"eric")
    source = sources(fake.address, replace(TABLE, max_keys=1))
    assert (ask_table(source, b"postmaster"), ask_table(source, b"nobody")) == (b"eric", None)
    asked = len(fake.requests)
    assert (ask_table(source, b"postmaster"), ask_table(source, b"somebody")) == (b"eric", None)
    assert [request for request in fake.requests[asked:] if "keys" in request.params] == []  # cached


def test_table_beyond_the_limit_of_mirrors_finds_keys_in_any_case(fake, sources, monkeypatch):
    monkeypatch.setattr("table_consul.tables.MAX_MIRRORED_TABLES", 0)
    fake.put(ALIAS + b"Postmaster", b"eric")
    assert ask_table(sources(fake.address), b"postmaster") == b"eric"
