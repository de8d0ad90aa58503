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
def told(monkeypatch):
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


def test_lines_carry_the_name_of_the_table(stderr):
    log.start("info", "stderr", "aliases")
    logger().info("hello %s", "there")
    assert stderr.getvalue() == "table-consul[aliases]: INFO: hello there\n"


def test_before_the_name_of_the_table_is_known_lines_do_without(stderr):
    log.start("info", "stderr", "")
    logger().warning("hello")
    assert stderr.getvalue() == "table-consul: WARNING: hello\n"


@pytest.mark.parametrize(("level", "seen"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_a_level_hides_what_is_below_it(stderr, level, seen):
    log.start(level, "stderr", "t")
    for say in (logger().debug, logger().info, logger().warning, logger().error):
        say("x")
    assert seen == stderr.getvalue().count("\n")


def test_libraries_may_warn_but_never_tell_details_even_at_debug(stderr):
    log.start("debug", "stderr", "t")
    logging.getLogger("urllib3").debug("X-Consul-Token: secret")
    logging.getLogger("urllib3").warning("retrying")
    assert stderr.getvalue() == "table-consul[t]: WARNING: retrying\n"


def test_starting_again_replaces_what_was_before(stderr):
    log.start("info", "stderr", "")
    log.start("info", "stderr", "t")
    logger().info("once")
    assert stderr.getvalue() == "table-consul[t]: INFO: once\n"


def test_without_a_terminal_auto_is_syslog_with_facility_mail(told, stderr):
    log.start("info", "auto", "aliases")
    logger().info("hello")
    assert told == [("table-consul[aliases]", 0, syslog.LOG_MAIL), (syslog.LOG_INFO, "hello")]


def test_with_a_terminal_auto_is_that_terminal(told, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log.start("info", "auto", "aliases")
    assert told == []


@pytest.mark.parametrize(
    ("syslog_is_there", "path", "heard"),
    [
        (False, "err", True),
        (False, os.devnull, False),  # a daemonised smtpd, and syslog may come yet
        (True, "err", False),
    ],
)
def test_without_syslog_auto_is_stderr_if_that_leads_anywhere(
    told, monkeypatch, tmp_path, syslog_is_there, path, heard
):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os.path, "exists", lambda name: syslog_is_there and name == "/dev/log")
    with open(tmp_path / path, "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        log.start("info", "auto", "t")
        logger().info("hello")
        monkeypatch.undo()
    assert (told == []) is heard
    assert heard is False or (tmp_path / path).read_text() == "table-consul[t]: INFO: hello\n"


def test_without_standard_error_auto_is_syslog_and_stderr_is_silence(told, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    log.start("info", "stderr", "t")
    logger().info("nobody hears")
    log.start("info", "auto", "t")
    logger().info("hello")
    assert told[1:] == [(syslog.LOG_INFO, "hello")]


def test_each_level_has_its_priority(told):
    log.start("debug", "syslog", "t")
    for say in (logger().debug, logger().info, logger().warning, logger().error, logger().critical):
        say("x")
    priorities = [syslog.LOG_DEBUG, syslog.LOG_INFO, syslog.LOG_WARNING, syslog.LOG_ERR, syslog.LOG_ERR]
    assert priorities == [priority for priority, _ in told[1:]]


NASTY = ["a\x1b[31mb", "a\nforged line", "a\rb", "a\0b", "a\u202eb", "a\ud800b", "a\x9bb", "a\u2028b"]


@pytest.mark.parametrize("target", ["stderr", "syslog"])
@pytest.mark.parametrize("nasty", NASTY)
def test_control_characters_in_messages_are_made_visible(told, stderr, target, nasty):
    log.start("info", target, "t")
    logger().warning("%s", nasty)
    lines = [line for _, line in told[1:]] or stderr.getvalue().rstrip("\n").split("\n")
    assert (len(lines), lines[0].isprintable()) == (1, True)


@pytest.mark.parametrize("target", ["stderr", "syslog"])
@pytest.mark.parametrize("nasty", NASTY)
def test_control_characters_in_a_traceback_are_made_visible(told, stderr, target, nasty):
    log.start("info", target, "t")
    try:
        raise RuntimeError(nasty)
    except RuntimeError as error:
        logger().error("internal error", exc_info=error)
    lines = [line for _, line in told[1:]] or stderr.getvalue().rstrip("\n").split("\n")
    assert [line for line in lines if not line.isprintable()] == []
    assert [True] * (len(lines) - 1) == [line.startswith("    ") for line in lines[1:]]
    assert "RuntimeError: a" in "\n".join(lines)


def test_control_characters_in_the_name_of_the_table_are_made_visible(told):
    log.start("info", "syslog", "a\x1b\0\ud800")
    assert told[0][0] == "table-consul[a\\x1b\\x00\\ud800]"


def test_a_log_that_cannot_be_written_stops_nothing(told, monkeypatch, capsys):
    def broken(*_):
        raise OSError("no log daemon")

    monkeypatch.setattr(syslog, "syslog", broken)
    log.start("info", "syslog", "t")
    logger().warning("hello")
    assert capsys.readouterr() == ("", "")
