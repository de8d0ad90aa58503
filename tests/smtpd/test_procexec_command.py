"""The command line of table-procexec, the lookup of the command, and its start in place of table-procexec."""

from __future__ import annotations

import os
import pty
import socket
import subprocess

import pytest

from table_consul import procexec
from table_consul.services import DEFAULT_SERVICES
from tests.dialogue import TIMEOUT_SECONDS
from tests.e2e.programs import OF_2020
from tests.smtpd.imsg import opening
from tests.smtpd.procexec import OF_TODAY, RUN, Smtpd

# ---- starting the command ----


def test_line_protocol_execs_the_child_without_losing_input(make_program):
    hello = b"config|smtpd-version|7.9.0\nconfig|tablename|users\nconfig|ready\n"
    wire, theirs = socket.socketpair()
    wire.sendall(hello + b"table|0.1|0|users|lookup|alias|1|pid\n")
    with wire, subprocess.Popen([*RUN, make_program(OF_TODAY)], stdin=theirs, stdout=theirs) as process:
        theirs.close()
        with wire.makefile("rb") as lines:
            registered = [lines.readline() for _ in range(3)]
            assert registered == [b"register|alias\n", b"register|source\n", b"register|ready\n"]
            assert lines.readline() == b"lookup-result|1|found|%d\n" % process.pid
            wire.shutdown(socket.SHUT_WR)
            assert (lines.read(), process.wait(TIMEOUT_SECONDS)) == (b"", 0)


@pytest.mark.parametrize(
    ("text", "deadline", "services"),
    [
        (OF_TODAY, TIMEOUT_SECONDS, {"alias", "source"}),
        (OF_2020, TIMEOUT_SECONDS, set(DEFAULT_SERVICES)),
        ("#!/bin/sh\nexec sleep 99", 0.1, set(DEFAULT_SERVICES)),
        (
            "#!/bin/sh\necho 'register|nonsense'; echo 'register|ready'; exec cat",
            TIMEOUT_SECONDS,
            set(DEFAULT_SERVICES),
        ),
    ],
    ids=["today", "2020", "silent", "none that smtpd knows"],
)
def test_services_are_those_registered_in_time_or_the_defaults(make_program, make_bridge, text, deadline, services):
    assert set(make_bridge(make_program(text), deadline=deadline).services("users")) == services


def test_line_protocol_of_2020_over_a_pipe_execs_the_child(make_program):
    line = b"table|0.1|0|users|lookup|1|alias|root\n"
    done = subprocess.run([*RUN, make_program(OF_2020)], input=line, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"table-response|1|found|gilles@poolp.org\n")


def test_immediate_end_of_file_starts_no_child():
    with Smtpd(*RUN, "/nowhere/table-x", begin=False) as smtpd:
        assert smtpd.end() == (0, b"", "")


def test_non_blocking_descriptor_is_waited_for(make_program):
    wire, theirs = socket.socketpair()
    theirs.setblocking(False)
    with (
        wire,
        subprocess.Popen([*RUN, make_program("#!/bin/sh\nexec cat")], stdin=theirs, stdout=subprocess.PIPE) as process,
    ):
        theirs.close()
        wire.settimeout(TIMEOUT_SECONDS)
        wire.sendall(opening())
        assert wire.recv(16, socket.MSG_WAITALL)[:2] == b"\0\0"
        wire.shutdown(socket.SHUT_WR)
        assert process.wait(TIMEOUT_SECONDS) == 0


def test_missing_command_exits_with_127():
    done = subprocess.run([*RUN, "table-nowhere"], input=b"config|ready\n", capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (
        127,
        b"table-procexec: table-nowhere: not found in OpenSMTPD's libexec folders or in PATH\n",
    )


# ---- the command line ----


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "missing COMMAND"),
        ([""], "missing COMMAND"),
        (["table-x 'a"], "No closing quotation: table-x 'a"),
        (["--dialect", "imsg", "table-x"], "invalid choice: 'imsg'"),
        (["--deadline", "0", "table-x"], "must be above 0 and at most 60 seconds: 0"),
        (["--deadline", "99", "table-x"], "must be above 0 and at most 60 seconds: 99"),
        (["--what", "table-x"], "unrecognized arguments: --what"),
    ],
)
def test_wrong_command_line_is_a_usage_error(arguments, reason, capsys):
    with pytest.raises(SystemExit) as raised:
        procexec.main(arguments)
    assert (raised.value.code, reason in capsys.readouterr().err) == (2, True)


def test_terminal_as_standard_input_is_a_usage_error():
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run([*RUN, "table-x"], stdin=theirs, capture_output=True, text=True, check=False)
        assert (done.returncode, "only smtpd starts table-procexec" in done.stderr) == (2, True)
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_name_the_program(option, capsys):
    with pytest.raises(SystemExit) as raised:
        procexec.main([option])
    assert (raised.value.code, "table-procexec" in capsys.readouterr().out) == (0, True)


def test_command_is_looked_up_beside_table_procexec_then_in_libexec_then_in_path(make_program, tmp_path, monkeypatch):
    folders = [tmp_path / name for name in ("beside", "libexec", "path")]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setattr(procexec, "LIBEXEC", (str(folders[1]),))
    monkeypatch.setenv("PATH", str(folders[2]))
    (folders[0] / "table-x").write_text("not executable")
    for folder in (folders[2], folders[1]):
        make_program("", folder / "table-x")
        assert procexec.find("table-x", str(folders[0])) == str(folder / "table-x")
    (folders[0] / "table-x").chmod(0o755)
    assert procexec.find("table-x", str(folders[0])) == str(folders[0] / "table-x")
    assert procexec.find("table-x", "beside") == str(folders[1] / "table-x")
    with pytest.raises(FileNotFoundError):
        procexec.find("table-y", str(folders[0]))


@pytest.mark.parametrize("path", ["/usr/libexec/opensmtpd/table-x", "./table-x"])
def test_path_is_taken_unchanged(path):
    assert procexec.find(path, "/beside") == path
