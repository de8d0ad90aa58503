"""The files that smtpd reads besides the tables to expand an alias: included ones, and ~/.forward.

Root reads included files as smtpd's user does. smtpd itself opens ~/.forward as root.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from table_consul.check import as_smtpd_user
from table_consul.ctl.recipients import PERMANENT, TEMPORARY, File
from table_consul.errors import SourceError, printable, problem_of
from table_consul.files import current_user, open_regular_file, parents, read_bounded, smtpd_user

INCLUDE_BYTES = 16 << 20
# smtpd: forward.c, MAX_FORWARD_SIZE.
FORWARD_BYTES = 4 << 10
_WRITABLE = stat.S_IWGRP | stat.S_IWOTH


def include(path: bytes) -> File:
    """The file of ``:include:PATH`` (smtpd: aliases.c, aliases_expand_include)."""
    definite = os.geteuid() == 0 and smtpd_user() is not None
    with as_smtpd_user():
        try:
            with open(path, "rb", opener=open_regular_file) as file:
                return File(path, read_bounded(file, INCLUDE_BYTES))
        except PermissionError:
            if not definite:
                return _unreadable(path)
            return File(path, problem=f"not readable by {current_user()}; smtpd ignores it", ignored=True)
        except IsADirectoryError:
            return File(path, b"", problem="a folder, which smtpd reads as an empty file")
        except OSError as error:
            if error.errno == errno.EINVAL:  # of open_regular_file
                return File(path, problem=f"not followed: {problem_of(error)}")
            return File(path, problem=f"{problem_of(error)}; smtpd ignores it", ignored=True)
        except SourceError as error:
            return File(path, problem=f"not followed: {error}")


def forward(userinfo: bytes) -> File | None:
    """The file .forward in the home directory of ``UID:GID:HOME``; None if there is none.

    This is smtpd's parent_forward_open (smtpd.c) and secure_file (util.c).
    """
    uid, _, home = (*userinfo.split(b":", 2), b"", b"")[:3]
    path = home + b"/.forward"
    try:
        if os.stat(home).st_mode & stat.S_ISVTX:
            return File(path, problem="the home directory has the sticky bit (try: chmod -t)", reply=TEMPORARY)
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if where := _insecure(file.fileno(), path, home, int(uid)):
                problem = f"{where}: must belong to uid {int(uid)}, and no other user may write it"
                return File(path, problem=problem, reply=PERMANENT)
            data = file.read(FORWARD_BYTES)
    except FileNotFoundError:
        return None
    except PermissionError as error:
        return _unreadable(path) if os.geteuid() else File(path, problem=problem_of(error), reply=PERMANENT)
    except (OSError, ValueError) as error:
        link = isinstance(error, OSError) and error.errno == errno.ELOOP
        problem = "is a symbolic link, which smtpd does not follow" if link else problem_of(error)
        return File(path, problem=problem, reply=PERMANENT)
    if len(data) == FORWARD_BYTES:
        return File(path, problem=f"{FORWARD_BYTES} bytes or more", reply=TEMPORARY)
    return File(path, data)


def _unreadable(path: bytes) -> File:
    return File(path, problem=f"not readable by {current_user()}, but perhaps by smtpd (run this as root)")


def _insecure(descriptor: int, path: bytes, home: bytes, uid: int) -> str:
    """The file or folder that another user may write, empty if there is none."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != uid or status.st_mode & _WRITABLE:
        return printable(path)
    top = os.fsdecode(os.path.realpath(home))
    folders = [*parents(os.fsdecode(os.path.realpath(path)))]
    for folder in folders[folders.index(top) if top in folders else 0 :]:
        with contextlib.suppress(OSError):
            status = os.stat(folder)
            if status.st_uid not in (0, uid) or status.st_mode & _WRITABLE:
                return printable(folder)
    return ""
