"""``table-consulctl query``: what smtpd would be told, by the code that tells smtpd."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click
import msgspec

from table_consul.ctl.main import FAILED, NO, SERVICE, UNCUT, as_json, pass_config
from table_consul.errors import SourceError, TableConsulError, printable
from table_consul.protocol import Failed, Found, NotFound, Reply, Request
from table_consul.services import MAX_KEY_BYTES, fold_key

if TYPE_CHECKING:
    from table_consul.config import Config
    from table_consul.ctl.tracing import Step


@click.command("query")
@click.argument("table", metavar="TABLE")
@click.argument("service", type=SERVICE, metavar="SERVICE")
@click.argument("keys", metavar="[KEY]...", nargs=-1)
@click.option(
    "--op",
    type=click.Choice(("check", "lookup", "fetch")),
    metavar="OP",
    help="check: is it there? lookup: its value. fetch: the next element of the list, without a KEY. "
    "Default: lookup; check for the service auth.",
)
@click.option("--count", type=click.IntRange(1), metavar="N", help="Of fetch: so many, one after the other; default 1.")
@click.option("--live", is_flag=True, help="Ask Consul, and not the copy on disk (snapshot).")
@click.option("--trace", is_flag=True, help="Say on standard error where the answer comes from, and what decided.")
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
    """Ask TABLE for KEYs as smtpd does, and print what it would be told.

    One KEY: its value. Several, or - for keys on standard input, one a line: KEY, a tab, the value, a line each.
    What is not found, and why there is no answer, is said on standard error.

    The answer comes from the copy on disk if one is configured (snapshot) and there, else from Consul. The daemon
    writes that copy within 10 seconds of a change.

    For auth a KEY is a user, whose password is asked for; on standard input it is USER:PASSWORD.

    Exit status: 0 all are found, 1 some are not, 2 for some there is no answer.

    \b
    Examples:
      table-consulctl query aliases alias root
      table-consulctl query aliases alias root postmaster --trace
      cut -d: -f1 /etc/aliases | table-consulctl query aliases alias -
      table-consulctl query aliases domain example.org --op check
      table-consulctl query aliases source --op fetch --count 3
      table-consulctl query aliases auth vera
    """  # noqa: D301 - the mark by which click keeps lines as they are
    operation = op or ("check" if service == "auth" else "lookup")
    if operation == "fetch" and keys:
        raise click.UsageError("fetch takes no KEY: it gives the next element of the list.")
    if operation != "fetch" and not keys:
        raise click.UsageError(f"{operation} needs a KEY, or - for keys on standard input.")
    if operation != "fetch" and count is not None:
        raise click.UsageError("--count is for --op fetch.")
    if operation == "fetch":
        questions: Iterable[bytes] = itertools.repeat(b"", count or 1)
    else:
        questions = _with_passwords(keys) if service == "auth" else _asked(keys)
    asker = _Asker(config, table, service, operation, live=live, trace=trace)
    show = _ShowJson(asker) if as_json else _Show(asker, several=len(keys) > 1 or "-" in keys)
    status = 0
    for key in questions:
        reply = asker.ask(key)
        show(key, reply)
        status = max(status, FAILED if isinstance(reply, Failed) else NO if isinstance(reply, NotFound) else 0)
    return status


def _asked(keys: Iterable[str]) -> Iterator[bytes]:
    for key in keys:
        if key != "-":
            yield os.fsencode(key)
            continue
        for line in sys.stdin.buffer:
            if asked := line.rstrip(b"\r\n"):
                yield asked


def _with_passwords(keys: Iterable[str]) -> Iterator[bytes]:
    for key in keys:
        if key == "-":
            yield from _asked(["-"])
        elif ":" in key:
            raise click.UsageError(
                "A password on the command line can be seen by all users of this host. "
                "Give the user alone, or - and USER:PASSWORD on standard input."
            )
        elif not sys.stdin.isatty():
            raise click.UsageError(
                "No terminal to ask for the password at: use -, and USER:PASSWORD on standard input."
            )
        else:
            password = click.prompt(
                f"Password of {printable(key)}", hide_input=True, default="", show_default=False, err=True
            )
            yield os.fsencode(f"{key}:{password}")


class _Asker:
    """Puts questions to the daemon's own responder."""

    def __init__(self, config: Config, table: str, service: str, operation: str, *, live: bool, trace: bool) -> None:
        from table_consul.ctl.loader import Reading
        from table_consul.responder import Responder

        self.table = config.table(table).name
        self.service = service
        self.operation = operation
        reading = Reading(config, live=live)
        self._trace = None
        if trace:
            from table_consul.ctl.tracing import Trace

            self._trace = Trace(reading)
        self._source = self._trace or reading
        self._layout = config.table(table)
        self._responder = Responder()

    def ask(self, key: bytes) -> Reply:
        """The reply to smtpd; an error, too, for what smtpd does not ask."""
        if len(key) > MAX_KEY_BYTES:
            return Failed(f"the key has {len(key)} bytes, and smtpd asks for no more than {MAX_KEY_BYTES}")
        # smtpd leaves a password as it is, and the responder folds the user.
        folded = key if self.service == "auth" else fold_key(key)
        deadline = time.monotonic() + self._layout.deadline
        try:
            return self._responder.answer(
                Request(self.operation, b"1", self.table, self.service, folded),
                self._layout,
                lambda service, key: self._source.entries(self._layout, service, key, deadline),
            )
        except TableConsulError as error:
            return Failed(str(error), error)

    def explain(self, key: bytes) -> list[Step] | None:
        """How the last answer came about, if that was wanted."""
        if self._trace is None:
            return None
        from table_consul.ctl.tracing import Step

        # What decides about a password is the value of its user.
        op, named = ("lookup", self.named(key)) if self.service == "auth" else (self.operation, key)
        try:
            return self._trace.explain(op, named)
        except (SourceError, OSError) as error:  # what the file held has gone meanwhile
            return [Step("source", str(error))]

    def named(self, key: bytes) -> bytes:
        """The key as it may be shown: without a password."""
        return key.partition(b":")[0] if self.service == "auth" else key


class _Show:
    """Writes answers for a reader: exact bytes, unless it is a terminal that they could play with."""

    def __init__(self, asker: _Asker, *, several: bool) -> None:
        self._asker = asker
        self._several = several
        self._terminal = sys.stdout is not None and sys.stdout.isatty()
        wraps = sys.stderr is not None and sys.stderr.isatty()
        self._columns = max(30, shutil.get_terminal_size().columns) if wraps else UNCUT

    def __call__(self, key: bytes, reply: Reply) -> None:
        name = self._asker.named(key)
        what = printable(name) if self._asker.operation != "fetch" else f"{self._asker.table} {self._asker.service}"
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
        for step in self._asker.explain(key) or ():
            head = f"  {step.what:8} "
            click.echo(click.wrap_text(step.text, self._columns, head, " " * len(head)), err=True)


class _ShowJson:
    """Writes one object a line. Bytes that are no UTF-8 appear as escapes."""

    def __init__(self, asker: _Asker) -> None:
        self._asker = asker

    def __call__(self, key: bytes, reply: Reply) -> None:
        asker = self._asker
        answer: dict[str, Any] = {"table": asker.table, "service": asker.service, "op": asker.operation}
        if asker.operation != "fetch":
            answer["key"] = _escaped(asker.named(key))
        if isinstance(reply, Found):
            answer["result"] = "found"
            if reply.value is not None:
                answer["value"] = _escaped(reply.value)
        elif isinstance(reply, Failed):
            answer |= {"result": "error", "reason": reply.reason}
        else:
            answer["result"] = "not-found"
        steps = asker.explain(key)
        if steps is not None:
            answer["trace"] = [{"what": step.what, "text": step.text} for step in steps]
        click.echo(msgspec.json.encode(answer))


def _escaped(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")
