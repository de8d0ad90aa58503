"""Keys that anyone with write access to one folder can store, and that must affect no other key.

Consul lists every byte that is not UTF-8 as U+FFFD and sorts by the stored bytes: such keys look out of order,
and several may look the same.
"""

from __future__ import annotations

import re
import urllib.request

import pytest

from table_consul import kv
from table_consul.config import ConsulConfig
from table_consul.errors import EntryError
from table_consul.services import SERVICES, Table
from table_consul.services.entries import Entries
from table_consul.sources.mirror import SnapshotBuilder
from tests.dialogue import Child, write_config
from tests.fake_consul import FakeConsul
from tests.rig.waiting import wait_for

TABLE = Table("t")
MARK = "\ufffd".encode()
# As Consul 1.8.7 and 1.22 list them: zz, %80, %81, %c3%a9, %ef%bf%bd.
LISTED = [(b"zz", b"1"), (MARK, b"2"), (MARK, b"3"), ("\u00e9".encode(), b"4"), (MARK, b"5")]


def entries(service, pairs):
    return Entries(TABLE, SERVICES[service], pairs)


def snapshot(pairs, former=None):
    builder = SnapshotBuilder(TABLE, b"t/", ("alias", "domain", "string"), former)
    for pair in pairs:
        builder.take([pair])
    whole = SnapshotBuilder(TABLE, b"t/", ("alias", "domain", "string"), former)
    whole.take(pairs)
    first, second = builder.finish({}), whole.finish({})
    assert [dict(each.values) for each in first.entries.values()] == [
        dict(each.values) for each in second.entries.values()
    ]
    return second


def test_key_that_is_not_utf8_is_an_error_and_the_others_answer():
    found = entries("alias", LISTED)
    assert (found.lookup(b"zz"), found.lookup("\u00e9".encode()), found.lookup(b"nobody")) == (b"1", b"4", None)
    with pytest.raises(EntryError, match="not UTF-8"):
        found.lookup(MARK)


@pytest.mark.parametrize("service", ["alias", "domain", "string", "netaddr", "regex"])
def test_lookup_of_a_key_that_is_not_utf8_is_an_error_where_consul_lists_one(service):
    found = entries(service, LISTED)
    for ask in (found.lookup, found.contains):
        with pytest.raises(EntryError, match="not UTF-8"):
            ask(b"\x82")
    found = entries(service, LISTED[:1])
    assert (found.lookup(b"\x82"), found.contains(b"\x82")) == (None, False)


def test_keys_that_are_not_utf8_and_look_the_same_are_one_problem():
    (problem,) = entries("string", LISTED).problems
    assert problem.key == b"t/string/" + MARK
    assert "table-consulctl lint --live prints the request" in problem.text


@pytest.mark.parametrize("service", SERVICES)
def test_key_that_is_not_utf8_changes_no_other_answer(service):
    good = [(b"192.0.2.1", b"1:1:/a" if service == "userinfo" else b"x"), (b"a@example.org", b"1:1:/b")]
    bad = [(b"a" + MARK + b"*", b"2"), (b"*" + MARK, b"3"), (MARK + b"|.", b"4")]
    with_bad, without = entries(service, [*good, *bad]), entries(service, good)
    for key in (b"192.0.2.1", b"a@example.org", b"b", b"aa", "j\u00fcrgen".encode()):
        assert (with_bad.find(key), with_bad.contains(key)) == (without.find(key), without.contains(key))
    assert with_bad.next_after(None) == without.next_after(None)


def test_key_that_is_listed_twice_is_an_error_and_the_others_answer():
    for pairs in ([(b"a", b"1"), (b"a", b"2"), (b"b", b"3")], [(b"A", b"1"), (b"b", b"3"), (b"A", b"1"), (b"A", b"1")]):
        found = entries("alias", pairs)
        assert found.lookup(b"b") == b"3"
        with pytest.raises(EntryError, match="Consul lists this key twice"):
            found.lookup(b"a")
        assert len(found.problems) == 1


def test_entries_are_accepted_in_any_order():
    pairs = [(b"t/string/a", b"1"), (b"t/alias/b", b"2"), (b"t/x", b"no"), (b"t/domain/c", b"3"), (b"t/alias/a", b"4")]
    for turn in range(len(pairs)):
        found = snapshot([*pairs[turn:], *pairs[:turn]])
        assert {name: dict(each.values) for name, each in found.entries.items()} == {
            "alias": {b"a": b"4", b"b": b"2"},
            "domain": {b"c": b"3"},
            "string": {b"a": b"1"},
        }


def test_another_order_of_the_same_entries_changes_nothing():
    pairs = [(b"t/alias/%d" % number, b"x") for number in range(9)]
    former = snapshot(pairs)
    assert snapshot(pairs[::-1], former).entries["alias"] is former.entries["alias"]


def test_lists_are_accepted_in_any_order_and_with_repeated_keys():
    with FakeConsul() as fake:
        for key in (b"zz", b"\x80", b"\x81", "\u00e9".encode(), MARK):
            fake.put(b"t/alias/" + key, b"x")
        client = kv.Client(ConsulConfig(addresses=(fake.address,)))
        names = ["zz", "\ufffd", "\ufffd", "\u00e9", "\ufffd"]
        assert [pair.name for pair in client.list(b"t/", timeout=2)] == [f"t/alias/{name}" for name in names]
        assert client.visible_keys(b"t/", timeout=2)[0] == [f"t/alias/{name}".encode() for name in names]
        client.close()


@pytest.mark.real
def test_poison_keys_in_a_real_consul_stop_no_table(consul, tmp_path):
    def put(name, value):
        url = f"http://{consul.address}/v1/kv/poison/alias/{name}"
        urllib.request.urlopen(urllib.request.Request(url, value, method="PUT"), timeout=5).close()

    def ask(key):
        return child.ask(b"table|0.1|0|poison|lookup|alias|1|" + key).removeprefix(b"lookup-result|1|")

    put("root", b"gilles")
    for name in ("%80", "%81", "%c3%a9", "zz"):
        put(name, b"x")
    path = write_config(tmp_path, address=f"http://{consul.address}")
    with Child(str(path)) as child:
        child.handshake(b"poison")
        assert ask(b"root") == b"found|gilles"
        put("root", b"eric")
        wait_for(lambda: ask(b"root") == b"found|eric", 10, lambda: "the edit is not in the answer")
        put("%82", b"x")
        consul.kv_txn({"poison/alias/no\u00a0break": "x"})  # no URL can contain it
        wait_for(lambda: ask("no\u00a0break".encode()) == b"found|x", 10, lambda: "the edit is not in the answer")
        consul.kv_delete("poison/alias/no", recurse=True)
        put("zz", b"last")
        wait_for(lambda: ask(b"zz") == b"found|last", 10, lambda: "the edit is not in the answer")
        assert ask("no\u00a0break".encode()) == b"not-found"
        assert ask("\u00e9".encode()) == b"found|x"
        assert ask(b"nobody") == b"not-found"
        child.wire.shutdown(1)
        log = child.log()
    assert len(re.findall("not UTF-8", log)) == 1
    assert "Traceback" not in log
