from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from table_consul import check, config, files, services
from table_consul.errors import ConfigError

VARIABLES = ["CONSUL_HTTP_ADDR", "CONSUL_HTTP_SSL", *(name for group in config.VARIABLES for name in group.values())]
SECRET = "b1gs33cr3t-0f-0pa1"


@pytest.fixture
def file(tmp_path):
    return tmp_path / "table-consul.toml"


@pytest.fixture
def load(file):
    def load(text: str | bytes = "", **environ: str) -> config.Config:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return config.load(str(file), environ)

    return load


@pytest.fixture
def refusal(file, load):
    """All lines of the refusal, without the path of the file."""

    def refusal(text: str | bytes = "", **environ: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(text, **environ)
        lines = [str(caught.value), *getattr(caught.value, "__notes__", [])]
        assert not any("\n" in line for line in lines)
        return [line.removeprefix(f"{file}: ") for line in lines]

    return refusal


@pytest.fixture
def nobody():
    if os.geteuid() != 0:
        pytest.skip("what another user cannot read is tried as root (sudo make test)")

    def run(check: str, *arguments: str) -> str:
        """What the check prints, run as a user that owns nothing."""
        begin = "import grp, os, pwd, sys; from table_consul import check, config"
        code = f"{begin}; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n{check}"
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        return done.stdout

    return run


@pytest.fixture
def open_path(tmp_path):
    """A folder that every user can enter."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder == Path("/tmp"):
            break
        folder.chmod(0o755)
    return tmp_path


# ---- what is silent, and what overrides what ----


def test_empty_file_is_all_defaults(load, file):
    loaded = load()
    assert loaded == config.Config(path=str(file))
    assert loaded.consul == config.ConsulConfig()
    assert loaded.consul.addresses == ("http://127.0.0.1:8500",)
    assert loaded.defaults.name == "consul"
    assert loaded.table("aliases") == services.Table("aliases")


def test_missing_default_file_is_all_defaults(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "DEFAULT_PATH", str(tmp_path / "none" / "table-consul.toml"))
    assert config.load(None, {}) == config.Config(path=None)


def test_default_path_below_a_file_is_a_missing_file(tmp_path, monkeypatch):
    (tmp_path / "mail").write_text("")
    monkeypatch.setattr(config, "DEFAULT_PATH", str(tmp_path / "mail" / "table-consul.toml"))
    assert config.load(None, {}).path is None


def test_default_file_is_read_when_it_is_there(file, monkeypatch):
    file.write_text('[defaults]\ntable = "mail"')
    monkeypatch.setattr(config, "DEFAULT_PATH", str(file))
    loaded = config.load(None, {})
    assert (loaded.path, loaded.defaults.name) == (str(file), "mail")


def test_default_file_that_is_a_folder_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "DEFAULT_PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="is a folder"):
        config.load(None, {})


def test_table_section_overrides_single_keys_of_the_defaults(load):
    loaded = load("""
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


def test_a_whole_number_of_seconds_is_a_float(load):
    table = load("[defaults]\ndeadline = 3\nmax_age = 60").table("x")
    assert [(type(value), value) for value in (table.deadline, table.max_age)] == [(float, 3.0), (float, 60.0)]


def test_services_are_in_the_order_of_smtpd_and_named_once(load):
    loaded = load('[defaults]\nservices = ["regex", "auth", "alias", "regex"]')
    assert loaded.table("x").services == ("alias", "regex", "auth")


def test_auth_is_served_only_when_asked_for(load):
    assert "auth" not in load().table("x").services
    assert load('[defaults]\nservices = ["auth"]').table("x").services == ("auth",)


def test_snapshot_holds_the_name_of_the_table(load):
    loaded = load('[defaults]\nsnapshot = "/var/lib/{table}.json"\n[tables.b]\nsnapshot = "/var/{table}/b"')
    assert loaded.table("a").snapshot == "/var/lib/a.json"
    assert loaded.table("b").snapshot == "/var/b/b"


@pytest.mark.parametrize(
    ("written", "normal"),
    [("", ""), ("/", ""), ("mail", "mail"), ("/mail/", "mail"), ("mail/smtpd/", "mail/smtpd"), ("größe", "größe")],
)
def test_prefix_loses_a_slash_at_either_end(load, written, normal):
    assert load(f'[defaults]\nprefix = "{written}"').table("x").prefix == normal


def test_log_and_metrics_are_taken(load):
    loaded = load("""
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
def test_table_name_that_no_folder_or_line_can_hold_is_refused(load, name):
    with pytest.raises(ConfigError, match=r"^invalid table name "):
        load().table(name)


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
def test_address_takes_its_normal_form(load, written, normal):
    assert load(f'[consul]\naddress = "{written}"').consul.addresses == (normal,)


def test_addresses_keep_their_order_and_lose_repetitions(load):
    addresses = load('[consul]\naddress = ["http://b:1", "http://a:1/", "http://b:1", "unix:///s"]').consul.addresses
    assert addresses == ("http://b:1", "http://a:1", "unix:///s")


USE = "(use http://HOST:PORT, https://HOST:PORT, unix:///PATH or file:///PATH)"
PATH = "must be an absolute path (smtpd starts tables in /)"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("127.0.0.1:8500", f"invalid address '127.0.0.1:8500' {USE}"),
        ("", f"invalid address '' {USE}"),
        ("tcp://consul:8500", f"invalid address 'tcp://consul:8500' {USE}"),
        ("HTTP://consul:8500", f"invalid address 'HTTP://consul:8500' {USE}"),
        ("http://", f"invalid address 'http://' {USE}"),
        ("http://c/v1", f"invalid address 'http://c/v1' {USE}"),
        ("http://a b", f"invalid address 'http://a b' {USE}"),
        ("http://a..b", f"invalid address 'http://a..b' {USE}"),
        ("http://c:x", f"invalid address 'http://c:x' {USE}"),
        ("http://c:0", f"invalid address 'http://c:0' {USE}"),
        ("http://c:65536", f"invalid address 'http://c:65536' {USE}"),
        ("http://[::g]:1", f"invalid address 'http://[::g]:1' {USE}"),
        ("http://[:::]:1", f"invalid address 'http://[:::]:1' {USE}"),
        ("unix://run/s", PATH),
        ("file://export.json", PATH),
    ],
)
def test_bad_address_is_named(refusal, written, message):
    assert refusal(f'[consul]\naddress = "{written}"') == [f"consul.address: {message}"]


def test_file_address_cannot_be_combined_with_servers(refusal):
    (line,) = refusal('[consul]\naddress = ["http://c:1", "file:///x"]')
    assert line == "consul.address: file:// cannot be combined with other addresses"


def test_empty_list_of_addresses_is_refused(refusal):
    assert refusal("[consul]\naddress = []") == ["consul.address: must be an address or a list of addresses"]


# ---- the environment of the consul command ----


def test_environment_counts_where_the_file_is_silent(load):
    consul = load(
        CONSUL_HTTP_ADDR="https://c:8501",
        CONSUL_HTTP_TOKEN=SECRET,
        CONSUL_HTTP_TOKEN_FILE="/t",
        CONSUL_HTTP_SSL_VERIFY="0",
        CONSUL_CACERT="/ca",
        CONSUL_CLIENT_CERT="/c",
        CONSUL_CLIENT_KEY="/k",
        CONSUL_TLS_SERVER_NAME="server.dc1.consul:8501",
        CONSUL_NAMESPACE="n",
        CONSUL_PARTITION="p",
    ).consul
    assert consul == config.ConsulConfig(
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


def test_file_beats_the_environment(load):
    consul = load(
        """
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
        """,
        CONSUL_HTTP_ADDR="nonsense://",
        CONSUL_HTTP_SSL="nonsense",
        CONSUL_HTTP_SSL_VERIFY="nonsense",
        CONSUL_HTTP_TOKEN=SECRET,
        CONSUL_HTTP_TOKEN_FILE="/env",
        CONSUL_CACERT="/env",
        CONSUL_CAPATH="/env",
        CONSUL_CLIENT_CERT="/env",
        CONSUL_CLIENT_KEY="/env",
        CONSUL_TLS_SERVER_NAME="env",
        CONSUL_NAMESPACE="env",
        CONSUL_PARTITION="env",
    ).consul
    assert consul == config.ConsulConfig(
        addresses=("http://file:1",),
        token_file="/file",
        ca_path="/file",
        cert_file="/file",
        key_file="/file",
        tls_server_name="file",
        namespace="file",
        partition="file",
        datacenter="file",
        consistency="stale",
    )


def test_file_without_configuration_file_reads_the_environment(tmp_path, monkeypatch):
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
def test_environment_address_means_what_it_means_to_the_consul_command(load, address, ssl, normal):
    assert load(CONSUL_HTTP_ADDR=address, CONSUL_HTTP_SSL=ssl).consul.addresses == (normal,)


def test_environment_ca_file_beats_the_ca_path_as_in_the_consul_command(load):
    consul = load(CONSUL_CACERT="/f", CONSUL_CAPATH="/p").consul
    assert (consul.ca_file, consul.ca_path) == ("/f", None)
    assert load(CONSUL_CAPATH="/p").consul.ca_path == "/p"


@pytest.mark.parametrize("text", ["1", "t", "T", "TRUE", "true", "True", "0", "f", "F", "FALSE", "false", "False"])
def test_booleans_of_the_environment_are_those_of_go(load, text):
    assert load(CONSUL_HTTP_SSL_VERIFY=text).consul.tls_verify is (text in {"1", "t", "T", "TRUE", "true", "True"})


BOOLEANS = "must be true or false (or 1, 0, t, f)"
PAIR = "set both or neither (one file may serve as both)"
ASCII = "must be visible ASCII characters, without spaces and line breaks"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("CONSUL_HTTP_SSL_VERIFY", "no", f"{BOOLEANS}, not 'no'"),
        ("CONSUL_HTTP_ADDR", "http://[::1", f"invalid address 'http://[::1' {USE}"),
        ("CONSUL_CACERT", "ca.pem", PATH),
        ("CONSUL_CACERT", "/ca/", "must not end in / or contain unprintable characters"),
        ("CONSUL_CAPATH", "ca", PATH),
        ("CONSUL_HTTP_TOKEN", "a b", ASCII),
        ("CONSUL_HTTP_TOKEN_FILE", "token", PATH),
        ("CONSUL_CLIENT_CERT", "/c", f"set without key_file: {PAIR}"),
        ("CONSUL_CLIENT_KEY", "/k", f"set without cert_file: {PAIR}"),
        ("CONSUL_TLS_SERVER_NAME", "a b", "invalid host name 'a b'"),
        ("CONSUL_NAMESPACE", "a b", ASCII),
        ("CONSUL_PARTITION", "ä", ASCII),
        ("CONSUL_HTTP_SSL", "yes", f"{BOOLEANS}, not 'yes'"),
    ],
)
def test_bad_variable_is_named(refusal, variable, value, message):
    assert refusal(**{variable: value}) == [f"environment: {variable}: {message}"]


def test_environment_takes_no_file_address(refusal):
    (line,) = refusal(CONSUL_HTTP_ADDR="file:///x")
    assert line.startswith("environment: CONSUL_HTTP_ADDR: the consul command does not support file://")


def test_tls_over_a_unix_socket_is_refused_and_not_dropped(refusal):
    (line,) = refusal(CONSUL_HTTP_ADDR="unix:///s", CONSUL_HTTP_SSL="1")
    assert line == "environment: CONSUL_HTTP_ADDR: the consul command does not support unix:// with TLS"


def test_empty_variables_are_unset(load, file):
    assert load(**dict.fromkeys(VARIABLES, "")) == config.Config(path=str(file))


def test_environment_of_the_process_is_not_read(load, monkeypatch):
    monkeypatch.setenv("CONSUL_HTTP_ADDR", "c:1")
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", SECRET)
    assert load().consul == config.ConsulConfig()


# ---- refusals ----


SERVICES = ", ".join(services.SERVICES)
NAME = "(use printable characters other than / and |, not . or ..)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[consol]", "consol: unknown key (did you mean consul?)"),
        ("[metrics]\nfile = 1", "metrics.file: unknown key (did you mean textfile?)"),
        ("[defaults]\ndeadlin = 2", "defaults.deadlin: unknown key (did you mean deadline?)"),
        ("[metrics]\nport = 1", "metrics.port: unknown key (use one of: textfile, listen)"),
        ("consul = 1", "consul: must be a [consul] section"),
        ("[tables]\nx = 1", "tables.x: must be a [tables.x] section"),
        ("tables = []", "tables: must be a [tables] section"),
        ("[defaults]\npaths = 'x'", "defaults.paths: must be a [defaults.paths] section"),
        ("[defaults]\ndeadline = 'two'", "defaults.deadline: must be between 0.05 and 60 seconds"),
        ("[defaults]\ndeadline = true", "defaults.deadline: must be between 0.05 and 60 seconds"),
        ("[defaults]\ndeadline = 0.01", "defaults.deadline: must be between 0.05 and 60 seconds"),
        ("[defaults]\ndeadline = 61", "defaults.deadline: must be between 0.05 and 60 seconds"),
        ("[defaults]\ndeadline = nan", "defaults.deadline: must be between 0.05 and 60 seconds"),
        ("[defaults]\nmax_age = 0", "defaults.max_age: must be above 0 and at most 10000000000 seconds"),
        ("[defaults]\nmax_age = inf", "defaults.max_age: must be above 0 and at most 10000000000 seconds"),
        ("[defaults]\nmax_keys = 0", "defaults.max_keys: must be a whole number between 1 and 1000000000"),
        ("[defaults]\nmax_keys = 1.5", "defaults.max_keys: must be a whole number between 1 and 1000000000"),
        ("[defaults]\nallow_root = 1", "defaults.allow_root: must be true or false"),
        ("[defaults]\nprefix = 1", "defaults.prefix: must be a string"),
        ("[defaults]\nprefix = 2020-01-01", "defaults.prefix: must be a string"),
        ("[defaults]\nsnapshot = 1", "defaults.snapshot: must be a string"),
        ("[defaults]\nmode = 'mirrow'", "defaults.mode: must be one of mirror, direct"),
        ("[defaults]\nmode = 1", "defaults.mode: must be one of mirror, direct"),
        ("[tables.x]\ntable = 'y'", f"tables.x.table: unknown key (use one of: {', '.join(config.KEYS['tables'])})"),
        ("[tables.x.paths]\nalias = 3", "tables.x.paths.alias: must be a string"),
        ("[log]\ntarget = 'sysklog'", "log.target: must be one of auto, syslog, stderr"),
        ("[defaults]\nservices = []", "defaults.services: must be a list of one or more services"),
        ("[defaults]\nservices = 'alias'", "defaults.services: must be a list of one or more services"),
        ("[defaults]\nservices = ['aliases']", "defaults.services: unknown service 'aliases' (did you mean alias?)"),
        ("[defaults]\nservices = ['x']", f"defaults.services: unknown service 'x' (use one of: {SERVICES})"),
        ("[defaults.paths]\ndomains = 'x'", "defaults.paths.domains: unknown key (did you mean domain?)"),
        ("[defaults]\nsnapshot = 'x.json'", f"defaults.snapshot: {PATH}"),
        ("[metrics]\ntextfile = 'x.prom'", f"metrics.textfile: {PATH}"),
        ("[consul]\ncert_file = '/c'", f"consul.cert_file: set without key_file: {PAIR}"),
        ("[consul]\nkey_file = '/c'", f"consul.key_file: set without cert_file: {PAIR}"),
        ("[consul]\ndatacenter = ''", f"consul.datacenter: {ASCII}"),
        ("[consul]\ntls_server_name = 'x/'", "consul.tls_server_name: invalid host name 'x/'"),
        ("[consul]\ntls_verify = '0'", "consul.tls_verify: must be true or false"),
        ('[tables."a/b"]', f"tables.a/b: invalid table name 'a/b' {NAME}"),
        ('[tables."a|b"]', f"tables.a|b: invalid table name 'a|b' {NAME}"),
        ("[defaults]\ntable = '..'", f"defaults.table: invalid table name '..' {NAME}"),
    ],
)
def test_refusal_names_the_key_and_the_constraint(refusal, text, message):
    assert refusal(text) == [message]


@pytest.mark.parametrize("path", ["", "/", "//", "a//b", "//a", "a//", ".", "..", "a/../b", "./a", "a\\u0000b", "a\\n"])
def test_path_that_consul_would_not_take_literally_is_refused(refusal, path):
    (line,) = refusal(f'[defaults.paths]\nalias = "{path}"')
    assert line.startswith("defaults.paths.alias: invalid Consul path '")
    if path not in {"", "/"}:
        assert "invalid Consul path '" in refusal(f'[defaults]\nprefix = "{path}"')[0]


@pytest.mark.parametrize("listen", ["127.0.0.1:1", "127.9.9.9:65535", "[::1]:9100", "unix:///run/{table}.sock"])
def test_metrics_listen_on_loopback_or_a_unix_socket(load, listen):
    assert load(f'[metrics]\nlisten = "{listen}"').metrics.listen == listen


@pytest.mark.parametrize(
    "listen",
    [
        *("", ":9100", "9100", "0.0.0.0:9100", "[::]:9100", "192.0.2.1:1", "127.0.0.1:0", "127.0.0.1:65536"),
        *("127.1:1", "localhost:9100", "[127.0.0.1]:1:1"),
    ],
)
def test_metrics_are_not_offered_to_the_network(refusal, listen):
    (line,) = refusal(f'[metrics]\nlisten = "{listen}"')
    use = "(use 127.0.0.1:PORT, [::1]:PORT or unix:///PATH)"
    assert line == f"metrics.listen: invalid listen address '{listen}' {use}"


def test_all_mistakes_are_reported_at_once(refusal):
    lines = refusal(
        "[consul]\naddress = ['a', 'b']\n[defaults]\nprefix = '..'\ndeadline = 0\nmod = 1\n"
        "services = ['aliass', 'domains']\n[tables.x]\nfetch = 'all'\nsnapshot = 'x'\n[log]\nlevel = 3",
        CONSUL_CACERT="c",
    )
    assert sorted(line.partition(": ")[0] for line in lines) == [
        *("consul.address", "consul.address", "defaults.deadline", "defaults.mod", "defaults.prefix"),
        *("defaults.services", "defaults.services", "environment", "log.level", "tables.x.fetch", "tables.x.snapshot"),
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[consul", "cannot be read as TOML: Expected ']' at the end of a table declaration (at end of document)"),
        (b"[log]\nlevel = debug", "cannot be read as TOML: Invalid value (at line 2, column 9)"),
        (b"[log]\n[log]", "cannot be read as TOML: Cannot declare ('log',) twice (at line 2, column 5)"),
        (
            b"[log]\nlevel = '\xff'",
            "cannot be read as TOML: 'utf-8' codec can't decode byte 0xff in position 15: invalid start byte",
        ),
        ("x = 1".encode("utf-16-le"), None),
        (b"x = " + b"[" * 100_000, None),
        (b"[defaults]\nmax_keys = " + b"9" * 5000, None),
        (b"#" * (config.SIZE_MAX + 1), "cannot be read as TOML: larger than 4 MiB"),
    ],
    ids=["open", "bare", "twice", "latin-1", "utf-16", "deep", "long number", "large"],
)
def test_invalid_toml_is_reported_with_its_position(refusal, data, message):
    (line,) = refusal(data)
    assert line == message or (message is None and line.startswith("cannot be read as TOML: "))


def test_huge_hexadecimal_is_refused_by_its_key(refusal):
    (line,) = refusal("[defaults]\ndeadline = 0x" + "f" * 5000)
    assert line == "defaults.deadline: must be between 0.05 and 60 seconds"


def test_missing_file_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"/none: not found$"):
        config.load(str(tmp_path / "none"), {})


@pytest.mark.parametrize("path", ["", "a\0b", "/" + "x" * 5000])
def test_path_that_no_file_can_have_is_an_error_and_no_crash(path):
    with pytest.raises(ConfigError):
        config.load(path, {})


def test_empty_path_is_not_the_default_path(file, monkeypatch):
    file.write_text("")
    monkeypatch.setattr(config, "DEFAULT_PATH", str(file))
    with pytest.raises(ConfigError, match=r"^: not found$"):
        config.load("", {})


def test_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r": is a folder$"):
        config.load(str(tmp_path), {})


def test_named_pipe_without_writer_is_refused_at_once(file):
    os.mkfifo(file)
    with pytest.raises(ConfigError, match=r": a named pipe, not a file$"):
        config.load(str(file), {})


def test_device_is_refused():
    with pytest.raises(ConfigError, match=r"^/dev/zero: a device, not a file$"):
        config.load("/dev/zero", {})


LOAD = "try: config.load(sys.argv[1], {})\nexcept Exception as error: print(error)"


def test_unreadable_file_names_the_user_and_the_remedy(nobody, open_path):
    path = open_path / "table-consul.toml"
    path.write_text("")
    path.chmod(0o600)
    text = nobody(LOAD, str(path))
    assert text.startswith(f"{path}: not readable by user nobody (uid 65534); smtpd runs tables as an unprivileged")
    assert f"chown root:{files.smtpd_group()} {path}; chmod 0640 {path}" in text


def test_folder_that_cannot_be_entered_is_the_one_named(nobody, open_path):
    folder = open_path / "closed"
    folder.mkdir(mode=0o700)
    (folder / "table-consul.toml").write_text("")
    assert nobody(LOAD, str(folder / "table-consul.toml")).startswith(
        f"{folder}/table-consul.toml: folder {folder} cannot be entered by user nobody (uid 65534) (try: chgrp "
    )


# ---- secrets ----


@pytest.mark.parametrize(
    ("text", "environ"),
    [
        (f"[consul]\ntoken = '{SECRET}'", {}),
        (f"[consul]\ntoken_file = '{SECRET}'", {}),
        (f"[consul]\ntoken_file = ['{SECRET}']", {}),
        (f"[consul]\nkey_file = '{SECRET}'", {}),
        (f"[consul]\naddress = 'http://x:{SECRET}@c:8500'", {}),
        (f"[consul]\naddress = 'http://c:8500/?token={SECRET}'", {}),
        (f"[consul]\ntoken_file = {SECRET}", {}),
        ("", {"CONSUL_HTTP_TOKEN": f"{SECRET}\n"}),
        ("", {"CONSUL_HTTP_TOKEN": f"{SECRET} x"}),
        ("", {"CONSUL_HTTP_TOKEN": f"{SECRET}\udc80"}),
        ("", {"CONSUL_HTTP_TOKEN_FILE": SECRET}),
        ("", {"CONSUL_HTTP_ADDR": f"x:{SECRET}@c:8500"}),
        ("", {"CONSUL_HTTP_SSL": "maybe", "CONSUL_HTTP_TOKEN": SECRET}),
    ],
)
def test_no_error_holds_a_secret(refusal, text, environ):
    assert SECRET not in "\n".join(refusal(text, **environ))


def test_token_in_the_file_is_refused_with_the_right_key(refusal):
    (line,) = refusal(f"[consul]\ntoken = '{SECRET}'")
    assert line == "consul.token: unknown key (did you mean token_file?)"


def test_token_is_in_no_repr(load):
    loaded = load(CONSUL_HTTP_TOKEN=SECRET)
    assert loaded.consul.token == SECRET
    assert SECRET not in repr(loaded)


# ---- files, for --check ----


def test_good_configuration_has_no_problems(load, tmp_path):
    tmp_path.chmod(0o750)
    (tmp_path / "token").write_text(SECRET)
    (tmp_path / "token").chmod(0o640)
    text = f'[consul]\ntoken_file = "{tmp_path}/token"\nca_path = "{tmp_path}"\n[defaults]\nsnapshot = "{tmp_path}/s"'
    assert check.check_files(load(text)) == []


def test_named_files_that_are_missing_are_told_with_their_key(load, file):
    loaded = load(
        '[consul]\naddress = "file:///no/export"\ntoken_file = "/no/token"\nca_file = "/no/ca"\n'
        '[defaults]\nsnapshot = "/no/{table}"\n[metrics]\ntextfile = "/no/{table}.prom"',
        CONSUL_CLIENT_CERT="/no/cert",
        CONSUL_CLIENT_KEY="/no/key",
    )
    assert check.check_files(loaded) == [
        f"{file}: consul.token_file: /no/token: not found",
        f"{file}: consul.ca_file: /no/ca: not found",
        "environment: CONSUL_CLIENT_CERT: /no/cert: not found",
        "environment: CONSUL_CLIENT_KEY: /no/key: not found",
        f"{file}: consul.address: /no/export: not found",
        *(
            f"{file}: {key} of table consul: folder /no not found, or not writable by {files.current_user()}"
            for key in ("snapshot", "metrics.textfile")
        ),
    ]


def test_folder_in_place_of_a_file_is_told_and_the_reverse(load, file):
    lines = check.check_files(load(f'[consul]\nca_file = "{file.parent}"\nca_path = "{file}"'))
    assert [line.rpartition(": ")[2] for line in lines] == ["is a folder", "not a folder"]


def test_secret_that_everyone_can_read_is_told(load, tmp_path):
    (tmp_path / "token").write_text(SECRET)
    (tmp_path / "token").chmod(0o644)
    (line,) = check.check_files(load(f'[consul]\ntoken_file = "{tmp_path}/token"'))
    assert line.endswith("/token: every user of this machine can read this secret (try: chmod 0640)")
    assert SECRET not in line


def test_snapshot_that_others_can_read_is_told(load, tmp_path):
    (tmp_path / "copy").write_text("[]")
    (tmp_path / "copy").chmod(0o640)
    (line,) = check.check_files(load(f'[tables.a]\nsnapshot = "{tmp_path}/copy"'))
    assert line.endswith("snapshot of table a: other users can read this copy of the table (try: chmod 0600)")


def test_two_tables_with_one_snapshot_are_told(load, tmp_path):
    (line,) = check.check_files(load(f'[defaults]\nsnapshot = "{tmp_path}/copy"\n[tables.a]\n[tables.b]'))
    assert line.endswith("snapshot of table b: same file as for table a (put {table} into its name)")


def test_unverified_tls_is_told(load):
    text = "TLS verification is off: a man in the middle can read the token and forge answers"
    (line,) = check.check_files(load('[consul]\naddress = "https://c"\ntls_verify = false'))
    assert line.endswith(f"/table-consul.toml: consul.tls_verify: {text}")
    (line,) = check.check_files(load('[consul]\naddress = "https://c"', CONSUL_HTTP_SSL_VERIFY="false"))
    assert line == f"environment: CONSUL_HTTP_SSL_VERIFY: {text}"


def test_file_that_only_root_can_read_is_told_to_root(load, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("what root alone can read is tried as root (sudo make test)")
    (tmp_path / "token").write_text(SECRET)
    (tmp_path / "token").chmod(0o600)
    (line,) = check.check_files(load(f'[consul]\ntoken_file = "{tmp_path}/token"'))
    assert "/token: only root can read it, but smtpd runs tables as an unprivileged user" in line


def test_configuration_that_only_root_can_read_is_told_to_root(load, file):
    if os.geteuid() != 0:
        pytest.skip("what root alone can read is tried as root (sudo make test)")
    loaded = load()
    file.chmod(0o600)
    (line,) = check.check_files(loaded)
    assert line.startswith(f"{file}: only root can read it, ")


def test_named_pipe_is_refused_by_the_check_without_waiting_for_a_writer(load, tmp_path):
    os.mkfifo(tmp_path / "token", 0o640)
    (line,) = check.check_files(load(f'[consul]\ntoken_file = "{tmp_path}/token"'))
    assert line.endswith(f"consul.token_file: {tmp_path}/token: a named pipe, not a file")


def test_what_another_user_cannot_use_is_told(nobody, open_path):
    (open_path / "token").write_text(SECRET)
    (open_path / "token").chmod(0o600)
    (open_path / "ca").mkdir(mode=0o744)
    path = open_path / "table-consul.toml"
    path.write_text(
        f'[consul]\ntoken_file = "{open_path}/token"\nca_path = "{open_path}/ca"\n'
        f'[defaults]\nsnapshot = "{open_path}/x"'
    )
    token, folder, snapshot = nobody(
        "print(*check.check_files(config.load(sys.argv[1], {})), sep='\\n')", str(path)
    ).splitlines()
    assert f"consul.token_file: {open_path}/token: not readable by user nobody (uid 65534); " in token
    assert f"consul.ca_path: {open_path}/ca: folder {open_path}/ca cannot be entered by user nobody" in folder
    assert f"consul: folder {open_path} not found, or not writable by user nobody (uid 65534)" in snapshot


# ---- whatever comes ----

WORDS = st.sampled_from(
    [
        *("consul", "defaults", "tables", "log", "metrics", "address", "paths", "alias", "services", "deadline"),
        *("token_file", "ca_file", "cert_file", "mode", "level", "listen", "textfile", "snapshot", "prefix", "table"),
    ]
)
KEYS = WORDS | st.text(max_size=5)
TEXTS = st.text(max_size=20) | st.sampled_from(
    [
        "http://c:8500",
        "unix:///s",
        "file:///f",
        "http://[::1]",
        "127.0.0.1:80",
        "direct",
        "info",
        "/a/b",
        "a/b",
        "..",
        "alias",
    ]
)
VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats() | TEXTS | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
DOCUMENTS = st.dictionaries(WORDS, st.dictionaries(KEYS, VALUES, max_size=4) | VALUES, max_size=4)


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(key)} = {toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("NaN", "nan").replace("Infinity", "inf") if not hasattr(
        value, "isoformat"
    ) else value.isoformat()  # fmt: skip


def config_or_config_error(load, data: bytes, environ: dict[str, str]) -> None:
    try:
        loaded = load(data, **environ)
    except ConfigError as error:
        assert str(error).isprintable(), error  # noqa: PT017 - whether there is one is not known
        return
    assert all(loaded.consul.addresses)
    for name in ("x", *loaded.tables):
        for service in services.SERVICES.values():
            assert loaded.table(name).path(service).endswith(b"/")


relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)


@relaxed
@given(DOCUMENTS)
def test_any_document_is_a_config_or_a_config_error(load, document):
    lines = "\n".join(f"{toml(key)} = {toml(value)}" for key, value in document.items())
    config_or_config_error(load, lines.encode("utf-8", "surrogatepass"), {})


@relaxed
@given(st.binary(max_size=100))
def test_any_bytes_are_a_config_or_a_config_error(load, data):
    config_or_config_error(load, data, {})


@relaxed
@given(st.dictionaries(st.sampled_from(VARIABLES), TEXTS | st.just("1") | st.text(st.characters(), max_size=9)))
def test_any_environment_is_a_config_or_a_config_error(load, environ):
    config_or_config_error(load, b"", environ)


@given(st.text(st.characters(codec=None), max_size=30))
def test_every_validator_returns_a_value_or_texts(text):
    for key, validate in config.VALIDATORS.items():
        try:
            assert validate((text,) if key in {"address", "services"} else text) is not None
        except ValueError as error:
            # Not one of its children, whose texts are Python's.
            assert type(error) is ValueError  # noqa: PT017 - whether there is one is not known
            assert all(each.isprintable() for each in error.args)  # noqa: PT017 - as above


def test_import_brings_nothing_that_only_errors_and_networks_need():
    code = "import sys; before = set(sys.modules); import table_consul.config; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    heavy = {
        "urllib",
        "urllib.parse",
        "ipaddress",
        "difflib",
        "pathlib",
        "socket",
        "ssl",
        "pwd",
        "grp",
        "consul",
        "requests",
    }
    assert heavy & set(done.stdout.split()) == set()
