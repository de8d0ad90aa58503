"""``table-consulctl passwd``: set the password of a user."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from table_consul import config
from table_consul.ctl import main, writing
from table_consul.ctl.formats import FileEntry, ParsedFile
from table_consul.errors import TableConsulError, printable
from table_consul.services import SERVICES, Service, Table, passwords
from table_consul.services.entries import Entries

if TYPE_CHECKING:
    from table_consul.ctl.plan import Stored
    from table_consul.ctl.txn import Store

SCHEMES = ("yescrypt", "bcrypt", "argon2")
# bcrypt ignores all further bytes.
BCRYPT_BYTES = 72


@click.command("passwd")
@click.argument("table_name", metavar="TABLE")
@click.argument("user", metavar="USER")
@click.option(
    "--scheme", type=click.Choice(SCHEMES), metavar="SCHEME", help=f"{SCHEMES[0]}, {SCHEMES[1]} or {SCHEMES[2]}."
)
@writing.options
def command(
    settings: config.Config, *, table_name: str, user: str, scheme: str | None, options: writing.Options
) -> int:
    """Ask for a password twice, and write its hash for USER.

    The hash replaces the one of USER in auth or credentials; that of a new user goes to auth if the table has this
    service. The default scheme is yescrypt, or bcrypt if crypt(3) lacks it; argon2 requires auth. Without a terminal,
    the password is read from standard input.

    Exit status: 0 written, 2 not written.

    \b
    Examples:
      table-consulctl passwd users gilles
    """  # noqa: D301 - click does not wrap the lines after a \b
    from table_consul.ctl import plan

    table = settings.table(table_name)
    if scheme == "argon2" and "auth" not in table.services:
        raise click.UsageError("--scheme argon2 requires the service auth (crypt(3) of smtpd cannot verify argon2)")
    key, _ = writing.folded_key(table, SERVICES["credentials"], os.fsencode(user))
    with writing.open_store(settings, options) as store:
        service, stored, former = _former(table, store, key)
        prefix, locked = _label(key, former)
        value = prefix + _hash(_password(), (scheme,) if scheme else SCHEMES[:2])
        parsed = ParsedFile("text", [FileEntry(key, value, 1)], [])
        planned = plan.plan_edits(table, service, parsed, stored)
        status = writing.Writer(writing.Target.of(table, service), store, options).judge_and_apply(planned)
        if locked and not status:
            click.echo(f"note: {printable(key)} was locked and can now log in", err=True)
        return status


def _former(table: Table, store: Store, key: bytes) -> tuple[Service, list[Stored], bytes]:
    """The service that stores the credential, or will; the entries of its folder; the credential, empty if new."""
    names = ("auth", "credentials") if "auth" in table.services else ("credentials",)
    found = []
    for service in map(SERVICES.__getitem__, names):
        path = table.path(service)
        stored = store.entries(path)
        own = [(each.key[len(path) :], each.value) for each in stored]
        entries = Entries(table, service, [pair for pair in own if pair[0].lower() == key])
        if len(entries) and key not in entries.incomplete:
            return service, stored, entries.values.get(key, b"")
        found.append((service, stored, b""))
    return found[0]


def _label(key: bytes, former: bytes) -> tuple[bytes, bool]:
    """The text before the hash of a credential (``USER:`` or nothing), and whether the account is locked.

    Raises:
        TableConsulError: the credential is a relay password, which must not become a hash.
    """
    secret = passwords.hash_part(former)
    locked = secret.startswith(passwords.LOCK_MARKERS)
    if b":" in former and not locked and not passwords.looks_like_a_hash(secret):
        text = "contains a relay password, not a hash; nothing was written (use set)"
        raise TableConsulError(f"{printable(key)}: {text}")
    return former.removesuffix(secret), locked


def _password() -> str:
    """The password, typed twice; without a terminal, the first line of standard input.

    Raises:
        TableConsulError: the password is invalid.
    """
    if main.is_terminal(sys.stdin):
        password = str(click.prompt("New password", hide_input=True, confirmation_prompt="Repeat password"))
    else:
        try:
            line = sys.stdin.buffer.readline(passwords.PASSWORD_BYTES + 2) if sys.stdin is not None else b""
            password = line.rstrip(b"\r\n").decode()
        except UnicodeDecodeError:
            raise TableConsulError("the password is not valid UTF-8") from None
    if not password or not password.isprintable():
        raise TableConsulError("the password is empty" if not password else "the password contains control characters")
    if len(password.encode()) > passwords.PASSWORD_BYTES:
        raise TableConsulError(f"the password is longer than {passwords.PASSWORD_BYTES} bytes")
    return password


def _hash(password: str, schemes: tuple[str, ...]) -> bytes:
    for scheme in schemes:
        made = passwords.make_hash(scheme, password, os.urandom(16))
        if made is None:
            continue
        if scheme == "bcrypt" and len(password.encode()) > BCRYPT_BYTES:
            raise TableConsulError(f"the password is longer than {BCRYPT_BYTES} bytes; bcrypt would ignore the rest")
        return made
    raise TableConsulError(f"crypt(3) of this system does not support {' or '.join(schemes)}")
