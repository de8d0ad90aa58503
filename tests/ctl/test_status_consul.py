"""`table-consulctl status` compares each table with Consul, with and without a running daemon."""

from __future__ import annotations

import json
import threading

import pytest

from table_consul.ctl import status
from tests.ctl.published import FOLLOWING, configured, only_table, publish
from tests.dialogue import Child, eventually
from tests.fake_consul import VERSIONS, FakeConsul


@pytest.fixture(params=VERSIONS)
def fake(request):
    with FakeConsul(version=request.param) as consul:
        consul.put(b"aliases/alias/root", b"gilles")
        yield consul


@pytest.fixture
def short_lag(monkeypatch):
    """Shorten the time that a daemon may lag behind Consul."""
    monkeypatch.setattr(status, "LAG_SECONDS", 0.3)
    monkeypatch.setattr(status, "WRITE_INTERVAL_SECONDS", 0.3)
    monkeypatch.setattr(status, "POLL_SECONDS", 0.02)


# ---- published metrics ----


def test_table_that_lags_behind_consul_is_not_healthy(tmp_path, run_status, fake, short_lag):
    publish(tmp_path, **{**FOLLOWING, "snapshot_index": fake.index - 1})
    outcome = run_status(configured(tmp_path, address=fake.address), "--json")
    (prefix,) = only_table(outcome)["prefixes"]
    assert (outcome[0], prefix["ahead"], prefix["consul_index"]) == (1, True, fake.index)
    _, out, _ = run_status(configured(tmp_path, address=fake.address))
    assert f"{fake.index - 1} (Consul has {fake.index})" in out
    assert "Consul is ahead of this table" in out


def test_table_with_the_index_of_consul_is_healthy(tmp_path, run_status, fake):
    publish(tmp_path, **{**FOLLOWING, "snapshot_index": fake.index})
    outcome = run_status(configured(tmp_path, address=fake.address), "--json")
    assert (outcome[0], only_table(outcome)["prefixes"][0]["ahead"]) == (0, False)


def test_metrics_older_than_an_edit_are_read_again(tmp_path, run_status, fake):
    publish(tmp_path, **{**FOLLOWING, "snapshot_index": fake.index - 1})
    edit = threading.Timer(0.5, lambda: publish(tmp_path, **{**FOLLOWING, "snapshot_index": fake.index}))
    edit.start()
    outcome = run_status(configured(tmp_path, address=fake.address), "--json")
    edit.join()
    assert (outcome[0], only_table(outcome)["prefixes"][0]["ahead"]) == (0, False)


def test_process_that_ends_while_status_waits_is_not_running(tmp_path, run_status, fake, short_lag):
    path = publish(tmp_path, **{**FOLLOWING, "snapshot_index": fake.index - 1})
    end = threading.Timer(0.2, path.unlink)
    end.start()
    outcome = run_status(configured(tmp_path, address=fake.address), "aliases", "--json")
    end.join()
    assert (outcome[0], only_table(outcome)["state"]) == (1, "not running")


def test_offline_does_not_contact_consul(tmp_path, run_status, fake):
    publish(tmp_path, **FOLLOWING)
    outcome = run_status(configured(tmp_path, address=fake.address), "--offline", "--json")
    assert (outcome[0], only_table(outcome)["prefixes"][0]["ahead"], fake.requests) == (0, None, [])


def test_following_table_is_unknown_when_consul_is_unreachable(tmp_path, run_status, fake):
    publish(tmp_path, "aliases", **FOLLOWING)
    publish(tmp_path, "domains", **FOLLOWING)
    fake.stop()
    code, out, _ = run_status(configured(tmp_path, address=fake.address), "--json")
    tables = json.loads(out)["tables"]
    assert (code, [table["healthy"] for table in tables]) == (2, [None, None])
    assert [table["prefixes"][0]["healthy"] for table in tables] == [None, None]
    assert all("cannot compare with Consul" in table["prefixes"][0]["remarks"][-1] for table in tables)


def test_no_token_is_shown(tmp_path, run_status, fake, monkeypatch):
    publish(tmp_path, **FOLLOWING)
    fake.token = "another"
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "hunter2")
    code, out, err = run_status(configured(tmp_path, address=fake.address))
    assert (code, "rejects the token" in out, "hunter2" in out + err) == (2, True, False)


def test_folder_no_longer_configured_is_noted(tmp_path, run_status, fake):
    publish(tmp_path, **{**FOLLOWING, "snapshot_index": fake.index})
    _, out, _ = run_status(configured(tmp_path, 'prefix = "elsewhere"', address=fake.address))
    assert "run smtpctl update table" in " ".join(out.split())


# ---- with the daemon ----


def test_daemon_is_reported_as_following_in_an_outage_and_ended(tmp_path, run_status, fake):
    path = configured(tmp_path, address=fake.address, metrics=f'listen = "unix://{tmp_path}/{{table}}.sock"')

    def state():
        outcome = run_status(path, "--json")
        return only_table(outcome)["state"], outcome[0]

    def becomes(*wanted):
        for _ in eventually(wanted):
            if state() == wanted:
                return

    with Child(path) as child:
        child.handshake()
        becomes("following", 0)
        fake.stop()
        becomes("outage", 1)
        for _ in eventually("a new connection is refused"):  # the open one breaks before
            (prefix,) = only_table(run_status(path, "--json", "--offline"))["prefixes"]
            if "connection refused" in prefix["last_error"]:
                break
        fake.start()
        becomes("following", 0)
        assert child.end() == 0
    assert state() == ("not running", 1)


def test_recent_edit_is_not_reported_as_lag(tmp_path, run_status, fake):
    path = configured(tmp_path, address=fake.address, metrics=f'listen = "unix://{tmp_path}/{{table}}.sock"')
    with Child(path) as child:
        child.handshake()
        for _ in eventually("the table follows Consul"):
            if run_status(path)[0] == 0:
                break
        for number in range(10):
            fake.put(b"aliases/alias/root", b"%d" % number)
            outcome = run_status(path, "--json")
            assert (outcome[0], only_table(outcome)["prefixes"][0]["consul_index"]) == (0, fake.index)


def test_text_file_of_a_daemon_shows_following_within_seconds(tmp_path, run_status, fake):
    path = configured(tmp_path, address=fake.address)
    with Child(path) as child:
        child.handshake()
        for _ in eventually("the table follows Consul", 5):
            if run_status(path, "aliases")[0] == 0:
                break
        assert child.end() == 0
