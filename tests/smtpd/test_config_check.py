"""Problems with the files of a configuration, as `table-consul --check` reports them."""

from __future__ import annotations

import os

import pytest

from table_consul import check, files
from tests.smtpd.configuration import SECRET


def test_good_configuration_has_no_problems(load_config, tmp_path):
    tmp_path.chmod(0o750)
    (tmp_path / "token").write_text(SECRET)
    (tmp_path / "token").chmod(0o640)
    text = f'[consul]\ntoken_file = "{tmp_path}/token"\nca_path = "{tmp_path}"\n'
    text += f'[defaults]\nsnapshot = "{tmp_path}/{{table}}"'
    assert check.check_files(load_config(text)) == []


def test_missing_files_are_reported_with_their_key(load_config, config_file):
    loaded = load_config(
        '[consul]\naddress = "file:///no/export"\ntoken_file = "/no/token"\nca_file = "/no/ca"\n'
        '[defaults]\nsnapshot = "/no/{table}"\n[metrics]\ntextfile = "/no/{table}.prom"',
        CONSUL_CLIENT_CERT="/no/cert",
        CONSUL_CLIENT_KEY="/no/key",
    )
    assert check.check_files(loaded) == [
        f"{config_file}: consul.token_file: /no/token: not found",
        f"{config_file}: consul.ca_file: /no/ca: not found",
        "environment: CONSUL_CLIENT_CERT: /no/cert: not found",
        "environment: CONSUL_CLIENT_KEY: /no/key: not found",
        f"{config_file}: consul.address: /no/export: not found",
        *(
            f"{config_file}: {key} of table consul: folder /no not found, or not writable by {files.current_user()}"
            for key in ("snapshot", "metrics.textfile")
        ),
    ]


def test_folder_in_place_of_a_file_is_reported_and_the_reverse(load_config, config_file):
    lines = check.check_files(load_config(f'[consul]\nca_file = "{config_file.parent}"\nca_path = "{config_file}"'))
    assert [line.rpartition(": ")[2] for line in lines] == ["is a folder", "not a folder"]


def test_secret_that_everyone_can_read_is_reported(load_config, tmp_path):
    (tmp_path / "token").write_text(SECRET)
    (tmp_path / "token").chmod(0o644)
    (line,) = check.check_files(load_config(f'[consul]\ntoken_file = "{tmp_path}/token"'))
    assert line.endswith("/token: every user of this machine can read this secret (try: chmod 0640)")
    assert SECRET not in line


def test_snapshot_that_others_can_read_is_reported(load_config, tmp_path):
    (tmp_path / "copy").write_text("[]")
    (tmp_path / "copy").chmod(0o640)
    (line,) = check.check_files(load_config(f'[tables.a]\nsnapshot = "{tmp_path}/copy"'))
    assert line.endswith("snapshot of table a: other users can read this copy of the table (try: chmod 0600)")


def test_two_tables_with_one_snapshot_are_reported(load_config, tmp_path):
    (line,) = check.check_files(load_config(f'[defaults]\nsnapshot = "{tmp_path}/copy"\n[tables.a]\n[tables.b]'))
    assert line.endswith("snapshot of table b: same file as for table a (put {table} into its name)")


@pytest.mark.parametrize("tables", ["", "[tables.a]", '[tables.a]\nsnapshot = "{}/a"\n'])
@pytest.mark.parametrize(("section", "key"), [("defaults", "snapshot"), ("metrics", "textfile")])
def test_path_that_every_table_would_write_is_reported(load_config, config_file, tmp_path, section, key, tables):
    text = f'[{section}]\n{key} = "{tmp_path}/copy"\n{tables.format(tmp_path)}'
    hint = "every table would write the same file (put {table} into its name)"
    assert check.check_files(load_config(text)) == [f"{config_file}: {section}.{key}: {hint}"]


def test_path_of_one_table_needs_no_placeholder(load_config, tmp_path):
    assert check.check_files(load_config(f'[tables.a]\nsnapshot = "{tmp_path}/copy"')) == []


@pytest.mark.parametrize(("section", "key"), [("defaults", "snapshot"), ("metrics", "textfile")])
def test_folder_in_place_of_a_file_to_write_is_reported(load_config, tmp_path, section, key):
    (tmp_path / "consul").mkdir()
    (line,) = check.check_files(load_config(f'[{section}]\n{key} = "{tmp_path}/{{table}}"'))
    assert line.endswith(f"{key} of table consul: is a folder")


def test_unverified_tls_is_reported(load_config):
    text = "TLS verification is off: a man in the middle can read the token and forge answers"
    (line,) = check.check_files(load_config('[consul]\naddress = "https://c"\ntls_verify = false'))
    assert line.endswith(f"/table-consul.toml: consul.tls_verify: {text}")
    (line,) = check.check_files(load_config('[consul]\naddress = "https://c"', CONSUL_HTTP_SSL_VERIFY="false"))
    assert line == f"environment: CONSUL_HTTP_SSL_VERIFY: {text}"


def test_file_that_only_root_can_read_is_reported_to_root(load_config, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("what root alone can read is tried as root (sudo make test)")
    (tmp_path / "token").write_text(SECRET)
    (tmp_path / "token").chmod(0o600)
    (line,) = check.check_files(load_config(f'[consul]\ntoken_file = "{tmp_path}/token"'))
    assert "/token: only root can read it, but smtpd runs tables as an unprivileged user" in line


def test_configuration_that_only_root_can_read_is_reported_to_root(load_config, config_file):
    if os.geteuid() != 0:
        pytest.skip("what root alone can read is tried as root (sudo make test)")
    loaded = load_config()
    config_file.chmod(0o600)
    (line,) = check.check_files(loaded)
    assert line.startswith(f"{config_file}: only root can read it, ")


def test_named_pipe_is_refused_by_the_check_without_waiting_for_a_writer(load_config, tmp_path):
    os.mkfifo(tmp_path / "token", 0o640)
    (line,) = check.check_files(load_config(f'[consul]\ntoken_file = "{tmp_path}/token"'))
    assert line.endswith(f"consul.token_file: {tmp_path}/token: a named pipe, not a file")


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
    assert f"consul.ca_path: {open_folder}/ca: folder {open_folder}/ca cannot be entered by user nobody" in folder
    assert f"consul: folder {open_folder} not found, or not writable by user nobody (uid 65534)" in snapshot
