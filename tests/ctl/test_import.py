"""`table-consulctl import` against a real Consul: what it shows, writes, rejects and skips, and how it resumes."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from table_consul.ctl import import_, txn
from tests.control import START, control, finished, start
from tests.dialogue import PATIENCE_SECONDS, write_config
from tests.rig.waiting import wait_for

HASH = "$2b$10$hIJ4QfMcp.90nJwKqGbKM.MybArjHOTpEtoTV.DgLYAiThuoYmTSe"


def importer(agent, *arguments, stdin=b"", token=None):
    more = {"CONSUL_HTTP_TOKEN": token} if token else {}
    return control("import", *arguments, stdin=stdin, CONSUL_HTTP_ADDR=agent.address, **more)


def entries(agent, path="aliases/alias/"):
    try:
        keys = agent.request("GET", f"/v1/kv/{path}?keys")
    except Exception:
        return {}
    return {key.removeprefix(path): agent.kv_get(key) for key in keys}


def file(folder, text, name="aliases"):
    path = folder / name
    path.write_bytes(text)
    return path


def many(count):
    return b"".join(b"user%05d: target%05d@example.org\n" % (number, number) for number in range(count))


# Output and writes.


def test_dry_run_shows_changes_and_writes_nothing(consul):
    consul.kv_put("aliases/alias/root", "gilles")
    consul.kv_put("aliases/alias/old", "x")
    done = importer(
        consul, "aliases", "alias", "-", "--dry-run", "--prune", stdin=b"root: eric\nnew: gilles,\n  eric\n"
    )
    assert (done.status, done.said) == (1, "")
    assert done.text.splitlines() == [
        "+ new gilles, eric",
        "- old x",
        "~ root gilles -> eric",
        "1 to add, 1 to change, 1 to remove, 0 unchanged",
    ]
    assert entries(consul) == {"root": b"gilles", "old": b"x"}


def test_import_writes_and_a_second_run_changes_nothing(consul, tmp_path):
    path = file(tmp_path, b"Root: gilles, eric  # boss\npostmaster: root\n")
    done = importer(consul, "aliases", "alias", path)
    assert (done.status, done.said, done.text.splitlines()[-1]) == (0, "", "2 written")
    assert entries(consul) == {"root": b"gilles, eric", "postmaster": b"root"}
    before = consul.request("GET", "/v1/kv/aliases/?recurse")
    again = importer(consul, "aliases", "alias", path)
    assert again == (0, b"0 to add, 0 to change, 0 to remove, 2 unchanged\n", b"")
    assert consul.request("GET", "/v1/kv/aliases/?recurse") == before
    assert importer(consul, "aliases", "alias", path, "--dry-run").status == 0


def test_entries_are_removed_only_with_prune(consul):
    for key in ("a", "b", "folder/"):
        consul.kv_put(f"aliases/alias/{key}", "x")
    importer(consul, "aliases", "alias", "-", stdin=b"a: x\n")
    assert entries(consul).keys() == {"a", "b", "folder/"}
    assert importer(consul, "aliases", "alias", "-", "--prune", stdin=b"a: x\n").text.startswith("- b x\n")
    assert entries(consul).keys() == {"a", "folder/"}


def test_prune_rejects_an_empty_file(consul):
    consul.kv_put("aliases/alias/a", "x")
    done = importer(consul, "aliases", "alias", "-", "--prune", stdin=b"# nothing\n")
    assert (done.status, "no entries" in done.said) == (2, True)
    assert entries(consul) == {"a": b"x"}


@pytest.mark.parametrize(
    ("service", "text", "stands"),
    [
        ("domain", b"example.org\n*.example.net\n", {"example.org": b"", "*.example.net": b""}),
        ("netaddr", b"[2001:db8::1]\n192.0.2.0/24\n", {"[2001:db8::1]": b"", "192.0.2.0/24": b""}),
        ("addrname", b"[::1] mail.example.org\n", {"[::1]": b"mail.example.org"}),
        ("credentials", f"vera:{HASH}:1:1::/home/vera:/bin/sh\n".encode(), {"vera": HASH.encode()}),
        ("userinfo", b"vera:*:1000:100::/home/vera:/bin/sh\n", {"vera": b"1000:100:/home/vera"}),
        ("string", b'quoted "so"\n', {"quoted": b'"\\"so\\""'}),
    ],
)
def test_each_kind_of_file_is_stored_as_the_daemon_reads_it(consul, service, text, stands):
    done = importer(consul, "t", service, "-", stdin=text)
    assert (done.status, done.said) == (0, "")
    assert entries(consul, f"t/{service}/") == stands


def test_records_serve_several_services_from_one_folder(consul, tmp_path):
    shared = '[tables.t]\npaths = { credentials = "people", userinfo = "people" }'
    conf = write_config(tmp_path, more=shared, address=f"http://{consul.address}")
    text = f"vera:{HASH}:1000:100::/home/vera:/bin/sh\n".encode()
    consul.kv_put("people/vera", json.dumps({"quota": 5}))
    for service in ("credentials", "userinfo"):
        assert control("-c", conf, "import", "t", service, "-", "--record", stdin=text).status == 0
        assert control("-c", conf, "query", "t", service, "vera").status == 0
    assert json.loads(consul.kv_get("people/vera")) == {
        "quota": 5,
        "password": HASH,
        "uid": 1000,
        "gid": 100,
        "home": "/home/vera",
    }


SHARED = '[tables.t]\npaths = { credentials = "people", userinfo = "people" }'


def test_entry_invalid_for_another_service_of_the_folder_is_rejected(consul, tmp_path):
    conf = write_config(tmp_path, more=SHARED, address=f"http://{consul.address}")
    text = b"bob:{PLAIN}secret:1000:100::/home/bob:/bin/sh\n"
    done = control("-c", conf, "import", "t", "userinfo", "-", "--record", stdin=text)
    assert (done.status, entries(consul, "people/")) == (2, {})
    assert "standard input:1: bob: not a hash" in done.said
    assert "credentials" in done.said
    assert "secret" not in done.said


def test_prune_keeps_a_record_that_another_service_reads(consul, tmp_path):
    conf = write_config(tmp_path, more=SHARED, address=f"http://{consul.address}")
    record = json.dumps({"uid": 1, "gid": 1, "home": "/h", "password": HASH})
    consul.kv_put("people/vera", record)
    consul.kv_put("people/bob", json.dumps({"uid": 2, "gid": 2, "home": "/b"}))
    text = b"bob:*:2:2::/b:/bin/sh\n"
    done = control("-c", conf, "import", "t", "userinfo", "-", "--prune", stdin=text)
    assert (done.status, entries(consul, "people/")["vera"]) == (2, record.encode())
    assert "standard input: vera: stored as the record of a user" in done.said
    assert control("-c", conf, "import", "t", "userinfo", "-", "--prune", "--record", stdin=text).status == 0
    assert entries(consul, "people/").keys() == {"bob"}


def test_prune_works_within_the_folder_of_another_service(consul, tmp_path):
    paths = '[tables.t]\npaths = { domain = "shared", alias = "shared/alias" }'
    conf = write_config(tmp_path, more=paths, address=f"http://{consul.address}")
    consul.kv_put("shared/alias/old", "x")
    assert control("-c", conf, "import", "t", "alias", "-", "--prune", stdin=b"new: x\n").status == 0
    assert entries(consul, "shared/").keys() == {"alias/new"}


def test_hashes_are_not_shown(consul, tmp_path):
    other = HASH[:-1] + "x"
    importer(consul, "t", "credentials", "-", stdin=f"vera {HASH}\n".encode())
    for more in ([], ["--json"]):
        done = importer(
            consul, "t", "credentials", "-", "--dry-run", *more, stdin=f"vera {other}\nold {HASH}\n".encode()
        )
        assert (done.status, "vera" in done.text, "$2b" in done.text + done.said) == (1, True, False)


def test_json_report_has_all_changes(consul):
    consul.kv_put("aliases/alias/root", "gilles")
    consul.kv_put("aliases/alias/same", "x")
    done = importer(consul, "aliases", "alias", "-", "--json", stdin=b"root: eric\nsame: x\nnew: y\n")
    assert (done.status, done.said) == (0, "")
    assert json.loads(done.text) == {
        "table": "aliases",
        "service": "alias",
        "path": "aliases/alias/",
        "format": "aliases",
        "dry_run": False,
        "changes": [
            {"change": "add", "key": "new", "from": None, "to": "y"},
            {"change": "change", "key": "root", "from": "gilles", "to": "eric"},
        ],
        "unchanged": 1,
        "left_out": 0,
        "written": 2,
        "conflicts": [],
    }


def test_export_from_elsewhere_is_written_below_the_table(consul, tmp_path):
    consul.kv_txn({"old/mail/alias/root": "gilles\n", "old/mail/domain/example.org": "", "old/mail/alias/": ""})
    text = consul_kv_export(consul, "old/")
    done = importer(consul, "aliases", "alias", "-", stdin=text)
    assert (done.status, "skipped 1 entry in other folders\n" in done.said) == (0, True)
    assert entries(consul) == {"root": b"gilles\n"}


def consul_kv_export(agent, prefix):
    from tests.rig.consul import consul_binary

    command = [consul_binary(), "kv", "export", f"-http-addr={agent.address}", prefix]
    return subprocess.run(command, capture_output=True, check=True).stdout


def test_from_names_any_folder_of_an_export(consul):
    consul.kv_txn({"people/root": "gilles", "top": "eric"})
    text = consul_kv_export(consul, "")
    assert "--from" in importer(consul, "aliases", "alias", "-", stdin=text).said
    for folder in ("people", "/people/"):
        assert importer(consul, "aliases", "alias", "-", "--from", folder, stdin=text).status == 0
    assert entries(consul) == {"root": b"gilles"}
    assert importer(consul, "x", "string", "-", "--from", "/", stdin=text).status == 0
    assert consul.kv_get("x/string/top") == b"eric"


def test_unregistered_service_is_noted(consul):
    done = importer(consul, "t", "auth", "-", stdin=f"vera {HASH}\n".encode())
    assert (done.status, "does not ask t for auth" in done.said) == (0, True)


def test_long_list_of_changes_is_whole_only_in_a_dry_run(consul):
    count = import_.CHANGES_SHOWN + 5
    dry = importer(consul, "aliases", "alias", "-", "--dry-run", stdin=many(count))
    assert len(dry.text.splitlines()) == count + 1
    done = importer(consul, "aliases", "alias", "-", stdin=many(count))
    assert "... and 5 more (--dry-run shows all)" in done.text
    assert len(entries(consul)) == count


# Files and options that are rejected before anything is written.


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"ok: x\nroot: |/bin/sh\n", ":2: root: the value contains a |command"),
        (b"ok: x\n\nroot:\n", ":3: has no value"),
        (b"ok: x\na: b\nA: c\n", ":3: a: already in line 2"),
        (b"ok: x\na//b: c\n", ":2: a//b: no URL"),
        (b"ok: x\na/\x07: c\n", ":2: a/\\x07: no URL"),
        (b"ok: x\nb\xff: c\n", ":2: b\\xff: no URL"),
        (b"ok: x\n" + b"a" * 1024 + b": c\n", "1024 bytes"),
        (b"ok: x\na: " + b"x," * 1200 + b"\n", "2399 bytes"),
        (b"\x1f\x8b\x08\0", "decompress the file"),
        ("root: x".encode("utf-16"), "convert it to UTF-8"),
    ],
)
def test_bad_file_is_rejected_as_a_whole_with_file_and_line(consul, tmp_path, text, said):
    path = file(tmp_path, text)
    done = importer(consul, "aliases", "alias", path)
    assert (done.status, done.text, entries(consul)) == (2, "", {})
    assert said in done.said
    assert str(path) in done.said
    assert "\x07" not in done.said


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/", "is a directory"),
        ("/dev/zero", "line 1 contains a NUL byte"),
        ("/nonexistent", "no such file"),
        (sys.executable, "not text"),
    ],
)
def test_file_that_is_not_text_is_rejected_without_reading_it_all(tmp_path, path, said):
    begun = time.monotonic()
    done = control("-c", write_config(tmp_path, address="http://127.0.0.1:1"), "import", "aliases", "alias", path)
    assert (done.status, said in done.said, done.said.count("\n")) == (2, True, 1), done.said
    assert time.monotonic() - begun < 5


def test_too_large_file_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(import_, "FILE_MAX_BYTES", 4 << 20)
    done = control("-c", write_config(tmp_path), "import", "aliases", "alias", file(tmp_path, b"# x\n" * (2 << 20)))
    assert done.status == 2  # of file:// first: nothing is read that nobody could write
    conf = write_config(tmp_path, address="http://127.0.0.1:1")
    done = control("-c", conf, "import", "aliases", "alias", file(tmp_path, b"# x\n" * (2 << 20)))
    assert (done.status, "more than 4 MB" in done.said) == (2, True)


def test_many_problems_are_counted_and_the_first_shown(tmp_path):
    conf = write_config(tmp_path, address="http://127.0.0.1:1")
    done = control("-c", conf, "import", "aliases", "alias", "-", stdin=b"root:\n" * 1000)
    assert len(done.said.splitlines()) == import_.PROBLEMS_SHOWN + 2
    assert "1000 problems" in done.said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["aliases", "domain", "-", "--format", "aliases"], "the format aliases has nothing for domain"),
        (["aliases", "alias", "-", "--format", "passwd"], "the format passwd has nothing for alias"),
        (["aliases", "alias", "-", "--record"], "is read as aliases"),
        (["aliases", "credentials", "-", "--record"], "is read as table"),
        (["aliases", "alias", "-", "--format", "table", "--from", "x"], "--from is for"),
        (["aliases", "alias", "-", "--prune", "--from", "old/alias"], "is read as aliases"),
        (["aliases", "alias"], "Missing argument"),
        (["aliases", "alias", "-", "--format", "csv"], "is not one of"),
    ],
)
def test_conflicting_options_are_a_usage_error(tmp_path, arguments, said):
    conf = write_config(tmp_path, address="http://127.0.0.1:1")
    done = control("-c", conf, "import", *arguments, stdin=b"a b\n")
    assert (done.status, said in done.said) == (2, True), done.said


def test_from_with_bytes_that_are_not_utf_8_matches_nothing(tmp_path):
    conf = write_config(tmp_path, address="http://127.0.0.1:1")
    text = b'[{"key": "old/alias/x", "value": "eA=="}]'
    done = control("-c", conf, "import", "t", "alias", "-", "--from", os.fsdecode(b"old\xff"), stdin=text)
    assert (done.status, "contains no keys below old\\xff/" in done.said) == (2, True), done.said


def test_file_address_cannot_be_written_to(tmp_path):
    done = control("-c", write_config(tmp_path), "import", "aliases", "alias", "-", stdin=b"a: b\n")
    assert (done.status, "writes to Consul" in done.said) == (2, True)


# Tokens.


def test_token_without_write_permission_names_the_policy_it_needs(consul_with_acl):
    token = consul_with_acl.token('key_prefix "aliases/" { policy = "read" }')
    done = importer(consul_with_acl, "aliases", "alias", "-", stdin=b"root: gilles\n", token=token)
    assert (done.status, "policy --write" in done.said, token in done.said) == (2, True, False), done.said
    assert entries(consul_with_acl) == {}


def test_token_without_read_permission_is_not_an_empty_table(consul_with_acl):
    consul_with_acl.kv_put("aliases/alias/root", "eric")
    for token in (consul_with_acl.token('key_prefix "other/" { policy = "write" }'), None):
        done = importer(consul_with_acl, "aliases", "alias", "-", "--prune", stdin=b"root: gilles\n", token=token)
        assert (done.status, "refuses the token: 403" in done.said) == (2, True), done.said
    assert entries(consul_with_acl) == {"root": b"eric"}


def test_token_with_write_permission_writes(consul_with_acl):
    token = consul_with_acl.token('key_prefix "aliases/" { policy = "write" }')
    done = importer(consul_with_acl, "aliases", "alias", "-", stdin=b"root: gilles\n", token=token)
    assert (done.status, entries(consul_with_acl)) == (0, {"root": b"gilles"})


# Conflicts and interruptions.


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_closed_output_interrupts_and_reports_progress(consul, tmp_path, more):
    path = file(tmp_path, many(100))
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as nobody:
        environ = {**os.environ, "CONSUL_HTTP_ADDR": consul.address}
        done = finished(start("import", "aliases", "alias", path, *more, stdout=nobody, env=environ))
    count = len(entries(consul))
    assert (done.status, f"{count} of 100 keys written" in done.said) == (2, True), done.said
    assert count == (100 if more else 0)


@pytest.fixture
def between(monkeypatch):
    """Has something happen before the transaction of this number."""

    def put(number, happen):
        transact = txn.Store.transact
        count = 0

        def counted(self, changes, **options):
            nonlocal count
            count += 1
            if count == number:
                happen()
            return transact(self, changes, **options)

        monkeypatch.setattr(txn.Store, "transact", counted)

    return put


def test_concurrent_edit_is_kept_and_a_second_run_overwrites_it(consul, between):
    consul.kv_put("aliases/alias/root", "gilles")
    consul.kv_put("aliases/alias/gone", "x")

    def edit():
        consul.kv_put("aliases/alias/root", "by hand")
        consul.kv_put("aliases/alias/new", "by hand")
        consul.kv_put("aliases/alias/gone", "by hand")

    between(1, edit)
    text = b"root: eric\nnew: eric\nother: eric\n"
    done = importer(consul, "aliases", "alias", "-", "--prune", stdin=text)
    assert done.status == 2
    assert [line.partition(":")[0] for line in done.said.splitlines()] == [
        f"aliases/alias/{k}" for k in ("gone", "new", "root")
    ]
    assert done.text.endswith("1 written\n")
    assert entries(consul) == {"root": b"by hand", "new": b"by hand", "gone": b"by hand", "other": b"eric"}
    assert importer(consul, "aliases", "alias", "-", "--prune", stdin=text).status == 0
    assert entries(consul) == {"root": b"eric", "new": b"eric", "other": b"eric"}


def test_outage_is_reported_and_the_next_run_writes_the_rest(consul, between, monkeypatch):
    monkeypatch.setattr(txn, "RETRY_SECONDS", 0.5)
    between(2, consul.kill)
    done = importer(consul, "aliases", "alias", "-", stdin=many(200))
    assert (done.status, "interrupted: 64 of 200 keys written" in done.said) == (2, True), done.said
    assert "retrying: Consul at" in done.said
    consul.revive()
    assert len(entries(consul)) == 64
    again = importer(consul, "aliases", "alias", "-", stdin=many(200))
    assert (again.status, again.text.splitlines()[-2:]) == (
        0,
        ["136 to add, 0 to change, 0 to remove, 64 unchanged", "136 written"],
    )
    assert len(entries(consul)) == 200


def test_restart_of_consul_only_delays_the_import(consul, between):
    def restart():
        consul.kill()
        consul.start()

    between(2, restart)
    done = importer(consul, "aliases", "alias", "-", stdin=many(130))
    assert (done.status, done.text.splitlines()[-1]) == (0, "130 written"), done.said
    assert len(entries(consul)) == 130


def test_interrupt_reports_progress(consul, between):
    def interrupt():
        raise KeyboardInterrupt

    between(2, interrupt)
    done = importer(consul, "aliases", "alias", "-", stdin=many(100))
    assert (done.status, done.said.count("interrupted"), "64 of 100 keys written" in done.said) == (2, 2, True)
    assert len(entries(consul)) == 64


def test_killed_import_leaves_whole_transactions_and_can_be_repeated(consul, tmp_path):
    path = file(tmp_path, many(20_000))
    environ = {**os.environ, "CONSUL_HTTP_ADDR": consul.address}
    command = [sys.executable, "-c", START, "import", "aliases", "alias", str(path)]
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def begun():
        return consul.kv_get("aliases/alias/user00000") is not None

    try:
        wait_for(begun, PATIENCE_SECONDS, lambda: "nothing is written")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    count = len(consul.request("GET", "/v1/kv/aliases/alias/?keys"))
    assert count % txn.OPERATIONS_MAX == 0
    assert 0 < count < 20_000
    assert importer(consul, "aliases", "alias", path).status == 0
    assert len(consul.request("GET", "/v1/kv/aliases/alias/?keys")) == 20_000


def test_json_report_is_written_on_an_interruption(consul, between, monkeypatch):
    monkeypatch.setattr(txn, "RETRY_SECONDS", 0.2)
    between(2, consul.kill)
    done = importer(consul, "aliases", "alias", "-", "--json", stdin=many(100))
    assert (done.status, json.loads(done.text)["written"]) == (2, 64)


def test_progress_bar_fits_a_terminal_of_40_columns(consul, tmp_path):
    path = file(tmp_path, many(import_.BAR_CHANGES))
    master, slave = pty.openpty()
    environ = {**os.environ, "CONSUL_HTTP_ADDR": consul.address, "COLUMNS": "40", "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", START, "import", "aliases", "alias", str(path)],
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=slave,
    )
    os.close(slave)
    seen = b""
    try:
        while chunk := os.read(master, 65536):
            seen += chunk
    except OSError:
        pass  # the end of a terminal
    os.close(master)
    assert process.wait(PATIENCE_SECONDS) == 0
    assert b"100%" in seen
    lines = seen.replace(b"\x1b[?25l", b"").replace(b"\x1b[?25h", b"").replace(b"\n", b"\r").split(b"\r")
    assert [line for line in lines if len(line.decode()) > 40] == []
