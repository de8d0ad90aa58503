"""The environment variables of the consul command: CONSUL_HTTP_ADDR and others."""

from __future__ import annotations

import pytest

from table_consul import config
from tests.smtpd.configuration import (
    ABSOLUTE_PATH,
    ADDRESS_HINT,
    CERT_AND_KEY,
    HOST_NAME,
    SECRET,
    VARIABLES,
    VISIBLE_ASCII,
)

ENVIRONMENT = {
    "CONSUL_HTTP_ADDR": "https://c:8501",
    "CONSUL_HTTP_TOKEN": SECRET,
    "CONSUL_HTTP_TOKEN_FILE": "/t",
    "CONSUL_HTTP_SSL_VERIFY": "0",
    "CONSUL_CACERT": "/ca",
    "CONSUL_CLIENT_CERT": "/c",
    "CONSUL_CLIENT_KEY": "/k",
    "CONSUL_TLS_SERVER_NAME": "server.dc1.consul:8501",
    "CONSUL_NAMESPACE": "n",
    "CONSUL_PARTITION": "p",
}


def test_environment_applies_to_keys_missing_from_the_file(load_config):
    assert load_config(**ENVIRONMENT).consul == config.ConsulConfig(
        addresses=("https://c:8501",),
        token=SECRET,
        token_file="/t",
        ca_file="/ca",
        cert_file="/c",
        key_file="/k",
        tls_server_name="server.dc1.consul",
        tls_verify=False,
        namespace="n",
        partition="p",
    )


def test_file_overrides_the_environment(load_config):
    text = """
        [consul]
        address = "http://file:1"
        token_file = "/file"
        ca_path = "/file/"
        cert_file = "/file"
        key_file = "/file"
        tls_server_name = "file"
        tls_verify = true
        namespace = "file"
        partition = "file"
        datacenter = "file"
        consistency = "stale"
    """
    in_file = dict.fromkeys(("token_file", "ca_path", "cert_file", "key_file"), "/file")
    in_file |= dict.fromkeys(("tls_server_name", "namespace", "partition", "datacenter"), "file")
    expected = config.ConsulConfig(addresses=("http://file:1",), consistency="stale", **in_file)
    assert load_config(text, **ENVIRONMENT, CONSUL_HTTP_SSL="1", CONSUL_CAPATH="/env").consul == expected
    nonsense = dict.fromkeys(("CONSUL_HTTP_ADDR", "CONSUL_HTTP_SSL", "CONSUL_HTTP_SSL_VERIFY"), "nonsense")
    assert load_config(text, **(ENVIRONMENT | nonsense), CONSUL_CAPATH="/env").consul == expected


def test_environment_is_read_without_a_configuration_file(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "DEFAULT_PATH", str(tmp_path / "none"))
    assert config.load(None, {"CONSUL_HTTP_ADDR": "c:1"}).consul.addresses == ("http://c:1",)


@pytest.mark.parametrize(
    ("address", "ssl", "normal"),
    [
        ("", "", "http://127.0.0.1:8500"),
        ("", "true", "https://127.0.0.1:8500"),
        ("c:8500", "", "http://c:8500"),
        ("c:8500", "1", "https://c:8500"),
        ("c:8500", "F", "http://c:8500"),
        ("c", "", "http://c:80"),
        ("[::1]:8500", "", "http://[::1]:8500"),
        ("http://c:8500", "t", "https://c:8500"),
        ("https://c:8501", "0", "https://c:8501"),
        ("unix:///s", "", "unix:///s"),
    ],
)
def test_environment_address_is_read_as_by_the_consul_command(load_config, address, ssl, normal):
    assert load_config(CONSUL_HTTP_ADDR=address, CONSUL_HTTP_SSL=ssl).consul.addresses == (normal,)


def test_ca_file_overrides_the_ca_path_as_in_the_consul_command(load_config):
    consul = load_config(CONSUL_CACERT="/f", CONSUL_CAPATH="/p").consul
    assert (consul.ca_file, consul.ca_path) == ("/f", None)
    assert load_config(CONSUL_CAPATH="/p").consul.ca_path == "/p"


@pytest.mark.parametrize("text", ["1", "t", "T", "TRUE", "true", "True", "0", "f", "F", "FALSE", "false", "False"])
def test_booleans_of_the_environment_are_those_of_go(load_config, text):
    expected = text in {"1", "t", "T", "TRUE", "true", "True"}
    assert load_config(CONSUL_HTTP_SSL_VERIFY=text).consul.tls_verify is expected


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("CONSUL_HTTP_SSL_VERIFY", "no", "must be a boolean, not 'no' (use true or false)"),
        ("CONSUL_HTTP_ADDR", "http://[::1", f"invalid address 'http://[::1' {ADDRESS_HINT}"),
        ("CONSUL_CACERT", "ca.pem", ABSOLUTE_PATH),
        ("CONSUL_CACERT", "/ca/", "must not end in / or contain unprintable characters (remove them)"),
        ("CONSUL_CAPATH", "ca", ABSOLUTE_PATH),
        ("CONSUL_HTTP_TOKEN", "a b", VISIBLE_ASCII),
        ("CONSUL_HTTP_TOKEN_FILE", "token", ABSOLUTE_PATH),
        ("CONSUL_CLIENT_CERT", "/c", f"set without key_file {CERT_AND_KEY}"),
        ("CONSUL_CLIENT_KEY", "/k", f"set without cert_file {CERT_AND_KEY}"),
        ("CONSUL_TLS_SERVER_NAME", "a b", f"invalid host name 'a b' {HOST_NAME}"),
        ("CONSUL_NAMESPACE", "a b", VISIBLE_ASCII),
        ("CONSUL_PARTITION", "ä", VISIBLE_ASCII),
        ("CONSUL_HTTP_SSL", "yes", "must be a boolean, not 'yes' (use true or false)"),
    ],
)
def test_bad_variable_is_named(config_errors, variable, value, message):
    assert config_errors(**{variable: value}) == [f"environment: {variable}: {message}"]


def test_environment_rejects_a_file_address(config_errors):
    (line,) = config_errors(CONSUL_HTTP_ADDR="file:///x")
    assert line.startswith("environment: CONSUL_HTTP_ADDR: the consul command does not support file://")
    assert line.endswith("(set address in the configuration)")


def test_environment_rejects_tls_over_a_unix_socket(config_errors):
    (line,) = config_errors(CONSUL_HTTP_ADDR="unix:///s", CONSUL_HTTP_SSL="1")
    assert (
        line
        == "environment: CONSUL_HTTP_ADDR: the consul command does not support unix:// with TLS (unset CONSUL_HTTP_SSL)"
    )


def test_empty_variables_are_unset(load_config, config_file):
    assert load_config(**dict.fromkeys(VARIABLES, "")) == config.Config(path=str(config_file))


def test_environment_of_the_process_is_not_read(load_config, monkeypatch):
    monkeypatch.setenv("CONSUL_HTTP_ADDR", "c:1")
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", SECRET)
    assert load_config().consul == config.ConsulConfig()
