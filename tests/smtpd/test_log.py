from __future__ import annotations

import logging
import os
import sys
import syslog
from types import SimpleNamespace

import pytest

from table_consul import log


@pytest.fixture(autouse=True)
def loggers():
    """Whatever a test starts, the loggers are as they were after it."""
    root, ours = logging.getLogger(), logging.getLogger("table_consul")
    before = (root.handlers[:], root.level, ours.level, logging.raiseExceptions)
    yield
    root.handlers[:], root.level, ours.level, logging.raiseExceptions = before


@pytest.fixture
def stderr(capsys):
    return SimpleNamespace(getvalue=lambda: capsys.readouterr().err)


@pytest.fixture
def syslog_lines(monkeypatch):
    """What reaches syslog(3), with its priority; and how it was opened."""
    found = []
    monkeypatch.setattr(syslog, "openlog", lambda *opened: found.append(opened))

    def take(priority, line):
        line.encode()
        if "\0" in line:
            raise ValueError("embedded null character")
        found.append((priority, line))

    monkeypatch.setattr(syslog, "syslog", take)
    return found


def logger():
    return logging.getLogger("table_consul")


def test_lines_carry_the_table_name(stderr):
    log.start("info", "stderr", "aliases")
    logger().info("hello %s", "there")
    assert stderr.getvalue() == "table-consul[aliases]: INFO: hello there\n"


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


def test_auto_is_syslog_with_facility_mail_without_a_terminal(syslog_lines, stderr):
    log.start("info", "auto", "aliases")
    logger().info("hello")
    assert syslog_lines == [("table-consul[aliases]", 0, syslog.LOG_MAIL), (syslog.LOG_INFO, "hello")]


def test_auto_is_a_terminal_if_there_is_one(syslog_lines, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log.start("info", "auto", "aliases")
    assert syslog_lines == []


@pytest.mark.parametrize(
    ("syslog_is_there", "path", "stderr_is_read"),
    [
        (False, "err", True),
        (False, os.devnull, False),  # a daemonised smtpd, and syslog may come yet
        (True, "err", False),
    ],
)
def test_auto_is_stderr_without_syslog_unless_that_is_dev_null(
    syslog_lines, monkeypatch, tmp_path, syslog_is_there, path, stderr_is_read
):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os.path, "exists", lambda name: syslog_is_there and name == "/dev/log")
    with open(tmp_path / path, "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        log.start("info", "auto", "t")
        logger().info("hello")
        monkeypatch.undo()
    assert (syslog_lines == []) is stderr_is_read
    assert stderr_is_read is False or (tmp_path / path).read_text() == "table-consul[t]: INFO: hello\n"


def test_auto_is_syslog_without_standard_error(syslog_lines, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    log.start("info", "stderr", "t")
    logger().info("nobody hears")
    log.start("info", "auto", "t")
    logger().info("hello")
    assert syslog_lines[1:] == [(syslog.LOG_INFO, "hello")]


def test_level_has_its_syslog_priority(syslog_lines):
    log.start("debug", "syslog", "t")
    for say in (logger().debug, logger().info, logger().warning, logger().error, logger().critical):
        say("x")
    priorities = [syslog.LOG_DEBUG, syslog.LOG_INFO, syslog.LOG_WARNING, syslog.LOG_ERR, syslog.LOG_ERR]
    assert priorities == [priority for priority, _ in syslog_lines[1:]]


NASTY = ["a\x1b[31mb", "a\nforged line", "a\rb", "a\0b", "a\u202eb", "a\ud800b", "a\x9bb", "a\u2028b"]


@pytest.mark.parametrize("target", ["stderr", "syslog"])
@pytest.mark.parametrize("nasty", NASTY)
def test_control_characters_in_messages_are_escaped(syslog_lines, stderr, target, nasty):
    log.start("info", target, "t")
    logger().warning("%s", nasty)
    lines = [line for _, line in syslog_lines[1:]] or stderr.getvalue().rstrip("\n").split("\n")
    assert (len(lines), lines[0].isprintable()) == (1, True)


@pytest.mark.parametrize("target", ["stderr", "syslog"])
@pytest.mark.parametrize("nasty", NASTY)
def test_control_characters_in_tracebacks_are_escaped(syslog_lines, stderr, target, nasty):
    log.start("info", target, "t")
    try:
        raise RuntimeError(nasty)
    except RuntimeError as error:
        logger().error("internal error", exc_info=error)
    lines = [line for _, line in syslog_lines[1:]] or stderr.getvalue().rstrip("\n").split("\n")
    assert [line for line in lines if not line.isprintable()] == []
    assert [True] * (len(lines) - 1) == [line.startswith("    ") for line in lines[1:]]
    assert "RuntimeError: a" in "\n".join(lines)


def test_control_characters_in_the_table_name_are_escaped(syslog_lines):
    log.start("info", "syslog", "a\x1b\0\ud800")
    assert syslog_lines[0][0] == "table-consul[a\\x1b\\x00\\ud800]"


def test_syslog_that_fails_is_ignored(syslog_lines, monkeypatch, capsys):
    def broken(*_):
        raise OSError("no log daemon")

    monkeypatch.setattr(syslog, "syslog", broken)
    log.start("info", "syslog", "t")
    logger().warning("hello")
    assert capsys.readouterr() == ("", "")
