"""The configuration keys, defaults and variables are the same in the program and in its three documents."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING

import msgspec
import pytest

from table_consul import config
from table_consul.services import SERVICES
from tests.documents import manual
from tests.documents.document import CONTRIB, page, rows, written

if TYPE_CHECKING:
    from pathlib import Path

PAGE = page("docs/configuration.md")
EXAMPLE = (CONTRIB / "table-consul.toml.example").read_text()
UNCOMMENTED = re.sub(r"^#(?=[^ \n])", "", EXAMPLE, flags=re.MULTILINE)
FIELDS = {section: keys for section, keys in config.KEYS.items() if section != "tables"}
VARIABLES = {
    "CONSUL_HTTP_ADDR": "address",
    "CONSUL_HTTP_SSL": "address",
    "CONSUL_HTTP_SSL_VERIFY": "tls_verify",
    "CONSUL_HTTP_TOKEN": "token_file",
    "CONSUL_HTTP_TOKEN_FILE": "token_file",
    "CONSUL_CACERT": "ca_file",
    "CONSUL_CAPATH": "ca_path",
    "CONSUL_CLIENT_CERT": "cert_file",
    "CONSUL_CLIENT_KEY": "key_file",
    "CONSUL_TLS_SERVER_NAME": "tls_server_name",
    "CONSUL_NAMESPACE": "namespace",
    "CONSUL_PARTITION": "partition",
}
every_section = pytest.mark.parametrize("section", FIELDS)


def load(folder: Path, text: str = "", environ: dict[str, str] | None = None) -> config.Config:
    path = folder / "table-consul.toml"
    path.write_text(text)
    return config.load(str(path), {} if environ is None else environ)


@pytest.fixture
def defaults(tmp_path):
    """The values of an empty configuration by section and key, without those that mean "none"."""
    silent = load(tmp_path)
    values = {
        "consul": {**msgspec.structs.asdict(silent.consul), "address": silent.consul.addresses[0]},
        "defaults": {**msgspec.structs.asdict(silent.defaults), "table": silent.defaults.name},
        "log": msgspec.structs.asdict(silent.log),
        "metrics": msgspec.structs.asdict(silent.metrics),
    }
    return {
        section: {
            key: value
            for key in FIELDS[section]
            if (value := values[section][key]) is not None and value != "" and key != "paths"
        }
        for section in FIELDS
    }


def in_page():
    """The defaults in docs/configuration.md by section and key; None for a default in words or for no default."""
    stated, name = {}, ""
    for row in rows(PAGE.text):
        name = row[0] or name
        section = re.search(r"\[(\w+)\]", name)[1]
        for key in re.findall(r"`(\w+)`", row[1]):
            assert key not in stated.setdefault(section, {}), f"{key} is described twice"
            stated[section][key] = row[2].strip("`") if row[2].startswith("`") else None
    return stated


def in_manual(section):
    """The text about each key of a section in table-consul.toml(5)."""
    subsections = manual.parts(manual.source("table-consul.toml.5"), "Ss")
    (found,) = (text for head, text in subsections.items() if f"[{section}]" in head)
    return {head.removeprefix("Ic "): text for head, text in manual.items(found.partition("\n.Sh")[0]).items()}


@every_section
def test_every_document_has_every_key_and_no_other(section):
    assert sorted(in_page()[section]) == sorted(FIELDS[section])
    assert sorted(in_manual(section)) == sorted(FIELDS[section])
    assert sorted(tomllib.loads(UNCOMMENTED)[section]) == sorted(FIELDS[section])


@every_section
def test_defaults_in_the_page_are_those_of_the_program(section, defaults):
    stated = {key: value for key, value in in_page()[section].items() if value is not None}
    real = {key: written(value) for key, value in defaults[section].items() if key != "services"}
    assert stated == real


@every_section
def test_defaults_in_the_manual_are_those_of_the_program(section, defaults):
    stated = {key: manual.stated_default(text) for key, text in in_manual(section).items()}
    if section == "defaults":
        assert stated.pop("services") == "all but auth"
        assert defaults[section].pop("services") == tuple(name for name in SERVICES if name != "auth")
    assert {key: value for key, value in stated.items() if value} == {
        key: written(value) for key, value in defaults[section].items()
    }


@every_section
def test_manual_names_every_choice(section):
    described = in_manual(section)
    for key, kind in FIELDS[section].items():
        choices = re.findall(r"'([\w-]+)'", "".join(re.findall(r"Literal\[([^]]*)\]", str(kind))))
        assert [word for word in choices if f".Cm {word}" not in described[key]] == []


def test_example_as_delivered_changes_no_default(tmp_path):
    assert load(tmp_path, EXAMPLE) == load(tmp_path)


def test_example_is_accepted_with_every_key_uncommented(tmp_path):
    loaded = load(tmp_path, UNCOMMENTED)
    assert loaded.table("outbound").deadline == 0.5
    assert dict(loaded.table("outbound").paths) == {"alias": "mail/aliases", "source": "mail/addresses"}


@every_section
def test_example_shows_the_default_or_is_marked_as_an_example(section, defaults):
    examples = {
        key
        for block in EXAMPLE.split("\n\n")
        if re.search(r"\(examples?\)", block)
        for key in re.findall(r"^#(?:\[defaults\.)?(\w+)(?: =|\])", block, re.MULTILINE)
    }
    shown = {key: value for key, value in tomllib.loads(UNCOMMENTED)[section].items() if key in defaults[section]}
    real = {key: list(value) if isinstance(value, tuple) else value for key, value in defaults[section].items()}
    assert shown == real
    assert set(FIELDS[section]) - set(real) - {"prefix"} <= examples


class Environment(dict[str, str]):
    """An empty environment that records which variables are read."""

    def __init__(self) -> None:
        self.read: set[str] = set()

    def get(self, name, default=None):
        self.read.add(name)
        return default


def test_documents_name_every_variable_that_the_program_reads(tmp_path):
    environment = Environment()
    load(tmp_path, environ=environment)
    assert environment.read == set(VARIABLES)
    assert set(re.findall(r"CONSUL_[A-Z_]+", EXAMPLE)) == set(VARIABLES)
    in_manuals = {
        name: set(re.findall(r"^\.Ev (CONSUL_\S+)", manual.source(name), re.MULTILINE)) for name in manual.NAMES
    }
    assert in_manuals["table-consul.toml.5"] == set(VARIABLES)
    others = [set(re.findall(r"`(CONSUL_[A-Z_]+)`", PAGE.text)), in_manuals["table-consul.8"]]
    assert [names for names in others if not names or names - set(VARIABLES)] == []


@pytest.mark.parametrize(("variable", "key"), VARIABLES.items())
def test_manual_names_a_variable_beside_its_key(variable, key):
    assert re.search(rf"^\.Ev {variable}\b", in_manual("consul")[key], re.MULTILINE)
