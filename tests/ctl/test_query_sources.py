"""The source of `table-consulctl query`: Consul, or the snapshot of a daemon."""

from __future__ import annotations

import json
import os
import time

import pytest

from tests.control import at_terminal, control
from tests.ctl.queries import STORE, query, traced
from tests.dialogue import Child, eventually
from tests.fake_consul import VERSIONS, FakeConsul


@pytest.fixture(params=VERSIONS)
def fake(request):
    with FakeConsul(version=request.param) as fake:
        for key, value in STORE.items():
            fake.put(key, value)
        yield fake


@pytest.fixture
def live(tmp_path, fake):
    """Writes a configuration that reads the fake Consul."""

    def write(*lines, tables=""):
        path = tmp_path / "live.toml"
        defaults = "\n".join(lines)
        path.write_text(f'[consul]\naddress = "{fake.address}"\n[defaults]\nprefix = "mail"\n{defaults}\n{tables}')
        return path

    return write


# ---- Consul ----


def test_trace_names_the_index_of_consul(live, fake):
    conf = live()
    assert query(conf, "alias", "root") == (0, b"gilles\n", b"")
    assert traced(conf, "alias", "root")[0] == f"source Consul at {fake.address}, index {fake.index}"


def test_direct_mode_reads_only_the_key(live, fake):
    conf = live('mode = "direct"')
    assert traced(conf, "alias", "root") == [
        f"source Consul at {fake.address}, read directly",
        "read mail/aliases/alias/root",
        "entry mail/aliases/alias/root",
        "value trailing white space is dropped",
    ]
    assert [request.key for request in fake.requests] == [b"mail/aliases/alias/root"]
    # The answer of the daemon: direct mode does not find an upper-case key.
    assert query(conf, "alias", "Staff").status == 1
    if fake.version == "1.21.5":  # which rejects the name of the key *
        assert "rejects the name of this key" in query(conf, "userinfo", "eric").said
        return
    assert traced(conf, "userinfo", "eric")[1:4] == [
        "read mail/aliases/userinfo/eric",
        "read mail/aliases/userinfo/*",
        "entry mail/aliases/userinfo/*, the default for users without an entry",
    ]
    assert traced(conf, "domain", "a.example.org")[1] == "read mail/aliases/domain/ (1 entry)"


def test_table_above_max_keys_is_read_directly(live, fake):
    conf = live("max_keys = 3")
    assert traced(conf, "alias", "root")[:2] == [
        f"source Consul at {fake.address}, read directly (more than max_keys = 3)",
        "read mail/aliases/alias/root",
    ]
    assert query(conf, "alias", "Staff").out  # stored in upper case, which a mirror finds too


def test_unreachable_consul_delays_many_keys_as_long_as_one(live, fake):
    conf = live("deadline = 0.5")
    fake.stop()
    begun = time.monotonic()
    done = query(conf, "alias", "-", stdin=b"root\n" * 200)
    assert (done.status, len(done.said.splitlines())) == (2, 200)
    assert time.monotonic() - begun < 5


def test_token_without_read_permission_is_an_error_and_not_printed(live, fake):
    fake.token = "right"
    done = control("-c", live(), "query", "aliases", "alias", "root", CONSUL_HTTP_TOKEN="5ecret-t0ken")
    assert (done.status, "rejects the token" in done.said, "5ecret" in done.said) == (2, True, False)
    assert control("-c", live(), "query", "aliases", "alias", "root", CONSUL_HTTP_TOKEN="right").status == 0


def test_folder_hidden_by_acls_is_an_error_not_a_missing_key(live, fake):
    fake.denied = (b"mail/aliases/alias/",)
    assert [query(live(), service, "x").status for service in ("alias", "domain")] == [2, 1]


# ---- the snapshot ----


@pytest.fixture
def snapshot_conf(live, tmp_path):
    """A configuration with a snapshot that a daemon has written."""
    conf = live(f'snapshot = "{tmp_path}/{{table}}.json"')
    copy = tmp_path / "aliases.json"
    with Child(str(conf)) as child:
        child.handshake()
        for _ in eventually("the daemon has written its snapshot"):
            if copy.exists():
                break
    return conf


def test_snapshot_is_read_by_default_and_consul_with_live(snapshot_conf, fake, tmp_path):
    fake.put(b"mail/aliases/alias/root", b"eric")
    asked = len(fake.requests)
    assert query(snapshot_conf, "alias", "root").text == "gilles\n"
    assert len(fake.requests) == asked
    assert query(snapshot_conf, "alias", "root", "--live").text == "eric\n"
    os.utime(tmp_path / "aliases.json", times=(time.time() - 10 * 86400, time.time() - 10 * 86400))
    assert query(snapshot_conf, "alias", "root").text == "gilles\n", (
        "an old snapshot is valid: the daemon writes it only when data change"
    )
    assert traced(snapshot_conf, "alias", "root")[0] == f"source {tmp_path}/aliases.json, written 10 d ago"
    assert traced(snapshot_conf, "alias", "root", "--live")[0].startswith("source Consul at ")


def test_snapshot_is_named_on_a_terminal(snapshot_conf, tmp_path):
    status, shown = at_terminal("-c", snapshot_conf, "query", "aliases", "alias", "root", "nobody")
    assert status == 1
    *_, last = shown.splitlines()
    assert last.startswith(f"read from {tmp_path}/aliases.json, written ")
    assert last.endswith(" ago (use --live to read Consul)")
    _, shown = at_terminal("-c", snapshot_conf, "query", "aliases", "alias", "root", "--live")
    assert "read from" not in shown
    assert query(snapshot_conf, "alias", "root").said == ""


def test_snapshot_is_never_written(snapshot_conf, fake, tmp_path):
    before = (tmp_path / "aliases.json").stat()
    fake.put(b"mail/aliases/alias/root", b"eric")
    for more in ([], ["--live"]):
        query(snapshot_conf, "alias", "root", *more)
    after = (tmp_path / "aliases.json").stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    assert sorted(path.name for path in tmp_path.glob("*.json*")) == ["aliases.json"]


def test_missing_snapshot_makes_query_read_consul(snapshot_conf, tmp_path):
    (tmp_path / "aliases.json").unlink()
    assert query(snapshot_conf, "alias", "root").text == "gilles\n"


@pytest.mark.parametrize("content", [b"[{", b"", b"\x00" * 100, b'{"a": 1}'])
def test_damaged_snapshot_file_is_an_error_that_names_live(snapshot_conf, tmp_path, content):
    (tmp_path / "aliases.json").write_bytes(content)
    done = query(snapshot_conf, "alias", "root")
    assert (done.status, "use --live to read Consul" in done.said) == (2, True)
    assert query(snapshot_conf, "alias", "root", "--live").status == 0


def test_snapshot_that_is_a_pipe_does_not_block(snapshot_conf, tmp_path):
    (tmp_path / "aliases.json").unlink()
    os.mkfifo(tmp_path / "aliases.json")
    assert query(snapshot_conf, "alias", "root").status == 2


def test_snapshot_file_that_cannot_be_opened_is_an_error_that_names_live(snapshot_conf, tmp_path):
    (tmp_path / "aliases.json").unlink()
    (tmp_path / "aliases.json").symlink_to("aliases.json")  # open(2) fails even for root
    done = query(snapshot_conf, "alias", "root")
    assert (done.status, "symbolic links (use --live to read Consul)" in done.said) == (2, True)
    assert query(snapshot_conf, "alias", "root", "--live").status == 0


def test_service_missing_from_the_snapshot_is_an_error(snapshot_conf, tmp_path):
    copy = tmp_path / "aliases.json"
    entries = [entry for entry in json.loads(copy.read_text()) if "/domain/" not in entry["key"]]
    copy.write_text(json.dumps(entries))
    done = query(snapshot_conf, "domain", "elsewhere.example")
    assert (done.status, "is not in the snapshot" in done.said) == (2, True)
    assert query(snapshot_conf, "alias", "root").status == 0


def test_snapshot_of_another_table_is_ignored(snapshot_conf, tmp_path):
    (tmp_path / "aliases.json").write_text('[{"key": "other/alias/root", "flags": 0, "value": ""}]')
    assert query(snapshot_conf, "alias", "root").text == "gilles\n"


def test_each_folder_of_paths_has_its_own_snapshot(live, fake, tmp_path):
    fake.put(b"people/root", b"vera")
    conf = live(f'snapshot = "{tmp_path}/{{table}}.json"', 'paths = { alias = "people" }')
    with Child(str(conf)) as child:
        child.handshake()
        for _ in eventually("the daemon has written its snapshots"):
            if len([*tmp_path.glob("aliases.json*")]) == 2 and not [*tmp_path.glob("*.tmp")]:
                break
    fake.stop()
    assert query(conf, "alias", "root").text == "vera\n"
    assert query(conf, "source", "--op", "fetch").text == "192.0.2.1\n"
