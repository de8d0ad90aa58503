"""Every way to connect to a real Consul: consistency, datacenters, TLS, Unix sockets."""

from __future__ import annotations

import shutil
import ssl
import tempfile
from pathlib import Path

import pytest

from table_consul.errors import SourceError, Unreachable
from tests.consul.real import agent_or_skip, fill, noticed, url
from tests.consul.watch.watching import ask, becomes
from tests.rig.consul import free_ports

pytestmark = pytest.mark.real


@pytest.mark.parametrize("consistency", ["default", "stale", "consistent"])
def test_every_consistency_sees_edits(open_consul, mirrored, consistency):
    source = mirrored(url(open_consul), consistency=consistency, datacenter="dc1")
    assert (ask(source), ask(source, b"nobody")) == (b"gilles", None)
    open_consul.kv_put("mail/aliases/alias/root", "eric")
    becomes(source, b"eric")


def test_unknown_datacenter_is_an_error(open_consul, mirrored):
    with pytest.raises(SourceError):
        ask(mirrored(url(open_consul), datacenter="elsewhere"), b"nobody")


@pytest.fixture(scope="module")
def secure(authority):
    """An HTTPS agent that requires a client certificate of the private authority."""
    (port,) = free_ports(1)
    hcl = (
        f'ports {{ https = {port} }}\nca_file = "{authority}/ca.pem"\ncert_file = "{authority}/server.pem"\n'
        f'key_file = "{authority}/server.key"\nverify_incoming_https = true\n'
    )
    with agent_or_skip(hcl=hcl) as agent:
        fill(agent)
        agent.https = f"https://127.0.0.1:{port}"
        yield agent


def tls_options(folder):
    """The settings of a client with the authority and the client certificate in this folder."""
    return {
        "ca_file": f"{folder}/ca.pem",
        "cert_file": f"{folder}/client.pem",
        "key_file": f"{folder}/client.key",
        "tls_server_name": "server.dc1.consul",
    }


def test_https_works_with_a_private_authority_a_client_certificate_and_a_server_name(secure, authority, mirrored):
    source = mirrored(secure.https, **tls_options(authority))
    assert (ask(source), ask(source, b"nobody")) == (b"gilles", None)
    secure.kv_put("mail/aliases/alias/new", "x")
    becomes(source, b"x", b"new")


@pytest.mark.parametrize("missing", ["ca_file", "cert_file", "tls_server_name"])
def test_https_without_one_of_them_is_an_error_with_the_reason(secure, authority, mirrored, missing):
    options = tls_options(authority)
    del options[missing]
    if missing == "cert_file":
        del options["key_file"]
    source = mirrored(secure.https, **options)
    becomes(source, Unreachable, b"nobody")
    assert not isinstance(source.watches[0].mirror.last_error, ssl.SSLError)


def test_certificates_replaced_on_disk_are_used_after_an_update(secure, authority, mirrored, tmp_path):
    for name in ("ca.pem", "client.pem", "client.key"):
        shutil.copy(authority / name, tmp_path)
    (tmp_path / "ca.pem").write_text((authority / "client.pem").read_text())
    source = mirrored(secure.https, **tls_options(tmp_path))
    becomes(source, Unreachable)
    shutil.copy(authority / "ca.pem", tmp_path / "ca.pem")
    source.update()
    becomes(source, b"gilles")


def test_unix_socket_of_the_agent_works(mirrored, tmp_path):
    folder = Path(tempfile.mkdtemp(prefix="tc-"))  # the path of a socket has at most 107 bytes
    try:
        with agent_or_skip(hcl=f'addresses {{ http = "127.0.0.1 unix://{folder}/http.sock" }}\n') as agent:
            fill(agent)
            source = mirrored(f"unix://{folder}/http.sock")
            assert (ask(source), ask(source, b"nobody")) == (b"gilles", None)
            agent.kv_put("mail/aliases/alias/root", "eric")
            becomes(source, b"eric")
            agent.kill()
            noticed(source, Unreachable)
            assert ask(source) == b"eric"
            agent.start()
            agent.kv_put("mail/aliases/alias/root", "robert")
            becomes(source, b"robert")
    finally:
        shutil.rmtree(folder)
