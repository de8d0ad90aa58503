"""Open files only if they are regular, explain why that fails, and replace files in one step."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from table_consul.errors import SourceError, printable, problem_of

if TYPE_CHECKING:
    import pwd

# Of temporary files. No other program uses it, so leftover files with it may be removed.
_SUFFIX = ".table-consul.tmp"

TOKEN = re.compile(r"[\x21-\x7e]+")
"""An ACL token: text that a header can contain unchanged."""

FOLDER = "is a folder (name a file)"

# The user of OpenBSD, Debian, and Arch Linux.
_SMTPD_NAMES = ("_smtpd", "opensmtpd", "smtpd")


def open_regular_file(path: str, flags: int, *, folder: int | None = None) -> int:
    """An opener for open() that rejects pipes, which may block, and devices, which may never end.

    A relative path is one in the open ``folder``, if that is given.

    Raises:
        OSError: as open(2), or the path is a pipe or a device.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK, dir_fd=folder)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # open() itself refuses folders
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, f"a {'named pipe' if stat.S_ISFIFO(mode) else 'device'}, not a file", path)


def version_of(status: os.stat_result) -> tuple[int, int, int]:
    """A value that changes with the file, so that a broken one is not parsed for each lookup."""
    return status.st_mtime_ns, status.st_ino, status.st_size


def explain_os_error(path: str, error: OSError) -> str:
    """Why the file cannot be read, with a fix."""
    if error.errno not in {errno.EACCES, errno.EPERM}:
        missing = "not found (correct the path, or create it)"
        usual = {errno.ENOENT: missing, errno.EISDIR: FOLDER, errno.ENOTDIR: "not a folder (correct the path)"}
        return usual.get(error.errno or 0) or f"{problem_of(error)} (check the path)"
    name, group = printable(path), smtpd_group()
    for folder in parents(path):
        if not os.access(folder, os.X_OK, effective_ids=True):
            name = printable(folder)
            return f"{current_user()} cannot enter folder {name} (try: chgrp {group} {name}; chmod g+rx {name})"
    fix = f"chown root:{group} {name}; chmod 0640 {name}"
    return f"not readable by {current_user()}; smtpd runs tables as an unprivileged user (try: {fix})"


def parents(path: str) -> Iterator[str]:
    """The folders that lead to an absolute path, the topmost first."""
    return (path[:end] or "/" for end, character in enumerate(path) if character == "/")


def current_user() -> str:
    """The user that this process acts as, for messages."""
    import pwd

    uid = os.geteuid()
    try:
        return f"user {pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def smtpd_user() -> pwd.struct_passwd | None:
    """The unprivileged user of smtpd, None if there is none."""
    import pwd

    for name in _SMTPD_NAMES:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    return None


def smtpd_group() -> str:
    """The name of smtpd's group; the usual name if there is none."""
    import grp

    for name in _SMTPD_NAMES:
        with contextlib.suppress(KeyError):
            return grp.getgrnam(name).gr_name
    return _SMTPD_NAMES[0]


def read_token(path: str) -> str:
    """The text of a token file, valid if it matches `TOKEN`. It may be empty while it is being written."""
    with open(path, "rb", buffering=0, opener=open_regular_file) as file:
        return file.read(4096).decode("ascii", "replace").rstrip()


def read_bounded(file: BinaryIO, limit: int) -> bytes:
    """All of an open file.

    Raises:
        SourceError: it is larger than ``limit`` bytes.
    """
    data = file.read(limit + 1)
    if len(data) > limit:
        raise SourceError(f"larger than {limit >> 20} MiB")
    return data


def _locked_temporary(path: str) -> tuple[int, str]:
    """The descriptor and name of a new temporary file beside the path, which only this user may read."""
    import tempfile

    folder, name = os.path.split(path)
    while True:
        descriptor, temporary = tempfile.mkstemp(prefix=f"{name}.", suffix=_SUFFIX, dir=folder or ".")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another writer is about to remove it
            os.close(descriptor)
            continue
        except OSError:  # a file system without locks: nothing is removed there
            return descriptor, temporary
        if os.fstat(descriptor).st_nlink:
            return descriptor, temporary
        os.close(descriptor)


def _remove_leftovers(path: str) -> None:
    """Remove the temporary files for this path that a killed writer of this user has left, as far as possible."""
    folder, name = os.path.split(path)
    pattern = re.compile(re.escape(name) + r"\.[a-z0-9_]{8}" + re.escape(_SUFFIX))
    with contextlib.suppress(OSError):
        for temporary in filter(pattern.fullmatch, os.listdir(folder or ".")):
            leftover = os.path.join(folder, temporary)
            with contextlib.suppress(OSError), open(leftover, "rb", opener=open_regular_file) as file:
                if os.fstat(file.fileno()).st_uid == os.geteuid() and not os.path.islink(leftover):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(leftover)


def replace_file(path: str, data: bytes, *, mode: int = 0o600, owner: tuple[int, int] | None = None) -> None:
    """Replace a file in one step; ``mode`` and ``owner`` as for `AtomicWriter`.

    Raises:
        OSError: that failed; the old file is unchanged.
    """
    writer = AtomicWriter(path, mode=mode, owner=owner)
    try:
        writer.write(data)
        writer.commit()
    finally:
        writer.discard()  # does nothing after commit


class AtomicWriter:
    """Writes a file under a temporary name of its own; readers of the real name find the old file or the new one.

    Temporary files are locked while they are written. Unlocked ones come from killed writers and are removed.
    """

    def __init__(self, path: str, *, mode: int = 0o600, owner: tuple[int, int] | None = None) -> None:
        """``mode`` are the permissions of the file; ``owner`` (uid, gid) is set if this user may change it."""
        self._path = path
        try:
            _remove_leftovers(path)
            descriptor, self._partial = _locked_temporary(path)
        except OSError as error:
            error.filename = path  # the temporary name means nothing to an operator
            raise
        self._file = os.fdopen(descriptor, "wb")
        try:
            if owner is not None:
                with contextlib.suppress(PermissionError):
                    os.fchown(descriptor, *owner)
            os.fchmod(descriptor, mode)
        except BaseException:
            self.discard()
            raise

    def write(self, data: bytes) -> None:
        """Append data."""
        self._file.write(data)

    def commit(self) -> None:
        """Sync the file to disk and put it in place.

        Raises:
            OSError: that failed, and the new file was discarded.
        """
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            os.rename(self._partial, self._path)
        except BaseException:
            self.discard()
            raise
        self._file.close()  # releases the lock, which protected the temporary name until now
        with contextlib.suppress(OSError):  # the file is in place, even if this user may not read the folder
            folder = os.open(os.path.dirname(self._path) or ".", os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def discard(self) -> None:
        """Remove the temporary file and leave the old file unchanged."""
        with contextlib.suppress(OSError):  # on a full disk closing fails as writing did
            self._file.close()
        with contextlib.suppress(OSError):
            os.unlink(self._partial)
