"""``table-consulctl query``: look up keys with the code that answers smtpd; with --trace, explain the answers."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import click
import msgspec
from msgspec.structs import replace

from table_consul.config import Config
from table_consul.ctl import main
from table_consul.errors import EntryError, TableConsulError, counted, printable
from table_consul.protocol import Failed, Found, NotFound, Reply, Request
from table_consul.responder import OUTCOMES, Responder
from table_consul.services import DEFAULT_KEY, MAX_KEY_BYTES, Service, Table, fold_key
from table_consul.services.entries import Entries
from table_consul.services.values import parse_value

if TYPE_CHECKING:
    from table_consul.ctl.loader import Loaded, Loader


@click.command("query")
@click.argument("table", metavar="TABLE")
@click.argument("service", type=main.SERVICE, metavar="SERVICE")
@click.argument("keys", metavar="[KEY]...", nargs=-1)
@click.option(
    "--op",
    type=click.Choice(("check", "lookup", "fetch")),
    metavar="OP",
    help="lookup (default), check (default for auth) or fetch.",
)
@click.option(
    "--count", type=click.IntRange(1), metavar="N", help="With --op fetch: how many elements to fetch (default 1)."
)
@click.option("--live", is_flag=True, help="Read Consul instead of the snapshot file.")
@click.option("--trace", is_flag=True, help="Explain each answer on standard error.")
@main.as_json
@main.pass_config
def command(  # noqa: PLR0913 - the command line
    config: Config,
    *,
    table: str,
    service: str,
    keys: tuple[str, ...],
    op: str | None,
    count: int | None,
    live: bool,
    trace: bool,
    as_json: bool,
) -> int:
    """Look up each KEY in TABLE as smtpd does, and print its value.

    If KEY is -, keys are read from standard input, one per line. For auth, KEY is a user, and the password is prompted
    for; on standard input, each line is USER:PASSWORD.

    Exit status: 0 all keys found, 1 some not found, 2 errors or values that smtpd cannot use.

    \b
    Examples:
      table-consulctl query aliases alias root postmaster --trace
      grep -o '^[^#: ]*' /etc/aliases | table-consulctl query aliases alias -
      table-consulctl query aliases source --op fetch --count 3
      table-consulctl query aliases auth vera
    """  # noqa: D301 - click does not wrap the lines after a \b
    from table_consul.ctl.loader import Loader

    op = op or ("check" if service == "auth" else "lookup")
    if op == "fetch" and keys:
        raise click.UsageError("fetch takes no KEY: it returns the next element of the list")
    if op != "fetch" and not keys:
        raise click.UsageError(f"{op} requires a KEY, or - for keys from standard input")
    if op != "fetch" and count is not None:
        raise click.UsageError("--count requires --op fetch")
    asked = (question for key in keys for question in _questions(key, password=service == "auth"))
    named, loader, responder = config.table(table), Loader(config, live=live), Responder()
    several = len(keys) > 1 or "-" in keys
    status = 0
    origin = None
    for key in asked if op != "fetch" else [b""] * (count or 1):
        reply, used = ask(named, service, op, key, loader, responder)
        name = key.partition(b":")[0] if service == "auth" else key
        # The value of the user decides about a password.
        way = "lookup" if service == "auth" else op
        steps = [step for each in used for step in _explain(*each, way, name)] if trace else None
        warning = _warning(used[-1][2], op, fold_key(key), reply) if used else None
        if as_json:
            value = getattr(reply, "value", None)
            answer = {
                "table": table,
                "service": service,
                "op": op,
                "key": None if op == "fetch" else main.json_text(name),
                "result": OUTCOMES[type(reply)],
                "value": None if value is None else main.json_text(value),
                "reason": getattr(reply, "reason", None),
                "warning": warning,
                "trace": steps,
            }
            click.echo(msgspec.json.encode({field: value for field, value in answer.items() if value is not None}))
        else:
            about = f"{table} {service}" if op == "fetch" else printable(name)
            _print(about, [name] if several else [], reply, steps or (), warning)
        origin = used[-1][0].origin() if used and used[-1][0].saved else origin
        status = max(status, main.FAILED if warning else {Failed: main.FAILED, NotFound: main.NO}.get(type(reply), 0))
    # For a person who has just edited a key: the daemon writes the file some seconds later.
    if origin is not None and not (as_json or trace) and main.is_terminal(sys.stderr):
        click.echo(f"read from {origin} (use --live to read Consul)", err=True)
    return status


def _questions(key: str, *, password: bool) -> Iterator[bytes]:
    if key == "-":
        yield from filter(None, (line.rstrip(b"\r\n") for line in main.standard_input()))
    elif not password:
        yield os.fsencode(key)
    elif ":" in key:
        raise click.UsageError(
            "all users of this host can see a password on the command line (use USER alone, or - with USER:PASSWORD on"
            " standard input)"
        )
    elif not main.is_terminal(sys.stdin):
        raise click.UsageError("no terminal to prompt for the password (use - with USER:PASSWORD on standard input)")
    else:
        typed = click.prompt(
            f"Password for {printable(key)}", hide_input=True, default="", show_default=False, err=True
        )
        yield os.fsencode(f"{key}:{typed}")


def ask(
    table: Table, service_name: str, op: str, key: bytes, loader: Loader, responder: Responder
) -> tuple[Reply, list[tuple[Loaded, Service, Entries | None]]]:
    """The reply to smtpd, or an error for a key that smtpd never looks up; and the data behind it."""
    if len(key) > MAX_KEY_BYTES:
        return Failed(f"the key has {len(key)} bytes, but smtpd looks up at most {MAX_KEY_BYTES}"), []
    # smtpd does not fold passwords; the responder folds the user.
    request = Request(op, b"1", table.name, service_name, key if service_name == "auth" else fold_key(key))
    deadline = time.monotonic() + table.deadline
    used: list[tuple[Loaded, Service, Entries | None]] = []

    def read(service: Service, key: bytes | None) -> Entries:
        loaded = loader.load(table, service)
        used.append((loaded, service, None))
        entries = loaded.entries(table, service, key, deadline)
        used[-1] = (loaded, service, entries)
        return entries

    try:
        return responder.answer(request, table, read), used
    except TableConsulError as error:
        return Failed(str(error)), used


def _warning(entries: Entries | None, op: str, key: bytes, reply: Reply) -> str | None:
    """Why smtpd cannot use the value of the reply; None if it can."""
    if entries is None or op == "check" or not isinstance(reply, Found):
        return None
    if op == "fetch":
        by_key = entries.table.fetch == "keys"
        answers = ((entry, entry if by_key else entries.values[entry] or entry) for entry in entries.warnings)
        entry = next((entry for entry, answer in answers if answer == reply.value), None)
    else:
        entry = _answering_entry(entries, key)
    problem = None if entry is None else entries.warnings.get(entry)
    return None if problem is None else str(problem)


def _answering_entry(entries: Entries, key: bytes) -> bytes | None:
    """The entry that answers for the folded key, including the default of the service."""
    defaulted = entries.uses_default(key) and key != DEFAULT_KEY and entries.find(DEFAULT_KEY) is not None
    return DEFAULT_KEY if defaulted else entries.find(key)


def _print(about: str, head: Sequence[bytes], reply: Reply, trace: Iterable[Step], warning: str | None) -> None:
    """Print a reply after ``head``: exact bytes, but on a terminal without control characters."""
    if isinstance(reply, Found):
        parts = [*head, b"found" if reply.value is None else reply.value]
        if main.is_terminal(sys.stdout):
            click.echo("\t".join(printable(part, main.UNCUT) for part in parts))
        else:
            click.echo(b"\t".join(parts))
    elif isinstance(reply, Failed):
        click.echo(f"{about}: error: {printable(reply.reason, main.UNCUT)}", err=True)
    else:
        click.echo(f"{about}: not found", err=True)
    if warning is not None:
        click.echo(f"{about}: warning: smtpd cannot use this value: {warning}", err=True)
    columns = main.terminal_columns() if main.is_terminal(sys.stderr) else main.UNCUT
    for step in trace:
        what = f"  {step.what:8} "
        click.echo(click.wrap_text(step.text, columns, what, " " * len(what)), err=True)


class Step(msgspec.Struct, frozen=True):
    """One line of a trace. The text never contains a value or part of one."""

    what: str
    """``source``, ``read``, ``asked``, ``entry``, ``value``, ``safety`` or ``problem``."""
    text: str


def _explain(loaded: Loaded, service: Service, entries: Entries | None, op: str, key: bytes) -> Iterator[Step]:
    yield Step("source", loaded.origin())
    if entries is None:
        return
    folder, folded = entries.path, fold_key(key)
    if not loaded.direct or service.patterns or op == "fetch":
        yield Step("read", f"{printable(folder)} ({counted(len(entries), 'entry', 'entries')})")
    else:
        for each in (folded, DEFAULT_KEY)[: 1 + entries.uses_default(folded)]:
            yield Step("read", printable(folder + each))
    if op == "fetch":
        what = "values" if entries.table.fetch == "values" else "keys"
        yield Step(
            "value",
            f"each fetch returns the next of the {what}, in the order of the keys (fetch = {entries.table.fetch})",
        )
        return
    if folded != key:
        yield Step("asked", f"{printable(folded)}: smtpd looks up keys in lower case")
    try:
        entry = _answering_entry(entries, folded)
    except EntryError:
        return  # the error is the answer itself
    why = "" if entry == folded else f", which matches {printable(folded)}"
    if entry == DEFAULT_KEY != folded and service.default:
        why = ", the default for users without an entry"
    if entry is None:
        yield Step("entry", f"none, and no default {printable(DEFAULT_KEY)}" if service.default else "none")
        return
    stored = folder + entries.original_case.get(entry, entry)
    yield Step("entry", printable(stored) + why + (", stored in another case" if stored != folder + entry else ""))
    if op == "lookup":
        yield from explain_value(entries.table, service, entry, loaded.pairs.get(stored))
    if entry not in entries.errors:  # the error is the answer itself
        yield from (Step("problem", problem.text) for problem in entries.problems if problem.key == stored)


def explain_value(table: Table, service: Service, key: bytes, raw: bytes | None) -> Iterator[Step]:
    """Yield the settings and conversions that changed the answer.

    This calls `parse_value` with each of them off, so that it cannot differ from the daemon.
    """

    def parsed(table: Table, service: Service) -> bytes | None:
        try:
            return parse_value(table, service, key, raw)
        except EntryError:
            return None

    value = parsed(table, service)
    if value is not None:
        fields = f"{', '.join(service.fields)} of the JSON object" if (raw or b"")[:1] == b"{" else "decoded from JSON"
        without = service._replace
        decoded = parsed(replace(table, value_format="text"), without(fields=())) != value
        conversions = {
            f"{fields} (value_format = {table.value_format})": decoded,
            "trailing white space is dropped": not decoded and raw is not None and raw.rstrip() != raw,
            "lines are joined into one list, without comments": parsed(table, without(joined=False)) != value,
            "the {SCHEME}, $2y$ or lock is rewritten for crypt(3)": parsed(table, without(hashed=False)) != value,
            "empty, so the key itself is the answer": not value and service.answers == "entry",
            "%u, %n and %d in the home directory are expanded": service.default
            and key == DEFAULT_KEY
            and b"%" in value,
        }
        yield from (Step("value", text) for text, applies in conversions.items() if applies)
    for option, what in (("allow_commands", "commands and files"), ("allow_root", "uid or gid 0")):
        allowed = bool(getattr(table, option))
        if (parsed(replace(table, **{option: not allowed}), service) is None) != (value is None):
            verb = "true permits" if allowed else "false rejects"
            yield Step("safety", f"{option} = {verb} {what}")
