"""``table-consulctl status``: show whether the tables' processes run and follow Consul: as text, JSON or for Nagios."""

from __future__ import annotations

import contextlib
import re
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import click
import msgspec

from table_consul.config import VALIDATORS, Config, MetricsConfig
from table_consul.ctl import main
from table_consul.ctl.scrape import Prefix, Status, published_statuses, status_of
from table_consul.errors import ConfigError, SourceError, TableConsulError, Unreachable, counted, printable
from table_consul.metrics import WRITE_INTERVAL_SECONDS

# An agent without a leader returns an error after 7 seconds (Consul 1.8.7).
CONSUL_SECONDS = 10.0
# Time for a daemon to load the table and, with a text file, to write that file.
LAG_SECONDS = 5.0
POLL_SECONDS = 0.25

Indexes = dict[tuple[str, str], tuple[int | None, str]]
"""By table and folder: Consul's index (None if unknown), and a remark (empty if there is none)."""

NOT_CONFIGURED = """\
no metrics are configured. Add to {path}:

    [metrics]
    textfile = "/var/lib/prometheus/node-exporter/table-consul-{{table}}.prom"
    # or, without node_exporter, instead of textfile:
    listen = "unix:///run/table-consul/metrics/{{table}}.sock"

smtpd's unprivileged user must be able to write to the folder. Then run: smtpctl update table NAME"""

OK, WARNING, CRITICAL, UNKNOWN = 0, 1, 2, main.NAGIOS_UNKNOWN
NAGIOS_NAMES = ("OK", "WARNING", "CRITICAL", "UNKNOWN")
_NAGIOS_CODES = {"no data": CRITICAL, "expired": CRITICAL, "not running": CRITICAL, "unknown": UNKNOWN}
NAGIOS_LINE_MAX = 4000
"""Nagios cuts a line at 4,096 bytes up to version 3, and at 8,192 since."""

# The worst first.
_HEALTH_ORDER = (False, None, True).index
_CODE_ORDER = (CRITICAL, WARNING, UNKNOWN, OK).index


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
@main.as_json
@main.late_config
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
        code, text = _nagios(_worst(published_statuses(config, tables)), _Thresholds(age, keys))
    except (TableConsulError, OSError) as error:
        hint = "; or use --metrics" if isinstance(error, ConfigError) and place is None else ""
        code, text = UNKNOWN, _nagios_line(UNKNOWN, f"{error}{hint}")
    click.echo(text)
    return code


def _config(context: click.Context, place: str | None) -> Config:
    """The configuration; with ``place``, one with only these metrics, which works without access to secret files."""
    path = context.find_root().obj
    if place is None:
        return main.load_config(path)
    key = "textfile" if place.startswith("/") else "listen"
    try:
        return Config(path, metrics=MetricsConfig(**{key: VALIDATORS[key](place)}))
    except ValueError as error:
        raise click.UsageError(f"--metrics: {error}") from None


def _print(config: Config, tables: Sequence[str], *, offline: bool, as_json: bool) -> int:
    if config.metrics == MetricsConfig():
        path = printable(config.path or "a configuration file, and name it with -c")
        click.echo(f"table-consulctl: {NOT_CONFIGURED.format(path=path)}", err=True)
        return main.FAILED
    statuses = published_statuses(config, tables)
    if not offline and config.consul.file is None:
        statuses = _compare(config, statuses)
    healthy = min((status.healthy for status in _worst(statuses)), key=_HEALTH_ORDER)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode({"healthy": healthy, "tables": statuses})))
    else:
        click.echo("\n\n".join(map(_text, statuses)))
    return {True: 0, False: main.NO, None: main.FAILED}[healthy]


def _worst(statuses: list[Status]) -> list[Status]:
    """The statuses, each with the state of its worst folder."""
    for status in statuses:
        worst = min(status.prefixes, key=lambda prefix: _HEALTH_ORDER(prefix.healthy), default=status)
        status.state, status.healthy = worst.state, worst.healthy
    return statuses


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
    if behind and not status.live and main.is_terminal(sys.stderr):
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
        left = main.duration(prefix.held_seconds or 0.0)
        left = f"for another {left} (to accept: table-consulctl accept {status.table})"
        failed = None if prefix.last_error_at is None else main.duration(now - prefix.last_error_at)
        items += (
            ("prefix", prefix.prefix),
            ("state", prefix.state if len(status.prefixes) > 1 else None),
            ("keys", None if prefix.keys is None else f"{prefix.keys}{refused}"),
            ("held", f"{counted(prefix.held, 'deleted entry', 'deleted entries')}, {left}" if prefix.held else None),
            ("index", None if prefix.index is None else f"{prefix.index}{consul}"),
            ("age", None if prefix.age is None else main.duration(prefix.age)),
            ("last error", failed and f"{failed} ago: {prefix.last_error}"),
            *(("remark", remark) for remark in prefix.remarks),
        )
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(status.started or 0))
    items.append(("runs since", None if status.started is None else f"{since}, version {status.version}"))
    if status.taken is not None and now - status.taken >= 1:
        items.append(("metrics", f"{main.duration(now - status.taken)} old, from {status.place}"))
    items += (("remark", remark) for remark in status.remarks)
    colour = {True: "green", False: "red", None: "yellow"}[status.healthy]
    lines = [click.style(printable(status.table), bold=True) + ": " + click.style(status.state, fg=colour)]
    # Paths and addresses stay whole, so that they can be copied.
    wrapper = textwrap.TextWrapper(
        main.terminal_columns(), subsequent_indent=" " * 13, break_long_words=False, break_on_hyphens=False
    )
    for name, text in items:
        if text is not None:
            wrapper.initial_indent = f"  {name:<11}"
            lines.append(wrapper.fill(printable(text, 500)))
    return "\n".join(lines)


class _Thresholds(NamedTuple):
    """Warning and critical thresholds: maximum age of the data in seconds, minimum number of keys."""

    age: tuple[float | None, float | None]
    keys: tuple[float | None, float | None]


def _nagios(statuses: Sequence[Status], thresholds: _Thresholds) -> tuple[int, str]:
    """The exit status, and the output line for Nagios, Icinga and Naemon."""
    found = [(status, _judged(status, thresholds)) for status in statuses]
    worst = min((code for _, (code, _) in found), key=_CODE_ORDER)
    bad = sorted(
        (_CODE_ORDER(code), f"{printable(status.table)}: {text}") for status, (code, text) in found if code != OK
    )
    good = len(found) - len(bad)
    parts = [text for _, text in bad] + ([f"{counted(good, 'table', 'tables')} ok"] if good else [])
    text = _nagios_line(worst, ", ".join(parts))
    data = " ".join(each for status in statuses for each in _performance(status, thresholds))
    return worst, f"{text} | {data}" if data and len(text) + len(data) < NAGIOS_LINE_MAX else text


def _nagios_line(code: int, text: str) -> str:
    """The line without performance data; these would start at a ``|``."""
    return f"TABLE-CONSUL {NAGIOS_NAMES[code]}: {printable(text, NAGIOS_LINE_MAX // 2).replace('|', '/')}"


def _judged(status: Status, thresholds: _Thresholds) -> tuple[int, str]:
    """The code of a table and the reasons for it."""
    reasons = [reason for prefix in status.prefixes for reason in _reasons(prefix, thresholds)]
    if not status.prefixes:
        code = _NAGIOS_CODES.get(status.state, OK)
        reasons = [(code, "; ".join((status.state, *status.remarks)))]
    code = min((code for code, _ in reasons), key=_CODE_ORDER, default=OK)
    return code, "; ".join(dict.fromkeys(text for reason, text in reasons if reason != OK))


def _reasons(prefix: Prefix, thresholds: _Thresholds) -> Iterator[tuple[int, str]]:
    # Without data to serve, every lookup in an outage returns an error.
    lost = prefix.state == "outage" and prefix.age is None
    if prefix.healthy is False:
        code = CRITICAL if lost else _NAGIOS_CODES.get(prefix.state, WARNING)
        since = "" if prefix.age is None else f" (data {main.duration(prefix.age)} old)"
        state = f"{prefix.state}{since}" if prefix.state not in ("following", "direct", "file") else ""
        yield code, "; ".join(filter(None, (state, *prefix.remarks)))
    for code, most, least in zip((WARNING, CRITICAL), thresholds.age, thresholds.keys, strict=True):
        if prefix.age is not None and most is not None and prefix.age > most:
            yield code, f"data {main.duration(prefix.age)} old (more than {main.duration(most)})"
        if prefix.keys is not None and least is not None and prefix.keys < least:
            yield code, f"{counted(prefix.keys, 'key', 'keys')} (fewer than {least:g})"


def _performance(status: Status, thresholds: _Thresholds) -> Iterator[str]:
    """Age, keys and refused entries of each folder, with the thresholds."""
    several = len(status.prefixes) > 1
    for prefix in status.prefixes:
        name = re.sub(
            "['=|]", "_", printable(f"{status.table} {prefix.prefix}" if several else status.table, main.UNCUT)
        )
        values = (
            ("age", prefix.age, "s", [_number(limit) for limit in thresholds.age]),
            ("keys", prefix.keys, "", [f"{_number(limit)}:" if limit is not None else "" for limit in thresholds.keys]),
            ("refused", prefix.refused, "", ["", ""]),
        )
        for what, value, unit, (warning, critical) in values:
            if value is not None:
                yield f"'{name} {what}'={_number(value)}{unit};{warning};{critical};0".rstrip(";")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}".rstrip("0").rstrip(".")
