from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys

import pytest

from table_consul import __version__, cli, config
from tests.dialogue import TIMEOUT_SECONDS, write_config


def run(*arguments, **environ):
    """Run the program with these arguments and variables, without input; other ``CONSUL_`` variables are unset."""
    return subprocess.run(
        [sys.executable, "-m", "table_consul", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env={**{k: v for k, v in os.environ.items() if not k.startswith("CONSUL_")}, **environ},
        check=False,
    )


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """Restore loggers and environment after each test."""
    root, ours = logging.getLogger(), logging.getLogger("table_consul")
    before = (root.handlers[:], root.level, ours.level, logging.raiseExceptions)
    for name in [name for name in os.environ if name.startswith("CONSUL_")]:
        monkeypatch.delenv(name)
    yield
    for handler in root.handlers:
        handler.flush()
    root.handlers[:], root.level, ours.level, logging.raiseExceptions = before


def test_help_shows_the_line_for_smtpd_conf_and_exits_with_0():
    shown = run("--help")
    assert (shown.returncode, shown.stderr, "table aliases consul\n" in shown.stdout) == (0, "", True)


def test_version_is_that_of_the_package():
    shown = run("--version")
    assert (0, f"table-consul {__version__}\n") == (shown.returncode, shown.stdout)


@pytest.mark.parametrize("arguments", [["--no-such-option"], ["a", "b"], ["--check", "a", "b"]])
def test_usage_error_is_reported_and_exits_with_2(arguments):
    shown = run(*arguments)
    assert (shown.returncode, shown.stdout, "usage: table-consul" in shown.stderr) == (2, "", True)


def test_check_of_a_good_configuration_exits_with_0(open_folder):
    path = str(write_config(open_folder))
    shown = run("--check", path)
    assert (0, f"{path}: ok\n", "") == (shown.returncode, shown.stdout, shown.stderr)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[consul]\naddres = 1\n", "consul.addres: unknown key (did you mean address?)"),
        ('[defaults]\nmode = "both"\n', "defaults.mode: "),
        ("[defaults", "cannot be read as TOML"),
    ],
)
def test_check_of_a_bad_configuration_names_the_place_and_exits_with_2(tmp_path, text, said):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    shown = run("--check", str(path))
    assert (shown.returncode, shown.stdout, shown.stderr.startswith(f"{path}: ")) == (2, "", True)
    assert said in shown.stderr


def test_check_reports_every_error_on_its_own_line(tmp_path, capsys):
    path = tmp_path / "bad.toml"
    path.write_text("[consul]\naddres = 1\n[log]\nlevl = 2\n")
    assert (cli.main(["--check", str(path)]), len(capsys.readouterr().err.splitlines())) == (2, 2)


def test_check_of_a_missing_file_exits_with_2(tmp_path, capsys):
    assert (2, f"{tmp_path}/none.toml: not found (correct the path, or create it)\n") == (
        cli.main(["--check", f"{tmp_path}/none.toml"]),
        capsys.readouterr().err,
    )


def test_check_reports_files_that_this_user_cannot_use(tmp_path, capsys):
    path = tmp_path / "c.toml"
    path.write_text(f'[consul]\naddress = "file://{tmp_path}/none.json"\n')
    assert (cli.main(["--check", str(path)]), "none.json: not found" in capsys.readouterr().err) == (2, True)


def test_check_of_a_good_configuration_within_the_process(open_folder, capsys):
    path = write_config(open_folder)
    assert (0, f"{path}: ok\n") == (cli.main(["--check", str(path)]), capsys.readouterr().out)


def test_secret_in_the_environment_is_not_shown_by_check(tmp_path):
    shown = run("--check", str(write_config(tmp_path)), CONSUL_HTTP_TOKEN="hunter2 hunter2")
    assert (
        shown.returncode,
        "hunter2" in shown.stdout + shown.stderr,
        "CONSUL_HTTP_TOKEN" in shown.stderr,
    ) == (2, False, True)


def test_terminal_as_input_prints_the_purpose_of_the_program(monkeypatch, capsys):
    monkeypatch.setattr(os, "isatty", lambda _: True)
    assert (cli.main([]), "OpenSMTPD starts table-consul" in capsys.readouterr().err) == (2, True)


@pytest.fixture
def wire(monkeypatch):
    """A socket pair: the program in this process reads one end, and the test gets the other."""
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(cli, "claim_stdio", lambda: (theirs.fileno(), theirs.fileno()))
    monkeypatch.setattr(os, "isatty", lambda _: False)
    with ours, theirs:
        yield ours


def test_program_serves_until_end_of_file(wire, tmp_path):
    wire.sendall(b"config|tablename|aliases\nconfig|ready\ntable|0.1|0|aliases|lookup|alias|1|root\n")
    wire.shutdown(socket.SHUT_WR)
    assert cli.main([str(write_config(tmp_path))]) == 0
    assert wire.recv(65536).splitlines()[-1] == b"lookup-result|1|found|gilles"


def test_empty_input_prints_a_hint(wire, tmp_path, capsys):
    wire.shutdown(socket.SHUT_WR)
    assert (cli.main([str(write_config(tmp_path))]), "--check" in capsys.readouterr().err) == (2, True)


def test_empty_input_without_standard_error_exits_with_2(wire, tmp_path, monkeypatch):
    wire.shutdown(socket.SHUT_WR)
    path = str(write_config(tmp_path))
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main([path]) == 2


def test_bad_configuration_is_logged_at_start(wire, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cli, "start_log", lambda *_: None)
    (tmp_path / "bad.toml").write_text("x = 1\n")
    wire.shutdown(socket.SHUT_WR)
    cli.main([str(tmp_path / "bad.toml")])
    (line,) = [record.getMessage() for record in caplog.records]
    assert (line.startswith(f"{tmp_path}/bad.toml: x: unknown key"), "smtpctl update table" in line) == (True, True)


def test_log_uses_the_table_name_from_smtpd(wire, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(cli, "start_log", lambda *arguments: started.append(arguments))
    wire.sendall(b"config|tablename|aliases\nconfig|ready\n")
    wire.shutdown(socket.SHUT_WR)
    cli.main([str(write_config(tmp_path, more='[log]\nlevel = "debug"\ntarget = "syslog"'))])
    assert started == [("debug", "syslog", ""), ("debug", "syslog", "aliases")]


def test_environment_of_the_consul_command_is_used_and_hidden_from_libraries(wire, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setenv("CONSUL_HTTP_ADDR", "192.0.2.1:8500")
    monkeypatch.setenv("CONSUL_HTTP_SSL", "")
    monkeypatch.setattr(cli, "Tables", lambda load, _: seen.append(load()) or Stopped.stop())
    (tmp_path / "c.toml").write_text("")
    with pytest.raises(Stopped):
        cli.main([str(tmp_path / "c.toml")])
    left = [name for name in os.environ if name.startswith("CONSUL_")]
    assert (seen[0].consul.addresses, left) == (("http://192.0.2.1:8500",), [])


class Stopped(Exception):
    @classmethod
    def stop(cls):
        raise cls


# ---- without an argument ----


@pytest.fixture
def default_path(monkeypatch, tmp_path):
    """The path of the default configuration file."""
    path = tmp_path / "table-consul.toml"
    monkeypatch.setattr(config, "DEFAULT_PATH", str(path))
    return path


def logged(wire, caplog, *dialogue):
    """Run the program without an argument; its log lines that name the configuration."""
    wire.sendall(b"config|tablename|aliases\nconfig|ready\n" + b"".join(dialogue))
    wire.shutdown(socket.SHUT_WR)
    caplog.set_level(logging.INFO, "table_consul")
    assert cli.main([]) == 0
    lines = [record.getMessage() for record in caplog.records]
    return [line.removeprefix("configuration: ") for line in lines if line.startswith("configuration: ")]


@pytest.fixture
def no_handlers(monkeypatch):
    """Keep the log handlers of the test."""
    monkeypatch.setattr(cli, "start_log", lambda *_: None)


def test_default_file_is_used_and_logged(wire, default_path, no_handlers, caplog):
    write_config(default_path.parent).rename(default_path)
    export = config.load(None, {}).consul.addresses[0]
    assert logged(wire, caplog, b"table|0.1|0|aliases|lookup|alias|1|root\n") == [f"{default_path}; address: {export}"]
    assert wire.recv(65536).splitlines()[-1] == b"lookup-result|1|found|gilles"


def test_without_a_default_file_the_environment_is_used_and_logged(
    wire, default_path, no_handlers, caplog, monkeypatch
):
    monkeypatch.setenv("CONSUL_HTTP_ADDR", "127.0.0.1:1")
    assert logged(wire, caplog) == [
        f"no {default_path}, using the defaults and the environment; address: http://127.0.0.1:1"
    ]


def test_update_logs_the_configuration_again(wire, default_path, no_handlers, caplog):
    default_path.write_text('[consul]\naddress = "http://127.0.0.1:1"\n')
    assert len(logged(wire, caplog, b"table|0.1|0|aliases|update|1\n")) == 2


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/nowhere", path)])
def test_default_file_that_cannot_be_read_is_an_error_not_a_missing_file(wire, default_path, no_handlers, caplog, make):
    make(default_path)
    assert logged(wire, caplog, b"table|0.1|0|aliases|lookup|alias|1|root\n") == []
    assert b"lookup-result|1|error|" in wire.recv(65536)
    assert f"{default_path}: " in caplog.text


@pytest.mark.usefixtures("open_folder")
def test_check_without_an_argument_checks_the_default_file(default_path, capsys):
    write_config(default_path.parent).rename(default_path)
    assert (cli.main(["--check"]), capsys.readouterr().out) == (0, f"{default_path}: ok\n")
    default_path.write_text("x = 1")
    assert (cli.main(["--check"]), f"{default_path}: x: unknown key" in capsys.readouterr().err) == (2, True)


def test_check_without_a_default_file_checks_the_environment(default_path, capsys, monkeypatch):
    missing = f"no {default_path}, using the defaults and the environment; address: http://127.0.0.1:8500: ok\n"
    assert (cli.main(["--check"]), capsys.readouterr().out) == (0, missing)
    monkeypatch.setenv("CONSUL_HTTP_TOKEN_FILE", "/nowhere")
    assert (cli.main(["--check"]), capsys.readouterr().err) == (
        2,
        "environment: CONSUL_HTTP_TOKEN_FILE: /nowhere: not found (correct the path, or create it)\n",
    )
