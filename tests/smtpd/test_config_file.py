"""The path of the configuration, and errors of unreadable files."""

from __future__ import annotations

import os

import pytest

from table_consul import config, files
from table_consul.errors import ConfigError


def test_missing_default_file_is_all_defaults(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "DEFAULT_PATH", str(tmp_path / "none" / "table-consul.toml"))
    assert config.load(None, {}) == config.Config(path=None)


def test_default_path_below_a_file_is_a_missing_file(tmp_path, monkeypatch):
    (tmp_path / "mail").write_text("")
    monkeypatch.setattr(config, "DEFAULT_PATH", str(tmp_path / "mail" / "table-consul.toml"))
    assert config.load(None, {}).path is None


def test_default_file_is_read_if_it_exists(config_file, monkeypatch):
    config_file.write_text('[defaults]\ntable = "mail"')
    monkeypatch.setattr(config, "DEFAULT_PATH", str(config_file))
    loaded = config.load(None, {})
    assert (loaded.path, loaded.defaults.name) == (str(config_file), "mail")


def test_default_file_that_is_a_folder_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "DEFAULT_PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="is a folder"):
        config.load(None, {})


def test_byte_order_mark_of_windows_editors_is_ignored(config_file):
    config_file.write_bytes(b'\xef\xbb\xbf[defaults]\r\nprefix = "mail"\r\n')
    assert config.load(str(config_file), {}).defaults.prefix == "mail"


def test_missing_file_is_reported(tmp_path):
    with pytest.raises(ConfigError, match=r"/none: not found \(correct the path, or create it\)$"):
        config.load(str(tmp_path / "none"), {})


@pytest.mark.parametrize("path", ["", "a\0b", "/" + "x" * 5000])
def test_impossible_path_is_a_config_error(path):
    with pytest.raises(ConfigError):
        config.load(path, {})


def test_empty_path_is_not_the_default_path(config_file, monkeypatch):
    config_file.write_text("")
    monkeypatch.setattr(config, "DEFAULT_PATH", str(config_file))
    with pytest.raises(ConfigError, match=r"^: not found \(correct"):
        config.load("", {})


def test_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r": is a folder \(name a file\)$"):
        config.load(str(tmp_path), {})


def test_named_pipe_without_writer_is_refused_without_waiting(config_file):
    os.mkfifo(config_file)
    with pytest.raises(ConfigError, match=r": a named pipe, not a file \(check the path\)$"):
        config.load(str(config_file), {})


def test_device_is_refused():
    with pytest.raises(ConfigError, match=r"^/dev/zero: a device, not a file \(check the path\)$"):
        config.load("/dev/zero", {})


LOAD = "try: config.load(sys.argv[1], {})\nexcept Exception as error: print(error)"


def test_unreadable_file_is_reported_with_the_user_and_a_hint(run_as_nobody, open_folder):
    path = open_folder / "table-consul.toml"
    path.write_text("")
    path.chmod(0o600)
    text = run_as_nobody(LOAD, str(path))
    assert text.startswith(f"{path}: not readable by user nobody (uid 65534); smtpd runs tables as an unprivileged")
    assert f"chown root:{files.smtpd_group()} {path}; chmod 0640 {path}" in text


def test_inaccessible_folder_above_the_file_is_reported(run_as_nobody, open_folder):
    folder = open_folder / "closed"
    folder.mkdir(mode=0o700)
    (folder / "table-consul.toml").write_text("")
    assert run_as_nobody(LOAD, str(folder / "table-consul.toml")).startswith(
        f"{folder}/table-consul.toml: user nobody (uid 65534) cannot enter folder {folder} (try: chgrp "
    )
