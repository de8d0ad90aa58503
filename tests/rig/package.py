"""The wheel of the project, and the wheels it needs for other Pythons."""

from __future__ import annotations

import email
import email.policy
import functools
import hashlib
import os
import re
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from tests.rig import cache

if TYPE_CHECKING:
    from collections.abc import Iterable

CHECKOUT = Path(__file__).resolve().parents[2]
WHEEL_SOURCES = ("pyproject.toml", "README.md", "LICENSE", "man", "table_consul")
CRYPT_R_SUITES = ("forky", "trixie")


def copy(into: Path, *without: str) -> Path:
    """A copy of the project without ignored files, because the checkout may change."""
    ignored = [line.rstrip("/") for line in (CHECKOUT / ".gitignore").read_text().splitlines()]
    kept_out = shutil.ignore_patterns(".git", "*.pyc", *ignored, *without)
    return Path(shutil.copytree(CHECKOUT, into, ignore=kept_out, symlinks=True))


@functools.cache
def wheel() -> Path:
    """The wheel under test: $TABLE_CONSUL_WHEEL, or one built of the checkout and kept until the checkout changes.

    Raises:
        Unavailable: it cannot be built.
    """
    if chosen := os.environ.get("TABLE_CONSUL_WHEEL"):
        return Path(chosen)
    return next(cache.current("wheel", digest(CHECKOUT, WHEEL_SOURCES), _build).glob("*.whl"))


def digest(folder: Path, names: Iterable[str] = (".",)) -> str:
    """A digest of these files and of all files below these folders."""
    found = hashlib.sha256()
    for name in names:
        top = folder / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and path.suffix != ".pyc":
                found.update(f"{path.relative_to(folder)}\0{path.stat().st_mode}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def _build(into: Path) -> str:
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", into)
    cache.run(sys.executable, "-m", "pip", "wheel", *options, CHECKOUT)
    return next(into.glob("*.whl")).name.split("-")[1]


def requirements() -> list[str]:
    """The run-time requirements of the wheel with all extras, such as ``requests>=2.32``."""
    with zipfile.ZipFile(wheel()) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name), policy=email.policy.default)
    return sorted(re.sub(r"\s*;\s*extra == .*", "", line) for line in metadata.get_all("Requires-Dist", []))


def lowest() -> list[str]:
    """The lowest version of each requirement of the wheel, such as ``requests==2.32.2``, as constraints for pip."""
    wanted = [Requirement(line) for line in requirements()]
    return [f"{each.name}=={bound.version}" for each in wanted for bound in each.specifier if bound.operator == ">="]


def dependencies(python: str) -> Path:
    """A folder for ``sys.path`` with the requirements of the wheel, for this version of Python (``3.13``).

    Raises:
        Unavailable: no network, or no wheel for that Python.
    """
    wanted = requirements()
    stamp = hashlib.sha256("\n".join(wanted).encode()).hexdigest()[:16]
    wheels = [each for each in wanted if not each.startswith("crypt-r")]

    def install(into: Path) -> str:
        options = ("--quiet", "--target", into, "--python-version", python, "--only-binary=:all:")
        cache.run(sys.executable, "-m", "pip", "install", *options, *wheels)
        if wheels != wanted:
            _add_crypt_r(python, into)
        cache.run("chmod", "-R", "a+rX", into)
        return "0"

    return cache.cached(f"python{python}-{stamp}", install)


def wheels(python: str) -> Path:
    """A folder with the wheels of the requirements except crypt-r, for ``pip install --find-links``.

    Raises:
        Unavailable: no network, or no wheel for that Python.
    """
    wanted = [each for each in requirements() if not each.startswith("crypt-r")]
    stamp = hashlib.sha256("\n".join(wanted).encode()).hexdigest()[:16]

    def download(into: Path) -> str:
        options = ("--quiet", "--dest", into, "--python-version", python, "--only-binary=:all:")
        cache.run(sys.executable, "-m", "pip", "download", *options, *wanted)
        return "0"

    return cache.cached(f"wheels{python}-{stamp}", download)


def _add_crypt_r(python: str, into: Path) -> None:
    """Add Debian's build of crypt-r to the wheels: PyPI has only its source, which would be built for our own Python.

    Without a build of Debian for that Python it is left out: no OpenSMTPD there has the service auth.
    """
    for suite in CRYPT_R_SUITES:
        with tempfile.TemporaryDirectory() as folder:
            cache.download("python3-crypt-r", suite, Path(folder))
            files = Path(folder) / "usr/lib/python3/dist-packages"
            built = list(files.glob(f"_crypt_r.cpython-{python.replace('.', '')}-*.so"))
            if built:
                for path in (files / "crypt_r.py", *built):
                    shutil.copy(path, into)
                return


@functools.cache
def unpacked() -> Path:
    """A folder for ``sys.path`` with the project, made for this run."""
    folder = tempfile.TemporaryDirectory(prefix="table-consul-wheel-")
    _KEPT_TILL_EXIT.append(folder)
    with zipfile.ZipFile(wheel()) as archive:
        archive.extractall(folder.name)
    cache.run("chmod", "-R", "a+rX", folder.name)
    return Path(folder.name)


_KEPT_TILL_EXIT: list[tempfile.TemporaryDirectory[str]] = []
