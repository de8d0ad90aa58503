"""The Consul client against a real Consul, without the assumptions of a fake."""

from __future__ import annotations

import random
import threading
import time
import urllib.request

import pytest

from table_consul import kv
from table_consul.config import ConsulConfig
from table_consul.errors import BadName, BadRequest, BadResponse, Forbidden, Unreachable
from tests.rig.consul import consul_version

pytestmark = pytest.mark.real

BUCKET = b"escape/consul/alias/"
SECRETS = {"other/secret": "outside", "escape/other/secret": "outside", "escape/consul/domain/secret": "outside"}
# Each is pasted behind the bucket, as a stranger's recipient, HELO name or user name would be.
HOSTILE = [
    b"../../other/secret",
    b"../../../other/secret",
    b"../domain/secret",
    b"a/../../../other/secret",
    b"./../domain/secret",
    b"..%2f..%2fother%2fsecret",
    b"..%2F..%2F..%2Fother%2Fsecret",
    b"%2e%2e/%2e%2e/other/secret",
    b"%2e%2e%2f%2e%2e%2fother%2fsecret",
    b"%252e%252e/domain/secret",
    b".%2e/domain/secret",
    b"..;/domain/secret",
    b"..\\domain\\secret",
    b"\\..\\..\\other\\secret",
    b"../../../agent/self",
    b"../../../../../v1/agent/self",
    b"../../../../agent/self?",
    b"..",
    b".",
    b"...",
    b"",
    b"/",
    b"//",
    b"/root",
    b"x//y",
    b"root/",
    b"root/.",
    b"root/..",
    b"root?raw",
    b"root?recurse",
    b"root?keys&separator=/",
    b"?keys",
    b"?recurse",
    b"?",
    b"#",
    b"root#x",
    b"root&raw",
    b"root;x",
    b"root%00",
    b"root%0d%0aX-Consul-Token:%20x",
    b"root\0",
    b"root\n",
    b"root\r\nX-Consul-Token: x",
    b"root HTTP/1.1\r\nHost: x\r\n\r\nGET /v1/kv/other/secret",
    b"root\x1b[2J",
    b"root\x7f",
    b"root\xff",
    b"\xed\xa0\x80",
    b"\xc0\xae\xc0\xae/\xc0\xae\xc0\xae/other/secret",
    "\uff0e\uff0e/\uff0e\uff0e/other/secret".encode(),
    "\u2025/domain/secret".encode(),
    "..\u2215..\u2215other\u2215secret".encode(),
    "root\u2028".encode(),
    "root\u00a0".encode(),
    "root\u200b".encode(),
    b"http://127.0.0.1/v1/kv/other/secret",
    b"//127.0.0.1/v1/kv/other/secret",
    b"@127.0.0.1/v1/kv/other/secret",
    b"*",
    b"%",
    b"%zz",
    b"%2",
    b" ",
    b" root",
    b"root ",
    b"ROOT",
    b"a" * 1023,
    b"a/" * 511 + b"a",
]
# Printable keys whose reading Consul refuses from 1.21.6 and 1.22.0 on: a blank at the end, and percent-encoded text
# that holds `..` or a blank when it is decoded once more. Before, it looked them up like any other key.
REFUSED_AFTER_1_21_5 = {
    b"..%2f..%2fother%2fsecret",
    b"..%2F..%2F..%2Fother%2Fsecret",
    b"%2e%2e/%2e%2e/other/secret",
    b"%2e%2e%2f%2e%2e%2fother%2fsecret",
    b".%2e/domain/secret",
    b"root%0d%0aX-Consul-Token:%20x",
    b" ",
    b"root ",
}
FINE = [
    b"user@example.org",
    b"user+tag@example.org",
    b"@example.org",
    b"[2001:db8::/32]",
    b"192.0.2.0/24",
    b"*.example.org",
    b"a%2fb",
    b"a?b=c&d#e",
    b"a b",
    b"{}|^`\"'<>\\~!$(),;",
    "gr\u00fc\u00dfe".encode(),
    b"..a/b..",
]


def index_of(client, prefix):
    with client.blocking_query(prefix, timeout=5) as response:
        return response.index


def settings(agent, **options):
    return ConsulConfig(addresses=(f"http://{agent.address}",), **options)


@pytest.fixture
def filled(consul):
    for key, value in SECRETS.items():
        consul.kv_put(key, value)
    consul.kv_put((BUCKET + b"root").decode(), "gilles")
    return consul


@pytest.fixture
def client(filled):
    client = kv.Client(settings(filled))
    yield client
    client.close()


@pytest.fixture
def guarded(consul_with_acl):
    consul_with_acl.kv_put("consul/alias/root", "gilles")
    consul_with_acl.kv_put("other/secret", "x")
    return consul_with_acl


def refusal(key):
    """The error with which Consul refuses to read this hostile key behind the bucket; None if it looks the key up."""
    if not key.decode().isprintable():
        return BadRequest  # 400 for what Go calls unprintable, beyond ASCII too
    if key in REFUSED_AFTER_1_21_5 and consul_version() > (1, 21, 5):
        return BadName
    return None


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_key_reads_no_key_outside_its_folder(client, hostile):
    key = BUCKET + hostile
    if not kv.is_url_safe(key):
        with pytest.raises(ValueError, match="no URL can name"):
            client.get(key, timeout=5)
    elif expected := refusal(hostile):
        with pytest.raises(expected):
            client.get(key, timeout=5)
    else:
        assert client.get(key, timeout=5) is None
    assert client.get(BUCKET + b"root", timeout=5).value == b"gilles"


@pytest.mark.parametrize("fine", FINE)
def test_keys_with_unusual_characters_are_read_unchanged(client, filled, fine):
    key = BUCKET + fine
    filled.kv_put(key.decode(), "odd")
    assert client.get(key, timeout=5).value == b"odd"
    assert key in client.visible_keys(BUCKET, timeout=5)[0]
    assert key in [pair.key for pair in client.list(BUCKET, timeout=5)]
    filled.kv_delete(key.decode())
    assert client.get(key, timeout=5) is None


def test_keys_that_only_a_transaction_can_write_are_listed_but_never_read(client, filled):
    odd = ["made/a//b", "made/a/../b", "made/a\nb"]
    filled.kv_txn(dict.fromkeys(odd, "x"))
    assert sorted(pair.key.decode() for pair in client.list(b"made/", timeout=5)) == sorted(odd)
    assert not any(kv.is_url_safe(key.encode()) for key in odd)


def test_name_problem_agrees_with_refusals_of_consul_since_1_21_6(client):
    rng = random.Random(5)
    parts = [*"ab.%/ 2eE0zé@+:*~!#?=&|", "..", "%20", "%2e", "%41", "%zz", "%25", "%2f", "\u200e", "\xa0", "\x7f"]
    keys = {("t/" + "".join(rng.choices(parts, k=rng.randint(1, 5)))).encode() for _ in range(2000)}
    refused, expected = set(), {key for key in keys if kv.is_url_safe(key) and kv.modern_name_problem(key)}
    for key in filter(kv.is_url_safe, keys):
        try:
            assert client.get(key, timeout=5) is None
        except BadRequest:
            refused.add(key)
    assert len(expected) > 200
    assert refused == expected if consul_version() > (1, 21, 5) else refused < expected
    assert not any(map(kv.modern_name_problem, (BUCKET + fine for fine in FINE)))
    assert all(map(kv.modern_name_problem, (key for key in keys if not kv.is_url_safe(key))))


def test_get_list_and_keys_see_an_edit_and_a_deletion(client, filled):
    assert client.list(b"edit/", timeout=5) == []
    filled.kv_put("edit/a", "1")
    filled.kv_put("edit/folder/", "")
    pair = client.get(b"edit/a", timeout=5)
    assert pair.value == b"1"
    found = client.list(b"edit/", timeout=5)
    assert [(each.key, each.value) for each in found] == [(b"edit/a", b"1"), (b"edit/folder/", None)]
    assert found[0] == pair
    before = index_of(client, b"edit/")
    assert before >= pair.modify_index
    assert client.visible_keys(b"edit/", timeout=5)[0] == [b"edit/a", b"edit/folder/"]
    filled.kv_delete("edit/", recurse=True)
    assert client.get(b"edit/a", timeout=5) is None
    assert client.visible_keys(b"edit/", timeout=5)[0] == []
    assert client.list(b"edit/", timeout=5) == []
    assert index_of(client, b"edit/") > before


def test_blocking_list_returns_the_edit(client, filled):
    filled.kv_put("wait/a", "1")
    index = index_of(client, b"wait/")
    edit = threading.Timer(0.2, filled.kv_put, ("wait/a", "2"))
    edit.start()
    begun = time.monotonic()
    with client.blocking_query(b"wait/", timeout=10, index=index, wait=20) as page:
        assert [(pair.key, pair.value) for pairs in page.pairs() for pair in pairs] == [(b"wait/a", b"2")]
    edit.join()
    assert page.index > index
    assert time.monotonic() - begun < 5


def test_blocking_list_without_a_change_returns_after_its_wait(client, filled):
    filled.kv_put("still/a", "1")
    index = index_of(client, b"still/")
    begun = time.monotonic()
    with client.blocking_query(b"still/", timeout=5, index=index, wait=0.4) as page:
        assert page.index == index
    assert 0.3 < time.monotonic() - begun < 3


def test_every_consistency_and_the_local_datacenter_answer(filled):
    for options in ({"consistency": "stale"}, {"consistency": "consistent"}, {"datacenter": "dc1"}):
        client = kv.Client(settings(filled, **options))
        assert client.get(BUCKET + b"root", timeout=5).value == b"gilles"
        assert client.get(BUCKET + b"nobody", timeout=5) is None
        client.close()


def test_unknown_datacenter_is_an_error(filled):
    client = kv.Client(settings(filled, datacenter="elsewhere"))
    with pytest.raises((BadResponse, Unreachable)):
        client.get(BUCKET + b"nobody", timeout=5)
    client.close()


def test_value_at_the_limit_of_consul_is_read(client, filled):
    value = b"x" * (512 * 1024)
    filled.kv_put("large/a", value)
    assert client.get(b"large/a", timeout=5).value == value


def test_hidden_key_is_forbidden_and_a_readable_key_is_found_or_absent(guarded):
    token = guarded.token('key_prefix "consul/" { policy = "read" }')
    client = kv.Client(settings(guarded, token=token))
    assert client.get(b"consul/alias/root", timeout=5).value == b"gilles"
    assert client.get(b"consul/alias/nobody", timeout=5) is None
    for key in (b"other/secret", b"other/nothing"):
        with pytest.raises(Forbidden) as caught:
            client.get(key, timeout=5)
        assert token not in str(caught.value)
    client.close()


def test_get_without_a_token_is_forbidden(guarded):
    client = kv.Client(settings(guarded))
    with pytest.raises(Forbidden):
        client.get(b"consul/alias/root", timeout=5)
    # Consul hides every key without reporting it: only a read of one key shows whether the list is empty.
    assert client.list(b"consul/", timeout=5) == []
    client.close()


def test_unknown_token_is_forbidden_for_every_kind_of_read(guarded):
    client = kv.Client(settings(guarded, token="00000000-0000-0000-0000-000000000001"))
    for read in (client.get, client.list, client.visible_keys):
        with pytest.raises(Forbidden):
            read(b"consul/alias", timeout=5)
    client.close()


def test_token_replaced_in_its_file_is_used_immediately(guarded, tmp_path):
    path = tmp_path / "token"
    first = guarded.token('key_prefix "consul/" { policy = "read" }')
    path.write_text(first + "\n")
    client = kv.Client(settings(guarded, token_file=str(path)))
    assert client.get(b"consul/alias/root", timeout=5).value == b"gilles"
    second = guarded.token('key_prefix "consul/" { policy = "read" }')
    guarded.revoke(first)
    path.write_text(second + "\n")
    assert client.get(b"consul/alias/root", timeout=5).value == b"gilles"
    client.close()


def test_consul_that_hangs_stops_or_restarts_is_unreachable_until_it_is_back(guarded):
    token = guarded.token('key_prefix "consul/" { policy = "read" }')
    client = kv.Client(settings(guarded, token=token))

    def expect_unreachable():
        begun = time.monotonic()
        with pytest.raises(Unreachable):
            client.get(b"consul/alias/root", timeout=0.5)
        assert time.monotonic() - begun < 1

    assert client.get(b"consul/alias/root", timeout=5).value == b"gilles"
    guarded.pause()
    expect_unreachable()
    guarded.resume()
    assert client.get(b"consul/alias/root", timeout=5).value == b"gilles"
    guarded.kill()
    expect_unreachable()
    guarded.start()
    assert client.get(b"consul/alias/root", timeout=5).value == b"gilles"
    client.close()


def test_plain_url_building_reads_another_key(filled):
    """The reason for escaping keys; if this fails, Consul has closed the hole."""
    url = f"http://{filled.address}/v1/kv/{BUCKET.decode()}../../../other/secret?raw"
    assert urllib.request.urlopen(url, timeout=5).read() == b"outside"


def test_unread_response_is_cheap_and_the_next_read_succeeds(client, filled):
    filled.kv_txn({f"unread/{number:04}": "x" * 4000 for number in range(2000)})
    index = index_of(client, b"unread/")
    for _ in range(3):
        with client.blocking_query(b"unread/", timeout=5) as response:
            assert (response.index, response.filtered) == (index, False)
        assert client.get(b"unread/0000", timeout=5).value == b"x" * 4000
