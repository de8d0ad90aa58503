"""The on-disk snapshot: what is restored, its age, files of other tables, and write failures."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from types import SimpleNamespace

import pytest
from msgspec.structs import replace

from table_consul.services import Table
from table_consul.sources.hold import Held
from table_consul.sources.mirror import SnapshotBuilder
from table_consul.sources.snapshot import SnapshotFile

OLD_SECONDS = 5000.0
TABLE = Table("t", services=("alias", "domain"))


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("table_consul.sources.snapshot.WRITE_SECONDS", 0.0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "copy.json"


@pytest.fixture
def file(path):
    return file_of(path)


def file_of(path, table=TABLE):
    return SnapshotFile(str(path), table, table.root, table.services)


def write(file, pairs=((b"t/alias/root", b"gilles"),), table=TABLE):
    builder = SnapshotBuilder(table, table.root, table.services, None)
    file.begin()
    for each in (builder.take, file.take):
        each([*pairs])
    snapshot = builder.finish({})
    file.finish(snapshot, changed=True)
    return snapshot


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("other", "pairs"),
    [
        (Table("other", services=("alias",)), [(b"other/alias/root", b"eric")]),
        (Table("other", services=("alias",)), []),
        # A folder below that of the table.
        (Table("o", prefix="t", services=("alias",)), [(b"t/o/alias/root", b"eric")]),
        # Two tables with one folder.
        (Table("other", services=("alias",), paths={"alias": "t/alias"}), [(b"t/alias/root", b"eric")]),
    ],
)
def test_snapshot_of_another_table_is_not_changed(file, path, caplog, other, pairs):
    snapshot = write(file)
    path.unlink()
    write(file_of(path, other), pairs, other)
    os.utime(path, (1.0, 1.0))
    theirs = path.read_bytes()
    file.finish(snapshot, changed=False)
    for _ in range(3):
        write(file)
    assert (path.read_bytes(), path.stat().st_mtime) == (theirs, 1.0)
    hint = "(put {table} into the path, or remove the file)"
    assert warnings(caplog)[-1] == f"{path}: not written: it is the snapshot of table {other.name} {hint}"
    assert len(warnings(caplog)) == 1
    path.unlink()
    write(file)
    assert path.exists()
    assert warnings(caplog)[-1] == f"{path}: written again"


def test_export_of_other_keys_is_not_replaced(file, path, caplog):
    path.write_text('[{"key": "other/alias/root", "flags": 0, "value": ""}]')
    write(file)
    assert ("other/alias/root" in path.read_text(), len(warnings(caplog))) == (True, 1)
    assert "not written: it is the snapshot of another table" in warnings(caplog)[0]


@pytest.mark.parametrize("text", ["", "[]", "[", '[{"key": "z", "value": ""}, {"key": "t/alias/root", "value": ""}]'])
def test_damaged_or_empty_snapshot_and_a_whole_export_are_replaced(file, path, text):
    path.write_text(text)
    write(file)
    assert file.load()[0].size == 1


def test_snapshot_of_a_table_with_another_prefix_is_replaced(file, path):
    former = replace(TABLE, prefix="former")
    write(file_of(path, former), [(b"former/t/alias/root", b"gilles")], former)
    write(file)
    assert file.load()[0].size == 1


def test_snapshot_names_its_table_in_a_field_that_consul_ignores(file, path):
    write(file)
    entries = json.loads(path.read_text())
    assert [entry.get("table") for entry in entries] == [None] * (len(entries) - 1) + ["t"]


def test_snapshot_dated_in_the_future_is_ignored(file, path, caplog):
    write(file)
    os.utime(path, (time.time() + 3600,) * 2)
    assert file.load() is None
    (line,) = warnings(caplog)
    text = r"ignored: dated \d+ seconds in the future, so its age is unknown \(check the clock\)"
    assert re.fullmatch(f"{path}: {text}", line)


def test_new_snapshot_is_used_although_the_file_system_rounds_its_time(file, path):
    write(file)
    os.utime(path, (time.time() + 1,) * 2)
    assert file.load()[1] == 0.0


@pytest.mark.parametrize(("pairs", "count"), [([], "0 entries"), ([1], "1 entry"), ([1, 2], "2 entries")])
def test_restored_entries_are_counted(file, path, caplog, pairs, count):
    caplog.set_level(logging.INFO)
    write(file, [(b"t/alias/%d" % number, b"gilles") for number in pairs])
    file.load()
    assert f"t/: {count} from {path} (0 s old)" in caplog.text


def test_failing_write_is_retried_with_growing_pauses(path, monkeypatch, caplog):
    now = 1000.0
    clock = SimpleNamespace(monotonic=lambda: now, time=time.time)
    monkeypatch.setattr("table_consul.sources.snapshot.time", clock)
    monkeypatch.setattr("table_consul.sources.snapshot.WRITE_SECONDS", 10.0)
    file = file_of(path)
    path.mkdir()
    pauses = []
    for _ in range(9):
        write(file)
        pauses.append(file.due_in)
        now += file.due_in
    assert pauses == [20, 40, 80, 160, 320, 640, 640, 640, 640]
    path.rmdir()
    write(file)
    assert warnings(caplog) == [f"{path}: not written: Is a directory", f"{path}: written again"]
    now += 10.0
    write(file, [(b"t/alias/root", b"eric")])
    assert b"ZXJpYw" in path.read_bytes()


@pytest.mark.parametrize(("took", "pause"), [(0.5, 10.0), (12.0, 120.0)])
def test_slow_write_is_repeated_less_often(path, monkeypatch, took, pause):
    now = 1000.0
    monkeypatch.setattr("table_consul.sources.snapshot.time", SimpleNamespace(monotonic=lambda: now, time=time.time))
    monkeypatch.setattr("table_consul.sources.snapshot.WRITE_SECONDS", 10.0)
    file = file_of(path)
    file.begin()
    now += took
    builder = SnapshotBuilder(TABLE, TABLE.root, TABLE.services, None)
    builder.take([(b"t/alias/root", b"gilles")])
    file.finish(builder.finish({}), changed=True)
    file.dirty = True
    assert file.due_in == pause


@pytest.mark.parametrize(
    ("mode", "owner", "why"),
    [(0o640, 0, "other users may read or write it (set mode 0600)"), (0o600, 1, "owned by another user")],
)
def test_snapshot_that_is_not_private_is_ignored_with_a_reason(file, path, caplog, mode, owner, why, monkeypatch):
    write(file)
    path.chmod(mode)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + owner)
    assert file.load() is None
    assert warnings(caplog) == [f"{path}: ignored: {why}"]


def age(file):
    return file.load()[1]


def test_written_snapshot_is_restored(file):
    snapshot = write(file)
    restored, _ = file.load()
    assert {name: bucket.values for name, bucket in restored.entries.items()} == {
        name: bucket.values for name, bucket in snapshot.entries.items()
    }
    assert restored.restored


def test_age_of_a_snapshot_is_that_of_its_last_confirmation(file, path):
    snapshot = write(file)
    os.utime(path, (time.time() - OLD_SECONDS,) * 2)
    assert age(file) >= OLD_SECONDS
    file.finish(snapshot, changed=False)
    assert age(file) < OLD_SECONDS


def test_unwritten_change_does_not_refresh_the_age_of_the_file(file, path):
    snapshot = write(file)
    os.utime(path, (time.time() - OLD_SECONDS,) * 2)
    file.finish(snapshot, changed=True)
    assert (age(file) >= OLD_SECONDS, file.dirty) == (True, True)


def test_removed_snapshot_is_written_again(file, path):
    snapshot = write(file)
    path.unlink()
    file.finish(snapshot, changed=False)
    assert file.dirty
    write(file)
    assert (path.exists(), file.dirty) == (True, False)


# ---- held deletions ----


def hold(file, keys, service="alias", table=TABLE):
    """Write a snapshot in which these keys are held and no others are listed."""
    builder = SnapshotBuilder(table, table.root, table.services, None)
    file.begin()
    held = {service: Held({key: key for key in keys}, 1.0)}
    file.finish(replace(builder.finish({}), held=held), changed=True)


def aliases(file):
    return sorted(file.load()[0].entries["alias"].values)


def test_held_entries_stay_in_the_snapshot_and_others_leave_it(file):
    write(file, [(b"t/alias/%s" % name, b"gilles") for name in (b"eric", b"robert", b"root")])
    hold(file, [b"eric", b"root", b"never-written"])
    assert aliases(file) == [b"eric", b"root"]
    hold(file, [b"root"])
    assert aliases(file) == [b"root"]


def test_held_records_with_a_password_leave_the_snapshot(path):
    table = Table("t", services=("credentials", "userinfo"), paths={"userinfo": "t/credentials"})
    file = file_of(path, table)
    write(file, [(b"t/credentials/gilles", b'{"password": "x", "uid": 1, "gid": 1, "home": "/"}')], table)
    hold(file, [b"gilles"], "userinfo", table)
    assert {name: len(entries) for name, entries in file.load()[0].entries.items()} == {"credentials": 0, "userinfo": 0}


def test_held_entries_are_not_restored_from_a_writable_snapshot(file, path):
    write(file, [(b"t/alias/root", b"gilles")])
    path.chmod(0o666)
    hold(file, [b"root"])
    assert aliases(file) == []


def test_held_entries_of_a_missing_or_damaged_snapshot_are_not_written(file, path):
    hold(file, [b"root"])
    assert aliases(file) == []
    path.write_text("[\nnonsense\n")
    hold(file, [b"root"])
    assert aliases(file) == []
