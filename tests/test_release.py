"""The released files: reproducible, complete, and without other files."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from table_consul import __version__
from tests.rig import image, package
from tests.rig.package import CHECKOUT

PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
STRAYS = (
    *(
        "table_consul/__pycache__/cli.cpython-311.pyc",
        "table_consul/ctl/__pycache__/x.pyc",
        "build/lib/table_consul/x.py",
    ),
    *("dist/old.whl", ".venv/bin/python", ".coverage", ".coverage.host.1", ".hypothesis/x", ".pytest_cache/x"),
    *("notes.txt", "smtpd.token", "bench/build/driver", "node_modules/x.js", ".git/config"),
)
FOLDERS = {".ci", "bench", "contrib", "debian", "docs", "man", "table_consul", "tests"}
FILES = {
    ".dockerignore",
    ".gitignore",
    "Dockerfile",
    "LICENSE",
    "Makefile",
    "PKG-INFO",
    "compose.yaml",
    "pyproject.toml",
}
# A file of another kind in one of these folders is probably there by accident.
KINDS = (
    *(".5", ".8", ".c", ".conf", ".example", ".gitignore", ".hcl", ".hex", ".json", ".jsonl", ".md", ".py", ".sh"),
    *(".tf", ".toml", ".txt", ".typed", ".yaml", ".yml"),
    *(".lintian-overrides", ".postinst", ".postrm", ".tmpfiles", ".triggers"),
)
PROGRAMS = {".ci/run", "debian/rules", "debian/tests/story"}
MAN = {f"share/man/man{path.suffix[1:]}/{path.name}" for path in (CHECKOUT / "man").iterdir()}


def build(tree, into, *arguments, umask=0o022, **environment):
    """Build into a folder with a minimal environment; the built files by name, as bytes."""
    told = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment}
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(into), *arguments, str(tree)]
    done = subprocess.run(command, env=told, capture_output=True, text=True, check=False, umask=umask, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.name: path.read_bytes() for path in into.iterdir()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the project, because it may change while tests run."""
    return package.copy(tmp_path_factory.mktemp("tree") / "table-consul")


@pytest.fixture(scope="module")
def dist(tree, tmp_path_factory):
    """The folder with the sdist and the wheel built from the copy."""
    folder = tmp_path_factory.mktemp("dist")
    build(tree, folder)
    return folder


@pytest.fixture(scope="module")
def sdist(dist):
    """Names and permissions of the files in the sdist, relative to its folder."""
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    assert {member.name.partition("/")[0] for member in members} == {path.name.removesuffix(".tar.gz")}
    return {member.name.partition("/")[2]: member for member in members}


@pytest.fixture(scope="module")
def wheel(dist):
    """The open wheel."""
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_another_copy_gives_the_same_bytes(tree, dist, tmp_path):
    other = tmp_path / "another place" / "x"
    other.mkdir(parents=True)
    for path in sorted(tree.rglob("*"), reverse=True):  # a folder lists files in the order of their creation
        target = other / path.relative_to(tree)
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            target.chmod(0o700 if path.stat().st_mode & 0o100 else 0o600)
    for name in STRAYS:
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_text("left here by accident\n")
    for path in [other, *other.rglob("*")]:
        os.utime(path, (981173106, 981173106))
    surroundings = {"TZ": "Asia/Kathmandu", "LC_ALL": "C", "PYTHONHASHSEED": "7", "USER": "nobody"}
    theirs = build(other, tmp_path / "dist", umask=0o077, **surroundings)
    assert theirs == {path.name: path.read_bytes() for path in dist.iterdir()}


def test_wheel_is_the_same_from_the_tree_and_from_the_sdist(tree, dist, tmp_path):
    built = build(tree, tmp_path / "dist", "--wheel")
    assert built == {path.name: path.read_bytes() for path in dist.glob("*.whl")}


def test_changed_tree_gives_other_bytes(tree, dist, tmp_path):
    other = tmp_path / "tree"
    shutil.copytree(tree, other)
    with (other / "man/table-consul.8").open("a") as page:
        page.write('.\\" changed\n')
    ours = {path.name: path.read_bytes() for path in dist.iterdir()}
    theirs = build(other, tmp_path / "dist")
    assert sorted(name for name in ours if ours[name] != theirs[name]) == sorted(ours)


def test_dates_are_those_of_source_date_epoch(tree, tmp_path):
    build(tree, tmp_path / "dist", "--wheel", SOURCE_DATE_EPOCH="1600000000")
    (path,) = (tmp_path / "dist").iterdir()
    with zipfile.ZipFile(path) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(2020, 9, 13, 12, 26, 40)}


def test_sdist_holds_every_file_of_the_project(tree, sdist):
    wanted = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    assert wanted - {*sdist} == set()
    assert {name.partition("/")[0] for name in sdist if "/" in name} >= FOLDERS - {".ci"}


def test_sdist_holds_no_other_files(tree, sdist):
    for name in sdist:
        top, slash, _ = name.partition("/")
        assert (top in FOLDERS) if slash else (name in FILES or name.endswith(".md")), name
        assert not slash or name in PROGRAMS or name.endswith(KINDS) or Path(name).suffix == "", name
        assert name == "PKG-INFO" or (tree / name).is_file(), name


def test_files_are_readable_by_all_and_writable_by_their_owner(sdist, wheel):
    odd = {name: oct(member.mode) for name, member in sdist.items() if member.mode not in {0o644, 0o755}}
    assert odd == {}
    assert {(member.uid, member.gid, member.uname, member.gname) for member in sdist.values()} == {(0, 0, "", "")}
    assert {entry.external_attr >> 16 & 0o777 for entry in wheel.infolist()} == {0o644}


def test_wheel_holds_the_package_the_pages_and_its_metadata(tree, wheel):
    package = {str(path.relative_to(tree)) for path in (tree / "table_consul").rglob("*") if path.is_file()}
    stem = f"table_consul-{__version__}"
    pages = {f"{stem}.data/data/{name}" for name in MAN}
    needed = {f"{stem}.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")}
    assert {*wheel.namelist()} == package | pages | needed | {f"{stem}.dist-info/licenses/LICENSE"}
    assert [name for name in package if not name.endswith((".py", "/py.typed"))] == []


def test_twine_check_passes(dist):
    done = subprocess.run(
        [sys.executable, "-m", "twine", "--no-color", "check", "--strict", *dist.iterdir()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_image_archive_has_the_same_bytes_from_files_of_any_date(tmp_path):
    config = {"User": "root", "Labels": {"org.opencontainers.image.base.name": "debian"}}
    archives = []
    for name, date in (("first", 981173106), ("second", 1600000000)):
        files = tmp_path / name / "files"
        (files / "usr").mkdir(parents=True)
        (files / "usr/program").write_text("#!/bin/sh\n")
        (files / "bin").symlink_to("usr")
        os.utime(files / "usr/program", (date, date))
        archives.append(image.archive(image.Image(files, config), tmp_path / name, 1700000000))
    assert archives[0].read_bytes() == archives[1].read_bytes()
    with tarfile.open(archives[0]) as archive:
        read = {member.name: archive.extractfile(member).read() for member in archive}
    assert {"oci-layout", "index.json"} < {*read}
    digests = {name.rpartition("/")[2]: hashlib.sha256(content).hexdigest() for name, content in read.items()}
    assert {name: digest for name, digest in digests.items() if len(name) == 64 and name != digest} == {}


def test_version_is_that_of_the_wheel_and_of_the_changelog(wheel):
    metadata = message_from_bytes(wheel.read(f"table_consul-{__version__}.dist-info/METADATA"))
    assert metadata["Version"] == __version__
    assert "version" in PROJECT["project"]["dynamic"]
    assert re.search(r"^## (\S+)", (CHECKOUT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == __version__


def test_every_dependency_is_bounded_with_a_reason():
    lines = (CHECKOUT / "pyproject.toml").read_text().splitlines()
    extras = PROJECT["project"]["optional-dependencies"]
    for wanted in [*PROJECT["project"]["dependencies"], *(each for group in extras.values() for each in group)]:
        bounds = {bound.operator for bound in Requirement(wanted).specifier}
        assert ">=" in bounds, wanted
        place = next(number for number, line in enumerate(lines) if wanted in line)
        assert lines[place - 1].lstrip().startswith("#"), f"no reason beside {wanted}"
    for wanted in PROJECT["project"]["dependencies"]:
        assert "<" in {bound.operator for bound in Requirement(wanted).specifier}, wanted


def test_development_and_build_tools_are_pinned():
    groups = PROJECT["dependency-groups"]
    wanted = [each for group in groups.values() for each in group if isinstance(each, str)]
    assert [each for each in wanted if not re.fullmatch(r"[\w.-]+==[\w.]+", each)] == []
