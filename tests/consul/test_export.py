from __future__ import annotations

import contextlib
import io
import json
import logging
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from table_consul.errors import SourceError
from table_consul.files import AtomicWriter, read_bounded
from table_consul.services import SERVICES, Table
from table_consul.sources import export
from table_consul.sources.export import Exported, FileSource, export_entry, iter_export
from tests.dialogue import write_source

TABLE = Table("aliases")
BROKEN = [
    "",
    "{",
    "{}",
    "[1]",
    '[{"value": ""}]',
    '[{"key": 1}]',
    '[{"key": "a", "value": "!"}]',
    "[" * 100_000,
    "\xff",
]


@pytest.fixture
def folder(tmp_path):
    write_source(tmp_path, {"aliases/alias/root": b"gilles"})
    return tmp_path


@pytest.fixture
def source(folder):
    return FileSource(str(folder / "export.json"))


def read_export(data):
    return [*iter_export(io.BytesIO(data))]


def bucket(source, service="alias", table=TABLE):
    return source.entries(table, SERVICES[service], b"root", 0.0)


def lines(caplog):
    return [record.getMessage() for record in caplog.records]


def damage(folder, text="{"):
    (folder / "export.json").write_text(text, "latin-1")


def test_export_is_read_in_its_order():
    data = b'[{"key":"b/","flags":0,"value":""},{"key":"a","flags":18446744073709551615,"value":"Z2lsbGVz"}]'
    assert read_export(data) == [(b"b/", b"", 0), (b"a", b"gilles", 18446744073709551615)]


def test_null_values_and_unknown_fields_are_read():
    data = b'[{"key":"a","flags":0,"value":null,"namespace":"default","partition":"default"}]'
    assert read_export(data) == [(b"a", b"", 0)]


@pytest.mark.parametrize("text", BROKEN)
def test_invalid_export_is_refused(text):
    with pytest.raises(SourceError, match="not the output of `consul kv export`"):
        read_export(text.encode("latin-1"))


@given(st.binary() | st.recursive(st.none() | st.text(), st.lists).map(lambda v: json.dumps(v).encode()))
def test_any_bytes_are_an_export_or_a_source_error(data):
    with contextlib.suppress(SourceError):
        read_export(data)


def test_folder_holds_the_keys_below_its_path(folder, source):
    write_source(folder, {"aliases/alias/root": b"gilles", "aliases/aliases/root": b"no", "aliases/alias": b"no"})
    assert bucket(source).values == {b"root": b"gilles"}


def test_unchanged_file_is_not_read_again(source):
    assert bucket(source) is bucket(source)


def test_changed_file_is_used_immediately(folder, source):
    bucket(source)
    write_source(folder, {"aliases/alias/root": b"eric, marie"})
    assert bucket(source).lookup(b"root") == b"eric, marie"


def test_tables_and_services_have_separate_folders(folder, source):
    write_source(
        folder, {"aliases/alias/root": b"gilles", "others/alias/root": b"eric", "aliases/string/root": b"marie"}
    )
    assert [
        bucket(source, *which).lookup(b"root") for which in (("alias",), ("alias", Table("others")), ("string",))
    ] == [b"gilles", b"eric", b"marie"]


def test_changed_layout_of_a_table_is_read_anew(source):
    allowed = replace(TABLE, paths={"alias": "elsewhere"})
    assert (bucket(source).lookup(b"root"), bucket(source, table=allowed).lookup(b"root")) == (b"gilles", None)


@pytest.mark.parametrize("text", BROKEN)
def test_invalid_file_is_an_error_with_its_name(folder, source, text):
    damage(folder, text)
    with pytest.raises(SourceError, match=r"export\.json: not the output"):
        bucket(source)


def test_missing_file_is_an_error_until_it_exists(tmp_path):
    source = FileSource(str(tmp_path / "export.json"))
    with pytest.raises(SourceError, match=r"export\.json: No such file or directory"):
        bucket(source)
    write_source(tmp_path, {"aliases/alias/root": b"gilles"})
    assert bucket(source).lookup(b"root") == b"gilles"


def test_folder_is_an_error(tmp_path):
    with pytest.raises(SourceError, match="Is a directory"):
        bucket(FileSource(str(tmp_path)))


@pytest.mark.timeout(10)
def test_named_pipe_is_an_error_and_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match=r"pipe: "):
        bucket(FileSource(str(tmp_path / "pipe")))


@pytest.mark.timeout(10)
def test_device_is_an_error_and_is_not_read():
    with pytest.raises(SourceError, match="/dev/zero: a device, not a file"):
        bucket(FileSource("/dev/zero"))


def test_oversized_file_is_an_error_in_bounded_memory(folder, source):
    os.truncate(folder / "export.json", 1 << 33)
    with pytest.raises(SourceError, match=r"export.json: not the output of .*: an entry of more than 8 MiB"):
        bucket(source)


def test_file_is_read_whole_in_pieces_of_any_size(monkeypatch):
    monkeypatch.setattr(export, "STEP_BYTES", 7)
    entries = [Exported(b'aliases/alias/},{"key%d' % number, b"x" * number, number) for number in range(50)]
    data = b"[\n" + b",\n".join(export_entry(*each) for each in entries) + b"\n]\n"
    assert read_export(data) == entries
    with pytest.raises(SourceError, match=r"consul kv export`: .*, after 49 entries$"):
        read_export(data[:-3])


def test_read_bounded_reads_up_to_its_limit():
    assert read_bounded(io.BytesIO(b"x" * 8), 8) == b"x" * 8
    with pytest.raises(SourceError):
        read_bounded(io.BytesIO(b"x" * 9), 8)


def test_bad_version_leaves_the_last_good_one_in_use(folder, source):
    bucket(source)
    damage(folder)
    assert bucket(source).lookup(b"root") == b"gilles"


def test_bad_version_is_logged_once_and_again_after_a_good_one(folder, source, caplog):
    caplog.set_level(logging.DEBUG)
    for _ in range(2):
        write_source(folder, {"aliases/alias/root": b"gilles"})
        bucket(source)
        damage(folder)
        for _ in range(3):
            bucket(source)
    warnings = [line for line in lines(caplog) if "serving its last good version" in line]
    assert len(warnings) == 2


def test_return_to_a_good_version_is_logged(folder, source, caplog):
    caplog.set_level(logging.DEBUG)
    bucket(source)
    damage(folder)
    bucket(source)
    write_source(folder, {"aliases/alias/root": b"gilles"})
    bucket(source)
    bucket(source)
    assert [f"{folder}/export.json: readable again"] == lines(caplog)[1:]


def test_problems_of_entries_are_logged_once_a_version(folder, source, caplog):
    write_source(folder, {"aliases/alias/bad": b"|sh"})
    bucket(source)
    bucket(source)
    assert [line.partition(":")[0] for line in lines(caplog)] == ["aliases/alias/bad"]


def test_update_reads_an_unchanged_file_again(source):
    first = bucket(source)
    source.update()
    assert first is not bucket(source)


def test_update_with_a_bad_file_fails_and_keeps_the_last_good_version(folder, source):
    bucket(source)
    damage(folder)
    with pytest.raises(SourceError, match="not the output"):
        source.update()
    assert bucket(source).lookup(b"root") == b"gilles"


def test_repeated_reads_of_a_broken_file_leak_no_memory(folder, source):
    damage(folder)
    depth = 0
    for _ in range(50):
        with pytest.raises(SourceError) as caught:
            bucket(source)
        depth = len(caught.traceback)
    assert depth < 10


def test_broken_file_is_parsed_once_a_version(folder, source, monkeypatch):
    parsed = []
    monkeypatch.setattr(export, "iter_export", lambda file: (parsed.append(file), iter_export(file))[1])
    damage(folder)
    for _ in range(20):
        with pytest.raises(SourceError):
            bucket(source)
    assert len(parsed) == 1
    damage(folder, "{}")
    with pytest.raises(SourceError):
        bucket(source)
    assert len(parsed) == 2


# ---- writing ----


@given(st.lists(st.tuples(st.text(min_size=1), st.binary(), st.integers(0, 2**64 - 1))))
def test_written_entries_are_read_back(entries):
    entries = [(key.encode(), value, flags) for key, value, flags in entries]
    assert read_export(b"[" + b",".join(export_entry(*entry) for entry in entries) + b"]") == entries


def test_two_writers_of_one_file_do_not_conflict(tmp_path):
    path = tmp_path / "file"
    first, second = AtomicWriter(str(path)), AtomicWriter(str(path))
    first.write(b"first")
    second.write(b"second")
    second.commit()
    assert path.read_bytes() == b"second"
    first.commit()
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


def test_writer_sets_the_requested_mode(tmp_path):
    for mode in (0o600, 0o644):
        writer = AtomicWriter(str(tmp_path / "file"), mode=mode, owner=(os.geteuid(), os.getegid()))
        writer.commit()
        assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_discarded_writer_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    writer = AtomicWriter(str(tmp_path / "file"))
    writer.write(b"new")
    writer.discard()
    assert ((tmp_path / "file").read_bytes(), os.listdir(tmp_path)) == (b"old", ["file"])


def test_writer_that_may_not_set_the_mode_leaves_no_descriptor_and_no_file(tmp_path, monkeypatch):
    def refused(*_arguments):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchmod", refused)
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with pytest.raises(PermissionError):
            AtomicWriter(str(tmp_path / "file"))
    assert (len(os.listdir("/proc/self/fd")), os.listdir(tmp_path)) == (len(before), [])


def test_writer_in_a_missing_folder_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        AtomicWriter(str(tmp_path / "none" / "file"))
    assert caught.value.filename == str(tmp_path / "none" / "file")
