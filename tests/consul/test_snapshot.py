from __future__ import annotations

import os
import time

import pytest

from table_consul.services import Table
from table_consul.sources.mirror import SnapshotBuilder
from table_consul.sources.snapshot import SnapshotFile

TABLE = Table("t", services=("alias", "domain"))
OLD_SECONDS = 5000.0


@pytest.fixture
def path(tmp_path):
    return tmp_path / "copy.json"


@pytest.fixture
def file(path):
    return SnapshotFile(str(path), TABLE, TABLE.root, TABLE.services, write_seconds=0.0)


def write(file, pairs=((b"t/alias/root", b"gilles"),)):
    builder = SnapshotBuilder(TABLE, TABLE.root, TABLE.services, None)
    file.begin()
    for each in (builder.take, file.take):
        each([*pairs])
    snapshot = builder.finish({})
    file.finish(snapshot, changed=True)
    return snapshot


def age(file):
    return file.load()[1]


def test_what_is_written_is_restored(file):
    snapshot = write(file)
    restored, _ = file.load()
    assert {name: bucket.values for name, bucket in restored.entries.items()} == {
        name: bucket.values for name, bucket in snapshot.entries.items()
    }
    assert restored.restored


def test_a_copy_is_as_old_as_what_consul_last_confirmed(file, path):
    snapshot = write(file)
    os.utime(path, (time.time() - OLD_SECONDS,) * 2)
    assert age(file) >= OLD_SECONDS
    file.finish(snapshot, changed=False)
    assert age(file) < OLD_SECONDS


def test_what_has_changed_and_is_not_yet_written_makes_no_copy_younger(file, path):
    snapshot = write(file)
    os.utime(path, (time.time() - OLD_SECONDS,) * 2)
    file.finish(snapshot, changed=True)
    assert (age(file) >= OLD_SECONDS, file.dirty) == (True, True)


def test_a_copy_that_was_removed_is_written_again(file, path):
    snapshot = write(file)
    path.unlink()
    file.finish(snapshot, changed=False)
    assert file.dirty
    write(file)
    assert (path.exists(), file.dirty) == (True, False)
