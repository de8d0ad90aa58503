"""The configuration: one TOML file, and the environment of the ``consul`` command where the file is silent.

Knows nothing of Consul's HTTP or of smtpd's wire, and reads no environment but the one passed in. The shape of the
file is `_Document`, which msgspec holds it to. What msgspec cannot say (addresses, paths, names) are rules: functions
that give the value in its one normal form, or raise ValueError with what is wrong. `_misshapen` runs only to explain a
refusal: it names every key, where msgspec stops at the first.

Longer than other modules, as the closed set of keys, the environment and their checks are one subject.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta

from table_consul.errors import ConfigError, shown
from table_consul.services import SERVICES, Table

T = TypeVar("T")

DEFAULT_PATH = "/etc/mail/table-consul.toml"

# A configuration for thousands of tables fits; /dev/zero given by mistake does not fill the memory of the mail host.
SIZE_MAX = 4 * 1024 * 1024
# linux: unix(7), sun_path holds 108 bytes, the last of which is NUL; OpenBSD's holds 104.
SOCKET_PATH_MAX = 103

_HOST = r"(?:[A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}\.?"
_HOST_PORT = re.compile(rf"(\[[0-9A-Fa-f:.]+\]|{_HOST})(?::([0-9]{{1,5}}))?/?")
# What a URL means without a port; so does Consul's own client (consul: api/api.go, NewClient adds none).
_PORTS = {"http": 80, "https": 443}
# go: strconv.ParseBool
_BOOLEANS = {
    **dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True),
    **dict.fromkeys(("0", "f", "F", "FALSE", "false", "False"), False),
}

_STRINGS = "a string, or a list of strings"
_SERVICES = ", ".join(SERVICES)


class _Consul(msgspec.Struct, forbid_unknown_fields=True):
    address: Annotated[str | Annotated[list[str], Meta(min_length=1)], Meta(description=_STRINGS)] | None = None
    token_file: str | None = None
    ca_file: str | None = None
    ca_path: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    tls_server_name: str | None = None
    tls_verify: bool | None = None
    datacenter: str | None = None
    namespace: str | None = None
    partition: str | None = None
    consistency: Literal["default", "stale", "consistent"] = "default"


class _Table(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    prefix: str | None = None
    mode: Literal["mirror", "direct"] | None = None
    services: (
        Annotated[list[str], Meta(min_length=1, description=f"a list with at least one of {_SERVICES}")] | None
    ) = None
    deadline: Annotated[float, Meta(ge=0.05, le=60, description="seconds, 0.05 to 60")] | None = None
    max_age: Annotated[float, Meta(gt=0, le=1e10, description="seconds, more than 0")] | None = None
    max_keys: Annotated[int, Meta(ge=1, description="a whole number, 1 or more")] | None = None
    snapshot: str | None = None
    value_format: Literal["auto", "text", "json"] | None = None
    fetch: Literal["keys", "values"] | None = None
    allow_commands: bool | None = None
    allow_root: bool | None = None
    procexec_reply: Literal["auto", "table-response", "table-result"] | None = None
    paths: Annotated[dict[str, str], Meta(description="a table of strings")] | None = None


class _Defaults(_Table):
    table: str | None = None


class _Log(msgspec.Struct, forbid_unknown_fields=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    target: Literal["auto", "syslog", "stderr"] = "auto"


class _Metrics(msgspec.Struct, forbid_unknown_fields=True):
    textfile: str | None = None
    listen: str | None = None


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    consul: _Consul = msgspec.field(default_factory=_Consul)
    defaults: _Defaults = msgspec.field(default_factory=_Defaults)
    tables: dict[str, _Table] = msgspec.field(default_factory=dict)
    log: _Log = msgspec.field(default_factory=_Log)
    metrics: _Metrics = msgspec.field(default_factory=_Metrics)


@dataclass(frozen=True, slots=True)
class ConsulConfig:
    """How Consul is reached. Addresses are ``http://h:p``, ``https://h:p``, ``unix:///path``, or one ``file:///path``."""

    addresses: tuple[str, ...] = ("http://127.0.0.1:8500",)
    token: str | None = field(default=None, repr=False)
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


@dataclass(frozen=True, slots=True)
class LogConfig:
    """What is logged, and where to."""

    level: str = "info"
    target: str = "auto"


@dataclass(frozen=True, slots=True)
class MetricsConfig:
    """Where numbers go, if anywhere; both may hold ``{table}``, as each table has a process of its own."""

    textfile: str | None = None
    listen: str | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """All of the configuration, checked. A reload builds another one."""

    path: str | None
    """The file, None when there is none."""
    consul: ConsulConfig = field(default_factory=ConsulConfig)
    log: LogConfig = field(default_factory=LogConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    defaults: Table = field(default_factory=lambda: Table("consul"))
    """``[defaults]``; its name is that of the table where a dialect brings none."""
    tables: Mapping[str, Table] = field(default_factory=lambda: MappingProxyType({}))
    """The tables that have a section of their own."""
    origins: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), repr=False, compare=False)
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
            return _named(replace(self.defaults, name=_table_name(name)))
        except ValueError as error:
            raise ConfigError(f"table name: {error}") from None


def load(path: str | None, environ: Mapping[str, str]) -> Config:
    """The configuration in the file, `DEFAULT_PATH` (if there is such a file) when None, and in the environment.

    Raises:
        ConfigError: with the first thing that is wrong as its text, one line, and all further ones as notes
            (``__notes__``), a line each. Files that the configuration names are not opened: see `problems`.

    """
    document = {}
    if path is not None or _exists(DEFAULT_PATH):
        path = path or DEFAULT_PATH
        document = _parse(path)
    try:
        shape = msgspec.convert(document, _Document)
    except msgspec.ValidationError as error:
        _refuse([f"{path}: {line}" for line in _misshapen(_Document, document)] or [f"{path}: {error}"])
        raise
    findings = _Findings()
    consul, origins = _consul(shape.consul, path, environ, findings)
    defaults = _settings(shape.defaults, f"{path}: defaults", findings)
    tables = {}
    for name, section in shape.tables.items():
        at = f"{path}: tables.{shown(name)}"
        findings.check(at, _table_name, name)
        tables[name] = {**defaults, **_settings(section, at, findings)}
        tables[name]["paths"] = {**defaults["paths"], **tables[name]["paths"]}
    default_table = findings.check(f"{path}: defaults.table", _table_name, shape.defaults.table)
    metrics = MetricsConfig(
        findings.check(f"{path}: metrics.textfile", _absolute, shape.metrics.textfile),
        findings.check(f"{path}: metrics.listen", _listen, shape.metrics.listen),
    )
    _refuse(findings.lines)
    return Config(
        path=path,
        consul=consul,
        log=LogConfig(shape.log.level, shape.log.target),
        metrics=metrics,
        defaults=_built(default_table or "consul", defaults),
        tables=MappingProxyType({name: _named(_built(name, settings)) for name, settings in tables.items()}),
        origins=MappingProxyType(origins),
    )


def problems(config: Config) -> list[str]:
    """What would keep this user from working with the configuration, or gives a secret away; a line each.

    For ``--check``, not for `load`: a mail server starts although a token is written only a second later.
    """
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
        if path is not None and (what := _unreadable(path, folder=key == "ca_path", secret=key in _SECRET_FILES)):
            found.append(f"{config.origins.get(key, f'consul.{key}')}: {shown(path)}: {what}")
    if config.path is not None and (what := _unreadable(config.path)):
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
            at = f"{config.path}: {key} of table {shown(table.name)}"
            if path in written:
                found.append(f"{at}: table {shown(written[path])} has the same file (put {{table}} into its name)")
            elif what := _unwritable(os.path.dirname(path), path, private=key == "snapshot"):
                found.append(f"{at}: {what}")
            written[path] = table.name
    return found


# ---- the file ----


def _exists(path: str) -> bool:
    """Whether there is such a file; one that this user may not see is there, and its absence a surprise."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _parse(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            data = file.read(SIZE_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{shown(path)}: {_refusal(path, error)}") from None
    except ValueError:
        raise ConfigError(f"{shown(path)}: no file has such a name") from None
    if len(data) > SIZE_MAX:
        raise ConfigError(f"{path}: larger than {SIZE_MAX} bytes")
    try:
        return tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}: not UTF-8 (at line {line}, byte {data[error.start]:#04x})") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{path}: no valid TOML: {shown(str(error))}") from None


def _refuse(lines: list[str]) -> None:
    if not lines:
        return
    error = ConfigError(lines[0])
    for line in lines[1:]:
        error.add_note(line)
    raise error


def _misshapen(shape: Any, raw: object, at: str = "") -> Iterator[str]:
    """Every way in which the raw value is not of the shape, as ``key: what is wrong (allowed: ...)``."""
    dotted = f"{at}." if at else ""
    if not (isinstance(shape, type) and issubclass(shape, msgspec.Struct)):
        try:
            msgspec.convert(raw, shape)
        except msgspec.ValidationError:
            if get_origin(shape) is dict and isinstance(raw, dict):
                for key, value in raw.items():
                    yield from _misshapen(get_args(shape)[1], value, f"{dotted}{shown(key)}")
            else:
                yield f"{at}: {_mismatch(shape, raw)}"
    elif not isinstance(raw, dict):
        yield f"{at}: a table was expected, not {_kind(raw)} (allowed: [{at}] on a line, and its keys below it)"
    else:
        shapes = {each.name: each.type for each in msgspec.structs.fields(shape)}
        for key, value in raw.items():
            if key in shapes:
                yield from _misshapen(shapes[key], value, f"{dotted}{key}")
            else:
                yield f"{dotted}{shown(key)}: unknown key {_choice(key, shapes)}"


def _mismatch(shape: Any, raw: object) -> str:
    """Why the raw value does not fit; a text is only quoted where it cannot be a secret put beside the wrong key."""
    choices = [choice for each in get_args(shape) if get_origin(each) is Literal for choice in get_args(each)]
    choices = choices or list(get_args(shape) if get_origin(shape) is Literal else ())
    if choices and isinstance(raw, str):
        return f"{_quoted(raw)} is none of the choices {_choice(raw, choices)}"
    given = str(raw) if type(raw) in {int, float} else _kind(raw)
    if choices:
        return f"a string was expected, not {shown(given)} (allowed: {', '.join(choices)})"
    described = [
        meta.description
        for each in (shape, *get_args(shape))
        for meta in getattr(each, "__metadata__", ())
        if isinstance(meta, Meta) and meta.description
    ]
    plain = [_KINDS[each] for each in (shape, *get_args(shape)) if each in _KINDS]
    return f"{shown(given, 40)} does not fit (allowed: {' or '.join(described or plain)})"


_KINDS: dict[Any, str] = {str: "a string", bool: "true or false", int: "a whole number", float: "a number"}
_RAW_KINDS: dict[Any, str] = {**_KINDS, bool: "a boolean", list: "a list", dict: "a table"}


def _kind(raw: object) -> str:
    if raw == []:
        return "an empty list"
    return _RAW_KINDS.get(type(raw), "a date or time")


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


# ---- sections ----

# Keys that mean something together: where the file has one of them, the environment has no say in the others.
_GROUPS: tuple[dict[str, tuple[str, Callable[[str], str]]], ...] = (
    {"token_file": ("CONSUL_HTTP_TOKEN_FILE", _absolute)},
    {"ca_file": ("CONSUL_CACERT", _absolute), "ca_path": ("CONSUL_CAPATH", _folder_path)},
    {"cert_file": ("CONSUL_CLIENT_CERT", _absolute), "key_file": ("CONSUL_CLIENT_KEY", _absolute)},
    {"tls_server_name": ("CONSUL_TLS_SERVER_NAME", _host)},
    {"namespace": ("CONSUL_NAMESPACE", _word)},
    {"partition": ("CONSUL_PARTITION", _word)},
)
_SECRET_FILES = frozenset({"token_file", "key_file"})


def _consul(
    section: _Consul, path: str | None, environ: Mapping[str, str], findings: _Findings
) -> tuple[ConsulConfig, dict[str, str]]:
    """Consul's section, and where each of its keys was written.

    An empty variable is an unset one, and a token file beats a token (consul: api/api.go, defaultConfig, NewClient).
    """
    origins: dict[str, str] = {}
    values: dict[str, str | None] = {}

    def variable(name: str, key: str) -> str | None:
        value = environ.get(name) or None
        if value is not None:
            origins[key] = f"environment: {name}"
        return value

    for key in ("address", "tls_verify", "datacenter", *(key for group in _GROUPS for key in group)):
        if getattr(section, key) is not None:
            origins[key] = f"{path}: consul.{key}"
    for group in _GROUPS:
        written = any(key in origins for key in group)
        for key, (name, rule) in group.items():
            value = getattr(section, key) if written else variable(name, key)
            values[key] = findings.check(origins.get(key, ""), rule, value)
    # consul: go-rootcerts, LoadCACerts takes the file and then does not look at the folder
    if values["ca_file"] is not None and section.ca_file is None:
        values["ca_path"] = None
    if ("cert_file" in origins) != ("key_file" in origins):
        (present, absent) = ("cert_file", "key_file") if "cert_file" in origins else ("key_file", "cert_file")
        findings.add(origins[present], f"has no {absent} beside it (allowed: both or none; one file may hold both)")
    verify = section.tls_verify
    if verify is None:
        verify = findings.check(
            "environment: CONSUL_HTTP_SSL_VERIFY", _boolean, variable("CONSUL_HTTP_SSL_VERIFY", "tls_verify")
        )
    token = variable("CONSUL_HTTP_TOKEN", "token") if section.token_file is None else None
    return ConsulConfig(
        addresses=_addresses(section, path, environ, findings),
        token=findings.check("environment: CONSUL_HTTP_TOKEN", _token, token),
        tls_verify=verify is not False,
        datacenter=findings.check(f"{path}: consul.datacenter", _word, section.datacenter),
        consistency=section.consistency,
        **values,  # type: ignore[arg-type]
    ), origins


def _addresses(section: _Consul, path: str | None, environ: Mapping[str, str], findings: _Findings) -> tuple[str, ...]:
    if section.address is not None:
        at = f"{path}: consul.address"
        written = [section.address] if isinstance(section.address, str) else section.address
        addresses = tuple(dict.fromkeys(findings.check(at, _address, each) or "" for each in written))
        if len(addresses) > 1 and any(each.startswith("file://") for each in addresses):
            findings.add(at, "a file:// stands alone: it holds all there is (allowed: one file://, or servers)")
        return addresses
    tls = environ.get("CONSUL_HTTP_SSL") or None
    encrypted = findings.check("environment: CONSUL_HTTP_SSL", _boolean, tls) or False
    value = environ.get("CONSUL_HTTP_ADDR") or "127.0.0.1:8500"
    at = "environment: CONSUL_HTTP_ADDR"
    scheme = value.partition("://")[0] if "://" in value else "http"
    if scheme == "file":
        findings.add(at, "the consul command knows no file:// (allowed: HOST:PORT, http://, https://, unix://)")
    if scheme == "unix" and encrypted:
        findings.add("environment: CONSUL_HTTP_SSL", f"no TLS over a unix socket, which {at[13:]} names")
    if scheme in _PORTS:
        # consul: api/api.go, NewClient: "Never revert to http if TLS was explicitly requested."
        value = ("https" if encrypted else scheme) + "://" + value.removeprefix(f"{scheme}://")
    return (findings.check(at, _address, value) or "",)


def _settings(section: _Table, at: str, findings: _Findings) -> dict[str, Any]:
    """What the section says, as arguments of `Table`; what it does not say is absent, but for the paths."""
    settings = {key: value for key, value in msgspec.structs.asdict(section).items() if value is not None}
    settings.pop("table", None)
    for key, rule in (("prefix", _prefix), ("services", _services), ("snapshot", _absolute)):
        if key in settings:
            settings[key] = findings.check(f"{at}.{key}", rule, settings[key])
    paths = {}
    for service, path in settings.get("paths", {}).items():
        if service not in SERVICES:
            findings.add(f"{at}.paths.{shown(service)}", f"unknown service {_choice(service, SERVICES)}")
        paths[service] = findings.check(f"{at}.paths.{shown(service)}", _consul_path, path)
    return {**settings, "paths": paths}


def _built(name: str, settings: dict[str, Any]) -> Table:
    return Table(**{**settings, "name": name, "paths": MappingProxyType(settings["paths"])})


def _named(table: Table) -> Table:
    """The table with its name in the path of its snapshot, as each table has a process and a copy of its own."""
    return replace(table, snapshot=table.snapshot and table.snapshot.replace("{table}", table.name))
