"""``table-consulctl accept``: end the hold on deletions by having smtpd update the tables."""

from __future__ import annotations

import shlex
import subprocess

import click

from table_consul.config import Config, MetricsConfig
from table_consul.ctl.main import FAILED, pass_config
from table_consul.ctl.status import published_statuses
from table_consul.errors import TableConsulError, counted, printable, problem_of


@click.command("accept")
@click.argument("tables", metavar="[TABLE]...", nargs=-1)
@pass_config
def command(config: Config, *, tables: tuple[str, ...]) -> int:
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
    for name in dict.fromkeys(tables):
        _update(config.table(name).name)
        click.echo(f"{printable(name)}: accepted")
    if tables:
        return 0
    if config.metrics == MetricsConfig():
        raise click.UsageError("missing TABLE: no metrics are configured, so held deletions are unknown (name a table)")
    code, statuses = 0, published_statuses(config)
    for status in statuses:
        held = sum(prefix.held or 0 for prefix in status.prefixes)
        if status.place is None:
            click.echo(
                f"{printable(status.table)}: no metrics, so held deletions are unknown (name the table)", err=True
            )
            code = FAILED
        elif held:
            _update(status.table)
            click.echo(f"{printable(status.table)}: accepted {counted(held, 'deletion', 'deletions')}")
        else:
            click.echo(f"{printable(status.table)}: holds no deletions")
    return code


def _update(table: str) -> None:
    arguments = ("smtpctl", "update", "table", table)
    try:
        done = subprocess.run(arguments, capture_output=True, stdin=subprocess.DEVNULL, check=False)  # noqa: S603 - no shell
        if not done.returncode:
            return
        problem = printable((done.stderr or done.stdout).strip()) or f"exit status {done.returncode}"
    except OSError as error:
        problem = f"smtpctl: {problem_of(error)}"
    raise TableConsulError(f"{problem} (run as root on the mail host: {shlex.join(arguments)})")
