"""The configuration: one TOML file, and the environment of the ``consul`` command where the file is silent.

Knows nothing of Consul's HTTP or of smtpd's wire, and reads no environment but the one passed in. `shape` says which
keys there are, `rules` what their values must be, `access` whether the files they name can be used.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec

from table_consul import rules
from table_consul.errors import ConfigError, printable
from table_consul.files import open_regular_file
from table_consul.services import SERVICES, Table
from table_consul.shape import ConsulSection, Document, TableSection, misshapen

T = TypeVar("T")

DEFAULT_PATH = "/etc/mail/table-consul.toml"

# A configuration for thousands of tables fits; /dev/zero given by mistake does not fill the memory of the mail host.
SIZE_MAX = 4 * 1024 * 1024


class ConsulConfig(msgspec.Struct, frozen=True):
    """How Consul is reached. Addresses are ``http://h:p``, ``https://h:p``, ``unix:///path``, or one ``file:///path``."""

    addresses: tuple[str, ...] = ("http://127.0.0.1:8500",)
    token: str | None = None
    token_file: str | None = None
    ca_file: str | None = None
    ca_path: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    tls_server_name: str | None = None
    tls_verify: bool = True
    datacenter: str | None = None
    namespace: str | None = None
    partition: str | None = None
    consistency: str = "default"

    def __repr__(self) -> str:
        """Without the token, for whatever prints a configuration."""
        return f"ConsulConfig({', '.join(self.addresses)})"


class LogConfig(msgspec.Struct, frozen=True):
    """What is logged, and where to."""

    level: str = "info"
    target: str = "auto"


class MetricsConfig(msgspec.Struct, frozen=True):
    """Where numbers go, if anywhere; both may hold ``{table}``, as each table has a process of its own."""

    textfile: str | None = None
    listen: str | None = None


class Config(msgspec.Struct, frozen=True):
    """All of the configuration, checked. A reload builds another one."""

    path: str | None
    """The file, None when there is none."""
    consul: ConsulConfig = msgspec.field(default_factory=ConsulConfig)
    log: LogConfig = msgspec.field(default_factory=LogConfig)
    metrics: MetricsConfig = msgspec.field(default_factory=MetricsConfig)
    defaults: Table = msgspec.field(default_factory=lambda: Table("consul"))
    """``[defaults]``; its name is that of the table where a dialect brings none."""
    tables: Mapping[str, Table] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """The tables that have a section of their own."""
    origins: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Where each key of ``consul`` was written, for messages about the files it names."""

    @property
    def default_table(self) -> str:
        """The name of the table where a dialect brings none."""
        return self.defaults.name

    def table(self, name: str) -> Table:
        """How the table of this name is answered for: ``[defaults]`` under ``[tables.NAME]``.

        Raises:
            ConfigError: the name cannot be a folder in Consul; in the dialects of 2020 it comes with each request.

        """
        if name in self.tables:
            return self.tables[name]
        try:
            return _named(msgspec.structs.replace(self.defaults, name=rules.table_name(name)))
        except ValueError as error:
            raise ConfigError(f"table name: {error}") from None


def load(path: str | None, environ: Mapping[str, str]) -> Config:
    """The configuration in the file, `DEFAULT_PATH` (if there is such a file) when None, and in the environment.

    Raises:
        ConfigError: with the first thing that is wrong as its text, one line, and all further ones as notes
            (``__notes__``), a line each. Files that the configuration names are not opened: see `problems`.

    """
    wanted = DEFAULT_PATH if path is None else path
    document: dict[str, Any] = {}
    file: str | None = None
    try:
        document = _parse(wanted)
        file = wanted
    except OSError as error:
        if path is not None or not isinstance(error, FileNotFoundError | NotADirectoryError):
            from table_consul import check

            raise ConfigError(f"{printable(wanted)}: {check.refusal(wanted, error)}") from None
    at = printable(file or "")
    try:
        sections = msgspec.convert(document, Document)
    except msgspec.ValidationError as error:
        raise _refusal([f"{at}: {line}" for line in misshapen(Document, document)] or [f"{at}: {error}"]) from None
    findings = _Findings()
    consul, origins = _consul(sections.consul, at, environ, findings)
    default_table = findings.check(f"{at}: defaults.table", rules.table_name, sections.defaults.table)
    defaults = _settings(sections.defaults, f"{at}: defaults", findings)
    tables = {}
    for name, section in sections.tables.items():
        findings.check(f"{at}: tables.{printable(name)}", rules.table_name, name)
        own = _settings(section, f"{at}: tables.{printable(name)}", findings)
        tables[name] = {**defaults, **own, "paths": {**defaults["paths"], **own["paths"]}}
    metrics = MetricsConfig(
        findings.check(f"{at}: metrics.textfile", rules.absolute, sections.metrics.textfile),
        findings.check(f"{at}: metrics.listen", rules.listen, sections.metrics.listen),
    )
    if findings.lines:
        raise _refusal(findings.lines)
    return Config(
        path=file,
        consul=consul,
        log=LogConfig(sections.log.level, sections.log.target),
        metrics=metrics,
        defaults=_table(default_table or "consul", defaults),
        tables=MappingProxyType({name: _named(_table(name, settings)) for name, settings in tables.items()}),
        origins=MappingProxyType(origins),
    )


def problems(config: Config) -> list[str]:
    """What would keep this user from working with the configuration, or gives a secret away; a line each.

    For ``--check``, not for `load`: a mail server starts although a token is written only a second later.
    """
    from table_consul import check

    found = []
    consul = config.consul
    named = {
        "token_file": consul.token_file,
        "ca_file": consul.ca_file,
        "cert_file": consul.cert_file,
        "key_file": consul.key_file,
        "ca_path": consul.ca_path,
        "address": consul.addresses[0].removeprefix("file://") if consul.addresses[0].startswith("file://") else None,
    }
    for key, path in named.items():
        if path is not None and (what := check.unreadable(path, folder=key == "ca_path", secret=key in _SECRET_FILES)):
            found.append(f"{config.origins.get(key, f'consul.{key}')}: {printable(path)}: {what}")
    if config.path is not None and (what := check.unreadable(config.path)):
        found.append(f"{config.path}: {what}")
    if not consul.tls_verify and any(address.startswith("https://") for address in consul.addresses):
        at = config.origins.get("tls_verify", "consul.tls_verify")
        found.append(f"{at}: anyone on the way to Consul can read the token and forge answers")
    tables = list(config.tables.values()) or [config.table(config.default_table)]
    written: dict[str, str] = {}
    for table in tables:
        textfile = config.metrics.textfile and config.metrics.textfile.replace("{table}", table.name)
        for key, path in (("snapshot", table.snapshot), ("metrics.textfile", textfile)):
            if not path:
                continue
            at = f"{config.path}: {key} of table {printable(table.name)}"
            if path in written:
                found.append(f"{at}: table {printable(written[path])} has the same file (put {{table}} into its name)")
            elif what := check.unwritable(path, private=key == "snapshot"):
                found.append(f"{at}: {what}")
            written[path] = table.name
    return found


def _parse(path: str) -> dict[str, Any]:
    name = printable(path)
    if "\0" in path:
        raise ConfigError(f"{name}: no file has such a name")
    with open(path, "rb", opener=open_regular_file) as file:
        data = file.read(SIZE_MAX + 1)
    if len(data) > SIZE_MAX:
        raise ConfigError(f"{name}: too large (allowed: {SIZE_MAX} bytes)")
    try:
        return tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}: byte {data[error.start]:#04x} in line {line} is no UTF-8") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{name}: no TOML: {printable(str(error))}") from None


def _refusal(lines: list[str]) -> ConfigError:
    error = ConfigError(lines[0])
    for line in lines[1:]:
        error.add_note(line)
    return error


class _Findings:
    """What the rules found wrong, so that all of it can be said at once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, at: str, what: str) -> None:
        self.lines.append(f"{at}: {what}")

    def check(self, at: str, rule: Callable[[Any], T], value: object) -> T | None:
        """The value in its normal form; None for None, and where the rule refuses it."""
        if value is None:
            return None
        try:
            return rule(value)
        except ValueError as error:
            self.add(at, str(error))
        return None


# Keys that mean something together: where the file has one of them, the environment has no say in the others.
VARIABLES: tuple[dict[str, tuple[str, Callable[[str], str]]], ...] = (
    {"token_file": ("CONSUL_HTTP_TOKEN_FILE", rules.absolute)},
    {"ca_file": ("CONSUL_CACERT", rules.absolute), "ca_path": ("CONSUL_CAPATH", rules.folder_path)},
    {"cert_file": ("CONSUL_CLIENT_CERT", rules.absolute), "key_file": ("CONSUL_CLIENT_KEY", rules.absolute)},
    {"tls_server_name": ("CONSUL_TLS_SERVER_NAME", rules.host)},
    {"namespace": ("CONSUL_NAMESPACE", rules.word)},
    {"partition": ("CONSUL_PARTITION", rules.word)},
)
_SECRET_FILES = frozenset({"token_file", "key_file"})


def _consul(
    section: ConsulSection, file: str, environ: Mapping[str, str], findings: _Findings
) -> tuple[ConsulConfig, dict[str, str]]:
    """Consul's section, and where each of its keys was written.

    An empty variable is an unset one, and a token file beats a token (consul: api/api.go, defaultConfig, NewClient).
    """
    origins: dict[str, str] = {}
    values: dict[str, Any] = {}

    def variable(name: str, key: str) -> str | None:
        value = environ.get(name) or None
        if value is not None:
            origins[key] = f"environment: {name}"
        return value

    for key in ("address", "tls_verify", "datacenter", *(key for group in VARIABLES for key in group)):
        if getattr(section, key) is not None:
            origins[key] = f"{file}: consul.{key}"
    for group in VARIABLES:
        written = any(key in origins for key in group)
        for key, (name, rule) in group.items():
            value = getattr(section, key) if written else variable(name, key)
            values[key] = findings.check(origins.get(key, ""), rule, value)
    # consul: go-rootcerts, LoadCACerts takes the file and then does not look at the folder
    if values["ca_file"] is not None and section.ca_file is None:
        values["ca_path"] = None
    if ("cert_file" in origins) != ("key_file" in origins):
        (present, absent) = ("cert_file", "key_file") if "cert_file" in origins else ("key_file", "cert_file")
        findings.add(
            origins[present],
            f"has no {absent} beside it (allowed: both or none, as for the consul command; one file may serve as both)",
        )
    verify = section.tls_verify
    if verify is None:
        verify = findings.check(
            "environment: CONSUL_HTTP_SSL_VERIFY", rules.boolean, variable("CONSUL_HTTP_SSL_VERIFY", "tls_verify")
        )
    token = variable("CONSUL_HTTP_TOKEN", "token") if section.token_file is None else None
    return ConsulConfig(
        addresses=_addresses(section, file, environ, findings),
        token=findings.check("environment: CONSUL_HTTP_TOKEN", rules.token, token),
        tls_verify=verify is not False,
        datacenter=findings.check(f"{file}: consul.datacenter", rules.word, section.datacenter),
        consistency=section.consistency,
        **values,
    ), origins


def _addresses(section: ConsulSection, file: str, environ: Mapping[str, str], findings: _Findings) -> tuple[str, ...]:
    if section.address is not None:
        at = f"{file}: consul.address"
        written = [section.address] if isinstance(section.address, str) else section.address
        addresses = tuple(dict.fromkeys(findings.check(at, rules.address, each) or "" for each in written))
        if len(addresses) > 1 and any(each.startswith("file://") for each in addresses):
            findings.add(at, "a file:// stands alone: it holds all there is (allowed: one file://, or servers)")
        return addresses
    tls = environ.get("CONSUL_HTTP_SSL") or None
    encrypted = findings.check("environment: CONSUL_HTTP_SSL", rules.boolean, tls) or False
    value = environ.get("CONSUL_HTTP_ADDR") or "127.0.0.1:8500"
    at = "environment: CONSUL_HTTP_ADDR"
    scheme = value.partition("://")[0] if "://" in value else "http"
    if scheme == "file":
        findings.add(at, "the consul command knows no file:// (allowed: HOST:PORT, http://, https://, unix://)")
    if scheme == "unix" and encrypted:
        findings.add("environment: CONSUL_HTTP_SSL", f"no TLS over a unix socket, which {at[13:]} names")
    if scheme in rules.PORTS:
        # consul: api/api.go, NewClient: "Never revert to http if TLS was explicitly requested."
        value = ("https" if encrypted else scheme) + "://" + value.removeprefix(f"{scheme}://")
    return (findings.check(at, rules.address, value) or "",)


def _settings(section: TableSection, at: str, findings: _Findings) -> dict[str, Any]:
    """What the section says, as arguments of `Table`; what it does not say is absent, but for the paths."""
    settings = {key: value for key, value in msgspec.structs.asdict(section).items() if value is not None}
    settings.pop("table", None)
    for key, rule in (("prefix", rules.prefix), ("services", rules.services), ("snapshot", rules.absolute)):
        if key in settings:
            settings[key] = findings.check(f"{at}.{key}", rule, settings[key])
    paths = {}
    for service, path in settings.get("paths", {}).items():
        if service not in SERVICES:
            findings.add(f"{at}.paths.{printable(service)}", f"unknown service {rules.choice(service, SERVICES)}")
        paths[service] = findings.check(f"{at}.paths.{printable(service)}", rules.consul_path, path)
    return {**settings, "paths": paths}


def _table(name: str, settings: dict[str, Any]) -> Table:
    return Table(**{**settings, "name": name, "paths": MappingProxyType(settings["paths"])})


def _named(table: Table) -> Table:
    """The table with its name in the path of its snapshot, as each table has a process and a copy of its own."""
    return msgspec.structs.replace(table, snapshot=table.snapshot and table.snapshot.replace("{table}", table.name))
