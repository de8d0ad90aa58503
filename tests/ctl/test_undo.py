"""`table-consulctl undo`, and the saves and log lines of the commands that write."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import syslog

import pytest

from table_consul.ctl import saves, txn
from table_consul.errors import Forbidden, TableConsulError, Unreachable
from tests.control import control
from tests.ctl.importing import alias_lines, entries, importer
from tests.rig.consul import consul_binary


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of saves."""
    path = tmp_path / "undo"
    monkeypatch.setenv("TABLE_CONSUL_UNDO_DIR", str(path))
    return path


def undo(agent, *arguments):
    return control("undo", *arguments, CONSUL_HTTP_ADDR=agent.address)


def write(number=0, size=0):
    entry = saves.Entry(f"aliases/alias/{number}", 0, b"x" * size)
    return saves.Write("2026-01-01", "vera", "set", "aliases", "alias", "aliases/alias/", [entry], [])


# Against a real Consul.


def test_undo_restores_added_changed_and_removed_keys(consul, folder):
    consul.kv_txn({"aliases/alias/root": "gilles", "aliases/alias/old": "x", "aliases/alias/same": "y"})
    done = importer(consul, "aliases", "alias", "-", "--prune", stdin=b"root: eric\nnew: eric\nsame: y\n")
    assert (done.status, entries(consul)) == (0, {"root": b"eric", "new": b"eric", "same": b"y"})
    done = undo(consul)
    assert (done.status, done.said) == (0, "")
    assert done.text.splitlines() == ["- new eric", "+ old x", "~ root eric -> gilles", "3 written"]
    assert entries(consul) == {"root": b"gilles", "old": b"x", "same": b"y"}


def test_undo_of_an_undo_restores_the_changes(consul, folder):
    importer(consul, "aliases", "alias", "-", stdin=b"root: eric\n")
    assert (undo(consul).status, entries(consul)) == (0, {})
    assert (undo(consul).status, entries(consul)) == (0, {"root": b"eric"})
    assert (undo(consul, "1").status, entries(consul)) == (0, {})
    assert undo(consul, "1") == (0, b"nothing to write\n", b"")


def test_undo_skips_a_key_that_has_changed_since(consul, folder):
    importer(consul, "aliases", "alias", "-", stdin=b"root: eric\nnew: eric\n")
    consul.kv_put("aliases/alias/root", "by hand")
    done = undo(consul)
    assert (done.status, entries(consul)) == (2, {"root": b"by hand"})
    assert done.said == "aliases/alias/root: changed in Consul since it was written; skipped\n"
    report = json.loads(undo(consul, "1", "--json").text)
    assert (report["written"], report["conflicts"]) == (0, ["aliases/alias/root"])


def test_write_that_the_token_may_not_make_is_not_the_newest(consul_with_acl, folder):
    environ = {"CONSUL_HTTP_ADDR": consul_with_acl.address, "CONSUL_HTTP_TOKEN": consul_with_acl.management_token}
    assert control("set", "aliases", "alias", "root", "gilles", **environ).status == 0
    reader = consul_with_acl.token('key_prefix "aliases/" { policy = "read" }')
    assert control("set", "aliases", "alias", "vera", "x", **{**environ, "CONSUL_HTTP_TOKEN": reader}).status == 2
    assert saves.numbers(str(folder)) == [1]
    done = control("undo", **environ)
    assert (done.status, done.text, entries(consul_with_acl)) == (0, "- root gilles\n1 written\n", {})


def test_write_that_skips_every_key_is_not_the_newest(consul, folder, monkeypatch):
    importer(consul, "aliases", "alias", "-", stdin=b"root: eric\n")
    transact = txn.Store.transact

    def race(store, changes, **options):
        consul.kv_put("aliases/alias/vera", "by hand")
        return transact(store, changes, **options)

    with monkeypatch.context() as patch:
        patch.setattr(txn.Store, "transact", race)
        assert importer(consul, "aliases", "alias", "-", stdin=b"vera: x\n").status == 2
    assert (undo(consul).text, entries(consul)) == ("- root eric\n1 written\n", {"vera": b"by hand"})


def test_write_that_may_have_reached_consul_can_be_undone(consul, folder, monkeypatch):
    transact = txn.Store.transact

    def lose_the_reply(store, changes, **options):
        transact(store, changes, **options)
        raise Unreachable("no response in time")

    with monkeypatch.context() as patch:
        patch.setattr(txn, "RETRY_SECONDS", 0.0)
        patch.setattr(txn.Store, "transact", lose_the_reply)
        assert importer(consul, "aliases", "alias", "-", stdin=b"root: eric\n").status == 2
    assert (entries(consul), undo(consul).status, entries(consul)) == ({"root": b"eric"}, 0, {})


def test_write_of_unknown_fate_can_be_undone_if_its_retry_is_forbidden(consul, folder, monkeypatch):
    transact, failures = txn.Store.transact, [Unreachable("no response in time"), Forbidden("403")]

    def lose_the_reply_then_the_token(store, changes, **options):
        if len(failures) == 2:
            transact(store, changes, **options)
        raise failures.pop(0)

    with monkeypatch.context() as patch:
        patch.setattr(txn, "delay", lambda *_: 0.0)
        patch.setattr(txn.Store, "transact", lose_the_reply_then_the_token)
        assert importer(consul, "aliases", "alias", "-", stdin=b"root: eric\n").status == 2
    assert failures == []
    assert (entries(consul), undo(consul).status, entries(consul)) == ({"root": b"eric"}, 0, {})


def test_undo_restores_flags_and_bytes(consul, folder):
    consul.request("PUT", "/v1/kv/aliases/string/k?flags=42", b"\xff\x00")
    before = consul.request("GET", "/v1/kv/aliases/string/k")[0]
    importer(consul, "aliases", "string", "-", stdin=b"k new\n")
    assert undo(consul).status == 0
    after = consul.request("GET", "/v1/kv/aliases/string/k")[0]
    assert [after[name] for name in ("Value", "Flags")] == [before[name] for name in ("Value", "Flags")]


def test_consul_imports_a_save(consul, folder):
    consul.kv_put("aliases/alias/root", "gilles")
    importer(consul, "aliases", "alias", "-", stdin=b"root: eric\n")
    (path,) = folder.iterdir()
    replaced = json.dumps(json.loads(path.read_bytes())["replaced"]).encode()
    command = [consul_binary(), "kv", "import", "-http-addr", consul.address, "-"]
    subprocess.run(command, input=replaced, check=True, capture_output=True)
    assert entries(consul) == {"root": b"gilles"}


def test_outage_during_an_undo_names_the_command_that_writes_the_rest(consul, folder, monkeypatch):
    importer(consul, "aliases", "alias", "-", stdin=alias_lines(100))
    transact = txn.Store.transact

    def failing(self, changes, **options):
        if len(changes) < txn.OPERATIONS_MAX:
            raise Unreachable("no leader")
        return transact(self, changes, **options)

    monkeypatch.setattr(txn, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(txn.Store, "transact", failing)
    done = undo(consul)
    assert (done.status, len(entries(consul))) == (2, 36)
    assert "interrupted: 64 of 100 keys written (to write the rest, run table-consulctl undo 1)\n" in done.said
    assert json.loads(undo(consul, "1", "--json").text)["written"] == 0
    monkeypatch.setattr(txn.Store, "transact", transact)
    assert (undo(consul, "1").status, entries(consul)) == (0, {})


def test_undo_writes_only_keys_that_the_token_may_write(consul_with_acl, folder):
    consul = consul_with_acl
    importer(consul, "aliases", "alias", "-", stdin=alias_lines(100), token=consul.management_token)
    half = "".join(f'key "aliases/alias/user{number:05d}" {{ policy = "write" }}\n' for number in range(64))
    token = consul.token(f'key_prefix "aliases/" {{ policy = "read" }}\n{half}')
    done = control("undo", CONSUL_HTTP_ADDR=consul.address, CONSUL_HTTP_TOKEN=token)
    assert (done.status, len(entries(consul))) == (2, 36)
    assert "interrupted: 64 of 100 keys written (to write the rest, run table-consulctl undo 1)" in done.said
    assert "the token may not write aliases/alias/user00064" in done.said
    done = control("undo", "1", CONSUL_HTTP_ADDR=consul.address, CONSUL_HTTP_TOKEN=consul.management_token)
    assert (done.status, entries(consul)) == (0, {})


# Saves.


def test_save_is_private_and_has_user_time_and_command(fake, folder, monkeypatch):
    monkeypatch.setenv("SUDO_USER", "vera")
    assert importer(fake, "aliases", "alias", "-", stdin=b"root: eric\n").status == 0
    (path,) = folder.iterdir()
    assert [stat.S_IMODE(each.stat().st_mode) for each in (folder, path)] == [0o700, 0o600]
    saved = json.loads(path.read_bytes())
    assert saved["command"] == "table-consulctl import aliases alias -"
    assert saved["user"].startswith("vera as ")
    assert (saved["replaced"], [each["key"] for each in saved["written"]]) == ([], ["aliases/alias/root"])


def test_command_that_is_not_utf_8_is_saved_with_escapes(fake, folder, tmp_path):
    path = tmp_path / os.fsdecode(b"alias\xe9")
    path.write_bytes(b"root: eric\n")
    assert importer(fake, "aliases", "alias", path).status == 0
    assert "alias\\xe9" in saves.load(str(folder), 1).command
    assert undo(fake).status == 0


def test_list_shows_the_newest_first(fake, folder):
    for value in (b"gilles", b"eric"):
        importer(fake, "aliases", "alias", "-", stdin=b"root: " + value)
    done = undo(fake, "--list")
    assert [line.split()[0] for line in done.text.splitlines()] == ["2", "1"]
    assert [line.split()[-1] for line in done.text.splitlines()] == ["-0", "-0"]
    writes = json.loads(undo(fake, "--list", "--json").text)["writes"]
    assert [(each["number"], each["added"], each["changed"]) for each in writes] == [(2, 0, 1), (1, 1, 0)]


def test_list_skips_a_damaged_file(fake, folder):
    saves.save(str(folder), write())
    (folder / "000002.json").write_text("{")
    done = undo(fake, "--list")
    assert (done.status, len(done.text.splitlines())) == (2, 1)
    assert "000002.json: damaged" in done.said
    assert undo(fake).status == 2


def test_list_skips_a_file_that_cannot_be_read(fake, folder):
    saves.save(str(folder), write())
    (folder / "000002.json").mkdir()
    done = undo(fake, "--list", "--json")
    assert (done.status, [each["number"] for each in json.loads(done.text)["writes"]]) == (2, [1])
    assert done.said == f"{folder}/000002.json: is a directory\n"


def test_list_reports_the_problem_of_the_folder_once_and_fails(fake, folder):
    for number in range(3):
        saves.save(str(folder), write(number))
    folder.chmod(0o755)
    done = undo(fake, "--list", "--json")
    assert (done.status, json.loads(done.text)["writes"]) == (2, [])
    assert (done.said.count("must belong to this user"), len(done.said.splitlines())) == (1, 1)


def test_dry_run_and_no_undo_save_nothing(fake, folder):
    for option in ("--dry-run", "--no-undo"):
        importer(fake, "aliases", "alias", "-", option, stdin=b"root: eric\n")
    assert not folder.exists()
    done = undo(fake)
    assert (done.status, "no saved writes" in done.said) == (2, True)


def test_unknown_number_is_an_error(fake, folder):
    saves.save(str(folder), write())
    done = undo(fake, "7")
    assert (done.status, "no write 7 (run undo --list)" in done.said) == (2, True)


@pytest.mark.parametrize("trouble", ["full", "shared", "file"])
def test_failed_save_writes_nothing(fake, folder, monkeypatch, trouble):
    if trouble == "full":
        full = OSError(28, os.strerror(28))
        monkeypatch.setattr("table_consul.files.AtomicWriter.commit", lambda _self: (_ for _ in ()).throw(full))
    elif trouble == "shared":
        folder.mkdir(mode=0o755)
    else:
        folder.write_text("")
    done = importer(fake, "aliases", "alias", "-", stdin=b"root: eric\n")
    assert (done.status, [*fake.store.entries]) == (2, [])
    assert ("nothing was written" in done.said, "interrupted" in done.said) == (trouble != "shared", False)
    assert importer(fake, "aliases", "alias", "-", "--no-undo", stdin=b"root: eric\n").status == 0


def test_save_of_another_user_is_refused(folder, monkeypatch):
    saves.save(str(folder), write())
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(TableConsulError, match="must belong to this user"):
        saves.load(str(folder), 1)


def test_folder_that_is_exchanged_after_its_check_is_not_read(folder, monkeypatch):
    """The user of smtpd may rename folders in /var/lib/table-consul, but must not choose what root's undo writes."""
    saves.save(str(folder), write(1))
    forged = folder.with_name("forged")
    saves.save(str(forged), write(2))

    def exchange(*_lock):
        folder.rename(folder.with_name("former"))
        forged.rename(folder)

    monkeypatch.setattr(saves.fcntl, "flock", exchange)
    assert saves.load(str(folder), 1) == write(1)


def test_oldest_saves_beyond_the_limits_are_removed(folder, monkeypatch):
    monkeypatch.setattr(saves, "KEPT", 3)
    for number in range(5):
        assert saves.save(str(folder), write(number)) == number + 1
    assert saves.numbers(str(folder)) == [5, 4, 3]
    monkeypatch.setattr(saves, "KEPT_BYTES", 1500)
    saves.save(str(folder), write(size=500))
    assert saves.numbers(str(folder)) == [6, 5, 4]
    saves.save(str(folder), write(size=5000))
    assert saves.numbers(str(folder)) == [7]


def test_write_is_one_line_in_syslog(fake, folder, monkeypatch):
    lines = []
    monkeypatch.setattr(syslog, "syslog", lambda _priority, text: lines.append(text))
    importer(fake, "aliases", "alias", "-", stdin=alias_lines(70))
    importer(fake, "aliases", "alias", "-", stdin=alias_lines(70))
    (line,) = lines
    assert line.endswith(": import aliases alias: 70 added, 0 changed, 0 removed")
