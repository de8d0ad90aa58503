"""The files of the container image agree with the project; tests/e2e runs the image."""

from __future__ import annotations

import re
import subprocess

import pytest

from table_consul import config
from tests.documents.document import CONTRIB, ROOT
from tests.rig.image import CONTEXT

CONTAINER = CONTRIB / "container"
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_build_context_has_the_files_that_identify_the_image():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    markdown = {each for each in CONTEXT if each.endswith(".md")}
    assert kept == set(CONTEXT) - markdown - {"Dockerfile", ".dockerignore"} | {"*.md"}
    assert "*" in lines


def test_base_image_and_opensmtpd_are_pinned():
    assert re.search(r"^ARG BASE=docker\.io/library/debian:trixie-\d{8}-slim$", DOCKERFILE, re.MULTILINE)
    release = re.search(r"^ARG OPENSMTPD=(\d+)\.(\d+)\S*p\d+-\*$", DOCKERFILE, re.MULTILINE)
    assert (int(release[1]), int(release[2])) >= (7, 6)


def test_configuration_of_the_image_is_valid():
    found = config.load(str(CONTAINER / "table-consul.toml"), {"CONSUL_HTTP_ADDR": "http://consul:8500"})
    assert found.consul.addresses == ("http://consul:8500",)
    assert found.log.target == "stderr"


@pytest.mark.parametrize(("name", "check"), [("entrypoint", ("sh", "-n")), ("healthcheck", ("python3", "-m", "ast"))])
def test_scripts_are_executable(name, check):
    path = CONTAINER / name
    assert path.stat().st_mode & 0o111 == 0o111
    done = subprocess.run((*check, path), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
