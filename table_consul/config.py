"""The configuration: one TOML file, and the environment of the ``consul`` command for keys that the file does not set.

Each key is declared once, as a field of the Struct that the rest of the program reads: `ConsulConfig`, `LogConfig`,
`MetricsConfig`, and `Table` for ``[defaults]`` and ``[tables.NAME]``. msgspec checks its type, `VALIDATORS` the rest.
Nothing here opens the files that a configuration names (check.py does), or reads any environment but the one passed in.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from codecs import BOM_UTF8
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta
from msgspec.structs import FieldInfo, fields, replace

from table_consul.errors import ConfigError, SourceError, printable
from table_consul.files import explain_os_error, open_regular_file, read_bounded
from table_consul.services import SERVICES, Table

# Beside smtpd.conf where OpenSMTPD comes from ports, and in /etc/mail elsewhere.
_PORTS = sys.platform.startswith(("freebsd", "dragonfly"))
DEFAULT_PATH = f"{'/usr/local' if _PORTS else ''}/etc/mail/table-consul.toml"

# Enough for thousands of tables; a large file that is named by mistake does not exhaust the memory.
SIZE_MAX = 4 * 1024 * 1024

# The port of a URL without one, as in Consul's own client (consul: api/api.go, NewClient adds none).
PORTS = {"http": 80, "https": 443}


class ConsulConfig(msgspec.Struct, frozen=True):
    """``[consul]``: the connection to Consul."""

    addresses: Annotated[tuple[str, ...], Meta(min_length=1, description="an address or a list of addresses")] = (
        msgspec.field(default=("http://127.0.0.1:8500",), name="address")
    )
    """``http://h:p``, ``https://h:p``, ``unix:///path``, or a single ``file:///path``."""
    token: str | None = None
    """From the environment only, because people share their configuration files."""
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
    consistency: Literal["default", "stale", "consistent"] = "default"

    @property
    def file(self) -> str | None:
        """The file that is read instead of Consul, None if there is none."""
        scheme, _, path = self.addresses[0].partition("://")
        return path if scheme == "file" else None

    def __repr__(self) -> str:
        """Without the token, which must not be printed with a configuration."""
        return f"ConsulConfig({', '.join(self.addresses)})"


class LogConfig(msgspec.Struct, frozen=True):
    """``[log]``: level and destination of log messages."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    target: Literal["auto", "syslog", "stderr"] = "auto"


class MetricsConfig(msgspec.Struct, frozen=True):
    """``[metrics]``: where metrics go. Both may contain ``{table}``, as each table has a process of its own."""

    textfile: str | None = None
    listen: str | None = None


class Config(msgspec.Struct, frozen=True):
    """The whole configuration, checked and immutable. A reload builds another one."""

    path: str | None
    """The file, None if there is none."""
    consul: ConsulConfig = msgspec.field(default_factory=ConsulConfig)
    log: LogConfig = msgspec.field(default_factory=LogConfig)
    metrics: MetricsConfig = msgspec.field(default_factory=MetricsConfig)
    defaults: Table = msgspec.field(default_factory=lambda: Table("consul"))
    """``[defaults]``; its name is that of the table in a dialect without table names."""
    tables: Mapping[str, Table] = msgspec.field(default_factory=dict)
    """The tables that have a section of their own."""
    origins: Mapping[str, str] = msgspec.field(default_factory=dict)
    """``environment: VARIABLE`` for each key of ``consul`` that the environment sets, for messages."""

    @property
    def summary(self) -> str:
        """The file, or that there is none, and the addresses; for the log."""
        missing = f"no {DEFAULT_PATH}, using the defaults and the environment"
        return f"{missing if self.path is None else printable(self.path)}; address: {', '.join(self.consul.addresses)}"

    def table(self, name: str) -> Table:
        """The settings of this table: its ``[tables.NAME]`` if there is one, else ``[defaults]``.

        Raises:
            ConfigError: the name cannot be a folder in Consul; in the dialects of 2020 each request has one.
        """
        if name in self.tables:
            return self.tables[name]
        try:
            return _table(self.defaults, _table_name(name), {})
        except ValueError as error:
            raise ConfigError(str(error)) from None


# The variables of the consul command, except those of the address. If the file sets any key of a group, the
# environment sets none of them: they are alternatives or belong together.
VARIABLES: tuple[dict[str, str], ...] = (
    {"token_file": "CONSUL_HTTP_TOKEN_FILE", "token": "CONSUL_HTTP_TOKEN"},
    {"ca_file": "CONSUL_CACERT", "ca_path": "CONSUL_CAPATH"},
    {"cert_file": "CONSUL_CLIENT_CERT", "key_file": "CONSUL_CLIENT_KEY"},
    {"tls_server_name": "CONSUL_TLS_SERVER_NAME"},
    {"tls_verify": "CONSUL_HTTP_SSL_VERIFY"},
    {"namespace": "CONSUL_NAMESPACE"},
    {"partition": "CONSUL_PARTITION"},
)

# Validators: each returns the value in its normal form, or raises ValueError with a text for each mistake. No text
# quotes a value that may be a secret under the wrong key.


def _absolute_path(value: str) -> str:
    if not value.startswith("/"):
        raise ValueError("must be an absolute path (smtpd starts tables in /)")
    if value.endswith("/") or not value.isprintable():
        raise ValueError("must not end in / or contain unprintable characters (remove them)")
    return value


def _visible_ascii(value: str) -> str:
    """The value, which becomes part of an HTTP request."""
    if not re.fullmatch(r"[!-~]+", value):
        raise ValueError("must be visible ASCII characters, without spaces or line breaks (remove all others)")
    return value


_HOST = r"(?:[A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}\.?"
_HOST_PORT = re.compile(rf"(?:\[([0-9A-Fa-f:.]+)\]|({_HOST}))(?::([0-9]{{1,5}}))?")


def _host_port(text: str, default_port: int) -> tuple[str, int] | None:
    """Host and port of HOST:PORT or [IPv6]:PORT; None for any other text."""
    if (match := _HOST_PORT.fullmatch(text)) is None:
        return None
    ipv6, host, port = match[1], match[2], int(match[3] or default_port)
    if ipv6:
        from ipaddress import IPv6Address

        try:
            host = str(IPv6Address(ipv6))
        except ValueError:
            return None
    return (host.lower(), port) if 1 <= port <= 65535 else None


def _host_name(value: str) -> str:
    """The host name without a port, as the consul command drops it (consul: api/api.go, SetupTLSConfig)."""
    if (found := _host_port(value, 443)) is None:
        raise ValueError(f"invalid host name {_quoted(value)} (use the name in Consul's certificate)")
    return found[0]


def _table_name(value: str) -> str:
    """The name, which is one segment of a Consul path, and one field of a line in the protocol of smtpd."""
    if value in {"", ".", ".."} or {"/", "|"} & {*value} or not value.isprintable():
        hint = "(use printable characters other than / and |, not . or ..)"
        raise ValueError(f"invalid table name {_quoted(value)} {hint}")
    return value


def _consul_path(value: str) -> str:
    path = value.removeprefix("/").removesuffix("/")
    if not path.isprintable() or any(segment in {"", ".", ".."} for segment in path.split("/")):
        raise ValueError(f"invalid Consul path {_quoted(value)} (use printable segments, not empty, . or ..)")
    return path


def _services(value: tuple[str, ...]) -> tuple[str, ...]:
    """The services in the order of `SERVICES`, each once."""
    if unknown := [name for name in value if name not in SERVICES]:
        raise ValueError(*(f"unknown service {_quoted(name)} {_suggestion(name, SERVICES)}" for name in unknown))
    return tuple(name for name in SERVICES if name in value)


def _delimiter(value: str) -> str:
    """The character, as smtpd allows it (smtpd: parse.y, sub-addr-delim)."""
    if not re.fullmatch("[!-?A-~]", value):
        raise ValueError("must be one visible ASCII character other than @ (use that of `smtp sub-addr-delim`)")
    return value


def _addresses(values: tuple[str, ...]) -> tuple[str, ...]:
    mistakes = _Mistakes()
    normal = tuple(dict.fromkeys(mistakes.check("", _address, value) for value in values))
    if len(values) > 1 and any(each.startswith("file://") for each in values):
        mistakes.append("file:// cannot be combined with other addresses (remove it or the others)")
    if mistakes:
        raise ValueError(*mistakes)
    return normal


def _address(value: str) -> str:
    scheme, _, rest = value.partition("://")
    if scheme in {"unix", "file"}:
        # linux: unix(7), sun_path holds 108 bytes, the last of which is NUL; OpenBSD's holds 104.
        if scheme == "unix" and len(rest.encode("utf-8", "surrogateescape")) > 103:
            raise ValueError("must be a socket path of at most 103 bytes (use a shorter path)")
        return f"{scheme}://{_absolute_path(rest)}"
    if scheme in PORTS and (found := _host_port(rest.removesuffix("/"), PORTS[scheme])):
        host = f"[{found[0]}]" if ":" in found[0] else found[0]
        return f"{scheme}://{host}:{found[1]}"
    # A value with one of these may contain a password or a token.
    quoted = "" if {*value} & {*"@?#"} else f" {_quoted(value)}"
    raise ValueError(f"invalid address{quoted} (use http://HOST:PORT, https://HOST:PORT, unix:///PATH or file:///PATH)")


def _listen_address(value: str) -> str:
    """The address, which must be local: metrics reveal much about the mail of a host."""
    if value.startswith("unix://"):
        return _address(value)
    found = _host_port(value, 0)
    if found and (found[0] == "::1" or re.fullmatch(r"127(\.(25[0-5]|2[0-4]\d|1?\d?\d)){3}", found[0])):
        return value
    raise ValueError(f"invalid listen address {_quoted(value)} (use 127.0.0.1:PORT, [::1]:PORT or unix:///PATH)")


def _boolean(value: str) -> bool:
    """The boolean in a variable, as the consul command reads it (Go's strconv.ParseBool)."""
    if not re.fullmatch("1|t|T|TRUE|true|True|0|f|F|FALSE|false|False", value):
        raise ValueError(f"must be a boolean, not {_quoted(value)} (use true or false)")
    return value[0] in "1tT"


# Checks of a key's value beyond its type; "path" is the value of a service in paths.
VALIDATORS: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("token_file", "ca_file", "cert_file", "key_file", "snapshot", "textfile"), _absolute_path),
    **dict.fromkeys(("token", "datacenter", "namespace", "partition"), _visible_ascii),
    "address": _addresses,
    "ca_path": lambda folder: _absolute_path(folder.removesuffix("/")),
    "tls_server_name": _host_name,
    "table": _table_name,
    "prefix": lambda path: "" if path in {"", "/"} else _consul_path(path),
    "services": _services,
    "subaddress_delimiter": _delimiter,
    "path": _consul_path,
    "listen": _listen_address,
}

# The keys of each section of the file: a field of its Struct, or the keys of a section below it. "tables" is for
# every [tables.NAME].
KEYS: dict[str, dict[str, Any]] = {
    section.name: {field.encode_name: field for field in fields(section.type)}
    for section in fields(Config)
    if section.name in {"consul", "defaults", "log", "metrics"}
}
KEYS["defaults"]["paths"] = {name: FieldInfo(name, "path", str) for name in SERVICES}
KEYS["tables"] = {key: field for key, field in KEYS["defaults"].items() if key != "table"}
del KEYS["consul"]["token"]


def _convert(field: FieldInfo, raw: object) -> Any:  # noqa: ANN401 - of the type of the field
    if field.encode_name == "address" and isinstance(raw, str):
        raw = [raw]
    try:
        value = msgspec.convert(raw, field.type)
    except msgspec.ValidationError:
        raise ValueError(f"must be {_expected(field.type)} {_example(field)}") from None
    return VALIDATORS.get(field.encode_name, lambda valid: valid)(value)


def _expected(form: Any) -> str:  # noqa: ANN401 - a type as annotations spell it
    if hasattr(form, "__metadata__"):
        return str(form.__metadata__[0].description)
    if choices := [each for each in get_args(form) if isinstance(each, str)]:
        return f"one of {', '.join(choices)}"
    return "true or false" if form is bool else "a string"


def _example(field: FieldInfo) -> str:
    """A hint in parentheses: the default in TOML, or how to write a string."""
    default = field.default[:1] if isinstance(field.default, tuple) else field.default
    if field.type in {str, str | None}:
        return "(write it in quotes)"
    return f"(try: {field.encode_name} = {msgspec.json.encode(default).decode()})"


def _suggestion(word: str, options: Collection[str]) -> str:
    """A hint in parentheses: the option that was probably meant, or all of them."""
    from difflib import get_close_matches

    close = get_close_matches(word[:100], options, 1)
    return f"(did you mean {close[0]}?)" if close else f"(use one of: {', '.join(options)})"


def _quoted(text: str) -> str:
    return f"'{printable(text, 60)}'"


def load(path: str | None, environ: Mapping[str, str]) -> Config:
    """The configuration from a file and the environment; a ``path`` of None is `DEFAULT_PATH`, if that exists.

    Does not open the files that the configuration names; `check.check_files` does.

    Raises:
        ConfigError: its text is the first mistake, one line; its notes (``__notes__``) are the others, a line each.
    """
    file = DEFAULT_PATH if path is None else path
    at, mistakes = printable(file), _Mistakes()
    document: dict[str, Any] | None = None
    try:
        with open(file, "rb", opener=open_regular_file) as opened:
            text = read_bounded(opened, SIZE_MAX).removeprefix(BOM_UTF8)  # of Windows editors
            document = tomllib.loads(text.decode())
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError) and not os.path.islink(file)
        if path is not None or not missing:
            raise ConfigError(f"{at}: {explain_os_error(file, error)}") from None
    except (SourceError, ValueError, RecursionError) as error:
        raise ConfigError(f"{at}: cannot be read as TOML: {_syntax_problem(error)}") from None
    keys = {**KEYS, "tables": {"*": KEYS["tables"]}}
    sections = mistakes.section({**{name: {} for name in KEYS}, **(document or {})}, at, "", keys)
    origins = _environment(sections["consul"], environ, at, mistakes)
    defaults = Table(**{"name": "consul", **sections["defaults"]})
    tables = {name: _table(defaults, name, own) for name, own in sections["tables"].items()}
    for name in tables:
        mistakes.check(f"{at}: tables.{printable(name)}: ", _table_name, name)
    if mistakes:
        refusal = ConfigError(mistakes[0])
        refusal.__notes__ = mistakes[1:]
        raise refusal
    return Config(
        path=None if document is None else file,
        consul=ConsulConfig(**sections["consul"]),
        log=LogConfig(**sections["log"]),
        metrics=MetricsConfig(**sections["metrics"]),
        defaults=defaults,
        tables=tables,
        origins=origins,
    )


def _syntax_problem(error: Exception) -> str:
    """The text of an error of the parser, with a hint."""
    text = printable(str(error))
    if isinstance(error, tomllib.TOMLDecodeError):
        return f"{text.removesuffix(')')}; correct it there)"
    hint = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else "name a TOML file"
    return f"{text} ({hint})"


def _table(defaults: Table, name: str, own: dict[str, Any]) -> Table:
    """The table with its name in the path of its snapshot, as each table has a process and a snapshot of its own."""
    snapshot, paths = own.get("snapshot", defaults.snapshot), {**defaults.paths, **own.get("paths", {})}
    changes = {**own, "name": name, "paths": paths, "snapshot": snapshot and snapshot.replace("{table}", name)}
    return replace(defaults, **changes)


class _Mistakes(list[str]):
    """All mistakes of a configuration, a line each, so that one run reports all of them."""

    def check(self, origin: str, convert: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401 - see convert
        """The value that convert returns, None if it finds mistakes."""
        try:
            return convert(*arguments)
        except ValueError as error:
            self.extend(f"{origin}{text}" for text in error.args)
            return None

    def section(self, raw: object, file: str, name: str, keys: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a section in their normal form, by the fields of its Struct."""
        if not isinstance(raw, dict):
            self.append(f"{file}: {name}: must be a section (write [{name}] on a line of its own)")
            return {}
        values: dict[str, Any] = {}
        for key, value in raw.items():
            path = f"{name}.{printable(key)}" if name else printable(key)
            field = keys.get(key, keys.get("*"))
            if field is None:
                self.append(f"{file}: {path}: unknown key {_suggestion(key, keys)}")
            elif isinstance(field, FieldInfo):
                values[field.name] = self.check(f"{file}: {path}: ", _convert, field, value)
            else:
                values[key] = self.section(value, file, path, field)
        return values


def _environment(consul: dict[str, Any], environ: Mapping[str, str], file: str, errors: _Mistakes) -> dict[str, str]:
    """Add the fields that the environment sets to those that the file sets, and return the origins of their keys."""
    origins: dict[str, str] = {}
    unset = [group for group in VARIABLES if group.keys().isdisjoint(consul)]
    for key, name in (variable for group in unset for variable in group.items()):
        if value := environ.get(name):  # an empty variable counts as unset (consul: api/api.go, defaultConfig)
            origins[key] = f"environment: {name}"
            validate = _boolean if key == "tls_verify" else VALIDATORS[key]
            consul[key] = errors.check(f"{origins[key]}: ", validate, value)
    # consul: go-rootcerts, LoadCACerts ignores the folder if there is a file
    if "ca_file" in origins:
        consul.pop("ca_path", None)
    for present, absent in (("cert_file", "key_file"), ("key_file", "cert_file")):
        if present in consul and absent not in consul:
            origin = origins.get(present, f"{file}: consul.{present}")
            errors.append(f"{origin}: set without {absent} (set both or neither; one file may serve as both)")
    addr, ssl = environ.get("CONSUL_HTTP_ADDR"), environ.get("CONSUL_HTTP_SSL")
    if "addresses" not in consul and (addr or ssl):
        origins["address"] = "environment: CONSUL_HTTP_ADDR"
        tls = ssl and errors.check("environment: CONSUL_HTTP_SSL: ", _boolean, ssl)
        consul["addresses"] = errors.check(f"{origins['address']}: ", _http_addr, addr or "127.0.0.1:8500", tls)
    return origins


def _http_addr(value: str, tls: bool | None) -> tuple[str, ...]:  # noqa: FBT001 - both come from the environment
    """CONSUL_HTTP_ADDR as a list of addresses, as the consul command takes it (consul: api/api.go, NewClient)."""
    scheme = value.partition("://")[0] if "://" in value else "http"
    if scheme == "file" or (scheme == "unix" and tls):
        hint = "set address in the configuration" if scheme == "file" else "unset CONSUL_HTTP_SSL"
        raise ValueError(f"the consul command does not support {scheme}://{' with TLS' if tls else ''} ({hint})")
    # "Never revert to http if TLS was explicitly requested."
    if scheme == "http":
        value = f"{'https' if tls else 'http'}://{value.removeprefix('http://')}"
    return (_address(value),)
