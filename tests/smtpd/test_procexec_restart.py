"""Starts and restarts of the child: pauses, timeouts and log lines."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import subprocess
import time

import pytest

from table_consul.backoff import LAST_PAUSE_SECONDS
from table_consul.child import HANDSHAKE_SECONDS, START_SECONDS, Child, ChildError
from table_consul.protocol import Failed, Found, Request
from table_consul.services import DEFAULT_SERVICES
from tests.dialogue import TIMEOUT_SECONDS, eventually
from tests.e2e.programs import OF_2020
from tests.rig.waiting import wait_for
from tests.smtpd.procexec import OF_TODAY, ROOT, RUN, table_program


def test_restart_option_restarts_a_killed_child(make_program):
    wire, theirs = socket.socketpair()
    wire.settimeout(TIMEOUT_SECONDS)
    wire.sendall(b"config|smtpd-version|7.9.0\nconfig|tablename|users\nconfig|ready\n")
    command = [*RUN, "--restart", "--deadline", "20", make_program(OF_TODAY)]
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
            wait_for(lambda: pid() not in {None, first}, TIMEOUT_SECONDS, lambda: "the child was not restarted")
            wire.shutdown(socket.SHUT_WR)
            assert process.wait(TIMEOUT_SECONDS) == 0


def test_failed_child_is_restarted_after_a_pause_that_doubles_up_to_a_limit(make_program, make_bridge, clock, tmp_path):
    starts = tmp_path / "starts"
    broken = make_bridge(make_program(f"#!/bin/sh\nprintf . >>{starts}\n"), "smtpd-tables")

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


def test_failure_and_recovery_are_logged_once(make_program, make_bridge, clock, caplog, tmp_path):
    caplog.set_level(logging.WARNING)
    healed = tmp_path / "healed"
    made = make_bridge(make_program(table_program(f"if not os.path.exists({str(healed)!r}): sys.exit(7)")))
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


def test_services_start_the_child_before_the_first_question(make_program, make_bridge, tmp_path):
    runs = tmp_path / "runs"
    make_bridge(make_program(f"#!/bin/sh\n>{runs}\n")).services("users")
    for _ in eventually("the child has started"):
        if runs.exists():
            break


def test_failed_start_is_the_error_of_the_first_question(make_bridge, clock):
    made = make_bridge("/nowhere/table-x")
    assert made.services("users") == list(DEFAULT_SERVICES)
    reply = made.answer(ROOT, clock.stopped())
    assert isinstance(reply, Failed)
    assert reply.reason == "table-x: cannot be run: No such file or directory; it will be restarted"


def test_start_without_a_free_descriptor_is_the_error_of_the_first_question(make_bridge, clock, monkeypatch):
    def socketpair():
        raise OSError(errno.ENFILE, "Too many open files in system")

    monkeypatch.setattr("socket.socketpair", socketpair)
    made = make_bridge("/nowhere/table-x")
    assert not made.suits_smtpd("users")
    reply = made.answer(ROOT, clock.stopped())
    assert isinstance(reply, Failed)
    assert reply.reason == "table-x: cannot be run: Too many open files in system; it will be restarted"


# The child answers the handshake only once this file exists.
SLOW = "import os, time\nwhile not os.path.exists(%r): time.sleep(0.01)\n" + OF_TODAY


def test_slow_child_taken_for_one_of_2020_answers_after_a_restart(make_program, make_bridge, clock, tmp_path):
    started = tmp_path / "started"
    made = make_bridge(make_program(SLOW.replace("%r", repr(str(started)))))
    made.services("users")  # no handshake within a second: the bridge takes it for a child of 2020
    started.touch()
    first = made.answer(ROOT, clock())
    assert isinstance(first, Failed)
    assert "unexpected reply to lookup: 'register|alias'" in first.reason
    clock.ahead += LAST_PAUSE_SECONDS
    assert made.answer(ROOT, clock()) == Found(b"gilles")


def test_child_whose_dialect_is_known_may_start_slowly(make_program, make_bridge, clock, tmp_path):
    started = tmp_path / "started"
    made = make_bridge(make_program(SLOW.replace("%r", repr(str(started)))), "smtpd-tables", deadline=0.1)
    for _ in range(3):
        assert made.answer(ROOT, clock()) == Failed("the table is still starting")
    started.touch()
    for _ in eventually("an answer"):
        reply = made.answer(ROOT, clock())
        if reply != Failed("the table is still starting"):
            break
    assert reply == Found(b"gilles")


@pytest.mark.parametrize("text", [OF_TODAY, OF_2020])
def test_child_that_starts_later_than_the_deadline_answers_in_the_end(make_program, make_bridge, clock, tmp_path, text):
    started = tmp_path / "started"
    late = f"import os, time\nwhile not os.path.exists({str(started)!r}): time.sleep(0.01)\n"
    made = make_bridge(make_program(late + text), deadline=0.1)
    made.services("users")
    clock.ahead += HANDSHAKE_SECONDS
    assert [made.answer(ROOT, clock()) for _ in range(3)] == [Failed("the table is still starting")] * 3
    started.touch()
    for _ in eventually("an answer"):
        reply = made.answer(ROOT, clock())
        if isinstance(reply, Found):
            break
        if reply != Failed("the table is still starting"):  # its dialect turned out to be another
            clock.ahead += LAST_PAUSE_SECONDS
    assert reply.value.startswith(b"gilles")


def test_child_of_2020_without_any_reply_is_replaced_after_the_start_timeout(make_program, make_child, clock):
    silent = make_child(make_program(SILENT), "users", "procexec")
    for _ in range(2):
        assert silent.ask(ROOT, clock()) == Failed("the table is still starting")
    clock.ahead += START_SECONDS
    with pytest.raises(ChildError, match="no reply within 30 s"):
        silent.ask(ROOT, clock())


SILENT = "#!/bin/sh\nexec sleep 99\n"


@pytest.fixture
def make_child(clock):
    made = []

    def make(path, table, dialect):
        made.append(Child(lambda: [path], table, dialect, clock))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_missing_handshake_is_an_error_after_the_start_timeout(make_program, make_child, clock):
    silent = make_child(make_program(SILENT), "users", "smtpd-tables")
    assert silent.ask(ROOT, clock()) == Failed("the table is still starting")
    clock.ahead += START_SECONDS
    with pytest.raises(ChildError, match="no answer to the handshake"):
        silent.ask(ROOT, clock())


def test_handshake_sent_in_time_is_accepted_after_the_start_timeout(make_program, make_child, clock, tmp_path):
    done = tmp_path / "done"
    text = f"#!/bin/sh\necho 'register|alias'; echo 'register|ready'; >{done}; exec cat\n"
    early = make_child(make_program(text), "users", None)
    for _ in eventually("the handshake has ended"):
        if done.exists():
            break
    clock.ahead += START_SECONDS
    assert (early.shake_hands(clock()), early.registered) == (True, ["alias"])


def test_child_that_does_not_read_is_an_error_at_the_deadline(make_program, make_child, clock):
    silent = make_child(make_program(SILENT), "users", "procexec")
    long = Request("lookup", b"", "t", "alias", b"x" * 10**7)
    with pytest.raises(ChildError, match="not reading"):
        silent.ask(long, clock() + 0.1)
    with pytest.raises(ChildError, match="not reading"):
        silent.ask(long, clock() - 1)


def test_child_that_sends_a_line_slowly_is_an_error_at_the_deadline(make_program, make_child, clock):
    slow = make_child(make_program("#!/bin/sh\nwhile printf x; do sleep 0.005; done\n"), "users", "procexec")
    started = time.monotonic()
    with pytest.raises(ChildError, match="no reply before the deadline"):
        slow.ask(ROOT, clock() + 0.1)
    assert time.monotonic() - started < 5


def test_table_name_that_lines_cannot_carry_is_an_error(make_program, make_child, clock):
    made = make_child(make_program(OF_TODAY), "a\nconfig|ready", None)
    for name in ("a|b", "a\nb"):
        request = Request("lookup", b"", name, "alias", b"root")
        assert isinstance(made.ask(request, clock() + TIMEOUT_SECONDS), Failed)
    percent = Request("lookup", b"", "100%b", "alias", b"root")
    assert made.ask(percent, clock() + TIMEOUT_SECONDS) == Found(b"gilles")
