"""``table-consulctl check``: check everything between smtpd and Consul, as smtpd's user."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click
import msgspec

from table_consul import __version__, config
from table_consul.check import as_smtpd_user, check_files
from table_consul.ctl import smtpdconf
from table_consul.ctl.main import FAILED, FILE, NO, UNCUT, as_json, echo_problems, late_config, load_config
from table_consul.errors import (
    BadResponse,
    ConfigError,
    Forbidden,
    SourceError,
    TableConsulError,
    Unreachable,
    counted,
    printable,
    problem_of,
)
from table_consul.files import current_user
from table_consul.services import SERVICES, Table

if TYPE_CHECKING:
    from table_consul.ctl import access

PROGRAM_SECONDS = 20.0
KNOWN_FAULTS = {
    "1.21.4": 'its UI cannot create or edit values in code mode (turn off "Code" in the form, or upgrade)',
    "1.21.5": "it rejects URLs that contain @, so single mail addresses cannot be read (upgrade to 1.21.6)",
    "1.22.4": "it ends requests after 30 seconds, including blocking queries (upgrade to 1.22.5)",
}

# For errors without a hint of their own, by kind.
HINTS: dict[type[SourceError], str] = {
    Forbidden: "create a token with the rules that table-consulctl policy prints",
    BadResponse: "check that this is Consul's address",
    Unreachable: "check that Consul runs there",
    SourceError: "correct this file",
}


class Finding(msgspec.Struct, frozen=True):
    """A problem; if ``unknown``, one that prevents further checks."""

    where: str
    problem: str
    unknown: bool = False


@click.command("check")
@click.argument("tables", metavar="[TABLE]...", nargs=-1)
@click.option(
    "--smtpd-conf", "path", type=FILE, metavar="PATH", help="Read this smtpd.conf, not the one that smtpd reads."
)
@as_json
@late_config
@click.pass_context
def command(context: click.Context, *, tables: tuple[str, ...], path: str | None, as_json: bool) -> int:
    """Check everything between smtpd and Consul for TABLE: one line per problem, with a hint.

    This covers smtpd.conf and the lookups that it causes, the program, the configuration and its files, Consul and its
    version, the token, and the folder of each service. Root checks as smtpd's user. lint checks the entries.

    Without TABLE: all tables of smtpd.conf that table-consul serves.

    Exit status: 0 no problems, 1 problems, 2 something cannot be checked.

    \b
    Examples:
      table-consulctl check
      table-consulctl check aliases --json
    """  # noqa: D301 - click does not wrap the lines after a \b
    checker = _Checker(context.find_root().obj)
    checker.check(tables, path)
    if as_json:
        click.echo(msgspec.json.encode({"problems": checker.findings, "checked": checker.checked}))
    else:
        echo_problems([(each.where, each.problem) for each in checker.findings], err=False)
        for line in checker.checked:
            click.echo(f"checked: {line}", err=True)
    return FAILED if any(each.unknown for each in checker.findings) else NO if checker.findings else 0


class _Checker:
    def __init__(self, default: str | None) -> None:
        self._default = default
        self.findings: list[Finding] = []
        self.checked: list[str] = []

    def _note(self, line: str) -> None:
        if line not in self.checked:  # several configurations may name the same Consul
            self.checked.append(line)

    def _report(self, where: str | bytes, problem: str, *, unknown: bool = False) -> None:
        finding = Finding(printable(where, UNCUT), printable(problem, UNCUT), unknown)
        if finding not in self.findings:
            self.findings.append(finding)

    def check(self, names: Sequence[str], path: str | None) -> None:
        """Check these tables, or all of smtpd.conf."""
        from table_consul.ctl import access  # noqa: F401 - before root becomes a user that may not read the package

        declared = self._smtpd_conf(path)
        for name in names:
            if declared is not None and name not in declared:
                text = f"table {printable(name)} is not defined (add: table {printable(name)} {smtpdconf.BACKEND})"
                self._report(path or smtpdconf.locate(), text)
        known = declared or {}
        wanted = [*dict.fromkeys(names or known)]
        with as_smtpd_user():
            if declared is not None:
                self._program()
            by_file: dict[str | None, list[str]] = {}
            for name in wanted:
                own = known[name].config if name in known else None
                by_file.setdefault(own or self._default, []).append(name)
            for file, members in (by_file or {self._default: []}).items():
                self._configuration(file, members, known)

    def _smtpd_conf(self, path: str | None) -> dict[str, smtpdconf.Declared] | None:
        """The tables of smtpd.conf, None if it cannot be read."""
        try:
            path = path or smtpdconf.locate()
            found = smtpdconf.read(path)
        except OSError as error:
            hint = "run this as root" if isinstance(error, PermissionError) else "correct the path"
            self._report(path or "smtpd", f"{problem_of(error)} ({hint})", unknown=True)
            return None
        except TableConsulError as error:
            hint = "" if error.hint else " (correct the path)"
            self._report(path or "smtpd.conf", f"{error}{hint}", unknown=True)
            return None
        program = smtpdconf.program()
        if program is not None and os.geteuid() == 0:
            done = _run(program, "-n", "-f", path)
            if done.returncode:
                for line in done.stderr.splitlines() or [f"exit status {done.returncode}"]:
                    self._report(path, f"smtpd -n: {line} (see smtpd.conf(5))")
        for where, problem in found.problems:
            self._report(where, problem)
        if not found.tables:
            self._report(
                path, f"no table with the backend {smtpdconf.BACKEND} (add: table aliases {smtpdconf.BACKEND})"
            )
        for table in found.tables.values():
            if not table.uses:
                self._report(table.where, f"table {printable(table.name)} is defined but never used (remove it)")
        self._note(f"{printable(path)} ({counted(len(found.tables), 'table', 'tables')})")
        return found.tables

    def _program(self) -> None:
        """Check that smtpd can start the program: it is in smtpd's folder, and smtpd's user can run it."""
        try:
            folders = smtpdconf.built_in(rb"\0(/[\w/.-]+)/table-%s\0")
        except OSError as error:
            text = f"{current_user()} cannot read it: {problem_of(error)} (try: chmod a+r)"
            self._report(smtpdconf.program() or "smtpd", text, unknown=True)
            return
        if not folders:
            self._report(
                "smtpd", "not found on this host, so the folder of its table programs is unknown (install OpenSMTPD)"
            )
            return
        program = f"{folders[0]}/table-{smtpdconf.BACKEND}"
        if not os.path.exists(program):
            self._report(program, f"not found (run make install LIBEXECDIR={folders[0]})")
            return
        done = _run(program, "--version")
        if done.returncode:
            lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
            # Such as a Python below /root, which make install writes into the program if it is root's.
            python = " with a PYTHON that this user can run" if lines == ["permission denied"] else ""
            self._report(program, f"{current_user()} cannot run it: {lines[-1]} (run make install{python})")
        elif done.stdout.split()[-1:] != [__version__]:
            self._report(program, f"is {done.stdout.strip()}, but table-consulctl is {__version__} (run make install)")
        self._note(printable(program))

    def _configuration(self, file: str | None, names: Sequence[str], known: dict[str, smtpdconf.Declared]) -> None:
        try:
            loaded = load_config(file)
            tables = {name: loaded.table(name) for name in names or loaded.tables}
        except ConfigError as error:
            for line in (str(error), *getattr(error, "__notes__", ())):
                where, separator, problem = line.partition(": ")
                self._report(where if separator else printable(file or ""), problem or line)
            return
        for line in check_files(loaded):
            self._report(*line.split(": ", 1))
        self._note(f"{printable(loaded.path or 'the defaults and the environment')}, as {current_user()}")
        # Not a problem: mail servers with different tables may share one file.
        if known and (unused := sorted(set(loaded.tables) - set(known))):
            sections = ", ".join(f"[tables.{printable(name)}]" for name in unused)
            self._note(f"no table in smtpd.conf uses {sections}")
        if used := sorted(origin.removeprefix("environment: ") for origin in loaded.origins.values()):
            self._note(f"with {', '.join(used)} from this environment, which smtpd may not have")
        uses = {name: known[name].uses if name in known else [] for name in tables}
        for name, table in tables.items():
            for services, where in uses[name]:
                if services and not set(services) & set(table.services):
                    text = f"smtpd looks up {' or '.join(services)} in table {printable(name)} (add it to `services`)"
                    self._report(where, text)
        if loaded.consul.file is None:
            try:
                self._consul(loaded, tables, uses)
            except SourceError as error:
                where, separator, problem = _with_hint(error).partition(": ")
                self._report(where if separator else "Consul", problem or where, unknown=True)

    def _consul(self, loaded: config.Config, tables: dict[str, Table], uses: dict[str, list[smtpdconf.Use]]) -> None:
        """Check Consul, the token and the folders.

        Raises:
            SourceError: it cannot be read.
        """
        from table_consul.ctl import access
        from table_consul.transport import NO_LEADER

        with contextlib.closing(access.Client(loaded.consul)) as client:
            where = f"Consul at {client.address}"
            leader = client.leader()
            if leader:
                self._note(f"Consul leader {printable(leader)}")
            elif leader is not None:
                self._report("Consul leader", f"none, according to {client.address} ({NO_LEADER})", unknown=True)
                return
            version = self._version(client)
            try:
                has_acls = client.knows_token()
            except Forbidden as error:
                if access.has_token(loaded.consul):
                    self._report(where, _with_hint(error).removeprefix(where).lstrip(": "))
                    return
                has_acls = True
            if has_acls and not access.has_token(loaded.consul):
                self._note(f"no token is configured, so Consul uses {access.ANONYMOUS}")
            self._note(f"Consul{version} at {client.address}")
            folders = {
                table.path(SERVICES[name]): None
                for table in tables.values()
                for name in _services(table, uses[table.name])
            }
            unreadable = access.check(loaded.consul, [*folders], operator=False).unreadable
            for folder, text in unreadable:
                self._report(folder, text)
            hidden = {folder for folder, _ in unreadable}
            for name, table in tables.items():
                for services, where in uses[name]:
                    paths = [table.path(SERVICES[each]) for each in services if each in table.services]
                    if paths and not any(path in hidden or client.exists(path) for path in paths):
                        looked_up = " or ".join(services)
                        text = f"smtpd looks up {looked_up} here ({where}), but this folder has no keys"
                        self._report(paths[0], f"{text} (fill it, or check the table's name, `prefix` and `paths`)")

    def _version(self, client: access.Client) -> str:
        """The text after "Consul": its version, or that it is unknown."""
        try:
            version = client.version()
        except Forbidden:
            return ", version unknown (the token may not read it)"
        except BadResponse:  # a proxy forwards only the requests that tables need
            return ", version unknown"
        number = version.partition("+")[0].partition("-")[0]
        if number in KNOWN_FAULTS:
            self._report(f"Consul {printable(version)}", KNOWN_FAULTS[number])
        return f" {printable(version)}"


def _with_hint(error: SourceError) -> str:
    """The text of the error; with the hint for its kind, if it has none of its own."""
    if error.hint:
        return str(error)
    hint = next(hint for kind, hint in HINTS.items() if isinstance(error, kind))
    return f"{error} ({hint})"


def _services(table: Table, uses: Sequence[smtpdconf.Use]) -> Iterator[str]:
    """Yield the services of the table that smtpd looks up; all services of the table if that is unknown."""
    named = [name for use in uses for name in use.services if name in table.services]
    yield from named or table.readable_services


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    """The finished program; one that cannot be started, or does not end in time, fails with the reason."""
    try:
        return subprocess.run(  # noqa: S603 - no shell
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROGRAM_SECONDS,
            encoding="utf-8",
            errors="backslashreplace",
            check=False,
            cwd="/",
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = problem_of(error) if isinstance(error, OSError) else f"no answer in {PROGRAM_SECONDS:g} s"
        return subprocess.CompletedProcess(command, 1, "", reason)
