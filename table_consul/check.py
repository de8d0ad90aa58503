"""Check that the files named in the configuration are usable by this user, and suggest fixes.

Smtpd runs its tables as an unprivileged user (smtpd: lka.c, lka), so what root can read says little.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

from table_consul.errors import printable

if TYPE_CHECKING:
    from table_consul.config import Config


def check_files(config: Config) -> list[str]:
    """What would keep this user from working with the configuration, or discloses a secret; a line each.

    For ``--check``, not for `config.load`: a mail server starts although a token is written only a second later.
    """
    return [*_read_files(config), *_written_files(config)]


def _read_files(config: Config) -> Iterator[str]:
    consul = config.consul
    files = {key: getattr(consul, key) for key in ("token_file", "ca_file", "cert_file", "key_file", "ca_path")}
    if consul.addresses[0].startswith("file://"):
        files["address"] = consul.addresses[0].removeprefix("file://")
    name = printable(config.path or "")
    at = {**{key: f"{name}: consul.{key}" for key in (*files, "tls_verify")}, **config.origins}
    for key, path in files.items():
        secret = key in {"token_file", "key_file"}
        if path is not None and (problem := _unreadable(path, folder=key == "ca_path", secret=secret)):
            yield f"{at[key]}: {printable(path)}: {problem}"
    if config.path is not None and (problem := _unreadable(config.path)):
        yield f"{name}: {problem}"
    if not consul.tls_verify and any(address.startswith("https://") for address in consul.addresses):
        consequence = "a man in the middle can read the token and forge answers"
        yield f"{at['tls_verify']}: TLS verification is off: {consequence}"


def _written_files(config: Config) -> Iterator[str]:
    owners: dict[str, str] = {}
    for table in list(config.tables.values()) or [config.table(config.defaults.name)]:
        textfile = config.metrics.textfile and config.metrics.textfile.replace("{table}", table.name)
        for key, path in (("snapshot", table.snapshot), ("metrics.textfile", textfile)):
            if not path:
                continue
            at = f"{printable(config.path or '')}: {key} of table {printable(table.name)}"
            if path in owners:
                yield f"{at}: same file as for table {printable(owners[path])} (put {{table}} into its name)"
            elif problem := _unwritable(path, private=key == "snapshot"):
                yield f"{at}: {problem}"
            owners[path] = table.name


def _unreadable(path: str, *, folder: bool = False, secret: bool = False) -> str | None:
    """What is wrong with a file (or folder) that has to be read, None when nothing is."""
    name = f"{path}/." if folder else path  # takes the permission to enter the folder
    try:
        # Without O_NONBLOCK a named pipe would wait for its writer.
        handle = os.open(name, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        return explain_os_error(name, error)
    mode = os.fstat(handle).st_mode
    os.close(handle)
    if stat.S_ISDIR(mode) and not folder:
        return "is a folder"
    if os.geteuid() == 0 and not mode & 0o044:
        fix = f"chgrp {smtpd_group()}; chmod g+r"
        return f"only root can read it, but smtpd runs tables as an unprivileged user (try: {fix})"
    if secret and mode & 0o004:
        return "every user of this machine can read this secret (try: chmod 0640)"
    return None


def _unwritable(path: str, *, private: bool) -> str | None:
    """What is wrong with a file that has to be written anew and renamed, None when nothing is."""
    folder = os.path.dirname(path)
    if not os.access(f"{folder}/", os.W_OK | os.X_OK):
        return f"folder {printable(folder)} not found, or not writable by {_user()}"
    with contextlib.suppress(OSError):  # it need not exist
        if private and os.stat(path).st_mode & 0o077:
            return "other users can read this copy of the table (try: chmod 0600)"
    return None


def explain_os_error(path: str, error: OSError) -> str:
    """Why the file cannot be read, with a fix if there is one."""
    if error.errno not in {errno.EACCES, errno.EPERM}:
        usual = {errno.ENOENT: "not found", errno.EISDIR: "is a folder", errno.ENOTDIR: "not a folder"}
        return usual.get(error.errno or 0) or (error.strerror or str(error)).lower()
    name, group = printable(path), smtpd_group()
    for folder in (path[:end] or "/" for end, character in enumerate(path) if character == "/"):
        if not os.access(folder, os.X_OK):
            name = printable(folder)
            return f"folder {name} cannot be entered by {_user()} (try: chgrp {group} {name}; chmod g+rx {name})"
    fix = f"chown root:{group} {name}; chmod 0640 {name}"
    return f"not readable by {_user()}; smtpd runs tables as an unprivileged user (try: {fix})"


def _user() -> str:
    uid = os.geteuid()
    try:
        return f"user {pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def smtpd_group() -> str:
    """The group of smtpd's unprivileged user: OpenBSD's, Debian's, or Arch Linux's, whichever there is."""
    groups = {group.gr_name for group in grp.getgrall()}
    return next((name for name in ("_smtpd", "opensmtpd", "smtpd") if name in groups), "_smtpd")
