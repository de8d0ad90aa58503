"""Publishing metrics: the HTTP server on a port or Unix socket, and the text file."""

from __future__ import annotations

import contextlib
import socket
import stat
import threading
from types import SimpleNamespace

import pytest

from table_consul import __version__
from table_consul.metrics import CONNECTIONS_MAX, Exporter, Server
from tests.smtpd.metrics import BUILD_INFO, connect, fake_tables, read_textfile, scrape


@pytest.fixture
def exporter():
    """A function that makes an exporter for some tables; called without a thread, it exports once."""
    made = []

    def make(tables, table="aliases"):
        exporter = Exporter(table, tables)
        made.append((exporter, tables))
        return exporter.export

    yield make
    for exporter, tables in made:
        tables.config.metrics = SimpleNamespace(textfile=None, listen=None)
        exporter.export()


@pytest.fixture
def serve():
    """A function that serves metrics at this address."""
    servers = []

    def start(listen):
        exporter = Exporter("aliases", fake_tables())
        servers.append(Server(str(listen), exporter.text))

    yield start
    for server in servers:
        server.stop()


def free_port(family=socket.AF_INET, host="127.0.0.1"):
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_server_listens_on_a_loopback_port(serve, family, host):
    try:
        port = free_port(family, host)
    except OSError:
        pytest.skip(f"this machine has no {host}: enable IPv6 on its loopback interface")
    listen = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    serve(listen)
    assert scrape(listen)["table_consul_build_info"] == BUILD_INFO


def test_socket_is_open_to_all_users_and_replaces_that_of_a_dead_process(tmp_path, serve):
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    serve(f"unix://{path}")
    assert scrape(path)["table_consul_build_info"] == BUILD_INFO
    assert stat.S_IMODE(path.stat().st_mode) == 0o666


def test_file_that_is_not_a_socket_is_left_alone(tmp_path, serve):
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(OSError, match="in use"):
        serve(f"unix://{path}")
    assert path.read_text() == "data"


def test_socket_in_use_is_left_alone_even_if_its_queue_is_full(tmp_path, serve):
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as taken, contextlib.ExitStack() as clients:
        taken.bind(str(path))
        taken.listen(0)
        clients.enter_context(connect(path))
        with pytest.raises(OSError, match="in use"):
            serve(f"unix://{path}")
        assert path.exists()


def test_silent_clients_do_not_block_a_scrape(tmp_path, serve):
    path = tmp_path / "sock"
    serve(f"unix://{path}")
    with contextlib.ExitStack() as clients:
        for sent in (b"", b"GET", b"GET / HTTP/1.0\r\n"):
            clients.enter_context(connect(path)).sendall(sent)
        assert scrape(path)["table_consul_build_info"] == BUILD_INFO


@contextlib.contextmanager
def trickling(path):
    """A client of this Unix socket that sends its request byte by byte, fast enough that no read times out."""
    ended = threading.Event()
    with connect(path) as client:

        def trickle():
            with contextlib.suppress(OSError):
                while not ended.wait(0.01):
                    client.sendall(b"x")

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def test_trickling_client_stops_neither_a_scrape_nor_the_text_file_after_an_update(tmp_path, exporter):
    tables = fake_tables(listen=f"unix://{tmp_path}/old", textfile=tmp_path / "{table}.prom")
    export = exporter(tables)
    export()
    with trickling(tmp_path / "old"):
        assert scrape(tmp_path / "old")["table_consul_build_info"] == BUILD_INFO
        tables.config.metrics.listen = f"unix://{tmp_path}/new"
        for _ in range(2):
            (tmp_path / "aliases.prom").unlink()
            export()
            assert read_textfile(tmp_path / "aliases.prom")["table_consul_build_info"] == BUILD_INFO
        assert scrape(tmp_path / "new")["table_consul_build_info"] == BUILD_INFO


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.0\r\n"])
def test_silent_client_is_disconnected_in_time(tmp_path, serve, sent, monkeypatch):
    monkeypatch.setattr("table_consul.metrics._Handler.timeout", 0.1)
    path = tmp_path / "sock"
    serve(f"unix://{path}")
    with connect(path) as client:
        client.sendall(sent)
        assert client.recv(1) == b""


def test_oldest_connection_is_closed_when_there_are_too_many(tmp_path, serve):
    path = tmp_path / "sock"
    serve(f"unix://{path}")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(path)) for _ in range(CONNECTIONS_MAX + 1)]
        assert clients[0].recv(1) == b""
        assert scrape(path)["table_consul_build_info"] == BUILD_INFO
        assert clients[1].recv(1) == b""


def test_exporter_moves_to_the_address_of_a_new_configuration(tmp_path, exporter):
    old, new = tmp_path / "{table}.old", tmp_path / "{table}.new"
    tables = fake_tables(listen=f"unix://{old}")
    export = exporter(tables)
    export()
    assert scrape(tmp_path / "aliases.old")["table_consul_build_info"] == BUILD_INFO
    tables.config.metrics.listen = f"unix://{new}"
    with connect(tmp_path / "aliases.old") as slow:
        export()
        assert scrape(tmp_path / "aliases.new")["table_consul_build_info"] == BUILD_INFO
        with contextlib.suppress(ConnectionResetError):  # the server had not served this client yet
            assert slow.recv(1) == b""
    assert not (tmp_path / "aliases.old").exists()


def test_address_that_another_process_serves_is_logged_once(tmp_path, exporter, caplog):
    path = tmp_path / "sock"
    export_first = exporter(fake_tables(listen=f"unix://{path}"))
    export_second = exporter(fake_tables(listen=f"unix://{path}", textfile=tmp_path / "{table}.prom"), "second")
    export_first()
    for _ in range(3):
        (tmp_path / "second.prom").unlink(missing_ok=True)
        export_second()
        assert read_textfile(tmp_path / "second.prom")["table_consul_build_info"] == {("second", __version__): 1}
    assert caplog.text.count(f"metrics.listen unix://{path}: Address already in use; retrying") == 1
    assert scrape(path)["table_consul_build_info"] == BUILD_INFO


def test_port_in_use_is_served_once_it_is_free(exporter, caplog):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        export = exporter(fake_tables(listen=listen))
        export()
        assert "Address already in use; retrying every 15 s" in caplog.text
    export()
    assert scrape(listen)["table_consul_build_info"] == BUILD_INFO
    assert f"metrics.listen {listen}: recovered after" in caplog.text


def test_unwritable_file_is_logged_once_and_written_later(tmp_path, exporter, caplog):
    folder = tmp_path / "later"
    export = exporter(fake_tables(textfile=folder / "{table}.prom"))
    for _ in range(20):
        export()
    folder.mkdir()
    export()
    assert caplog.text.count("No such file or directory") == 1
    assert caplog.text.count("recovered after") == 1
    assert read_textfile(folder / "aliases.prom")["table_consul_build_info"] == BUILD_INFO
