"""The Debian package, the image and ``make install`` agree with pyproject.toml."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from table_consul import __version__, config, procexec
from tests.documents.document import CONTRIB, ROOT, page, rows

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONTROL = (ROOT / "debian/control").read_text()
# The Debian name of each package, and its version if Debian numbers it differently.
DEBIAN = {
    "argon2-cffi": ("python3-argon2", ""),
    "click": ("python3-click", ""),
    "crypt-r": ("python3-crypt-r", ""),
    "google-re2": ("python3-re2", "20240702"),
    "msgspec": ("python3-msgspec", ""),
    "prometheus-client": ("python3-prometheus-client", ""),
    "python-consul2": ("python3-consul", "1.5.5"),
    "requests": ("python3-requests", ""),
    "urllib3": ("python3-urllib3", ""),
}


def field(name):
    """The packages in a field of debian/control, with their lowest versions."""
    text = re.search(rf"^{name}:\n((?: .*\n)+)", CONTROL, re.MULTILINE)[1]
    return dict(re.match(r" ([^ ,]+)(?: \(>?= (.*)\))?,?$", line).groups() for line in text.splitlines())


def lowest(requirements):
    wanted = {}
    for each in map(Requirement, requirements):
        name, version = DEBIAN[each.name]
        (bound,) = (bound.version for bound in each.specifier if bound.operator == ">=")
        wanted[name] = version or bound
    return wanted


def test_debian_package_depends_on_what_pyproject_requires():
    assert {name: bound for name, bound in field("Depends").items() if name.startswith("python3-")} == lowest(
        PROJECT["dependencies"]
    )
    optional = {name: bound for name, bound in (field("Recommends") | field("Suggests")).items() if bound}
    extras = PROJECT["optional-dependencies"].values()
    assert optional == lowest(each for extra in extras for each in extra)
    assert "opensmtpd" in field("Recommends")
    assert "consul" in field("Suggests")


def test_table_procexec_finds_commands_in_the_folders_of_the_page():
    table = rows(page("docs/packaging.md").section("## Where smtpd looks"))
    folders = {row[1].strip("`") for row in table if row[1].startswith("`/")}
    assert len(folders) == 5
    assert folders == {*procexec.LIBEXEC}


def test_debian_changelog_names_the_version():
    newest = re.match(r"table-consul \((.*)\) ", (ROOT / "debian/changelog").read_text())[1]
    # A tilde sorts before the end of a version: 1.0.0~dev0 is older than 1.0.0.
    assert newest == re.sub(r"\.?(dev|a|b|rc)", r"~\1", __version__)


def test_image_has_the_build_requirements_of_the_package():
    needed = {name.replace("debhelper-compat", "debhelper") for name in field("Build-Depends")}
    installed = re.search(
        r"FROM \S+ AS build.*?no-install-recommends \\\n +(.*?)\n", (ROOT / "Dockerfile").read_text(), re.DOTALL
    )
    assert {*installed[1].split()} == {name.replace("dh-sequence-python3", "dh-python") for name in needed}


def test_configuration_of_the_debian_package_needs_no_edit():
    found = config.load(str(ROOT / "debian/table-consul.toml"), {})
    assert found.consul.addresses == ("http://127.0.0.1:8500",)
    assert found.consul.token_file is None
    assert found.table("aliases").snapshot == "/var/lib/table-consul/snapshots/aliases.json"


@pytest.mark.parametrize("extra", ["", *PROJECT["optional-dependencies"]])
def test_install_list_pins_every_dependency_to_an_allowed_release_and_its_hash(extra):
    first, *others = (CONTRIB / "install/requirements.txt").read_text().split("\n# extra: ")
    text = next(text for text in others if text.startswith(f"{extra}\n")) if extra else first
    pinned = {}
    for entry in re.split(r"\n(?=\w)", text)[1:]:
        name, version = re.match(r"([\w.-]+)==([^\s;]+)", entry).groups()
        pinned[canonicalize_name(name)] = Version(version)
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), name
    for each in map(Requirement, PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]):
        assert pinned[canonicalize_name(each.name)] in each.specifier, f"regenerate requirements.txt: {each}"
