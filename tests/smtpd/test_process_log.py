"""The running program with a log that nobody reads still answers and ends."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import sys

import pytest

from tests.dialogue import Child, write_config, write_source
from tests.smtpd.process import ROOT, start_child

COMPLAINTS = 5000  # exceeds the capacity of a pipe, a socket and the queue of lines


def complain(child):
    """Make the program log ``COMPLAINTS`` lines and then answer."""
    child.handshake()
    for number in range(0, COMPLAINTS, 100):
        child.say(b"".join(b"hello %d %s\n" % (each, b"x" * 90) for each in range(number, number + 100)))
    return child.ask(ROOT % 1)


def test_standard_error_that_nobody_reads_delays_neither_answers_nor_the_end(tmp_path):
    with start_child(tmp_path) as child:
        assert complain(child) == b"lookup-result|00000001|found|gilles"
        assert child.end() == 0


def test_standard_error_read_late_reports_the_number_of_dropped_lines(tmp_path):
    with start_child(tmp_path) as child:
        complain(child)
        read = b""
        while not (found := re.search(rb"(\d+) log lines dropped", read)):
            read += os.read(child.process.stderr.fileno(), 65536)
        logged = read.count(b": WARNING: ") - 1
        assert logged + int(found[1]) == COMPLAINTS + 1  # and one bad entry
        assert child.end() == 0


def test_last_line_is_written_before_the_end(tmp_path):
    with start_child(tmp_path) as child:
        child.handshake()
        child.say(b"hello\n")
        assert child.end() == 0
        assert "WARNING: not a protocol line: 'hello'" in child.log()


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM], ids=["datagrams", "stream"])
def test_syslog_that_nobody_reads_delays_neither_handshake_nor_answers_nor_the_end(tmp_path, kind):
    if os.geteuid() != 0:
        pytest.skip("replacing /dev/log needs root: sudo make test")
    path = write_config(tmp_path, more='[log]\ntarget = "syslog"')
    dev = tmp_path / "dev"
    dev.mkdir()
    for name in ("null", "urandom"):
        os.mknod(dev / name, stat.S_IFCHR | 0o666, os.stat(f"/dev/{name}").st_rdev)
    with socket.socket(socket.AF_UNIX, kind) as log, contextlib.ExitStack() as clients:
        log.bind(str(dev / "log"))
        if kind == socket.SOCK_STREAM:
            log.listen(0)
            clients.enter_context(socket.socket(socket.AF_UNIX, kind)).connect(str(dev / "log"))
        command = ["unshare", "--mount", "sh", "-c", f'mount --bind "{dev}" /dev && exec "$@"', "sh"]
        with Child(str(path), command=[*command, sys.executable, "-m", "table_consul"]) as child:
            assert complain(child) == b"lookup-result|00000001|found|gilles"
            assert child.end() == 0


def test_20_000_bad_entries_log_a_few_dozen_lines(tmp_path):
    path = write_config(tmp_path)
    write_source(tmp_path, {f"aliases/alias/a{number}": b"|sh" for number in range(20_000)})
    with Child(str(path)) as child:
        child.handshake()
        assert child.ask(b"table|0.1|0|aliases|lookup|alias|00000001|nobody") == b"lookup-result|00000001|not-found"
        assert child.end() == 0
        warnings = [line for line in child.log().splitlines() if ": WARNING: " in line]
    assert len(warnings) < 50
    assert "more entries have a problem (list them: table-consulctl lint aliases)" in warnings[-1]
