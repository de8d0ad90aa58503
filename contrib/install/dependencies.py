"""Install the missing dependencies of table-consul: dependencies.py FOLDER EXTRAS WHEELS, for `make install`.

System packages are used if their versions suffice. If one is missing, all packages of its extra are installed into
FOLDER, in the pinned versions of requirements.txt, from PyPI or from the folder WHEELS.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
# A fork that provides the same module; Debian's python3-consul is this one.
ALTERNATIVES = {"python-consul2": "py-consul>=1.5.5,<2"}


def missing(requirement: str) -> str:
    """Return why this Python does not meet a requirement of pyproject.toml; an empty string if it does."""
    text, _, marker = requirement.partition(";")
    if "3.13" in marker and sys.version_info < (3, 13):
        return ""
    name, *bounds = re.split(r"(?=[<>])|,", text.strip())
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return (
            missing(ALTERNATIVES[name]) and f"{text}: not installed"
            if name in ALTERNATIVES
            else f"{text}: not installed"
        )
    for bound in filter(None, bounds):
        operator, wanted = re.fullmatch(r"(>=|<)([\d.]+)", bound).groups()
        if (_numbers(found) >= _numbers(wanted)) != (operator == ">="):
            return f"{text}: {found} is installed"
    return ""


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


def pinned(wanted: set[str]) -> str:
    """Return the pinned requirements of these extras, with hashes; the empty name selects the required ones."""
    first, *others = (HERE / "requirements.txt").read_text().split("\n# extra: ")
    sections = {"": first} | dict(text.split("\n", 1) for text in others)
    return "\n".join(sections[extra] for extra in sorted(wanted))


def pip() -> list[str]:
    """Return the command that runs pip, from a new virtual environment if only ensurepip is available."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if not importlib.util.find_spec("ensurepip"):
        sys.exit("install these packages, or pip (Debian: apt-get install python3-venv)")
    subprocess.run([sys.executable, "-m", "venv", "--clear", "build/installer"], check=True)
    return ["build/installer/bin/python", "-m", "pip"]


def main(folder: str, extras: str, wheels: str) -> None:
    """Install into a folder every extra that lacks a package."""
    if " " in sys.executable:  # in the first line of a program
        sys.exit(f"PYTHON: {sys.executable} contains a space, so no program can start with it")
    project = tomllib.loads((HERE / "../../pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    chosen = list(filter(None, extras.split(",")))
    if unknown := [extra for extra in chosen if extra not in optional]:
        sys.exit(f"EXTRAS: unknown extra {unknown[0]!r} (use a list of {','.join(sorted(optional))})")
    groups = {"": project["dependencies"]} | {extra: optional[extra] for extra in chosen}
    lacking = {extra: [text for each in group if (text := missing(each))] for extra, group in groups.items()}
    wanted = {extra for extra, texts in lacking.items() if texts}
    for text in (each for texts in lacking.values() for each in texts):
        sys.stdout.write(f"missing: {text}\n")
    sys.stdout.flush()
    if not wanted:
        return
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(pinned(wanted))
        file.flush()
        source = ["--no-index", f"--find-links={wheels}"] if wheels else []
        command = [*pip(), "install", "--quiet", "--disable-pip-version-check", "--require-hashes", *source]
        if subprocess.run([*command, f"--target={folder}", f"--requirement={file.name}"], check=False).returncode:
            sys.exit("nothing was installed")


if __name__ == "__main__":
    main(*sys.argv[1:])
