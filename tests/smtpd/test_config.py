from __future__ import annotations

import subprocess
import sys

import pytest

from table_consul import config, services
from table_consul.errors import ConfigError
from tests.smtpd.configuration import ABSOLUTE_PATH, ADDRESS_HINT

# ---- defaults and overrides ----


def test_empty_file_is_all_defaults(load_config, config_file):
    loaded = load_config()
    assert loaded == config.Config(path=str(config_file))
    assert loaded.consul == config.ConsulConfig()
    assert loaded.consul.addresses == ("http://127.0.0.1:8500",)
    assert loaded.defaults.name == "consul"
    assert loaded.table("aliases") == services.Table("aliases")


def test_table_section_overrides_single_keys_of_the_defaults(load_config):
    loaded = load_config("""
        [defaults]
        prefix = "mail"
        deadline = 1
        allow_root = true
        paths = { alias = "a/b", domain = "c" }
        [tables.outbound]
        deadline = 0.5
        allow_root = false
        paths.domain = "d"
    """)
    table = loaded.table("outbound")
    assert (table.name, table.prefix, table.deadline, table.allow_root) == ("outbound", "mail", 0.5, False)
    assert dict(table.paths) == {"alias": "a/b", "domain": "d"}
    assert (loaded.table("x").deadline, loaded.table("x").allow_root) == (1.0, True)
    assert dict(loaded.table("x").paths) == {"alias": "a/b", "domain": "c"}
    assert list(loaded.tables) == ["outbound"]


def test_whole_number_of_seconds_is_a_float(load_config):
    table = load_config("[defaults]\ndeadline = 3\nmax_age = 60").table("x")
    assert [(type(value), value) for value in (table.deadline, table.max_age)] == [(float, 3.0), (float, 60.0)]


def test_services_are_in_the_order_of_smtpd_without_repetitions(load_config):
    loaded = load_config('[defaults]\nservices = ["regex", "auth", "alias", "regex"]')
    assert loaded.table("x").services == ("alias", "regex", "auth")


def test_auth_is_served_only_when_configured(load_config):
    assert "auth" not in load_config().table("x").services
    assert load_config('[defaults]\nservices = ["auth"]').table("x").services == ("auth",)


def test_snapshot_path_contains_the_name_of_the_table(load_config):
    loaded = load_config('[defaults]\nsnapshot = "/var/lib/{table}.json"\n[tables.b]\nsnapshot = "/var/{table}/b"')
    assert loaded.table("a").snapshot == "/var/lib/a.json"
    assert loaded.table("b").snapshot == "/var/b/b"


@pytest.mark.parametrize(
    ("written", "normal"),
    [("", ""), ("/", ""), ("mail", "mail"), ("/mail/", "mail"), ("mail/smtpd/", "mail/smtpd"), ("größe", "größe")],
)
def test_slash_at_either_end_of_a_prefix_is_removed(load_config, written, normal):
    assert load_config(f'[defaults]\nprefix = "{written}"').table("x").prefix == normal


def test_log_and_metrics_sections_are_read(load_config):
    loaded = load_config("""
        [log]
        level = "debug"
        target = "stderr"
        [metrics]
        textfile = "/var/lib/{table}.prom"
        listen = "[::1]:9100"
    """)
    assert loaded.log == config.LogConfig("debug", "stderr")
    assert loaded.metrics == config.MetricsConfig("/var/lib/{table}.prom", "[::1]:9100")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/", "a|b", "|", "a\nb", "a\rb", "a\0b", "a\udc80"])
def test_invalid_table_name_is_refused(load_config, name):
    with pytest.raises(ConfigError, match=r"^invalid table name "):
        load_config().table(name)


# ---- addresses ----


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ("http://127.0.0.1:8500", "http://127.0.0.1:8500"),
        ("http://127.0.0.1:8500/", "http://127.0.0.1:8500"),
        ("https://Consul.Example:8501", "https://consul.example:8501"),
        ("http://consul", "http://consul:80"),
        ("https://consul", "https://consul:443"),
        ("https://[2001:DB8:0::1]:8501", "https://[2001:db8::1]:8501"),
        ("http://[::1]", "http://[::1]:80"),
        ("unix:///run/consul.sock", "unix:///run/consul.sock"),
        ("file:///srv/export.json", "file:///srv/export.json"),
    ],
)
def test_address_is_normalized(load_config, written, normal):
    assert load_config(f'[consul]\naddress = "{written}"').consul.addresses == (normal,)


def test_addresses_keep_their_order_without_repetitions(load_config):
    addresses = load_config(
        '[consul]\naddress = ["http://b:1", "http://a:1/", "http://b:1", "unix:///s"]'
    ).consul.addresses
    assert addresses == ("http://b:1", "http://a:1", "unix:///s")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("127.0.0.1:8500", f"invalid address '127.0.0.1:8500' {ADDRESS_HINT}"),
        ("", f"invalid address '' {ADDRESS_HINT}"),
        ("tcp://consul:8500", f"invalid address 'tcp://consul:8500' {ADDRESS_HINT}"),
        ("HTTP://consul:8500", f"invalid address 'HTTP://consul:8500' {ADDRESS_HINT}"),
        ("http://", f"invalid address 'http://' {ADDRESS_HINT}"),
        ("http://c/v1", f"invalid address 'http://c/v1' {ADDRESS_HINT}"),
        ("http://a b", f"invalid address 'http://a b' {ADDRESS_HINT}"),
        ("http://a..b", f"invalid address 'http://a..b' {ADDRESS_HINT}"),
        ("http://c:x", f"invalid address 'http://c:x' {ADDRESS_HINT}"),
        ("http://c:0", f"invalid address 'http://c:0' {ADDRESS_HINT}"),
        ("http://c:65536", f"invalid address 'http://c:65536' {ADDRESS_HINT}"),
        ("http://[::g]:1", f"invalid address 'http://[::g]:1' {ADDRESS_HINT}"),
        ("http://[:::]:1", f"invalid address 'http://[:::]:1' {ADDRESS_HINT}"),
        ("unix://run/s", ABSOLUTE_PATH),
        ("file://export.json", ABSOLUTE_PATH),
    ],
)
def test_bad_address_is_named(config_errors, written, message):
    assert config_errors(f'[consul]\naddress = "{written}"') == [f"consul.address: {message}"]


def test_file_address_cannot_be_combined_with_servers(config_errors):
    (line,) = config_errors('[consul]\naddress = ["http://c:1", "file:///x"]')
    assert line == "consul.address: file:// cannot be combined with other addresses (remove it or the others)"


def test_empty_list_of_addresses_is_refused(config_errors):
    hint = '(try: address = ["http://127.0.0.1:8500"])'
    message = f"consul.address: must be an address or a list of addresses {hint}"
    assert config_errors("[consul]\naddress = []") == [message]


# ---- imports ----


def test_import_loads_no_module_that_only_errors_or_networks_need():
    code = "import sys; before = set(sys.modules); import table_consul.config; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    heavy = {"urllib", "urllib.parse", "ipaddress", "difflib", "pathlib", "socket", "ssl", "pwd", "grp"}
    assert (heavy | {"consul", "requests"}) & set(done.stdout.split()) == set()
