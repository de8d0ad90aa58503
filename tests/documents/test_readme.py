"""What README.md promises is what the program does. What holds for every document is in test_docs.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from table_consul.services import SERVICES
from tests.documents.document import Document

PATH = Path(__file__).parents[2] / "README.md"
PAGE = Document(PATH)
README = PAGE.text


def test_it_is_a_front_page():
    assert len(README.splitlines()) <= 190


def test_every_service_is_told():
    assert [name for name in SERVICES if f"`{name}`" not in README] == []


def test_the_two_commands_come_first():
    first = [command.text for command in PAGE.commands()][:2]
    assert first == ["make demo", "make test"]


def test_what_the_demo_is_shown_to_say_it_says():
    script = (PATH.parent / "tests/rig/demo.py").read_text()
    shown = next(block.text for block in PAGE.fenced("text") if "[as it should be]" in block.text)
    steps = re.findall(r"^\d\. (.*?)(?::|$)", shown, re.MULTILINE)
    assert len(steps) == 3
    assert [step for step in steps if step not in script] == []


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


def test_the_table_of_one_s_own_is_that_of_the_example(tmp_path):
    (block,) = PAGE.fenced("python")
    table = tmp_path / "table.py"
    table.write_text(block.text)
    answer = subprocess.run(
        [sys.executable, str(table)],
        input="config|tablename|t\nconfig|ready\ntable|0.1|0|t|check|mailaddr|1|gilles@poolp.org\n",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert answer.endswith("check-result|1|found\n")
