"""The end of the program: end of file, signals, and starts by hand."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys

import pytest

from tests.dialogue import ENTRIES, TIMEOUT_SECONDS, Child, write_config, write_source
from tests.smtpd.process import ROOT
from tests.smtpd.procexec import OF_TODAY, RUN, Smtpd, bridged, table_program, wait_for_answer

PROGRAM = (sys.executable, "-m", "table_consul")
LONG = {**ENTRIES, "aliases/string/long": b"x" * 100_000}

# ---- started by smtpd ----


def test_end_of_file_exits_with_0(entries_config):
    with Child(entries_config) as child:
        child.handshake()
        assert child.end() == 0


def test_end_of_file_within_a_line_exits_with_0(entries_config):
    with Child(entries_config) as child:
        child.handshake()
        child.say(ROOT % 1)
        assert (child.rest(), child.end()) == (b"", 0)


def ask_for_long(child, count):
    child.say(b"".join(b"table|0.1|0|aliases|lookup|string|%08x|long\n" % number for number in range(count)))


def test_peer_that_vanishes_during_replies_exits_with_0(tmp_path):
    path = write_config(tmp_path)
    write_source(tmp_path, LONG)
    with Child(str(path)) as child:
        child.handshake()
        ask_for_long(child, 100)
        child.line()
        child.wire.close()
        assert (child.process.wait(TIMEOUT_SECONDS), problems(child)) == (0, "")


ENDING = ("INT", "TERM", "HUP", "PIPE", "USR1", "USR2", "ALRM", "QUIT")


@pytest.mark.parametrize("name", ["table-consul", "table-procexec"])
def test_signals_that_smtpd_ignores_or_not_do_not_end_the_program(entries_config, make_program, name):
    command = {"table-consul": (*PROGRAM, entries_config), "table-procexec": (*RUN, make_program(OF_TODAY))}
    with Smtpd(*command[name]) as smtpd:
        for signal_name in ENDING:
            smtpd.process.send_signal(signal.Signals[f"SIG{signal_name}"])
            smtpd.ask()
        assert smtpd.end()[0] == 0


def test_child_of_table_procexec_ignores_only_the_signals_that_smtpd_ignores(make_program):
    numbers = [signal.Signals[f"SIG{name}"].value for name in ENDING]
    action = f"import signal; answer = f'found|{{[n for n in {numbers} if signal.getsignal(n) == signal.SIG_IGN]}}'"
    with bridged(make_program(table_program(action))) as smtpd:
        wait_for_answer(smtpd)
        assert smtpd.ask()[1].decode() == str([signal.Signals[f"SIG{name}"].value for name in ENDING[:4]])


@pytest.mark.usefixtures("interruptible")
def test_program_started_by_hand_can_be_interrupted():
    with subprocess.Popen(PROGRAM, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        program.stdin.write(b"config|ready\n")
        program.stdin.flush()
        program.stdout.readline()
        program.send_signal(signal.SIGINT)
        program.communicate(timeout=TIMEOUT_SECONDS)
    assert program.returncode != 0


def test_non_blocking_socket_is_waited_for(tmp_path):
    path = write_config(tmp_path)
    write_source(tmp_path, LONG)
    theirs_flags = "import os; os.set_blocking(0, False); from table_consul.cli import main; raise SystemExit(main())"
    with Child(str(path), command=[sys.executable, "-c", theirs_flags]) as child:
        child.handshake()
        ask_for_long(child, 30)
        answers = [child.line() for _ in range(30)]
        assert [b"lookup-result|%08x|found|" % n + b"x" * 100_000 for n in range(30)] == answers
        assert child.end() == 0


def problems(child):
    """The log without lines of level INFO."""
    return "".join(line for line in child.log().splitlines(keepends=True) if ": INFO: " not in line)


# ---- started by hand ----


def run_to_the_end(*command, **options):
    return subprocess.run(command, capture_output=True, timeout=TIMEOUT_SECONDS, check=False, **options)


def test_terminal_as_standard_input_prints_a_hint_and_exits_with_2():
    ours, theirs = pty.openpty()
    try:
        run = run_to_the_end(*PROGRAM, stdin=theirs)
    finally:
        os.close(ours)
        os.close(theirs)
    assert (run.returncode, run.stdout, b"OpenSMTPD starts table-consul" in run.stderr) == (2, b"", True)


@pytest.mark.parametrize("sent", [b"", b"hello\n", b"GET / HTTP/1.0\r\n\r\n"])
def test_input_in_no_dialect_prints_a_hint_and_exits_with_2(entries_config, sent):
    run = run_to_the_end(*PROGRAM, entries_config, input=sent)
    assert (run.returncode, run.stdout, b"OpenSMTPD starts table-consul" in run.stderr) == (2, b"", True)


@pytest.mark.parametrize("closed", ["<&-", "<&- >&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_closed_standard_input_exits_with_2_without_a_traceback(entries_config, closed):
    run = run_to_the_end("/bin/sh", "-c", f'exec "$@" {closed}', "sh", *PROGRAM, entries_config)
    assert (run.returncode, b"Traceback" in run.stdout + run.stderr) == (2, False)


def test_suggested_dialogue_works(entries_config):
    run = run_to_the_end(*PROGRAM, entries_config, input=b"config|ready\ntable|0.1|0|aliases|lookup|alias|1|root\n")
    assert (run.returncode, run.stdout.splitlines()[-1]) == (0, b"lookup-result|1|found|gilles")


def test_handshake_needs_no_heavy_imports():
    """smtpd waits for the handshake, which must not wait for heavy imports."""
    code = "import sys; from table_consul import cli; print(*sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.split()
    assert set() == {"requests", "urllib3", "consul", "ssl", "http.client", "table_consul.kv"} & {*modules}
