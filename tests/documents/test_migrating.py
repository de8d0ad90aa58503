"""Every command of docs/migrating.md runs in order and prints the output that the page shows."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents.document import ROOT, page
from tests.rig import cache
from tests.rig.consul import consul_binary

PAGE = page("docs/migrating.md")
CONTROL = """\
#!{python}
import sys
from table_consul import config
config.DEFAULT_PATH = "{folder}/none.toml"
from table_consul.ctl.main import main
sys.exit(main())
"""
# The tables of table-sqlite(5).
ROWS = """\
CREATE TABLE domains (domain VARCHAR(255) NOT NULL);
CREATE TABLE virtuals (email VARCHAR(255) NOT NULL, destination VARCHAR(255) NOT NULL);
CREATE TABLE credentials (email VARCHAR(255) NOT NULL, password VARCHAR(255) NOT NULL);
INSERT INTO domains VALUES ('example.org');
INSERT INTO virtuals VALUES ('postmaster@example.org', 'gilles');
INSERT INTO virtuals VALUES ('staff@example.org', 'gilles');
INSERT INTO virtuals VALUES ('staff@example.org', 'eric@example.net');
INSERT INTO credentials VALUES
    ('gilles@example.org', '$2b$08$ANGFKBL.BnDLL0bUl7I6aumTCLRJSQluSQLuueWRG.xceworWrUIu');
"""


def sqlite():
    """The sqlite3 command of this system, or Debian's, which needs no library that Python does not need too."""
    if found := shutil.which("sqlite3"):
        return found
    system = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    suite = system.get("VERSION_CODENAME", "")
    return cache.cached(f"sqlite3-{suite}", lambda path: cache.download("sqlite3", suite, path)) / "usr/bin/sqlite3"


def shell(consul, folder):
    """Runs a line in a folder with the files that the page assumes; standard output and error together."""
    programs = folder / "bin"
    programs.mkdir()
    (programs / "table-consulctl").write_text(CONTROL.format(python=sys.executable, folder=folder))
    (programs / "table-consulctl").chmod(0o755)
    (programs / "consul").symlink_to(consul_binary())
    (programs / "sqlite3").symlink_to(sqlite())
    work = folder / "work"
    work.mkdir()
    (work / "contrib").symlink_to(ROOT / "contrib")
    (toml,) = PAGE.fenced("toml")
    (work / "paths.toml").write_text(toml.text)
    with sqlite3.connect(work / "smtp.sqlite") as database:
        database.executescript(ROWS)
    database.close()
    environment = {
        "TABLE_CONSUL_UNDO_DIR": str(folder / "undo"),
        "PATH": f"{programs}:/usr/bin:/bin",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "CONSUL_HTTP_ADDR": f"http://{consul.address}",
        "LC_ALL": "C.UTF-8",
    }

    def run(line):
        return subprocess.run(
            ["sh", "-c", line],
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        ).stdout

    return work, run


def answered(consul, folder):
    """Each command of the page with its actual output."""
    work, run = shell(consul, folder)
    for command in PAGE.commands():
        names = command.text.removeprefix("cat ").split()
        if command.text.startswith("cat ") and len(names) == 1 and not (work / names[0]).exists():
            (work / names[0]).write_text(command.output)  # the page shows the file that the next command reads
        yield command, run(command.text)


def test_every_command_prints_the_output_of_the_page(consul, tmp_path):
    try:
        found = [*answered(consul, tmp_path)]
    except cache.Unavailable as error:
        pytest.skip(str(error))
    wrong = [
        f"docs/migrating.md:{command.line}: $ {command.text}\n{answer}"
        for command, answer in found
        if answer != command.output
    ]
    assert wrong == [], "\n".join(wrong)
