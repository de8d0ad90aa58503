"""Included files and ~/.forward in `table-consulctl expand`, as smtpd reads them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from table_consul.ctl import recipients
from table_consul.ctl.expand import INCLUDE_BYTES, forward
from table_consul.ctl.recipients import PERMANENT, TEMPORARY
from table_consul.protocol import NOT_FOUND, Found
from tests.control import control
from tests.dialogue import write_config, write_source


@pytest.fixture
def home():
    """A home that every user may enter, and that belongs to user 1000 or to the one who runs the tests."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        own(name)
        yield Path(name)


UID = os.getuid() or 1000
OTHER = " (another domain: smtpd.conf decides)"


def own(path):
    os.chown(path, UID, -1) if os.getuid() == 0 else None


def put(path, text):
    path.write_text(text)
    path.chmod(0o644)
    own(path)
    return os.fsencode(path)


@pytest.fixture
def expand(tmp_path, home):
    """Runs it on these aliases and users; the outcome."""

    def run(*addresses, users=("vera", "eric"), **aliases):
        store = {f"t/alias/{key}": value.encode() for key, value in aliases.items()}
        store |= {f"u/userinfo/{name}": f"{UID}:{UID}:{home}/{name}".encode() for name in users}
        for name in users:
            (home / name).mkdir(exist_ok=True)
            (home / name).chmod(0o755)
            own(home / name)
        source = write_source(tmp_path, store)
        path = write_config(tmp_path, "allow_commands = true", address=f"file://{source}")
        return control("-c", path, "expand", "t", *addresses, "--userinfo", "u")

    return run


def results(done):
    return sorted(line[5:].removesuffix(OTHER) for line in done.text.splitlines() if line.startswith("  -> "))


# Included files.


def test_included_file_is_followed(expand, home):
    path = put(home / "list", "vera, out@example.com\n\n# a comment\neric\n").decode()
    done = expand("a", a=f"nobody-else@example.com, :include:{path}")
    assert f"      {path}: vera, out@example.com, eric\n" in done.text
    assert results(done) == ["nobody-else@example.com", "out@example.com", "user eric", "user vera"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("vera\neric", "vera, eric"),
        ("vera, a b, eric\nvera+x\n", "vera, vera+x"),
        ("####\nvera\neric\n", "eric"),
        ("vera, :include:/etc/passwd, eric\n", "vera, eric"),
        ('vera, "eric\nvera+x\n', "vera, vera+x"),
        ("vera # x\neric\n", "eric"),
        ("x" * 2048 + "\neric\n", "eric"),
        ("vera, |cat, error:550 no\n", "vera, |cat, error:550 no"),
    ],
)
def test_lines_of_an_included_file_are_those_that_smtpd_reads(expand, home, text, found):
    path = put(home / "list", text).decode()
    assert f"      {path}: {found}\n" in expand("a", a=f":include:{path}").text


def test_empty_file_is_shown_as_such(expand, home):
    path = put(home / "list", "").decode()
    assert f"      {path}: (no recipients)\n" in expand("a", a=f"vera, :include:{path}").text


def test_folder_is_an_empty_file(expand, home):
    done = expand("a", a=f":include:{home}")
    assert f"      {home}: a folder, which smtpd reads as an empty file\n" in done.text
    assert results(done)[0].startswith("rejected: 524 ")


def test_alias_of_ignored_files_alone_is_not_an_alias(expand):
    done = expand("vera", vera=":include:/nonexistent/list")
    assert (done.status, results(done)) == (0, ["user vera"])
    done = expand("list", list=":include:/nonexistent/list")
    assert (done.status, results(done)) == (1, ["rejected: 550 Invalid recipient; no alias and no user list"])


def test_alias_of_an_empty_file_has_no_recipient(expand, home):
    path = put(home / "list", "").decode()
    done = expand("vera", vera=f":include:{path}")
    assert (done.status, results(done)[0].startswith("rejected: 524 ")) == (1, True)


def test_device_and_large_file_do_not_stop_expand(expand, home):
    assert "/dev/zero: not followed: a device, not a file\n" in expand("a", a="vera, :include:/dev/zero").text
    path = home / "list"
    with path.open("wb") as file:
        file.truncate(INCLUDE_BYTES + 1)
    path.chmod(0o644)
    done = expand("a", a=f":include:{path}")
    assert f"{path}: not followed: larger than 16 MiB\n" in done.text
    assert results(done) == [f"the recipients in {path} (not read)"]


# ~/.forward.


def test_forward_file_replaces_the_user(expand, home):
    (home / "vera").mkdir()
    put(home / "vera" / ".forward", "# away\neric, out@example.com # both\n")
    done = expand("a", a="vera+tag")
    assert f"      {home}/vera/.forward: eric, out@example.com\n" in done.text
    assert (done.status, results(done)) == (0, ["out@example.com", "user eric"])


@pytest.mark.parametrize("text", ["\\vera, out@example.com", "vera, out@example.com", "out@example.com,\\\nvera"])
def test_user_in_the_own_forward_file_is_delivered_to(expand, home, text):
    (home / "vera").mkdir()
    put(home / "vera" / ".forward", text)
    assert results(expand("vera"))[-1] == "user vera"


@pytest.mark.parametrize("text", ["eric|eric+x", "eric+x|524", "eric+y|524"])
def test_tag_is_cut_before_a_user_is_compared_with_the_forward_file(expand, home, text):
    text, _, rejected = text.partition("|")
    (home / "eric").mkdir()
    put(home / "eric" / ".forward", text)
    found = results(expand("eric+x"))
    assert found == ["user eric"] if rejected == "eric+x" else found[0].startswith("rejected: 524 ")


@pytest.mark.parametrize("text", ["|cat", "/tmp/file"])
@pytest.mark.parametrize("uid", ["0", "1"])
def test_forward_file_of_root_must_not_name_commands_or_files(text, uid):
    tables = recipients.Tables(
        lambda use, _: Found(f"{uid}:0:/".encode()) if use == "userinfo" else NOT_FOUND,
        lambda _: True,
        forward=lambda _: recipients.File(b"/.forward", text.encode()),
    )
    rejection = "451 Temporary failure" if uid == "0" else None
    assert recipients.expand(b"root", tables).rejection == rejection


@pytest.mark.parametrize(("text", "status"), [("", 0), ("\n", 2), ("# nobody\n", 2)])
def test_forward_file_without_recipients_also_limits_the_elements(expand, home, text, status):
    (home / "vera").mkdir()
    put(home / "vera" / ".forward", text)
    assert expand("a", a=",".join(["vera", *(f"eric+{n}" for n in range(100))])).status == status


@pytest.mark.parametrize("text", ["", "\n# nothing\n", ":include:/etc/passwd"])
def test_forward_file_without_recipients_is_ignored(expand, home, text):
    (home / "vera").mkdir()
    put(home / "vera" / ".forward", text)
    assert results(expand("vera")) == ["user vera"]


def test_forward_files_that_name_each_other_are_a_loop(expand, home):
    for name, other in (("vera", "eric"), ("eric", "vera")):
        (home / name).mkdir()
        put(home / name / ".forward", other)
    done = expand("vera")
    assert (done.status, results(done)[0].startswith("rejected: 524 ")) == (1, True)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("eric, a b", "an element contains white space"),
        ("x" * 5000, "4096 bytes or more"),
        (",".join(f"eric+{n}" for n in range(101)), "more than 100 elements"),
    ],
)
def test_forward_file_that_smtpd_cannot_use_is_a_temporary_error(expand, home, text, cause):
    (home / "vera").mkdir()
    put(home / "vera" / ".forward", text)
    done = expand("vera")
    assert (done.status, f"rejected: {TEMPORARY}; {home}/vera/.forward: " in done.text, cause in done.text) == (
        2,
        True,
        True,
    ), done.text


@pytest.mark.parametrize(
    ("change", "reply", "cause"),
    [
        (lambda home: (home / ".forward").chmod(0o664), PERMANENT, "no other user may write it"),
        (lambda home: home.chmod(0o777), PERMANENT, "no other user may write it"),
        (lambda home: home.chmod(0o1755), TEMPORARY, "sticky bit"),
        (lambda home: (home / ".forward").rename(home / "x"), None, ""),
    ],
)
def test_forward_file_must_be_secure(home, change, reply, cause):
    path = put(home / ".forward", "eric")
    change(home)
    found = forward(f"{UID}:{UID}:{home}".encode())
    if reply is None:
        assert found is None
    else:
        assert (found.path, found.data, found.reply, cause in found.problem) == (path, None, reply, True)


def test_forward_file_is_not_followed_as_a_link_or_of_another_user(home):
    put(home / "x", "eric")
    (home / ".forward").symlink_to(home / "x")
    assert "symbolic link" in forward(f"{UID}:{UID}:{home}".encode()).problem
    (home / ".forward").unlink()
    put(home / ".forward", "eric")
    assert forward(f"{UID + 1}:1:{home}".encode()).reply == PERMANENT
    assert forward(f"{UID}:1:{home}".encode()).data == b"eric"


def test_file_that_only_others_may_read_is_reported(home):
    path = put(home / ".forward", "eric").decode()
    os.chmod(path, 0)
    code = "import grp, os, pwd\nfrom table_consul.ctl import expand\n"
    code += "if os.getuid() == 0: os.setgid(65534); os.setuid(65534)\n"
    code += f"print([*map(str, (expand.include({path!r}.encode()), expand.forward(b'{UID}:1:{home}')))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("but perhaps by smtpd (run this as root)") == 2, done.stdout
    assert "ignored=True" not in done.stdout


def test_unreadable_files_are_named_beside_the_recipients(monkeypatch, expand):
    hidden = lambda path: recipients.File(path, problem="not readable by user eric")  # noqa: E731
    monkeypatch.setattr("table_consul.ctl.expand.include", hidden)
    monkeypatch.setattr("table_consul.ctl.expand.forward", lambda info: hidden(info.split(b":")[2] + b"/.forward"))
    done = expand("a", a="vera, :include:/srv/list")
    assert "      /srv/list: not readable by user eric\n" in done.text
    assert results(done) == ["the recipients in /srv/list (not read)", "user vera (~/.forward not read)"]


def test_json_has_the_files_among_the_lookups(tmp_path, home):
    path = put(home / "list", "daemon").decode()
    source = write_source(tmp_path, {"t/alias/a": f":include:{path}".encode()})
    conf = write_config(tmp_path, "allow_commands = true", address=f"file://{source}")
    answer = json.loads(control("-c", conf, "expand", "t", "a", "--json").text)
    found = {"table": "the system", "service": "include", "key": path, "result": "found", "answer": "daemon"}
    assert answer["lookups"][1] == {**found, "nested": 2}


def test_dialogue_without_files_is_unchanged():
    """The default of `Tables` follows no file."""
    tables = recipients.Tables(lambda use, key: Found(b"1:1:/") if use == "userinfo" else NOT_FOUND, lambda _: True)
    assert recipients.expand(b"vera", tables).recipients == [recipients.Element("user", b"vera")]
