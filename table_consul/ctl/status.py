"""``table-consulctl status``: show whether the tables' processes run and follow Consul, from their metrics."""

from __future__ import annotations

import contextlib
import glob
import http.client
import os
import re
import socket
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import Any

import click
import msgspec

from table_consul.config import VALIDATORS, Config, MetricsConfig
from table_consul.ctl import nagios, smtpdconf
from table_consul.ctl.main import FAILED, NO, as_json, duration, is_terminal, late_config, load_config, terminal_columns
from table_consul.ctl.state import Prefix, Status
from table_consul.errors import (
    UNDECODABLE,
    ConfigError,
    SourceError,
    TableConsulError,
    Unreachable,
    counted,
    printable,
    problem_of,
)
from table_consul.files import open_regular_file, read_bounded
from table_consul.metrics import LAST_ERROR, WRITE_INTERVAL_SECONDS

# An agent without a leader returns an error after 7 seconds (Consul 1.8.7).
CONSUL_SECONDS = 10.0
# Time for a daemon to load the table and, with a text file, to write that file.
LAG_SECONDS = 5.0
POLL_SECONDS = 0.25
# After three missed writes the process is gone, and its file remains.
STALE_SECONDS = 3 * WRITE_INTERVAL_SECONDS
# A daemon closes each connection within about half of this.
ANSWER_SECONDS = 10.0
# At about 200 bytes per series, more than one process has.
SIZE_MAX = 16 << 20
OWN = "table_consul_"
# No time, index or count is larger, and time.localtime() rejects much larger numbers.
VALUE_MAX = 1e15

Indexes = dict[tuple[str, str], tuple[int | None, str]]
"""By table and folder: Consul's index (None if unknown), and a remark (empty if there is none)."""

NOT_CONFIGURED = """\
no metrics are configured. Add to {path}:

    [metrics]
    textfile = "/var/lib/prometheus/node-exporter/table-consul-{{table}}.prom"
    # or, without node_exporter, instead of textfile:
    listen = "unix:///run/table-consul/metrics/{{table}}.sock"

smtpd's unprivileged user must be able to write to the folder. Then run: smtpctl update table NAME"""


_ORDER = (False, None, True).index


def _limits(_context: click.Context, _option: click.Parameter, text: str | None) -> tuple[float | None, float | None]:
    """The thresholds, warning and critical."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)?(?:,(\d+(?:\.\d+)?))?", text or "", re.ASCII)
    if found is None or text == "":
        raise click.BadParameter("must be a number, or two numbers with a comma between them")
    warning, critical = (None if limit is None else float(limit) for limit in found.groups())
    return warning, critical


@click.command("status")
@click.argument("tables", metavar="[TABLE]...", nargs=-1)
@click.option("--offline", is_flag=True, help="Do not compare with Consul.")
@click.option("--nagios", "as_nagios", is_flag=True, help="Write one line for Nagios; implies --offline.")
@click.option(
    "--age", metavar="WARN[,CRIT]", callback=_limits, help="With --nagios: maximum age of the data, in seconds."
)
@click.option("--keys", metavar="WARN[,CRIT]", callback=_limits, help="With --nagios: minimum number of keys.")
@click.option("--metrics", "place", metavar="PLACE", help="Read the metrics here, without the configuration.")
@as_json
@late_config
@click.pass_context
def command(
    context: click.Context,
    *,
    tables: tuple[str, ...],
    offline: bool,
    as_nagios: bool,
    age: tuple[float | None, float | None],
    keys: tuple[float | None, float | None],
    place: str | None,
    as_json: bool,
) -> int:
    """Show whether the process of TABLE runs, and how old its data is.

    This requires [metrics]; table-consulctl(8) explains the states.

    Without TABLE: all tables that are configured, in smtpd.conf, or publish metrics.

    Exit status: 0 healthy, 1 not healthy, 2 unknown; with --nagios, 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN.

    \b
    Examples:
      table-consulctl status aliases
      table-consulctl status --nagios --age 600,3600 --keys 1000,1
    """  # noqa: D301 - click does not wrap the lines after a \b
    if not as_nagios:
        if {*age, *keys} != {None}:
            raise click.UsageError("--age and --keys require --nagios")
        return _print(_config(context, place), tables, offline=offline or place is not None, as_json=as_json)
    if as_json:
        raise click.UsageError("--nagios and --json cannot be combined")
    try:
        config = _config(context, place)
        if config.metrics == MetricsConfig():
            raise ConfigError("no metrics are configured (add [metrics]; for an example, run table-consulctl status)")
        code, text = nagios.report(_worst(published_statuses(config, tables)), nagios.Limits(age, keys))
    except (TableConsulError, OSError) as error:
        hint = "; or use --metrics" if isinstance(error, ConfigError) and place is None else ""
        code, text = nagios.UNKNOWN, nagios.line(nagios.UNKNOWN, f"{error}{hint}")
    click.echo(text)
    return code


def _config(context: click.Context, place: str | None) -> Config:
    """The configuration; with ``place``, one with only these metrics, which works without access to secret files."""
    path = context.find_root().obj
    if place is None:
        return load_config(path)
    key = "textfile" if place.startswith("/") else "listen"
    try:
        return Config(path, metrics=MetricsConfig(**{key: VALIDATORS[key](place)}))
    except ValueError as error:
        raise click.UsageError(f"--metrics: {error}") from None


def _print(config: Config, tables: Sequence[str], *, offline: bool, as_json: bool) -> int:
    if config.metrics == MetricsConfig():
        path = printable(config.path or "a configuration file, and name it with -c")
        click.echo(f"table-consulctl: {NOT_CONFIGURED.format(path=path)}", err=True)
        return FAILED
    statuses = published_statuses(config, tables)
    if not offline and config.consul.file is None:
        statuses = _compare(config, statuses)
    healthy = min((status.healthy for status in _worst(statuses)), key=_ORDER)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode({"healthy": healthy, "tables": statuses})))
    else:
        click.echo("\n\n".join(map(_text, statuses)))
    return {True: 0, False: NO, None: FAILED}[healthy]


def _worst(statuses: list[Status]) -> list[Status]:
    """The statuses, each with the state of its worst folder."""
    for status in statuses:
        worst = min(status.prefixes, key=lambda prefix: _ORDER(prefix.healthy), default=status)
        status.state, status.healthy = worst.state, worst.healthy
    return statuses


def published_statuses(config: Config, tables: Sequence[str] = ()) -> list[Status]:
    """The published state of these tables; without any, of all that are configured, in smtpd.conf or publish metrics.

    Raises:
        TableConsulError: metrics cannot be read on this host.
        ConfigError: a name is not a valid table name.
    """
    try:
        import prometheus_client.parser  # noqa: F401 - without it the daemons publish nothing either
    except ImportError:
        raise TableConsulError(
            "prometheus_client is missing", "install table-consul[metrics] or python3-prometheus-client"
        ) from None
    known = {*config.tables, *published_tables(config), *smtpdconf.tables_of(config.path)}
    wanted = tables or sorted(known) or (config.defaults.name,)
    return [status_of(config, config.table(name).name) for name in dict.fromkeys(wanted)]


def published_tables(config: Config) -> set[str]:
    """The tables that have a text file or socket, even if their process has ended."""
    found = set()
    for pattern in (config.metrics.textfile or "", (config.metrics.listen or "").removeprefix("unix://")):
        before, *rest = pattern.split("{table}")
        expression = re.escape(before) + "([^/]+)" + r"\1".join(map(re.escape, rest))
        for path in glob.iglob("*".join(map(glob.escape, (before, *rest)))) if rest else ():
            if matched := re.fullmatch(expression, path):
                with contextlib.suppress(ConfigError):  # not a table name: a file of another program
                    found.add(config.table(matched[1]).name)
    return found


def status_of(config: Config, table: str, *, timeout: float = ANSWER_SECONDS) -> Status:
    """The published metrics of this table: from ``listen`` if it answers within ``timeout`` seconds, or ``textfile``.

    Without metrics the table is not running, or unknown, and the remarks give the reason. Requires prometheus_client.
    """
    status = Status(table, "not running", healthy=False)
    patterns = ((config.metrics.listen, True), (config.metrics.textfile, False))
    for place, live in ((pattern.replace("{table}", table), live) for pattern, live in patterns if pattern):
        try:
            data, taken = _fetch(place, timeout, live=live)
            age = time.time() - taken
            if age <= STALE_SECONDS:
                running = _parsed(data, table)
                running.place, running.taken, running.live = place, taken, live
                if config.consul.file is not None:
                    running.state, running.remarks = "file", [f"read from {config.consul.addresses[0]}"]
                    for prefix in running.prefixes:  # published after an error
                        prefix.state = "file"
                return running
            text = f"last written {age:.0f} s ago, so the process has ended (remove the file if the table is gone)"
        except FileNotFoundError as error:
            text = f"{problem_of(error)} (check that smtpd runs, and its log)"
        except ConnectionRefusedError as error:
            gone = "; remove the socket if the table is gone" if place.startswith("unix://") else ""
            status.remarks.append(
                f"{place}: {problem_of(error)}, so the process has ended (check that smtpd runs{gone})"
            )
            return status  # its text file may still be new
        except (OSError, http.client.HTTPException, SourceError) as error:
            text = getattr(error, "strerror", None) or str(error) or type(error).__name__
            status.state, status.healthy = "unknown", None
        status.remarks.append(f"{place}: {text}")
    return status


class _Socket(socket.socket):
    """A socket with a deadline for the whole response; the timeout of a socket applies to each read."""

    deadline: float

    def recv_into(self, *arguments: Any) -> int:  # noqa: ANN401 - passed on
        if (left := self.deadline - time.monotonic()) <= 0:
            raise TimeoutError("timed out")
        self.settimeout(left)
        return super().recv_into(*arguments)


def _fetch(place: str, timeout: float, *, live: bool) -> tuple[bytes, float]:
    if not live:
        with open(place, "rb", opener=open_regular_file) as file:
            written = os.fstat(file.fileno()).st_mtime
            if written - time.time() > STALE_SECONDS:
                raise SourceError("dated in the future, so the process may have ended (check the clock)")
            return read_bounded(file, SIZE_MAX), written
    path = place.removeprefix("unix://")
    connection = http.client.HTTPConnection(place if path == place else "localhost", timeout=timeout)
    with contextlib.closing(connection):
        if path == place:
            connection.connect()
        connection.sock = _Socket(fileno=connection.sock.detach()) if path == place else _Socket(socket.AF_UNIX)
        connection.sock.deadline = time.monotonic() + timeout
        connection.sock.settimeout(timeout)
        if path != place:
            connection.sock.connect(path)
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        if response.status != 200:
            raise SourceError(f"returned status {response.status} instead of metrics")
        return read_bounded(response, SIZE_MAX), time.time()


def _parsed(data: bytes, table: str) -> Status:
    from prometheus_client.parser import text_string_to_metric_families

    try:
        every = [sample for family in text_string_to_metric_families(data.decode()) for sample in family.samples]
    except Exception as error:  # noqa: BLE001 - a malformed line raises any exception in the parser
        raise SourceError(f"not Prometheus metrics ({type(error).__name__})") from None
    own = [(name[len(OWN) :], labels, value) for name, labels, value, *_ in every if name.startswith(OWN)]
    if not all(abs(value) < VALUE_MAX for _, _, value in own):
        raise SourceError("contains values that table-consul does not write")  # NaN among them
    tables = {labels.get("table", "") for name, labels, _ in own if name == "build_info"}
    if table not in tables:
        hint = "name that table, or add {table} to the place" if tables else "add {table} to its name"
        others = ", ".join(sorted(map(printable, tables))) or "other programs"
        raise SourceError(f"contains only metrics of {others} ({hint})")
    status = Status(table, "direct", healthy=True)
    prefixes: dict[str, tuple[Prefix, dict[str, float]]] = {}
    for name, labels, value in own:
        if name == "build_info":
            status.version = labels.get("version")
        elif name == "start_time_seconds":
            status.started = value
        elif labels.get("table") == table and "prefix" in labels:
            prefix, values = prefixes.setdefault(labels["prefix"], (Prefix(labels["prefix"], "", healthy=False), {}))
            values[name] = value
            if name == "service_hidden" and value:
                prefix.hidden.append(labels.get("service", "?"))
            elif name == "last_error_timestamp_seconds":
                prefix.last_error, prefix.last_error_at = labels.get("error"), value
    for line in filter(lambda line: line.startswith(LAST_ERROR), data.splitlines()):
        with contextlib.suppress(*UNDECODABLE):
            owner, name, text = msgspec.json.decode(line.removeprefix(LAST_ERROR), type=tuple[str, str, str])
            if owner == table and name in prefixes:
                prefixes[name][0].last_error = text
    for prefix, values in prefixes.values():
        _judge(prefix, values)
    status.prefixes = [prefix for prefix, _ in prefixes.values()]
    status.remarks = [] if prefixes else ["no requests yet"]
    return status


def _judge(prefix: Prefix, values: dict[str, float]) -> None:
    whole = {metric: int(value) for metric, value in values.items()}
    prefix.index, prefix.keys, prefix.refused = map(whole.get, ("snapshot_index", "snapshot_keys", "entries_refused"))
    prefix.held, prefix.held_seconds = whole.get("deletions_held"), values.get("deletions_held_seconds")
    prefix.age, mirrored = values.get("snapshot_age_seconds"), "reloads_total" in values
    states = {
        "too large": values.get("too_large"),
        "held": mirrored and values.get("up") and prefix.held,
        "following": mirrored and values.get("up"),
        "direct": not mirrored and values.get("up", 1),
        "outage": not mirrored,
        "expired": prefix.age is not None and prefix.age > values.get("snapshot_max_age_seconds", prefix.age),
        "loading": not values.get("failures_total"),
        "no data": prefix.age is None,
    }
    prefix.state = next((state for state, holds in states.items() if holds), "outage")
    prefix.healthy = prefix.state in ("following", "direct") and not prefix.hidden
    remarks = {
        'raise max_keys, or set mode = "direct"': prefix.state == "too large",
        "Consul cannot be read: every lookup returns an error": not mirrored and values.get("up") == 0,
        f"the token may not read {', '.join(prefix.hidden)}: lookups there return errors": prefix.hidden,
    }
    prefix.remarks = [text for text, applies in remarks.items() if applies]


def _compare(config: Config, statuses: list[Status]) -> list[Status]:
    """The statuses, compared with Consul; daemons that are behind get time to catch up."""
    from table_consul import kv

    indexes: Indexes = {}
    error: SourceError | None = None
    folders = [(status.table, each.prefix) for status in statuses for each in status.prefixes if each.index is not None]
    with contextlib.closing(kv.Client(config.consul)) as client:
        for name, prefix in folders:
            table = config.table(name)
            paths = {path.decode(): path for path in table.folders()}
            try:
                if isinstance(error, Unreachable):  # one timeout is enough
                    raise error
                # The same query as the daemon's, so that the indexes compare. Its body is not read.
                with client.blocking_query(paths[prefix], timeout=max(table.deadline, CONSUL_SECONDS)) as response:
                    remark = "Consul hides keys of this folder from the token" if response.filtered else ""
                    indexes[name, prefix] = response.index, remark
            except KeyError:
                remark = f"not in {printable(config.path or 'the configuration')} (run smtpctl update table {name})"
                indexes[name, prefix] = None, remark
            except SourceError as caught:
                error = caught
                indexes[name, prefix] = None, f"cannot compare with Consul: {error}"
    asked = time.time()
    return [_caught_up(config, status, indexes, asked) for status in statuses]


def _caught_up(config: Config, status: Status, indexes: Indexes, asked: float) -> Status:
    """The status after its daemon has published what Consul had when ``asked``, or has had the time to."""
    by = asked + LAG_SECONDS + (0 if status.live else WRITE_INTERVAL_SECONDS)
    behind = _is_behind(status, indexes)
    if behind and not status.live and is_terminal(sys.stderr):
        click.echo(f"waiting for the next metrics in {status.place}", err=True)
    while behind and (status.taken or 0.0) <= asked + LAG_SECONDS and time.time() <= by:
        time.sleep(POLL_SECONDS)
        status = status_of(config, status.table)
        behind = _is_behind(status, indexes)
    return status


def _is_behind(status: Status, indexes: Indexes) -> bool:
    """Whether Consul has changes that the table lacks. The result is also added to the status."""
    for prefix in status.prefixes:
        prefix.consul_index, remark = indexes.get((status.table, prefix.prefix), (None, ""))
        if prefix.consul_index is not None and prefix.index is not None:
            prefix.ahead = prefix.consul_index > prefix.index
        if prefix.healthy and prefix.state == "following":
            prefix.healthy = None if prefix.ahead is None else not prefix.ahead
        prefix.remarks += filter(None, (remark, "Consul is ahead of this table" if prefix.ahead else ""))
    return any(prefix.ahead for prefix in status.prefixes)


def _text(status: Status) -> str:
    """The table as text, one item per line, for terminals of 40 columns or more."""
    now = time.time()
    items: list[tuple[str, str | None]] = []
    for prefix in status.prefixes:
        refused = f", {prefix.refused} refused (see lint)" if prefix.refused else ""
        consul = {None: "", True: f" (Consul has {prefix.consul_index})", False: " (up to date)"}[prefix.ahead]
        left = f"for another {duration(prefix.held_seconds or 0.0)} (to accept: table-consulctl accept {status.table})"
        failed = None if prefix.last_error_at is None else duration(now - prefix.last_error_at)
        items += (
            ("prefix", prefix.prefix),
            ("state", prefix.state if len(status.prefixes) > 1 else None),
            ("keys", None if prefix.keys is None else f"{prefix.keys}{refused}"),
            ("held", f"{counted(prefix.held, 'deleted entry', 'deleted entries')}, {left}" if prefix.held else None),
            ("index", None if prefix.index is None else f"{prefix.index}{consul}"),
            ("age", None if prefix.age is None else duration(prefix.age)),
            ("last error", failed and f"{failed} ago: {prefix.last_error}"),
            *(("remark", remark) for remark in prefix.remarks),
        )
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(status.started or 0))
    items.append(("runs since", None if status.started is None else f"{since}, version {status.version}"))
    if status.taken is not None and now - status.taken >= 1:
        items.append(("metrics", f"{duration(now - status.taken)} old, from {status.place}"))
    items += (("remark", remark) for remark in status.remarks)
    colour = {True: "green", False: "red", None: "yellow"}[status.healthy]
    lines = [click.style(printable(status.table), bold=True) + ": " + click.style(status.state, fg=colour)]
    # Paths and addresses stay whole, so that they can be copied.
    wrapper = textwrap.TextWrapper(
        terminal_columns(), subsequent_indent=" " * 13, break_long_words=False, break_on_hyphens=False
    )
    for name, text in items:
        if text is not None:
            wrapper.initial_indent = f"  {name:<11}"
            lines.append(wrapper.fill(printable(text, 500)))
    return "\n".join(lines)
