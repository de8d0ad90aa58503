from __future__ import annotations

import os

import pytest

from table_consul.errors import Forbidden, SourceError
from tests.consul.clients import ROOT, TRUE, each_version, failure
from tests.fake_consul import Answer

# Token, parameters, environment.


@each_version
def test_configured_token_is_sent_in_its_header_only(fake, connect):
    fake.token = "s3cret"
    assert connect(fake.address, token="s3cret").get(ROOT, timeout=1).value == b"gilles"
    assert fake.requests[-1].headers["x-consul-token"] == "s3cret"
    assert "s3cret" not in fake.requests[-1].target


def test_without_a_token_none_is_sent(connect, fake):
    connect(fake.address).get(ROOT, timeout=1)
    assert "x-consul-token" not in fake.requests[-1].headers


def test_echoed_token_is_not_in_the_message(fake, connect):
    fake.handle = lambda request: Answer(403, {}, b"no such token: s3cret")
    assert "s3cret" not in str(failure(connect(fake.address, token="s3cret")))


def write(path, text):
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.rename(path)


@each_version
def test_token_file_takes_precedence_and_is_read_again_when_it_changes(fake, connect, tmp_path):
    path = tmp_path / "token"
    path.write_text("first \r\n\n")
    fake.token = "first"
    client = connect(fake.address, token="other", token_file=str(path))
    assert client.get(ROOT, timeout=1).value == b"gilles"
    write(path, "second")
    fake.token = "second"
    assert client.get(ROOT, timeout=1).value == b"gilles"
    assert [request.headers["x-consul-token"] for request in fake.requests] == ["first", "second"]


@each_version
def test_403_reads_the_token_file_again_and_repeats_the_read(fake, connect, tmp_path):
    path = tmp_path / "token"
    path.write_text("first")
    stamp = path.stat()
    fake.token = "first"
    client = connect(fake.address, token_file=str(path))
    client.get(ROOT, timeout=1)
    path.write_text("other")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    fake.token = "other"
    assert client.get(ROOT, timeout=1).value == b"gilles"


@each_version
def test_403_with_an_unchanged_token_file_does_not_repeat_the_read(fake, connect, tmp_path):
    path = tmp_path / "token"
    path.write_text("wrong")
    fake.token = "right"
    assert isinstance(failure(connect(fake.address, token_file=str(path))), Forbidden)
    assert len(fake.requests) == 1


def test_unreadable_token_file_is_an_error_until_it_is_readable(fake, connect, tmp_path):
    path = tmp_path / "token"
    client = connect(fake.address, token_file=str(path))
    assert str(path) in str(failure(client))
    with pytest.raises(SourceError, match="token"):
        client.reload()
    path.write_text("\n")
    assert "empty" in str(failure(client))
    assert fake.requests == []
    path.write_text("t")
    assert client.get(ROOT, timeout=1).value == b"gilles"
    client.reload()


@pytest.mark.parametrize("text", ["two\nlines", "sp ace", "t\u00f6ken", "nul\0"])
def test_token_invalid_in_a_header_is_refused_and_not_shown(fake, connect, tmp_path, text):
    path = tmp_path / "token"
    path.write_text(text)
    assert text[:3] not in str(failure(connect(fake.address, token_file=str(path)))).replace(str(path), "")
    with pytest.raises(SourceError):
        connect(fake.address, token=text)


def test_datacenter_namespace_partition_and_consistency_are_parameters(fake, connect):
    fake.handle = lambda request: Answer(404, TRUE)
    client = connect(fake.address, datacenter="dc 1&x", namespace="ns", partition="p", consistency="stale")
    client.get(ROOT, timeout=1)
    scope = {"dc": "dc 1&x", "ns": "ns", "partition": "p"}
    expected = scope | {"stale": "1"}
    client.get(ROOT, timeout=1, proven=True)
    assert [request.params for request in fake.requests] == [expected, scope | {"consistent": "1"}]
    client.list(b"consul/", timeout=1)
    assert fake.requests[-1].params == expected | {"recurse": "1"}
    connect(fake.address, consistency="consistent").visible_keys(b"consul/", timeout=1)
    assert fake.requests[-1].params == {"consistent": "1", "keys": "True"}


@pytest.mark.parametrize("address", ["http://[::1]:1", "unix:///none", "127.0.0.1:1", "a:b:c:d", "https://x:1"])
def test_environment_is_ignored(fake, connect, monkeypatch, tmp_path, address):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login a password b\n")
    for name, value in {
        "CONSUL_HTTP_ADDR": address,
        "CONSUL_HTTP_TOKEN": "environment",
        "CONSUL_HTTP_SSL": "true",
        "CONSUL_HTTP_SSL_VERIFY": "1",
        "HTTP_PROXY": "http://127.0.0.1:1",
        "ALL_PROXY": "http://127.0.0.1:1",
        "NETRC": str(netrc),
    }.items():
        monkeypatch.setenv(name, value)
    assert connect(fake.address).get(ROOT, timeout=1).value == b"gilles"
    assert not {"x-consul-token", "authorization"}.intersection(fake.requests[-1].headers)


@pytest.mark.timeout(10)
def test_token_file_that_is_a_named_pipe_is_an_error(fake, connect, tmp_path):
    os.mkfifo(tmp_path / "token")
    assert "named pipe" in str(failure(connect(fake.address, token_file=str(tmp_path / "token"))))
