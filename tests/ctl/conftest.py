"""Fixtures for several test modules of table-consulctl."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from table_consul.ctl import main
from tests.ctl.hosts import install
from tests.ctl.queries import STORE
from tests.dialogue import write_source
from tests.fake_consul import FakeConsul


@pytest.fixture
def fake():
    """A fake Consul without keys."""
    with FakeConsul() as fake:
        yield fake


@pytest.fixture
def conf(tmp_path):
    """A configuration that reads `queries.STORE` from a file."""
    path = tmp_path / "c.toml"
    source = write_source(tmp_path, {key.decode(): value for key, value in STORE.items()})
    path.write_text(f'[consul]\naddress = "file://{source}"\n[defaults]\nprefix = "mail"\n')
    return path


@pytest.fixture
def run_status(capsys, monkeypatch):
    """Runs `table-consulctl -c CONFIG status ...`; the exit status, standard output and standard error."""
    for name in os.environ:
        if name.startswith("CONSUL_"):
            monkeypatch.delenv(name)

    def run(path, *arguments):
        code = main.main(["-c", path, "status", *arguments])
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def host(monkeypatch):
    """A folder of `hosts.install` that every user may enter; PATH finds its smtpd."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        install(path)
        monkeypatch.setenv("PATH", f"{path}/bin:/usr/bin:/bin")
        yield path
