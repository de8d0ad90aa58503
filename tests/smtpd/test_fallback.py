"""The programs without their Python packages: each request gets an error, and only end of file ends them."""

from __future__ import annotations

import ast
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import table_consul
from table_consul import fallback
from table_consul.services import DEFAULT_SERVICES
from tests.dialogue import TIMEOUT_SECONDS, TRANSCRIPTS, Child, read_transcript, write_config
from tests.smtpd.imsg import ALIAS, CHECK, FETCH, LOOKUP, UPDATE, message, opening, question
from tests.smtpd.process import NO_THREADS, ROOT
from tests.smtpd.procexec import Smtpd

PACKAGE = Path(table_consul.__file__).parent
SERVICES = [name.encode() for name in DEFAULT_SERVICES]


@pytest.fixture
def broken(request, tmp_path):
    """An environment in which msgspec does not load."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/msgspec.py").write_text(getattr(request, "param", "def f(:"))
    return {"PYTHONPATH": f"{tmp_path}/packages:{PACKAGE.parent}"}


@pytest.fixture
def launcher(tmp_path):
    """table-consul as `make install` writes it, with the folder of its package removed."""
    path = tmp_path / "table-consul"
    text = f'{(PACKAGE / "fallback.py").read_text()}\n\nsys.path.insert(0, "{tmp_path}/gone")\n'
    path.write_text(f'#!{sys.executable} -IS\n{text}sys.exit(run("table_consul.cli"))\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    "broken",
    [
        "raise ModuleNotFoundError(f'No module named {__name__!r}')",
        "raise ImportError('undefined symbol: _PyLong_New\\nabi')",
        "def f(:",
        "raise RuntimeError('bug')",
        "raise SystemExit('this package needs Python 3.14')",
    ],
    indirect=True,
)
def test_lines_are_answered_with_the_reason_which_is_logged_once(broken):
    with Child(environ=broken) as child:
        assert child.handshake() == SERVICES
        for number in range(3):
            answer = child.ask(ROOT % number)
            assert answer.startswith(b"lookup-result|%08x|error|table-consul cannot be loaded: " % number)
        answer = child.ask(b"table|0.1|0|aliases|update|1")
        assert answer.startswith(b"update-result|1|error|table-consul cannot be loaded: ")
        assert (child.quiet(), child.end()) == (True, 0)
        assert child.log().count("table-consul: ERROR: table-consul cannot be loaded: ") == 1
        assert (child.log().count("\n"), child.log().count("restart smtpd")) == (1, 1)


def test_limit_of_threads_does_not_end_the_program(broken):
    with Child(environ=broken, command=[sys.executable, "-c", NO_THREADS]) as child:
        child.handshake()
        assert child.ask(ROOT % 1).startswith(b"lookup-result|00000001|error|")
        assert child.end() == 0


def test_signals_do_not_end_the_program(broken):
    with Child(environ=broken) as child:
        child.handshake()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM, signal.SIGQUIT):
            child.process.send_signal(number)
        assert child.ask(ROOT % 1).startswith(b"lookup-result|00000001|error|")
        assert child.end() == 0


def test_launcher_answers_without_its_package(launcher):
    with Child("/etc/mail/table-consul.toml", command=[launcher]) as child:
        assert child.handshake() == SERVICES
        reason = b"table-consul cannot be loaded: ModuleNotFoundError: No module named 'table_consul'"
        assert child.ask(ROOT % 1).startswith(b"lookup-result|00000001|error|" + reason)
        assert child.end() == 0


@pytest.mark.slow
def test_empty_module_after_a_power_failure_does_not_end_the_program(tmp_path):
    """pip syncs no file."""
    config = write_config(tmp_path)
    shutil.copytree(PACKAGE, tmp_path / "table_consul", ignore=shutil.ignore_patterns("__pycache__"))
    code = "import sys, table_consul.cli; print(*(n for n in sys.modules if n.startswith('table_consul.')))"
    listed = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True, check=True)
    launcher = (sys.executable, "-Bc", 'from table_consul import fallback; fallback.run("table_consul.cli")', config)
    ended = []
    for name in {*listed.stdout.split()} - {"table_consul.fallback"}:
        path = Path(tmp_path, *name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        whole = path.read_bytes()
        path.write_bytes(b"")
        dialogue = f"config|ready\n{ROOT.decode() % 1}\n"
        done = subprocess.run(launcher, input=dialogue, cwd=tmp_path, capture_output=True, text=True, check=False)
        if not done.stdout.rpartition("register|ready\n")[2].startswith("lookup-result|00000001|"):
            ended.append((name, done.stderr))
        path.write_bytes(whole)
    assert (len(listed.stdout.split()) > 10, ended) == (True, [])


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("import runpy; runpy.run_module('table_consul', run_name='__main__')", []),
        ("import sys; from table_consul.procexec import main; sys.exit(main())", ["true"]),
    ],
    ids=["table-consul", "table-procexec"],
)
def test_imsg_is_answered_with_errors_on_its_socket(broken, code, arguments):
    with Smtpd(sys.executable, "-c", code, *arguments, environ=broken) as smtpd:
        for kind in (CHECK, LOOKUP):
            assert smtpd.ask(kind, ALIAS) == (-1, b"")
        assert smtpd.ask(FETCH, ALIAS, b"") == (-1, b"")
        assert smtpd.ask(UPDATE) == (0, b"")
        status, output, log = smtpd.end()
        assert (status, output, log.count("cannot be loaded")) == (0, b"", 1)


def test_imsg_close_ends_the_program(broken):
    with Smtpd(sys.executable, "-m", "table_consul", environ=broken) as smtpd:
        smtpd.wire.sendall(message(3))
        assert (smtpd.wire.recv(1), smtpd.process.wait(TIMEOUT_SECONDS)) == (b"", 0)


@pytest.mark.parametrize("arguments", [["--version"], ["--check", "/etc/mail/table-consul.toml"]])
def test_terminal_gets_the_traceback(broken, arguments):
    command = [sys.executable, "-m", "table_consul", *arguments]
    run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=os.environ | broken, check=False)
    assert (run.returncode, run.stdout, b"Traceback" in run.stderr) == (1, b"", True)


def replies(chunks):
    """The replies without their reasons."""
    conversation = fallback.Conversation("no")
    return b"".join(conversation.receive(chunk) for chunk in chunks)


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_every_request_of_a_transcript_is_answered_under_its_id(path):
    dialogue = read_transcript(path)
    if "malformed" in path.stem:
        replies([dialogue.said])
        return
    answers = [line.split(b"|", 2) for line in replies([dialogue.said]).splitlines() if b"register|" not in line]
    expected = [line.split(b"|")[:2] for line in dialogue.answered.splitlines() if b"register|" not in line]
    if path.stem.startswith("procexec"):
        for fields in expected:  # the configuration sets the first word
            fields[0] = b"table-result" if "without" in path.stem else b"table-response"
    assert [fields[:2] for fields in answers] == expected
    assert {fields[2] for fields in answers} <= {b"error|no", b"failure"}
    assert replies([dialogue.said]) == replies(bytes([byte]) for byte in dialogue.said)


@pytest.mark.parametrize(
    "said", [b"\n", b"config\n", b"config|tablename\n", b"table\n", b"table|\n", b"table|0.1|0|t|lookup\n"]
)
def test_incomplete_line_is_not_answered(said):
    assert replies([said, b"config|protocol|0.1\n", said]) == b""


@pytest.mark.parametrize("rest", [b"table|0.1|0|t|check|alias|2|x", b"config|ready", b"x", b""])
def test_key_with_a_line_break_is_answered_once(rest):
    conversation = fallback.Conversation("no")
    conversation.receive(b"config|smtpd-version|7.6.0-portable\nconfig|tablename|t\nconfig|ready\n")
    line = b"table|0.1|0|t|lookup|credentials|1|gilles\n"
    for said in (line + rest + b"\n", line):
        assert conversation.receive(said) == b"lookup-result|1|error|no\n"


def test_imsg_cut_anywhere_is_answered_the_same():
    said = opening(b"t") + question(LOOKUP, ALIAS, b"root\0") + message(UPDATE) + struct.pack("=IHHII", 5, 0, 0, 0, 0)
    assert replies([said]) == replies(bytes([byte]) for byte in said)
    assert len(replies([said])) == 16 + 20 + 20 + 20


def test_services_are_the_default_ones():
    assert fallback.SERVICES == DEFAULT_SERVICES


def test_fallback_imports_only_the_standard_library():
    nodes = ast.walk(ast.parse((PACKAGE / "fallback.py").read_text()))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    nodes = ast.walk(ast.parse((PACKAGE / "fallback.py").read_text()))
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


@pytest.mark.parametrize("name", ["requests", "consul", "urllib3"])
@pytest.mark.parametrize(("text", "kind"), [("def f(:", b"SyntaxError"), ("raise SystemExit('no')", b"SystemExit")])
def test_package_missing_after_the_start_is_an_error_reply_and_logged_once(tmp_path, name, text, kind):
    (tmp_path / f"{name}.py").write_text(text)
    path = write_config(tmp_path, address="http://127.0.0.1:1")
    with Child(str(path), environ={"PYTHONPATH": f"{tmp_path}:{PACKAGE.parent}"}) as child:
        child.handshake()
        for number in range(2):
            answer = child.ask(ROOT % number)
            reason = b"lookup-result|%08x|error|table-consul cannot be loaded: %b: " % (number, kind)
            assert answer.startswith(reason)
        assert child.end() == 0
        assert (child.log().count("cannot be loaded"), child.log().count("Traceback")) == (1, 0)
