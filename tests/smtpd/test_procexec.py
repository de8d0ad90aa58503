from __future__ import annotations

import contextlib
import itertools
import logging
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from table_consul import child as child_module
from table_consul import procexec
from table_consul.backoff import LAST_PAUSE_SECONDS
from table_consul.bridge import Bridge
from table_consul.child import Child, ChildError, _question, _reply
from table_consul.protocol import DIALECTS, Failed, Found, NotFound, Request, Updated
from table_consul.services import DEFAULT_SERVICES
from tests.dialogue import PATIENCE_SECONDS, eventually, write_config, write_source
from tests.e2e.programs import OF_2020
from tests.rig.waiting import wait_for
from tests.smtpd.test_imsg import ALIAS, CHECK, CLOSE, FETCH, LOOKUP, SOURCE, UPDATE, message, opening, question

RUN = (sys.executable, "-c", "import sys; from table_consul.procexec import main; sys.exit(main())")
ROOT = Request("lookup", b"", "t", "alias", b"root")
OK, ABSENT, ERROR = 1, 0, -1

# A table of today, small enough to start in no time; what it does before it answers comes from the test.
TABLE = """\
import os, sys, time
config, number = {}, 0
for line in sys.stdin:
    word, *rest = line.rstrip("\\n").split("|")
    if word == "config":
        if rest == ["ready"]:
            print("register|alias\\nregister|source\\nregister|ready", flush=True)
        else:
            config[rest[0]] = rest[1]
        continue
    _, _, table, op, *rest = rest
    service, ident, key = (["", *rest, ""] if op == "update" else [*rest, ""])[:3]
    answer = "ok" if op == "update" else "found" if op == "check" else "found|gilles"
    number += 1
    if key.startswith("pid"):
        answer = f"found|{os.getpid()}"
    if key == "nobody":
        answer = "not-found"
    if key == "config":
        answer = f"found|{config}"
    %s
    print(f"{op}-result|{ident}|{answer}", flush=True)
"""


@pytest.fixture
def program(tmp_path):
    """Makes an executable of Python's text; it gets a name that counts up."""
    numbers = itertools.count()

    def make(text, name=None):
        path = tmp_path / (name or f"table-{next(numbers)}")
        text = text.partition("\n")[2] if text.startswith("#!") else text
        path.write_text(f"#!{sys.executable} -IS\n{text}")
        path.chmod(0o755)
        return str(path)

    return make


class Smtpd:
    """What smtpd up to 7.5 is to its child: a socket as standard input, and nothing else of it."""

    def __init__(self, *command, environ=None, begin=True):
        self.wire, theirs = socket.socketpair()
        self.wire.settimeout(PATIENCE_SECONDS)
        with theirs:
            self.process = subprocess.Popen(
                command,
                stdin=theirs,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, **(environ or {})},
                cwd="/",
            )
        if begin:
            self.wire.sendall(opening(b"users"))
            assert self.message() == b""

    def message(self):
        head = self.exactly(16)
        kind, length, flags, _, _ = struct.unpack("=IHHII", head)
        assert (kind, flags) == (0, 0)
        return self.exactly(length - 16)

    def exactly(self, size):
        data = b""
        while len(data) < size:
            more = self.wire.recv(size - len(data))
            assert more, f"it is gone after {data!r}: {self.process.stderr.read().decode()}"
            data += more
        return data

    def ask(self, kind=LOOKUP, bit=ALIAS, key=b"root"):
        self.wire.sendall(message(UPDATE) if kind == UPDATE else question(kind, bit, key + b"\0" if key else b""))
        body = self.message()
        return struct.unpack_from("=i", body)[0], body[4:].rstrip(b"\0")

    def end(self):
        """The exit status after end of file, what was written to standard output, and to standard error."""
        self.wire.close()
        output, log = self.process.communicate(timeout=PATIENCE_SECONDS)
        return self.process.returncode, output, log.decode()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wire.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE_SECONDS)
        self.process.kill()
        self.process.communicate()


def bridged(*command, **options):
    return Smtpd(*RUN, *command, **options)


# ---- from imsg to lines ----


def test_a_child_of_today_answers_all_operations(program):
    with bridged(program(TABLE % "")) as smtpd:
        assert smtpd.ask(LOOKUP) == (OK, b"gilles")
        assert smtpd.ask(CHECK) == (OK, b"")
        assert smtpd.ask(LOOKUP, key=b"nobody") == (ABSENT, b"")
        assert smtpd.ask(CHECK, key=b"nobody") == (ABSENT, b"")
        assert smtpd.ask(FETCH, SOURCE, b"") == (OK, b"gilles")
        assert smtpd.ask(UPDATE) == (OK, b"")
        assert smtpd.end()[:2] == (0, b"")


def test_a_child_of_2020_answers_all_operations_and_is_found_out_in_time(program):
    with bridged(program(OF_2020)) as smtpd:
        started = time.monotonic()
        assert smtpd.ask(LOOKUP) == (OK, b"gilles@poolp.org")
        assert time.monotonic() - started < procexec.DEADLINE_SECONDS
        assert smtpd.ask(CHECK, key=b"gilles@poolp.org") == (OK, b"")
        assert smtpd.ask(LOOKUP, key=b"nobody") == (ABSENT, b"")
        assert smtpd.ask(FETCH, SOURCE, b"") == (OK, b"gilles@poolp.org")
        assert smtpd.ask(UPDATE) == (OK, b"")


def test_a_child_of_2020_that_passes_over_the_handshake_is_found_out_in_time(program):
    with bridged(program(OF_2020.replace("sys.exit(1)", "continue"))) as smtpd:
        assert smtpd.ask(LOOKUP) == (OK, b"gilles@poolp.org")


@pytest.mark.parametrize(("dialect", "text"), [("smtpd-tables", TABLE % ""), ("procexec", OF_2020)])
def test_the_dialect_of_the_child_can_be_said(program, dialect, text):
    with bridged("--dialect", dialect, program(text)) as smtpd:
        assert smtpd.ask()[0] == OK


def test_a_child_of_2020_said_to_be_of_today_leads_to_errors_only(program):
    with bridged("--dialect", "smtpd-tables", program(OF_2020)) as smtpd:
        assert [smtpd.ask()[0] for _ in range(3)] == [ERROR] * 3


def test_table_consul_itself_can_be_the_child(program, tmp_path):
    text = (
        f"import sys; sys.path[:0] = {[*filter(None, sys.path)]!r}; from table_consul.cli import main; sys.exit(main())"
    )
    command = program(text), str(write_config(tmp_path))
    with bridged(*command) as smtpd:
        smtpd.wire.sendall(opening(b"aliases"))
        smtpd.message()
        assert smtpd.ask(key=b"nobody") == (ABSENT, b"")


@pytest.mark.parametrize("one_word", [True, False])
def test_a_command_has_arguments(program, one_word):
    path = program("import sys; A = sys.argv[1:]\n" + TABLE % 'answer = f"found|{A}"')
    words = [f"{path} /etc/a.conf 'b c'"] if one_word else [path, "/etc/a.conf", "b c"]
    with bridged(*words) as smtpd:
        assert smtpd.ask() == (OK, b"['/etc/a.conf', 'b c']")


def test_the_child_is_told_the_name_of_the_table(program):
    with bridged(program(TABLE % "")) as smtpd:
        verdict, config = smtpd.ask(key=b"config")
        assert (verdict, b"'tablename': 'users'" in config) == (OK, True)


def test_standard_error_of_the_child_is_ours(program):
    with bridged(program(TABLE % 'print("hello from below", file=sys.stderr)')) as smtpd:
        assert smtpd.ask()[0] == OK
        status, output, log = smtpd.end()
        assert (status, output, log.endswith("hello from below\n")) == (0, b"", True)


def test_the_child_ends_with_us(program):
    with bridged(program(TABLE % "")) as smtpd:
        pid = int(smtpd.ask(key=b"pid")[1])
        assert smtpd.end()[0] == 0
        assert not Path(f"/proc/{pid}").exists()


def test_a_child_that_does_not_end_is_ended(program):
    with bridged(program(TABLE % "" + "time.sleep(99)")) as smtpd:
        pid = int(smtpd.ask(key=b"pid")[1])
        smtpd.end()
        assert not Path(f"/proc/{pid}").exists()


def test_close_ends_it_as_end_of_file_does(program):
    with bridged(program(TABLE % "")) as smtpd:
        smtpd.wire.sendall(message(CLOSE))
        assert (smtpd.wire.recv(1), smtpd.process.wait(PATIENCE_SECONDS)) == (b"", 0)


def test_table_consul_answers_an_smtpd_of_imsg_itself_and_nothing_goes_to_standard_output(tmp_path):
    entries = {"users/alias/root": b"gilles", "users/string/long": b"x" * 16364, "users/domain/example.org": b""}
    config = write_config(tmp_path, address=f"file://{write_source(tmp_path, entries)}")
    with Smtpd(sys.executable, "-m", "table_consul", str(config)) as smtpd:
        assert smtpd.ask(LOOKUP) == (OK, b"gilles")
        assert smtpd.ask(LOOKUP, key=b"nobody") == (ABSENT, b"")
        assert smtpd.ask(CHECK, 2, b"example.org") == (OK, b"")
        assert smtpd.ask(LOOKUP, 0x400, b"long") == (ERROR, b"")
        assert smtpd.ask(LOOKUP, 0x4000) == (ERROR, b"")
        assert smtpd.ask(UPDATE) == (OK, b"")
        assert smtpd.end()[:2] == (0, b"")


# ---- what a child may do wrong ----


def answers_again(smtpd):
    started = time.monotonic()
    for _ in eventually("an answer", 5):
        if smtpd.ask()[0] == OK:
            return time.monotonic() - started
    return None


@pytest.mark.parametrize(
    "fault",
    [
        "os._exit(3)",
        "os.kill(os.getpid(), 9)",
        "time.sleep(99)",
        "continue",
        'ident = "ffffffff"',
        'op = "fetch"',
        'answer = "maybe"',
        'answer = "found"',
        'answer = ""',
        'sys.stdout.buffer.write(b"\\xff\\0|" * 40000)',
        'print("debugging")',
        "print()",
    ],
)
def test_whatever_the_child_does_smtpd_gets_an_error_in_time_and_then_answers_of_another(program, tmp_path, fault):
    once = tmp_path / "once"
    text = f"if not os.path.exists({str(once)!r}):\n        open({str(once)!r}, 'w')\n        {fault}"
    with bridged("--deadline", "0.4", program(TABLE % text)) as smtpd:
        # The first of all may find the child still starting.
        for _ in eventually("the fault"):
            started = time.monotonic()
            verdict, value = smtpd.ask()
            assert time.monotonic() - started < 2
            assert (verdict, value) == (ERROR, b"")
            if once.exists():
                break
        answers_again(smtpd)


@pytest.mark.parametrize("text", ["", "raise SystemExit(1)", "import time; time.sleep(99)", "print('Usage: table')"])
def test_a_child_that_never_answers_leads_to_errors_in_time(program, text):
    with bridged("--deadline", "0.3", program(text)) as smtpd:
        for _ in range(5):
            started = time.monotonic()
            assert smtpd.ask() == (ERROR, b"")
            assert time.monotonic() - started < 1.5
        assert smtpd.end()[0] == 0


def test_a_command_that_is_not_there_leads_to_errors_until_it_is(program, tmp_path):
    path = tmp_path / "table-later"
    with bridged(str(path)) as smtpd:
        assert smtpd.ask() == (ERROR, b"")
        program(TABLE % "", name=path.name)
        answers_again(smtpd)


def test_values_that_smtpd_cannot_take_are_errors_and_cost_no_restart(program):
    faults = 'answer = {"empty": "found|", "cr": "found|a\\rb", "long": "found|" + "x" * 16364}.get(key, answer)'
    with bridged(program(TABLE % faults)) as smtpd:
        pid = smtpd.ask(key=b"pid")
        assert [smtpd.ask(key=key) for key in (b"empty", b"cr", b"long")] == [(ERROR, b"")] * 3
        assert smtpd.ask(key=b"pid") == pid


def test_what_cannot_be_asked_is_an_error_and_never_reaches_the_child(program):
    with bridged(program(TABLE % 'assert key in ("root", "pid"), key')) as smtpd:
        pid = smtpd.ask(key=b"pid")
        for key in (b"root\nconfig|x|y", b"root\r", b"\n"):
            assert smtpd.ask(key=key) == (ERROR, b"")
        assert smtpd.ask(LOOKUP, 4) == (ERROR, b"")  # a service that it does not offer
        assert smtpd.ask(LOOKUP, 0x4000) == (ERROR, b"")
        assert smtpd.ask(key=b"pid") == pid


def test_the_child_may_be_killed_under_load(program):
    with bridged(program(TABLE % "")) as smtpd:
        assert smtpd.ask()[0] == OK
        for _ in range(3):
            pid = int(smtpd.ask(key=b"pid")[1])
            killer = threading.Timer(0.02, os.kill, (pid, signal.SIGKILL))
            killer.start()
            started = time.monotonic()
            while smtpd.ask()[0] == OK:
                assert time.monotonic() - started < PATIENCE_SECONDS
            killer.join()
            answers_again(smtpd)


# ---- becoming the child ----


def test_a_peer_that_speaks_lines_gets_the_child_itself_and_loses_nothing(program):
    hello = b"config|smtpd-version|7.9.0\nconfig|tablename|users\nconfig|ready\n"
    wire, theirs = socket.socketpair()
    wire.sendall(hello + b"table|0.1|0|users|lookup|alias|1|pid\n")
    with wire, subprocess.Popen([*RUN, program(TABLE % "")], stdin=theirs, stdout=theirs) as process:
        theirs.close()
        with wire.makefile("rb") as lines:
            registered = [lines.readline() for _ in range(3)]
            assert registered == [b"register|alias\n", b"register|source\n", b"register|ready\n"]
            assert lines.readline() == b"lookup-result|1|found|%d\n" % process.pid
            wire.shutdown(socket.SHUT_WR)
            assert (lines.read(), process.wait(PATIENCE_SECONDS)) == (b"", 0)


@pytest.mark.parametrize(
    ("text", "services"),
    [
        (TABLE % "", {"alias", "source"}),
        (OF_2020, set(DEFAULT_SERVICES)),
        ("import time; time.sleep(9)", set(DEFAULT_SERVICES)),
    ],
    ids=["today", "2020", "silent"],
)
def test_told_to_restart_its_child_it_stays_and_registers_what_the_child_offers(program, text, services):
    wire, theirs = socket.socketpair()
    wire.settimeout(PATIENCE_SECONDS)
    wire.sendall(b"config|smtpd-version|7.9.0\nconfig|tablename|users\nconfig|ready\n")
    command = [*RUN, "--restart", "--deadline", "0.5", program(text)]
    with wire, subprocess.Popen(command, stdin=theirs, stdout=theirs) as process:
        theirs.close()
        with wire.makefile("rb") as lines:
            registered = set(iter(lines.readline, b"register|ready\n"))
            assert registered == {b"register|%b\n" % name.encode() for name in services}
        process.kill()


def test_told_to_restart_its_child_it_does_so_when_that_is_killed(program):
    wire, theirs = socket.socketpair()
    wire.settimeout(PATIENCE_SECONDS)
    wire.sendall(b"config|smtpd-version|7.9.0\nconfig|tablename|users\nconfig|ready\n")
    with wire, subprocess.Popen([*RUN, "--restart", program(TABLE % "")], stdin=theirs, stdout=theirs) as process:
        theirs.close()
        with wire.makefile("rb") as lines:
            while lines.readline() != b"register|ready\n":
                pass

            def pid():
                wire.sendall(b"table|0.1|0|users|lookup|alias|1|pid\n")
                verdict, _, value = lines.readline().removeprefix(b"lookup-result|1|").partition(b"|")
                return int(value) if verdict == b"found" else None

            first = pid()
            assert first not in {None, process.pid}
            os.kill(first, signal.SIGKILL)
            wait_for(lambda: pid() not in {None, first}, 5, lambda: "it was not started again")
            wire.shutdown(socket.SHUT_WR)
            assert process.wait(PATIENCE_SECONDS) == 0


def test_a_peer_of_2020_and_a_person_with_a_pipe_get_the_child_itself(program):
    line = b"table|0.1|0|users|lookup|1|alias|root\n"
    done = subprocess.run([*RUN, program(OF_2020)], input=line, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"table-response|1|found|gilles@poolp.org\n")


def test_a_peer_that_says_nothing_leaves_nothing_to_do(program):
    with Smtpd(*RUN, program("raise SystemExit(9)"), begin=False) as smtpd:
        assert smtpd.end() == (0, b"", "")


def test_a_descriptor_that_does_not_block_is_waited_for(program):
    wire, theirs = socket.socketpair()
    theirs.setblocking(False)
    with wire, subprocess.Popen([*RUN, program(TABLE % "")], stdin=theirs, stdout=subprocess.PIPE) as process:
        theirs.close()
        wire.settimeout(PATIENCE_SECONDS)
        wire.sendall(opening())
        assert wire.recv(16, socket.MSG_WAITALL)[:2] == b"\0\0"
        wire.shutdown(socket.SHUT_WR)
        assert process.wait(PATIENCE_SECONDS) == 0


def test_a_command_that_is_not_there_cannot_take_our_place():
    done = subprocess.run([*RUN, "table-nowhere"], input=b"config|ready\n", capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (
        127,
        b"table-procexec: table-nowhere: neither in a libexec folder of OpenSMTPD nor in PATH\n",
    )


# ---- the command line ----


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "no COMMAND"),
        ([""], "no COMMAND"),
        (["table-x 'a"], "No closing quotation: table-x 'a"),
        (["--dialect", "imsg", "table-x"], "invalid choice: 'imsg'"),
        (["--deadline", "0", "table-x"], "not between 0 and 60: 0"),
        (["--deadline", "99", "table-x"], "not between 0 and 60: 99"),
        (["--what", "table-x"], "unrecognized arguments: --what"),
    ],
)
def test_a_wrong_command_line_is_told(arguments, reason, capsys):
    with pytest.raises(SystemExit) as raised:
        procexec.main(arguments)
    assert (raised.value.code, reason in capsys.readouterr().err) == (2, True)


def test_options_of_the_command_are_left_alone(program):
    path = program("import sys; A = sys.argv[1:]\n" + TABLE % 'answer = f"found|{A}"')
    with bridged(path, "--deadline", "-x") as smtpd:
        assert smtpd.ask() == (OK, b"['--deadline', '-x']")


def test_a_person_at_a_terminal_is_told_who_starts_this():
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run([*RUN, "table-x"], stdin=theirs, capture_output=True, text=True, check=False)
        assert (done.returncode, "smtpd starts this" in done.stderr) == (2, True)
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_are_for_people(option, capsys):
    with pytest.raises(SystemExit) as raised:
        procexec.main([option])
    assert (raised.value.code, "table-procexec" in capsys.readouterr().out) == (0, True)


def test_a_name_is_looked_up_beside_us_then_in_libexec_then_in_path(program, tmp_path, monkeypatch):
    folders = [tmp_path / name for name in ("beside", "libexec", "path")]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setattr(procexec, "LIBEXEC", (str(folders[1]),))
    monkeypatch.setenv("PATH", str(folders[2]))
    (folders[0] / "table-x").write_text("not executable")
    for folder in (folders[2], folders[1]):
        program("", name=f"{folder.name}/table-x")
        assert procexec.find("table-x", str(folders[0])) == str(folder / "table-x")
    (folders[0] / "table-x").chmod(0o755)
    assert procexec.find("table-x", str(folders[0])) == str(folders[0] / "table-x")
    assert procexec.find("table-x", "beside") == str(folders[1] / "table-x")
    with pytest.raises(FileNotFoundError):
        procexec.find("table-y", str(folders[0]))


@pytest.mark.parametrize("path", ["/usr/libexec/opensmtpd/table-x", "./table-x"])
def test_a_path_is_taken_as_it_is(path):
    assert procexec.find(path, "/beside") == path


# ---- restarting, with a clock of the test's own ----


class Clock:
    """Real time, and more of it when the test says so."""

    def __init__(self):
        self.ahead = 0.0

    def __call__(self):
        return time.monotonic() + self.ahead


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def bridge(clock):
    made = []

    def make(path, dialect=None, deadline=PATIENCE_SECONDS):
        made.append(Bridge("table-x", lambda: [path], dialect, deadline, clock, lambda: 0.0))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_child_that_failed_is_left_alone_for_a_while_which_doubles_up_to_a_cap(program, bridge, clock, tmp_path):
    starts = tmp_path / "starts"
    broken = bridge(program(f"open({str(starts)!r}, 'a').write('.')"), "smtpd-tables")

    def begun():
        return len(starts.read_text())

    for number, pause in enumerate((0.25, 0.5, 1.0, 2.0, 4.0, 4.0), 1):
        assert isinstance(broken.answer(ROOT, clock()), Failed)
        assert begun() == number
        for _ in range(9):
            assert isinstance(broken.answer(ROOT, clock()), Failed)
        assert begun() == number
        clock.ahead += pause
    assert pause == LAST_PAUSE_SECONDS


def test_a_failure_is_told_once_and_so_is_its_end(program, bridge, clock, caplog, tmp_path):
    caplog.set_level(logging.WARNING)
    healed = tmp_path / "healed"
    path = program(TABLE % f"if not os.path.exists({str(healed)!r}): sys.exit(7)")
    made = bridge(path)
    for _ in range(3):
        reply = made.answer(ROOT, clock())
        assert isinstance(reply, Failed)
        assert reply.cause is not None
        clock.ahead += 9
    healed.touch()
    assert made.answer(ROOT, clock()) == Found(b"gilles")
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "table-x: it has ended with status 7; answering error until it runs again"
    assert second.startswith("table-x: recovered after ")


def test_the_child_is_started_before_it_is_asked(program, bridge, clock, tmp_path):
    made = bridge(program(f"open({str(tmp_path / 'runs')!r}, 'w')"))
    made.prepare("users")
    for _ in eventually("a start"):
        if (tmp_path / "runs").exists():
            break


def test_a_start_that_fails_early_is_left_to_the_first_question(bridge, clock):
    made = bridge("/nowhere/table-x")
    made.prepare("users")
    reply = made.answer(ROOT, clock())
    assert isinstance(reply, Failed)
    assert reply.reason == "table-x: cannot be run: No such file or directory; it will be started again"


SLOW = "import time; time.sleep(%s)\n" + TABLE % ""


def test_a_child_of_today_that_starts_slowly_is_waited_for_and_not_mistaken_for_one_of_2020(
    program, bridge, clock, monkeypatch
):
    monkeypatch.setattr(child_module, "HANDSHAKE_SECONDS", 0.05)
    made = bridge(program(SLOW % 0.3))
    replies = []
    for _ in eventually("an answer"):
        replies.append(made.answer(ROOT, clock()))
        if isinstance(replies[-1], Found):
            break
        clock.ahead += 0.3
    assert replies[-1] == Found(b"gilles")
    assert len(replies) <= 3


def test_while_a_child_that_is_known_starts_anew_it_is_not_taken_for_one_that_hangs(program, bridge, clock, tmp_path):
    made = bridge(program(SLOW % 0.5), "smtpd-tables", deadline=0.1)
    replies = []
    for _ in eventually("an answer"):
        replies.append(made.answer(ROOT, clock()))
        if not isinstance(replies[-1], Failed):
            break
        assert replies[-1].reason == "the table is still starting"
    assert replies[-1] == Found(b"gilles")


def test_a_handshake_that_never_comes_ends_the_wait(program, clock):
    made = Child([program("import time; time.sleep(99)")], "users", "smtpd-tables", clock)
    try:
        assert made.ask(ROOT, clock()) == Failed("the table is still starting")
        clock.ahead += child_module.START_SECONDS
        with pytest.raises(ChildError, match="no answer to the handshake"):
            made.ask(ROOT, clock())
    finally:
        made.close()


def test_a_child_that_does_not_read_holds_nobody_up(program, clock):
    made = Child([program("import time; time.sleep(99)")], "users", "procexec", clock)
    try:
        long = Request("lookup", b"", "t", "alias", b"x" * 10**7)
        with pytest.raises(ChildError, match="does not read"):
            made.ask(long, clock() + 0.1)
        with pytest.raises(ChildError, match="does not read"):
            made.ask(long, clock() - 1)
    finally:
        made.close()


def test_a_table_name_that_lines_cannot_carry_is_an_error(program, clock):
    made = Child([program(TABLE % "")], "a\nconfig|ready", None, clock)
    try:
        for name in ("a|b", "a\nb"):
            request = Request("lookup", b"", name, "alias", b"root")
            assert isinstance(made.ask(request, clock() + PATIENCE_SECONDS), Failed)
    finally:
        made.close()


# ---- lines ----

ASKED = {
    ("smtpd-tables", "check"): b"table|0.1|1.500000|t|check|alias|7|a|b\n",
    ("smtpd-tables", "lookup"): b"table|0.1|1.500000|t|lookup|alias|7|a|b\n",
    ("smtpd-tables", "fetch"): b"table|0.1|1.500000|t|fetch|alias|7\n",
    ("smtpd-tables", "update"): b"table|0.1|1.500000|t|update|7\n",
    ("procexec", "check"): b"table|0.1|1.500000|t|check|7|alias|a|b\n",
    ("procexec", "lookup"): b"table|0.1|1.500000|t|lookup|7|alias|a|b\n",
    ("procexec", "fetch"): b"table|0.1|1.500000|t|fetch|7|alias\n",
    ("procexec", "update"): b"table|0.1|1.500000|t|update|7\n",
}


@pytest.mark.parametrize(("how", "line"), ASKED.items(), ids=map("-".join, ASKED))
def test_questions(how, line):
    dialect, op = how
    assert _question(dialect, b"7", Request(op, b"", "t", "alias", b"a|b"), 1.5) == line


@pytest.mark.parametrize(("dialect", "op"), ASKED)
def test_questions_are_what_our_own_reader_takes_them_for(dialect, op):
    asked = Request(op, b"7", "t", "" if op == "update" else "alias", b"a|b" if op in ("check", "lookup") else b"")
    assert DIALECTS[dialect].parse(_question(dialect, b"7", asked, 1.5).rstrip(b"\n")) == asked


@pytest.mark.parametrize(
    ("dialect", "op", "line", "reply"),
    [
        ("smtpd-tables", "check", b"check-result|7|found", Found()),
        ("smtpd-tables", "check", b"check-result|7|found|x", Found()),
        ("smtpd-tables", "lookup", b"lookup-result|7|found|a|b", Found(b"a|b")),
        ("smtpd-tables", "lookup", b"lookup-result|7|not-found", NotFound()),
        ("smtpd-tables", "fetch", b"fetch-result|7|found|a", Found(b"a")),
        ("smtpd-tables", "update", b"update-result|7|ok", Updated()),
        ("smtpd-tables", "update", b"update-result|7|error|no", Failed("the table says: no")),
        ("smtpd-tables", "lookup", b"lookup-result|7|error", Failed("the table says that it failed")),
        ("procexec", "check", b"table-response|7|found", Found()),
        ("procexec", "lookup", b"table-result|7|found|a", Found(b"a")),
        ("procexec", "lookup", b"table-result|7|failure", Failed("the table says that it failed")),
        ("procexec", "update", b"table-response|7|updated", Updated()),
        ("procexec", "fetch", b"table-response|7|not-found", NotFound()),
        ("smtpd-tables", "update", b"update-result|7|not-found", None),
        ("smtpd-tables", "update", b"update-result|7|found", None),
        ("smtpd-tables", "lookup", b"check-result|7|found|a", None),
        ("smtpd-tables", "lookup", b"lookup-result|8|found|a", None),
        ("smtpd-tables", "lookup", b"lookup-result|7|found", None),
        ("smtpd-tables", "lookup", b"lookup-result|7|", None),
        ("smtpd-tables", "lookup", b"table-result|7|found|a", None),
        ("procexec", "lookup", b"lookup-result|7|found|a", None),
        ("smtpd-tables", "lookup", b"", None),
    ],
)
def test_answers(dialect, op, line, reply):
    assert _reply(dialect, b"7", op, line) == reply


@given(
    st.sampled_from([*DIALECTS]),
    st.sampled_from(["check", "lookup", "fetch", "update"]),
    st.lists(
        st.sampled_from([b"lookup-result", b"table-result", b"7", b"found", b"not-found", b"error", b"ok"])
        | st.binary(max_size=4)
    ).map(b"|".join),
)
def test_any_line_is_a_reply_that_can_be_sent_or_none(dialect, op, line):
    reply = _reply(dialect, b"7", op, line)
    assert reply is None or isinstance(reply, Found | NotFound | Updated | Failed)
    if isinstance(reply, Found):
        assert (reply.value is None) is (op == "check")
        assert op != "update"
