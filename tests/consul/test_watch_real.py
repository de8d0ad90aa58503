"""The watch against a real Consul: edits, ACLs that change, and indexes that go backwards."""

from __future__ import annotations

import json
import time
import urllib.request

import pytest
from msgspec.structs import replace

from table_consul import kv, transport
from table_consul.errors import Forbidden, SourceError
from table_consul.sources import mirror
from tests.consul.real import READ, TABLE, agent_or_skip, fill, noticed, url
from tests.consul.watch.watching import ask, becomes, settled
from tests.dialogue import eventually
from tests.rig.consul import consul_version
from tests.rig.proxy import Cutting, Proxy

pytestmark = pytest.mark.real


# ---- edits ----


def test_edits_are_seen(open_consul, mirrored):
    source = mirrored(url(open_consul))
    assert (ask(source), ask(source, b"nobody")) == (b"gilles", None)
    open_consul.kv_put("mail/aliases/alias/root", "eric")
    becomes(source, b"eric")
    open_consul.kv_delete("mail/aliases/alias/root")
    becomes(source, None)


def test_keys_that_only_a_transaction_can_write_are_ordinary_entries(open_consul, mirrored):
    open_consul.kv_txn({"mail/aliases/alias/a//b": "x", "mail/aliases/alias/a/../b": "y"})
    source = mirrored(url(open_consul))
    assert (ask(source, b"a//b"), ask(source, b"a/../b")) == (b"x", b"y")
    open_consul.kv_delete("mail/aliases/", recurse=True)
    becomes(source, None, b"a//b")


def test_large_table_arrives_whole(open_consul, mirrored):
    entries = {f"mail/aliases/alias/user{number}": f"box{number}" * 20 for number in range(2000)}
    open_consul.kv_txn(entries)
    source = mirrored(url(open_consul))
    assert all(ask(source, key[19:].encode()) == value.encode() for key, value in entries.items())


def test_pretty_printed_json_of_an_agent_is_read(mirrored):
    with agent_or_skip(dev=True) as agent:
        fill(agent)
        agent.kv_txn({f"mail/aliases/alias/user{number}": f"box{number}" for number in range(300)})
        source = mirrored(url(agent))
        assert all(ask(source, b"user%d" % number) == b"box%d" % number for number in range(300))


def test_table_is_empty_after_its_last_key_is_deleted(open_consul, mirrored):
    open_consul.kv_delete("mail/aliases/domain/example.org")
    source = mirrored(url(open_consul))
    assert ask(source) == b"gilles"
    open_consul.kv_delete("mail/aliases/alias/root")
    becomes(source, None)
    open_consul.kv_put("mail/aliases/alias/root", "eric")
    becomes(source, b"eric")


def test_restored_snapshot_with_a_lower_index_is_seen(open_consul, mirrored):
    saved = _snapshot(open_consul)
    for number in range(20):
        open_consul.kv_put("mail/aliases/alias/root", f"later{number}")
    source = mirrored(url(open_consul))
    settled(source)
    assert ask(source) == b"later19"
    before = source.watches[0].index
    _snapshot(open_consul, saved)
    becomes(source, b"gilles")
    assert source.watches[0].index < before
    open_consul.kv_put("mail/aliases/alias/root", "after it")
    becomes(source, b"after it")


def test_lost_data_are_held_until_they_are_restored(mirrored):
    with agent_or_skip(dev=True) as agent:  # which keeps nothing over a restart
        fill(agent)
        source = mirrored(url(agent))
        settled(source)
        agent.stop()
        agent.start()
        for _ in eventually("the loss is seen", 20):
            if held := source.watches[0].mirror.state[0].held:
                break
        assert {name: len(each.keys) for name, each in held.items()} == {"alias": 1, "domain": 1}
        assert (ask(source), ask(source, b"example.org", "domain")) == (b"gilles", b"example.org")
        fill(agent)
        for _ in eventually("the hold ends", 20):
            if not source.watches[0].mirror.state[0].held:
                break
        assert ask(source) == b"gilles"


def test_folder_deleted_by_mistake_still_answers_until_an_update(open_consul, mirrored):
    open_consul.kv_txn({f"mail/aliases/alias/user{number}": "gilles" for number in range(30)})
    source = mirrored(url(open_consul))
    settled(source)
    open_consul.kv_delete("mail/aliases/alias/", recurse=True)
    open_consul.kv_put("mail/aliases/alias/later", "eric")
    becomes(source, b"eric", b"later")
    assert (ask(source), ask(source, b"user29"), ask(source, b"nobody")) == (b"gilles", b"gilles", None)
    source.update()
    becomes(source, None, b"user29")
    assert ask(source, b"later") == b"eric"


def test_snapshot_restored_between_queries_is_seen_after_a_short_wait(open_consul, mirrored, monkeypatch):
    monkeypatch.setattr(mirror, "SHORT_WAIT_SECONDS", 0.5)
    saved = [_snapshot(open_consul)]
    for number in range(20):
        open_consul.kv_put("mail/aliases/alias/root", f"later{number}")

    class Restoring(kv.Client):
        def blocking_query(self, *arguments, index=0, **options):
            if index and saved:
                _snapshot(open_consul, saved.pop())
            return super().blocking_query(*arguments, index=index, **options)

    source = mirrored(url(open_consul), client=Restoring)
    becomes(source, b"gilles")
    open_consul.kv_put("mail/aliases/alias/root", "after it")
    becomes(source, b"after it")


def test_restored_snapshot_of_the_current_state_hides_no_edit(open_consul, mirrored):
    source = mirrored(url(open_consul))
    settled(source)
    _snapshot(open_consul, _snapshot(open_consul))
    open_consul.kv_put("mail/aliases/alias/root", "after it")
    becomes(source, b"after it")


def test_restored_snapshot_with_the_same_index_is_read(open_consul, mirrored):
    with agent_or_skip() as other:
        fill(other)
        other.kv_put("mail/aliases/alias/vip", "x")
        indexes = dict.fromkeys((open_consul, other), 0)
        for _ in eventually("the newest entry has the same index in both"):
            agent = min(indexes, key=lambda each: indexes[each])
            agent.kv_put("mail/aliases/alias/root", str(time.monotonic()))
            indexes[agent] = agent.request("GET", "/v1/kv/mail/aliases/alias/root")[0]["ModifyIndex"]
            if len({*indexes.values()}) == 1:
                break
        source = mirrored(url(open_consul))
        settled(source)
        assert (ask(source, b"vip"), source.watches[0].index) == (None, indexes[other])
        saved = _snapshot(other)
        for _ in eventually("the restored key is found", 10):
            _snapshot(open_consul, saved)  # repeated, because one between two waits ends neither
            if ask(source, b"vip") == b"x":
                break
        assert source.watches[0].index == indexes[other]


def test_first_key_of_a_fresh_consul_is_seen(mirrored):
    with agent_or_skip() as agent:
        source = mirrored(url(agent))
        settled(source)
        assert (ask(source), source.watches[0].index) == (None, 1)
        agent.kv_put("mail/aliases/alias/root", "gilles")
        becomes(source, b"gilles")


def test_edits_elsewhere_cause_few_queries_for_an_empty_table(consul, mirrored):
    with Proxy(consul) as proxy:
        source = mirrored(f"http://{proxy.address}")
        settled(source)
        for number in range(200):
            consul.kv_put(f"other/{number}", "x")
        assert len(proxy.requests) < 40
        consul.kv_put("mail/aliases/alias/root", "gilles")
        becomes(source, b"gilles")


def test_new_folder_is_seen_and_an_emptied_folder_leaves_the_other(open_consul, mirrored):
    source = mirrored(url(open_consul), replace(TABLE, services=(*TABLE.services, "string")))
    assert ask(source, b"a", "string") is None
    open_consul.kv_put("mail/aliases/string/a", "x")
    becomes(source, b"x", b"a", service="string")
    open_consul.kv_delete("mail/aliases/domain/", recurse=True)
    becomes(source, None, b"example.org", service="domain")
    assert (ask(source), ask(source, b"a", "string")) == (b"gilles", b"x")


def test_each_path_is_watched_and_services_with_one_path_see_the_same_edit(open_consul, mirrored):
    open_consul.kv_put("shared/all/example.net", "x")
    paths = {"domain": "shared/all", "string": "shared/all"}
    source = mirrored(url(open_consul), replace(TABLE, services=(*TABLE.services, "string"), paths=paths))
    settled(source)
    open_consul.kv_put("shared/all/example.net", "y")
    for service in ("domain", "string"):
        becomes(source, b"y", b"example.net", service=service)
    open_consul.kv_put("mail/aliases/alias/root", "eric")
    becomes(source, b"eric")
    open_consul.kv_delete("shared/all/", recurse=True)
    for service in ("domain", "string"):
        becomes(source, None, b"example.net", service=service)


def test_waits_cut_by_a_proxy_cause_no_outage_and_hide_no_edit(open_consul, mirrored, monkeypatch, caplog):
    monkeypatch.setattr(transport, "LEAST_CUT_SECONDS", 0.2)
    with Cutting(open_consul, 0.4) as proxy:
        proxy.bad.set()
        source = mirrored(f"http://{proxy.address}")
        settled(source)
        for _ in eventually("waits are shorter than the cut", 20):
            if len(proxy.harm) > 1 and len(proxy.requests) > 8:
                break
        open_consul.kv_put("mail/aliases/alias/root", "eric")
        becomes(source, b"eric")
        assert [target for _, target in proxy.requests if "consistent" in target][1:] == []
        assert source.watches[0].backoff.total == 0


def _snapshot(agent, data=None):
    request = urllib.request.Request(f"{url(agent)}/v1/snapshot", data, method="PUT" if data else "GET")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read()


# ---- ACLs ----


def test_emptied_table_is_empty(guarded, mirrored):
    source = mirrored(url(guarded), token=guarded.token(READ))
    assert ask(source) == b"gilles"
    guarded.kv_delete("mail/aliases/", recurse=True)
    becomes(source, None)
    becomes(source, None, b"example.org", service="domain")


def test_revoked_token_leaves_the_last_good_copy(guarded, mirrored):
    token = guarded.token(READ)
    source = mirrored(url(guarded), token=token)
    assert ask(source) == b"gilles"
    guarded.revoke(token)
    noticed(source, Forbidden, guarded)
    assert (ask(source), ask(source, b"nobody")) == (b"gilles", None)


def _narrow(agent, token, rules):
    own = agent.request("GET", "/v1/acl/token/self", token=token)["Policies"][0]
    agent.request("PUT", f"/v1/acl/policy/{own['ID']}", json.dumps({"Name": own["Name"], "Rules": rules}).encode())


def test_policy_that_hides_the_whole_table_leaves_the_last_good_copy(guarded, mirrored):
    token = guarded.token(READ)
    source = mirrored(url(guarded), token=token)
    settled(source)
    _narrow(guarded, token, 'key_prefix "other/" { policy = "read" }')
    noticed(source, Forbidden, guarded)
    assert (ask(source), ask(source, b"nobody")) == (b"gilles", None)
    _narrow(guarded, token, READ)
    guarded.kv_put("mail/aliases/alias/root", "eric")
    becomes(source, b"eric")


def test_policy_that_hides_one_folder_is_an_error_for_that_folder_only(guarded, mirrored):
    token = guarded.token(READ)
    source = mirrored(url(guarded), token=token)
    settled(source)
    _narrow(guarded, token, 'key_prefix "mail/aliases/alias/" { policy = "read" }')
    for name in ("eric", "robert"):  # the first may be seen by a query that goes by the former policy
        guarded.kv_put("mail/aliases/alias/root", name)
        becomes(source, name.encode())
    becomes(source, Forbidden, b"example.org", service="domain")


@pytest.mark.parametrize("stored", ["vip", "Vip"])
def test_policy_that_hides_one_key_is_an_error_for_that_key_only(guarded, mirrored, monkeypatch, stored):
    monkeypatch.setattr(mirror, "SHORT_WAIT_SECONDS", 0.5)
    guarded.kv_put(f"mail/aliases/alias/{stored}", "x")
    token = guarded.token(READ)
    source = mirrored(url(guarded), token=token)
    settled(source)
    _narrow(guarded, token, READ + f' key "mail/aliases/alias/{stored}" {{ policy = "deny" }}')
    for name in ("eric", "robert"):
        guarded.kv_put("mail/aliases/alias/root", name)
        becomes(source, name.encode())
    becomes(source, Forbidden, b"vip")
    assert (ask(source), ask(source, b"nobody")) == (b"robert", None)
    _narrow(guarded, token, READ)
    becomes(source, b"x", b"vip")


def test_deleted_key_proves_nothing_about_hidden_keys(guarded, mirrored):
    for number in range(12):
        guarded.kv_put(f"mail/aliases/alias/user{number:02}", "x")
    token = guarded.token(READ)
    source = mirrored(url(guarded), token=token)
    settled(source)
    deny = [f' key "mail/aliases/alias/user{number:02}" {{ policy = "deny" }}' for number in (10, 11)]
    _narrow(guarded, token, READ + "".join(deny))
    for name in ("eric", "robert"):
        guarded.kv_put("mail/aliases/alias/root", name)
        becomes(source, name.encode())
    for number in range(9):
        guarded.kv_delete(f"mail/aliases/alias/user{number:02}")
    becomes(source, None, b"user08")
    for number in (10, 11):
        with pytest.raises(Forbidden):
            ask(source, b"user%d" % number)
    assert ask(source, b"user09") == b"x"


def test_changed_rule_without_an_edit_is_noticed_where_consul_reports_it(guarded, mirrored, monkeypatch):
    for name in ("SHORT_WAIT_SECONDS", "MOST_WAIT_SECONDS"):
        monkeypatch.setattr(mirror, name, 0.3)
    guarded.kv_put("mail/aliases/alias/vip", "x")
    token = guarded.token(READ)
    source = mirrored(url(guarded), token=token)
    settled(source)
    for _ in range(2):
        _narrow(guarded, token, READ + ' key "mail/aliases/alias/vip" { policy = "deny" }')
        if consul_version() >= (1, 11):
            becomes(source, Forbidden, b"vip")
        assert ask(source, b"nobody") is None
        _narrow(guarded, token, READ)
        becomes(source, b"x", b"vip")


def test_start_with_one_hidden_key_answers_for_the_others(guarded, mirrored):
    guarded.kv_put("mail/aliases/alias/vip", "x")
    token = guarded.token(READ + ' key "mail/aliases/alias/vip" { policy = "deny" }')
    source = mirrored(url(guarded), token=token)
    assert (ask(source), ask(source, b"nobody")) == (b"gilles", None)
    if consul_version() >= (1, 11):  # before that Consul does not report it
        with pytest.raises(Forbidden):
            ask(source, b"vip")


def test_start_with_a_token_without_permissions_recovers_without_an_edit(guarded, mirrored, monkeypatch):
    monkeypatch.setattr(mirror, "SHORT_WAIT_SECONDS", 0.5)
    token = guarded.token('key_prefix "other/" { policy = "read" }')
    source = mirrored(url(guarded), token=token)
    for key, service in ((b"root", "alias"), (b"nobody", "alias"), (b"example.org", "domain")):
        with pytest.raises(Forbidden):
            ask(source, key, service)
    _narrow(guarded, token, READ)
    becomes(source, b"gilles")


def test_list_policy_is_an_error_without_the_rule_list_and_answers_with_it(mirrored):
    hcl = 'acl { enabled = true\n default_policy = "deny"\n enable_key_list_policy = true }\n'
    with agent_or_skip(hcl=hcl) as agent:
        agent.management_token = agent.bootstrap()
        fill(agent)
        token = agent.token(READ)
        source = mirrored(url(agent), token=token)
        for key in (b"root", b"nobody"):
            with pytest.raises(Forbidden, match="Permission denied"):
                ask(source, key)
        _narrow(agent, token, READ.replace("read", "list"))
        becomes(source, b"gilles")
        assert ask(source, b"nobody") is None
        agent.kv_delete("mail/aliases/domain/example.org")
        becomes(source, None, b"example.org", service="domain")


def test_no_key_is_absent_without_a_token(guarded, mirrored):
    with pytest.raises(SourceError):
        ask(mirrored(url(guarded)), b"nobody")


def test_token_replaced_in_its_file_is_used_when_the_old_one_is_revoked(guarded, mirrored, tmp_path):
    path = tmp_path / "token"
    first, second = guarded.token(READ), guarded.token(READ)
    path.write_text(first)
    source = mirrored(url(guarded), token_file=str(path))
    assert ask(source) == b"gilles"
    path.write_text(second)
    guarded.revoke(first)
    guarded.kv_put("mail/aliases/alias/root", "eric")
    becomes(source, b"eric")
    guarded.kv_put("mail/aliases/alias/root", "robert")
    becomes(source, b"robert")
    assert source.watches[0].backoff.since is None
