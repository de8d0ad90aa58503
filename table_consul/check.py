"""Whether this user can work with the files that the configuration names, and what to do when not.

Smtpd runs its tables as an unprivileged user (smtpd: lka.c, lka), so what root can read says little.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from pathlib import Path

from table_consul.errors import printable


def refusal(path: str, error: OSError) -> str:
    """Why the file cannot be read, with the remedy where there is one."""
    if error.errno not in {errno.EACCES, errno.EPERM}:
        known = {errno.ENOENT: "not found", errno.EISDIR: "is a folder", errno.ENOTDIR: "not found"}
        return known.get(error.errno or 0) or (error.strerror or str(error)).lower()
    for folder in reversed(Path(path).absolute().parents):
        if not os.access(folder, os.X_OK):
            return _closed(str(folder))
    name = printable(path)
    return (
        f"not readable by {who()}; smtpd runs its tables as an unprivileged user "
        f"(try: chown root:{smtpd_group()} {name}; chmod 0640 {name})"
    )


def _closed(folder: str) -> str:
    name = printable(folder)
    return f"folder {name} cannot be entered by {who()} (try: chgrp {smtpd_group()} {name}; chmod g+rx {name})"


def who() -> str:
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


def unreadable(path: str, *, folder: bool = False, secret: bool = False) -> str | None:
    """What is wrong with a file (or folder) that has to be read, None when nothing is."""
    try:
        # Without O_NONBLOCK a named pipe would wait for its writer.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        return refusal(path, error)
    mode = os.fstat(handle).st_mode
    os.close(handle)
    if stat.S_ISDIR(mode) != folder:
        return "is no folder" if folder else "is a folder"
    if folder and not os.access(path, os.X_OK):
        return _closed(path)
    if os.geteuid() == 0 and not mode & 0o044:
        return f"for root alone, but smtpd runs its tables as another user (try: chgrp {smtpd_group()}; chmod g+r)"
    if secret and mode & 0o004:
        return "a secret that everyone on this machine can read (try: chmod 0640)"
    return None


def unwritable(path: str, *, private: bool) -> str | None:
    """What is wrong with a file that has to be written anew and renamed, None when nothing is."""
    file = Path(path)
    folder = printable(str(file.parent))
    try:
        if not file.parent.is_dir():
            return f"folder {folder} not found"
        if not os.access(file.parent, os.W_OK | os.X_OK):
            return f"folder {folder} not writable by {who()}"
        if private and file.exists() and file.stat().st_mode & 0o077:
            return "a copy of the table that others can read (try: chmod 0600)"
    except OSError as error:
        return refusal(path, error)
    return None
