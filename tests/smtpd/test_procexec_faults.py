"""Faults of a child: every question still gets a reply in time."""

from __future__ import annotations

import os
import signal
import threading
import time
import tracemalloc

import pytest

from table_consul.backoff import LAST_PAUSE_SECONDS
from table_consul.protocol import Failed, Found
from tests.dialogue import TIMEOUT_SECONDS, eventually
from tests.smtpd.procexec import OF_TODAY, OK, ROOT, bridged, first_answer, table_program, wait_for_answer


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
def test_fault_is_an_error_in_time_and_then_another_child_answers(make_program, make_bridge, clock, tmp_path, fault):
    once = tmp_path / "once"
    text = table_program(f"if not os.path.exists({str(once)!r}):\n        open({str(once)!r}, 'w')\n        {fault}")
    made = make_bridge(make_program(text), deadline=0.4)
    # The first request may find the child still starting.
    for _ in eventually("the fault is reported"):
        started = time.monotonic()
        assert isinstance(made.answer(ROOT, clock()), Failed)
        assert time.monotonic() - started < 2
        if once.exists():
            break
        clock.ahead += LAST_PAUSE_SECONDS
    assert first_answer(made, clock) == Found(b"gilles")


@pytest.mark.parametrize("text", ["", "exit 1", "exec sleep 99", "echo Usage: table; exec cat"])
def test_child_that_never_answers_gives_errors_in_time(make_program, make_bridge, clock, text):
    made = make_bridge(make_program(f"#!/bin/sh\n{text}\n"), deadline=0.3)
    for _ in range(5):
        started = time.monotonic()
        assert isinstance(made.answer(ROOT, clock()), Failed)
        assert time.monotonic() - started < 2
        clock.ahead += LAST_PAUSE_SECONDS


@pytest.mark.parametrize("dialect", [None, "smtpd-tables", "procexec"])
def test_child_that_never_stops_registering_gives_an_error_in_time(make_program, make_bridge, clock, dialect):
    made = make_bridge(make_program("#!/bin/sh\nexec yes 'register|alias'\n"), dialect)
    reply = made.answer(ROOT, clock())
    reason = (
        "unexpected reply to lookup: 'register|alias'" if dialect == "procexec" else "more than 100 services registered"
    )
    assert (type(reply), reply.reason) == (Failed, f"table-x: {reason}")


def test_line_sent_before_its_question_is_not_the_answer(make_program, make_bridge, clock):
    early = r"printf 'lookup-result|%08x|found|mallory\n' 0 1 2"
    made = make_bridge(make_program(f"#!/bin/sh\necho 'register|ready'\n{early}\nexec sleep 99\n"), "smtpd-tables")
    reply = made.answer(ROOT, clock())
    assert isinstance(reply, Failed)
    assert "unexpected reply to lookup" in reply.reason


def test_second_reply_to_a_question_does_not_answer_the_next(make_program, make_bridge, clock):
    made = make_bridge(make_program(table_program('print(f"{op}-result|{ident}|found|first", flush=True)')))
    assert first_answer(made, clock) == Found(b"first")
    assert isinstance(made.answer(ROOT, clock()), Failed)


def test_reply_sent_before_its_question_is_not_its_answer(make_program, make_bridge, clock):
    ahead = 'print(f"{op}-result|{int(ident, 16) + 1:08x}|found|mallory", flush=True)'
    program = table_program("pass") + f"    {ahead}\n"
    made = make_bridge(make_program(program))
    assert first_answer(made, clock) == Found(b"gilles")
    for _ in range(10):
        assert made.answer(ROOT, clock()) != Found(b"mallory")
        clock.ahead += LAST_PAUSE_SECONDS


@pytest.mark.parametrize("endless", ["yes 'register|alias'", "yes 'lookup-result|0|found|x'", "tr '\\0' x </dev/zero"])
def test_child_that_never_stops_writing_takes_bounded_memory(make_program, make_bridge, clock, endless):
    made = make_bridge(make_program(f"#!/bin/sh\nexec {endless}\n"))
    tracemalloc.start()
    try:
        for _ in range(3):
            made.answer(ROOT, clock())
            clock.ahead += LAST_PAUSE_SECONDS
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_missing_command_returns_errors_until_it_is_installed(make_program, make_bridge, clock, tmp_path):
    path = tmp_path / "table-later"
    made = make_bridge(str(path))
    assert isinstance(made.answer(ROOT, clock()), Failed)
    make_program(OF_TODAY, path)
    assert first_answer(made, clock) == Found(b"gilles")


def test_killed_child_is_replaced_under_load(make_program):
    with bridged(make_program(OF_TODAY)) as smtpd:
        wait_for_answer(smtpd)
        for _ in range(3):
            pid = int(smtpd.ask(key=b"pid")[1])
            killer = threading.Timer(0.02, os.kill, (pid, signal.SIGKILL))
            killer.start()
            started = time.monotonic()
            while smtpd.ask()[0] == OK:
                assert time.monotonic() - started < TIMEOUT_SECONDS
            killer.join()
            wait_for_answer(smtpd)
