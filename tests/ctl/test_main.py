"""The command line of table-consulctl: help, exit statuses, and errors without tracebacks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import click
import pytest

from table_consul import __version__, cli, procexec
from table_consul.config import ConsulConfig
from table_consul.ctl import main
from tests.control import START, at_terminal, control, finished, start
from tests.ctl.editors import Editor
from tests.dialogue import write_config, write_source
from tests.fake_consul import FakeConsul

HEAVY = ("consul", "requests", "urllib3", "table_consul.kv")


@pytest.fixture
def conf(tmp_path):
    return write_config(tmp_path)


@pytest.fixture
def stand_in(monkeypatch):
    """Replaces the command `lint` by a function."""

    def put(function):
        module = type(sys)("table_consul.ctl.lint")
        module.command = click.Command("lint", callback=function)
        monkeypatch.setitem(sys.modules, "table_consul.ctl.lint", module)

    return put


@pytest.mark.parametrize("name", main.COMMANDS)
def test_config_is_accepted_before_and_after_the_command(tmp_path, name):
    missing = tmp_path / "none.toml"
    command = main.program.get_command(click.Context(main.program), name)
    needed = [each for each in command.params if isinstance(each, click.Argument) and each.required]
    arguments = ["alias" if isinstance(each.type, click.Choice) else "t" for each in needed]
    before = control("-c", missing, name, *arguments)
    assert f"{missing}: " in before.said + before.text
    for option in (["-c", missing], ["--config", missing], [f"-c{missing}"]):
        assert control(name, *arguments, *option) == before
        assert control("-c", "/other.toml", name, *option, *arguments) == before


def test_help_lists_every_command():
    done = control("--help")
    assert (done.status, done.said) == (0, "")
    assert [name for name in main.COMMANDS if f"\n  {name} " not in done.text] == []


@pytest.mark.parametrize("arguments", [[], ["--debug"]])
def test_missing_command_prints_usage_and_exits_with_2(arguments):
    done = control(*arguments)
    assert (done.status, done.text) == (2, "")
    assert done.said.startswith("Usage: table-consulctl [OPTIONS] COMMAND [ARGS]...")
    assert "Commands:" in done.said


@pytest.mark.parametrize("name", main.COMMANDS)
def test_help_of_each_command_has_examples(name):
    done = control(name, "--help")
    assert (done.status, done.said) == (0, "")
    assert f"table-consulctl {name} " in done.text.partition("Examples:")[2].partition("Options:")[0]


@pytest.mark.parametrize("name", ["", *main.COMMANDS])
def test_help_fits_a_terminal_of_40_columns(name):
    """Except for examples, which users copy whole."""
    done = control(*([name] if name else []), "--help", COLUMNS="40")
    text = done.text
    if name:
        before, _, rest = text.partition("Examples:")
        text = before + rest.partition("Options:")[2]
    assert [line for line in text.splitlines() if len(line) > 40] == []


def is_short(text):
    lines = text.splitlines()
    return len(lines) <= 24 and max(map(len, lines)) <= 80


@pytest.mark.parametrize("name", ["", *main.COMMANDS])
def test_help_fits_24_lines_of_80_columns(name):
    assert is_short(control(*([name] if name else []), "--help", COLUMNS="80").text)


@pytest.mark.parametrize("name", ["", *main.COMMANDS])
def test_usage_is_followed_by_a_blank_line(name):
    assert control(*([name] if name else []), "--help", COLUMNS="80").text.splitlines()[1] == ""


@pytest.mark.parametrize("program", [cli, procexec])
def test_help_of_the_other_programs_fits_24_lines_of_80_columns(monkeypatch, program):
    monkeypatch.setenv("COLUMNS", "80")
    assert is_short(program._parser().format_help())


def test_help_on_a_wide_terminal_has_lines_of_at_most_100_columns():
    assert max(len(line) for line in control("--help", COLUMNS="300").text.splitlines()) <= 100


def test_version():
    assert control("--version") == (0, f"table-consulctl {__version__}\n".encode(), b"")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["query", "--help"],
        ["lint", "-h"],
        ["policy", "-h"],
        ["import", "-h"],
        ["export", "-h"],
    ],
)
def test_help_does_not_import_the_http_client(arguments):
    script = f"import sys; from table_consul.ctl.main import main; main({arguments!r})\n"
    script += f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_daemon_imports_neither_the_control_command_nor_click():
    script = "import sys; from table_consul import cli, metrics, procexec, server, tables\n"
    script += "from table_consul.sources import direct, export, watch\n"
    script += "print([name for name in sys.modules if name.partition('.')[0] == 'click' or '.ctl' in name])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ask"], "No such command 'ask'"),
        (["--verbose"], "No such option"),
        (["query", "aliases"], "Missing argument 'SERVICE'"),
        (["query", "aliases", "aliases", "root"], "is not one of 'alias'"),
        (["lint", "--now"], "No such option"),
        (["-c"], "requires an argument"),
    ],
)
def test_usage_error_is_reported_and_exits_with_2(arguments, said):
    done = control(*arguments)
    assert (done.status, done.text, said in done.said) == (2, "", True), done.said


def test_every_error_of_the_configuration_is_one_line(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("[consul]\naddres = 1\n[log]\nlevl = 2\n")
    done = control("-c", path, "lint")
    lines = done.said.splitlines()
    assert (done.status, done.text, len(lines)) == (2, "", 2)
    assert all(line.startswith(f"table-consulctl: {path}: ") for line in lines)


def test_help_works_with_a_bad_configuration(tmp_path):
    (tmp_path / "bad.toml").write_text("[consul")
    done = control("-c", tmp_path / "bad.toml", "query", "--help")
    assert (done.status, "Examples:" in done.text) == (0, True)


def test_environment_of_the_consul_command_is_used(tmp_path):
    done = control("policy", "aliases", CONSUL_HTTP_ADDR="127.0.0.1:1", CONSUL_HTTP_TOKEN="hunter2 hunter2")
    assert (done.status, "CONSUL_HTTP_TOKEN" in done.said, "hunter2" in done.said) == (2, True, False)


def test_invalid_table_name_is_rejected(conf):
    done = control("-c", conf, "lint", "a/b")
    assert (done.status, done.said.startswith("table-consulctl: invalid table name 'a/b'")) == (2, True)


def test_lint_without_table_checks_tables_with_a_section_or_is_a_usage_error(tmp_path):
    def linted(more):
        return control("-c", write_config(tmp_path, more=more), "lint", "--json")

    tables = json.loads(linted("[tables.aliases]\n[tables.domains]").text)["tables"]
    assert [table["table"] for table in tables] == ["aliases", "domains"]
    asked = linted("")
    assert (asked.status, "missing TABLE: the configuration has no" in asked.said) == (2, True)


@pytest.mark.parametrize(
    ("token_file", "environ", "expected"),
    [
        (None, {}, ("mine", None)),
        (None, {"CONSUL_HTTP_TOKEN": "own"}, ("own", None)),
        (None, {"CONSUL_HTTP_TOKEN": "own", "CONSUL_HTTP_TOKEN_FILE": "/own"}, (None, "/own")),
        ("/named", {"CONSUL_HTTP_TOKEN": "own", "CONSUL_HTTP_TOKEN_FILE": "/own"}, (None, "/named")),
        (None, {"CONSUL_HTTP_TOKEN": "", "CONSUL_HTTP_TOKEN_FILE": ""}, ("mine", None)),
    ],
)
def test_writing_commands_use_the_token_of_the_operator(monkeypatch, token_file, environ, expected):
    for name in ("CONSUL_HTTP_TOKEN", "CONSUL_HTTP_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    found = main.as_writer(ConsulConfig(token="mine"), token_file)
    assert (found.token, found.token_file) == expected


def test_internal_error_is_one_line_and_debug_prints_traceback(stand_in, conf):
    def fail():
        raise RuntimeError("first\nsecond \x1b[2J")

    stand_in(fail)
    done = control("-c", conf, "lint")
    assert (done.status, len(done.said.splitlines()), "\x1b" in done.said) == (2, 1, False)
    assert "internal error: RuntimeError: first\\nsecond" in done.said
    assert "Traceback" in control("-c", conf, "--debug", "lint").said


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (main.NO, 1), (main.FAILED, 2)])
def test_return_value_of_a_command_is_the_exit_status(stand_in, conf, returned, status):
    stand_in(lambda: returned)
    assert control("-c", conf, "lint").status == status


def test_system_error_is_one_line(stand_in, conf):
    def fail():
        raise PermissionError(13, "Permission denied", "/etc/mail/\x1b")

    stand_in(fail)
    assert control("-c", conf, "lint") == (
        2,
        b"",
        b"table-consulctl: /etc/mail/\\x1b: permission denied\n",
    )


@pytest.mark.parametrize(
    ("arguments", "text"), [(("lint", "t"), "reading t/ ..."), (("unset", "t", "alias", "x"), "reading t/alias/ ...")]
)
def test_work_of_more_than_a_second_is_shown_on_a_terminal(fake, monkeypatch, arguments, text):
    def slow(request):
        if "recurse" in request.params:
            time.sleep(0.2)
        return fake.consul(request)

    fake.handle = slow
    monkeypatch.setattr(main, "PATIENCE_SECONDS", 0.05)
    assert text not in control(*arguments, CONSUL_HTTP_ADDR=fake.address).said
    monkeypatch.setattr(main, "is_terminal", lambda _stream: True)
    assert f"{text}\n" in control(*arguments, CONSUL_HTTP_ADDR=fake.address).said
    monkeypatch.setattr(main, "PATIENCE_SECONDS", 60.0)
    assert text not in control(*arguments, CONSUL_HTTP_ADDR=fake.address).said


@pytest.mark.usefixtures("interruptible")
def test_interrupt_is_one_line_without_traceback(conf):
    process = start("-c", conf, "query", "aliases", "alias", "-", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(b"root\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"root\tgilles\n"  # the command now waits for the next line
    process.send_signal(signal.SIGINT)
    done = finished(process)
    assert (done.status, done.said.strip()) == (2, "table-consulctl: interrupted")


@pytest.mark.parametrize("arguments", [["query", "aliases", "alias", "-"], ["--help"]])
def test_closed_pipe_is_not_a_traceback(conf, tmp_path, arguments):
    (tmp_path / "keys").write_bytes(b"root\n" * 1000)
    reader, writer = os.pipe()
    os.close(reader)
    with open(tmp_path / "keys", "rb") as keys, open(writer, "wb") as nobody:
        done = finished(start("-c", conf, *arguments, stdin=keys, stdout=nobody))
    assert (done.status, done.said) == (2, "")


def test_full_disk_is_one_line(conf):
    with open("/dev/full", "wb") as full:
        done = finished(start("-c", conf, "query", "aliases", "alias", "root", stdout=full))
    assert (done.status, done.said) == (2, "table-consulctl: no space left on device\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["query", "aliases", "alias", "nobody"],
        ["query", "aliases", "alias", "root", "--trace"],
        ["-c", "/nonexistent", "lint"],
        ["query"],
        ["nonsense"],
    ],
)
def test_unwritable_standard_error_keeps_the_exit_status(conf, arguments):
    with open("/dev/full", "wb") as full:
        assert finished(start("-c", conf, *arguments, stdout=subprocess.DEVNULL, stderr=full)).status == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_characters_outside_the_encoding_are_escaped(tmp_path, encoding):
    source = write_source(tmp_path, {"t/alias/\u2603": b"vera", "t/oops/\u2603": b""})
    (tmp_path / "c.toml").write_text(f'[consul]\naddress = "file://{source}"\n')
    environ = {**os.environ, "PYTHONIOENCODING": encoding}
    command = ["-c", tmp_path / "c.toml", "lint", "t"]
    done = finished(start(*command, stdout=subprocess.PIPE, env=environ))
    assert (done.status, "internal error" in done.said) == (1, False), done.said
    command = ["-c", tmp_path / "c.toml", "query", "t", "alias", "\u2603", "\u2604"]
    done = finished(start(*command, stdout=subprocess.PIPE, env=environ))
    assert (done.status, "internal error" in done.said, done.out) == (2, False, "\u2603\tvera\n".encode())
    done = finished(start("policy", "\u2603", stdout=subprocess.PIPE, env=environ))
    assert (done.status, done.said) == (0, "")


def test_closed_standard_streams_are_not_a_traceback(conf):
    command = [sys.executable, "-c", START, "-c", str(conf), "query", "aliases", "alias", "root"]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&- <&-', "sh", *command], stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("arguments", [["query", "aliases", "alias", "-"], ["set", "aliases", "alias", "root", "-"]])
def test_closed_standard_input_is_one_line(tmp_path, arguments):
    with FakeConsul() as fake:
        command = [sys.executable, "-c", START, "-c", str(write_config(tmp_path, address=fake.address)), *arguments]
        done = subprocess.run(["sh", "-c", 'exec "$@" <&-', "sh", *command], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (2, b"table-consulctl: standard input: closed\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_edit_that_could_not_ask_opens_no_editor(tmp_path, closed):
    editor = Editor(tmp_path, "text = 'root: eric'")
    with FakeConsul() as fake:
        command = [sys.executable, "-c", START, "edit", "aliases", "alias"]
        environ = {**os.environ, "CONSUL_HTTP_ADDR": fake.address, "VISUAL": editor.command}
        shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *command]
        done = subprocess.run(shell, stderr=subprocess.PIPE, env=environ, check=False)
    assert (done.returncode, b"a standard stream is closed" in done.stderr, done.stderr.count(b"\n")) == (2, True, 1)
    assert not (tmp_path / "opened.jsonl").exists()


@pytest.mark.parametrize(("value", "coloured"), [("1", False), ("", True)])
def test_no_color_turns_colours_off(conf, value, coloured):
    status, shown = at_terminal("-c", conf, "lint", "consul", NO_COLOR=value)
    assert (status, "\x1b[" in shown) == (1, coloured), shown


def test_shell_completion_exits_with_0(monkeypatch, capsys):
    for name, value in {"": "zsh_complete", "COMP_WORDS": "table-consulctl po", "COMP_CWORD": "1"}.items():
        monkeypatch.setenv(name or "_TABLE_CONSULCTL_COMPLETE", value)
    assert main.main([]) == 0
    assert "policy" in capsys.readouterr().out
