"""`table-consulctl import` against a real Consul: output, writes, removals, and permissions."""

from __future__ import annotations

import json
import subprocess

import pytest

from table_consul.ctl import writing
from tests.control import control
from tests.ctl.importing import HASH, alias_lines, entries, file, importer
from tests.dialogue import write_config
from tests.rig.consul import consul_binary

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
    ("service", "text", "stored"),
    [
        ("domain", b"example.org\n*.example.net\n", {"example.org": b"", "*.example.net": b""}),
        ("netaddr", b"[2001:db8::1]\n192.0.2.0/24\n", {"[2001:db8::1]": b"", "192.0.2.0/24": b""}),
        ("addrname", b"[::1] mail.example.org\n", {"[::1]": b"mail.example.org"}),
        ("credentials", f"vera:{HASH}:1:1::/home/vera:/bin/sh\n".encode(), {"vera": HASH.encode()}),
        ("userinfo", b"vera:*:1000:100::/home/vera:/bin/sh\n", {"vera": b"1000:100:/home/vera"}),
        ("string", b'quoted "so"\n', {"quoted": b'"\\"so\\""'}),
    ],
)
def test_each_kind_of_file_is_stored_as_the_daemon_reads_it(consul, service, text, stored):
    done = importer(consul, "t", service, "-", stdin=text)
    assert (done.status, done.said) == (0, "")
    assert entries(consul, f"t/{service}/") == stored


def test_key_that_modern_consul_refuses_is_skipped_and_the_others_are_written(consul, tmp_path):
    path = file(tmp_path, b"root: gilles\nu%20y: eric\nzoe: eric\n")
    for more, last in (
        (["--dry-run"], "2 to add, 0 to change, 0 to remove, 0 unchanged, 1 refused"),
        ([], "2 written"),
    ):
        done = importer(consul, "aliases", "alias", path, *more)
        assert (done.status, done.text.splitlines()[-1]) == (2, last)
        places = [line.partition(": the key has ")[0] for line in done.said.splitlines()]
        assert places == [f"{path}:2: u%20y"]
    assert entries(consul) == {"root": b"gilles", "zoe": b"eric"}
    report = json.loads(importer(consul, "aliases", "alias", path, "--json").text)
    assert (len(report["refused"]), report["changes"], report["unchanged"]) == (1, [], 2)


def test_stored_key_that_modern_consul_refuses_is_exported_and_unchanged(consul, tmp_path):
    consul.kv_txn({f"aliases/regex/{key}": "" for key in ("u%20y", "end ", "a//b")})
    for wanted, number in (("export", 3), ("table", 2)):
        path = tmp_path / wanted
        done = control("export", "aliases", "regex", path, "--format", wanted, CONSUL_HTTP_ADDR=consul.address)
        if wanted == "table":  # which has no quotes for the blank at the end
            assert (done.status, "aliases/regex/end : cannot be written to a file: table" in done.said) == (2, True)
            continue
        done = importer(consul, "aliases", "regex", path, "--prune")
        assert (done.status, done.text) == (0, f"0 to add, 0 to change, 0 to remove, {number} unchanged\n"), done.said


# Folders that several services share.


SHARED = '[tables.t]\npaths = { credentials = "people", userinfo = "people" }'


def test_records_serve_several_services_from_one_folder(consul, tmp_path):
    conf = write_config(tmp_path, more=SHARED, address=f"http://{consul.address}")
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
    assert "standard input: vera: stored as a record that several services read" in done.said
    assert control("-c", conf, "import", "t", "userinfo", "-", "--prune", "--record", stdin=text).status == 0
    assert entries(consul, "people/").keys() == {"bob"}


def test_prune_removes_keys_in_the_folder_of_another_service(consul, tmp_path):
    paths = '[tables.t]\npaths = { domain = "shared", alias = "shared/alias" }'
    conf = write_config(tmp_path, more=paths, address=f"http://{consul.address}")
    consul.kv_put("shared/alias/old", "x")
    assert control("-c", conf, "import", "t", "alias", "-", "--prune", stdin=b"new: x\n").status == 0
    assert entries(consul, "shared/").keys() == {"alias/new"}


# Reports.


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
        "notes": [],
        "problems": [],
        "refused": [],
    }


def test_unregistered_service_is_noted(consul):
    done = importer(consul, "t", "auth", "-", stdin=f"vera {HASH}\n".encode())
    assert (done.status, "note: auth is not among the services of table t" in done.said) == (0, True)


def test_long_list_of_changes_is_complete_only_in_a_dry_run(consul):
    count = writing.CHANGES_SHOWN + 5
    dry = importer(consul, "aliases", "alias", "-", "--dry-run", stdin=alias_lines(count))
    assert len(dry.text.splitlines()) == count + 1
    done = importer(consul, "aliases", "alias", "-", stdin=alias_lines(count))
    assert "... and 5 more (use --dry-run to list all)" in done.text
    assert len(entries(consul)) == count


# Exports.


def consul_kv_export(agent, prefix):
    command = [consul_binary(), "kv", "export", f"-http-addr={agent.address}", prefix]
    return subprocess.run(command, capture_output=True, check=True).stdout


def test_export_of_another_table_is_written_below_the_table(consul, tmp_path):
    consul.kv_txn({"old/mail/alias/root": "gilles\n", "old/mail/domain/example.org": "", "old/mail/alias/": ""})
    text = consul_kv_export(consul, "old/")
    done = importer(consul, "aliases", "alias", "-", stdin=text)
    assert (done.status, "skipped 1 entry in other folders\n" in done.said) == (0, True)
    assert entries(consul) == {"root": b"gilles\n"}


def test_from_selects_any_folder_of_an_export(consul):
    consul.kv_txn({"people/root": "gilles", "top": "eric"})
    text = consul_kv_export(consul, "")
    assert "--from" in importer(consul, "aliases", "alias", "-", stdin=text).said
    for folder in ("people", "/people/"):
        assert importer(consul, "aliases", "alias", "-", "--from", folder, stdin=text).status == 0
    assert entries(consul) == {"root": b"gilles"}
    assert importer(consul, "x", "string", "-", "--from", "/", stdin=text).status == 0
    assert consul.kv_get("x/string/top") == b"eric"


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
        reason = "denies the token access: 403" if token else "no token is configured"
        assert (done.status, reason in done.said) == (2, True), done.said
    assert entries(consul_with_acl) == {"root": b"eric"}


def test_token_with_write_permission_writes(consul_with_acl):
    token = consul_with_acl.token('key_prefix "aliases/" { policy = "write" }')
    done = importer(consul_with_acl, "aliases", "alias", "-", stdin=b"root: gilles\n", token=token)
    assert (done.status, entries(consul_with_acl)) == (0, {"root": b"gilles"})


def test_json_report_is_written_if_too_many_removals_prevent_the_import(consul):
    consul.kv_txn({f"aliases/alias/user{number}": "x" for number in range(30)})
    done = importer(consul, "aliases", "alias", "-", "--prune", "--json", stdin=b"root: gilles\n")
    assert (done.status, "removes 30 of 30 entries; nothing was written" in done.said) == (2, True)
    report = json.loads(done.text)
    assert (report["written"], len(report["changes"]), len(entries(consul))) == (0, 31, 30)
