from __future__ import annotations

import base64
import os
import random
import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from table_consul import kv
from table_consul.errors import BadResponse, Forbidden, SourceError, TooLarge, Unreachable
from tests import fake_consul
from tests.consul.clients import GOOD, INVALID, ROOT, TRUE, each_version, failure
from tests.fake_consul import Answer, cut, entry, names

UNADDRESSABLE = [
    b"",
    b"/",
    b".",
    b"..",
    b"/a",
    b"a/",
    b"a//b",
    b"consul/alias/../../other/secret",
    b"consul/alias/a/../../../other/secret",
    b"../../../agent/self",
    b"a/./b",
    b"a/..",
    b"a\0b",
    b"a\nb",
    b"a\x7fb",
    b"a\xc2\x85b",
    b"a\xffb",
    b"\xed\xa0\x80",  # A lone surrogate.
    b"\xc0\xae\xc0\xae/x",  # `..` in overlong UTF-8.
]
ODD = [
    b"..%2f..%2fother%2fsecret",
    b"%2e%2e/%2e%2e/other/secret",
    b"consul/alias/root?raw",
    b"consul/alias/root?recurse",
    b"?keys",
    b"consul/alias/root#x",
    b"user+tag@example.org",
    b"[2001:db8::/32]",
    b"*.example.org",
    b"...",
    b"..a/b..",
    b"a;b=c&d",
    b" a ",
    b"a\\..\\b",
    b"~!$'()*,|{}^`\"<>",
    "gr\u00fc\u00dfe@\u00e9t\u00e9.example".encode(),
]


# Reads.


@each_version
def test_get_returns_the_entry_of_a_key(client, fake):
    assert client.get(ROOT, timeout=2) == kv.Pair(ROOT.decode(), b"gilles", fake.index)


@each_version
def test_get_of_an_absent_key_is_none(client):
    assert client.get(b"consul/alias/nobody", timeout=2) is None


@each_version
def test_empty_value_is_none_as_in_json(client, fake):
    fake.put(b"consul/domain/example.org", b"")
    pair = client.get(b"consul/domain/example.org", timeout=2)
    assert pair is not None
    assert pair.value is None


@each_version
def test_values_are_bytes_of_any_kind(client, fake):
    fake.put(ROOT, bytes(range(256)))
    assert client.get(ROOT, timeout=2).value == bytes(range(256))


@each_version
def test_list_returns_the_keys_below_a_prefix(client, fake):
    fake.put(b"consul/alias/a", None)
    fake.put(b"consul/domain/x", b"1")
    found = client.list(b"consul/alias/", timeout=2)
    assert found == [kv.Pair("consul/alias/a", None, 12), kv.Pair(ROOT.decode(), b"gilles", 11)]


@each_version
def test_list_of_an_empty_prefix_is_empty(client, fake):
    assert client.list(b"consul/domain/", timeout=2) == []


@each_version
def test_list_accepts_an_empty_prefix_and_one_without_a_slash(client):
    assert [pair.key for pair in client.list(b"", timeout=2)] == [ROOT]
    assert [pair.key for pair in client.list(b"consul/al", timeout=2)] == [ROOT]


@each_version
def test_list_with_hidden_entries_is_an_error_where_consul_reports_them(client, fake):
    fake.denied = (b"consul/alias/root",)
    if fake.since < (1, 11):
        assert client.list(b"consul/alias/", timeout=2) == []
        return
    with pytest.raises(Forbidden, match="hides keys under consul/alias/ from the token"):
        client.list(b"consul/alias/", timeout=2)


@each_version
def test_list_returns_keys_that_no_url_can_name(client, fake):
    fake.put(b"consul/alias/a//b\n", b"x")
    assert client.list(b"consul/alias/", timeout=2)[0].key == b"consul/alias/a//b\n"


@each_version
def test_keys_are_listed_in_order(client, fake):
    fake.put(b"consul/alias/a", None)
    assert client.visible_keys(b"consul/alias/", timeout=2) == ([b"consul/alias/a", ROOT], False)


@each_version
def test_keys_of_an_empty_prefix_are_none(client):
    assert client.visible_keys(b"consul/domain/", timeout=2) == ([], False)


@each_version
def test_hidden_keys_are_noted_where_consul_reports_them(client, fake):
    fake.denied = (ROOT,)
    assert client.visible_keys(b"consul/alias/", timeout=2) == ([], fake.since >= (1, 11))


@each_version
def test_large_page_arrives_whole(client, fake):
    for number in range(5000):
        fake.put(b"consul/alias/%d" % number, b"x" * 100)
    assert len(client.list(b"consul/", timeout=10)) == 5001


def test_client_never_writes(client, fake):
    with pytest.raises(NotImplementedError):
        client._library.kv.put("a", "b")
    with pytest.raises(NotImplementedError):
        client._library.kv.delete("a")
    assert fake.requests == []


# Keys remain data.


@pytest.mark.parametrize("key", UNADDRESSABLE)
def test_key_that_no_url_can_name_is_refused_before_any_request(client, fake, key):
    assert not kv.is_url_safe(key)
    with pytest.raises(ValueError, match="no URL can name"):
        client.get(key, timeout=1)
    assert fake.requests == []


@pytest.mark.parametrize("prefix", [b"/", b"a//", b"../", b"a/../", b"a\n/", b"\xff/"])
def test_prefix_that_no_url_can_name_is_refused_before_any_request(client, fake, prefix):
    with pytest.raises(ValueError, match="no URL can name"):
        client.list(prefix, timeout=1)
    with pytest.raises(ValueError, match="no URL can name"):
        client.visible_keys(prefix, timeout=1)
    assert fake.requests == []


@each_version
@pytest.mark.parametrize("key", ODD)
def test_unusual_key_is_read_unchanged(client, fake, key):
    assert kv.is_url_safe(key)
    if names.fault(fake.since, key) is not None:
        with pytest.raises(BadResponse, match="rejects the name of this key"):
            client.get(key, timeout=1)
        return
    assert client.get(key, timeout=1) is None
    fake.put(key, b"odd")
    assert client.get(key, timeout=1).value == b"odd"
    assert {request.key for request in fake.requests} == {key}
    assert {tuple(request.params) for request in fake.requests} == {()}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@example("a/%2e%2e/b")
@example("\u2028")
@given(st.text(min_size=1))
def test_no_key_changes_which_key_is_read(client, fake, text):
    fake.version, fake.disable_http_unprintable_char_filter = "1.8.7", True  # Otherwise Consul refuses some of them.
    key = b"consul/alias/" + text.encode("utf-8", "surrogatepass")
    fake.requests.clear()
    if not kv.is_url_safe(key):
        return
    fake.put(key, b"mine")
    assert client.get(key, timeout=2).key == key
    (request,) = fake.requests
    assert request.key == key
    assert set(request.target) <= set(string.ascii_letters + string.digits + "-._~/%")
    assert b"/" + key in request.path


def test_answer_for_another_key_is_refused(client, fake):
    fake.handle = lambda request: entry(b"consul/alias/eric", "Zg==")
    assert isinstance(failure(client), BadResponse)


@pytest.mark.parametrize("body", [b"[]", b'[{"Key":"consul/alias/root","Value":null,"ModifyIndex":1}]' * 2])
def test_answer_without_exactly_one_entry_is_refused(client, fake, body):
    fake.handle = lambda request: Answer(200, TRUE, body)
    assert isinstance(failure(client), BadResponse)


def test_entries_from_outside_the_prefix_are_refused(client, fake):
    fake.handle = lambda request: entry(b"other/secret", "Zg==")
    with pytest.raises(BadResponse, match="not below"):
        client.list(b"consul/", timeout=1)
    fake.handle = lambda request: Answer(200, TRUE, b'["consul/a", "other/secret"]')
    with pytest.raises(BadResponse, match="not below"):
        client.visible_keys(b"consul/", timeout=1)


@pytest.mark.parametrize("status", [301, 302, 303, 304, 307, 308])
def test_redirect_is_an_error_and_is_not_followed(client, fake, status):
    fake.put(b"other/secret", b"x")
    fake.handle = lambda request: Answer(status, {"Location": "/v1/kv/other/secret", **TRUE})
    assert isinstance(failure(client), BadResponse)
    assert len(fake.requests) == 1


# Absence must be proven.


@pytest.mark.parametrize("index", [None, "0", "-1", "x", "", "1.5", "\u00b2", "9" * 30])
@pytest.mark.parametrize("status", [200, 404])
def test_answer_without_a_valid_index_is_an_error(client, fake, status, index):
    answer = entry(ROOT, "Zg==", status=status)
    answer.headers = {"X-Consul-Knownleader": "true"} | ({} if index is None else {"X-Consul-Index": index})
    fake.handle = lambda request: answer
    assert isinstance(failure(client), BadResponse)
    with pytest.raises(BadResponse):
        client.list(b"consul/", timeout=1)


@pytest.mark.parametrize("consistency", ["default", "stale", "consistent"])
def test_404_without_a_leader_is_an_error(fake, connect, consistency):
    fake.handle = lambda request: Answer(404, {"X-Consul-Index": "5", "X-Consul-Knownleader": "false"})
    assert isinstance(failure(connect(fake.address, consistency=consistency)), Unreachable)


def test_404_with_cut_headers_is_an_error(client, fake):
    whole = Answer(404, TRUE).wire()
    for length in range(whole.index(b"true") + 4):
        fake.handle = cut(Answer(404, TRUE), length)
        with pytest.raises((BadResponse, Unreachable)):
            client.get(ROOT, timeout=1)


@each_version
def test_stale_data_without_a_leader_are_accepted_only_with_consistency_stale(fake, connect):
    fake.leader = False
    assert isinstance(failure(connect(fake.address)), Unreachable)
    assert connect(fake.address, consistency="stale").get(ROOT, timeout=1).value == b"gilles"
    fake.handle = lambda request: fake_consul.entry(ROOT, "Zg==", index="5")
    fake.handle = lambda request: Answer(200, TRUE | {"X-Consul-Knownleader": "false"}, entry(ROOT, "Zg==").body)
    assert isinstance(failure(connect(fake.address)), Unreachable)


@pytest.mark.parametrize("invalid", INVALID)
def test_invalid_response_is_an_error_in_time_and_the_next_request_succeeds(client, fake, invalid):
    fake.handle, kind = INVALID[invalid]
    error = failure(client, timeout=0.4)
    assert isinstance(error, kind)
    assert client.address in str(error)
    fake.handle = fake.consul
    assert client.get(ROOT, timeout=2).value == b"gilles"


def test_any_bytes_as_a_response_are_a_source_error(client, fake):
    choose = random.Random(7)
    whole = GOOD.wire()
    for _ in range(300):
        garbled = bytearray(whole)
        for _ in range(choose.randrange(1, 6)):
            garbled[choose.randrange(len(garbled))] = choose.randrange(256)
        fake.handle = lambda request, data=bytes(garbled): request.send(data)
        try:
            pair = client.get(ROOT, timeout=1)
        except SourceError:
            continue
        assert pair is None or pair.key == ROOT


def test_trickling_body_ends_at_the_deadline(client, fake):
    def handle(request):
        request.send(b"HTTP/1.1 200 OK\r\nX-Consul-Index: 5\r\nContent-Length: 1000000\r\n\r\n")
        while not request.stopping.wait(0.02):
            request.send(b" ")

    fake.handle = handle
    assert isinstance(failure(client, timeout=0.3), Unreachable)


def test_body_beyond_the_limit_is_refused(fake, connect):
    fake.put(ROOT, b"x" * 200)
    error = failure(connect(fake.address, limits={"body_bytes": 100}))
    assert isinstance(error, TooLarge)
    assert "more than" in str(error)


@pytest.mark.parametrize("version", ["1.21.5"])
def test_key_outside_the_alphabet_of_consul_1_21_5_causes_no_outage(client, fake):
    assert "1.21.5" in str(failure(client, b"consul/alias/user@example.org"))
    fake.put(b"consul/alias/user@example.org", b"x")
    assert len(client.list(b"consul/alias/", timeout=1)) == 2


def test_messages_escape_control_characters_and_bound_quotations(fake, connect):
    fake.handle = lambda request: Answer(403, {}, b"\x1b[2Jno\r\nway \xff" + b"x" * 5000)
    assert "\\x1b[2Jno way" in str(failure(connect(fake.address)))


def test_messages_contain_no_values(client, fake):
    secret = base64.b64encode(b"$6$salt$hash").decode()
    for answer in (Answer(200, {}, entry(ROOT, secret).body), Answer(200, TRUE, entry(ROOT, secret).body[:-1])):
        fake.handle = lambda request, answer=answer: answer
        assert secret[:8] not in str(failure(client))


# The client py-consul.


@pytest.mark.real
def test_tests_of_the_client_pass_under_py_consul(tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*pip, "--target", tmp_path, "py-consul"], check=True)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    found = [sys.executable, "-c", "import consul.base; print(consul.base.__file__)"]
    library = subprocess.run(found, env=environment, cwd=root, check=True, capture_output=True, text=True).stdout
    assert library.startswith(str(tmp_path))
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not real", "--no-cov"]
    folder = Path(__file__).parent
    tests += [
        str(folder / "test_kv_queries.py"),
        str(folder / "test_kv_tokens.py"),
        str(folder.parent / "ctl/test_txn.py"),
    ]
    done = subprocess.run(tests, env=environment, cwd=root, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
