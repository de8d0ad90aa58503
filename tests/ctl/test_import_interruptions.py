"""`table-consulctl import` with concurrent writers, outages, interruptions, and repeated runs."""

from __future__ import annotations

import errno
import json
import os
import pty
import signal
import subprocess
import sys

import click
import pytest

from table_consul.ctl import txn
from tests.control import START, control, finished, start
from tests.ctl.importing import alias_lines, entries, file, importer
from tests.dialogue import TIMEOUT_SECONDS
from tests.rig.waiting import wait_for


@pytest.fixture
def between(monkeypatch):
    """Call a function before transaction ``number``."""

    def put(number, happen):
        transact = txn.Store.transact
        count = 0

        def counted(self, changes, **options):
            nonlocal count
            count += 1
            if count == number:
                happen()
            return transact(self, changes, **options)

        monkeypatch.setattr(txn.Store, "transact", counted)

    return put


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_closed_output_interrupts_and_reports_progress(consul, tmp_path, more):
    path = file(tmp_path, alias_lines(100))
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as nobody:
        environ = {**os.environ, "CONSUL_HTTP_ADDR": consul.address}
        done = finished(start("import", "aliases", "alias", path, *more, stdout=nobody, env=environ))
    count = len(entries(consul))
    assert (done.status, f"{count} of 100 keys written" in done.said) == (2, True), done.said
    assert count == (100 if more else 0)


def test_concurrent_edit_is_kept_and_a_second_run_overwrites_it(consul, between):
    consul.kv_put("aliases/alias/root", "gilles")
    consul.kv_put("aliases/alias/gone", "x")

    def edit():
        consul.kv_put("aliases/alias/root", "by hand")
        consul.kv_put("aliases/alias/new", "by hand")
        consul.kv_put("aliases/alias/gone", "by hand")

    between(1, edit)
    text = b"root: eric\nnew: eric\nother: eric\n"
    done = importer(consul, "aliases", "alias", "-", "--prune", stdin=text)
    assert done.status == 2
    assert [line.partition(":")[0] for line in done.said.splitlines()] == [
        f"aliases/alias/{k}" for k in ("gone", "new", "root")
    ]
    assert done.text.endswith("1 written\n")
    assert entries(consul) == {"root": b"by hand", "new": b"by hand", "gone": b"by hand", "other": b"eric"}
    assert importer(consul, "aliases", "alias", "-", "--prune", stdin=text).status == 0
    assert entries(consul) == {"root": b"eric", "new": b"eric", "other": b"eric"}


ODD = ("u%20x", "u\u200ex", "a//b", "a/../b", "new\nline")


def test_conflict_on_a_key_that_no_url_can_name_affects_no_other(consul, between, tmp_path):
    consul.kv_txn({f"aliases/string/{key}": "old" for key in (*ODD, "root")})
    environ = {"CONSUL_HTTP_ADDR": consul.address}
    path = tmp_path / "export.json"
    assert control("export", "aliases", "string", path, "--format", "export", **environ).status == 0
    path.write_text(path.read_text().replace("b2xk", "bmV3"))
    between(1, lambda: consul.kv_txn({f"aliases/string/{key}": "by hand" for key in ODD}))
    done = control("import", "aliases", "string", path, **environ)
    assert (done.status, done.text.splitlines()[-1]) == (2, "1 written"), done.said
    assert done.said.count("changed in Consul since it was read") == len(ODD)
    assert consul.kv_get("aliases/string/root") == b"new"
    done = control("import", "aliases", "string", path, **environ)
    assert (done.status, done.text.splitlines()[-1]) == (0, "5 written"), done.said
    path.write_text("kept\n")
    done = control("import", "aliases", "string", path, "--prune", **environ)
    assert (done.status, consul.request("GET", "/v1/kv/?keys")) == (0, ["aliases/string/kept"]), done.said


def test_outage_is_reported_and_the_next_run_writes_the_rest(consul, between, monkeypatch):
    monkeypatch.setattr(txn, "RETRY_SECONDS", 0.5)
    between(2, consul.kill)
    done = importer(consul, "aliases", "alias", "-", stdin=alias_lines(200))
    assert (done.status, "interrupted: 64 of 200 keys written" in done.said) == (2, True), done.said
    assert "retrying: Consul at" in done.said
    consul.revive()
    assert len(entries(consul)) == 64
    again = importer(consul, "aliases", "alias", "-", stdin=alias_lines(200))
    assert (again.status, again.text.splitlines()[-2:]) == (
        0,
        ["136 to add, 0 to change, 0 to remove, 64 unchanged", "136 written"],
    )
    assert len(entries(consul)) == 200


def test_restart_of_consul_only_delays_the_import(consul, between):
    def restart():
        consul.kill()
        consul.start()

    between(2, restart)
    done = importer(consul, "aliases", "alias", "-", stdin=alias_lines(130))
    assert (done.status, done.text.splitlines()[-1]) == (0, "130 written"), done.said
    assert len(entries(consul)) == 130


def test_interrupt_reports_progress(consul, between):
    def interrupt():
        raise KeyboardInterrupt

    between(2, interrupt)
    done = importer(consul, "aliases", "alias", "-", stdin=alias_lines(100))
    assert (done.status, done.said.count("interrupted"), "64 of 100 keys written" in done.said) == (2, 2, True)
    assert len(entries(consul)) == 64


def test_killed_import_leaves_whole_transactions_and_can_be_repeated(consul, tmp_path):
    path = file(tmp_path, alias_lines(20_000))
    environ = {**os.environ, "CONSUL_HTTP_ADDR": consul.address}
    command = [sys.executable, "-c", START, "import", "aliases", "alias", str(path)]
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def begun():
        return consul.kv_get("aliases/alias/user00000") is not None

    try:
        wait_for(begun, TIMEOUT_SECONDS, lambda: "nothing is written")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    count = len(consul.request("GET", "/v1/kv/aliases/alias/?keys"))
    assert count % txn.OPERATIONS_MAX == 0
    assert 0 < count < 20_000
    assert importer(consul, "aliases", "alias", path).status == 0
    assert len(consul.request("GET", "/v1/kv/aliases/alias/?keys")) == 20_000


def test_json_report_is_written_on_an_interruption(consul, between, monkeypatch):
    monkeypatch.setattr(txn, "RETRY_SECONDS", 0.2)
    between(2, consul.kill)
    done = importer(consul, "aliases", "alias", "-", "--json", stdin=alias_lines(100))
    assert (done.status, json.loads(done.text)["written"]) == (2, 64)


@pytest.mark.parametrize(("seconds", "shown"), [(0.0, True), (1000.0, False)])
def test_progress_bar_of_a_long_write_fits_a_terminal_of_40_columns(consul, tmp_path, seconds, shown):
    path = file(tmp_path, alias_lines(1000))
    master, slave = pty.openpty()
    environ = {**os.environ, "CONSUL_HTTP_ADDR": consul.address, "COLUMNS": "40", "TERM": "xterm"}
    patient = f"from table_consul.ctl import main; main.PATIENCE_SECONDS = {seconds}; "
    process = subprocess.Popen(
        [sys.executable, "-c", patient + START, "import", "aliases", "alias", str(path)],
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=slave,
    )
    os.close(slave)
    seen = b""
    try:
        while chunk := os.read(master, 65536):
            seen += chunk
    except OSError:
        pass  # end of file on a terminal
    os.close(master)
    assert process.wait(TIMEOUT_SECONDS) == 0
    assert (b"100%" in seen, b"writing" in seen) == (shown, shown)
    lines = seen.replace(b"\x1b[?25l", b"").replace(b"\x1b[?25h", b"").replace(b"\n", b"\r").split(b"\r")
    assert [line for line in lines if len(line.decode()) > 40] == []


def test_interrupted_import_counts_a_single_key(consul, between, monkeypatch):
    monkeypatch.setattr(txn, "RETRY_SECONDS", 0.5)
    between(1, consul.kill)
    done = importer(consul, "aliases", "alias", "-", stdin=alias_lines(1))
    assert (done.status, "interrupted: 0 of 1 key written (" in done.said) == (2, True), done.said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_termination_is_reported_and_logged_as_an_interrupt(consul, between, monkeypatch, number):
    logged = []
    monkeypatch.setattr("syslog.syslog", lambda _priority, text: logged.append(text))
    former = signal.signal(number, lambda *_: None)  # without a handler the signal would end the tests
    between(2, lambda: signal.raise_signal(number))
    done = importer(consul, "aliases", "alias", "-", "--json", stdin=alias_lines(100))
    signal.signal(number, former)
    assert (done.status, "interrupted: 64 of 100 keys written" in done.said) == (2, True)
    assert json.loads(done.text)["written"] == len(entries(consul)) == 64
    assert [text.partition(": ")[2] for text in logged] == ["import aliases alias: 64 added, 0 changed, 0 removed"]


def test_json_report_is_written_after_the_terminal_has_been_closed(consul, between, monkeypatch):
    echo, former = click.echo, signal.signal(signal.SIGHUP, lambda *_: None)

    def closed(text, *, err=False):
        if err:
            raise OSError(errno.EIO, "Input/output error")
        echo(text)

    def close():
        monkeypatch.setattr(click, "echo", closed)
        signal.raise_signal(signal.SIGHUP)

    between(2, close)
    done = importer(consul, "aliases", "alias", "-", "--json", stdin=alias_lines(100))
    signal.signal(signal.SIGHUP, former)
    assert (done.status, json.loads(done.text)["written"]) == (2, 64)


def test_hangup_that_nohup_ignores_does_not_interrupt(consul, between):
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    between(2, lambda: signal.raise_signal(signal.SIGHUP))
    done = importer(consul, "aliases", "alias", "-", stdin=alias_lines(100))
    assert (done.status, signal.signal(signal.SIGHUP, former)) == (0, signal.SIG_IGN), done.said
