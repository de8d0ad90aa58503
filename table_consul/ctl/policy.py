"""``table-consulctl policy``: print the smallest ACL policy that the daemon needs.

A mirror lists the table's folder, and each folder of ``paths`` outside it; direct mode lists each service's folder or
reads single keys there. Both read the key ``-`` of a folder to check whether the token may read the folder. Only
``--check`` finds a rule that denies single keys in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import click

from table_consul.config import Config
from table_consul.ctl.main import NO, UNCUT, as_json, chosen_tables, echo_problems, pass_config
from table_consul.errors import counted, printable
from table_consul.services import SERVICES, Table


@click.command("policy")
@click.argument("tables", metavar="[TABLE]...", nargs=-1)
@click.option("--write", is_flag=True, help="Grant write access, which mail servers do not need.")
@click.option("--list", "key_list", is_flag=True, help="Grant list as well, for acl.enable_key_list_policy.")
@click.option("--check", is_flag=True, help="List what the configured token may not read.")
@as_json
@pass_config
def command(config: Config, *, tables: tuple[str, ...], write: bool, key_list: bool, check: bool, as_json: bool) -> int:
    """Print the smallest ACL policy that lets table-consul serve TABLE.

    Without TABLE: all tables with a section in the configuration.

    With --check, the token's problems are listed instead. To find every denied key, set CONSUL_HTTP_TOKEN to an
    operator's token.

    Exit status: 0 success, 1 the token may not read everything, 2 failure.

    \b
    Examples:
      table-consulctl policy aliases domains
      table-consulctl policy | consul acl policy create -name mail -rules -
      table-consulctl policy aliases --check
    """  # noqa: D301 - click does not wrap the lines after a \b
    if config.consul.file is not None:
        raise click.ClickException(
            f"{config.consul.addresses[0]} requires no policy: the tables are not read from Consul"
        )
    chosen = chosen_tables(config, tables)
    if check:
        if write or key_list or as_json:
            raise click.UsageError("--check cannot be combined with other options")
        return _check(config, chosen)
    level = "write" if write else "list" if key_list else "read"
    folders = read_folders(chosen)
    scopes = {"namespace": config.consul.namespace, "partition": config.consul.partition}  # the inner one first
    if as_json:
        nested: object = {"key_prefix": {folder: {"policy": level} for folder in folders}}
        for scope, name in scopes.items():
            nested = nested if name is None else {scope: {name: nested}}
        click.echo(_quoted(nested))
        return 0
    rules = "\n".join(f'key_prefix {_quoted(folder)} {{\n  policy = "{level}"\n}}' for folder in folders)
    for scope, name in scopes.items():
        if name is not None:
            inner = rules.replace("\n", "\n  ")
            rules = f"{scope} {_quoted(name)} {{\n  {inner}\n}}"
    names = ", ".join(printable(table.name) for table in chosen)
    click.echo(f"# {'Fill' if write else 'Answer for'} the tables of table-consul: {names}\n{rules}")
    return 0


def _check(config: Config, tables: Iterable[Table]) -> int:
    """Print what the configured token may not read of the tables."""
    from table_consul.ctl import access

    folders = dict.fromkeys(table.path(SERVICES[name]) for table in tables for name in table.readable_services)
    found = access.check(config.consul, [*folders])
    echo_problems([(printable(where, UNCUT), text) for where, text in found.unreadable], err=False)
    counts = (
        counted(len(folders), "folder", "folders"),
        counted(found.keys, "key", "keys"),
        counted(len(found.policies), "policy", "policies"),
    )
    names = f" ({', '.join(map(printable, found.policies))})" if found.policies else ""
    click.echo(f"checked: {', '.join(counts)}{names}", err=True)
    return NO if found.unreadable else 0


def read_folders(tables: Iterable[Table]) -> list[str]:
    """The folders that are read for these tables, sorted, without those inside others."""
    folders: set[bytes] = set()
    for table in tables:
        direct = table.mode == "direct"
        folders.update((table.path(SERVICES[name]) for name in table.readable_services) if direct else table.folders())
    outer = (each for each in folders if not any(each != other and each.startswith(other) for other in folders))
    return sorted(folder.decode() for folder in outer)


def _quoted(value: object) -> str:
    """The value as JSON that is valid HCL, in which a dollar sign could start an expression."""
    return json.dumps(value, ensure_ascii=False).replace("$", "\\u0024")
