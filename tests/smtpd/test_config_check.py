"""Problems with the files of a configuration, as `table-consul --check` reports them."""

from __future__ import annotations

import contextlib
import os
import pwd

import pytest

from table_consul import check, files, kv
from table_consul.errors import SourceError
from tests.smtpd.configuration import HINT, SECRET

MISSING = "(correct the path, or create it)"
MAKE = "(create it for this user)"


@pytest.fixture(autouse=True)
def _no_smtpd(monkeypatch, open_folder):
    """Pretend that smtpd's user does not exist; root then checks that every user can enter the folders above a file."""
    monkeypatch.setattr(check, "smtpd_user", lambda: None)


def problems(loaded):
    """The lines of the check, each with a hint."""
    lines = check.check_files(loaded)
    assert [line for line in lines if not HINT.search(line)] == []
    return lines


@pytest.fixture
def as_nobody(monkeypatch):
    """Make nobody the user of smtpd in the check."""
    if os.geteuid() != 0:
        pytest.skip("files that smtpd's user cannot read need root: sudo make test")
    monkeypatch.setattr(check, "smtpd_user", lambda: pwd.getpwnam("nobody"))


def test_good_configuration_has_no_problems(load_config, tmp_path):
    (tmp_path / "token").write_text(f"{SECRET}\n")
    (tmp_path / "token").chmod(0o640)
    text = f'[consul]\ntoken_file = "{tmp_path}/token"\nca_path = "{tmp_path}"\n'
    text += f'[defaults]\nsnapshot = "{tmp_path}/{{table}}"'
    assert problems(load_config(text)) == []


def test_missing_files_are_reported_with_their_key(load_config, config_file):
    user = files.current_user()
    loaded = load_config(
        '[consul]\naddress = "file:///no/export"\ntoken_file = "/no/token"\nca_file = "/no/ca"\n'
        '[defaults]\nsnapshot = "/no/{table}"\n[metrics]\ntextfile = "/no/{table}.prom"',
        CONSUL_CLIENT_CERT="/no/cert",
        CONSUL_CLIENT_KEY="/no/key",
    )
    assert problems(loaded) == [
        f"{config_file}: consul.token_file: /no/token: not found {MISSING}",
        f"{config_file}: consul.ca_file: /no/ca: not found {MISSING}",
        f"environment: CONSUL_CLIENT_CERT: /no/cert: not found {MISSING}",
        f"environment: CONSUL_CLIENT_KEY: /no/key: not found {MISSING}",
        f"{config_file}: consul.address: /no/export: not found {MISSING}",
        *(
            f"{config_file}: {key} of table consul: folder /no not found, or not writable by {user} {MAKE}"
            for key in ("snapshot", "metrics.textfile")
        ),
    ]


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ('[tables.t]\nservices = ["auth"]', "services: auth: the Python package crypt-r is not installed"),
        ('[metrics]\nlisten = "127.0.0.1:9"', "metrics: the Python package prometheus-client is not installed"),
        ("", None),
    ],
)
def test_missing_package_is_reported(load_config, config_file, monkeypatch, more, problem):
    assert problems(load_config(more)) == []
    monkeypatch.setattr(check, "find_spec", lambda _name: None)
    lines = problems(load_config(more))
    assert [line.startswith(f"{config_file}: {problem} (install table-consul[") for line in lines] == [True] * bool(
        problem
    )


def test_folder_in_place_of_a_file_is_reported_and_the_reverse(load_config, config_file):
    lines = problems(load_config(f'[consul]\nca_file = "{config_file.parent}"\nca_path = "{config_file}"'))
    assert [line.rpartition(": ")[2] for line in lines] == [
        "is a folder (name a file)",
        "not a folder (correct the path)",
    ]


def test_secret_that_everyone_can_read_is_reported(load_config, tmp_path):
    (tmp_path / "token").write_text(SECRET)
    (tmp_path / "token").chmod(0o644)
    (line,) = problems(load_config(f'[consul]\ntoken_file = "{tmp_path}/token"'))
    assert line.endswith("/token: every user of this machine can read this secret (try: chmod 0640)")
    assert SECRET not in line


def test_snapshot_that_others_can_read_is_reported(load_config, tmp_path):
    (tmp_path / "copy").write_text("[]")
    (tmp_path / "copy").chmod(0o640)
    (line,) = problems(load_config(f'[tables.a]\nsnapshot = "{tmp_path}/copy"'))
    assert line.endswith("snapshot of table a: other users can read this snapshot (try: chmod 0600)")


def test_two_tables_with_one_snapshot_are_reported(load_config, tmp_path):
    (line,) = problems(load_config(f'[defaults]\nsnapshot = "{tmp_path}/copy"\n[tables.a]\n[tables.b]'))
    assert line.endswith("snapshot of table b: same file as for table a (put {table} into its name)")


@pytest.mark.parametrize("tables", ["", "[tables.a]", '[tables.a]\nsnapshot = "{}/a"\n'])
@pytest.mark.parametrize(("section", "key"), [("defaults", "snapshot"), ("metrics", "textfile")])
def test_path_that_every_table_would_write_is_reported(load_config, config_file, tmp_path, section, key, tables):
    text = f'[{section}]\n{key} = "{tmp_path}/copy"\n{tables.format(tmp_path)}'
    hint = "every table would write the same file (put {table} into its name)"
    assert problems(load_config(text)) == [f"{config_file}: {section}.{key}: {hint}"]


def test_path_of_one_table_needs_no_placeholder(load_config, tmp_path):
    assert problems(load_config(f'[tables.a]\nsnapshot = "{tmp_path}/copy"')) == []


@pytest.mark.parametrize(("section", "key"), [("defaults", "snapshot"), ("metrics", "textfile")])
def test_folder_in_place_of_a_file_to_write_is_reported(load_config, tmp_path, section, key):
    (tmp_path / "consul").mkdir()
    (line,) = problems(load_config(f'[{section}]\n{key} = "{tmp_path}/{{table}}"'))
    assert line.endswith(f"{key} of table consul: is a folder (name a file)")


def test_unverified_tls_is_reported(load_config):
    text = "TLS verification is off: a man in the middle can read the token and forge answers (turn it on)"
    (line,) = problems(load_config('[consul]\naddress = "https://c"\ntls_verify = false'))
    assert line.endswith(f"/table-consul.toml: consul.tls_verify: {text}")
    (line,) = problems(load_config('[consul]\naddress = "https://c"', CONSUL_HTTP_SSL_VERIFY="false"))
    assert line == f"environment: CONSUL_HTTP_SSL_VERIFY: {text}"


def test_file_that_only_root_can_read_is_reported_to_root(load_config, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("files that only root can read need root: sudo make test")
    (tmp_path / "token").write_text(SECRET)
    (tmp_path / "token").chmod(0o600)
    (line,) = problems(load_config(f'[consul]\ntoken_file = "{tmp_path}/token"'))
    assert "/token: only root can read it, but smtpd runs tables as an unprivileged user" in line


@pytest.mark.parametrize(
    "text", ["", "\n", f"SecretID: {SECRET}", f"{SECRET}\n{SECRET}\n", f"{SECRET} x", f" {SECRET}", f"\ufeff{SECRET}"]
)
def test_token_file_that_the_daemon_refuses_is_reported(load_config, tmp_path, text):
    path = tmp_path / "token"
    path.write_text(text)
    path.chmod(0o640)
    loaded = load_config(f'[consul]\naddress = "http://127.0.0.1:1"\ntoken_file = "{path}"')
    (line,) = problems(loaded)
    problem = "must contain one token: printable ASCII without white space (write only the SecretID)"
    assert line.endswith(f"consul.token_file: {path}: {problem}")
    with (
        contextlib.closing(kv.Client(loaded.consul)) as client,
        pytest.raises(SourceError, match="is empty or not one line"),
    ):
        client.get(b"x", timeout=1.0)


def test_folder_that_only_root_can_enter_is_reported_to_root(load_config, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("files that only root can read need root: sudo make test")
    (tmp_path / "secret").mkdir(mode=0o700)
    (tmp_path / "secret" / "ca").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "secret" / "ca")
    for path in ("secret/ca", "link"):
        (line,) = problems(load_config(f'[consul]\nca_file = "{tmp_path}/{path}"'))
        assert f"{tmp_path}/{path}: only root can enter folder {tmp_path}/secret, but smtpd runs tables as" in line
    (line,) = problems(load_config(f'[consul]\nca_path = "{tmp_path}/secret"'))
    assert f"only root can enter folder {tmp_path}/secret, " in line


def test_root_checks_as_the_user_of_smtpd(as_nobody, load_config, config_file, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o750)
    for name in ("token", "closed/key", "cert", "ca"):
        (tmp_path / name).write_text(SECRET)
        (tmp_path / name).chmod(0o640)
    os.chown(tmp_path / "ca", -1, 65534)
    text = f'[consul]\ntoken_file = "{tmp_path}/token"\nca_file = "{tmp_path}/ca"\n'
    text += f'cert_file = "{tmp_path}/cert"\nkey_file = "{tmp_path}/closed/key"\n'
    loaded = load_config(text + f'[defaults]\nsnapshot = "{tmp_path}/{{table}}"')
    groups = os.getgroups()
    user = "user nobody (uid 65534)"
    unreadable = f"not readable by {user}; smtpd runs tables as an unprivileged user (try: chown root:"
    starts = [
        f"{config_file}: consul.token_file: {tmp_path}/token: {unreadable}",
        f"{config_file}: consul.cert_file: {tmp_path}/cert: {unreadable}",
        f"{config_file}: consul.key_file: {tmp_path}/closed/key: {user} cannot enter folder {tmp_path}/closed ",
        f"{config_file}: snapshot of table consul: folder {tmp_path} not found, or not writable by {user} {MAKE}",
    ]
    lines = problems(loaded)
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts
    assert (os.geteuid(), os.getgroups()) == (0, groups)


def test_configuration_that_only_root_can_read_is_reported_to_root(load_config, config_file):
    if os.geteuid() != 0:
        pytest.skip("files that only root can read need root: sudo make test")
    loaded = load_config()
    config_file.chmod(0o600)
    (line,) = problems(loaded)
    assert line.startswith(f"{config_file}: only root can read it, ")


def test_named_pipe_is_refused_by_the_check_without_waiting_for_a_writer(load_config, tmp_path):
    os.mkfifo(tmp_path / "token", 0o640)
    (line,) = problems(load_config(f'[consul]\ntoken_file = "{tmp_path}/token"'))
    assert line.endswith(f"consul.token_file: {tmp_path}/token: a named pipe, not a file (check the path)")


def test_files_that_another_user_cannot_use_are_reported(run_as_nobody, open_folder):
    (open_folder / "token").write_text(SECRET)
    (open_folder / "token").chmod(0o600)
    (open_folder / "ca").mkdir(mode=0o744)
    path = open_folder / "table-consul.toml"
    path.write_text(
        f'[consul]\ntoken_file = "{open_folder}/token"\nca_path = "{open_folder}/ca"\n'
        f'[defaults]\nsnapshot = "{open_folder}/x"'
    )
    token, folder, snapshot = run_as_nobody(
        "print(*check.check_files(config.load(sys.argv[1], {})), sep='\\n')", str(path)
    ).splitlines()
    assert f"consul.token_file: {open_folder}/token: not readable by user nobody (uid 65534); " in token
    assert f"consul.ca_path: {open_folder}/ca: user nobody (uid 65534) cannot enter folder {open_folder}/ca" in folder
    assert f"consul: folder {open_folder} not found, or not writable by user nobody (uid 65534)" in snapshot


def test_tls_file_without_a_certificate_is_reported(load_config, tmp_path, config_file):
    (tmp_path / "ca").write_text("no PEM\n")
    loaded = load_config(f'[consul]\naddress = "https://127.0.0.1:1"\nca_file = "{tmp_path}/ca"')
    (line,) = problems(loaded)
    assert line.startswith(f"{config_file}: TLS files {tmp_path}/ca: ")


def test_export_file_that_cannot_be_parsed_is_reported(load_config, tmp_path, config_file):
    (tmp_path / "export").write_text("[{")
    (line,) = problems(load_config(f'[consul]\naddress = "file://{tmp_path}/export"'))
    assert line.startswith(f"{config_file}: consul.address: {tmp_path}/export: not the output of ")
    assert line.endswith(f" (try: consul kv export > {tmp_path}/export)")


def test_folder_of_the_metrics_socket_must_exist(load_config):
    (line,) = problems(load_config('[metrics]\nlisten = "unix:///no/{table}.sock"'))
    assert "metrics.listen of table consul: folder /no not found" in line


def test_loopback_port_of_two_tables_is_reported(load_config, monkeypatch):
    monkeypatch.setattr(check, "find_spec", lambda _name: object())
    text = '[metrics]\nlisten = "127.0.0.1:9102"\n[tables.a]\n'
    assert problems(load_config(text)) == []
    (line,) = problems(load_config(f"{text}[tables.b]"))
    assert line.endswith("metrics.listen of table b: same address as for table a (use unix:///PATH with {table})")
