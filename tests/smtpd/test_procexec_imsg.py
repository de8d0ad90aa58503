"""table-procexec between an smtpd that speaks imsg and a child that speaks lines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from table_consul.imsg import MAX_VALUE
from table_consul.protocol import Failed, Found
from tests.dialogue import TIMEOUT_SECONDS, write_config, write_source
from tests.e2e.programs import OF_2020
from tests.smtpd.imsg import CHECK, CLOSE, FETCH, LOOKUP, SOURCE, UPDATE, message, opening
from tests.smtpd.procexec import ABSENT, ERROR, OF_TODAY, OK, ROOT, Smtpd, bridged, first_answer, wait_for_answer


@pytest.fixture(scope="module")
def of_today(make_program):
    """A bridge with a running child, which no test that uses it may disturb."""
    with bridged(make_program(OF_TODAY), "/etc/a.conf", "--deadline", "-x") as smtpd:
        wait_for_answer(smtpd)
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
    assert of_today.ask(LOOKUP, 4) == (ERROR, b"")  # a service that the child does not register
    assert of_today.ask(LOOKUP, 0x4000) == (ERROR, b"")
    assert of_today.ask(key=b"number") == (OK, b"%d" % (number + 1))


def test_child_gets_only_its_own_arguments(of_today):
    assert of_today.ask(key=b"arguments") == (OK, b"['/etc/a.conf', '--deadline', '-x']")


def test_command_in_one_word_is_split_as_by_a_shell(make_program):
    with bridged(f"{make_program(OF_TODAY)} /etc/a.conf 'b c'") as smtpd:
        wait_for_answer(smtpd)
        assert smtpd.ask(key=b"arguments") == (OK, b"['/etc/a.conf', 'b c']")


def test_child_gets_the_name_of_the_table(of_today):
    verdict, config = of_today.ask(key=b"config")
    assert (verdict, b"'tablename': 'users'" in config) == (OK, True)


def test_child_of_2020_answers_all_operations_from_the_first_question_on(make_program):
    with bridged("--deadline", "20", make_program(OF_2020)) as smtpd:
        assert smtpd.ask(LOOKUP) == (OK, b"gilles@poolp.org")
        assert smtpd.ask(CHECK, key=b"gilles@poolp.org") == (OK, b"")
        assert smtpd.ask(LOOKUP, key=b"nobody") == (ABSENT, b"")
        assert smtpd.ask(FETCH, SOURCE, b"") == (OK, b"gilles@poolp.org")
        assert smtpd.ask(UPDATE) == (OK, b"")


def test_child_of_2020_that_ignores_the_handshake_answers_the_first_question(make_program, make_bridge, clock):
    made = make_bridge(make_program(OF_2020.replace("sys.exit(1)", "continue")))
    assert made.answer(ROOT, clock()) == Found(b"gilles@poolp.org")


@pytest.mark.parametrize(("dialect", "text"), [("smtpd-tables", OF_TODAY), ("procexec", OF_2020)])
def test_dialect_option_names_the_dialect_of_the_child(make_program, dialect, text):
    with bridged("--dialect", dialect, make_program(text)) as smtpd:
        wait_for_answer(smtpd)


def test_child_of_2020_with_the_dialect_of_today_returns_errors(make_program, make_bridge, clock):
    made = make_bridge(make_program(OF_2020), "smtpd-tables")
    for _ in range(3):
        assert isinstance(made.answer(ROOT, clock()), Failed)
        clock.ahead += 9


def test_table_consul_itself_can_be_the_child(make_program, tmp_path):
    text = (
        f"import sys; sys.path[:0] = {[*filter(None, sys.path)]!r}; from table_consul.cli import main; sys.exit(main())"
    )
    with bridged("--deadline", "20", make_program(text), str(write_config(tmp_path))) as smtpd:
        smtpd.wire.sendall(opening(b"aliases"))
        smtpd.message()
        assert smtpd.ask(key=b"nobody") == (ABSENT, b"")


def test_end_of_file_ends_the_child_which_shares_standard_error(make_program):
    with bridged(make_program(OF_TODAY)) as smtpd:
        wait_for_answer(smtpd)
        assert smtpd.ask(key=b"stderr")[0] == OK
        pid = int(smtpd.ask(key=b"pid")[1])
        status, output, log = smtpd.end()
        assert (status, output, log.endswith("hello from below\n")) == (0, b"", True)
        assert not Path(f"/proc/{pid}").exists()


def test_child_that_ignores_end_of_file_is_killed(make_program, make_bridge, clock):
    made = make_bridge(make_program(OF_TODAY + "time.sleep(99)"))
    pid = int(first_answer(made, clock, b"pid").value)
    made.close()
    assert not Path(f"/proc/{pid}").exists()


def test_imsg_close_ends_the_process_like_end_of_file(make_program):
    with bridged(make_program("#!/bin/sh\nexec cat")) as smtpd:
        smtpd.wire.sendall(message(CLOSE))
        assert (smtpd.wire.recv(1), smtpd.process.wait(TIMEOUT_SECONDS)) == (b"", 0)


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
