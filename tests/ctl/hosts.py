"""A host with a stand-in for smtpd, for commands that look for smtpd.conf and for the folder of its tables."""

from __future__ import annotations

from pathlib import Path

from table_consul import __version__

CONF = "table aliases consul\naction a maildir alias <aliases>\nmatch for domain <aliases> action a\n"


def install(folder: Path) -> None:
    """Put an smtpd into ``bin``, which finds its configuration and programs in this folder."""
    (folder / "bin").mkdir()
    (folder / "libexec").mkdir()
    smtpd = folder / "bin" / "smtpd"
    paths = f"\0{folder}/smtpd.conf\0{folder}/libexec/table-%s\0"
    smtpd.write_text(f"#!/bin/sh\nexit\n{paths}")
    smtpd.chmod(0o755)
    program(folder)
    (folder / "smtpd.conf").write_text(CONF)


def program(host: Path, text: str = f"echo table-consul {__version__}") -> None:
    """Put a shell script in the place of table-consul."""
    path = host / "libexec" / "table-consul"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
