from __future__ import annotations

import json
import logging
import os
import threading
import time

import pytest
from msgspec.structs import replace

from table_consul.errors import SourceError, Unreachable
from tests.consul.watch.watching import (
    ALIAS,
    DOMAIN,
    PREFIX,
    ROOT,
    TABLE,
    WHOLE,
    ask,
    becomes,
    closed,
    keep,
    lines,
    logged,
    settled,
    written,
)
from tests.dialogue import eventually
from tests.fake_consul import html


def test_the_copy_is_an_export_for_its_owner_alone(fake, mirrored, copied, tmp_path):
    source = mirrored(fake.address, copied)
    path = tmp_path / "copy.json"
    written(path, {"mail/aliases/alias/root": b"gilles", "mail/aliases/domain/example.org": b""})
    assert (path.stat().st_mode & 0o777, os.listdir(tmp_path)) == (0o600, ["copy.json"])
    assert set(json.loads(path.read_text())[0]) == {"key", "flags", "value"}
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    written(path, {"mail/aliases/alias/root": b"eric"})


def test_with_consul_down_a_start_answers_from_the_copy(fake, mirrored, copied, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    source = mirrored(fake.address, copied)
    written(tmp_path / "copy.json", {"mail/aliases/alias/root": b"gilles"})
    source.close()
    again = mirrored(closed(), copied)
    becomes(again, b"gilles")
    assert (ask(again, b"nobody"), ask(again, b"example.org", "domain")) == (None, b"example.org")
    assert any(line.endswith("copy.json (0 s old)") for line in lines(caplog, logging.INFO))


def test_what_is_restored_follows_consul_when_it_comes_back(fake, mirrored, copied, tmp_path):
    keep(tmp_path / "copy.json", {**WHOLE, "mail/aliases/alias/old": b"x"})
    fake.stop()
    source = mirrored(fake.address, copied)
    becomes(source, b"x", b"old")
    fake.start()
    becomes(source, None, b"old")
    becomes(source, b"example.org", b"example.org", service="domain")


def test_with_consul_down_and_no_copy_a_start_answers_errors_and_recovers(fake, mirrored, copied):
    fake.stop()
    source = mirrored(fake.address, copied)
    becomes(source, Unreachable)
    fake.start()
    becomes(source, b"gilles")


@pytest.mark.parametrize("text", ["", "[", "no JSON", '[{"key": "a", "value": "!"}]', '{"key": "a"}', "[" * 5000])
def test_a_damaged_copy_is_refused_with_a_line(mirrored, copied, tmp_path, caplog, text):
    (tmp_path / "copy.json").write_text(text)
    (tmp_path / "copy.json").chmod(0o600)
    becomes(mirrored(closed(), copied), Unreachable)
    logged(caplog, f"{tmp_path}/copy.json: ignored: not the output of `consul kv export`")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o602])
def test_a_copy_that_others_may_read_or_write_is_refused_with_a_line(mirrored, copied, tmp_path, caplog, mode):
    keep(tmp_path / "copy.json", WHOLE, mode)
    becomes(mirrored(closed(), copied), Unreachable)
    logged(caplog, "other users may read or write it")


def test_a_copy_of_another_table_is_no_absence(mirrored, copied, tmp_path, caplog):
    keep(tmp_path / "copy.json", {key.replace("aliases", "other"): value for key, value in WHOLE.items()})
    becomes(mirrored(closed(), copied), Unreachable)
    logged(caplog, f"{tmp_path}/copy.json: ignored: contains no keys under mail/aliases/")


def test_a_copy_older_than_max_age_is_an_error(mirrored, copied, tmp_path):
    keep(tmp_path / "copy.json", WHOLE)
    os.utime(tmp_path / "copy.json", (time.time() - 90_000,) * 2)
    source = mirrored(closed(), copied)
    becomes(source, Unreachable)
    with pytest.raises(Unreachable, match=r"no data from Consul for 9\d{4} s"):
        ask(source)


def test_an_export_made_by_hand_answers_for_what_it_holds_and_proves_no_empty_bucket(mirrored, copied, tmp_path):
    keep(tmp_path / "copy.json", {"mail/aliases/alias/root": b"gilles"})
    source = mirrored(closed(), copied)
    becomes(source, b"gilles")
    with pytest.raises(SourceError, match="mail/aliases/domain/ is not in the snapshot"):
        ask(source, b"example.org", "domain")


def test_what_was_hidden_is_no_absence_after_a_start_from_the_copy(fake, mirrored, copied, tmp_path):
    fake.denied = (DOMAIN,)
    source = mirrored(fake.address, copied)
    written(tmp_path / "copy.json", {"mail/aliases/alias/root": b"gilles"})
    source.close()
    down = mirrored(closed(), copied)
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


def test_a_copy_that_cannot_be_written_is_one_line_and_no_outage(fake, mirrored, tmp_path, caplog):
    table = replace(TABLE, snapshot=str(tmp_path / "none" / "copy.json"), max_age=0.3)
    source = mirrored(fake.address, table)
    settled(source)
    asked = len(fake.requests)
    for _ in eventually("several turns", 10):
        if len(fake.requests) > asked + 5:
            break
    assert lines(caplog) == [f"{tmp_path}/none/copy.json: not written: No such file or directory"]
    assert ask(source) == b"gilles"
    (tmp_path / "none").mkdir()
    written(tmp_path / "none" / "copy.json", {"mail/aliases/alias/root": b"gilles"})


def test_a_disk_that_is_full_leaves_the_old_copy_and_is_one_line(fake, mirrored, copied, tmp_path, monkeypatch, caplog):
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


def test_a_copy_whose_last_step_fails_is_one_line(fake, mirrored, copied, tmp_path, monkeypatch, caplog):
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


def test_a_disk_without_any_room_is_one_line_and_no_outage(fake, mirrored, copied, tmp_path, monkeypatch, caplog):
    honest = os.open

    def full(path, flags, *mode):
        made = honest(path, flags, *mode)
        if not str(path).endswith(".tmp"):
            return made
        os.close(made)
        return honest("/dev/full", os.O_WRONLY)

    monkeypatch.setattr(os, "open", full)
    for number in range(400):  # more than a buffer holds: what is in it fails to be written once more at the end
        fake.put(ALIAS + b"%d" % number, b"x" * 50)
    source = mirrored(fake.address, copied)
    assert ask(source) == b"gilles"
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    assert lines(caplog) == [f"{tmp_path}/copy.json: not written: No space left on device"]
    assert os.listdir(tmp_path) == []


def test_snapshot_file_marks_a_folder_of_which_keys_are_hidden_and_proves_no_absence_there(
    fake, mirrored, copied, tmp_path
):
    fake.put(ALIAS + b"vip", b"x")
    fake.denied = (ALIAS + b"vip",)
    source = mirrored(fake.address, copied)
    written(tmp_path / "copy.json", {"mail/aliases/alias/root": b"gilles", "mail/aliases/alias/": b"incomplete"})
    source.close()
    again = mirrored(closed(), copied)
    becomes(again, b"gilles")
    for key in (b"vip", b"nobody"):
        with pytest.raises(Unreachable):
            ask(again, key)
    assert ask(again, b"example.net", "domain") is None


def test_a_watch_that_was_stopped_writes_no_copy(fake, mirrored, copied, tmp_path):
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


def test_a_bug_in_restoring_is_no_end_of_the_watch(fake, mirrored, copied, monkeypatch, caplog):
    def broken(*_arguments):
        raise ZeroDivisionError

    monkeypatch.setattr("table_consul.sources.snapshot.SnapshotFile.load", broken)
    assert ask(mirrored(fake.address, copied)) == b"gilles"
    assert "internal error; please report it" in lines(caplog)
