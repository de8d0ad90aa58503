"""``table-consulctl edit``: edit a folder, or one key in it, with an editor."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import click

from table_consul import config
from table_consul.ctl import formats, import_, main, writing
from table_consul.ctl.formats import LineProblem
from table_consul.errors import SourceError, TableConsulError, counted, printable, problem_of
from table_consul.services import SERVICES, Service, Table, fold_key
from table_consul.services.entries import Entries
from table_consul.sources.export import export_entry

if TYPE_CHECKING:
    from table_consul.ctl.plan import Plan, Stored

# Missing if an editor or a full disk has truncated the file.
END = b"# end of the entries (do not remove this line)"
LEFT_OUT_SHOWN = 10


class Draft(NamedTuple):
    """The text for the editor, and the stored keys of its entries, relative to the folder."""

    text: bytes
    keys: Mapping[bytes, bytes]
    """By folded key; for an export, by the key itself."""


@click.command("edit")
@click.argument("table_name", metavar="TABLE")
@click.argument("service_name", metavar="SERVICE", type=main.SERVICE)
@click.argument("key", metavar="[KEY]", required=False)
@click.option(
    "--format",
    "form",
    type=click.Choice(("table", "export")),
    default="table",
    metavar="FORMAT",
    help="table (a file: table; default) or export (as stored).",
)
@writing.options
def command(
    settings: config.Config, *, table_name: str, service_name: str, key: str | None, form: str, options: writing.Options
) -> int:
    """Edit the entries of SERVICE in TABLE, or the entry of KEY, with $VISUAL or $EDITOR.

    The changes are shown, and written after confirmation. Entries that lint would report are rejected. A key that
    changed in Consul after the editor opened is skipped.

    Exit status: 0 written or nothing changed, 2 something was not written.

    \b
    Examples:
      table-consulctl edit aliases alias
    """  # noqa: D301 - click does not wrap the lines after a \b
    if None in (sys.stdin, sys.stdout, sys.stderr):
        raise TableConsulError("a standard stream is closed, so edit could not ask before it writes")
    table, service = settings.table(table_name), SERVICES[service_name]
    target = writing.Target.with_note(table, service)
    with writing.open_store(settings, options) as store:
        stored = store.entries(target.path)
        chosen = [each for each in stored if not each.key.endswith(b"/")]
        if key is not None:
            folded = fold_key(os.fsencode(key))
            chosen = [each for each in chosen if fold_key(each.key[len(target.path) :]) == folded]
        draft = _export(target, chosen) if form == "export" else _table(table, service, chosen)
        edit = _Edit(table, service, stored, draft, form, options.as_json)
        with writing.interruptible():
            planned, problems, confirmed = edit.run()
        conflict = "changed in Consul since the editor opened; skipped (edit it again)"
        writer = writing.Writer(target, store, options, conflict)
        if confirmed:
            return writer.apply(planned.changes)
        nothing = writer.document(planned.changes, refused=problems)
        click.echo(nothing if options.as_json else "nothing was written")
        return main.FAILED


def _table(table: Table, service: Service, stored: Sequence[Stored]) -> Draft:
    """The entries as `export` writes them, with comments that list the entries left out."""
    path = table.path(service)
    entries = Entries(table, service, ((each.key[len(path) :], each.value) for each in stored))
    text, left_out = formats.table_text(service, sorted(entries.values.items()))
    keys = {key: entries.original_case.get(key, key) for key in entries.values if key not in left_out}
    problems = [(key, error.text) for key, error in entries.errors.items() if key not in entries.incomplete]
    problems += [(key, "cannot be written in this format") for key in left_out]
    head = [f"# {printable(path)}: one entry per line. Close the editor without changes to write nothing."]
    head += [f"# Not shown, use --format export: {printable(key)}: {what}" for key, what in problems[:LEFT_OUT_SHOWN]]
    if len(problems) > LEFT_OUT_SHOWN:
        head.append(f"# Not shown: {counted(len(problems) - LEFT_OUT_SHOWN, 'more entry', 'more entries')}")
    if not keys and not service.lists_only:
        text = b""  # after the header of a list, new entries could not have values
    return Draft("\n".join([*head, ""]).encode() + text + END + b"\n", keys)


def _export(target: writing.Target, stored: Sequence[Stored]) -> Draft:
    lines = [export_entry(each.key, each.value, each.flags) for each in stored]
    keys = [each.key[len(target.path) :] for each in stored]
    return Draft(b"[\n" + b",\n".join(lines) + b"\n]\n", dict(zip(keys, keys, strict=True)))


class _Edit(NamedTuple):
    """The entries to edit, and those of Consul when the editor opened."""

    table: Table
    service: Service
    stored: Sequence[Stored]
    draft: Draft
    form: str
    as_json: bool
    """Standard output is for the report, so the dialogue is on standard error."""

    def run(self) -> tuple[Plan, list[LineProblem], bool]:
        """The changes that the operator made, their problems, and whether they are confirmed.

        Raises:
            TableConsulError: the editor fails.
            OSError: the file cannot be written, or has disappeared.
        """
        # Editors may leave copies beside the file, which disappear with its temporary folder.
        with tempfile.TemporaryDirectory(prefix="table-consul.") as folder:
            path = os.path.join(folder, f"{self.service.name}.{'json' if self.form == 'export' else 'txt'}")
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(self.draft.text)
            line = 0
            while True:
                _run_editor(path, line)
                with open(path, "rb") as file:
                    data = file.read()
                with main.patience("checking the entries"):
                    planned, problems = self._judge(data)
                if not problems and not planned.changes:
                    return planned, problems, True
                answer = self._ask_again(problems) if problems else self._confirm(planned)
                if answer != "e":
                    return planned, problems, answer == "y"
                line = problems[0].line if problems else 0

    def _judge(self, data: bytes) -> tuple[Plan, list[LineProblem]]:
        """The plan for the edited file, and its problems in the order of lines."""
        from table_consul.ctl import plan

        none = plan.Plan([], [], 0, [], [])
        if data == self.draft.text:
            return none, []
        path, exported = self.table.path(self.service), self.form == "export"
        try:
            parsed = import_.parse(data, self.table, self.service, self.form, path.decode())
        except (formats.FormatError, SourceError) as error:
            return none, [LineProblem(0, str(error))]
        if parsed.left_out:
            return none, [
                LineProblem(0, f"{counted(parsed.left_out, 'key is', 'keys are')} not below {printable(path)}")
            ]
        if not exported and END not in data.splitlines():
            text = f"the line `{END.decode()}` is missing, so the file may be truncated (add it at the end)"
            return none, [LineProblem(data.count(b"\n"), text)]
        if self.draft.keys and not parsed.entries and not parsed.problems:
            return none, [LineProblem(0, "no entries (to remove every entry, use unset)")]
        named = {entry.key if exported else fold_key(entry.key) for entry in parsed.entries}
        remove = [stored for key, stored in self.draft.keys.items() if key not in named]
        planned = plan.plan_edits(self.table, self.service, parsed, self.stored, remove)
        # In an export each entry is one line, after the line of the bracket.
        found = [each._replace(line=each.line + exported) for each in (*planned.problems, *planned.refused)]
        return planned, sorted(found)

    def _confirm(self, plan: Plan) -> str:
        target = writing.Target.of(self.table, self.service)
        writing.echo_changes(plan.changes, target, err=self.as_json)
        return self._choice(f"{writing.summary(plan.changes)}. Write? y(es), n(o), e(dit again)", "yne", "n")

    def _ask_again(self, problems: Sequence[LineProblem]) -> str:
        found = []
        for line, text, key in problems:
            what = f"{printable(key)}: {text}" if key else text
            found.append((f"line {line}" if line else "file", printable(what, 1000)))
        main.echo_problems(found, limit=writing.PROBLEMS_SHOWN)
        return self._choice("e(dit again), q(uit)", "eq", "e")

    def _choice(self, text: str, letters: str, default: str) -> str:
        kind = click.Choice(tuple(letters))
        return str(click.prompt(text, type=kind, default=default, show_choices=False, err=self.as_json))


def _run_editor(path: str, line: int) -> None:
    """Run the editor on the file, at a line if there is one."""
    editor = main.editor()
    try:
        command = [*shlex.split(editor), *([f"+{line}"] if line else []), path]
        with writing.handling(lambda *_: None, signal.SIGINT, signal.SIGQUIT):  # which the terminal sends to both
            status = subprocess.run(command, check=False).returncode  # noqa: S603 - the operator's own
    except (OSError, ValueError) as error:  # the second from shlex
        raise TableConsulError(f"{editor}: {problem_of(error)}", "set EDITOR") from None
    if status:
        raise TableConsulError(f"{editor}: exit status {status}; nothing was written")
