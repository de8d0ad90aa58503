"""Fixtures of more than one module of table-consulctl."""

from __future__ import annotations

import pytest

from tests.ctl.queries import STORE
from tests.dialogue import write_source


@pytest.fixture
def conf(tmp_path):
    """A configuration that reads `queries.STORE` from a file."""
    path = tmp_path / "c.toml"
    source = write_source(tmp_path, {key.decode(): value for key, value in STORE.items()})
    path.write_text(f'[consul]\naddress = "file://{source}"\n[defaults]\nprefix = "mail"\n')
    return path
