"""Mail waits and smtpd keeps running when packages do not load or a table name is invalid."""

from __future__ import annotations

import contextlib

import pytest

from tests.conftest import _or_skip
from tests.rig import package
from tests.rig.opensmtpd import CONFIG, Smtpd
from tests.rig.root import SUITES, Root

pytestmark = pytest.mark.real

STORY = """
listen on 127.0.0.1 port $smtp_port
action "local" mbox alias <"NAME">
match from any for local action "local"
"""
BROKEN = "#!/usr/bin/python3 -I\n" + (package.CHECKOUT / "table_consul/fallback.py").read_text()
BROKEN += '\n\nsys.path.insert(0, "/no/such/folder")\nsys.exit(run("table_consul.MODULE"))\n'


@pytest.fixture
def smtpd():
    """Starts an smtpd of this release with a table of this line and name, and ends it after the test."""
    with contextlib.ExitStack() as running, _or_skip():

        def start(release, line, name="consul", **options):
            made = Smtpd(Root(release), line + STORY.replace("NAME", name), **options)
            made._tables = 1
            return running.enter_context(made)

        yield start


def assert_mail_waits(server):
    before = server.pids
    for _ in range(2):
        assert 400 <= server.send("root@localhost")["root@localhost"][0] < 500
    assert (server.pids, server.alive) == (before, True)


@pytest.mark.parametrize("release", SUITES)
def test_packages_that_do_not_load_keep_mail_waiting(smtpd, release):
    server = smtpd(release, f"table consul consul:{CONFIG}", backend=BROKEN.replace("MODULE", "cli"))
    assert_mail_waits(server)
    server.wait_for_log("table-consul cannot be loaded: ModuleNotFoundError: No module named 'table_consul'")


@pytest.mark.parametrize("name", ["a|b", "a/b", ".."])
@pytest.mark.parametrize("release", SUITES)
def test_invalid_table_name_keeps_mail_waiting(smtpd, release, name):
    files = {CONFIG: '[consul]\naddress = "http://127.0.0.1:1"\n'}
    server = smtpd(release, f'table "{name}" consul:{CONFIG}', name, files=files)
    assert_mail_waits(server)
    server.wait_for_log(f"invalid table name '{name}'".replace("|", r"\|").replace(".", r"\."))
