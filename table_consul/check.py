"""Check that the files named in the configuration are usable by this user, and suggest fixes.

smtpd runs tables as an unprivileged user (smtpd: lka.c, lka), which may not read a file that root can.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

from table_consul.errors import SourceError, printable
from table_consul.files import (
    FOLDER,
    TOKEN,
    current_user,
    explain_os_error,
    open_regular_file,
    parents,
    read_token,
    smtpd_group,
    smtpd_user,
)

if TYPE_CHECKING:
    from table_consul.config import Config


def check_files(config: Config) -> list[str]:
    """The problems that keep the program from using the configuration, or that disclose a secret; a line each.

    Root checks as smtpd's user, if there is one; any other user as itself. `config.load` does not check this, so that
    a mail server starts even if a token is written only a second later.
    """
    with as_smtpd_user():
        return [*_read_files(config), *_written_files(config), *_packages(config)]


@contextlib.contextmanager
def as_smtpd_user() -> Iterator[None]:
    """Run the block as smtpd's user, if root runs it and that user exists."""
    user = smtpd_user() if os.geteuid() == 0 else None
    with contextlib.ExitStack() as undo:
        if user is not None:
            with contextlib.suppress(PermissionError):  # a container may deny this to root
                groups, group = os.getgroups(), os.getegid()
                os.setgroups([user.pw_gid])  # smtpd drops all others
                undo.callback(os.setgroups, groups)
                os.setegid(user.pw_gid)
                undo.callback(os.setegid, group)
                os.seteuid(user.pw_uid)
                undo.callback(os.seteuid, 0)
        yield


def _read_files(config: Config) -> Iterator[str]:
    consul = config.consul
    files = {key: getattr(consul, key) for key in ("token_file", "ca_file", "cert_file", "key_file", "ca_path")}
    files["address"] = consul.file
    name = printable(config.path or "")
    at = {**{key: f"{name}: consul.{key}" for key in (*files, "tls_verify")}, **config.origins}
    unusable = False
    for key, path in files.items():
        if path is None:
            continue
        problem = _unreadable(path, folder=key == "ca_path", secret=key in {"token_file", "key_file"})
        if key == "token_file" and not problem and not TOKEN.fullmatch(read_token(path)):
            problem = "must contain one token: printable ASCII without white space (write only the SecretID)"
        elif key == "address" and not problem:
            problem = _malformed_export(path)
        if problem:
            unusable = True
            yield f"{at[key]}: {printable(path)}: {problem}"
    if not unusable and any(address.startswith("https://") for address in consul.addresses):
        from table_consul.connection import tls_context

        try:
            tls_context(consul)
        except SourceError as error:
            yield f"{name or 'environment'}: {error} (use PEM files and a key without a password)"
    if config.path is not None and (problem := _unreadable(config.path)):
        yield f"{name}: {problem}"
    if not consul.tls_verify and any(address.startswith("https://") for address in consul.addresses):
        consequence = "a man in the middle can read the token and forge answers"
        yield f"{at['tls_verify']}: TLS verification is off: {consequence} (turn it on)"


def _written_files(config: Config) -> Iterator[str]:
    owners: dict[str, str] = {}
    reported: set[str] = set()
    name = printable(config.path or "")
    for table in list(config.tables.values()) or [config.table(config.defaults.name)]:
        textfile = config.metrics.textfile and config.metrics.textfile.replace("{table}", table.name)
        listen = (config.metrics.listen or "").removeprefix("unix://").replace("{table}", table.name)
        for key, path in (("snapshot", table.snapshot), ("metrics.textfile", textfile), ("metrics.listen", listen)):
            if not path:
                continue
            at = f"{name}: {key} of table {printable(table.name)}"
            is_file = path.startswith("/")
            problem = _unwritable(path, private=key == "snapshot") if is_file else None
            if path in owners:
                what, fix = "file", "put {table} into its name"
                if not is_file:
                    what, fix = "address", "use unix:///PATH with {table}"
                problem = f"same {what} as for table {printable(owners[path])} ({fix})"
            if problem:
                yield f"{at}: {problem}"
                reported.add(path)
            owners[path] = table.name
    # smtpd.conf may name tables that have no section in the configuration.
    for key, path in (("defaults.snapshot", config.defaults.snapshot), ("metrics.textfile", config.metrics.textfile)):
        if path and "{table}" not in path and path not in reported:
            yield f"{name}: {key}: every table would write the same file (put {{table}} into its name)"


def _packages(config: Config) -> Iterator[str]:
    """The Python packages that the configuration requires, and that are not installed."""
    name = printable(config.path or "environment")
    tables = [*config.tables.values()] or [config.table(config.defaults.name)]
    if any("auth" in table.services for table in tables) and not any(map(find_spec, ("crypt", "crypt_r"))):
        yield f"{name}: services: auth: the Python package crypt-r is not installed (install table-consul[auth])"
    if config.metrics != type(config.metrics)() and not find_spec("prometheus_client"):
        hint = "install table-consul[metrics] or python3-prometheus-client"
        yield f"{name}: metrics: the Python package prometheus-client is not installed ({hint})"


def _malformed_export(path: str) -> str | None:
    from table_consul.sources.export import iter_export

    try:
        with open(path, "rb", opener=open_regular_file) as file:
            for _ in iter_export(file):
                pass
    except SourceError as error:
        return f"{error} (try: consul kv export > {printable(path)})"
    return None


def _unreadable(path: str, *, folder: bool = False, secret: bool = False) -> str | None:
    """The problem with a file (or folder) that must be readable; None if there is none."""
    name = f"{path}/." if folder else path  # requires permission to enter the folder
    try:
        handle = open_regular_file(name, os.O_RDONLY)
    except OSError as error:
        return explain_os_error(name, error)
    mode = os.fstat(handle).st_mode
    os.close(handle)
    if stat.S_ISDIR(mode) and not folder:
        return FOLDER
    if os.geteuid() == 0:
        needs = "but smtpd runs tables as an unprivileged user"
        for each in dict.fromkeys((*parents(name), *parents(os.path.realpath(path)))):
            if not os.stat(each).st_mode & 0o011:
                fix = f"chgrp {smtpd_group()} {printable(each)}; chmod g+x {printable(each)}"
                return f"only root can enter folder {printable(each)}, {needs} (try: {fix})"
        if not mode & 0o044:
            return f"only root can read it, {needs} (try: chgrp {smtpd_group()}; chmod g+r)"
    if secret and mode & 0o004:
        return "every user of this machine can read this secret (try: chmod 0640)"
    return None


def _unwritable(path: str, *, private: bool) -> str | None:
    """The problem with a file that must be replaceable by renaming; None if there is none."""
    folder = os.path.dirname(path)
    if not os.access(f"{folder}/", os.W_OK | os.X_OK, effective_ids=True):
        return f"folder {printable(folder)} not found, or not writable by {current_user()} (create it for this user)"
    with contextlib.suppress(OSError):  # it need not exist
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            return FOLDER
        if private and mode & 0o077:
            return "other users can read this snapshot (try: chmod 0600)"
    return None
