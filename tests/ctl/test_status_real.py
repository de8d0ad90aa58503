"""`table-consulctl status` with real daemons and a real Consul, whose indexes also rise without edits."""

from __future__ import annotations

import contextlib
import json
import signal

import pytest

from table_consul.ctl import main, status
from tests.dialogue import Child, eventually, write_config

ROOT = b"table|0.1|0|aliases|lookup|alias|1|root"


@pytest.fixture
def ctl(capsys):
    def run(path, *arguments):
        code = main.main(["-c", path, "status", "--json", *arguments])
        (table,) = json.loads(capsys.readouterr().out)["tables"]
        return code, table

    return run


@contextlib.contextmanager
def served(folder, agent, *defaults, token=None, textfile=False):
    """A daemon, and the configuration it shares with the command."""
    line = f'textfile = "{folder}/{{table}}.prom"' if textfile else f'listen = "unix://{folder}/{{table}}.sock"'
    path = write_config(folder, *defaults, address=f"http://{agent.address}", more=f"[metrics]\n{line}")
    if token is not None:
        (folder / "token").write_text(token)
        path.write_text(path.read_text().replace("[consul]", f'[consul]\ntoken_file = "{folder}/token"'))
    with Child(str(path)) as child:
        child.handshake()
        child.ask(ROOT)
        yield child, str(path)


def becomes(ctl, path, state):
    for _ in eventually(state):
        code, table = ctl(path, "aliases")
        if table["state"] == state:
            return code, table
    return None


def test_changes_in_consul_do_not_make_a_following_table_lag(consul, tmp_path, ctl):
    consul.kv_put("aliases/alias/root", "gilles")
    with served(tmp_path, consul) as (_, path):
        becomes(ctl, path, "following")
        for change in (
            lambda: consul.kv_put("aliases/alias/eric", "gilles"),
            lambda: consul.kv_put("elsewhere/key", "x"),
            lambda: consul.kv_delete("aliases/alias/root"),
            lambda: consul.kv_put("aliases/alias/eric", "marie"),
            lambda: consul.kv_delete("aliases/", recurse=True),
            lambda: consul.kv_put("elsewhere/key", "y"),
            lambda: consul.kv_put("aliases/alias/root", "gilles"),
        ):
            change()
            code, table = ctl(path)
            assert (code, table["state"], table["prefixes"][0]["ahead"]) == (0, "following", False), table


def test_hanging_daemon_lags_behind_consul(consul, tmp_path, ctl, monkeypatch):
    monkeypatch.setattr(status, "LAG_SECONDS", 0.2)
    monkeypatch.setattr(status, "WRITE_INTERVAL_SECONDS", 0.2)
    consul.kv_put("aliases/alias/root", "gilles")
    with served(tmp_path, consul, textfile=True) as (child, path):
        becomes(ctl, path, "following")
        child.process.send_signal(signal.SIGSTOP)
        try:
            consul.kv_put("aliases/alias/root", "marie")
            code, table = ctl(path)
        finally:
            child.process.send_signal(signal.SIGCONT)
        (prefix,) = table["prefixes"]
        assert (code, prefix["ahead"], prefix["consul_index"] > prefix["index"]) == (1, True, True)


def test_unreachable_consul_is_an_outage_with_its_reason(consul, tmp_path, ctl):
    consul.kv_put("aliases/alias/root", "gilles")
    with served(tmp_path, consul) as (_, path):
        becomes(ctl, path, "following")
        consul.kill()
        assert becomes(ctl, path, "outage")[0] == 1
        for _ in eventually("the reason is shown"):  # the first failure is that of the pending query
            if "connection refused" in ctl(path)[1]["prefixes"][0]["last_error"]:
                break


def test_table_above_max_keys_is_too_large(consul, tmp_path, ctl):
    consul.kv_put("aliases/alias/root", "gilles")
    consul.kv_put("aliases/alias/eric", "gilles")
    with served(tmp_path, consul, "max_keys = 1") as (child, path):
        for _ in eventually("the table is read directly"):
            if b"|found|gilles" in child.ask(ROOT):
                break
        code, table = becomes(ctl, path, "too large")
        assert (code, table["prefixes"][0]["remarks"]) == (1, ['raise max_keys, or set mode = "direct"'])


def test_direct_table_is_healthy_until_consul_is_killed(consul, tmp_path, ctl):
    consul.kv_put("aliases/alias/root", "gilles")
    with served(tmp_path, consul, 'mode = "direct"') as (child, path):
        assert becomes(ctl, path, "direct")[0] == 0
        consul.kill()
        child.ask(ROOT)
        code, table = becomes(ctl, path, "outage")
        assert (code, table["prefixes"][0]["remarks"]) == (1, ["Consul cannot be read: every lookup returns an error"])


def test_forbidden_folder_is_named(consul_with_acl, tmp_path, ctl):
    agent = consul_with_acl
    agent.kv_put("aliases/alias/root", "gilles")
    token = agent.token('key_prefix "aliases/alias/" { policy = "read" }')
    with served(tmp_path, agent, 'services = ["alias", "domain"]', token=token) as (_, path):
        for _ in eventually("the snapshot exists"):
            code, table = ctl(path, "--offline")
            if table["prefixes"] and table["prefixes"][0]["hidden"]:
                break
        assert (code, table["prefixes"][0]["hidden"], table["state"]) == (1, ["domain"], "following")
        assert token not in json.dumps(table)


def test_revoked_token_is_an_outage_and_is_not_printed(consul_with_acl, tmp_path, ctl):
    agent = consul_with_acl
    agent.kv_put("aliases/alias/root", "gilles")
    token = agent.token('key_prefix "aliases/" { policy = "read" }')
    with served(tmp_path, agent, 'services = ["alias"]', "max_age = 6.0", token=token) as (_, path):
        becomes(ctl, path, "following")
        agent.revoke(token)
        agent.kv_put("aliases/alias/root", "marie")
        code, table = becomes(ctl, path, "outage")
        assert (code, token in json.dumps(table)) == (1, False)
        assert "rejects the token" in table["prefixes"][0]["last_error"]
