"""``table-consulctl status``: whether the tables' processes run and follow Consul, from the metrics they publish."""

from __future__ import annotations

import contextlib
import glob
import http.client
import os
import re
import shutil
import socket
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import click
import msgspec

from table_consul.config import Config, MetricsConfig
from table_consul.ctl.main import FAILED, NO, as_json, duration, pass_config
from table_consul.errors import ConfigError, SourceError, TableConsulError, Unreachable, printable
from table_consul.metrics import WRITE_INTERVAL_SECONDS
from table_consul.services import Table
from table_consul.sources.export import open_regular_file

if TYPE_CHECKING:
    from prometheus_client.samples import Sample

    from table_consul import kv

# An agent without a leader says so after 7 seconds (Consul 1.8.7).
CONSUL_SECONDS = 10.0
# What a daemon may take to load what Consul has; with a text file, that file has to be written, too.
LAG_SECONDS = 5.0
POLL_SECONDS = 0.25
# Three writes were missed: the process is gone, and its file stays.
STALE_SECONDS = 3 * WRITE_INTERVAL_SECONDS
# A daemon closes each connection within about half of this.
ANSWER_SECONDS = 10.0
# Some 200 bytes a series: more than one process has.
SIZE_MAX = 16 << 20
# No moment, index or count is larger, and time.localtime() takes none that is much so.
VALUE_MAX = 1e15

NOT_CONFIGURED = """\
no metrics are configured, so there is nothing to show. Add to {path}:

    [metrics]
    textfile = "/var/lib/prometheus/node-exporter/table-consul-{{table}}.prom"

or, without a node_exporter, in place of textfile

    listen = "unix:///run/table-consul/{{table}}.sock"

in a folder that smtpd's unprivileged user may write to. Then: smtpctl update table NAME"""


class Prefix(msgspec.Struct):
    """A folder of Consul that a table is read from; None where a value is unknown or does not apply."""

    prefix: str
    state: str
    healthy: bool
    index: int | None = None
    age: float | None = None
    """Seconds from when Consul confirmed the data until the metrics were taken."""
    keys: int | None = None
    refused: int | None = None
    hidden: list[str] = []
    """Services whose folder the token may not read."""
    last_error: str | None = None
    last_error_at: float | None = None
    consul_index: int | None = None
    ahead: bool | None = None
    """Whether Consul has changes that the table lacks."""
    remarks: list[str] = []


class Status(msgspec.Struct):
    """One table; moments in seconds since the epoch. ``healthy`` is None if it is unknown."""

    table: str
    state: str
    healthy: bool | None
    version: str | None = None
    started: float | None = None
    place: str | None = None
    taken: float | None = None
    """When the metrics were true."""
    live: bool = False
    """They come from a socket, not from a file."""
    remarks: list[str] = []
    prefixes: list[Prefix] = []


@click.command("status")
@click.argument("tables", metavar="[TABLE]...", nargs=-1)
@click.option("--offline", is_flag=True, help="Do not ask Consul whether it has newer data.")
@as_json
@pass_config
def command(config: Config, *, tables: tuple[str, ...], offline: bool, as_json: bool) -> int:
    """Show for each TABLE whether its process runs, and how old its data is.

    The processes publish this as metrics, so [metrics] textfile or listen must be configured. Consul is asked whether
    it has newer data; if so, status waits for the next metrics, with a textfile for up to 20 seconds.

    \b
    following    has what Consul has
    outage       Consul is unreachable
    expired      for longer than max_age
    no data      nothing was loaded yet
    loading      has just started
    too large    more than max_keys keys
    direct       as configured
    file         reads a file://
    not running  publishes no metrics

    In an outage, answers come from the last data. When it is expired, and without data, all answers are errors. If a
    table is too large or direct, each answer reads Consul. If a table that is not running should be, see its log.

    Without TABLE: all tables that are configured or publish metrics.

    Exit status: 0 all are following, direct or file; 1 some are not; 2 unknown.

    \b
    Examples:
      table-consulctl status
      table-consulctl status aliases
      table-consulctl status --json --offline
    """  # noqa: D301 - the mark by which click keeps lines as they are
    if config.metrics == MetricsConfig():
        path = printable(config.path or "a configuration file, and name it with -c")
        click.echo(f"table-consulctl: {NOT_CONFIGURED.format(path=path)}", err=True)
        return FAILED
    try:
        import prometheus_client.parser  # noqa: F401 - without it the daemons publish nothing either
    except ImportError as error:
        raise TableConsulError(
            f"metrics are read with {error.name or 'prometheus_client'}, which is not installed;"
            " install table-consul[metrics] or python3-prometheus-client"
        ) from None
    wanted = tables or sorted({*config.tables, *published_tables(config)}) or (config.defaults.name,)
    statuses = [status_of(config, config.table(name)) for name in dict.fromkeys(wanted)]
    if not offline and not config.consul.addresses[0].startswith("file://"):
        _compare(config, statuses)
    found = {status.healthy for status in statuses}
    healthy = False if False in found else None if None in found else True
    if as_json:
        document = {"healthy": healthy, "tables": statuses}
        click.echo(msgspec.json.format(msgspec.json.encode(document)))
    else:
        click.echo("\n\n".join(map(_text, statuses)))
    return {True: 0, False: NO, None: FAILED}[healthy]


# ---- metrics ----


class Unreadable(TableConsulError):
    """What is there is not the metrics of this table."""


def published_tables(config: Config) -> set[str]:
    """The tables for which there is a text file or socket, whether their process still runs or not."""
    found = set()
    for pattern in (config.metrics.textfile, config.metrics.listen and config.metrics.listen.removeprefix("unix://")):
        if not pattern or "{table}" not in pattern:
            continue
        before, *rest = pattern.split("{table}")
        expression = re.escape(before) + "([^/]+)" + r"\1".join(map(re.escape, rest))
        for path in glob.iglob("*".join(map(glob.escape, (before, *rest)))):
            if matched := re.fullmatch(expression, path):
                with contextlib.suppress(ConfigError):  # no table has such a name: another program's file
                    found.add(config.table(matched[1]).name)
    return found


def scrape(metrics: MetricsConfig, table: str, *, timeout: float = ANSWER_SECONDS) -> tuple[Status, list[Sample]]:
    """The latest metrics of this table: from ``listen`` if that answers within ``timeout`` seconds, or ``textfile``.

    The status says where they come from; without any, that the table is not running, or unknown, and why.
    """
    status = Status(table, "not running", healthy=False)
    for pattern, live in ((metrics.listen, True), (metrics.textfile, False)):
        if not pattern:
            continue
        source = pattern.replace("{table}", table)
        place = printable(source)
        try:
            data, taken = _get(source, timeout) if live else _read(source)
            age = time.time() - taken
            if age <= STALE_SECONDS:
                samples = _samples(data, table)
                return Status(table, "direct", healthy=True, place=place, taken=taken, live=live), samples
            text = (
                f"last written {age:.0f} s ago, while a running process writes it every {WRITE_INTERVAL_SECONDS:.0f} s"
            )
            text += " (remove the file if the table no longer exists)"
        except (FileNotFoundError, ConnectionRefusedError) as error:
            text = (error.strerror or str(error)).lower()
        except (OSError, http.client.HTTPException, Unreadable) as error:
            status.state, status.healthy = "unknown", None
            text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        status.remarks.append(f"{place}: {text}")
    return status, []


def _read(path: str) -> tuple[bytes, float]:
    with open(path, "rb", opener=open_regular_file) as file:
        return file.read(SIZE_MAX + 1), os.fstat(file.fileno()).st_mtime


def _get(listen: str, timeout: float) -> tuple[bytes, float]:
    by = time.monotonic() + timeout
    path = listen.removeprefix("unix://") if listen.startswith("unix://") else None
    host, _, port = listen.rpartition(":")
    family = socket.AF_UNIX if path else socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    connection = http.client.HTTPConnection("localhost")
    with socket.socket(family) as connection.sock:
        connection.sock.settimeout(timeout)
        connection.sock.connect(path or (host.strip("[]"), int(port)))
        connection.request("GET", "/metrics")
        with connection.getresponse() as response:
            if response.status != 200:
                raise Unreadable(f"answers with status {response.status}, not with metrics")
            data = b""
            while chunk := response.read1(1 << 16):
                data += chunk
                if len(data) > SIZE_MAX or time.monotonic() > by:
                    raise Unreadable("sends an answer without end")
    return data, time.time()


def _samples(data: bytes, table: str) -> list[Sample]:
    from prometheus_client.parser import text_string_to_metric_families

    if len(data) > SIZE_MAX:
        raise Unreadable(f"larger than {SIZE_MAX >> 20} MiB")
    try:
        samples = [s for family in text_string_to_metric_families(data.decode()) for s in family.samples]
    except Exception as error:  # noqa: BLE001 - the parser raises whatever slicing an odd line raises
        raise Unreadable(f"no Prometheus metrics ({type(error).__name__})") from None
    samples = [sample for sample in samples if sample.name.startswith("table_consul_")]
    if not any(sample.name == "table_consul_build_info" for sample in samples):
        raise Unreadable("no metrics of table-consul")
    if not all(abs(sample.value) < VALUE_MAX for sample in samples):
        raise Unreadable("values that table-consul does not write")  # NaN among them
    tables = {sample.labels["table"] for sample in samples if "table" in sample.labels}
    if table not in tables:
        others = ", ".join(sorted(map(printable, tables)))
        raise Unreadable(f"metrics of {others} only (put {{table}} into its name)")
    return samples


# ---- states ----


def status_of(config: Config, table: Table) -> Status:
    """What is published about the table and each of its folders. Needs prometheus_client."""
    status, samples = scrape(config.metrics, table.name)
    if not samples:
        return status
    prefixes: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.name == "table_consul_build_info":
            status.version = sample.labels.get("version")
        elif sample.name == "table_consul_start_time_seconds":
            status.started = sample.value
        elif sample.labels.get("table") == table.name and "prefix" in sample.labels:
            prefixes.setdefault(sample.labels["prefix"], []).append(sample)
    status.prefixes = [_prefix(name, found) for name, found in prefixes.items()]
    if config.consul.addresses[0].startswith("file://"):
        status.remarks.append(f"answers from {printable(config.consul.addresses[0])}")
        status.state = "file"
    elif not prefixes:
        status.remarks.append("no requests yet")
    _set_overall_state(status)
    return status


def _set_overall_state(status: Status) -> None:
    """Give the table the state of its first folder that is not healthy."""
    if status.prefixes:
        worst = next((prefix for prefix in status.prefixes if not prefix.healthy), status.prefixes[0])
        status.state, status.healthy = worst.state, worst.healthy


def _prefix(name: str, samples: Iterable[Sample]) -> Prefix:
    prefix = Prefix(name, "direct", healthy=True)
    values: dict[str, float] = {}
    for sample in samples:
        metric = sample.name.removeprefix("table_consul_")
        values[metric] = sample.value
        if metric == "service_hidden" and sample.value:
            prefix.hidden.append(sample.labels.get("service", "?"))
        elif metric == "last_error_timestamp_seconds":
            prefix.last_error, prefix.last_error_at = sample.labels.get("error"), sample.value
    whole = {metric: int(value) for metric, value in values.items()}
    prefix.index, prefix.keys = whole.get("snapshot_index"), whole.get("snapshot_keys")
    prefix.age, prefix.refused = values.get("snapshot_age_seconds"), whole.get("entries_refused")
    prefix.state = _state(values)
    prefix.healthy = prefix.state in ("following", "direct") and not prefix.hidden
    if prefix.state == "too large":
        prefix.remarks.append('raise max_keys, or configure mode = "direct"')
    if values.get("up") == 0 and (prefix.state == "too large" or "reloads_total" not in values):
        prefix.remarks.append("Consul cannot be read: every answer is an error")
    if prefix.hidden:
        prefix.hidden.sort()
        prefix.remarks.append(f"the token may not read {', '.join(prefix.hidden)}: answers there are errors")
    return prefix


def _state(values: dict[str, float]) -> str:
    """The state of a folder by its metrics."""
    up, age = values.get("up"), values.get("snapshot_age_seconds")
    mirrored = "reloads_total" in values
    if values.get("too_large"):
        return "too large"
    if up:
        return "following" if mirrored else "direct"
    if not mirrored:
        return "direct" if up is None else "outage"
    if age is not None and age > values.get("snapshot_max_age_seconds", age):
        return "expired"
    if not values.get("failures_total"):
        return "loading"
    return "no data" if age is None else "outage"


# ---- Consul ----


def _compare(config: Config, statuses: list[Status]) -> None:
    """Compare the index of every mirrored folder with Consul's, and give daemons that are behind time to catch up."""
    from table_consul import kv

    error: SourceError | None = None
    with contextlib.closing(kv.Client(config.consul)) as client:
        for status in statuses:
            try:
                if isinstance(error, Unreachable):  # finding that out takes time: once is enough
                    raise error
                _ask_consul(config, client, status)
            except SourceError as caught:
                error = caught
                if any(prefix.index is not None for prefix in status.prefixes):
                    status.remarks.append(f"cannot compare with Consul: {error}")
    asked = time.time()
    for status in statuses:
        _wait(config, status, asked)
        for prefix in status.prefixes:
            if prefix.ahead:
                prefix.healthy = False
                prefix.remarks.append("Consul is ahead of this table")
        _set_overall_state(status)
        if status.healthy and any(each.ahead is None and each.state == "following" for each in status.prefixes):
            status.healthy = None


def _ask_consul(config: Config, client: kv.Client, status: Status) -> None:
    """Note Consul's index of each mirrored folder. Raises SourceError."""
    table = config.table(status.table)
    paths = {printable(path): path for path in table.folders()}
    for prefix in status.prefixes:
        if prefix.index is None:
            continue
        if prefix.prefix not in paths:
            prefix.remarks.append(f"not in {printable(config.path or 'the configuration')}: update the table")
            continue
        timeout = max(table.deadline, CONSUL_SECONDS)
        # The daemon's own query, so that the index is of the same kind; its body is not read.
        with client.blocking_query(paths[prefix.prefix], timeout=timeout) as response:
            _set_consul_index(prefix, response.index)
        if response.filtered:
            prefix.remarks.append("Consul hides keys of it from this token")


def _set_consul_index(prefix: Prefix, index: int | None) -> None:
    prefix.consul_index = index
    if index is not None and prefix.index is not None:
        prefix.ahead = index > prefix.index


def _wait(config: Config, status: Status, asked: float) -> None:
    """Give a daemon that seems to be behind time to load, and publish, what Consul had when it was asked."""
    by = asked + LAG_SECONDS + (0 if status.live else WRITE_INTERVAL_SECONDS)
    if any(prefix.ahead for prefix in status.prefixes) and not status.live and sys.stderr.isatty():
        click.echo(f"waiting for the next metrics in {status.place}", err=True)
    while any(prefix.ahead for prefix in status.prefixes):
        if (status.taken or 0.0) > asked + LAG_SECONDS or time.time() > by:
            return
        time.sleep(POLL_SECONDS)
        fresh = status_of(config, config.table(status.table))
        if fresh.taken is not None:
            consul = {prefix.prefix: prefix.consul_index for prefix in status.prefixes}
            for prefix in fresh.prefixes:
                _set_consul_index(prefix, consul.get(prefix.prefix))
            status.taken, status.started, status.version = fresh.taken, fresh.started, fresh.version
            status.prefixes = fresh.prefixes


# ---- text ----


def _text(status: Status) -> str:
    """The table as text, one item a line; fits a terminal of 40 columns."""
    colour = {True: "green", False: "red", None: "yellow"}[status.healthy]
    head = click.style(printable(status.table), bold=True) + ": " + click.style(status.state, fg=colour)
    columns = min(max(shutil.get_terminal_size().columns, 40), 100)
    lines = [head]
    for name, text in _items(status):
        # Paths and addresses stay whole, so that they can be copied.
        lay = textwrap.TextWrapper(columns, f"  {name:<11}", " " * 13, break_long_words=False, break_on_hyphens=False)
        lines.append(lay.fill(printable(text, 500)))
    return "\n".join(lines)


def _items(status: Status) -> Iterator[tuple[str, str]]:
    now = time.time()
    for prefix in status.prefixes:
        yield "prefix", prefix.prefix
        if len(status.prefixes) > 1:
            yield "state", prefix.state
        if prefix.keys is not None:
            yield "keys", str(prefix.keys) + (f", {prefix.refused} refused (see lint)" if prefix.refused else "")
        if prefix.index is not None:
            consul = {None: "", True: f" (Consul has {prefix.consul_index})", False: " (up to date)"}[prefix.ahead]
            yield "index", f"{prefix.index}{consul}"
        if prefix.age is not None:
            yield "age", duration(prefix.age)
        if prefix.last_error is not None and prefix.last_error_at is not None:
            yield "last error", f"{duration(now - prefix.last_error_at)} ago: {prefix.last_error}"
        yield from (("remark", remark) for remark in prefix.remarks)
    if status.started is not None:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(status.started))
        yield "runs since", f"{since}, version {status.version}"
    if status.taken is not None and now - status.taken >= 1:
        yield "metrics", f"{duration(now - status.taken)} old, from {status.place}"
    yield from (("remark", remark) for remark in status.remarks)
