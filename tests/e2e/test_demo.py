"""``make demo`` succeeds with and without real programs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents.document import page
from tests.rig import demo, package
from tests.rig.opensmtpd import Smtpd


def play(*arguments):
    return subprocess.run(
        (sys.executable, "-m", "tests.rig.demo", *arguments),
        cwd=package.CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def test_demo_succeeds_with_real_programs(consul, root):
    done = play()
    assert (done.returncode, done.stderr) == (0, "")
    assert "Real parts:\n   Consul " in done.stdout
    (shown,) = [block for block in page("README.md").fenced("text") if "[as it should be]" in block.text]
    assert [line for line in shown.text.splitlines() if line not in done.stdout.splitlines()] == []


def test_demo_succeeds_over_the_socket_of_the_program():
    done = play("--socket")
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "table-consul > lookup-result|00000002|found|gilles" in done.stdout


def test_demo_fails_when_mail_reaches_another_user(monkeypatch, capsys):
    monkeypatch.setattr(demo, "_export", lambda path, entries: path.write_text("[]"))
    with pytest.raises(demo.Unexpected):
        demo.with_a_socket()
    assert "EXPECTED lookup-result|00000002|found|gilles" in capsys.readouterr().out


def test_demo_leaves_no_process_when_smtpd_ends(root):
    server = Smtpd(root, 'listen on 127.0.0.1 port $smtp_port\naction "a" mbox\nmatch from any for any action "a"\n')
    with server:
        pids = list(server.pids)
        place = server.place
        assert place.exists()
    assert not place.exists()
    assert str(place) not in Path("/proc/self/mounts").read_text()
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
