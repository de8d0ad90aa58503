"""``table-consulctl policy``: the least that Consul's ACLs have to grant the daemon's token.

The rules follow what is read: a mirror lists the table's folder, and each folder of ``paths`` that lies elsewhere;
direct reads list or read single keys of each service's folder. In both, the key ``-`` there is read as a proof.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click

from table_consul.ctl.main import as_json, chosen_tables, pass_config
from table_consul.errors import printable
from table_consul.services import SERVICES, Table

if TYPE_CHECKING:
    from table_consul.config import Config

INDENT = "  "


@click.command("policy")
@click.argument("tables", metavar="[TABLE]...", nargs=-1)
@click.option("--write", is_flag=True, help="Grant what import needs, too. The mail servers do without.")
@click.option(
    "--list",
    "key_list",
    is_flag=True,
    help="Grant list as well as read, which Consul asks for where acl.enable_key_list_policy is set.",
)
@as_json
@pass_config
def command(config: Config, *, tables: tuple[str, ...], write: bool, key_list: bool, as_json: bool) -> int:
    """Write the smallest ACL policy with which table-consul can answer for TABLE.

    Without TABLE: for all tables with a section in the configuration. Name those
    tables of smtpd.conf that have no section.

    A namespace or a partition of the configuration is put around the rules (Consul Enterprise). A policy that is made
    in that namespace itself needs the rules alone.

    \b
    Examples:
      table-consulctl policy aliases domains
      table-consulctl policy | consul acl policy create -name mail -rules -
      consul acl token create -policy-name mail
      table-consulctl policy aliases --write
    """  # noqa: D301 - the mark by which click keeps lines as they are
    if config.consul.addresses[0].startswith("file://"):
        raise click.ClickException(f"{config.consul.addresses[0]} needs no policy: nothing is read from Consul.")
    chosen = chosen_tables(config, tables)
    level = "write" if write else "list" if key_list else "read"
    folders = read_folders(chosen)
    around = [
        (kind, name)
        for kind, name in (("partition", config.consul.partition), ("namespace", config.consul.namespace))
        if name is not None
    ]
    if as_json:
        rules: object = {"key_prefix": {folder: {"policy": level} for folder in folders}}
        for kind, name in reversed(around):
            rules = {kind: {name: rules}}
        click.echo(_quoted(rules))
    else:
        names = ", ".join(printable(table.name) for table in chosen)
        purpose = "Fill" if write else "Answer for"
        click.echo(f"# {purpose} the tables of table-consul: {names}")
        click.echo("\n".join(_hcl(around, folders, level)))
    return 0


def read_folders(tables: Iterable[Table]) -> list[str]:
    """The folders that are read for these tables, in order, none within another."""
    folders: set[str] = set()
    for table in tables:
        direct = table.mode == "direct"
        read = (table.path(SERVICES[name]) for name in table.readable_services) if direct else table.folders()
        folders.update(folder.decode() for folder in read)
    return sorted(
        folder for folder in folders if not any(folder != other and folder.startswith(other) for other in folders)
    )


def _hcl(around: Sequence[tuple[str, str]], folders: Iterable[str], level: str) -> Iterable[str]:
    depth = 0
    for kind, name in around:
        yield f"{INDENT * depth}{kind} {_quoted(name)} {{"
        depth += 1
    for folder in folders:
        yield f"{INDENT * depth}key_prefix {_quoted(folder)} {{"
        yield f'{INDENT * depth}{INDENT}policy = "{level}"'
        yield f"{INDENT * depth}}}"
    while depth:
        depth -= 1
        yield f"{INDENT * depth}}}"


def _quoted(value: object) -> str:
    """A text as HCL quotes it, or all as JSON, which Consul reads as HCL: a dollar sign could begin an expression."""
    return json.dumps(value, ensure_ascii=False).replace("$", "\\u0024")
