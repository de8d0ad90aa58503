"""When absence is proven: samples, stale servers, refusals, and incomplete lists."""

from __future__ import annotations

import json

import pytest
from msgspec.structs import replace

from table_consul import kv
from table_consul.config import Config, ConsulConfig
from table_consul.ctl.loader import load_once
from table_consul.errors import Forbidden, TooLarge
from tests.consul.watch.watching import (
    ALIAS,
    DOMAIN,
    PREFIX,
    ROOT,
    TABLE,
    ask,
    ask_table,
    becomes,
    lines,
    lists,
    logged,
    reports_hidden_keys,
    settled,
)
from tests.dialogue import eventually
from tests.fake_consul import Answer, FakeConsul, html


def test_many_deleted_keys_are_proven_by_a_sample_over_the_whole_list(fake, mirrored):
    names = [b"%04d" % number for number in range(1000)]
    for name in names:
        fake.put(ALIAS + name, b"x")
    source = mirrored(fake.address, replace(TABLE, hold_deletions=0.0))
    settled(source)
    asked = len(fake.requests)
    with fake.store.changed:
        for name in names:
            fake.delete(ALIAS + name)
    becomes(source, None, b"0500")
    read = {request.key for request in fake.requests[asked:] if request.params.keys() == {"consistent"}}
    assert 50 < len(read) < 80
    assert min(read) < ALIAS + b"0010"
    assert max(read) > ALIAS + b"0980"


@pytest.mark.parametrize("contact", [0, 9_000])
def test_stale_server_in_contact_with_its_leader_proves_absence(fake, mirrored, contact):
    fake.last_contact = contact
    source = mirrored(fake.address, consistency="stale")
    assert (ask(source), ask(source, b"nobody")) == (b"gilles", None)


@pytest.mark.parametrize("setting", [("leader", False), ("last_contact", 3_600_000)], ids=["no leader", "no contact"])
def test_isolated_server_confirms_no_data_with_consistency_stale(fake, mirrored, waits_of, caplog, setting):
    waits_of(0.2)
    source = mirrored(fake.address, consistency="stale")
    settled(source)
    (watch,), name = source.watches, setting[0]
    healthy = getattr(fake, name)
    setattr(fake, *setting)
    for _ in eventually("the outage is noticed", 10):
        if watch.backoff.failures > 1:
            break
    _, confirmed = watch.mirror.state
    for _ in eventually("more attempts", 10):
        if watch.backoff.failures > 3:
            break
    assert (watch.mirror.state[1], ask(source), ask(source, b"nobody")) == (confirmed, b"gilles", None)
    assert len(lines(caplog)) == 1
    setattr(fake, name, healthy)
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    logged(caplog, "recovered")


def test_isolated_server_is_left_for_another_with_consistency_stale(fake, mirrored, waits_of):
    waits_of(0.2)
    with FakeConsul(version=fake.version) as other:
        other.put(ROOT, b"gilles")
        other.put(DOMAIN + b"example.org", b"")
        source = mirrored((fake.address, other.address), consistency="stale")
        settled(source)
        fake.leader = False
        other.put(ROOT, b"eric")
        becomes(source, b"eric")


def test_lower_index_is_used_only_after_a_consistent_read(fake, mirrored, waits_of):
    waits_of(0.2)
    source = mirrored(fake.address)
    settled(source)
    behind = Answer(404, {"X-Consul-Index": "2", "X-Consul-Knownleader": "true"})
    fake.handle = lambda request: fake.consul(request) if "consistent" in request.params else behind
    for _ in eventually("the table is read again", 10):
        if len([request for request in lists(fake) if "consistent" in request.params]) > 2:
            break
    assert (ask(source), source.watches[0].backoff.total) == (b"gilles", 0)


@reports_hidden_keys
def test_failed_proof_of_absence_leaves_the_last_good_copy(fake, mirrored):
    source = mirrored(fake.address)
    settled(source)
    fake.denied = (b"mail/aliases/zz",)
    fake.handle = lambda request: fake.consul(request) if "recurse" in request.params else html(request)
    fake.put(b"mail/aliases/zz", b"makes Consul say that it hides something")
    for _ in eventually("the failure is noticed", 10):
        if source.watches[0].backoff.since is not None:
            break
    assert (ask(source), ask(source, b"nobody")) == (b"gilles", None)
    fake.handle = fake.consul
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")


@pytest.mark.parametrize(
    ("version", "name", "status"),
    [
        ("1.21.5", b"user@example.org", 500),
        ("1.8.7", "no\u00a0break".encode(), 400),
        ("1.22", "soft\u00adhyphen".encode(), 400),
        ("1.22", "\u00e9".encode() * 5000, 431),  # Consul's own limit is 1 MiB
        ("1.22", b"for.a.proxy" * 1000, 414),
    ],
    ids=["1.21.5", "no-break space", "soft hyphen", "long", "long for a proxy"],
)
def test_deletion_of_a_key_with_a_refused_name_is_accepted(fake, mirrored, name, status):
    refused = []

    def limited(request):
        answer = fake.consul(request)
        if len(request.key) >= 10_000:
            answer = Answer(status, {"Connection": "close"}, b"Too Long")
        refused.extend([answer.status] * (request.key == ALIAS + name))
        return answer

    fake.put(ALIAS + name, b"x")
    fake.handle = limited
    source = mirrored(fake.address)
    assert ask(source, name) == b"x"
    fake.delete(ALIAS + name)
    becomes(source, None, name)
    assert refused == [status]
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    assert source.watches[0].backoff.total == 0


@pytest.mark.parametrize("refusal", [Answer(302, {"Location": "/"}), Answer(451)], ids=["302", "451"])
def test_refused_read_does_not_prove_absence(fake, mirrored, refusal):
    fake.put(ALIAS + b"hidden", b"x")
    source = mirrored(fake.address)
    assert ask(source, b"hidden") == b"x"
    fake.handle = lambda request: refusal if request.key == ALIAS + b"hidden" else fake.consul(request)
    fake.delete(ALIAS + b"hidden")
    for _ in eventually("the list is rejected", 10):
        if source.watches[0].backoff.since is not None:
            break
    assert ask(source, b"hidden") == b"x"


def test_unlisted_key_that_can_be_read_is_not_absent(fake, mirrored):
    source = mirrored(fake.address)
    settled(source)
    honest = fake.consul

    def shortened(request):
        answer = honest(request)
        if "recurse" in request.params:
            entries = [entry for entry in json.loads(answer.body) if not entry["Key"].endswith("root")]
            answer.body = json.dumps(entries).encode()
        return answer

    fake.handle = shortened
    # A query that already waits still returns the whole list for the first edit.
    for number, _ in enumerate(eventually("the missing entry is noticed", 10)):
        fake.put(ALIAS + b"new", b"%d" % number)
        if "does not list it" in str(source.watches[0].mirror.last_error):
            break
    assert ask(source) == b"gilles"
    fake.handle = honest
    fake.put(ALIAS + b"new", b"x")
    becomes(source, b"x", b"new")


def test_load_once_finds_what_a_watch_finds(fake):
    client = kv.Client(ConsulConfig(addresses=(fake.address,)))
    fake.denied = (DOMAIN,)
    stored = {}
    snapshot, index = load_once(client, TABLE, PREFIX, TABLE.services, stored.update)
    assert index == fake.index
    assert snapshot.entries["alias"].lookup(b"root") == b"gilles"
    assert list(snapshot.hidden) == ["domain"]
    assert stored == {ROOT: b"gilles"}
    with pytest.raises(TooLarge):
        load_once(client, replace(TABLE, max_keys=0), PREFIX, TABLE.services, stored.update)
    client.close()


@pytest.mark.parametrize("version", ["1.8.7"])
def test_absence_is_proven_after_an_update_that_kept_the_data(fake, sources):
    source = sources(fake.address)
    assert ask_table(source) == b"gilles"
    fake.stop()
    source.box[0] = Config(
        None, consul=ConsulConfig(addresses=(fake.address,)), defaults=replace(TABLE, max_age=1000.0)
    )
    source.update()
    assert ask_table(source) == b"gilles"
    fake.denied = (ROOT,)
    fake.start()
    for _ in eventually("the hidden key is noticed", 10):
        try:
            ask_table(source)
        except Forbidden:
            break
