from __future__ import annotations

import logging
import os
import sys
import syslog
import threading
import time
from types import SimpleNamespace

import pytest

from table_consul import log
from tests.dialogue import TIMEOUT_SECONDS


@pytest.fixture(autouse=True)
def loggers():
    """Restore the loggers after each test."""
    root, ours = logging.getLogger(), logging.getLogger("table_consul")
    before = (root.handlers[:], root.level, ours.level, logging.raiseExceptions)
    yield
    root.handlers[:], root.level, ours.level, logging.raiseExceptions = before


def flush():
    for handler in logging.getLogger().handlers:
        handler.flush()


@pytest.fixture
def stderr(capfd):
    def getvalue():
        flush()
        return capfd.readouterr().err

    return SimpleNamespace(getvalue=getvalue)


@pytest.fixture
def syslog_lines(monkeypatch):
    """A function that returns the calls of syslog(3): the arguments of openlog, then priority and line of each."""
    found, opened = [], []
    monkeypatch.setattr(syslog, "openlog", lambda *how: opened.append(how))

    def take(priority, line):
        line.encode()
        if "\0" in line:
            raise ValueError("embedded null character")
        found.append((opened[-1], priority, line))

    monkeypatch.setattr(syslog, "syslog", take)

    def written():
        flush()
        return found

    return written


def logger():
    return logging.getLogger("table_consul")


def test_lines_carry_the_table_name(stderr):
    log.start("info", "stderr", "aliases")
    logger().info("hello %s", "there")
    assert stderr.getvalue() == "table-consul[aliases]: INFO: hello there\n"


def test_line_without_a_thread_is_written_with_the_first_that_has_one(stderr, monkeypatch):
    def fail(_thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        log.start("info", "stderr", "aliases")
        logger().info("first")
    logger().info("second")
    assert stderr.getvalue() == "table-consul[aliases]: INFO: first\ntable-consul[aliases]: INFO: second\n"


def test_lines_have_no_table_before_its_name_is_known(stderr):
    log.start("info", "stderr", "")
    logger().warning("hello")
    assert stderr.getvalue() == "table-consul: WARNING: hello\n"


@pytest.mark.parametrize(("level", "seen"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_level_hides_lower_levels(stderr, level, seen):
    log.start(level, "stderr", "t")
    for say in (logger().debug, logger().info, logger().warning, logger().error):
        say("x")
    assert seen == stderr.getvalue().count("\n")


def test_libraries_log_warnings_but_no_debug_lines(stderr):
    log.start("debug", "stderr", "t")
    logging.getLogger("urllib3").debug("X-Consul-Token: secret")
    logging.getLogger("urllib3").warning("retrying")
    assert stderr.getvalue() == "table-consul[t]: WARNING: retrying\n"


def test_second_start_replaces_the_handler(stderr):
    log.start("info", "stderr", "")
    log.start("info", "stderr", "t")
    logger().info("once")
    assert stderr.getvalue() == "table-consul[t]: INFO: once\n"


def test_auto_is_syslog_with_facility_mail_without_a_terminal(syslog_lines, monkeypatch):
    monkeypatch.setattr(sys, "platform", "openbsd7")
    log.start("info", "auto", "aliases")
    logger().info("hello")
    assert syslog_lines() == [(("table-consul[aliases]", 0, syslog.LOG_MAIL), syslog.LOG_INFO, "hello")]


def test_auto_is_the_terminal_if_standard_error_is_one(syslog_lines, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log.start("info", "auto", "aliases")
    logger().info("hello")
    assert syslog_lines() == []


@pytest.mark.parametrize(
    ("syslog_is_there", "path", "stderr_is_read"),
    [
        (False, "err", True),
        (False, os.devnull, False),  # a daemonised smtpd; syslog may start later
        (True, "err", False),
    ],
)
def test_auto_is_stderr_without_syslog_unless_that_is_dev_null(
    syslog_lines, monkeypatch, tmp_path, stderr, syslog_is_there, path, stderr_is_read
):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os.path, "exists", lambda name: syslog_is_there and name == "/dev/log")
    with open(tmp_path / path, "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        log.start("info", "auto", "t")
        logger().info("hello")
        written = syslog_lines()
        monkeypatch.undo()
    assert (written == []) is stderr_is_read
    assert stderr_is_read is False or stderr.getvalue() == "table-consul[t]: INFO: hello\n"


def test_auto_is_syslog_without_standard_error(syslog_lines, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    log.start("info", "stderr", "t")
    logger().info("nobody hears")
    flush()
    log.start("info", "auto", "t")
    logger().info("hello")
    assert [line for _, _, line in syslog_lines()] == ["hello"]


def test_level_has_its_syslog_priority(syslog_lines):
    log.start("debug", "syslog", "t")
    for say in (logger().debug, logger().info, logger().warning, logger().error, logger().critical):
        say("x")
    priorities = [syslog.LOG_DEBUG, syslog.LOG_INFO, syslog.LOG_WARNING, syslog.LOG_ERR, syslog.LOG_ERR]
    assert priorities == [priority for _, priority, _ in syslog_lines()]


NASTY = ["a\x1b[31mb", "a\nforged line", "a\rb", "a\0b", "a\u202eb", "a\ud800b", "a\x9bb", "a\u2028b"]


@pytest.mark.parametrize("target", ["stderr", "syslog"])
@pytest.mark.parametrize("nasty", NASTY)
def test_control_characters_in_messages_are_escaped(syslog_lines, stderr, target, nasty):
    log.start("info", target, "t")
    logger().warning("%s", nasty)
    lines = [line for *_, line in syslog_lines()] or stderr.getvalue().rstrip("\n").split("\n")
    assert (len(lines), lines[0].isprintable()) == (1, True)


@pytest.mark.parametrize("target", ["stderr", "syslog"])
@pytest.mark.parametrize("nasty", NASTY)
def test_control_characters_in_tracebacks_are_escaped(syslog_lines, stderr, target, nasty):
    log.start("info", target, "t")
    try:
        raise RuntimeError(nasty)
    except RuntimeError as error:
        logger().error("internal error", exc_info=error)
    lines = [line for *_, line in syslog_lines()] or stderr.getvalue().rstrip("\n").split("\n")
    assert [line for line in lines if not line.isprintable()] == []
    assert [True] * (len(lines) - 1) == [line.startswith("    ") for line in lines[1:]]
    assert "RuntimeError: a" in "\n".join(lines)


def test_control_characters_in_the_table_name_are_escaped(syslog_lines):
    log.start("info", "syslog", "a\x1b\0\ud800")
    logger().info("hello")
    assert syslog_lines()[0][0][0] == "table-consul[a\\x1b\\x00\\ud800]"


def test_syslog_that_fails_is_ignored(syslog_lines, monkeypatch, capsys):
    def broken(*_):
        raise OSError("no log daemon")

    monkeypatch.setattr(syslog, "syslog", broken)
    log.start("info", "syslog", "t")
    logger().warning("hello")
    flush()
    assert capsys.readouterr() == ("", "")


# ---- a log that nobody reads ----


@pytest.fixture
def stuck(monkeypatch, syslog_lines):
    """An event; until it is set, syslog(3) blocks as on a socket that nobody reads."""
    go_on, take = threading.Event(), syslog.syslog
    monkeypatch.setattr(syslog, "syslog", lambda *line: (go_on.wait(TIMEOUT_SECONDS), take(*line)))
    yield go_on
    go_on.set()
    flush()


def test_log_that_is_not_read_delays_nothing_and_reports_what_was_dropped(stuck, syslog_lines):
    log.start("info", "syslog", "t")
    for number in range(log.QUEUE_MAX + 50):
        logger().info("%d", number)
    log.start("info", "syslog", "renamed")
    stuck.set()
    lines = [line for *_, line in syslog_lines()]
    assert lines[:-1] == [str(number) for number in range(log.QUEUE_MAX)]
    assert lines[-1] == "50 log lines dropped: the log was not read in time"


def test_lines_keep_the_name_they_were_logged_under(stuck, syslog_lines):
    log.start("info", "syslog", "")
    logger().info("first")
    log.start("info", "syslog", "t")
    logger().info("second")
    stuck.set()
    assert [(opened[0], line) for opened, _, line in syslog_lines()] == [
        ("table-consul", "first"),
        ("table-consul[t]", "second"),
    ]


def test_flush_waits_a_bounded_time_for_a_log_that_is_not_read(stuck, monkeypatch):
    monkeypatch.setattr(log, "FLUSH_SECONDS", 0.05)
    log.start("info", "syslog", "t")
    logger().info("hello")
    began = time.monotonic()
    flush()
    assert time.monotonic() - began < 5


def test_non_blocking_standard_error_gets_every_byte(monkeypatch):
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    before = os.dup(2)
    os.dup2(theirs, 2)
    try:
        log.start("info", "stderr", "t")
        for number in range(log.QUEUE_MAX):
            logger().info("%d %s", number, "x" * 500)
        data = b""
        while data.count(b"\n") < log.QUEUE_MAX:
            data += os.read(ours, 65536)
        flush()
    finally:
        os.dup2(before, 2)
        for each in (ours, theirs, before):
            os.close(each)
    assert [line.split()[2] for line in data.splitlines()] == [b"%d" % number for number in range(log.QUEUE_MAX)]


# ---- entries with problems ----


def test_first_problems_are_logged_and_the_others_counted(stderr):
    log.start("info", "stderr", "t")
    log.warn_of_problems("t", [f"p{number}" for number in range(480_000)])
    lines = stderr.getvalue().splitlines()
    assert len(lines) == log.PROBLEMS_MAX + 1
    assert lines[-1].endswith("WARNING: t: 479970 more entries have a problem (list them: table-consulctl lint t)")


@pytest.mark.parametrize("count", [0, 1, log.PROBLEMS_MAX])
def test_few_problems_are_all_logged(stderr, count):
    log.start("info", "stderr", "t")
    log.warn_of_problems("t", ["p"] * count)
    assert stderr.getvalue() == "table-consul[t]: WARNING: p\n" * count
