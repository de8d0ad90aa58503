from __future__ import annotations

import socket
import subprocess

import pytest

from table_consul import kv
from table_consul.config import ConsulConfig
from table_consul.sources.watch import MirrorSource
from tests.consul.clients import ROOT, config
from tests.consul.real import TABLE, fill
from tests.fake_consul import FakeConsul


@pytest.fixture
def version():
    """The version of the fake; tests of several versions parametrize it."""
    return "1.22"


@pytest.fixture
def fake(version):
    with FakeConsul(version=version) as server:
        server.put(ROOT, b"gilles")
        yield server


@pytest.fixture
def connect():
    clients = []

    def make(*addresses, limits=(), **options):
        clients.append(kv.Client(config(*addresses, **options)))
        vars(clients[-1]).update(limits)
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def client(fake, connect):
    return connect(fake.address, token="any")  # Consul reports hidden keys only to requests with a token.


@pytest.fixture
def named(monkeypatch):
    """Replaces 127.0.0.1 in an address by a host name that resolves to it."""
    real = socket.getaddrinfo

    def resolved(host, port, *args, flags=0, **kwargs):
        if host != "consul.test":
            return real(host, port, *args, flags=flags, **kwargs)
        if flags & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "not an address")
        return real("127.0.0.1", port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    return lambda address: address.replace("127.0.0.1", "consul.test")


@pytest.fixture(scope="session")
def authority(tmp_path_factory):
    """A folder with ca.pem, server.pem, client.pem and their keys, and leaf.pem, which the CA middle.pem has signed.

    The server is consul.example, and server.dc1.consul as Consul's agents call themselves.
    """
    folder = tmp_path_factory.mktemp("tls")
    key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"

    def openssl(arguments):
        subprocess.run(["openssl", *arguments.split()], cwd=folder, check=True, capture_output=True)

    try:
        openssl(f"req -x509 {key} -days 2 -keyout ca.key -out ca.pem -subj /CN=test-authority")
    except FileNotFoundError:
        pytest.skip("no openssl command: apt-get install openssl")
    (folder / "extensions").write_text(
        "subjectAltName=DNS:consul.example,DNS:server.dc1.consul\nextendedKeyUsage=serverAuth,clientAuth\n"
    )
    (folder / "middle.extensions").write_text("basicConstraints=critical,CA:TRUE\n")
    for name, issuer, extensions in (
        ("server", "ca", "extensions"),
        ("client", "ca", "extensions"),
        ("middle", "ca", "middle.extensions"),
        ("leaf", "middle", "extensions"),
    ):
        openssl(f"req {key} -keyout {name}.key -out {name}.csr -subj /CN={name}")
        openssl(
            f"x509 -req -in {name}.csr -CA {issuer}.pem -CAkey {issuer}.key -CAcreateserial -days 2"
            f" -extfile {extensions} -out {name}.pem"
        )
    openssl("rehash .")
    return folder


@pytest.fixture
def mirrored():
    made = []

    def make(address, table=TABLE, client=kv.Client, **options):
        settings = ConsulConfig(addresses=(address,), **options)
        made.append(MirrorSource(table, lambda: client(settings)))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def open_consul(consul):
    return fill(consul)


@pytest.fixture
def guarded(consul_with_acl):
    return fill(consul_with_acl)
