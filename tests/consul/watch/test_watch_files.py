from __future__ import annotations

import json
import logging
import os
import threading
import time

import pytest
from msgspec.structs import replace

from table_consul.errors import SourceError, Unreachable
from tests.consul.clients import closed_port
from tests.consul.watch.watching import (
    ALIAS,
    DOMAIN,
    PREFIX,
    ROOT,
    TABLE,
    WHOLE,
    ask,
    becomes,
    lines,
    logged,
    settled,
    write_snapshot,
    written,
)
from tests.dialogue import eventually
from tests.fake_consul import html


@pytest.fixture
def version():
    return "1.22"


def test_snapshot_is_an_export_that_only_its_owner_can_read(fake, mirrored, copied, tmp_path):
    source = mirrored(fake.address, copied)
    path = tmp_path / "copy.json"
    written(path, {"mail/aliases/alias/root": b"gilles", "mail/aliases/domain/example.org": b""})
    assert (path.stat().st_mode & 0o777, os.listdir(tmp_path)) == (0o600, ["copy.json"])
    assert set(json.loads(path.read_text())[0]) == {"key", "flags", "value"}
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    written(path, {"mail/aliases/alias/root": b"eric"})


def test_start_without_consul_answers_from_the_snapshot(fake, mirrored, copied, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    source = mirrored(fake.address, copied)
    written(tmp_path / "copy.json", {"mail/aliases/alias/root": b"gilles"})
    source.close()
    again = mirrored(closed_port(), copied)
    becomes(again, b"gilles")
    assert (ask(again, b"nobody"), ask(again, b"example.org", "domain")) == (None, b"example.org")
    assert any(line.endswith("copy.json (0 s old)") for line in lines(caplog, logging.INFO))


def test_restored_table_follows_consul_when_it_is_back(fake, mirrored, copied, tmp_path):
    write_snapshot(tmp_path / "copy.json", {**WHOLE, "mail/aliases/alias/old": b"x"})
    fake.stop()
    source = mirrored(fake.address, copied)
    becomes(source, b"x", b"old")
    fake.start()
    becomes(source, None, b"old")
    becomes(source, b"example.org", b"example.org", service="domain")


def test_start_without_consul_and_snapshot_returns_errors_until_recovery(fake, mirrored, copied):
    fake.stop()
    source = mirrored(fake.address, copied)
    becomes(source, Unreachable)
    fake.start()
    becomes(source, b"gilles")


@pytest.mark.parametrize("text", ["", "[", "no JSON", '[{"key": "a", "value": "!"}]', '{"key": "a"}', "[" * 5000])
def test_damaged_snapshot_is_ignored_and_logged(mirrored, copied, tmp_path, caplog, text):
    (tmp_path / "copy.json").write_text(text)
    (tmp_path / "copy.json").chmod(0o600)
    becomes(mirrored(closed_port(), copied), Unreachable)
    logged(caplog, f"{tmp_path}/copy.json: ignored: not the output of `consul kv export`")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o602])
def test_snapshot_that_others_may_read_or_write_is_ignored_and_logged(mirrored, copied, tmp_path, caplog, mode):
    write_snapshot(tmp_path / "copy.json", WHOLE, mode)
    becomes(mirrored(closed_port(), copied), Unreachable)
    logged(caplog, "other users may read or write it")


def test_snapshot_of_another_table_proves_no_absence(mirrored, copied, tmp_path, caplog):
    write_snapshot(tmp_path / "copy.json", {key.replace("aliases", "other"): value for key, value in WHOLE.items()})
    becomes(mirrored(closed_port(), copied), Unreachable)
    logged(caplog, f"{tmp_path}/copy.json: ignored: contains no keys under mail/aliases/")


def test_snapshot_older_than_max_age_is_an_error(mirrored, copied, tmp_path):
    write_snapshot(tmp_path / "copy.json", WHOLE)
    os.utime(tmp_path / "copy.json", (time.time() - 90_000,) * 2)
    source = mirrored(closed_port(), copied)
    becomes(source, Unreachable)
    with pytest.raises(Unreachable, match=r"no data from Consul for 9\d{4} s"):
        ask(source)


def test_export_as_snapshot_answers_for_its_keys_and_proves_no_empty_folder(mirrored, copied, tmp_path):
    write_snapshot(tmp_path / "copy.json", {"mail/aliases/alias/root": b"gilles"})
    source = mirrored(closed_port(), copied)
    becomes(source, b"gilles")
    with pytest.raises(SourceError, match="mail/aliases/domain/ is not in the snapshot"):
        ask(source, b"example.org", "domain")


def test_hidden_key_is_not_absent_after_a_start_from_the_snapshot(fake, mirrored, copied, tmp_path):
    fake.denied = (DOMAIN,)
    source = mirrored(fake.address, copied)
    written(tmp_path / "copy.json", {"mail/aliases/alias/root": b"gilles"})
    source.close()
    down = mirrored(closed_port(), copied)
    becomes(down, b"gilles")
    with pytest.raises(SourceError):
        ask(down, b"example.org", "domain")
    again = mirrored(fake.address, copied)
    settled(again)
    with pytest.raises(SourceError):
        ask(again, b"example.org", "domain")


def test_snapshot_file_is_not_replaced_while_the_token_may_read_nothing(fake, mirrored, copied, tmp_path):
    path = tmp_path / "copy.json"
    source = mirrored(fake.address, copied)
    written(path, {"mail/aliases/alias/root": b"gilles"})
    good = path.read_text()
    fake.denied = (PREFIX,)
    fake.put(b"mail/aliases/zz", b"wakes the watch")
    for _ in eventually("several failures", 10):
        if source.watches[0].backoff.failures > 3:
            break
    fake.handle = html
    for _ in eventually("several more", 10):
        if source.watches[0].backoff.failures > 6:
            break
    assert (path.read_text(), os.listdir(tmp_path)) == (good, ["copy.json"])


def test_unwritable_snapshot_logs_one_line_without_an_outage(fake, mirrored, tmp_path, caplog):
    table = replace(TABLE, snapshot=str(tmp_path / "none" / "copy.json"), max_age=0.3)
    source = mirrored(fake.address, table)
    settled(source)
    asked = len(fake.requests)
    for _ in eventually("several reads", 10):
        if len(fake.requests) > asked + 5:
            break
    assert lines(caplog) == [f"{tmp_path}/none/copy.json: not written: No such file or directory"]
    assert ask(source) == b"gilles"
    (tmp_path / "none").mkdir()
    written(tmp_path / "none" / "copy.json", {"mail/aliases/alias/root": b"gilles"})


def test_full_disk_leaves_the_old_snapshot_and_logs_one_line(fake, mirrored, copied, tmp_path, monkeypatch, caplog):
    path = tmp_path / "copy.json"
    source = mirrored(fake.address, copied)
    written(path, {"mail/aliases/alias/root": b"gilles"})
    good = path.read_text()

    def full(*_arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("table_consul.files.AtomicWriter.write", full)
        for name in (b"eric", b"robert"):
            fake.put(ROOT, name)
            becomes(source, name)
        assert (path.read_text(), os.listdir(tmp_path)) == (good, ["copy.json"])
    assert lines(caplog) == [f"{path}: not written: No space left on device"]


def test_failed_commit_of_a_snapshot_logs_one_line(fake, mirrored, copied, tmp_path, monkeypatch, caplog):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("table_consul.files.AtomicWriter.commit", full)
    source = mirrored(fake.address, copied)
    for name in (b"eric", b"robert"):
        fake.put(ROOT, name)
        becomes(source, name)
    source.close()
    fake.put(ROOT, b"gilles")
    source.watches[0].join(10)
    assert lines(caplog) == [f"{tmp_path}/copy.json: not written: No space left on device"]


def test_disk_without_any_space_logs_one_line_without_an_outage(fake, mirrored, copied, tmp_path, monkeypatch, caplog):
    honest = os.open

    def full(path, flags, *mode, **folder):
        made = honest(path, flags, *mode, **folder)
        if not str(path).endswith(".tmp"):
            return made
        os.close(made)
        return honest("/dev/full", os.O_WRONLY)

    monkeypatch.setattr(os, "open", full)
    monkeypatch.setattr(os, "fchmod", lambda *_: None)  # of the device: root would change it for the whole host
    # More than a buffer holds: closing the file writes the rest of it, and fails again.
    for number in range(400):
        fake.put(ALIAS + b"%d" % number, b"x" * 50)
    source = mirrored(fake.address, copied)
    assert ask(source) == b"gilles"
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    assert lines(caplog) == [f"{tmp_path}/copy.json: not written: No space left on device"]
    assert os.listdir(tmp_path) == []


def test_snapshot_file_marks_folders_with_hidden_keys_and_proves_no_absence_there(fake, mirrored, copied, tmp_path):
    fake.put(ALIAS + b"vip", b"x")
    fake.denied = (ALIAS + b"vip",)
    source = mirrored(fake.address, copied)
    written(tmp_path / "copy.json", {"mail/aliases/alias/root": b"gilles", "mail/aliases/alias/": b"incomplete"})
    source.close()
    again = mirrored(closed_port(), copied)
    becomes(again, b"gilles")
    for key in (b"vip", b"nobody"):
        with pytest.raises(Unreachable):
            ask(again, key)
    assert ask(again, b"example.net", "domain") is None


def test_stopped_watch_writes_no_snapshot(fake, mirrored, copied, tmp_path):
    held = threading.Event()

    def slow(request):
        held.wait(10)
        return fake.consul(request)

    fake.handle = slow
    source = mirrored(fake.address, copied)
    source.close()
    held.set()
    source.watches[0].join(10)
    assert (source.watches[0].is_alive(), os.listdir(tmp_path)) == (False, [])


def test_bug_in_restoring_does_not_end_the_watch(fake, mirrored, copied, monkeypatch, caplog):
    def broken(*_arguments):
        raise ZeroDivisionError

    monkeypatch.setattr("table_consul.sources.snapshot.SnapshotFile.load", broken)
    assert ask(mirrored(fake.address, copied)) == b"gilles"
    assert "internal error; please report it" in lines(caplog)
