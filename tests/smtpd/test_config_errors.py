from __future__ import annotations

import pytest

from table_consul import config, services
from tests.smtpd.configuration import ABSOLUTE_PATH, CERT_AND_KEY, HOST_NAME, IN_QUOTES, SECRET, VISIBLE_ASCII

SERVICES = ", ".join(services.SERVICES)
NAME = "(use printable characters other than / and |, not . or ..)"
DELIMITER = "must be one visible ASCII character other than @ (use that of `smtp sub-addr-delim`)"
MAX_AGE = "must be a number of seconds above 0 and at most 10000000000 (try: max_age = 86400.0)"
LIST = 'must be a list of one or more services (try: services = ["alias"])'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[consol]", "consol: unknown key (did you mean consul?)"),
        ("[metrics]\nfile = 1", "metrics.file: unknown key (did you mean textfile?)"),
        ("[defaults]\ndeadlin = 2", "defaults.deadlin: unknown key (did you mean deadline?)"),
        ("[metrics]\nport = 1", "metrics.port: unknown key (use one of: textfile, listen)"),
        ("consul = 1", "consul: must be a section (write [consul] on a line of its own)"),
        ("[tables]\nx = 1", "tables.x: must be a section (write [tables.x] on a line of its own)"),
        ("tables = []", "tables: must be a section (write [tables] on a line of its own)"),
        ("[defaults]\npaths = 'x'", "defaults.paths: must be a section (write [defaults.paths] on a line of its own)"),
        (
            "[defaults]\ndeadline = 'two'",
            "defaults.deadline: must be a number of seconds between 0.05 and 60 (try: deadline = 2.0)",
        ),
        (
            "[defaults]\ndeadline = true",
            "defaults.deadline: must be a number of seconds between 0.05 and 60 (try: deadline = 2.0)",
        ),
        (
            "[defaults]\ndeadline = 0.01",
            "defaults.deadline: must be a number of seconds between 0.05 and 60 (try: deadline = 2.0)",
        ),
        (
            "[defaults]\ndeadline = 61",
            "defaults.deadline: must be a number of seconds between 0.05 and 60 (try: deadline = 2.0)",
        ),
        (
            "[defaults]\ndeadline = nan",
            "defaults.deadline: must be a number of seconds between 0.05 and 60 (try: deadline = 2.0)",
        ),
        ("[defaults]\nmax_age = '1d'", f"defaults.max_age: {MAX_AGE}"),
        ("[defaults]\nmax_age = 0", f"defaults.max_age: {MAX_AGE}"),
        ("[defaults]\nmax_age = inf", f"defaults.max_age: {MAX_AGE}"),
        (
            "[defaults]\nmax_keys = 0",
            "defaults.max_keys: must be a whole number between 1 and 1000000000 (try: max_keys = 2000000)",
        ),
        (
            "[defaults]\nmax_keys = 1.5",
            "defaults.max_keys: must be a whole number between 1 and 1000000000 (try: max_keys = 2000000)",
        ),
        ("[defaults]\nallow_root = 1", "defaults.allow_root: must be true or false (try: allow_root = false)"),
        ("[defaults]\nprefix = 1", f"defaults.prefix: {IN_QUOTES}"),
        ("[defaults]\nprefix = 2020-01-01", f"defaults.prefix: {IN_QUOTES}"),
        ("[defaults]\nsnapshot = 1", f"defaults.snapshot: {IN_QUOTES}"),
        ("[defaults]\nmode = 'mirrow'", 'defaults.mode: must be one of mirror, direct (try: mode = "mirror")'),
        ("[defaults]\nmode = 1", 'defaults.mode: must be one of mirror, direct (try: mode = "mirror")'),
        *(
            (f"[tables.x]\nsubaddress_delimiter = {bad!r}", f"tables.x.subaddress_delimiter: {DELIMITER}")
            for bad in ("", "++", "@", " ", "\t", "é", "\x7f")
        ),
        ("[defaults]\nsubaddress_delimiter = 1", f"defaults.subaddress_delimiter: {IN_QUOTES}"),
        ("[tables.x]\ntable = 'y'", f"tables.x.table: unknown key (use one of: {', '.join(config.KEYS['tables'])})"),
        ("[tables.x.paths]\nalias = 3", f"tables.x.paths.alias: {IN_QUOTES}"),
        ("[log]\ntarget = 'sysklog'", 'log.target: must be one of auto, syslog, stderr (try: target = "auto")'),
        ("[defaults]\nservices = []", f"defaults.services: {LIST}"),
        ("[defaults]\nservices = 'alias'", f"defaults.services: {LIST}"),
        ("[defaults]\nservices = ['aliases']", "defaults.services: unknown service 'aliases' (did you mean alias?)"),
        ("[defaults]\nservices = ['x']", f"defaults.services: unknown service 'x' (use one of: {SERVICES})"),
        ("[defaults.paths]\ndomains = 'x'", "defaults.paths.domains: unknown key (did you mean domain?)"),
        ("[defaults]\nsnapshot = 'x.json'", f"defaults.snapshot: {ABSOLUTE_PATH}"),
        ("[metrics]\ntextfile = 'x.prom'", f"metrics.textfile: {ABSOLUTE_PATH}"),
        ("[consul]\ncert_file = '/c'", f"consul.cert_file: set without key_file {CERT_AND_KEY}"),
        ("[consul]\nkey_file = '/c'", f"consul.key_file: set without cert_file {CERT_AND_KEY}"),
        ("[consul]\ndatacenter = ''", f"consul.datacenter: {VISIBLE_ASCII}"),
        ("[consul]\ntls_server_name = 'x/'", f"consul.tls_server_name: invalid host name 'x/' {HOST_NAME}"),
        ("[consul]\ntls_verify = '0'", "consul.tls_verify: must be true or false (try: tls_verify = true)"),
        ('[tables."a/b"]', f"tables.a/b: invalid table name 'a/b' {NAME}"),
        ('[tables."a|b"]', f"tables.a|b: invalid table name 'a|b' {NAME}"),
        ("[defaults]\ntable = '..'", f"defaults.table: invalid table name '..' {NAME}"),
    ],
)
def test_refusal_names_the_key_and_the_constraint(config_errors, text, message):
    assert config_errors(text) == [message]


@pytest.mark.parametrize("path", ["", "/", "//", "a//b", "//a", "a//", ".", "..", "a/../b", "./a", "a\\u0000b", "a\\n"])
def test_path_that_consul_would_normalize_is_refused(config_errors, path):
    (line,) = config_errors(f'[defaults.paths]\nalias = "{path}"')
    assert line.startswith("defaults.paths.alias: invalid Consul path '")
    if path not in {"", "/"}:
        assert "invalid Consul path '" in config_errors(f'[defaults]\nprefix = "{path}"')[0]


@pytest.mark.parametrize("listen", ["127.0.0.1:1", "127.9.9.9:65535", "[::1]:9100", "unix:///run/{table}.sock"])
def test_metrics_listen_on_loopback_or_a_unix_socket(load_config, listen):
    assert load_config(f'[metrics]\nlisten = "{listen}"').metrics.listen == listen


@pytest.mark.parametrize(
    "listen",
    [
        *("", ":9100", "9100", "0.0.0.0:9100", "[::]:9100", "192.0.2.1:1", "127.0.0.1:0", "127.0.0.1:65536"),
        *("127.1:1", "localhost:9100", "[127.0.0.1]:1:1"),
    ],
)
def test_metrics_listen_on_the_network_is_refused(config_errors, listen):
    (line,) = config_errors(f'[metrics]\nlisten = "{listen}"')
    use = "(use 127.0.0.1:PORT, [::1]:PORT or unix:///PATH)"
    assert line == f"metrics.listen: invalid listen address '{listen}' {use}"


def test_all_errors_are_reported_together(config_errors):
    lines = config_errors(
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
        (
            b"[consul",
            "Expected ']' at the end of a table declaration (at end of document; correct it there)",
        ),
        (b"[log]\nlevel = debug", "Invalid value (at line 2, column 9; correct it there)"),
        (
            b"[log]\n[log]",
            "Cannot declare ('log',) twice (at line 2, column 5; correct it there)",
        ),
        (
            b"[log]\nlevel = '\xff'",
            "'utf-8' codec can't decode byte 0xff in position 15: invalid start byte (save it as UTF-8)",
        ),
        ("x = 1".encode("utf-16-le"), None),
        (b"x = " + b"[" * 100_000, None),
        (b"[defaults]\nmax_keys = " + b"9" * 5000, None),
        (b"#" * (config.SIZE_MAX + 1), "larger than 4 MiB (name a TOML file)"),
    ],
    ids=["open", "bare", "twice", "latin-1", "utf-16", "deep", "long number", "large"],
)
def test_invalid_toml_is_reported_with_its_position(config_errors, data, message):
    (line,) = config_errors(data)
    problem = line.removeprefix("cannot be read as TOML: ")
    assert (problem != line, problem == message or message is None) == (True, True)
    assert line.endswith(("correct it there)", "(save it as UTF-8)", "(name a TOML file)"))


def test_huge_hexadecimal_is_refused_by_its_key(config_errors):
    (line,) = config_errors("[defaults]\ndeadline = 0x" + "f" * 5000)
    assert line == "defaults.deadline: must be a number of seconds between 0.05 and 60 (try: deadline = 2.0)"


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
def test_no_error_contains_a_secret(config_errors, text, environ):
    assert SECRET not in "\n".join(config_errors(text, **environ))


def test_token_in_the_file_is_refused_with_a_hint(config_errors):
    (line,) = config_errors(f"[consul]\ntoken = '{SECRET}'")
    assert line == "consul.token: unknown key (did you mean token_file?)"


def test_token_is_in_no_repr(load_config):
    loaded = load_config(CONSUL_HTTP_TOKEN=SECRET)
    assert loaded.consul.token == SECRET
    assert SECRET not in repr(loaded)
