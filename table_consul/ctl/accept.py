"""``table-consulctl accept``: end the hold on deletions by having smtpd update the tables."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterator, Sequence

import click

from table_consul.config import Config, MetricsConfig
from table_consul.ctl.main import FAILED, as_json, pass_config
from table_consul.ctl.scrape import published_statuses
from table_consul.errors import TableConsulError, counted, printable, problem_of


@click.command("accept")
@click.argument("tables", metavar="[TABLE]...", nargs=-1)
@as_json
@pass_config
def command(config: Config, *, tables: tuple[str, ...], as_json: bool) -> int:
    """Accept held deletions: the deleted entries of TABLE no longer answer.

    If most of a folder is deleted at once, its table keeps serving the deleted entries for hold_deletions seconds. If
    the deletion was a mistake, restore the entries instead.

    This runs "smtpctl update table TABLE" on the mail host, which requires root.

    Without TABLE: all tables whose metrics report held deletions (see status).

    Exit status: 0 accepted or nothing held; 2 not accepted, or a table has no metrics.

    \b
    Examples:
      table-consulctl accept
      table-consulctl accept aliases
    """  # noqa: D301 - click does not wrap the lines after a \b
    outcomes = []
    for table, held in _held(config, tables):
        accepted = bool(held) or bool(tables)
        if accepted:
            _update(table)
        outcomes.append({"table": table, "held": held, "accepted": accepted})
        if not accepted and held is None:
            text = "no metrics, so held deletions are unknown (name the table)"
            click.echo(f"{printable(table)}: {text}", err=True)
        elif not as_json:
            count = f"accepted {counted(held, 'deletion', 'deletions')}" if held else "accepted"
            click.echo(f"{printable(table)}: {count if accepted else 'holds no deletions'}")
    if as_json:
        click.echo(json.dumps({"tables": outcomes}))
    return 0 if all(each["accepted"] or each["held"] is not None for each in outcomes) else FAILED


def _held(config: Config, names: Sequence[str]) -> Iterator[tuple[str, int | None]]:
    """Yield the tables with these names, or all, and the number of held deletions, None if it is unknown."""
    for name in dict.fromkeys(names):
        yield config.table(name).name, None
    if names:
        return
    if config.metrics == MetricsConfig():
        raise click.UsageError("missing TABLE: no metrics are configured, so held deletions are unknown (name a table)")
    for status in published_statuses(config):
        held = sum(prefix.held or 0 for prefix in status.prefixes)
        yield status.table, None if status.place is None else held


def _update(table: str) -> None:
    arguments = ("smtpctl", "update", "table", table)
    try:
        done = subprocess.run(arguments, capture_output=True, stdin=subprocess.DEVNULL, check=False)  # noqa: S603 - no shell
        if not done.returncode:
            return
        problem = printable((done.stderr or done.stdout).strip()) or f"exit status {done.returncode}"
    except OSError as error:
        problem = f"smtpctl: {problem_of(error)}"
    raise TableConsulError(problem, f"run as root on the mail host: {shlex.join(arguments)}")
