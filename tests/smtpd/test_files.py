"""Atomic replacement of files, with leftovers and faults."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from contextlib import contextmanager

import pytest

from table_consul.files import AtomicWriter

KILLED = """
import os, signal, sys
from table_consul.files import AtomicWriter
writer = AtomicWriter(sys.argv[1])
writer.write(b"half")
os.kill(os.getpid(), signal.SIGKILL)
"""


def replace(path, data=b"new"):
    writer = AtomicWriter(str(path))
    writer.write(data)
    writer.commit()


def kill_a_writer(path):
    status = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False).returncode
    assert status == -9


@contextmanager
def largest_file(size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_file_of_a_killed_writer_is_removed_by_the_next(tmp_path):
    for _ in range(3):
        kill_a_writer(tmp_path / "copy")
    assert len(os.listdir(tmp_path)) == 1
    replace(tmp_path / "copy")
    assert os.listdir(tmp_path) == ["copy"]


def test_file_of_a_killed_writer_of_another_path_is_left_alone(tmp_path):
    kill_a_writer(tmp_path / "copy.1")
    replace(tmp_path / "copy")
    assert len(os.listdir(tmp_path)) == 2


def test_file_of_a_live_writer_is_left_alone(tmp_path):
    first = AtomicWriter(str(tmp_path / "copy"))
    first.write(b"first")
    replace(tmp_path / "copy", b"second")
    assert (tmp_path / "copy").read_bytes() == b"second"
    first.commit()
    assert ((tmp_path / "copy").read_bytes(), os.listdir(tmp_path)) == (b"first", ["copy"])


def test_pipe_and_link_with_the_name_of_a_leftover_do_not_block_and_are_left_alone(tmp_path):
    kill_a_writer(tmp_path / "copy")
    (leftover,) = os.listdir(tmp_path)
    random = leftover.split(".")[1]
    os.rename(tmp_path / leftover, tmp_path / "precious")
    os.mkfifo(tmp_path / leftover)
    (tmp_path / leftover.replace(random, "a" * 8)).symlink_to("precious")
    before = {*os.listdir(tmp_path)}
    replace(tmp_path / "copy")
    assert {*os.listdir(tmp_path)} == before | {"copy"}
    assert (tmp_path / "precious").read_bytes() in (b"", b"half")


def test_leftover_of_another_user_is_left_alone(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("files of another user need root: sudo make test")
    kill_a_writer(tmp_path / "copy")
    (leftover,) = os.listdir(tmp_path)
    os.chown(tmp_path / leftover, 65534, 65534)
    replace(tmp_path / "copy")
    assert {*os.listdir(tmp_path)} == {"copy", leftover}


def test_link_at_the_path_is_replaced_and_its_target_left_alone(tmp_path):
    (tmp_path / "other").write_bytes(b"other")
    (tmp_path / "symbolic").symlink_to("other")
    (tmp_path / "hard").hardlink_to(tmp_path / "other")
    for name in ("symbolic", "hard"):
        replace(tmp_path / name)
        assert ((tmp_path / name).read_bytes(), (tmp_path / name).is_symlink()) == (b"new", False)
    assert (tmp_path / "other").read_bytes() == b"other"


def test_folder_at_the_path_is_an_error_and_leaves_nothing(tmp_path):
    (tmp_path / "copy").mkdir()
    for _ in range(3):
        with pytest.raises(IsADirectoryError):
            replace(tmp_path / "copy")
    assert os.listdir(tmp_path) == ["copy"]


def test_full_disk_leaves_the_old_file_and_no_descriptor(tmp_path):
    replace(tmp_path / "copy", b"old")
    before = len(os.listdir("/proc/self/fd"))
    with largest_file(100_000):
        for _ in range(3):
            writer = AtomicWriter(str(tmp_path / "copy"))
            with pytest.raises(OSError, match="too large"):
                writer.write(b"x" * 400_000)  # more than the limit and the buffer, of 128 KiB with Python 3.14
            writer.discard()
    assert ((tmp_path / "copy").read_bytes(), os.listdir(tmp_path)) == (b"old", ["copy"])
    assert len(os.listdir("/proc/self/fd")) == before


def test_folder_that_is_removed_while_writing_is_an_error(tmp_path):
    (tmp_path / "folder").mkdir()
    writer = AtomicWriter(str(tmp_path / "folder" / "copy"))
    writer.write(b"new")
    for name in os.listdir(tmp_path / "folder"):
        (tmp_path / "folder" / name).unlink()
    (tmp_path / "folder").rmdir()
    with pytest.raises(FileNotFoundError):
        writer.commit()


def test_file_is_replaced_in_a_writable_unreadable_folder(open_folder):
    if os.geteuid() != 0:
        pytest.skip("files that another user cannot read need root: sudo make test")
    open_folder.chmod(0o733)
    code = (
        "import os, sys, tempfile; from table_consul.files import AtomicWriter; os.setgroups([]); os.setuid(65534)\n"
        "writer = AtomicWriter(sys.argv[1]); writer.commit()"
    )
    subprocess.run([sys.executable, "-c", code, str(open_folder / "copy")], check=True)
    assert os.listdir(open_folder) == ["copy"]
