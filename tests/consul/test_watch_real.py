"""The watch against a real Consul: ACLs that change, indexes that go back, and every way to reach an agent."""

from __future__ import annotations

import json
import shutil
import ssl
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from table_consul import kv
from table_consul.config import ConsulConfig
from table_consul.errors import Forbidden, SourceError, Unreachable
from table_consul.services import Table
from table_consul.sources import mirror
from table_consul.sources.watch import MirrorSource
from tests.consul.watch.watching import ask, becomes, settled
from tests.dialogue import eventually
from tests.rig import cache
from tests.rig.consul import ConsulAgent, consul_version, free_ports

pytestmark = pytest.mark.real

TABLE = Table("aliases", prefix="mail", services=("alias", "domain"))
READ = 'key_prefix "mail/aliases/" { policy = "read" }'


@pytest.fixture
def mirrored():
    made = []

    def make(address, table=TABLE, **options):
        settings = ConsulConfig(addresses=(address,), **options)
        made.append(MirrorSource(table, lambda: kv.Client(settings)))
        return made[-1]

    yield make
    for each in made:
        each.close()


def fill(agent):
    agent.kv_put("mail/aliases/alias/root", "gilles")
    agent.kv_put("mail/aliases/domain/example.org", "")
    return agent


def url(agent):
    return f"http://{agent.address}"


def noticed(source, kind, agent=None):
    """Poll until the watch has failed like this; with edits, as a query goes by the ACLs of its beginning."""
    (one,) = source.watches
    for _ in eventually(f"{kind.__name__} is noticed", 20):
        if agent is not None:
            agent.kv_put("mail/aliases/beside", str(time.monotonic()))  # in no bucket
        if one.backoff.since is not None and isinstance(one.mirror.last_error, kind):
            return


@pytest.fixture
def open_consul(consul):
    return fill(consul)


@pytest.fixture
def guarded(consul_with_acl):
    return fill(consul_with_acl)


# ---- edits ----


def test_edits_are_seen(open_consul, mirrored):
    source = mirrored(url(open_consul))
    assert (ask(source), ask(source, b"nobody")) == (b"gilles", None)
    open_consul.kv_put("mail/aliases/alias/root", "eric")
    becomes(source, b"eric")
    open_consul.kv_delete("mail/aliases/alias/root")
    becomes(source, None)


def test_keys_that_only_a_transaction_can_make_are_entries_like_others(open_consul, mirrored):
    open_consul.kv_txn({"mail/aliases/alias/a//b": "x", "mail/aliases/alias/a/../b": "y"})
    source = mirrored(url(open_consul))
    assert (ask(source, b"a//b"), ask(source, b"a/../b")) == (b"x", b"y")
    open_consul.kv_delete("mail/aliases/", recurse=True)
    becomes(source, None, b"a//b")


def test_a_table_of_many_pages_of_the_wire_arrives_whole(open_consul, mirrored):
    entries = {f"mail/aliases/alias/user{number}": f"box{number}" * 20 for number in range(2000)}
    open_consul.kv_txn(entries)
    source = mirrored(url(open_consul))
    assert all(ask(source, key[19:].encode()) == value.encode() for key, value in entries.items())


def test_agents_that_print_their_json_for_people_are_read_as_well(mirrored):
    with _agent(dev=True) as agent:
        fill(agent)
        agent.kv_txn({f"mail/aliases/alias/user{number}": f"box{number}" for number in range(300)})
        source = mirrored(url(agent))
        assert all(ask(source, b"user%d" % number) == b"box%d" % number for number in range(300))


def test_the_last_key_deleted_is_an_empty_table(open_consul, mirrored):
    open_consul.kv_delete("mail/aliases/domain/example.org")
    source = mirrored(url(open_consul))
    assert ask(source) == b"gilles"
    open_consul.kv_delete("mail/aliases/alias/root")
    becomes(source, None)
    open_consul.kv_put("mail/aliases/alias/root", "eric")
    becomes(source, b"eric")


def test_a_restored_snapshot_is_seen_although_the_index_goes_back(open_consul, mirrored):
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


def _snapshot(agent, data=None):
    request = urllib.request.Request(f"{url(agent)}/v1/snapshot", data, method="PUT" if data else "GET")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read()


# ---- ACLs ----


def test_a_table_that_was_really_emptied_is_empty(guarded, mirrored):
    source = mirrored(url(guarded), token=guarded.token(READ))
    assert ask(source) == b"gilles"
    guarded.kv_delete("mail/aliases/", recurse=True)
    becomes(source, None)
    becomes(source, None, b"example.org", service="domain")


def test_a_revoked_token_leaves_the_last_good_copy(guarded, mirrored):
    token = guarded.token(READ)
    source = mirrored(url(guarded), token=token)
    assert ask(source) == b"gilles"
    guarded.revoke(token)
    noticed(source, Forbidden, guarded)
    assert (ask(source), ask(source, b"nobody")) == (b"gilles", None)


def _narrow(agent, token, rules):
    own = agent.request("GET", "/v1/acl/token/self", token=token)["Policies"][0]
    agent.request("PUT", f"/v1/acl/policy/{own['ID']}", json.dumps({"Name": own["Name"], "Rules": rules}).encode())


def test_a_policy_that_hides_the_table_without_an_error_leaves_the_last_good_copy_until_it_is_back(guarded, mirrored):
    token = guarded.token(READ)
    source = mirrored(url(guarded), token=token)
    settled(source)
    _narrow(guarded, token, 'key_prefix "other/" { policy = "read" }')
    noticed(source, Forbidden, guarded)
    assert (ask(source), ask(source, b"nobody")) == (b"gilles", None)
    _narrow(guarded, token, READ)
    guarded.kv_put("mail/aliases/alias/root", "eric")
    becomes(source, b"eric")


def test_policy_that_hides_one_folder_is_an_error_there_and_the_rest_follows_edits(guarded, mirrored):
    token = guarded.token(READ)
    source = mirrored(url(guarded), token=token)
    settled(source)
    _narrow(guarded, token, 'key_prefix "mail/aliases/alias/" { policy = "read" }')
    for name in ("eric", "robert"):  # the first may be seen by a query that goes by the former policy
        guarded.kv_put("mail/aliases/alias/root", name)
        becomes(source, name.encode())
    becomes(source, Forbidden, b"example.org", service="domain")


@pytest.mark.parametrize("stored", ["vip", "Vip"])
def test_policy_that_hides_one_key_costs_one_key_until_it_is_lifted(guarded, mirrored, monkeypatch, stored):
    monkeypatch.setattr(mirror, "HIDDEN_WAIT_SECONDS", 0.5)
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


def test_deleted_key_beside_hidden_ones_proves_nothing_about_these(guarded, mirrored):
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


def test_start_where_a_policy_hides_one_key_answers_for_the_others(guarded, mirrored):
    guarded.kv_put("mail/aliases/alias/vip", "x")
    token = guarded.token(READ + ' key "mail/aliases/alias/vip" { policy = "deny" }')
    source = mirrored(url(guarded), token=token)
    assert (ask(source), ask(source, b"nobody")) == (b"gilles", None)
    if consul_version() >= (1, 11):  # before that Consul does not report it
        with pytest.raises(Forbidden):
            ask(source, b"vip")


def test_start_with_a_token_that_may_read_nothing_is_an_error_and_recovers_without_an_edit(
    guarded, mirrored, monkeypatch
):
    monkeypatch.setattr(mirror, "HIDDEN_WAIT_SECONDS", 0.5)
    token = guarded.token('key_prefix "other/" { policy = "read" }')
    source = mirrored(url(guarded), token=token)
    for key, service in ((b"root", "alias"), (b"nobody", "alias"), (b"example.org", "domain")):
        with pytest.raises(Forbidden):
            ask(source, key, service)
    _narrow(guarded, token, READ)
    becomes(source, b"gilles")


def test_without_a_token_absence_is_never_said(guarded, mirrored):
    with pytest.raises(SourceError):
        ask(mirrored(url(guarded)), b"nobody")


def test_a_token_replaced_in_its_file_is_used_when_the_old_one_is_revoked(guarded, mirrored, tmp_path):
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


# ---- ways to Consul ----


def _agent(**options):
    try:
        return ConsulAgent(**options)
    except cache.Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("consistency", ["default", "stale", "consistent"])
def test_every_consistency_sees_edits(open_consul, mirrored, consistency):
    source = mirrored(url(open_consul), consistency=consistency, datacenter="dc1")
    assert (ask(source), ask(source, b"nobody")) == (b"gilles", None)
    open_consul.kv_put("mail/aliases/alias/root", "eric")
    becomes(source, b"eric")


def test_a_datacenter_that_is_not_there_is_no_absence(open_consul, mirrored):
    with pytest.raises(SourceError):
        ask(mirrored(url(open_consul), datacenter="elsewhere"), b"nobody")


@pytest.fixture(scope="module")
def secure(authority):
    """An agent that speaks HTTPS, and only with clients whose certificate the private authority signed."""
    (port,) = free_ports(1)
    hcl = (
        f'ports {{ https = {port} }}\nca_file = "{authority}/ca.pem"\ncert_file = "{authority}/server.pem"\n'
        f'key_file = "{authority}/server.key"\nverify_incoming_https = true\n'
    )
    with _agent(hcl=hcl) as agent:
        fill(agent)
        agent.https = f"https://127.0.0.1:{port}"
        yield agent


def tls_options(folder):
    """The settings of a client with the authority and the client certificate in this folder."""
    return {
        "ca_file": f"{folder}/ca.pem",
        "cert_file": f"{folder}/client.pem",
        "key_file": f"{folder}/client.key",
        "tls_server_name": "server.dc1.consul",
    }


def test_https_with_a_private_authority_a_client_certificate_and_a_server_name(secure, authority, mirrored):
    source = mirrored(secure.https, **tls_options(authority))
    assert (ask(source), ask(source, b"nobody")) == (b"gilles", None)
    secure.kv_put("mail/aliases/alias/new", "x")
    becomes(source, b"x", b"new")


@pytest.mark.parametrize("missing", ["ca_file", "cert_file", "tls_server_name"])
def test_https_with_one_of_them_missing_is_an_error_that_says_so(secure, authority, mirrored, missing):
    options = tls_options(authority)
    del options[missing]
    if missing == "cert_file":
        del options["key_file"]
    source = mirrored(secure.https, **options)
    becomes(source, Unreachable, b"nobody")
    assert not isinstance(source.watches[0].mirror.last_error, ssl.SSLError)


def test_certificates_replaced_on_disk_are_used_after_an_update(secure, authority, mirrored, tmp_path):
    for name in ("ca.pem", "client.pem", "client.key"):
        shutil.copy(authority / name, tmp_path)
    (tmp_path / "ca.pem").write_text((authority / "client.pem").read_text())
    source = mirrored(secure.https, **tls_options(tmp_path))
    becomes(source, Unreachable)
    shutil.copy(authority / "ca.pem", tmp_path / "ca.pem")
    source.update()
    becomes(source, b"gilles")


def test_a_unix_socket_of_the_agent(mirrored, tmp_path):
    folder = Path(tempfile.mkdtemp(prefix="tc-"))  # the path of a socket has at most 107 bytes
    try:
        with _agent(hcl=f'addresses {{ http = "127.0.0.1 unix://{folder}/http.sock" }}\n') as agent:
            fill(agent)
            source = mirrored(f"unix://{folder}/http.sock")
            assert (ask(source), ask(source, b"nobody")) == (b"gilles", None)
            agent.kv_put("mail/aliases/alias/root", "eric")
            becomes(source, b"eric")
            agent.kill()
            noticed(source, Unreachable)
            assert ask(source) == b"eric"
            agent.start()
            agent.kv_put("mail/aliases/alias/root", "robert")
            becomes(source, b"robert")
    finally:
        shutil.rmtree(folder)
