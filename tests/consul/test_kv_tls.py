from __future__ import annotations

import os
import ssl
import time

import pytest

from table_consul import connection
from table_consul.errors import SourceError, TooManyConnections, Unreachable
from table_consul.services import SERVICES, Table
from table_consul.sources.direct import DirectSource
from tests.consul.clients import GOOD, ROOT, Silent, failure
from tests.fake_consul import FakeConsul, stall, trickle


@pytest.fixture
def secure(authority):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "server.pem", authority / "server.key")
    with FakeConsul(tls=context) as server:
        server.put(ROOT, b"gilles")
        server.context = context
        yield server


def test_tls_with_a_private_authority_and_a_server_name(secure, connect, authority):
    for trust in ({"ca_file": str(authority / "ca.pem")}, {"ca_path": str(authority)}):
        client = connect(secure.address, tls_server_name="consul.example", **trust)
        secure.requests.clear()
        assert client.get(ROOT, timeout=2).value == b"gilles"
        assert len(client.list(b"consul/", timeout=2)) == 1
        assert len({request.connection for request in secure.requests}) == 1


def test_tls_trusts_an_intermediate_authority_alone_as_the_consul_command_does(secure, connect, authority):
    secure.context.load_cert_chain(authority / "leaf.pem", authority / "leaf.key")
    for name in ("middle.pem", "leaf.pem"):
        trust = {"tls_server_name": "consul.example", "ca_file": str(authority / name)}
        assert connect(secure.address, **trust).get(ROOT, timeout=2).value == b"gilles"
    error = failure(connect(secure.address, tls_server_name="consul.example", ca_file=str(authority / "client.pem")))
    assert "certificate verification failed" in str(error)


def test_tls_sends_the_server_name_it_verifies(secure, connect, authority):
    seen = []
    secure.context.sni_callback = lambda sock, name, context: seen.append(name)
    client = connect(secure.address, tls_server_name="consul.example", ca_file=str(authority / "ca.pem"))
    client.get(ROOT, timeout=2)
    assert seen == ["consul.example"]


def test_tls_rejects_an_unknown_authority_and_a_wrong_name(secure, connect, authority):
    for options in ({"tls_server_name": "consul.example"}, {"ca_file": str(authority / "ca.pem")}):
        error = failure(connect(secure.address, **options), timeout=2)
        assert isinstance(error, Unreachable)
        assert "certificate verification failed" in str(error)
    assert secure.requests == []


def test_tls_without_verification_accepts_any_certificate(secure, connect):
    assert connect(secure.address, tls_verify=False).get(ROOT, timeout=2).value == b"gilles"


def test_tls_with_a_client_certificate(secure, connect, authority):
    secure.context.verify_mode = ssl.CERT_REQUIRED
    secure.context.load_verify_locations(authority / "ca.pem")
    trust = {"tls_server_name": "consul.example", "ca_file": str(authority / "ca.pem")}
    assert str(failure(connect(secure.address, **trust), timeout=2)).endswith(
        ": client certificate missing or rejected: certificate required (check cert_file and key_file)"
    )
    own = {"cert_file": str(authority / "client.pem"), "key_file": str(authority / "client.key")}
    assert connect(secure.address, **trust, **own).get(ROOT, timeout=2).value == b"gilles"


def test_rejected_client_certificate_does_not_pass_for_too_many_connections(secure, connect, authority):
    """Consul closes the connection after its alert, often before the request is sent."""
    secure.context.verify_mode = ssl.CERT_REQUIRED
    secure.context.load_verify_locations(authority / "ca.pem")
    trust = {"tls_server_name": "consul.example", "ca_file": str(authority / "ca.pem"), "token": "x"}
    own = {"cert_file": str(authority / "leaf.pem"), "key_file": str(authority / "leaf.key")}
    for _ in range(50):
        error = failure(connect(secure.address, **trust, **own), timeout=2)
        assert str(error).endswith(": unknown ca (check cert_file and key_file)")
        assert not isinstance(error, TooManyConnections)


@pytest.mark.parametrize("option", ["ca_file", "cert_file"])
def test_unusable_tls_file_is_named(secure, connect, tmp_path, option):
    path = tmp_path / "none.pem"
    assert str(path) in str(failure(connect(secure.address, **{option: str(path)})))
    path.write_text("no certificate")
    assert str(path) in str(failure(connect(secure.address, **{option: str(path)})))


@pytest.mark.parametrize("option", ["ca_file", "cert_file", "key_file"])
def test_named_pipe_as_tls_file_does_not_block(secure, connect, authority, tmp_path, option):
    files = {name: str(authority / f"client.{end}") for name, end in (("cert_file", "pem"), ("key_file", "key"))}
    os.mkfifo(tmp_path / "pipe")
    error = failure(connect(secure.address, **{**files, option: str(tmp_path / "pipe")}))
    assert str(error).endswith(": a named pipe, not a file")


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", ["pipe", "missing/keys.log", "keys.log"])
def test_environment_discloses_no_session_keys_and_does_not_block(secure, connect, monkeypatch, tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / name))
    assert connect(secure.address, tls_verify=False).get(ROOT, timeout=2).value == b"gilles"
    assert not (tmp_path / "keys.log").exists()


def test_unusable_tls_file_is_parsed_once_a_version(secure, connect, authority, tmp_path, monkeypatch):
    parsed, honest = [], connection.tls_context
    monkeypatch.setattr(connection, "tls_context", lambda settings: (parsed.append(settings), honest(settings))[1])
    path = tmp_path / "ca.pem"
    client = connect(secure.address, tls_server_name="consul.example", ca_file=str(path))
    for text, error in (("no certificate", str(path)), ("none either", str(path))):
        path.write_text(text)
        assert {error in str(failure(client)) for _ in range(5)} == {True}
    assert len(parsed) == 2
    path.write_bytes((authority / "ca.pem").read_bytes())
    assert client.get(ROOT, timeout=2).value == b"gilles"


def test_tls_handshake_and_answer_end_at_the_deadline(secure, connect):
    with Silent() as dead:
        client = connect(dead.address.replace("http:", "https:"), tls_verify=False)
        assert isinstance(failure(client, timeout=0.3), Unreachable)
    client = connect(secure.address, tls_verify=False)
    for handler in (stall, trickle(GOOD)):
        secure.handle = handler
        assert isinstance(failure(client, timeout=0.4), Unreachable)


def test_plain_http_to_a_tls_port_and_tls_to_a_plain_one_are_errors(secure, fake, connect):
    failure(connect(secure.address.replace("https:", "http:")))
    error = failure(connect(fake.address.replace("http:", "https:"), tls_verify=False))
    assert str(error).endswith("the server did not speak TLS (should the address be http://?)")


def test_update_in_direct_mode_reads_the_tls_files_again(secure, connect, authority, tmp_path):
    trusted = tmp_path / "ca.pem"
    trusted.write_bytes((authority / "client.pem").read_bytes())
    direct = DirectSource(connect(secure.address, tls_server_name="consul.example", ca_file=str(trusted)))
    table = Table("consul", mode="direct")

    def lookup():
        return direct.entries(table, SERVICES["alias"], b"root", time.monotonic() + 2).lookup(b"root")

    with pytest.raises(SourceError, match="certificate verification failed"):
        lookup()
    trusted.write_bytes((authority / "ca.pem").read_bytes())
    direct.update()
    assert lookup() == b"gilles"


def test_reload_reads_the_tls_files_again(secure, connect, authority, tmp_path):
    trusted = tmp_path / "ca.pem"
    trusted.write_bytes((authority / "client.pem").read_bytes())
    client = connect(secure.address, tls_server_name="consul.example", ca_file=str(trusted))
    assert "certificate verification failed" in str(failure(client, timeout=2))
    trusted.write_bytes((authority / "ca.pem").read_bytes())
    failure(client, timeout=2)
    client.reload()
    assert client.get(ROOT, timeout=2).value == b"gilles"
