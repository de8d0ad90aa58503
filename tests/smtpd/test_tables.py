from __future__ import annotations

import gc
import socket
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import pytest

from table_consul import tables
from table_consul.config import Config, ConsulConfig
from table_consul.errors import ConfigError, Forbidden, SourceError
from table_consul.protocol import Found, NotFound, Request
from table_consul.services import DEFAULT_SERVICES, SERVICES, Table
from table_consul.services.entries import Entries
from table_consul.sources import direct, watch
from table_consul.sources.mirror import Hidden, Mirror, Snapshot
from table_consul.tables import MAX_MIRRORED_TABLES, MAX_NAMES, Tables
from tests.dialogue import eventually, open_tables, write_config, write_source

ALIAS = SERVICES["alias"]


class Loader:
    """A configuration that a test replaces, or makes fail."""

    def __init__(self, config):
        self.config = config

    def __call__(self):
        if isinstance(self.config, Exception):
            raise self.config
        return self.config


@pytest.fixture
def unused():
    """The address of a port that refuses connections."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture
def opened(tmp_path):
    """Opens tables with these lines in `[defaults]`, and closes them after the test."""
    made = []

    def open_them(*defaults, **options):
        made.append(open_tables(write_config(tmp_path, *defaults, **options)))
        return made[-1]

    yield open_them
    for each in made:
        each.close()


def lookup(found, name, key=b"root", deadline=1e9):
    return found.entries(found.table(name), ALIAS, key, deadline).lookup(key)


# ---- tables ----


def test_section_determines_the_layout_of_its_table(opened):
    found = opened('prefix = "mail"', more='[tables.people]\nprefix = "hr"')
    assert (found.table("aliases").root, found.table("people").root) == (b"mail/aliases/", b"hr/people/")


def test_empty_name_is_the_configured_default(opened):
    assert (opened().table("").name, opened('table = "people"').table("").name) == ("consul", "people")


@pytest.mark.parametrize("name", ["..", ".", "a/b", "a\nb", "a\0b"])
def test_table_name_that_leaves_its_folder_is_refused(opened, name):
    with pytest.raises(ConfigError, match="invalid table name "):
        opened().table(name)


def test_unlimited_table_names_take_bounded_memory(opened):
    found = opened()
    for number in range(2 * MAX_NAMES):
        assert f"t{number}" == found.table(f"t{number}").name
    remembered = [found.table(name) is found.table(name) for name in ("t0", f"t{2 * MAX_NAMES - 1}")]
    assert remembered == [True, False]


def test_table_registers_the_services_of_its_section(opened):
    found = opened('services = ["alias", "domain"]', more='[tables.people]\nservices = ["credentials"]')
    assert (found.services("aliases"), found.services("people")) == (["alias", "domain"], ["credentials"])


def test_invalid_table_name_registers_the_default_services(opened):
    assert [*DEFAULT_SERVICES] == opened().services("..")


def test_reply_word_is_that_of_the_table_or_of_the_defaults(opened):
    found = opened('procexec_reply = "table-result"', more='[tables.old]\nprocexec_reply = "table-response"')
    words = [found.procexec_reply(name) for name in ("any", "old", "..")]
    assert words == ["table-result", "table-response", "table-result"]


# ---- a configuration that cannot be used ----


def test_bad_configuration_is_the_reason_in_every_reply():
    found = Tables(Loader(ConfigError("FILE: key: no")))
    assert ([*DEFAULT_SERVICES], "auto") == (found.services("t"), found.procexec_reply("t"))
    found.warm_up("t")
    with pytest.raises(ConfigError, match="FILE: key: no"):
        found.table("t")


def test_repeated_errors_of_a_bad_configuration_leak_no_memory():
    found = Tables(Loader(ConfigError("FILE: key: no")))
    depth = 0
    for _ in range(50):
        with pytest.raises(ConfigError) as caught:
            found.table("t")
        depth = len(caught.traceback)
    assert depth < 10


@pytest.mark.parametrize("hidden", [False, True])
def test_repeated_errors_of_a_mirror_do_not_grow_the_traceback(hidden):
    mirror = Mirror(60.0)
    if hidden:
        no_entries = {"alias": Entries(Table("t"), ALIAS)}
        mirror.state = (Snapshot(no_entries, {"alias": Hidden(Forbidden("hidden"), {})}), 0.0)
    depth = 0
    for _ in range(50):
        with pytest.raises(SourceError) as caught:
            mirror.entries("alias", None, 0.0)
        depth = len(caught.traceback)
    assert depth < 10


def test_update_recovers_when_the_configuration_is_fixed(tmp_path):
    loader = Loader(ConfigError("FILE: key: no"))
    found = Tables(loader)
    loader.config = Config(path=None, consul=ConsulConfig(addresses=(f"file://{write_source(tmp_path)}",)))
    found.update()
    assert (found.broken, lookup(found, "aliases")) == (None, b"gilles")


def test_update_with_a_bad_configuration_changes_nothing(tmp_path):
    loader = Loader(Config(path=None, consul=ConsulConfig(addresses=(f"file://{write_source(tmp_path)}",))))
    found = Tables(loader)
    before = lookup(found, "aliases")
    loader.config = ConfigError("FILE: key: no")
    with pytest.raises(ConfigError, match="FILE: key: no"):
        found.update()
    assert (before, lookup(found, "aliases")) == (b"gilles", b"gilles")


def test_update_applies_changed_permissions(tmp_path):
    file = ConsulConfig(addresses=(f"file://{write_source(tmp_path)}",))
    loader = Loader(Config(path=None, consul=file, defaults=Table("consul", allow_commands=True)))
    found = Tables(loader)
    before = lookup(found, "aliases", b"command")
    loader.config = Config(path=None, consul=file)
    found.update()
    with pytest.raises(Exception, match="set allow_commands = true"):
        lookup(found, "aliases", b"command")
    assert before == b"|/bin/sh"


def test_update_during_a_call_of_table_is_not_undone(tmp_path):
    """The thread of the metrics may read the layout while smtpd updates the table."""
    interruptions = []

    class Interrupted(Config):
        def table(self, name):
            found = super().table(name)
            while interruptions:
                interruptions.pop()()
            return found

    file = ConsulConfig(addresses=(f"file://{write_source(tmp_path)}",))
    loader = Loader(Interrupted(path=None, consul=file, defaults=Table("consul", allow_commands=True)))
    found = Tables(loader)
    loader.config = Config(path=None, consul=file)
    interruptions.append(found.update)
    assert found.table("aliases").allow_commands
    assert interruptions == []
    assert not found.table("aliases").allow_commands
    with pytest.raises(Exception, match="set allow_commands = true"):
        lookup(found, "aliases", b"command")


def test_update_reports_an_error_of_the_source(opened, tmp_path):
    found = opened()
    lookup(found, "aliases")
    (tmp_path / "export.json").write_text("{")
    with pytest.raises(SourceError, match="not the output"):
        found.update()
    assert lookup(found, "aliases") == b"gilles"


def test_expressions_use_the_remaining_time_and_exact_keys_are_always_answered(opened, tmp_path):
    pytest.importorskip("re2", reason="needs google-re2: pip install 'table-consul[regex]'")
    found = opened()
    write_source(tmp_path, {"aliases/regex/^a": b"", "aliases/domain/example.org": b"", "aliases/domain/*.net": b""})
    for service, key in (("regex", b"abc"), ("domain", b"example.org"), ("domain", b"a.net"), ("regex", b"b")):
        request = Request("check", b"1", "aliases", service, key)
        on_time, late = (found.answer(request, time.monotonic() - late) for late in (0.0, 2.0))
        assert isinstance(on_time, NotFound if key == b"b" else Found)
        if service == "domain":
            assert late == on_time
        else:
            assert late.reason == "aliases/regex/: too little time left before the deadline to match the patterns"


# ---- which source ----


def test_file_address_answers_from_that_file(opened):
    assert lookup(opened(), "aliases") == b"gilles"


def test_direct_mode_reads_consul_and_mirror_mode_mirrors_it(opened, unused):
    found = opened(more='[tables.large]\nmode = "direct"', address=unused)
    kinds = [type(found.source(found.table(name), ALIAS)) for name in ("aliases", "large")]
    assert [watch.MirrorSource, direct.DirectSource] == kinds


def test_source_is_made_once(opened, unused):
    found = opened(more='[tables.large]\nmode = "direct"', address=unused)
    assert all(
        found.source(found.table(name), ALIAS) is found.source(found.table(name), ALIAS) for name in ("a", "large")
    )


def test_warm_up_opens_the_source_that_answers(opened, unused):
    found = opened(address=unused)
    found.warm_up("aliases")
    assert {"aliases"} == {name for name, _ in found.watches()}


def test_table_too_large_to_mirror_is_read_directly(opened, unused):
    found = opened(address=unused)
    mirrored = found.source(found.table("aliases"), ALIAS)
    mirrored.by_service["alias"] = SimpleNamespace(too_large=True)
    kinds = [type(found.source(found.table("aliases"), SERVICES[name])) for name in ("alias", "domain")]
    assert [direct.DirectSource, watch.MirrorSource] == kinds


def test_tables_beyond_the_limit_of_mirrors_are_read_directly(opened, unused, monkeypatch):
    monkeypatch.setattr(tables, "MAX_MIRRORED_TABLES", 2)
    found = opened(address=unused)
    kinds = [type(found.source(found.table(name), ALIAS)) for name in ("a", "b", "c", "a")]
    assert [watch.MirrorSource, watch.MirrorSource, direct.DirectSource, watch.MirrorSource] == kinds
    assert 0 < MAX_MIRRORED_TABLES < 200


def test_changed_configuration_closes_former_connections(opened, unused, monkeypatch, tmp_path):
    closed = []
    monkeypatch.setattr(direct.DirectSource, "close", lambda self: closed.append(self))  # noqa: PLW0108 - to be bound
    found = opened('mode = "direct"', address=unused)
    former = found.source(found.table("t"), ALIAS)
    write_config(tmp_path, 'mode = "direct"', "max_age = 7", address=unused)
    found.update()
    assert closed == [former]


def test_changed_configuration_starts_a_watch_before_a_request(opened, unused, tmp_path):
    found = opened(address=unused)
    found.warm_up("t")
    write_config(tmp_path, "max_age = 7", address=unused)
    found.update()
    assert [name for name, _ in found.watches()] == ["t"]


def test_mirror_whose_threads_cannot_all_start_runs_none_and_keeps_former_data(opened, unused, monkeypatch, tmp_path):
    paths = 'paths = { domain = "shared" }'
    found = opened(paths, address=unused)
    found.warm_up("t")
    table, watches = found.table("t"), [each for _, each in found.watches()]
    entries = {name: Entries(table, SERVICES[name], []) for name in table.folders()[b"t/"]}
    entries["alias"] = Entries(table, ALIAS, [(b"root", b"gilles")])
    watches[0].mirror.state = (Snapshot(entries, {}), time.monotonic())

    def start(thread, real=watch.Watch.start):
        if thread.prefix == b"shared/":
            raise RuntimeError("can't start new thread")
        real(thread)

    with monkeypatch.context() as patched:
        patched.setattr(watch.Watch, "start", start)
        write_config(tmp_path, paths, "deadline = 1", address=unused)
        with pytest.raises(SourceError, match="cannot start another thread"):
            found.update()
        for _ in eventually("no thread of the mirror is left", 10):
            if not any(thread.name.startswith("watch t/") for thread in threading.enumerate()):
                break
    assert lookup(found, "t") == b"gilles"


@pytest.mark.parametrize("to", ["direct", "file"])
def test_entries_of_a_table_that_is_no_longer_mirrored_are_freed(opened, unused, tmp_path, to):
    found = opened(address=unused)
    found.warm_up("t")
    mirrored = weakref.ref(found.source(found.table("t"), ALIAS))
    if to == "file":
        write_config(tmp_path)
    else:
        write_config(tmp_path, 'mode = "direct"', address=unused)
    found.update()
    for _ in eventually("the mirror is freed", 10):
        gc.collect()
        if mirrored() is None:
            break


def test_update_without_a_change_keeps_every_source(opened, unused):
    found = opened(more='[tables.large]\nmode = "direct"', address=unused)
    made = [found.source(found.table(name), ALIAS) for name in ("a", "large")]
    found.update()
    assert made == [found.source(found.table(name), ALIAS) for name in ("a", "large")]


def test_update_with_a_change_opens_every_source_anew(opened, unused, tmp_path):
    found = opened(address=unused)
    made = found.source(found.table("a"), ALIAS)
    opened("deadline = 1", address=unused)
    found.update()
    assert made is not found.source(found.table("a"), ALIAS)


def test_routes_of_an_older_snapshot_do_not_keep_it_in_memory(opened, unused):
    found = opened(address=unused)
    source = found.source(found.table("t"), ALIAS)
    source.close()
    mirror, alive = source.by_service["alias"].mirror, []
    for number, op in enumerate(("lookup", "check", "lookup")):
        entries = {
            name: Entries(found.table("t"), SERVICES[name], [(b"root", b"%d" % number)]) for name in source.by_service
        }
        mirror.state = (Snapshot(entries, {}), time.monotonic())
        alive.append(weakref.ref(entries["alias"]))
        del entries
        reply = found.answer(Request(op, b"1", "t", "alias", b"root"), time.monotonic())
        assert reply == (Found(b"%d" % number) if op == "lookup" else Found())
    gc.collect()
    assert [each() is None for each in alive] == [True, True, False]


def test_sources_of_a_file_import_no_client(tmp_path):
    """Tests of smtpd.conf need no Consul and must not wait for its client to load."""
    import subprocess

    code = (
        "import sys; from table_consul.tables import Tables; from table_consul import config;"
        "s = Tables(lambda: config.load(sys.argv[1], {})); s.warm_up('t'); print('table_consul.kv' in sys.modules)"
    )
    run = [sys.executable, "-c", code, str(write_config(tmp_path))]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "False\n"
