"""Check that the files named in the configuration are usable by this user, and suggest fixes.

Smtpd runs its tables as an unprivileged user (smtpd: lka.c, lka), so what root can read says little.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from table_consul.errors import printable

if TYPE_CHECKING:
    from table_consul.config import Config


def check_files(config: Config) -> list[str]:
    """What would keep this user from working with the configuration, or discloses a secret; a line each.

    For ``--check``, not for `config.load`: a mail server starts although a token is written only a second later.
    """
    return [*_consul(config), *_tables(config)]


def _consul(config: Config) -> Iterator[str]:
    """What is wrong with the files that are read, and with TLS."""
    consul = config.consul
    files = {key: getattr(consul, key) for key in ("token_file", "ca_file", "cert_file", "key_file", "ca_path")}
    if consul.addresses[0].startswith("file://"):
        files["address"] = consul.addresses[0].removeprefix("file://")
    for key, path in files.items():
        secret = key in {"token_file", "key_file"}
        if path is not None and (problem := _unreadable(path, folder=key == "ca_path", secret=secret)):
            yield f"{_origin(config, key)}: {printable(path)}: {problem}"
    if config.path is not None and (problem := _unreadable(config.path)):
        yield f"{printable(config.path)}: {problem}"
    if not consul.tls_verify and any(address.startswith("https://") for address in consul.addresses):
        consequence = "a man in the middle can read the token and forge answers"
        yield f"{_origin(config, 'tls_verify')}: TLS verification is off: {consequence}"


def _origin(config: Config, key: str) -> str:
    return config.origins.get(key, f"{printable(config.path or '')}: consul.{key}")


def _tables(config: Config) -> Iterator[str]:
    """What is wrong with the files that are written, one for each table."""
    owners: dict[str, str] = {}
    for table in list(config.tables.values()) or [config.table(config.default_table)]:
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
    try:
        # Without O_NONBLOCK a named pipe would wait for its writer.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        return explain_os_error(path, error)
    mode = os.fstat(handle).st_mode
    os.close(handle)
    if stat.S_ISDIR(mode) != folder:
        return "not a folder" if folder else "is a folder"
    if folder and not os.access(path, os.X_OK):
        return _not_searchable(path)
    if os.geteuid() == 0 and not mode & 0o044:
        fix = f"chgrp {smtpd_group()}; chmod g+r"
        return f"only root can read it, but smtpd runs tables as an unprivileged user (try: {fix})"
    if secret and mode & 0o004:
        return "every user of this machine can read this secret (try: chmod 0640)"
    return None


def _unwritable(path: str, *, private: bool) -> str | None:
    """What is wrong with a file that has to be written anew and renamed, None when nothing is."""
    file = Path(path)
    folder = printable(str(file.parent))
    try:
        if not file.parent.is_dir():
            return f"folder {folder} not found"
        if not os.access(file.parent, os.W_OK | os.X_OK):
            return f"folder {folder} not writable by {current_user()}"
        if private and file.exists() and file.stat().st_mode & 0o077:
            return "other users can read this copy of the table (try: chmod 0600)"
    except OSError as error:
        return explain_os_error(path, error)
    return None


def explain_os_error(path: str, error: OSError) -> str:
    """Why the file cannot be read, with a fix if there is one."""
    if error.errno not in {errno.EACCES, errno.EPERM}:
        usual = {errno.ENOENT: "not found", errno.EISDIR: "is a folder", errno.ENOTDIR: "not found"}
        return usual.get(error.errno or 0) or (error.strerror or str(error)).lower()
    for folder in reversed(Path(path).absolute().parents):
        if not os.access(folder, os.X_OK):
            return _not_searchable(str(folder))
    name = printable(path)
    return (
        f"not readable by {current_user()}; smtpd runs tables as an unprivileged user "
        f"(try: chown root:{smtpd_group()} {name}; chmod 0640 {name})"
    )


def _not_searchable(folder: str) -> str:
    name, group = printable(folder), smtpd_group()
    return f"folder {name} cannot be entered by {current_user()} (try: chgrp {group} {name}; chmod g+rx {name})"


def current_user() -> str:
    """The user that this process runs as, for messages."""
    uid = os.geteuid()
    try:
        return f"user {pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def smtpd_group() -> str:
    """The group of smtpd's unprivileged user: OpenBSD's, Debian's, or Arch Linux's, whichever there is."""
    for name in ("_smtpd", "opensmtpd", "smtpd"):
        try:
            return grp.getgrnam(name).gr_name
        except KeyError:
            continue
    return "_smtpd"
