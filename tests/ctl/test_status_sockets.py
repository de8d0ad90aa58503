"""`table-consulctl status` with metrics on a port or a socket, and with other servers there."""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading
import time

import pytest

from table_consul.config import Config, MetricsConfig
from table_consul.ctl import scrape
from tests.ctl.published import FOLLOWING, configured, numbers, only_table, publish


class Stranger(http.server.BaseHTTPRequestHandler):
    answer = b"<html>hello</html>"
    status = 200

    def do_GET(self):
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def stranger():
    with http.server.HTTPServer(("127.0.0.1", 0), Stranger) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("code", "body", "remark"),
    [
        (200, b"<html>hello</html>", "not Prometheus metrics"),
        (404, b"", "returned status 404"),
        (
            200,
            numbers("domains").encode(),
            "contains only metrics of domains (name that table, or add {table} to the place)",
        ),
    ],
)
def test_other_server_at_the_port_is_unknown(tmp_path, run_status, stranger, monkeypatch, code, body, remark):
    monkeypatch.setattr(Stranger, "answer", body)
    monkeypatch.setattr(Stranger, "status", code)
    outcome = run_status(configured(tmp_path, metrics=f'listen = "{stranger}"'), "aliases", "--json")
    assert (outcome[0], only_table(outcome)["state"], remark in only_table(outcome)["remarks"][0]) == (
        2,
        "unknown",
        True,
    )


def test_port_without_listener_means_not_running(tmp_path, run_status):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{unused.getsockname()[1]}"
        outcome = run_status(configured(tmp_path, metrics=f'listen = "{listen}"'), "--json")
    assert (outcome[0], only_table(outcome)["state"]) == (1, "not running")


def test_socket_of_an_ended_process_is_reported_with_a_hint(tmp_path, run_status):
    with socket.socket(socket.AF_UNIX) as ended:
        ended.bind(f"{tmp_path}/aliases.sock")
    path = configured(tmp_path, metrics=f'listen = "unix://{tmp_path}/{{table}}.sock"')
    outcome = run_status(path, "aliases", "--json")
    (remark,) = only_table(outcome)["remarks"]
    assert (outcome[0], only_table(outcome)["state"]) == (1, "not running")
    hint = "(check that smtpd runs; remove the socket if the table is gone)"
    assert remark.endswith(f"aliases.sock: connection refused, so the process has ended {hint}")
    assert "connection refused, so" in run_status(path, "aliases", "--nagios")[1]


def test_new_text_file_of_a_process_whose_socket_is_refused_is_not_trusted(tmp_path, run_status):
    publish(tmp_path, **FOLLOWING)
    with socket.socket(socket.AF_UNIX) as ended:
        ended.bind(f"{tmp_path}/aliases.sock")
    lines = f'textfile = "{tmp_path}/{{table}}.prom"\nlisten = "unix://{tmp_path}/{{table}}.sock"'
    outcome = run_status(configured(tmp_path, metrics=lines), "aliases", "--json")
    assert (outcome[0], only_table(outcome)["state"]) == (1, "not running")


def test_missing_socket_is_reported_with_a_hint(tmp_path, run_status):
    path = configured(tmp_path, metrics=f'listen = "unix://{tmp_path}/{{table}}.sock"')
    (remark,) = only_table(run_status(path, "aliases", "--json"))["remarks"]
    assert remark.endswith("aliases.sock: no such file or directory (check that smtpd runs, and its log)")


def test_silent_listener_is_unknown_within_the_timeout():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        listen = f"127.0.0.1:{silent.getsockname()[1]}"
        found = scrape.status_of(Config(None, metrics=MetricsConfig(listen=listen)), "aliases", timeout=0.2)
    assert (found.state, found.remarks) == ("unknown", [f"{listen}: timed out"])


@pytest.mark.parametrize("beginning", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\n"])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_trickling_listener_is_unknown_within_the_timeout(tmp_path, beginning, family):
    address = ("127.0.0.1", 0) if family == socket.AF_INET else f"{tmp_path}/socket"
    ended = threading.Event()

    def trickle():
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(1000)
            connection.sendall(beginning)
            for _ in range(100):
                if ended.wait(0.05):
                    return
                connection.sendall(b"#: \n")

    with (
        socket.create_server(address, family=family) if family == socket.AF_INET else socket.socket(family) as listener
    ):
        if family == socket.AF_UNIX:
            listener.bind(address)
            listener.listen()
        name = listener.getsockname()
        listen = f"unix://{name}" if family == socket.AF_UNIX else f"127.0.0.1:{name[1]}"
        thread = threading.Thread(target=trickle)
        thread.start()
        start = time.monotonic()
        try:
            found = scrape.status_of(Config(None, metrics=MetricsConfig(listen=listen)), "aliases", timeout=0.3)
        finally:
            ended.set()
            thread.join()
    assert (found.state, found.remarks) == ("unknown", [f"{listen}: timed out"])
    assert time.monotonic() - start < 3


def test_endless_answer_is_unknown(tmp_path, run_status, stranger, monkeypatch):
    monkeypatch.setattr(Stranger, "answer", b"\n" * (scrape.SIZE_MAX + 1))
    outcome = run_status(configured(tmp_path, metrics=f'listen = "{stranger}"'), "--json")
    assert (outcome[0], "larger than 16 MiB" in only_table(outcome)["remarks"][0]) == (2, True)
