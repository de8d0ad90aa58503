"""Fixtures of several modules in this folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from table_consul import config
from table_consul.errors import ConfigError


@pytest.fixture
def config_file(tmp_path):
    return tmp_path / "table-consul.toml"


@pytest.fixture
def load_config(config_file):
    def load_config(text: str | bytes = "", **environ: str) -> config.Config:
        config_file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return config.load(str(config_file), environ)

    return load_config


@pytest.fixture
def config_errors(config_file, load_config):
    """All lines of the error, without the path of the file."""

    def config_errors(text: str | bytes = "", **environ: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load_config(text, **environ)
        lines = [str(caught.value), *getattr(caught.value, "__notes__", [])]
        assert not any("\n" in line for line in lines)
        return [line.removeprefix(f"{config_file}: ") for line in lines]

    return config_errors


@pytest.fixture
def run_as_nobody():
    if os.geteuid() != 0:
        pytest.skip("what another user cannot read is tried as root (sudo make test)")

    def run(check: str, *arguments: str) -> str:
        """What the check prints, run as a user that owns nothing."""
        begin = "import grp, os, pwd, sys; from table_consul import check, config"
        code = f"{begin}; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n{check}"
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        return done.stdout

    return run


@pytest.fixture
def open_folder(tmp_path):
    """A folder that every user can enter."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder == Path("/tmp"):
            break
        folder.chmod(0o755)
    return tmp_path
