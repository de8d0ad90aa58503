"""The saved writes: one file each, in a folder that only this user can enter.

The files are numbered, and the number of a write is not reused while the folder is in use. ``replaced`` in a file is
the output of `consul kv export` for these keys before the write, ``written`` the output after it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
from collections.abc import Iterator

import msgspec

from table_consul.errors import UNDECODABLE, TableConsulError, printable, problem_of
from table_consul.files import open_regular_file, replace_file

# The newest writes are kept; the last one always, whatever its size.
KEPT = 100
KEPT_BYTES = 64 << 20
_NAME = re.compile(r"(\d{6,18})\.json")
_HINT = "use --undo-dir, or --no-undo to write without saving"


class Entry(msgspec.Struct):
    """An entry as `consul kv export` writes it."""

    key: str
    flags: int
    value: bytes


class Write(msgspec.Struct):
    """One write: when, by whom, and of which keys. A key in only one of the lists was added or removed."""

    time: str
    user: str
    command: str
    table: str
    service: str
    path: str
    replaced: list[Entry]
    written: list[Entry]


_DECODER = msgspec.json.Decoder(Write)


def save(folder: str, write: Write) -> int:
    """Save a write, remove the oldest beyond the limits, and return its number.

    Raises:
        TableConsulError: the write cannot be saved.
    """
    if folder.startswith("~"):  # os.path.expanduser without HOME, for a user whom passwd(5) lacks
        raise TableConsulError(f"{printable(folder)}: the home folder is unknown; nothing was written", _HINT)
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        with _locked(folder):
            saved = numbers(folder)
            number = max(saved, default=0) + 1
            data = msgspec.json.encode(write)
            replace_file(_path(folder, number), data)
            _remove_oldest(folder, saved, len(data))
    except OSError as error:
        raise TableConsulError(f"{printable(folder)}: {problem_of(error)}; nothing was written", _HINT) from None
    return number


def discard(folder: str, number: int) -> None:
    """Remove a write that changed nothing, so that undo does not take it for the newest."""
    with contextlib.suppress(OSError):
        os.unlink(_path(folder, number))


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[int]:
    """The descriptor of the folder; other writers wait. It must belong to this user, because undo trusts its files."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise TableConsulError(f"{printable(folder)}: must belong to this user, with mode 0700", _HINT)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _remove_oldest(folder: str, saved: list[int], size: int) -> None:
    for rank, number in enumerate(saved, 1):
        with contextlib.suppress(OSError):
            size += os.stat(_path(folder, number)).st_size
            if rank >= KEPT or size > KEPT_BYTES:
                os.unlink(_path(folder, number))


def numbers(folder: str) -> list[int]:
    """The numbers of the writes in a folder, the newest first; none if it does not exist."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted((int(found[1]) for found in map(_NAME.fullmatch, names) if found), reverse=True)


def load(folder: str, number: int) -> Write:
    """The write with this number.

    Raises:
        TableConsulError: there is none, or it cannot be read.
    """
    path = _path(folder, number)
    try:
        # Another user may own the folder above, and exchange this one after the check of its owner.
        with _locked(folder) as descriptor:
            opener = functools.partial(open_regular_file, folder=descriptor)
            with open(os.path.basename(path), "rb", opener=opener) as file:
                return _DECODER.decode(file.read())
    except FileNotFoundError:
        raise TableConsulError(f"{printable(folder)}: no write {number}", "run undo --list") from None
    except OSError as error:
        raise TableConsulError(f"{printable(path)}: {problem_of(error)}") from None
    except UNDECODABLE as error:
        raise TableConsulError(f"{printable(path)}: damaged: {error}") from None


def _path(folder: str, number: int) -> str:
    return os.path.join(folder, f"{number:06}.json")
