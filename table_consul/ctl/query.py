"""``table-consulctl query``: what smtpd is answered, by the code that answers smtpd; with --trace, why."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import click
import msgspec
from msgspec.structs import replace

from table_consul.ctl.main import FAILED, NO, SERVICE, UNCUT, as_json, counted, json_text, pass_config
from table_consul.errors import EntryError, TableConsulError, printable
from table_consul.protocol import Failed, Found, NotFound, Reply, Request
from table_consul.services import DEFAULT_KEY, MAX_KEY_BYTES, Service, Table, fold_key
from table_consul.services.entries import Entries
from table_consul.services.values import parse_value

if TYPE_CHECKING:
    from table_consul.config import Config
    from table_consul.ctl.loader import Loaded


@click.command("query")
@click.argument("table", metavar="TABLE")
@click.argument("service", type=SERVICE, metavar="SERVICE")
@click.argument("keys", metavar="[KEY]...", nargs=-1)
@click.option(
    "--op",
    type=click.Choice(("check", "lookup", "fetch")),
    metavar="OP",
    help="check: is the key in the table? lookup: its value. fetch: the next element of the list, without a KEY. "
    "Default: lookup; check for the service auth.",
)
@click.option(
    "--count", type=click.IntRange(1), metavar="N", help="With --op fetch: how many elements to fetch (default 1)."
)
@click.option("--live", is_flag=True, help="Read Consul instead of the snapshot file.")
@click.option(
    "--trace", is_flag=True, help="Print to standard error where the answer comes from, and which rules decided."
)
@as_json
@pass_config
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
    """Look up KEYs in TABLE as smtpd does, and print the answers.

    With one KEY, its value. With several, or with - for keys from standard input, one per line: KEY, a tab and the
    value on each line. Keys that are not found, and errors, are reported on standard error.

    The answer comes from the snapshot file if one is configured and exists, otherwise from Consul. The daemon writes
    that file after a change, within a minute or so.

    For auth a KEY is a user, and the password is asked for; on standard input it is USER:PASSWORD.

    Exit status: 0 all keys are found, 1 some are not, 2 some have no answer.

    \b
    Examples:
      table-consulctl query aliases alias root
      table-consulctl query aliases alias root postmaster --trace
      cut -d: -f1 /etc/aliases | table-consulctl query aliases alias -
      table-consulctl query aliases domain example.org --op check
      table-consulctl query aliases source --op fetch --count 3
      table-consulctl query aliases auth vera
    """  # noqa: D301 - the mark by which click keeps lines as they are
    op = op or ("check" if service == "auth" else "lookup")
    if op == "fetch" and keys:
        raise click.UsageError("fetch takes no KEY: it returns the next element of the list.")
    if op != "fetch" and not keys:
        raise click.UsageError(f"{op} needs a KEY, or - for keys on standard input.")
    if op != "fetch" and count is not None:
        raise click.UsageError("--count is for --op fetch.")
    questions: Iterable[bytes]
    if op == "fetch":
        questions = itertools.repeat(b"", count or 1)
    else:
        questions = _with_passwords(keys) if service == "auth" else _from_arguments(keys)
    query = _Query(config, table, service, op, live=live)
    show = _print_json if as_json else _Printer(several=len(keys) > 1 or "-" in keys)
    status = 0
    for key in questions:
        reply = query.ask(key)
        show(query, key, reply, query.explain(key) if trace else None)
        status = max(status, FAILED if isinstance(reply, Failed) else NO if isinstance(reply, NotFound) else 0)
    return status


def _from_arguments(keys: Iterable[str]) -> Iterator[bytes]:
    for key in keys:
        if key != "-":
            yield os.fsencode(key)
            continue
        for line in sys.stdin.buffer:
            if stripped := line.rstrip(b"\r\n"):
                yield stripped


def _with_passwords(keys: Iterable[str]) -> Iterator[bytes]:
    for key in keys:
        if key == "-":
            yield from _from_arguments(["-"])
        elif ":" in key:
            raise click.UsageError(
                "A password on the command line can be seen by all users of this host. "
                "Give the user alone, or - and USER:PASSWORD on standard input."
            )
        elif not sys.stdin.isatty():
            raise click.UsageError("No terminal to ask for the password: use -, and USER:PASSWORD on standard input.")
        else:
            prompt = f"Password of {printable(key)}"
            password = click.prompt(prompt, hide_input=True, default="", show_default=False, err=True)
            yield os.fsencode(f"{key}:{password}")


class _Query:
    """Asks one service of a table through the daemon's responder, and remembers what the last answer was made from."""

    def __init__(self, config: Config, table: str, service: str, op: str, *, live: bool) -> None:
        from table_consul.ctl.loader import Loader
        from table_consul.responder import Responder

        self.table, self.service, self.op = config.table(table), service, op
        self._loader = Loader(config, live=live)
        self._responder = Responder()
        self._used: list[tuple[Loaded, Service, Entries | None]] = []

    def ask(self, key: bytes) -> Reply:
        """The reply to smtpd, or an error if smtpd never asks for such a key."""
        self._used.clear()
        if len(key) > MAX_KEY_BYTES:
            return Failed(f"the key has {len(key)} bytes, and smtpd asks for no more than {MAX_KEY_BYTES}")
        # smtpd leaves a password as it is, and the responder folds the user.
        folded = key if self.service == "auth" else fold_key(key)
        request = Request(self.op, b"1", self.table.name, self.service, folded)
        deadline = time.monotonic() + self.table.deadline
        try:
            return self._responder.answer(request, self.table, functools.partial(self._read, deadline))
        except TableConsulError as error:
            return Failed(str(error))

    def _read(self, deadline: float, service: Service, key: bytes | None) -> Entries:
        loaded = self._loader.load(self.table, service)
        self._used.append((loaded, service, None))
        entries = loaded.entries(self.table, service, key, deadline)
        self._used[-1] = (loaded, service, entries)
        return entries

    def explain(self, key: bytes) -> list[Step]:
        """How the last answer was made, to the question for this key."""
        op = "lookup" if self.service == "auth" else self.op  # what decides about a password is the value of its user
        return [step for used in self._used for step in _explain(*used, op, self.name(key))]

    def name(self, key: bytes) -> bytes:
        """The key without a password."""
        return key.partition(b":")[0] if self.service == "auth" else key


class _Printer:
    """Prints answers as text: exact bytes, but no control characters on a terminal."""

    def __init__(self, *, several: bool) -> None:
        self._several = several
        self._terminal = sys.stdout is not None and sys.stdout.isatty()
        wraps = sys.stderr is not None and sys.stderr.isatty()
        self._columns = max(30, shutil.get_terminal_size().columns) if wraps else UNCUT

    def __call__(self, query: _Query, key: bytes, reply: Reply, trace: Iterable[Step] | None) -> None:
        name = query.name(key)
        what = printable(name) if query.op != "fetch" else f"{query.table.name} {query.service}"
        if isinstance(reply, Found):
            value = b"found" if reply.value is None else reply.value
            parts = [name, value] if self._several else [value]
            if self._terminal:
                click.echo("\t".join(printable(part, UNCUT) for part in parts))
            else:
                click.echo(b"\t".join(parts))
        elif isinstance(reply, Failed):
            click.echo(f"{what}: error: {printable(reply.reason, UNCUT)}", err=True)
        else:
            click.echo(f"{what}: not found", err=True)
        for step in trace or ():
            head = f"  {step.what:8} "
            click.echo(click.wrap_text(step.text, self._columns, head, " " * len(head)), err=True)


def _print_json(query: _Query, key: bytes, reply: Reply, trace: Iterable[Step] | None) -> None:
    answer: dict[str, object] = {"table": query.table.name, "service": query.service, "op": query.op}
    if query.op != "fetch":
        answer["key"] = json_text(query.name(key))
    if isinstance(reply, Found):
        answer["result"] = "found"
        if reply.value is not None:
            answer["value"] = json_text(reply.value)
    elif isinstance(reply, Failed):
        answer |= {"result": "error", "reason": reply.reason}
    else:
        answer["result"] = "not-found"
    if trace is not None:
        answer["trace"] = trace
    click.echo(msgspec.json.encode(answer))


# ---- --trace ----


class Step(msgspec.Struct, frozen=True):
    """One line of an explanation. No text holds any part of a value."""

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
        yield Step("value", f"one of the {what} per fetch, in the order of the keys (fetch = {entries.table.fetch})")
        return
    if folded != key:
        yield Step("asked", f"{printable(folded)}: smtpd asks in lower case")
    entry = entries.find(folded)
    why = "" if entry == folded else f", which matches {printable(folded)}"
    if entries.uses_default(folded) and folded != DEFAULT_KEY and entries.find(DEFAULT_KEY) is not None:
        entry, why = DEFAULT_KEY, ", the default for users without an entry"
    if entry is None:
        yield Step("entry", f"none, nor {printable(DEFAULT_KEY)}" if service.default else "none")
        return
    stored = folder + entries.original_case.get(entry, entry)
    yield Step("entry", printable(stored) + why + (", stored in another case" if stored != folder + entry else ""))
    if op == "lookup":
        yield from explain_value(entries.table, service, entry, loaded.pairs.get(stored))
    if entry not in entries.errors:  # the error is the answer itself
        yield from (Step("problem", problem.text) for problem in entries.problems if problem.key == stored)


def explain_value(table: Table, service: Service, key: bytes, raw: bytes | None) -> Iterator[Step]:
    """The rules without which the stored value would have been answered otherwise.

    `parse_value` itself is asked again with each rule off, so that this cannot differ from what the daemon does.
    """

    def parsed(table: Table, service: Service) -> bytes | None:
        try:
            return parse_value(table, service, key, raw)
        except EntryError:
            return None

    value = parsed(table, service)
    if value is not None:
        as_text = replace(table, value_format="text")
        object_fields = f"{', '.join(service.fields)} of the JSON object" if (raw or b"")[:1] == b"{" else ""
        if parsed(as_text, service._replace(fields=())) != value:
            yield Step("value", f"{object_fields or 'decoded from JSON'} (value_format = {table.value_format})")
        elif raw and raw.rstrip() != raw:
            yield Step("value", "trailing white space is dropped")
        if parsed(table, service._replace(joined=False)) != value:
            yield Step("value", "lines are joined to one list, without comments")
        if parsed(table, service._replace(hashed=False)) not in (None, value):
            yield Step("value", "the {SCHEME}, $2y$ or lock is rewritten for crypt(3)")
        if not value and service.answers == "entry":
            yield Step("value", "empty, so the entry itself is the answer")
        if service.default and key == DEFAULT_KEY and b"%" in value:
            yield Step("value", "%u, %n, %d in the home are filled in")
    for option, what in (("allow_commands", "commands and files"), ("allow_root", "uid or gid 0")):
        allowed = bool(getattr(table, option))
        if (parsed(replace(table, **{option: not allowed}), service) is None) != (value is None):
            verb = "permits" if allowed else "refuses"
            yield Step("safety", f"{option} = {str(allowed).lower()} {verb} {what}")
