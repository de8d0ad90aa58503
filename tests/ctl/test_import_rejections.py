"""Files and options that `table-consulctl import` rejects before it writes anything."""

from __future__ import annotations

import os
import sys
import time

import pytest

from table_consul.ctl import import_, writing
from tests.control import control
from tests.ctl.importing import HASH, entries, file, importer
from tests.dialogue import write_config


@pytest.mark.parametrize(
    ("text", "expected"),
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
def test_bad_file_is_rejected_as_a_whole_with_file_and_line(consul, tmp_path, text, expected):
    path = file(tmp_path, text)
    done = importer(consul, "aliases", "alias", path)
    assert (done.status, done.text, entries(consul)) == (2, "", {})
    assert expected in done.said
    assert str(path) in done.said
    assert "\x07" not in done.said


@pytest.mark.parametrize("form", ["auto", "table"])
@pytest.mark.parametrize(
    "line",
    [
        f"eric {HASH}:5000:5000::/var/vmail/eric",
        f"eric\t{{BLF-CRYPT}}{HASH}:",
        f"eric eric:{HASH}:5000:5000::/var/vmail/eric",
        f"eric eric:{{BLF-CRYPT}}{HASH}:5000",
        "eric {SSHA}abcdef:secret",
    ],
)
@pytest.mark.parametrize("service", ["credentials", "auth"])
def test_hash_followed_by_a_colon_is_not_a_credential(consul, tmp_path, service, form, line):
    path = file(tmp_path, f"vera {HASH}\n{line}\n".encode())
    done = importer(consul, "aliases", service, path, "--format", form)
    assert (done.status, entries(consul, f"aliases/{service}/")) == (2, {})
    assert ":2: eric: the value continues after its hash" in done.said, done.said
    assert "5000" not in done.said


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", "is a directory"),
        ("/dev/zero", "line 1 contains a NUL byte"),
        ("/nonexistent", "no such file"),
        (sys.executable, "not text"),
    ],
)
def test_file_that_is_not_text_is_rejected_without_reading_it_all(tmp_path, path, expected):
    begun = time.monotonic()
    done = control("-c", write_config(tmp_path, address="http://127.0.0.1:1"), "import", "aliases", "alias", path)
    assert (done.status, expected in done.said, done.said.count("\n")) == (2, True, 1), done.said
    assert time.monotonic() - begun < 5


def test_too_large_file_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(import_, "FILE_MAX_BYTES", 4 << 20)
    done = control("-c", write_config(tmp_path), "import", "aliases", "alias", file(tmp_path, b"# x\n" * (2 << 20)))
    assert done.status == 2  # file:// first: no input file is read when no Consul can be written
    conf = write_config(tmp_path, address="http://127.0.0.1:1")
    done = control("-c", conf, "import", "aliases", "alias", file(tmp_path, b"# x\n" * (2 << 20)))
    assert (done.status, "more than 4 MiB" in done.said) == (2, True)


def test_problems_of_one_kind_are_one_message_with_their_lines(tmp_path):
    conf = write_config(tmp_path, address="http://127.0.0.1:1")
    done = control("-c", conf, "import", "aliases", "alias", "-", stdin=b"root:\n" * 1000)
    problem, last = done.said.splitlines()
    shown = ", ".join(str(number) for number in range(2, writing.PROBLEMS_SHOWN + 2))
    assert problem == f"standard input:1: has no value; also in lines {shown} and {999 - writing.PROBLEMS_SHOWN} more"
    assert "1000 problems" in last


def test_problems_of_all_kinds_are_reported_in_one_round(consul, tmp_path):
    lines = [
        b"ok: x",
        b"none:",
        b"bad: |/bin/sh",
        b"ok: y",
        b"a//b: c",
        b"two: a b",
        b"none:",
        b"bad2: |/bin/sh",
        b"u%20: x",
    ]
    path = file(tmp_path, b"\n".join(lines))
    done = importer(consul, "aliases", "alias", path)
    assert (done.status, done.text, entries(consul)) == (2, "", {})
    reported = [line.removeprefix(f"{path}:") for line in done.said.splitlines()]
    starts = [
        "2: has no value; also in line 7",
        "3: bad: ",
        "4: ok: already in line 1 with another",
        "5: a//b: ",
        "6: two: ",
    ]
    assert [line.startswith(start) for line, start in zip(reported, starts, strict=False)] == [True] * 5, reported
    assert reported[1].endswith("; also in line 8")
    assert reported[5].startswith("9: u%20: the key has")


def test_problems_found_without_consul_are_reported_while_it_is_away(tmp_path):
    conf = write_config(tmp_path, address="http://127.0.0.1:1")
    done = control("-c", conf, "import", "aliases", "alias", "-", stdin=b"root:\nok: x\n")
    assert (done.status, "input:1: has no value" in done.said, "Consul" in done.said) == (2, True, True), done.said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["aliases", "domain", "-", "--format", "aliases"], "the format aliases is not for the service domain"),
        (["aliases", "alias", "-", "--format", "passwd"], "the format passwd is not for the service alias"),
        (["aliases", "alias", "-", "--record"], "is read as aliases"),
        (["aliases", "credentials", "-", "--record"], "is read as table"),
        (["aliases", "alias", "-", "--format", "table", "--from", "x"], "--from requires"),
        (["aliases", "alias", "-", "--prune", "--from", "old/alias"], "is read as aliases"),
        (["aliases", "alias"], "Missing argument"),
        (["aliases", "alias", "-", "--format", "csv"], "is not one of"),
    ],
)
def test_conflicting_options_are_a_usage_error(tmp_path, arguments, expected):
    conf = write_config(tmp_path, address="http://127.0.0.1:1")
    done = control("-c", conf, "import", *arguments, stdin=b"a b\n")
    assert (done.status, expected in done.said) == (2, True), done.said


def test_from_with_bytes_that_are_not_utf_8_matches_nothing(tmp_path):
    conf = write_config(tmp_path, address="http://127.0.0.1:1")
    text = b'[{"key": "old/alias/x", "value": "eA=="}]'
    done = control("-c", conf, "import", "t", "alias", "-", "--from", os.fsdecode(b"old\xff"), stdin=text)
    assert (done.status, "contains no keys below old\\xff/" in done.said) == (2, True), done.said


def test_file_address_cannot_be_written_to(tmp_path):
    done = control("-c", write_config(tmp_path), "import", "aliases", "alias", "-", stdin=b"a: b\n")
    assert (done.status, "writes to Consul" in done.said) == (2, True)
