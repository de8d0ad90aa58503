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
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click
import msgspec

from table_consul.config import Config, MetricsConfig
from table_consul.ctl.main import FAILED, NO, as_json, duration, pass_config
from table_consul.errors import ConfigError, SourceError, TableConsulError, Unreachable, printable
from table_consul.metrics import WRITE_INTERVAL_SECONDS
from table_consul.sources.export import open_regular_file

if TYPE_CHECKING:
    from prometheus_client.samples import Sample

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
OWN = "table_consul_"
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
    except ImportError:
        install = "install table-consul[metrics] or python3-prometheus-client"
        raise TableConsulError(f"metrics cannot be read without prometheus_client; {install}") from None
    wanted = tables or sorted({*config.tables, *published_tables(config)}) or (config.default_table,)
    statuses = [status_of(config, config.table(name).name) for name in dict.fromkeys(wanted)]
    if not offline and not config.consul.addresses[0].startswith("file://"):
        statuses = _compare(config, statuses)
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
    for pattern in (config.metrics.textfile or "", (config.metrics.listen or "").removeprefix("unix://")):
        before, *rest = pattern.split("{table}")
        expression = re.escape(before) + "([^/]+)" + r"\1".join(map(re.escape, rest))
        for path in glob.iglob("*".join(map(glob.escape, (before, *rest)))) if rest else ():
            if matched := re.fullmatch(expression, path):
                with contextlib.suppress(ConfigError):  # no table has such a name: another program's file
                    found.add(config.table(matched[1]).name)
    return found


def status_of(config: Config, table: str, *, timeout: float = ANSWER_SECONDS) -> Status:
    """What is published about this table: at ``listen`` if that answers within ``timeout`` seconds, or in ``textfile``.

    Without metrics the table is not running, or unknown, and the remarks say why. Needs prometheus_client.
    """
    status = Status(table, "not running", healthy=False)
    for pattern, live in ((config.metrics.listen, True), (config.metrics.textfile, False)):
        if not pattern:
            continue
        place = pattern.replace("{table}", table)
        try:
            data, taken = _get(place, timeout) if live else _read(place)
            age = time.time() - taken
            if age <= STALE_SECONDS:
                running = Status(table, "direct", healthy=True, place=place, taken=taken, live=live)
                _set_state(config, running, _samples(data, table))
                return running
            text = (
                f"last written {age:.0f} s ago, while a running process writes it every {WRITE_INTERVAL_SECONDS:.0f} s"
                " (remove the file if the table no longer exists)"
            )
        except (FileNotFoundError, ConnectionRefusedError) as error:
            text = (error.strerror or str(error)).lower()
        except (OSError, http.client.HTTPException, Unreadable) as error:
            status.state, status.healthy = "unknown", None
            text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        status.remarks.append(f"{place}: {text}")
    return status


def _read(path: str) -> tuple[bytes, float]:
    with open(path, "rb", opener=open_regular_file) as file:
        return file.read(SIZE_MAX + 1), os.fstat(file.fileno()).st_mtime


def _get(listen: str, timeout: float) -> tuple[bytes, float]:
    by = time.monotonic() + timeout
    path = listen.removeprefix("unix://")
    connection = http.client.HTTPConnection(listen if path == listen else "localhost", timeout=timeout)
    with contextlib.closing(connection):
        if path != listen:
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(timeout)
            connection.sock.connect(path)
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        if response.status != 200:
            raise Unreadable(f"answers with status {response.status}, not with metrics")
        data = b""
        while chunk := response.read1(1 << 16):
            data += chunk
            if len(data) > SIZE_MAX or time.monotonic() > by:
                raise Unreadable("sends an answer without end")
    return data, time.time()


def _samples(data: bytes, table: str) -> list[Sample]:
    """The samples of table-consul, their names without its prefix."""
    from prometheus_client.parser import text_string_to_metric_families

    if len(data) > SIZE_MAX:
        raise Unreadable(f"larger than {SIZE_MAX >> 20} MiB")
    try:
        every = [sample for family in text_string_to_metric_families(data.decode()) for sample in family.samples]
    except Exception as error:  # noqa: BLE001 - the parser raises whatever slicing an odd line raises
        raise Unreadable(f"no Prometheus metrics ({type(error).__name__})") from None
    own = [each._replace(name=each.name[len(OWN) :]) for each in every if each.name.startswith(OWN)]
    if not all(abs(sample.value) < VALUE_MAX for sample in own):
        raise Unreadable("values that table-consul does not write")  # NaN among them
    tables = {sample.labels.get("table", "") for sample in own}
    if table not in tables:
        others = ", ".join(sorted(map(printable, tables))) or "other programs"
        raise Unreadable(f"metrics of {others} only (put {{table}} into its name)")
    return own


# ---- states ----


def _set_state(config: Config, status: Status, samples: list[Sample]) -> None:
    prefixes: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.name == "build_info":
            status.version = sample.labels.get("version")
        elif sample.name == "start_time_seconds":
            status.started = sample.value
        elif sample.labels.get("table") == status.table and "prefix" in sample.labels:
            prefixes.setdefault(sample.labels["prefix"], []).append(sample)
    status.prefixes = [_prefix(name, found) for name, found in prefixes.items()]
    if config.consul.addresses[0].startswith("file://"):
        status.remarks.append(f"answers from {printable(config.consul.addresses[0])}")
        status.state = "file"
    elif not prefixes:
        status.remarks.append("no requests yet")
    _set_overall_state(status)


def _set_overall_state(status: Status) -> None:
    """Give the table the state of its first folder that is not healthy."""
    if status.prefixes:
        worst = next((prefix for prefix in status.prefixes if not prefix.healthy), status.prefixes[0])
        status.state, status.healthy = worst.state, worst.healthy


def _prefix(name: str, samples: list[Sample]) -> Prefix:
    values = {sample.name: sample.value for sample in samples}
    whole = {metric: int(value) for metric, value in values.items()}
    age, mirrored = values.get("snapshot_age_seconds"), "reloads_total" in values
    states = {
        "too large": values.get("too_large"),
        "following": mirrored and values.get("up"),
        "direct": not mirrored and values.get("up", 1),
        "outage": not mirrored,
        "expired": age is not None and age > values.get("snapshot_max_age_seconds", age),
        "loading": not values.get("failures_total"),
        "no data": age is None,
    }
    state = next((state for state, holds in states.items() if holds), "outage")
    hidden = sorted(each.labels.get("service", "?") for each in samples if each.name == "service_hidden" and each.value)
    remarks = {
        'raise max_keys, or configure mode = "direct"': state == "too large",
        "Consul cannot be read: every answer is an error": not mirrored and values.get("up") == 0,
        f"the token may not read {', '.join(hidden)}: answers there are errors": hidden,
    }
    prefix = Prefix(name, state, healthy=state in ("following", "direct") and not hidden, age=age, hidden=hidden)
    prefix.index, prefix.keys = whole.get("snapshot_index"), whole.get("snapshot_keys")
    prefix.refused = whole.get("entries_refused")
    prefix.remarks = [text for text, applies in remarks.items() if applies]
    for sample in samples:
        if sample.name == "last_error_timestamp_seconds":
            prefix.last_error, prefix.last_error_at = sample.labels.get("error"), sample.value
    return prefix


# ---- Consul ----

Indexes = dict[tuple[str, str], tuple[int | None, str]]
"""By table and folder: Consul's index, if it is known, and a remark, if there is any."""


def _compare(config: Config, statuses: list[Status]) -> list[Status]:
    """The statuses, compared with Consul; daemons that are behind get time to catch up."""
    from table_consul import kv

    indexes: Indexes = {}
    error: SourceError | None = None
    folders = [(status.table, each.prefix) for status in statuses for each in status.prefixes if each.index is not None]
    with contextlib.closing(kv.Client(config.consul)) as client:
        for name, prefix in folders:
            table = config.table(name)
            path = next((path for path in table.folders() if printable(path) == prefix), None)
            if path is None:
                remark = f"not in {printable(config.path or 'the configuration')}: update the table"
                indexes[name, prefix] = None, remark
                continue
            try:
                if isinstance(error, Unreachable):  # finding that out takes time: once is enough
                    raise error
                # The daemon's own query, so that the index is of the same kind; its body is not read.
                with client.blocking_query(path, timeout=max(table.deadline, CONSUL_SECONDS)) as response:
                    remark = "Consul hides keys of it from this token" if response.filtered else ""
                    indexes[name, prefix] = response.index, remark
            except SourceError as caught:
                error = caught
                indexes[name, prefix] = None, f"cannot compare with Consul: {error}"
    asked = time.time()
    return [_caught_up(config, status, indexes, asked) for status in statuses]


def _caught_up(config: Config, status: Status, indexes: Indexes, asked: float) -> Status:
    """The status once its daemon has loaded, and published, what Consul had when it was asked, or should have."""
    by = asked + LAG_SECONDS + (0 if status.live else WRITE_INTERVAL_SECONDS)
    behind = _is_behind(status, indexes)
    if behind and not status.live and sys.stderr.isatty():
        click.echo(f"waiting for the next metrics in {status.place}", err=True)
    while behind and (status.taken or 0.0) <= asked + LAG_SECONDS and time.time() <= by:
        time.sleep(POLL_SECONDS)
        fresh = status_of(config, status.table)
        if fresh.taken is not None:
            status, behind = fresh, _is_behind(fresh, indexes)
    return status


def _is_behind(status: Status, indexes: Indexes) -> bool:
    """Whether Consul has changes that the table lacks; noted in the status, which is fresh."""
    for prefix in status.prefixes:
        prefix.consul_index, remark = indexes.get((status.table, prefix.prefix), (None, ""))
        if prefix.consul_index is not None and prefix.index is not None:
            prefix.ahead = prefix.consul_index > prefix.index
        prefix.healthy = prefix.healthy and not prefix.ahead
        prefix.remarks += filter(None, (remark, "Consul is ahead of this table" if prefix.ahead else ""))
    _set_overall_state(status)
    if status.healthy and any(each.ahead is None and each.state == "following" for each in status.prefixes):
        status.healthy = None
    return any(prefix.ahead for prefix in status.prefixes)


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
