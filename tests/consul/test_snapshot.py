from __future__ import annotations

import os
import time

import pytest

from table_consul.services import Table
from table_consul.sources import snapshot as snapshot_module
from table_consul.sources.mirror import SnapshotBuilder
from table_consul.sources.snapshot import SnapshotFile

TABLE = Table("t", services=("alias", "domain"))
OLD_SECONDS = 5000.0


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(snapshot_module, "WRITE_SECONDS", 0.0)
    monkeypatch.setattr(snapshot_module, "TOUCH_SECONDS", 0.0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "copy.json"


@pytest.fixture
def copy(path):
    return SnapshotFile(str(path), TABLE, TABLE.root, TABLE.services)


def write(copy, pairs=((b"t/alias/root", b"gilles"),)):
    writer = copy.writer()
    loading = SnapshotBuilder(TABLE, TABLE.root, TABLE.services, None, {})
    for each in (loading, writer):
        each.take([*pairs])
    snapshot = loading.finish()
    copy.finish(writer, snapshot, changed=True)
    return snapshot


def age(copy):
    return copy.restored()[1]


def test_what_is_written_is_restored(copy):
    snapshot = write(copy)
    restored, _ = copy.restored()
    assert {name: bucket.values for name, bucket in restored.entries.items()} == {
        name: bucket.values for name, bucket in snapshot.entries.items()
    }
    assert restored.restored


def test_a_copy_is_as_old_as_what_consul_last_confirmed(copy, path):
    snapshot = write(copy)
    os.utime(path, (time.time() - OLD_SECONDS,) * 2)
    assert age(copy) >= OLD_SECONDS
    copy.finish(None, snapshot, changed=False)
    assert age(copy) < OLD_SECONDS


def test_what_has_changed_and_is_not_yet_written_makes_no_copy_younger(copy, path):
    snapshot = write(copy)
    os.utime(path, (time.time() - OLD_SECONDS,) * 2)
    copy.finish(None, snapshot, changed=True)
    assert (age(copy) >= OLD_SECONDS, copy.outdated) == (True, True)


def test_a_copy_that_was_removed_is_written_again(copy, path):
    snapshot = write(copy)
    path.unlink()
    copy.finish(None, snapshot, changed=False)
    assert copy.outdated
    write(copy)
    assert (path.exists(), copy.outdated) == (True, False)


def test_a_copy_is_confirmed_once_a_minute_at_most(copy, path, monkeypatch):
    monkeypatch.setattr(snapshot_module, "TOUCH_SECONDS", 60.0)
    snapshot = write(copy)
    os.utime(path, (time.time() - OLD_SECONDS,) * 2)
    copy.finish(None, snapshot, changed=False)
    assert age(copy) >= OLD_SECONDS
