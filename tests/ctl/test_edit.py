"""`table-consulctl edit`: the text in the editor, refused entries, and concurrent edits."""

from __future__ import annotations

import base64
import json
import os
import signal
import sys

import pytest

from tests.control import START, at_terminal, control, finished, start
from tests.ctl.editors import Editor
from tests.ctl.importing import HASH, alias_lines, entries
from tests.dialogue import write_config
from tests.fake_consul import FakeConsul

PATH = b"aliases/alias/"


@pytest.fixture
def fake():
    with FakeConsul() as fake:
        fake.put(PATH + b"root", b"gilles")
        fake.put(PATH + b"staff", b"gilles, eric")
        yield fake


@pytest.fixture
def edit(fake, tmp_path):
    """Runs `edit` with an editor of these steps and these answers; the outcome and the editor."""

    def run(*steps, arguments=("aliases", "alias"), answers=b"", before=(), visual=""):
        editor = Editor(tmp_path, *steps)
        stdin = answers if isinstance(answers, bytes) else "\n".join(answers).encode() + b"\n"
        environ = {"CONSUL_HTTP_ADDR": fake.address, "EDITOR": editor.command, "VISUAL": visual}
        return control(*before, "edit", *arguments, stdin=stdin, **environ), editor

    return run


def values(fake, path=PATH):
    return {key.removeprefix(path): each.value for key, each in fake.store.entries.items() if key.startswith(path)}


BEFORE = {b"root": b"gilles", b"staff": b"gilles, eric"}


# Against a real Consul, at a terminal.


def test_edit_shows_the_changes_and_writes_them_after_a_question(consul, tmp_path):
    consul.kv_txn({"aliases/alias/root": "gilles", "aliases/alias/old": "x", "aliases/alias/same": "y"})
    editor = Editor(tmp_path, "text = text.replace('gilles', 'eric').replace('old:\\tx\\n', 'new: z\\n')")
    status, shown = at_terminal(
        *("edit", "aliases", "alias"),
        turns=[(b"Write?", b"y\n")],
        CONSUL_HTTP_ADDR=consul.address,
        EDITOR=editor.command,
        VISUAL="",
    )
    assert (status, entries(consul)) == (0, {"root": b"eric", "new": b"z", "same": b"y"}), shown
    for line in ("\x1b[32m+ new z", "\x1b[31m- old x", "\x1b[33m~ root gilles -> eric", "3 written"):
        assert line in shown
    (opened,) = editor.opened
    assert opened["modes"] == ["0o600", "0o700"]
    assert not os.path.exists(opened["path"])


def test_refused_entry_opens_the_editor_again_at_its_line(consul, tmp_path):
    consul.kv_put("aliases/alias/root", "gilles")
    editor = Editor(tmp_path, "text = text.replace('gilles', '|/bin/sh')", "text = text.replace('|/bin/sh', 'eric')")
    status, shown = at_terminal(
        *("edit", "aliases", "alias"),
        turns=[(b"q(uit)", b"\n"), (b"Write?", b"y\n")],
        CONSUL_HTTP_ADDR=consul.address,
        EDITOR=editor.command,
        VISUAL="",
    )
    assert (status, entries(consul)) == (0, {"root": b"eric"}), shown
    first, second = editor.opened
    line = 1 + first["text"].splitlines().index("root:\tgilles")
    assert (first["arguments"], second["arguments"]) == ([], [f"+{line}"])
    assert "|/bin/sh" in second["text"]
    assert "allow_commands" in shown


def test_concurrent_edits_of_different_keys_are_both_kept(consul, tmp_path):
    consul.kv_txn({f"aliases/alias/{key}": "x" for key in "abc"})
    (tmp_path / "other").mkdir()
    change = "text = text.replace('a:\\tx', 'a: other').replace('c:\\tx\\n', '') + 'd: other\\n'"
    other = Editor(tmp_path / "other", change)
    command = [sys.executable, "-c", START, "edit", "aliases", "alias"]
    environ = {"CONSUL_HTTP_ADDR": consul.address, "VISUAL": ""}
    meanwhile = (
        f"import subprocess; subprocess.run({command!r}, input=b'y', env={dict(os.environ) | environ!r} | {{'EDITOR': "
    )
    meanwhile += f"{other.command!r}}}, check=True, stdout=subprocess.DEVNULL); "
    own = "text = text.replace('a:\\tx', 'a: own').replace('b:\\tx', 'b: own') + 'd: own\\n'"
    editor = Editor(tmp_path, meanwhile + own)
    done = control(*command[3:], stdin=b"y", EDITOR=editor.command, **environ)
    assert (done.status, entries(consul)) == (2, {"a": b"other", "b": b"own", "d": b"other"}), done.said
    assert [line.partition(":")[0] for line in done.said.splitlines()] == ["aliases/alias/a", "aliases/alias/d"]
    assert "changed in Consul since the editor opened" in done.said


# The text in the editor.


def test_editor_gets_the_file_that_export_writes(edit, fake):
    done, editor = edit("")
    assert (done.status, done.text, values(fake)) == (0, "nothing to write\n", BEFORE)
    lines = editor.opened[0]["text"].splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["root:\tgilles", "staff:\tgilles, eric"]


def test_key_is_edited_alone(edit, fake):
    done, editor = edit("text = text.replace('gilles', 'vera')", arguments=("aliases", "alias", "Root"), answers=["y"])
    assert (done.status, "staff" in editor.opened[0]["text"]) == (0, False)
    assert values(fake) == BEFORE | {b"root": b"vera"}


def test_entry_that_the_file_cannot_hold_is_named_and_kept(edit, fake):
    fake.put(PATH + b"bad", b"|/bin/sh")
    fake.put(PATH + b"two words", b"x")
    done, editor = edit("text = text.replace('root:\\tgilles\\n', '')", answers=["y"])
    assert (done.status, done.text.splitlines()[0]) == (0, "- root gilles")
    assert values(fake).keys() == {b"bad", b"two words", b"staff"}
    assert [key for key in ("bad:", "two words:") if f"--format export: {key}" not in editor.opened[0]["text"]] == []


def test_export_is_edited_as_it_is_stored(edit, fake):
    fake.put(PATH + b"bad", b"|/bin/sh", 7)
    old, new = (base64.b64encode(value).decode() for value in (b"|/bin/sh", b"eric"))
    step = f"text = text.replace({old!r}, {new!r})"
    done, editor = edit(step, arguments=("aliases", "alias", "--format", "export"), answers=["y"])
    assert (done.status, values(fake)) == (0, BEFORE | {b"bad": b"eric"})
    assert json.loads(editor.opened[0]["text"])[0]["key"] == "aliases/alias/bad"
    assert fake.store.entries[PATH + b"bad"].flags == 7


@pytest.mark.parametrize(("service", "line", "value"), [("domain", "example.org", b""), ("string", "k v", b"v")])
def test_empty_folder_can_be_filled(edit, fake, service, line, value):
    done, _ = edit(f"text = text + {line!r} + '\\n'", arguments=("other", service), answers=["y"])
    assert done.status == 0, done.said
    assert values(fake, f"other/{service}/".encode()) == {line.split()[0].encode(): value}


def test_hash_is_in_the_file_and_not_on_the_terminal(edit, fake):
    fake.put(b"users/credentials/vera", HASH.encode())
    done, editor = edit(
        "text = text.replace('$2b$10$h', '$2b$10$x')", arguments=("users", "credentials"), answers=["y"]
    )
    assert (done.status, HASH in editor.opened[0]["text"], "$2b$" in done.text) == (0, True, False)


def test_edit_of_records_changes_fields(edit, fake, tmp_path):
    shared = '[tables.t]\npaths = { credentials = "people", userinfo = "people" }'
    conf = write_config(tmp_path, more=shared, address=fake.address)
    record = {"password": HASH, "uid": 1000, "gid": 100, "home": "/home/vera", "quota": 5}
    for name in (b"vera", b"eric"):
        fake.put(b"people/" + name, json.dumps(record).encode())
    step = "text = text.replace('vera\\t1000', 'vera\\t1001').replace('eric\\t1000:100:/home/vera\\n', '')"
    done, _ = edit(step, arguments=("t", "userinfo"), answers=["y"], before=("-c", conf))
    assert done.status == 0, done.said
    found = {key: json.loads(value) for key, value in values(fake, b"people/").items()}
    assert found == {b"vera": record | {"uid": 1001}, b"eric": {"password": HASH, "quota": 5}}


# --json.


def test_json_reports_what_was_written_and_conflicts(edit, fake):
    fake.put(PATH + b"new", b"x")
    conflict = f"import urllib.request; open_ = urllib.request.Request({fake.address + '/v1/kv/aliases/alias/root'!r}, "
    conflict += "b'by hand', method='PUT'); urllib.request.urlopen(open_); "
    step = conflict + "text = text.replace('root:\\tgilles', 'root: vera').replace('new:\\tx', 'new: y')"
    done, _ = edit(step, arguments=("aliases", "alias", "--json"), answers=["y"])
    report = json.loads(done.text)
    assert (done.status, report["written"], report["conflicts"]) == (2, 1, ["aliases/alias/root"]), done.said
    assert report["changes"][0] == {"change": "change", "key": "new", "from": "x", "to": "y"}
    assert "Write?" in done.said
    assert "~ new x -> y" in done.said


def test_json_reports_refused_entries(edit, fake):
    done, _ = edit("text += 'bad: |/bin/sh\\n'", arguments=("aliases", "alias", "--json"), answers=["q"])
    report = json.loads(done.text)
    assert (done.status, report["written"], values(fake)) == (2, 0, BEFORE)
    assert [(each["key"], "allow_commands" in each["text"]) for each in report["refused"]] == [("bad", True)]


def test_json_of_unconfirmed_changes_reports_nothing_written(edit, fake):
    done, _ = edit("text = text.replace('gilles', 'vera')", arguments=("aliases", "alias", "--json"), answers=["n"])
    report = json.loads(done.text)
    assert (done.status, report["written"], len(report["changes"]), values(fake)) == (2, 0, 2, BEFORE)


# Refused entries.


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("text = ''", "the file may be truncated"),
        ("text = text[:len(text) // 2]", "the file may be truncated"),
        ("text = '\\n'.join(line for line in text.splitlines() if line.startswith('#'))", "no entries"),
        ("text = text.replace('gilles\\n', '\\n', 1)", "has no value"),
        ("text += 'root: eric\\n'", "already in line"),
        ("text += 'Root: eric\\n'", "already in line"),
        ("text += 'u%20x: eric\\n'", "no URL can read"),
        ("text += 'a: b\\nb: a\\n'", "an alias loop"),
        ("text += '\\0'", "NUL"),
    ],
)
def test_quitting_after_a_refused_file_writes_nothing(edit, fake, step, said):
    done, _ = edit(step, answers=["q"])
    assert (done.status, said in done.said, values(fake)) == (2, True, BEFORE), done.said
    assert done.text.endswith("nothing was written\n")


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("text = text[:len(text) // 2]", "not the output of `consul kv export`"),
        ("text = '[]'", "no entries"),
        ("text = text.replace('aliases/', 'other/', 1)", "1 key is not below aliases/alias/"),
    ],
)
def test_refused_export_writes_nothing(edit, fake, step, said):
    done, _ = edit(step, arguments=("aliases", "alias", "--format", "export"), answers=["q"])
    assert (done.status, said in done.said, values(fake)) == (2, True, BEFORE), done.said


@pytest.mark.parametrize(("answers", "status"), [(["n"], 2), ([""], 2), ([], 2)])
def test_answer_other_than_yes_writes_nothing(edit, fake, answers, status):
    done, editor = edit("text = text.replace('gilles', 'vera')", answers=answers or b"")
    assert (done.status, values(fake), os.path.exists(editor.opened[0]["path"])) == (status, BEFORE, False)


def test_editor_opens_again_on_request(edit, fake):
    done, editor = edit("text = text.replace('gilles', 'vera')", "text = text.replace('vera', 'zoe')", answers="ey")
    assert (done.status, values(fake)[b"root"], len(editor.opened)) == (0, b"zoe", 2)


@pytest.mark.parametrize("step", ["sys.exit(3)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_editor_that_fails_writes_nothing(edit, fake, step):
    done, editor = edit(f"path.write_text('half'); {step}")
    assert (done.status, "nothing was written" in done.said, values(fake)) == (2, True, BEFORE)
    assert not os.path.exists(editor.opened[0]["path"])


def test_missing_editor_is_one_line(fake):
    done = control("edit", "aliases", "alias", CONSUL_HTTP_ADDR=fake.address, VISUAL="/nonexistent -w")
    assert (done.status, done.said) == (2, "table-consulctl: /nonexistent -w: no such file or directory (set EDITOR)\n")


@pytest.mark.parametrize(("command", "said"), [("vi '", "No closing quotation"), ("\\", "No escaped character")])
def test_editor_that_no_shell_could_split_is_one_line(fake, command, said):
    done = control("edit", "aliases", "alias", CONSUL_HTTP_ADDR=fake.address, VISUAL=command)
    assert (done.status, done.said) == (2, f"table-consulctl: {command}: {said} (set EDITOR)\n")


def test_blank_editor_is_as_if_unset(edit, fake):
    done, editor = edit("text = text.replace('gilles', 'vera')", answers="y", visual=" ")
    assert (done.status, values(fake)[b"root"], len(editor.opened)) == (0, b"vera", 1)


@pytest.mark.usefixtures("interruptible")
def test_closed_terminal_leaves_no_file(fake, tmp_path):
    editor = Editor(tmp_path, f"os.kill(os.getppid(), signal.{signal.SIGHUP.name}); import time; time.sleep(30)")
    environ = {**os.environ, "CONSUL_HTTP_ADDR": fake.address, "EDITOR": editor.command, "VISUAL": ""}
    done = finished(start("edit", "aliases", "alias", env=environ))
    assert (done.status, done.said) == (2, "table-consulctl: interrupted\n")
    assert not os.path.exists(editor.opened[0]["path"])


@pytest.mark.slow
def test_edit_of_100_000_entries_writes_only_changes(edit, fake):
    for line in alias_lines(100_000).splitlines():
        key, _, value = line.partition(b": ")
        fake.put(PATH + key, value)
    before = values(fake)
    done, _ = edit("text = text.replace('target00500@', 'changed@')", answers=["y"])
    assert (done.status, done.text.endswith("1 written\n")) == (0, True), done.said
    assert values(fake) == before | {b"user00500": b"changed@example.org"}
