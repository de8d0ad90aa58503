"""`table-consulctl export`: smtpd and Consul read the files as the entries that Consul stores."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from table_consul.ctl import export
from tests.control import at_terminal, control, finished, start
from tests.dialogue import write_config, write_source
from tests.rig.consul import consul_binary

ALIASES = {
    "Root": b"gilles\n",
    "staff": b'["gilles", "eric"]',
    "quoted": b'"gilles"',
    "lines": b"# x\ngilles\neric\n",
    "tagged+x@example.org": b"gilles, eric@example.org",
    "@example.org": b"gilles",
}
TABLE = b"""\
@example.org:\tgilles
lines:\tgilles, eric
quoted:\tgilles
root:\tgilles
staff:\tgilles, eric
tagged+x@example.org:\tgilles, eric@example.org
"""


def put(agent, entries, path="aliases/alias/"):
    for key, value in entries.items():
        agent.kv_put(path + key, value)


def exported(agent, *arguments, token=None):
    more = {"CONSUL_HTTP_TOKEN": token} if token else {}
    return control("export", *arguments, CONSUL_HTTP_ADDR=agent.address, **more)


def test_table_holds_the_answers_of_smtpd(consul):
    put(consul, {**ALIASES, "folder/": b""})
    assert exported(consul, "aliases", "alias") == (0, TABLE, b"")
    assert exported(consul, "aliases", "alias", "--format", "aliases").out == TABLE


def test_export_equals_consul_kv_export(consul):
    put(consul, {**ALIASES, "folder/": b"", "bytes": b"\xff\0", "empty": b"", "a<b>&c": b"x"})
    consul.request("PUT", "/v1/kv/aliases/alias/flagged?flags=7", b"x")
    command = [consul_binary(), "kv", "export", f"-http-addr={consul.address}", "aliases/alias/"]
    theirs = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    ours = json.loads(exported(consul, "aliases", "alias", "--format", "export").text)
    assert ours == [entry for entry in theirs if entry["key"] != "aliases/alias/folder/"]


def test_consul_imports_an_export(consul, tmp_path):
    put(consul, ALIASES)
    path = tmp_path / "backup.json"
    assert exported(consul, "aliases", "alias", path, "--format", "export").status == 0
    consul.kv_delete("", recurse=True)
    command = [consul_binary(), "kv", "import", f"-http-addr={consul.address}", f"@{path}"]
    subprocess.run(command, capture_output=True, check=True)
    assert {key: consul.kv_get(f"aliases/alias/{key}") for key in ALIASES} == ALIASES


@pytest.mark.parametrize("wanted", export.FORMATS)
def test_import_of_an_export_changes_nothing_and_restores_everything(consul, tmp_path, wanted):
    put(consul, ALIASES)
    path = tmp_path / "file"
    assert exported(consul, "aliases", "alias", path, "--format", wanted).status == 0
    before = consul.request("GET", "/v1/kv/?recurse")
    again = control("import", "aliases", "alias", path, "--prune", CONSUL_HTTP_ADDR=consul.address)
    assert (again.status, again.text) == (0, "0 to add, 0 to change, 0 to remove, 6 unchanged\n")
    assert consul.request("GET", "/v1/kv/?recurse") == before
    consul.kv_delete("", recurse=True)
    assert control("import", "aliases", "alias", path, CONSUL_HTTP_ADDR=consul.address).status == 0
    assert exported(consul, "aliases", "alias").out == TABLE


keys = st.text(st.sampled_from("ab.@*-/ é"), min_size=1, max_size=5).filter(
    lambda key: not {"", ".", ".."} & {*key.split("/")}
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(keys, st.binary(max_size=10), min_size=1, max_size=5),
    st.sampled_from(["alias", "string", "domain"]),
)
def test_any_entries_survive_export_and_import(consul, entries, service):
    consul.kv_delete("", recurse=True)
    # By transaction, because Consul from 1.21.6 on refuses a URL whose key ends with a blank.
    consul.kv_txn({f"t/{service}/{key}": value for key, value in entries.items()})
    text = exported(consul, "t", service, "--format", "export").out
    done = control("import", "t", service, "-", "--prune", stdin=text, CONSUL_HTTP_ADDR=consul.address)
    assert (done.status, f"0 to add, 0 to change, 0 to remove, {len(entries)} unchanged" in done.text) == (0, True), (
        done
    )


@pytest.mark.parametrize(
    ("service", "text"),
    [
        ("domain", b"# @list\n*.example.net\nexample.org\n"),
        ("netaddr", b"# @list\n192.0.2.0/24\n[2001:db8::/32]\n"),
        ("addrname", b"192.0.2.1\tmail.example.org\n"),
        ("userinfo", b"vera\t1000:100:/home/vera\n"),
    ],
)
def test_each_service_is_exported_as_a_list_or_a_mapping(consul, service, text):
    imported = control("import", "t", service, "-", stdin=text, CONSUL_HTTP_ADDR=consul.address)
    assert (imported.status, imported.said) == (0, "")
    assert exported(consul, "t", service).out == text


def test_entry_without_value_among_values_is_its_own_value(consul):
    put(consul, {"example.org": b"", "example.net": b"yes"}, "t/mailaddr/")
    assert exported(consul, "t", "mailaddr").out == b"example.net\tyes\nexample.org\texample.org\n"


def test_table_of_a_service_of_lists_has_no_values_and_its_import_changes_nothing(consul):
    put(consul, {"example.org": b"", "example.net": b"yes"}, "t/domain/")
    text = exported(consul, "t", "domain").out
    done = control("import", "t", "domain", "-", "--prune", stdin=text, CONSUL_HTTP_ADDR=consul.address)
    assert (text, done.status) == (b"# @list\nexample.net\nexample.org\n", 0)
    assert "0 to add, 0 to change, 0 to remove, 2 unchanged" in done.text


def test_entries_a_table_cannot_hold_are_named_and_nothing_is_written(consul, tmp_path):
    path = tmp_path / "aliases"
    path.write_text("old\n")
    put(consul, {"root": b"gilles", "john doe": b"john", "#x": b"y", "bad": b"|/bin/sh", "Root": b"eric"})
    done = exported(consul, "aliases", "alias", path)
    assert (done.status, path.read_text()) == (2, "old\n")
    lines = done.said.splitlines()
    for key in ("bad", "john doe", "#x", "Root"):
        assert sum(line.startswith(f"aliases/alias/{key}: ") for line in lines) == 1, lines
    assert "--format export" in lines[-1]
    assert exported(consul, "aliases", "alias", path, "--format", "export").status == 0


def test_entries_a_table_cannot_hold_are_left_out_with_skip_refused(consul, tmp_path):
    path = tmp_path / "aliases"
    put(consul, {"root": b"gilles", "john doe": b"john", "bad": b"|/bin/sh", "Root": b"eric"})
    done = exported(consul, "aliases", "alias", path, "--skip-refused")
    assert (done.status, path.read_bytes()) == (1, b"root:\tgilles\n")
    keys = sorted(line.partition(": ")[0] for line in done.said.splitlines())
    assert keys == [f"aliases/alias/{key}" for key in ("Root", "bad", "john doe")]
    assert exported(consul, "aliases", "alias", path, "--skip-refused", "--format", "export").status == 0


def test_records_without_a_field_of_the_service_are_left_out(consul):
    put(consul, {"eric": b'{"password": "*"}', "vera": b'{"uid": 1, "gid": 2, "home": "/v"}'}, "t/userinfo/")
    assert exported(consul, "t", "userinfo") == (0, b"vera\t1:2:/v\n", b"")


def test_token_without_read_permission_writes_no_file(consul_with_acl, tmp_path):
    put(consul_with_acl, ALIASES)
    token = consul_with_acl.token('key_prefix "other/" { policy = "read" }')
    done = exported(consul_with_acl, "aliases", "alias", tmp_path / "file", token=token)
    assert (done.status, "403" in done.said, os.listdir(tmp_path)) == (2, True, [])


def test_empty_table_is_an_empty_file(consul):
    assert exported(consul, "aliases", "alias") == (0, b"", b"")
    assert exported(consul, "aliases", "alias", "--format", "export") == (0, b"[]\n", b"")


def test_file_address_is_exported(tmp_path):
    conf = write_config(tmp_path)
    assert control("-c", conf, "export", "aliases", "domain").out == b"# @list\nexample.org\n"
    assert len(json.loads(control("-c", conf, "export", "aliases", "alias", "--format", "export").text)) == 5


def test_pipe_as_address_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    conf = tmp_path / "c.toml"
    conf.write_text(f'[consul]\naddress = "file://{tmp_path}/pipe"\n')
    done = finished(start("-c", conf, "export", "aliases", "alias"))
    assert (done.status, "pipe: a named pipe, not a file" in done.said) == (2, True)


def test_control_characters_are_escaped_on_a_terminal(tmp_path):
    source = write_source(tmp_path, {"t/alias/root": b"a\x1b[2J", "t/alias/eric": b"joerg"})
    (tmp_path / "c.toml").write_text(f'[consul]\naddress = "file://{source}"\n')
    _, seen = at_terminal("-c", tmp_path / "c.toml", "export", "t", "alias")
    assert re.sub(r"[\t ]+", " ", seen) == "eric: joerg\nroot: a\\x1b[2J\n"


def test_aliases_format_is_only_for_alias(tmp_path):
    done = control("-c", write_config(tmp_path), "export", "aliases", "domain", "--format", "aliases")
    assert (done.status, "requires the service alias" in done.said) == (2, True)


def test_closed_output_is_not_a_traceback(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as nobody:
        done = finished(start("-c", write_config(tmp_path), "export", "aliases", "domain", stdout=nobody))
    assert (done.status, done.said) == (2, "")


# The file.


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_file_that_may_hold_passwords_is_private(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(0o644)
    export.write_file(str(path), b"new", private=True)
    assert (path.read_bytes(), mode(path)) == (b"new", 0o600)
    for service in ("credentials", "auth", "userinfo"):
        made = tmp_path / service
        assert control("-c", write_config(tmp_path), "export", "empty", service, made).status == 0
        assert mode(made) == 0o600


def test_other_file_keeps_its_mode_and_a_new_one_follows_the_umask(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(0o664)
    export.write_file(str(path), b"new", private=False)
    assert (path.read_bytes(), mode(path)) == (b"new", 0o664)
    before = os.umask(0o027)
    export.write_file(str(tmp_path / "y"), b"new", private=False)
    os.umask(before)
    assert mode(tmp_path / "y") == 0o640


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_file_keeps_its_owner(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(0o640)
    os.chown(path, 12345, 54321)
    export.write_file(str(path), b"new", private=False)
    status = path.stat()
    assert (status.st_uid, status.st_gid, mode(path), path.read_bytes()) == (12345, 54321, 0o640, b"new")
    export.write_file(str(path), b"hash", private=True)
    assert (path.stat().st_uid, mode(path)) == (0, 0o600)


def test_export_writes_through_links_and_pipes(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    export.write_file(str(tmp_path / "link"), b"new", private=False)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    reader, writer = os.pipe()
    export.write_file(f"/dev/fd/{writer}", b"new", private=True)
    assert os.read(reader, 10) == b"new"
    os.close(reader)
    os.close(writer)


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_text("old")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        export.write_file(str(path), b"new", private=False)
    assert (path.read_text(), os.listdir(tmp_path)) == ("old", ["x"])


def test_missing_folder_is_an_error(tmp_path):
    done = control("-c", write_config(tmp_path), "export", "aliases", "domain", tmp_path / "none" / "x")
    assert done == (2, b"", f"table-consulctl: {tmp_path}/none/x: no such file or directory\n".encode())


# smtpd's own reader.

CONF = """\
table aliases file:/etc/mail/exported
listen on 127.0.0.1 port $smtp_port
action "local" maildir alias <aliases>
match from any for local action "local"
"""
ODD = {
    "colon": b"gilles, eric",
    "many": b"gilles,eric,joerg",
    "Tabs": b"gilles,\teric",
    "hash": b"gilles#x@example.org",
    "error": b"error:550 no such user",
    "list": b'["gilles", "eric"]',
    "joined": b"gilles\neric\n",
    "equal": b"a=b@example.org",
    "quote": b'"|/bin/cat, x"',
    "include": b":include:/etc/list",
}


def test_smtpd_reads_the_same_entries_from_the_file_and_from_consul(consul, smtpd, tmp_path):
    conf = write_config(tmp_path, "allow_commands = true", address=f"http://{consul.address}")
    put(consul, ODD)
    done = control("-c", conf, "export", "aliases", "alias")
    assert (done.status, done.said) == (0, "")
    mail = smtpd(CONF, {"/etc/mail/exported": done.out})
    asked = [key.lower() for key in ODD]
    mail.send(*(f"{key}@localhost" for key in asked))
    answers = dict(re.findall(r'lookup: lookup "(\w+)" as alias in table static:aliases -> "(.*)"', mail.log))
    told = control("-c", conf, "query", "aliases", "alias", *asked).text
    assert {key: answers[key] for key in asked} == dict(line.split("\t", 1) for line in told.splitlines())


@pytest.mark.parametrize(("keys", "count"), [(["a b"], "1 of 1 entry"), (["a b", "c"], "1 of 2 entries")])
def test_entries_that_cannot_be_written_are_counted(tmp_path, keys, count):
    path = write_config(tmp_path)
    write_source(tmp_path, {f"aliases/alias/{key}": b"x" for key in keys})
    done = control("-c", path, "export", "aliases", "alias")
    assert (done.status, f"{count} cannot be written in this format" in done.said) == (2, True), done.said


@pytest.mark.parametrize("wanted", ["table", "export"])
def test_file_is_private_if_another_service_of_the_folder_has_passwords(tmp_path, wanted):
    source = write_source(tmp_path, {"users/vera@example.org": b"$6$salt$hash"})
    paths = 'services = ["mailaddr", "credentials"]\npaths = { mailaddr = "users", credentials = "users" }'
    config = write_config(tmp_path, paths, address=f"file://{source}")
    path = tmp_path / "file"
    assert control("-c", config, "export", "t", "mailaddr", path, "--format", wanted).status == 0
    assert mode(path) == 0o600
