"""Fixtures for several test modules in this folder."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from table_consul import config
from table_consul.child import Bridge
from table_consul.errors import ConfigError
from tests.dialogue import TIMEOUT_SECONDS, write_config
from tests.smtpd.configuration import HINT
from tests.smtpd.procexec import Clock


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
        assert [line for line in lines if not HINT.search(line)] == []
        return [line.removeprefix(f"{config_file}: ") for line in lines]

    return config_errors


@pytest.fixture
def run_as_nobody():
    if os.geteuid() != 0:
        pytest.skip("files that another user cannot read need root: sudo make test")

    def run(check: str, *arguments: str) -> str:
        """The output of the check, run as a user that owns no files."""
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


@pytest.fixture
def entries_config(tmp_path):
    """The path of a configuration that answers from `tests.dialogue.ENTRIES`."""
    return str(write_config(tmp_path))


@pytest.fixture(scope="module")
def make_program(tmp_path_factory):
    """Makes an executable script of Python or shell text, under a numbered name."""
    folder = tmp_path_factory.mktemp("programs")
    numbers = itertools.count()

    def make(text, path=None):
        path = path or folder / f"table-{next(numbers)}"
        if text.startswith("#!/usr/bin/python3"):
            text = text.partition("\n")[2]
        path.write_text(text if text.startswith("#!") else f"#!{sys.executable} -IS\n{text}")
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make_bridge(clock):
    made = []

    def make(path, dialect=None, deadline=TIMEOUT_SECONDS):
        made.append(Bridge("table-x", lambda: [path], dialect, deadline, clock, lambda: 0.0))
        return made[-1]

    yield make
    for each in made:
        each.close()
