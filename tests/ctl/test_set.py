"""`table-consulctl set` and `unset`: one entry, checked as by lint, or the fields of a record for one service."""

from __future__ import annotations

import json
import os

import pytest

from table_consul.ctl import main, plan, txn
from tests.control import control, finished, start
from tests.ctl.importing import HASH, entries
from tests.dialogue import write_config

RECORD = {"password": HASH, "uid": 1000, "gid": 100, "home": "/home/vera", "quota": 5}
SHARED = '[tables.t]\npaths = { credentials = "people", userinfo = "people" }'
OTHER = "$2b$10$7DQeNMdHVL.XsZMVTlCTJOBQBBKSyYCxPyV8iXFBPBjzq5PAb9tqu"


@pytest.fixture
def run(fake):
    return lambda *arguments, **options: control(*arguments, CONSUL_HTTP_ADDR=fake.address, **options)


@pytest.fixture
def people(fake, tmp_path):
    """Runs a command on a table whose users are records in one folder."""
    conf = write_config(tmp_path, more=SHARED, address=fake.address)
    return lambda *arguments, **options: control("-c", conf, *arguments, **options)


def values(fake, path=b"aliases/alias/"):
    return {
        key.removeprefix(path).decode(): entry.value
        for key, entry in fake.store.entries.items()
        if key.startswith(path) and entry.value is not None
    }


# Against a real Consul.


def test_set_writes_and_shows_the_old_and_the_new_value(consul):
    def run(*arguments):
        return control("set", "aliases", "alias", *arguments, CONSUL_HTTP_ADDR=consul.address)

    note = b"note: aliases/alias/ has no entries yet\n"
    assert run("root", "gilles") == (0, b"+ root gilles\n1 written\n", note)
    assert run("root", "gilles,eric") == (0, b"~ root gilles -> gilles,eric\n1 written\n", b"")
    assert run("root", "gilles,eric") == (0, b"nothing to write\n", b"")
    assert entries(consul) == {"root": b"gilles,eric"}
    assert control("undo", "--no-undo", CONSUL_HTTP_ADDR=consul.address).status == 0
    assert entries(consul) == {"root": b"gilles"}


def test_unset_removes_an_entry_and_reports_an_absent_one(consul):
    consul.kv_txn({"aliases/alias/Root": "gilles", "aliases/alias/a": "x", "aliases/alias/b": "y"})
    done = control("unset", "aliases", "alias", "root", "a", "nobody", CONSUL_HTTP_ADDR=consul.address)
    assert (done.status, done.said) == (1, "nobody: not found\n")
    assert done.text.splitlines() == ["- Root gilles", "- a x", "2 written"]
    assert entries(consul) == {"b": b"y"}


def test_unset_reports_a_key_in_another_case_that_still_answers(consul):
    consul.kv_txn({"users/credentials/Vera": HASH, "users/credentials/vera": OTHER})
    environ = {"CONSUL_HTTP_ADDR": consul.address}
    done = control("unset", "users", "credentials", "vera", **environ)
    note = "note: users/credentials/Vera: differs only in case from vera and still answers (remove it too)\n"
    assert (done.status, done.said) == (0, note)
    assert control("query", "users", "credentials", "vera", **environ).text == f"{HASH}\n"
    done = control("unset", "users", "credentials", "VERA", **environ)
    assert (done.status, done.said, entries(consul, "users/credentials/")) == (0, "", {})
    consul.kv_txn({"users/credentials/Vera": HASH, "users/credentials/vera": OTHER})
    done = control("unset", "users", "credentials", "Vera", "vera", **environ)
    assert (done.status, done.said, entries(consul, "users/credentials/")) == (0, "", {})


def test_help_of_unset_describes_its_force():
    assert "--force            Remove an alias even if another one needs it." in control("unset", "--help").text


def test_token_without_write_permission_is_reported_with_a_hint(consul_with_acl):
    secret = consul_with_acl.token('key_prefix "aliases/" { policy = "read" }')
    environ = {"CONSUL_HTTP_ADDR": consul_with_acl.address, "CONSUL_HTTP_TOKEN": secret}
    done = control("set", "aliases", "alias", "root", "gilles", **environ)
    assert (done.status, "--token-file" in done.said, entries(consul_with_acl)) == (2, True, {})


# Refused entries.


@pytest.mark.parametrize(
    ("service", "key", "value", "said"),
    [
        ("alias", "root", "|/bin/sh", "aliases/alias/root: the value contains a |command"),
        ("alias", "*@example.org", "gilles", "* as its user"),
        ("alias", "a", "b", "an alias loop (a -> b -> a)"),
        ("alias", "folder/", "gilles", "no URL can name this key"),
        ("alias", "", "gilles", "no URL can name this key"),
        ("alias", "a//b", "gilles", "no URL can name this key"),
        ("alias", "root", "", "missing value"),
        ("domain", "vera@example.org", "", "is a mail address"),
        ("credentials", "vera", "secret", "not a hash"),
        ("userinfo", "vera", "0:0:/root", "allow_root"),
        ("relayhost", "example.org", "smtp://host:0", "the port"),
        ("regex", r"\S+", "", r"the key contains \S"),
    ],
)
def test_entry_that_lint_would_report_is_refused(run, fake, service, key, value, said):
    fake.put(b"aliases/alias/b", b"a")
    before = dict(fake.store.entries)
    done = run("set", "aliases", service, key, value)
    assert (done.status, done.text, said in done.said, "nothing was written" in done.said) == (2, "", True, True)
    assert fake.store.entries == before


def test_force_writes_what_lint_would_report(run, fake):
    done = run("set", "aliases", "alias", "root", "|/bin/sh", "--force")
    assert (done.status, "|command" in done.said) == (0, True)
    assert values(fake) == {"root": b"|/bin/sh"}


@pytest.mark.parametrize("more", [[], ["--force"]])
def test_value_that_consul_would_refuse_is_never_written(run, fake, tmp_path, more):
    folder = tmp_path / "undo"
    done = run(
        "set",
        "t",
        "string",
        "x",
        "-",
        *more,
        stdin=b"x" * (plan.VALUE_MAX_BYTES + 1),
        TABLE_CONSUL_UNDO_DIR=str(folder),
    )
    assert (done.status, "385024 bytes that Consul accepts" in done.said, "--force" in done.said) == (2, True, False)
    assert not folder.exists()


def test_key_that_no_url_can_name_is_refused_even_with_force(run, fake):
    done = run("set", "aliases", "string", "u%20x", "v", "--force")
    assert (done.status, values(fake, b"aliases/string/")) == (2, {})
    assert "no URL can read or delete" in done.said


def test_problem_of_another_entry_does_not_prevent_a_write(run, fake):
    fake.put(b"aliases/alias/bad", b"|/bin/sh")
    fake.put(b"aliases/alias/loop", b"loop2")
    fake.put(b"aliases/alias/loop2", b"loop")
    assert run("set", "aliases", "alias", "root", "gilles").status == 0


def test_unregistered_service_is_noted(run):
    done = run("set", "users", "auth", "vera", HASH)
    assert (done.status, "note: auth is not among the services of table users" in done.said) == (0, True)


def test_closed_output_writes_nothing_or_reports_the_write(fake):
    environ = {**os.environ, "CONSUL_HTTP_ADDR": fake.address}
    for more, said in ([], ""), (["--json"], "interrupted: 1 of 1 key written"):
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "wb") as nobody:
            done = finished(start("set", "aliases", "alias", "root", "gilles", *more, stdout=nobody, env=environ))
        assert (done.status, said in done.said, len(values(fake))) == (2, True, len(more))


# Keys and values.


@pytest.mark.parametrize("key", ["Root", " root "])
def test_key_is_stored_as_smtpd_looks_it_up(run, fake, key):
    done = run("set", "aliases", "alias", key, "gilles")
    assert (done.status, values(fake)) == (0, {"root": b"gilles"})
    assert f"note: {key} is stored as root" in done.said


def test_stored_key_in_another_case_is_changed_without_a_duplicate(run, fake):
    fake.put(b"aliases/alias/Root", b"eric")
    assert run("set", "aliases", "alias", "root", "gilles").status == 0
    assert values(fake) == {"Root": b"gilles"}


def test_value_is_read_from_standard_input(run, fake):
    assert (
        run(
            "set",
            "aliases",
            "alias",
            "root",
            "-",
            stdin=b"gilles,\xff eric\n",
        ).status
        == 2
    )
    assert run("set", "aliases", "string", "k", "-", stdin=b"v\xff\n").status == 0
    assert values(fake, b"aliases/string/") == {"k": b"v\xff"}


def test_value_is_the_answer_of_smtpd(run, fake):
    assert run("set", "aliases", "string", "k", '"quoted"').status == 0
    assert run("query", "aliases", "string", "k").text == '"quoted"\n'
    assert run("set", "aliases", "string", "k", " v ").status == 0
    assert run("query", "aliases", "string", "k").text == " v\n"


def test_json_reports_what_was_written_but_no_hash(run):
    report = json.loads(run("set", "aliases", "alias", "root", "gilles", "--json").text)
    assert (report["written"], report["conflicts"]) == (1, [])
    assert report["changes"] == [{"change": "add", "key": "root", "from": None, "to": "gilles"}]
    done = run("set", "users", "credentials", "vera", HASH)
    assert (done.status, HASH in done.text + done.said) == (0, False)


def test_escapes_in_a_value_do_not_reach_the_terminal(run, fake):
    fake.put(b"aliases/string/k", b"\x1b[2J")
    done = run("set", "aliases", "string", "k", "v")
    assert (done.status, "\x1b[2J" in done.text) == (0, False)


def test_concurrent_edit_is_not_overwritten(run, fake, monkeypatch):
    transact = txn.Store.transact

    def late(self, changes, **options):
        fake.put(b"aliases/alias/root", b"by hand")
        return transact(self, changes, **options)

    monkeypatch.setattr(txn.Store, "transact", late)
    done = run("set", "aliases", "alias", "root", "gilles")
    assert (done.status, values(fake)) == (2, {"root": b"by hand"})
    assert "aliases/alias/root: changed in Consul since it was read" in done.said


# Records.


def test_set_changes_the_field_of_a_record(people, fake):
    fake.put(b"people/vera", json.dumps(RECORD).encode())
    assert people("set", "t", "userinfo", "vera", "1001:100:/srv/vera").status == 0
    assert people("set", "t", "credentials", "vera", OTHER).status == 0
    assert json.loads(values(fake, b"people/")["vera"]) == RECORD | {
        "uid": 1001,
        "home": "/srv/vera",
        "password": OTHER,
    }


def test_new_user_of_a_folder_of_records_is_a_record(people, fake):
    assert people("set", "t", "userinfo", "vera", "1000:100:/home/vera").status == 0
    assert people("set", "t", "credentials", "vera", HASH).status == 0
    assert json.loads(values(fake, b"people/")["vera"]) == {key: RECORD[key] for key in RECORD if key != "quota"}


def test_new_user_beside_records_of_one_service_is_a_record(run, fake):
    fake.put(b"users/credentials/vera", json.dumps(RECORD).encode())
    assert run("set", "users", "credentials", "eric", HASH).status == 0
    assert json.loads(values(fake, b"users/credentials/")["eric"]) == {"password": HASH}


def test_unset_reports_a_key_that_no_transaction_can_name(consul):
    consul.request("PUT", "/v1/kv/aliases/alias/a%80", b"x")
    done = control("unset", "aliases", "alias", "a\ufffd", CONSUL_HTTP_ADDR=consul.address)
    assert (done.status, "the key may have other bytes than Consul lists" in done.said) == (2, True)


def test_unset_removes_the_field_and_then_the_record(people, fake):
    record = {key: RECORD[key] for key in ("password", "uid", "gid", "home")}
    fake.put(b"people/vera", json.dumps(record).encode())
    assert people("unset", "t", "credentials", "vera").text == "~ vera (not shown)\n1 written\n"
    assert json.loads(values(fake, b"people/")["vera"]) == {"uid": 1000, "gid": 100, "home": "/home/vera"}
    done = people("unset", "t", "userinfo", "vera")
    assert (done.text, values(fake, b"people/")) == ("- vera 1000:100:/home/vera\n1 written\n", {})


@pytest.mark.parametrize("value", ["0:0:/root", "1000", "x:y:/home"])
def test_invalid_value_never_replaces_a_record(people, fake, value):
    fake.put(b"people/vera", json.dumps(RECORD).encode())
    for more in ([], ["--force"]):
        assert people("set", "t", "userinfo", "vera", value, *more).status == 2
    assert json.loads(values(fake, b"people/")["vera"]) == RECORD


@pytest.mark.parametrize("name", ["set", "unset", "edit", "passwd", "undo"])
def test_help_fits_a_terminal_of_24_lines(name):
    assert name in main.COMMANDS
    assert len(control(name, "--help", COLUMNS="80").text.splitlines()) <= 24


def test_json_report_of_unset_lists_the_keys_that_are_not_found(run, fake):
    fake.put(b"aliases/alias/a", b"x")
    done = run("unset", "aliases", "alias", "a", "nobody", "--json")
    report = json.loads(done.text)
    assert (done.status, report["written"], report["not_found"]) == (1, 1, ["nobody"])


def test_write_without_a_known_home_folder_is_refused(run, fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without HOME and an entry in passwd(5)
    done = run("set", "aliases", "alias", "root", "gilles", "--undo-dir", "~/undo")
    assert (done.status, values(fake), os.listdir(tmp_path)) == (2, {}, [])
    assert "~/undo: the home folder is unknown; nothing was written (use --undo-dir," in done.said


def test_tilde_that_the_shell_leaves_in_the_undo_folder_is_the_home_folder(run, fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("set", "aliases", "alias", "root", "gilles", "--undo-dir=~/undo", HOME=str(tmp_path / "vera"))
    assert (done.status, os.listdir(tmp_path), os.listdir(tmp_path / "vera" / "undo")) == (0, ["vera"], ["000001.json"])


def test_json_report_is_written_if_the_entries_cannot_be_saved(run, fake):
    done = run("set", "aliases", "alias", "root", "gilles", "--json", "--undo-dir", "/dev/null/undo")
    report = json.loads(done.text)
    assert (done.status, report["written"], report["changes"][0]["key"]) == (2, 0, "root")
    assert ("nothing was written" in done.said, values(fake)) == (True, {})
