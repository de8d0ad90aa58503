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

from table_consul import procexec
from table_consul.backoff import LAST_PAUSE_SECONDS
from table_consul.child import START_SECONDS, Bridge, Child, ChildError, parse_reply, question_template
from table_consul.imsg import MAX_VALUE
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
    answer = {
        "nobody": "not-found",
        "pid": f"found|{os.getpid()}",
        "number": f"found|{number}",
        "config": f"found|{config}",
        "arguments": f"found|{sys.argv[1:]}",
        "empty": "found|",
        "return": "found|a\\rb",
        "nul": "found|a\\0b",
        "pipes": "found|a|b",
        "longest": "found|" + "x" * MOST,
        "too long": "found|" + "x" * (MOST + 1),
        "error": "error|no idea",
    }.get(key, answer)
    if key == "stderr":
        print("hello from below", file=sys.stderr, flush=True)
    WHAT_IT_DOES
    print(f"{op}-result|{ident}|{answer}", flush=True)
""".replace("MOST", str(MAX_VALUE))
OF_TODAY = TABLE.replace("WHAT_IT_DOES", "pass")


def doing(what):
    return TABLE.replace("WHAT_IT_DOES", what)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Makes an executable of Python's text, or of the shell's; it gets a name that counts up."""
    folder = tmp_path_factory.mktemp("programs")
    numbers = itertools.count()

    def make(text, path=None):
        path = path or folder / f"table-{next(numbers)}"
        if text.startswith("#!/usr/bin/python3"):
            text = text.partition("\n")[2]
        path.write_text(text if text.startswith("#!") else f"#!{sys.executable} -IS\n{text}")
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


@pytest.fixture(scope="module")
def of_today(program):
    """A bridge whose child answers; no test that uses it harms the child."""
    with bridged(program(OF_TODAY), "/etc/a.conf", "--deadline", "-x") as smtpd:
        answers_again(smtpd)
        yield smtpd


def test_imsg_child_of_today_answers_all_operations(of_today):
    assert of_today.ask(LOOKUP) == (OK, b"gilles")
    assert of_today.ask(CHECK) == (OK, b"")
    assert of_today.ask(LOOKUP, key=b"nobody") == (ABSENT, b"")
    assert of_today.ask(CHECK, key=b"nobody") == (ABSENT, b"")
    assert of_today.ask(FETCH, SOURCE, b"") == (OK, b"gilles")
    assert of_today.ask(UPDATE) == (OK, b"")


def test_imsg_value_passes_unchanged_up_to_the_longest_message(of_today):
    assert of_today.ask(key=b"pipes") == (OK, b"a|b")
    assert of_today.ask(key=b"longest") == (OK, b"x" * MAX_VALUE)


def test_imsg_invalid_value_is_an_error_and_keeps_the_child(of_today):
    pid = of_today.ask(key=b"pid")
    invalid = (b"empty", b"return", b"nul", b"too long", b"error")
    assert [of_today.ask(key=key) for key in invalid] == [(ERROR, b"")] * len(invalid)
    assert of_today.ask(key=b"pid") == pid


def test_imsg_each_question_reaches_the_child_once(of_today):
    number = int(of_today.ask(key=b"number")[1])
    for key in (b"root", b"nobody", b"error", b"too long"):
        of_today.ask(key=key)
    assert of_today.ask(key=b"number") == (OK, b"%d" % (number + 5))


def test_imsg_invalid_question_is_an_error_and_never_reaches_the_child(of_today):
    number = int(of_today.ask(key=b"number")[1])
    for key in (b"root\nconfig|x|y", b"root\r", b"\n"):
        assert of_today.ask(key=key) == (ERROR, b"")
    assert of_today.ask(LOOKUP, 4) == (ERROR, b"")  # a service that it does not register
    assert of_today.ask(LOOKUP, 0x4000) == (ERROR, b"")
    assert of_today.ask(key=b"number") == (OK, b"%d" % (number + 1))


def test_child_gets_the_arguments_of_the_command_and_none_of_ours(of_today):
    assert of_today.ask(key=b"arguments") == (OK, b"['/etc/a.conf', '--deadline', '-x']")


def test_command_in_one_word_is_split_as_by_a_shell(program):
    with bridged(f"{program(OF_TODAY)} /etc/a.conf 'b c'") as smtpd:
        answers_again(smtpd)
        assert smtpd.ask(key=b"arguments") == (OK, b"['/etc/a.conf', 'b c']")


def test_child_gets_the_name_of_the_table(of_today):
    verdict, config = of_today.ask(key=b"config")
    assert (verdict, b"'tablename': 'users'" in config) == (OK, True)


def test_child_of_2020_answers_all_operations_from_the_first_question_on(program):
    with bridged("--deadline", "20", program(OF_2020)) as smtpd:
        assert smtpd.ask(LOOKUP) == (OK, b"gilles@poolp.org")
        assert smtpd.ask(CHECK, key=b"gilles@poolp.org") == (OK, b"")
        assert smtpd.ask(LOOKUP, key=b"nobody") == (ABSENT, b"")
        assert smtpd.ask(FETCH, SOURCE, b"") == (OK, b"gilles@poolp.org")
        assert smtpd.ask(UPDATE) == (OK, b"")


def test_child_of_2020_that_ignores_the_handshake_answers_the_first_question(program, bridge, clock):
    made = bridge(program(OF_2020.replace("sys.exit(1)", "continue")))
    assert made.answer(ROOT, clock()) == Found(b"gilles@poolp.org")


@pytest.mark.parametrize(("dialect", "text"), [("smtpd-tables", OF_TODAY), ("procexec", OF_2020)])
def test_dialect_option_names_the_dialect_of_the_child(program, dialect, text):
    with bridged("--dialect", dialect, program(text)) as smtpd:
        answers_again(smtpd)


def test_child_of_2020_asked_as_one_of_today_gives_errors_only(program, bridge, clock):
    made = bridge(program(OF_2020), "smtpd-tables")
    for _ in range(3):
        assert isinstance(made.answer(ROOT, clock()), Failed)
        clock.ahead += 9


def test_table_consul_itself_can_be_the_child(program, tmp_path):
    text = (
        f"import sys; sys.path[:0] = {[*filter(None, sys.path)]!r}; from table_consul.cli import main; sys.exit(main())"
    )
    with bridged("--deadline", "20", program(text), str(write_config(tmp_path))) as smtpd:
        smtpd.wire.sendall(opening(b"aliases"))
        smtpd.message()
        assert smtpd.ask(key=b"nobody") == (ABSENT, b"")


def test_end_of_file_ends_the_child_whose_standard_error_is_ours(program):
    with bridged(program(OF_TODAY)) as smtpd:
        answers_again(smtpd)
        assert smtpd.ask(key=b"stderr")[0] == OK
        pid = int(smtpd.ask(key=b"pid")[1])
        status, output, log = smtpd.end()
        assert (status, output, log.endswith("hello from below\n")) == (0, b"", True)
        assert not Path(f"/proc/{pid}").exists()


def test_child_that_ignores_end_of_file_is_killed(program, bridge, clock):
    made = bridge(program(OF_TODAY + "time.sleep(99)"))
    pid = int(answer_of(made, clock, b"pid").value)
    made.close()
    assert not Path(f"/proc/{pid}").exists()


def test_imsg_close_ends_it_as_end_of_file_does(program):
    with bridged(program("#!/bin/sh\nexec cat")) as smtpd:
        smtpd.wire.sendall(message(CLOSE))
        assert (smtpd.wire.recv(1), smtpd.process.wait(PATIENCE_SECONDS)) == (b"", 0)


def test_table_consul_answers_imsg_itself_and_writes_nothing_to_standard_output(tmp_path):
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
    for _ in eventually("an answer"):
        if smtpd.ask()[0] == OK:
            return


def answer_of(made, clock, key=b"root"):
    """The first answer of this bridge other than Failed, after any pauses between the starts of its child."""
    for _ in eventually("an answer"):
        reply = made.answer(Request("lookup", b"", "t", "alias", key), clock())
        if not isinstance(reply, Failed):
            return reply
        clock.ahead += LAST_PAUSE_SECONDS
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
def test_fault_of_the_child_is_an_error_in_time_and_then_another_child_answers(program, bridge, clock, tmp_path, fault):
    once = tmp_path / "once"
    text = doing(f"if not os.path.exists({str(once)!r}):\n        open({str(once)!r}, 'w')\n        {fault}")
    made = bridge(program(text), deadline=0.4)
    # The first of all may find the child still starting.
    for _ in eventually("the fault"):
        started = time.monotonic()
        assert isinstance(made.answer(ROOT, clock()), Failed)
        assert time.monotonic() - started < 2
        if once.exists():
            break
        clock.ahead += LAST_PAUSE_SECONDS
    assert answer_of(made, clock) == Found(b"gilles")


@pytest.mark.parametrize("text", ["", "exit 1", "exec sleep 99", "echo Usage: table; exec cat"])
def test_child_that_never_answers_gives_errors_in_time(program, bridge, clock, text):
    made = bridge(program(f"#!/bin/sh\n{text}\n"), deadline=0.3)
    for _ in range(5):
        started = time.monotonic()
        assert isinstance(made.answer(ROOT, clock()), Failed)
        assert time.monotonic() - started < 2
        clock.ahead += LAST_PAUSE_SECONDS


@pytest.mark.parametrize("dialect", [None, "smtpd-tables", "procexec"])
def test_child_that_never_stops_registering_gives_an_error_in_time(program, bridge, clock, dialect):
    made = bridge(program("#!/bin/sh\nexec yes 'register|alias'\n"), dialect)
    reply = made.answer(ROOT, clock())
    reason = (
        "unexpected reply to lookup: 'register|alias'" if dialect == "procexec" else "more than 100 services registered"
    )
    assert (type(reply), reply.reason) == (Failed, f"table-x: {reason}")


def test_line_sent_before_its_question_is_not_the_answer(program, bridge, clock):
    early = r"printf 'lookup-result|%08x|found|mallory\n' 0 1 2"
    made = bridge(program(f"#!/bin/sh\necho 'register|ready'\n{early}\nexec sleep 99\n"), "smtpd-tables")
    reply = made.answer(ROOT, clock())
    assert isinstance(reply, Failed)
    assert "unexpected reply to lookup" in reply.reason


def test_answer_to_one_question_is_not_taken_for_that_to_the_next(program, bridge, clock):
    made = bridge(program(doing('print(f"{op}-result|{ident}|found|first", flush=True)')))
    assert answer_of(made, clock) == Found(b"first")
    assert isinstance(made.answer(ROOT, clock()), Failed)


def test_command_that_is_missing_gives_errors_until_it_is_there(program, bridge, clock, tmp_path):
    path = tmp_path / "table-later"
    made = bridge(str(path))
    assert isinstance(made.answer(ROOT, clock()), Failed)
    program(OF_TODAY, path)
    assert answer_of(made, clock) == Found(b"gilles")


def test_child_may_be_killed_under_load(program):
    with bridged(program(OF_TODAY)) as smtpd:
        answers_again(smtpd)
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


def test_peer_of_lines_gets_the_child_itself_and_loses_nothing(program):
    hello = b"config|smtpd-version|7.9.0\nconfig|tablename|users\nconfig|ready\n"
    wire, theirs = socket.socketpair()
    wire.sendall(hello + b"table|0.1|0|users|lookup|alias|1|pid\n")
    with wire, subprocess.Popen([*RUN, program(OF_TODAY)], stdin=theirs, stdout=theirs) as process:
        theirs.close()
        with wire.makefile("rb") as lines:
            registered = [lines.readline() for _ in range(3)]
            assert registered == [b"register|alias\n", b"register|source\n", b"register|ready\n"]
            assert lines.readline() == b"lookup-result|1|found|%d\n" % process.pid
            wire.shutdown(socket.SHUT_WR)
            assert (lines.read(), process.wait(PATIENCE_SECONDS)) == (b"", 0)


@pytest.mark.parametrize(
    ("text", "deadline", "services"),
    [
        (OF_TODAY, PATIENCE_SECONDS, {"alias", "source"}),
        (OF_2020, PATIENCE_SECONDS, set(DEFAULT_SERVICES)),
        ("#!/bin/sh\nexec sleep 99", 0.1, set(DEFAULT_SERVICES)),
        (
            "#!/bin/sh\necho 'register|nonsense'; echo 'register|ready'; exec cat",
            PATIENCE_SECONDS,
            set(DEFAULT_SERVICES),
        ),
    ],
    ids=["today", "2020", "silent", "none that smtpd knows"],
)
def test_services_are_those_that_the_child_registers_in_time_or_the_default(program, bridge, text, deadline, services):
    assert set(bridge(program(text), deadline=deadline).services("users")) == services


def test_restart_option_keeps_it_before_a_child_and_restarts_that_when_it_is_killed(program):
    wire, theirs = socket.socketpair()
    wire.settimeout(PATIENCE_SECONDS)
    wire.sendall(b"config|smtpd-version|7.9.0\nconfig|tablename|users\nconfig|ready\n")
    command = [*RUN, "--restart", "--deadline", "20", program(OF_TODAY)]
    with wire, subprocess.Popen(command, stdin=theirs, stdout=theirs) as process:
        theirs.close()
        with wire.makefile("rb") as lines:
            registered = set(iter(lines.readline, b"register|ready\n"))
            assert registered == {b"register|alias\n", b"register|source\n"}

            def pid():
                wire.sendall(b"table|0.1|0|users|lookup|alias|1|pid\n")
                verdict, _, value = lines.readline().removeprefix(b"lookup-result|1|").partition(b"|")
                return int(value) if verdict == b"found" else None

            first = pid()
            assert first not in {None, process.pid}
            os.kill(first, signal.SIGKILL)
            wait_for(lambda: pid() not in {None, first}, PATIENCE_SECONDS, lambda: "it was not started again")
            wire.shutdown(socket.SHUT_WR)
            assert process.wait(PATIENCE_SECONDS) == 0


def test_peer_of_2020_and_a_pipe_get_the_child_itself(program):
    line = b"table|0.1|0|users|lookup|1|alias|root\n"
    done = subprocess.run([*RUN, program(OF_2020)], input=line, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"table-response|1|found|gilles@poolp.org\n")


def test_end_of_file_at_once_starts_no_child():
    with Smtpd(*RUN, "/nowhere/table-x", begin=False) as smtpd:
        assert smtpd.end() == (0, b"", "")


def test_descriptor_that_does_not_block_is_waited_for(program):
    wire, theirs = socket.socketpair()
    theirs.setblocking(False)
    with (
        wire,
        subprocess.Popen([*RUN, program("#!/bin/sh\nexec cat")], stdin=theirs, stdout=subprocess.PIPE) as process,
    ):
        theirs.close()
        wire.settimeout(PATIENCE_SECONDS)
        wire.sendall(opening())
        assert wire.recv(16, socket.MSG_WAITALL)[:2] == b"\0\0"
        wire.shutdown(socket.SHUT_WR)
        assert process.wait(PATIENCE_SECONDS) == 0


def test_command_that_is_missing_is_exit_status_127():
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
def test_wrong_command_line_is_a_usage_error(arguments, reason, capsys):
    with pytest.raises(SystemExit) as raised:
        procexec.main(arguments)
    assert (raised.value.code, reason in capsys.readouterr().err) == (2, True)


def test_terminal_as_standard_input_is_a_usage_error():
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run([*RUN, "table-x"], stdin=theirs, capture_output=True, text=True, check=False)
        assert (done.returncode, "smtpd starts this" in done.stderr) == (2, True)
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_name_the_program(option, capsys):
    with pytest.raises(SystemExit) as raised:
        procexec.main([option])
    assert (raised.value.code, "table-procexec" in capsys.readouterr().out) == (0, True)


def test_name_is_looked_up_beside_us_then_in_libexec_then_in_path(program, tmp_path, monkeypatch):
    folders = [tmp_path / name for name in ("beside", "libexec", "path")]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setattr(procexec, "LIBEXEC", (str(folders[1]),))
    monkeypatch.setenv("PATH", str(folders[2]))
    (folders[0] / "table-x").write_text("not executable")
    for folder in (folders[2], folders[1]):
        program("", folder / "table-x")
        assert procexec.find("table-x", str(folders[0])) == str(folder / "table-x")
    (folders[0] / "table-x").chmod(0o755)
    assert procexec.find("table-x", str(folders[0])) == str(folders[0] / "table-x")
    assert procexec.find("table-x", "beside") == str(folders[1] / "table-x")
    with pytest.raises(FileNotFoundError):
        procexec.find("table-y", str(folders[0]))


@pytest.mark.parametrize("path", ["/usr/libexec/opensmtpd/table-x", "./table-x"])
def test_path_is_taken_unchanged(path):
    assert procexec.find(path, "/beside") == path


# ---- restarting, with a clock of the test's own ----


class Clock:
    """Real time, plus what the test adds; or a stopped clock, after ``stopped``."""

    def __init__(self):
        self.ahead = 0.0
        self.now = None

    def __call__(self):
        return time.monotonic() + self.ahead if self.now is None else self.now

    def stopped(self):
        self.now = self()
        return self.now

    def run_on(self, seconds):
        self.ahead = self.now + seconds - time.monotonic()
        self.now = None


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


def test_failed_child_is_restarted_after_a_pause_that_doubles_up_to_a_limit(program, bridge, clock, tmp_path):
    starts = tmp_path / "starts"
    broken = bridge(program(f"#!/bin/sh\nprintf . >>{starts}\n"), "smtpd-tables")

    def begun():
        return len(starts.read_text())

    for number, pause in enumerate((0.25, 0.5, 1.0, 2.0, 4.0, 4.0), 1):
        assert isinstance(broken.answer(ROOT, clock()), Failed)
        assert begun() == number
        for _ in range(9):
            assert isinstance(broken.answer(ROOT, clock.stopped()), Failed)
        assert begun() == number
        clock.run_on(pause)
    assert pause == LAST_PAUSE_SECONDS


def test_failure_is_logged_once_and_so_is_its_end(program, bridge, clock, caplog, tmp_path):
    caplog.set_level(logging.WARNING)
    healed = tmp_path / "healed"
    made = bridge(program(doing(f"if not os.path.exists({str(healed)!r}): sys.exit(7)")))
    for _ in range(3):
        reply = made.answer(ROOT, clock())
        assert isinstance(reply, Failed)
        assert reply.cause is not None
        clock.ahead += 9
    healed.touch()
    assert made.answer(ROOT, clock()) == Found(b"gilles")
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "table-x: exited with status 7; returning errors until it runs again"
    assert second.startswith("table-x: recovered after ")


def test_services_start_the_child_before_the_first_question(program, bridge, tmp_path):
    runs = tmp_path / "runs"
    bridge(program(f"#!/bin/sh\n>{runs}\n")).services("users")
    for _ in eventually("a start"):
        if runs.exists():
            break


def test_failed_start_is_the_error_of_the_first_question(bridge, clock):
    made = bridge("/nowhere/table-x")
    assert made.services("users") == list(DEFAULT_SERVICES)
    reply = made.answer(ROOT, clock.stopped())
    assert isinstance(reply, Failed)
    assert reply.reason == "table-x: cannot be run: No such file or directory; it will be restarted"


# It answers the handshake only when this file is there.
SLOW = "import os, time\nwhile not os.path.exists(%r): time.sleep(0.01)\n" + OF_TODAY


def test_slow_child_of_today_is_not_taken_for_one_of_2020_for_long(program, bridge, clock, tmp_path):
    started = tmp_path / "started"
    made = bridge(program(SLOW.replace("%r", repr(str(started)))))
    made.services("users")  # waits for a second: a child of 2020, as far as anybody can see
    started.touch()
    first = made.answer(ROOT, clock())
    assert isinstance(first, Failed)
    assert "unexpected reply to lookup: 'register|alias'" in first.reason
    clock.ahead += LAST_PAUSE_SECONDS
    assert made.answer(ROOT, clock()) == Found(b"gilles")


def test_child_whose_dialect_is_known_may_start_slowly(program, bridge, clock, tmp_path):
    started = tmp_path / "started"
    made = bridge(program(SLOW.replace("%r", repr(str(started)))), "smtpd-tables", deadline=0.1)
    for _ in range(3):
        assert made.answer(ROOT, clock()) == Failed("the table is still starting")
    started.touch()
    for _ in eventually("an answer"):
        reply = made.answer(ROOT, clock())
        if reply != Failed("the table is still starting"):
            break
    assert reply == Found(b"gilles")


SILENT = "#!/bin/sh\nexec sleep 99\n"


@pytest.fixture
def child(clock):
    made = []

    def make(path, table, dialect):
        made.append(Child(lambda: [path], table, dialect, clock))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_handshake_that_never_comes_is_an_error_in_the_end(program, child, clock):
    silent = child(program(SILENT), "users", "smtpd-tables")
    assert silent.ask(ROOT, clock()) == Failed("the table is still starting")
    clock.ahead += START_SECONDS
    with pytest.raises(ChildError, match="no answer to the handshake"):
        silent.ask(ROOT, clock())


def test_handshake_is_read_even_if_nobody_asked_in_time(program, child, clock, tmp_path):
    done = tmp_path / "done"
    text = f"#!/bin/sh\necho 'register|alias'; echo 'register|ready'; >{done}; exec cat\n"
    early = child(program(text), "users", None)
    for _ in eventually("the end of the handshake"):
        if done.exists():
            break
    clock.ahead += START_SECONDS
    assert (early.shake_hands(clock()), early.registered) == (True, ["alias"])


def test_child_that_does_not_read_holds_up_no_answer(program, child, clock):
    silent = child(program(SILENT), "users", "procexec")
    long = Request("lookup", b"", "t", "alias", b"x" * 10**7)
    with pytest.raises(ChildError, match="not reading"):
        silent.ask(long, clock() + 0.1)
    with pytest.raises(ChildError, match="not reading"):
        silent.ask(long, clock() - 1)


def test_child_that_sends_a_line_slowly_holds_up_no_answer(program, child, clock):
    slow = child(program("#!/bin/sh\nwhile printf x; do sleep 0.005; done\n"), "users", "procexec")
    started = time.monotonic()
    with pytest.raises(ChildError, match="no reply before the deadline"):
        slow.ask(ROOT, clock() + 0.1)
    assert time.monotonic() - started < 5


def test_table_name_that_lines_cannot_carry_is_an_error(program, child, clock):
    made = child(program(OF_TODAY), "a\nconfig|ready", None)
    for name in ("a|b", "a\nb"):
        request = Request("lookup", b"", name, "alias", b"root")
        assert isinstance(made.ask(request, clock() + PATIENCE_SECONDS), Failed)
    percent = Request("lookup", b"", "100%b", "alias", b"root")
    assert made.ask(percent, clock() + PATIENCE_SECONDS) == Found(b"gilles")


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


def line_of(dialect, request):
    return question_template(dialect, request.op, request.table, request.service) % (1.5, b"7", request.key)


@pytest.mark.parametrize(("how", "line"), ASKED.items(), ids=map("-".join, ASKED))
def test_question_has_the_fields_of_its_dialect(how, line):
    dialect, op = how
    assert line_of(dialect, Request(op, b"", "t", "alias", b"a|b" if op in ("check", "lookup") else b"")) == line


@pytest.mark.parametrize(("dialect", "op"), ASKED)
def test_question_is_what_our_own_parser_takes_it_for(dialect, op):
    asked = Request(op, b"7", "t%", "" if op == "update" else "alias", b"a|b" if op in ("check", "lookup") else b"")
    assert DIALECTS[dialect](line_of(dialect, asked).rstrip(b"\n")) == asked


@pytest.mark.parametrize(
    ("dialect", "op", "line", "reply"),
    [
        ("smtpd-tables", "check", b"check-result|7|found", Found()),
        ("smtpd-tables", "check", b"check-result|7|found|x", Found()),
        ("smtpd-tables", "lookup", b"lookup-result|7|found|a|b", Found(b"a|b")),
        ("smtpd-tables", "lookup", b"lookup-result|7|not-found", NotFound()),
        ("smtpd-tables", "fetch", b"fetch-result|7|found|a", Found(b"a")),
        ("smtpd-tables", "update", b"update-result|7|ok", Updated()),
        ("smtpd-tables", "update", b"update-result|7|error|no", Failed("the table reported: no")),
        ("smtpd-tables", "lookup", b"lookup-result|7|error", Failed("the table reported a failure")),
        ("procexec", "check", b"table-response|7|found", Found()),
        ("procexec", "lookup", b"table-result|7|found|a", Found(b"a")),
        ("procexec", "lookup", b"table-result|7|failure", Failed("the table reported a failure")),
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
def test_line_is_a_reply_only_to_its_question(dialect, op, line, reply):
    assert parse_reply(dialect, op, b"7", line) == reply


@given(
    st.sampled_from([*DIALECTS]),
    st.sampled_from(["check", "lookup", "fetch", "update"]),
    st.lists(
        st.sampled_from([b"lookup-result", b"table-result", b"7", b"found", b"not-found", b"error", b"ok"])
        | st.binary(max_size=4)
    ).map(b"|".join),
)
def test_any_line_is_a_reply_that_can_be_sent_or_no_reply(dialect, op, line):
    reply = parse_reply(dialect, op, b"7", line)
    assert reply is None or isinstance(reply, Found | NotFound | Updated | Failed)
    if isinstance(reply, Found):
        assert (reply.value is None) is (op == "check")
        assert op != "update"
