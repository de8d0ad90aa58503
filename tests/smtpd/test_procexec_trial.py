"""The trial of a command where smtpd speaks lines: table-procexec becomes it, or stays and translates."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time

import pytest

from table_consul.protocol import Found
from table_consul.services import DEFAULT_SERVICES
from tests.dialogue import TIMEOUT_SECONDS
from tests.e2e.programs import ARTICLE, OF_2020
from tests.smtpd.procexec import OF_TODAY, ROOT, RUN, first_answer

DEFAULTS = {f"register|{name}" for name in DEFAULT_SERVICES}
IGNORES_HANDSHAKE = OF_2020.replace("    atoms =", '    if line.startswith("config|"): continue\n    atoms =')


@contextlib.contextmanager
def started(*command):
    """table-procexec under a current smtpd: the services that ``command`` registers, a function to ask, the process."""
    wire, theirs = socket.socketpair()
    wire.settimeout(TIMEOUT_SECONDS)
    wire.sendall(b"config|smtpd-version|7.9.0\nconfig|protocol|0.1\nconfig|tablename|users\nconfig|ready\n")
    with wire, theirs, subprocess.Popen([*RUN, *command], stdin=theirs, stdout=theirs) as process:
        theirs.close()
        lines = wire.makefile("r")

        def ask(key):
            wire.sendall(f"table|0.1|0|users|lookup|alias|5e5b7ad1|{key}\n".encode())
            return lines.readline().removeprefix("lookup-result|5e5b7ad1|").rstrip()

        try:
            yield {line.rstrip() for line in iter(lines.readline, "register|ready\n")}, ask, process
        finally:
            lines.close()
            wire.close()
            process.wait(TIMEOUT_SECONDS)


REGISTRATION = 'print("register|alias\\nregister|source\\nregister|ready", flush=True)'


@pytest.mark.parametrize(
    "text",
    [
        OF_TODAY,
        f"{REGISTRATION}\n{OF_TODAY.replace(REGISTRATION, 'pass')}",
        OF_TODAY.replace('["ready"]:', '["ready"]:\n            config["tablename"] == "users" or sys.exit(1)'),
        f"import fcntl\nlock = open(PLACE, 'w')\nfcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)\n{OF_TODAY}",
        f"import atexit, os\nopen(PLACE, 'x')\natexit.register(os.unlink, PLACE)\n{OF_TODAY}",
        f"import socket\nport = socket.socket()\nport.bind(('127.0.0.1', PORT))\nport.listen()\n{OF_TODAY}",
    ],
    ids=[
        "plain",
        "registers before it is asked",
        "wants its table's name",
        "takes a lock",
        "makes a file",
        "takes a port",
    ],
)
def test_command_that_registers_replaces_table_procexec(make_program, tmp_path, text):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    head = f"PLACE, PORT = {str(tmp_path / 'place')!r}, {port}\n"
    with started(make_program(head + text)) as (registered, ask, process):
        assert registered == {"register|alias", "register|source"}
        assert ask("pid") == f"found|{process.pid}"


def test_command_that_outlives_the_trial_is_killed(make_program):
    endless = OF_TODAY + "\nimport signal\nwhile True: signal.pause()\n"
    begun = time.monotonic()
    with started(make_program(endless)) as (registered, ask, process):
        assert time.monotonic() - begun < TIMEOUT_SECONDS / 2
        assert (registered, ask("pid")) == ({"register|alias", "register|source"}, f"found|{process.pid}")
        process.kill()


@pytest.mark.parametrize("text", [ARTICLE, OF_2020], ids=["the article's", "table-response"])
def test_command_of_2020_is_translated(make_program, text):
    with started(make_program(text)) as (registered, ask, process):
        assert registered == DEFAULTS
        assert (ask("root"), ask("nobody")) == ("found|gilles@poolp.org", "not-found")
        assert process.poll() is None


@pytest.mark.parametrize(
    "text",
    [
        "#!/bin/sh\nexit 1\n",
        "#!/bin/sh\nexec yes 'register|alias'\n",
        "#!/bin/sh\nexec tr '\\0' x </dev/zero\n",
        "#!/bin/sh\necho Usage: table; exec cat\n",
        "#!/bin/sh\necho 'register|ready'; exec cat\n",
        "#!/bin/sh\necho 'register|alias'; exec sleep 99\n",
        OF_TODAY.replace("register|source", "register|nonsense"),
        OF_TODAY.replace('register|ready"', 'register|ready\\nhello"'),
        "#!/bin/sh\nprintf 'register|alias\\nregister|ready\\n'\n",
        IGNORES_HANDSHAKE,
    ],
    ids=[
        "exits",
        "registers endlessly",
        "endless line",
        "greets",
        "no service",
        "half",
        "unknown service",
        "unasked",
        "exits after it registered",
        "2020, silent",
    ],
)
def test_command_that_fails_its_trial_does_not_replace_table_procexec(make_program, make_bridge, text):
    begun = time.monotonic()
    bridge = make_bridge(make_program(text), deadline=0.2)
    assert not bridge.suits_smtpd("users")
    assert set(bridge.services("users")) <= {*DEFAULT_SERVICES}
    assert time.monotonic() - begun < TIMEOUT_SECONDS / 2


def test_command_that_is_silent_in_its_trial_becomes_the_child(make_program, make_bridge, clock, tmp_path):
    count = f"open({str(tmp_path / 'starts')!r}, 'a').write('.')\n"
    bridge = make_bridge(make_program(count + IGNORES_HANDSHAKE.partition("\n")[2]))
    assert not bridge.suits_smtpd("users")
    assert bridge.answer(ROOT, clock()) == Found(b"gilles@poolp.org")
    assert (tmp_path / "starts").read_text() == "."


def test_late_command_is_translated_once_it_has_registered(make_program, make_bridge, clock, tmp_path):
    place = tmp_path / "place"
    bridge = make_bridge(
        make_program(f"import os, time\nwhile not os.path.exists({str(place)!r}): time.sleep(0.01)\n{OF_TODAY}")
    )
    assert not bridge.suits_smtpd("users")
    place.touch()
    assert first_answer(bridge, clock) == Found(b"gilles")


def test_missing_command_is_an_error_until_it_is_installed(make_program, tmp_path):
    path = tmp_path / "table-later"
    with started(str(path)) as (registered, ask, _):
        assert registered == DEFAULTS
        assert "cannot be run: No such file or directory" in ask("root")
