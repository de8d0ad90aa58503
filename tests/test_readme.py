"""What README.md promises is what the program does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from table_consul.services import SERVICES
from table_consul.shape import ConsulSection, DefaultsSection, LogSection, MetricsSection

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def indented(text):
    return "".join(f"    {line}".rstrip() + "\n" for line in text.splitlines())


def test_the_help_is_that_of_the_program():
    shown = subprocess.run(
        [sys.executable, "-m", "table_consul", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "PYTHON_COLORS": "0"},
    ).stdout
    if sys.version_info[:2] == (3, 11):  # argparse words its help a little differently in each version
        assert indented(shown) in README
    for word in ("usage: table-consul", "--check CONFIG", "--version", "CONFIG"):
        assert word in shown
        assert word in README


@pytest.mark.parametrize("section", [ConsulSection, DefaultsSection, LogSection, MetricsSection])
def test_every_key_of_the_configuration_is_told(section):
    missing = [field.name for field in msgspec.structs.fields(section) if f"`{field.name}`" not in README]
    assert missing == []


def test_every_service_is_told():
    assert [name for name in SERVICES if f"`{name}`" not in README] == []


def test_the_dialogue_to_try_is_answered(tmp_path):
    (tmp_path / "export.json").write_text('[{"key": "aliases/alias/root", "flags": 0, "value": "Z2lsbGVz"}]')
    config = tmp_path / "table-consul.toml"
    config.write_text(f'[consul]\naddress = "file://{tmp_path}/export.json"\n')
    said = re.search(r"printf '(config\|ready.*?)' \|", README)
    assert said is not None
    answer = subprocess.run(
        [sys.executable, "-m", "table_consul", str(config)],
        input=said[1].replace("\\n", "\n"),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert answer.endswith("register|ready\nlookup-result|1|found|gilles\n")
