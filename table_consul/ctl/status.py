"""table-consulctl status: whether the tables' processes run and follow Consul, from what they publish."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Iterable

import click
import msgspec

from table_consul.config import Config, MetricsConfig
from table_consul.ctl import published
from table_consul.ctl.main import FAILED, NO, as_json, duration, pass_config
from table_consul.ctl.states import Prefix, Status, status_of, sum_up
from table_consul.errors import SourceError, Unreachable, printable
from table_consul.metrics import WRITE_INTERVAL_SECONDS

# An agent without a leader says so after 7 seconds (Consul 1.8.7), and a large table takes one to arrive.
CONSUL_SECONDS = 10.0
# For a daemon to have read what Consul has: at once (watch.py pauses for the time that the last reading took), or with
# the next text file.
LAG_SECONDS = 5.0
POLL_SECONDS = 0.25
WELL, BAD, UNKNOWN = "green", "red", "yellow"

NOWHERE = """\
status reads what the tables' processes publish, which is nothing yet. Add two lines to {path}:

    [metrics]
    textfile = "/var/lib/prometheus/node-exporter/table-consul-{{table}}.prom"

or, in place of the second, where no node_exporter reads them,

    listen = "unix:///run/table-consul/{{table}}.sock"

in a folder that smtpd's unprivileged user may write to; then: smtpctl update table NAME"""


@click.command(short_help="Whether the tables' processes run and follow Consul.")
@click.argument("tables", metavar="[TABLE]...", nargs=-1)
@click.option("--offline", is_flag=True, help="Do not ask Consul whether it is ahead.")
@as_json
@pass_config
def command(config: Config, tables: tuple[str, ...], offline: bool, as_json: bool) -> int:  # noqa: FBT001 - click's way
    """Show for each table whether its process runs, and what its copy of Consul's data is like.

    This is what the processes publish, so [metrics] textfile or listen has to be configured. Consul is asked whether
    it is ahead of them; where it is, status waits for their next numbers, with a textfile for up to 20 seconds.

    \b
    following    it has what Consul has
    outage       Consul is away; the copy
                 answers, if any
    expired      so for over max_age:
                 answers are errors
    no data      nothing could be read
                 yet: answers are errors
    loading      it has just started
    too large    over max_keys: each
                 answer reads Consul
    direct       each answer reads
                 Consul, as configured
    file         it reads a file://
    not running  nobody publishes it; if
                 it runs, see its log

    Without TABLE: all that are configured or publish.

    \b
    Exit status:
      0  all are following, direct or file
      1  some table is not
      2  that cannot be told

    \b
    Examples:
      table-consulctl status
      table-consulctl status aliases
      table-consulctl status --json --offline
    """  # noqa: D301 - click wants the character
    if config.metrics == MetricsConfig():
        path = printable(config.path or "a configuration, and name it with -c")
        click.echo(f"table-consulctl: {NOWHERE.format(path=path)}", err=True)
        return FAILED
    published.require_parser()
    wanted = tables or sorted({*config.tables, *published.names(config.metrics)}) or (config.default_table,)
    statuses = [status_of(config, config.table(name)) for name in dict.fromkeys(wanted)]
    if not offline:
        _compare(config, statuses)
    if as_json:
        document = {"well": _well(status.well for status in statuses), "tables": statuses}
        click.echo(msgspec.json.format(msgspec.json.encode(document)))
    else:
        click.echo("\n\n".join(map(_told, statuses)))
    return {True: 0, False: NO, None: FAILED}[_well(status.well for status in statuses)]


def _well(wells: Iterable[bool | None]) -> bool | None:
    """Whether all is well: one that is not outweighs those of which nothing is known."""
    known = set(wells)
    return False if False in known else None if None in known else True


# ---- Consul ----


def _compare(config: Config, statuses: list[Status]) -> None:
    """Ask Consul for the index of everything that is mirrored, and give daemons that are behind a moment."""
    if config.consul.addresses[0].startswith("file://"):
        return
    refusal: str | None = None
    for status in statuses:
        refusal = _ask_consul(config, status, refusal)
    asked = time.time()
    for status in statuses:
        _wait_for_news(config, status, asked)
    for status in statuses:
        for prefix in status.prefixes:
            if prefix.ahead:
                prefix.well = False
                prefix.remarks.append("Consul is ahead of this table")
        cannot = any(prefix.ahead is None and prefix.state == "following" for prefix in status.prefixes)
        sum_up(status)
        if cannot and status.well:
            status.well = None


def _wait_for_news(config: Config, status: Status, asked: float) -> None:
    """Give a daemon that seems to be behind the time to take over, and publish, what Consul had when it was asked."""
    by = asked + LAG_SECONDS + (0 if status.live else WRITE_INTERVAL_SECONDS)
    if any(prefix.ahead for prefix in status.prefixes) and not status.live and sys.stderr.isatty():
        click.echo(f"waiting for the next numbers in {status.place}", err=True)
    while any(prefix.ahead for prefix in status.prefixes):
        if (status.taken or 0.0) > asked + LAG_SECONDS or time.time() > by:
            return
        time.sleep(POLL_SECONDS)
        _read_again(config, status)


def _ask_consul(config: Config, status: Status, refusal: str | None) -> str | None:
    """Note the index that Consul has for each prefix that is mirrored; why it cannot be reached, if so.

    What was so for another table a moment ago, ``refusal``, need not be waited for again.
    """
    from table_consul import kv

    table = config.table(status.table)
    paths = {printable(path): path for path in table.folders()}
    client = kv.Client(config.consul)
    try:
        for prefix in status.prefixes:
            if prefix.index is None:
                continue
            if refusal is not None:
                raise Unreachable(refusal)
            if prefix.prefix not in paths:
                prefix.remarks.append(
                    f"not what {printable(config.path or 'the configuration')} says: update the table"
                )
                continue
            # The daemon's own query, so that the index is of the same kind; nobody wants the entries.
            path = paths[prefix.prefix]
            seen = client.watch(path, lambda _index: None, timeout=max(table.deadline, CONSUL_SECONDS))
            prefix.consul_index, prefix.ahead = seen.index, seen.index > prefix.index
            if seen.filtered:
                prefix.remarks.append("Consul hides keys of it from this token")
    except (SourceError, ValueError) as error:
        status.remarks.append(f"Consul does not tell whether it is ahead: {error}")
        return str(error) if isinstance(error, Unreachable) else None
    finally:
        client.close()
    return refusal


def _read_again(config: Config, status: Status) -> None:
    """Take over what has been published since, if there is anything."""
    fresh = status_of(config, config.table(status.table))
    if fresh.taken is None:
        return
    known = {prefix.prefix: prefix.consul_index for prefix in status.prefixes}
    status.taken, status.started, status.version = fresh.taken, fresh.started, fresh.version
    status.prefixes = fresh.prefixes
    for prefix in fresh.prefixes:
        prefix.consul_index = known.get(prefix.prefix)
        if prefix.consul_index is not None and prefix.index is not None:
            prefix.ahead = prefix.consul_index > prefix.index


# ---- for people ----


def _told(status: Status) -> str:
    """The table as text, one item a line; fits a terminal of 40 columns."""
    now = time.time()
    colour = {True: WELL, False: BAD, None: UNKNOWN}[status.well]
    lines = [click.style(printable(status.table), bold=True) + ": " + click.style(status.state, fg=colour)]
    for prefix in status.prefixes:
        lines.append(_item("prefix", prefix.prefix))
        if len(status.prefixes) > 1:
            lines.append(_item("state", prefix.state))
        if prefix.keys is not None:
            refused = f", {prefix.refused} refused (see lint)" if prefix.refused else ""
            lines.append(_item("keys", f"{prefix.keys}{refused}"))
        if prefix.index is not None:
            lines.append(_item("index", _index(prefix)))
        if prefix.age is not None:
            lines.append(_item("age", duration(prefix.age)))
        if prefix.last_error is not None and prefix.last_error_at is not None:
            ago = duration(max(0.0, now - prefix.last_error_at))
            lines.append(_item("last error", f"{ago} ago: {prefix.last_error}"))
        lines += [_item("remark", remark) for remark in prefix.remarks]
    if status.started is not None:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(status.started))
        lines.append(_item("runs since", f"{since}, version {status.version}"))
    if status.taken is not None and now - status.taken >= 1:
        lines.append(_item("numbers", f"of {duration(now - status.taken)} ago, {status.place}"))
    lines += [_item("remark", remark) for remark in status.remarks]
    return "\n".join(lines)


def _index(prefix: Prefix) -> str:
    if prefix.ahead is None:
        return str(prefix.index)
    return f"{prefix.index}, Consul {f'has {prefix.consul_index}' if prefix.ahead else 'has no more'}"


def _item(name: str, text: str) -> str:
    columns = min(max(shutil.get_terminal_size().columns, 40), 100)
    # Paths and addresses stay whole, so that they can be copied.
    lay = textwrap.TextWrapper(columns, f"  {name:<11}", " " * 13, break_long_words=False, break_on_hyphens=False)
    return lay.fill(printable(text, 500))
