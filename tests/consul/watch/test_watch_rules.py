"""How a watch handles indexes and folders. Waits, hidden keys and files have their own modules."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from table_consul.errors import Forbidden
from tests.consul.watch.watching import ALIAS, DOMAIN, PREFIX, ROOT, TABLE, ask, becomes, lines, lists, settled
from tests.dialogue import eventually

ELSEWHERE = replace(
    TABLE, services=("alias", "domain", "string"), paths={"domain": "shared/all", "string": "shared/all"}
)


def reads_again(fake, source):
    """Wait until two more waits have begun; no earlier query is then pending."""
    asked = len(lists(fake))
    for _ in eventually("two more waits", 10):
        if len(lists(fake)) >= asked + 2 and source.watches[0].backoff.since is None:
            return


def test_reaped_tombstones_hide_no_edit(fake, mirrored, waits_of, caplog):
    waits_of(0.1)
    fake.put(ALIAS + b"last", b"x")
    source = mirrored(fake.address)
    assert ask(source, b"last") == b"x"
    fake.delete(ALIAS + b"last")
    becomes(source, None, b"last")
    before = source.watches[0].index
    fake.store.reap()
    for _ in eventually("the index goes backwards", 10):
        if source.watches[0].index < before:
            break
    assert ask(source) == b"gilles"
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    assert lines(caplog) == []


def test_reaped_tombstones_cause_a_single_read(fake, mirrored, waits_of):
    waits_of(0.1)
    fake.put(ALIAS + b"last", b"x")
    source = mirrored(fake.address)
    settled(source)
    fake.delete(ALIAS + b"last")
    becomes(source, None, b"last")
    fake.store.reap()
    reads_again(fake, source)
    asked = len(lists(fake))
    reads_again(fake, source)
    assert ["consistent" in request.params for request in lists(fake)[asked:]].count(True) == 0


def test_restored_snapshot_with_the_same_index_is_read(fake, mirrored, waits_of):
    waits_of(0.2)
    source = mirrored(fake.address)
    settled(source)
    asked = len(lists(fake))
    for _ in eventually("the table is read again", 10):
        fake.store.restore(fake.index)  # repeated, because a reset between two waits ends neither
        if any("consistent" in request.params for request in lists(fake)[asked:]):
            break
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")


def test_restored_snapshot_with_the_same_index_returns_a_deleted_key(fake, mirrored, waits_of):
    waits_of(0.2)
    fake.put(ALIAS + b"vip", b"x")
    fake.put(ROOT, b"eric")
    source = mirrored(fake.address)
    settled(source)
    index, saved = source.watches[0].index, dict(fake.store.entries)
    fake.delete(ALIAS + b"vip")
    becomes(source, None, b"vip")
    fake.store.reap()
    for _ in eventually("the index is that of the snapshot", 10):
        if source.watches[0].index == index:
            break
    for _ in eventually("the key is back", 10):
        fake.store.restore_entries(saved)  # repeated, because one between two waits ends neither
        if ask(source, b"vip") == b"x":
            break


def test_index_that_goes_backwards_while_a_key_is_hidden_is_seen(fake, mirrored, waits_of):
    waits_of(0.2)
    fake.put(ALIAS + b"vip", b"x")
    fake.denied = (ALIAS + b"vip",)
    source = mirrored(fake.address)
    settled(source)
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    fake.reset_index(3)
    fake.put(ROOT, b"robert")
    becomes(source, b"robert")
    assert source.watches[0].index < 10


def test_new_folder_is_read(fake, mirrored):
    source = mirrored(fake.address, replace(TABLE, services=(*TABLE.services, "string")))
    assert ask(source, b"a", "string") is None
    fake.put(PREFIX + b"string/a", b"x")
    becomes(source, b"x", b"a", service="string")


def test_emptied_folder_does_not_affect_others(fake, mirrored):
    source = mirrored(fake.address)
    assert ask(source, b"example.org", "domain") == b"example.org"
    fake.delete(DOMAIN + b"example.org")
    becomes(source, None, b"example.org", service="domain")
    assert ask(source) == b"gilles"


def test_each_path_has_a_watch_and_services_with_one_path_see_the_same_edit(fake, mirrored):
    fake.put(b"shared/all/example.net", b"x")
    source = mirrored(fake.address, ELSEWHERE)
    settled(source)
    assert [watch.prefix for watch in source.watches] == [PREFIX, b"shared/all/"]
    assert (ask(source), ask(source, b"example.net", "domain")) == (b"gilles", b"x")
    fake.put(b"shared/all/example.net", b"y")
    for service in ("domain", "string"):
        becomes(source, b"y", b"example.net", service=service)
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    fake.delete(b"shared/all/example.net")
    for service in ("domain", "string"):
        becomes(source, None, b"example.net", service=service)


def test_forbidden_path_does_not_affect_the_other_folder(fake, mirrored):
    fake.put(b"shared/all/a", b"x")
    fake.denied = (b"shared/",)
    source = mirrored(fake.address, ELSEWHERE)
    settled(source)
    becomes(source, b"gilles")
    assert ask(source, b"nobody") is None
    for service in ("domain", "string"):
        with pytest.raises(Forbidden):
            ask(source, b"a", service)
