from __future__ import annotations

import datetime as dt
import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from table_consul import config, services
from table_consul.errors import ConfigError
from tests.smtpd.configuration import VARIABLES

WORDS = st.sampled_from(
    [
        *("consul", "defaults", "tables", "log", "metrics", "address", "paths", "alias", "services", "deadline"),
        *("token_file", "ca_file", "cert_file", "mode", "level", "listen", "textfile", "snapshot", "prefix", "table"),
    ]
)
KEYS = WORDS | st.text(max_size=5)
TEXTS = st.text(max_size=20) | st.sampled_from(
    [
        *("http://c:8500", "unix:///s", "file:///f", "http://[::1]", "127.0.0.1:80"),
        *("direct", "info", "/a/b", "a/b", "..", "alias"),
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
    if isinstance(value, dt.date):
        return value.isoformat()
    return json.dumps(value, ensure_ascii=False).replace("NaN", "nan").replace("Infinity", "inf")


def config_or_config_error(load_config, data: bytes, environ: dict[str, str]) -> None:
    try:
        loaded = load_config(data, **environ)
    except ConfigError as error:
        assert str(error).isprintable(), error  # noqa: PT017 - whether there is one is not known
        return
    assert all(loaded.consul.addresses)
    for name in ("x", *loaded.tables):
        for service in services.SERVICES.values():
            assert loaded.table(name).path(service).endswith(b"/")


relaxed = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=3 * settings().max_examples
)


@relaxed
@given(DOCUMENTS)
def test_any_document_is_a_config_or_a_config_error(load_config, document):
    lines = "\n".join(f"{toml(key)} = {toml(value)}" for key, value in document.items())
    config_or_config_error(load_config, lines.encode("utf-8", "surrogatepass"), {})


@relaxed
@given(st.binary(max_size=100))
def test_any_bytes_are_a_config_or_a_config_error(load_config, data):
    config_or_config_error(load_config, data, {})


@relaxed
@given(st.dictionaries(st.sampled_from(VARIABLES), TEXTS | st.just("1") | st.text(st.characters(), max_size=9)))
def test_any_environment_is_a_config_or_a_config_error(load_config, environ):
    config_or_config_error(load_config, b"", environ)


@given(st.text(st.characters(codec=None), max_size=30))
def test_every_validator_returns_a_value_or_texts(text):
    for key, validate in config.VALIDATORS.items():
        try:
            assert validate((text,) if key in {"address", "services"} else text) is not None
        except ValueError as error:
            # Not a subclass, whose texts would come from Python.
            assert type(error) is ValueError  # noqa: PT017 - whether there is one is not known
            assert all(each.isprintable() for each in error.args)  # noqa: PT017 - as above
