"""Held deletions in a running watch: deleted folders, edits, updates, restarts, hidden keys."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from table_consul.config import Config, ConsulConfig
from table_consul.sources import mirror
from tests.consul.clients import closed_port
from tests.consul.watch.watching import (
    ALIAS,
    DOMAIN,
    PREFIX,
    ROOT,
    TABLE,
    ask,
    ask_table,
    becomes,
    lines,
    logged,
    reports_hidden_keys,
    settled,
    snapshot_entries,
    written,
)
from tests.dialogue import eventually
from tests.fake_consul.store import Store

NAMES = [b"user%d" % number for number in range(30)]
LAST = NAMES[-1]


@pytest.fixture
def filled(fake):
    for name in NAMES:
        fake.put(ALIAS + name, b"gilles")
    return fake


def delete(fake, names=NAMES):
    with fake.store.changed:
        for name in names:
            fake.delete(ALIAS + name)


def held(source):
    return sum(len(each.keys) for each in source.watches[0].mirror.state[0].held.values())


def is_held(source, count):
    for _ in eventually(f"{count} deletions are held", 10):
        if held(source) == count:
            return


def test_deleted_folder_still_answers_and_is_logged_once(filled, mirrored, caplog):
    source = mirrored(filled.address)
    settled(source)
    delete(filled)
    logged(caplog, "mail/aliases/alias/: 30 of 31 entries deleted at once; serving them for another 900 s")
    filled.put(ROOT, b"eric")
    becomes(source, b"eric")
    assert (ask(source, LAST), ask(source, b"nobody"), held(source)) == (b"gilles", None, 30)
    assert len(lines(caplog)) == 1


def test_hold_ends_after_its_time_without_a_change_in_consul(filled, mirrored, caplog):
    source = mirrored(filled.address, replace(TABLE, hold_deletions=0.5))
    settled(source)
    delete(filled)
    is_held(source, 30)
    becomes(source, None, LAST)
    logged(caplog, "hold_deletions expired: no longer serving 30 deleted entries")
    assert held(source) == 0


def test_returned_keys_end_a_hold(filled, mirrored, caplog):
    source = mirrored(filled.address)
    settled(source)
    delete(filled)
    is_held(source, 30)
    for name in NAMES:
        filled.put(ALIAS + name, b"eric")
    becomes(source, b"eric", LAST)
    logged(caplog, "mail/aliases/alias/: all deleted entries are back")
    assert held(source) == 0


def test_update_accepts_held_deletions(filled, mirrored, caplog):
    source = mirrored(filled.address)
    settled(source)
    delete(filled)
    is_held(source, 30)
    source.update()
    becomes(source, None, LAST)
    logged(caplog, "deletion accepted: no longer serving 30 deleted entries")
    assert (ask(source), held(source)) == (b"gilles", 0)


def test_update_accepts_one_deletion_and_not_the_next(filled, mirrored):
    source = mirrored(filled.address)
    settled(source)
    source.update()
    delete(filled)
    source.update()
    becomes(source, None, LAST)
    for name in NAMES:
        filled.put(ALIAS + name, b"gilles")
    becomes(source, b"gilles", LAST)
    delete(filled)
    is_held(source, 30)
    assert ask(source, LAST) == b"gilles"


def test_update_during_an_outage_accepts_only_held_deletions(filled, mirrored):
    more = [b"more%d" % number for number in range(40)]
    for name in more:
        filled.put(DOMAIN + name, b"")
    source = mirrored(filled.address)
    settled(source)
    delete(filled)
    is_held(source, 30)
    filled.stop()
    source.update()
    for _ in eventually("several failures", 10):
        if source.watches[0].backoff.failures > 1:
            break
    with filled.store.changed:
        for name in more:
            filled.delete(DOMAIN + name)
    filled.start()
    becomes(source, None, LAST)
    assert (held(source), ask(source, more[0], "domain")) == (40, more[0])


def test_update_with_other_settings_accepts_held_deletions(filled, sources):
    source = sources(filled.address)
    assert ask_table(source, LAST) == b"gilles"
    delete(filled)
    (watch,) = (watch for _, watch in source.watches())
    for _ in eventually("held", 10):
        if watch.mirror.state[0].held:
            break
    settings = ConsulConfig(addresses=(filled.address,))
    source.box[0] = Config(None, consul=settings, defaults=replace(TABLE, hold_deletions=1000.0))
    source.update()
    for _ in eventually("the deletion is accepted", 10):
        if ask_table(source, LAST) is None:
            break


def test_replacement_by_an_empty_consul_is_held_for_folders_of_any_size(fake, mirrored, caplog, waits_of):
    waits_of(0.3)  # a change of the index between two waits is noticed at the end of the next
    fake.put(ROOT, b"eric")
    source = mirrored(fake.address)
    settled(source)
    fake.stop()
    fake.store = Store()
    fake.start()
    logged(caplog, "mail/aliases/alias/: 1 of 1 entry deleted at once; serving them for another 900 s")
    assert (ask(source), ask(source, b"example.org", "domain"), held(source)) == (b"eric", b"example.org", 2)


def test_restored_backup_that_lacks_a_few_entries_is_not_held(filled, mirrored, waits_of):
    waits_of(0.3)
    source = mirrored(filled.address)
    settled(source)
    filled.stop()
    filled.store = Store()
    for key in (DOMAIN + b"example.org", *(ALIAS + name for name in NAMES[:-5])):
        filled.put(key, b"gilles")
    filled.start()
    becomes(source, None, LAST)
    assert (ask(source, NAMES[0]), held(source)) == (b"gilles", 0)


def test_hold_survives_an_outage(filled, mirrored):
    source = mirrored(filled.address)
    settled(source)
    delete(filled)
    is_held(source, 30)
    filled.stop()
    for _ in eventually("a failure", 10):
        if source.watches[0].backoff.failures:
            break
    filled.start()
    filled.put(ROOT, b"eric")
    becomes(source, b"eric")
    assert (ask(source, LAST), held(source)) == (b"gilles", 30)


# ---- a restart ----


def test_restart_restores_held_entries_except_credentials(filled, mirrored, copied, tmp_path):
    copied = replace(copied, services=("alias", "credentials"))
    for name in NAMES:
        filled.put(PREFIX + b"credentials/" + name, b"secret")
    path = tmp_path / "copy.json"
    source = mirrored(filled.address, copied)
    written(path, {"mail/aliases/alias/user29": b"gilles", "mail/aliases/credentials/user29": b"secret"})
    with filled.store.changed:
        delete(filled)
        for name in NAMES:
            filled.delete(PREFIX + b"credentials/" + name)
    is_held(source, 30)
    filled.put(ROOT, b"eric")
    written(path, {"mail/aliases/alias/user29": b"gilles", "mail/aliases/alias/root": b"eric"})
    assert "mail/aliases/credentials/user29" not in snapshot_entries(path)
    source.close()
    again = mirrored(filled.address, copied)
    settled(again)
    assert (ask(again, LAST), ask(again, LAST, "credentials"), held(again)) == (b"gilles", None, 30)


def test_restart_without_a_snapshot_ends_the_hold(filled, mirrored):
    source = mirrored(filled.address)
    settled(source)
    delete(filled)
    is_held(source, 30)
    source.close()
    again = mirrored(filled.address)
    settled(again)
    assert (ask(again, LAST), held(again)) == (None, 0)


def test_accepted_deletions_are_gone_from_the_snapshot_file(filled, mirrored, copied, tmp_path):
    path = tmp_path / "copy.json"
    source = mirrored(filled.address, copied)
    written(path, {"mail/aliases/alias/user29": b"gilles"})
    delete(filled)
    is_held(source, 30)
    source.update()
    for _ in eventually("the file has no deleted key", 10):
        if path.exists() and "mail/aliases/alias/user29" not in snapshot_entries(path):
            break
    source.close()
    again = mirrored(closed_port(), copied)
    becomes(again, b"gilles")
    assert ask(again, LAST) is None


# ---- hidden keys ----


def test_hidden_keys_are_not_held(filled, mirrored):
    source = mirrored(filled.address)
    settled(source)
    filled.denied = (ALIAS,)
    filled.put(PREFIX + b"zz", b"wakes the watch")
    for _ in eventually("the key is hidden", 10):
        if "alias" in source.watches[0].mirror.state[0].hidden:
            break
    assert held(source) == 0


@reports_hidden_keys
def test_proven_deletions_are_held_where_another_key_is_hidden(filled, mirrored, monkeypatch):
    monkeypatch.setattr(mirror, "MAX_ABSENCE_CHECKS", 10)
    filled.put(ALIAS + b"vip", b"x")
    filled.denied = (ALIAS + b"vip",)
    source = mirrored(filled.address)
    settled(source)
    delete(filled)
    is_held(source, 30)
    assert ask(source, LAST) == b"gilles"
