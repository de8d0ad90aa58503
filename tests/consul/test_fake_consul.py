"""Behaviour of the fake that the recorded responses do not cover: other versions, waits, timeouts, settings."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time

import pytest

from tests.fake_consul import VERSIONS, FakeConsul

READ_ALL = 'key_prefix "t/" { policy = "read" }'
CHARSET = r'invalid key name, keys should respect the "^[a-zA-Z0-9,_./\\-?&=]+$" format'
BLANKS = "invalid key name, leading/trailing spaces are not allowed"
TRAVERSAL = "invalid key name, path traversal is not allowed"


@pytest.fixture
def fake(request):
    with FakeConsul(version=getattr(request, "param", "1.22")) as fake:
        fake.put(b"t/a", b"x")
        yield fake


def versions(*chosen):
    return pytest.mark.parametrize("fake", chosen or VERSIONS, indirect=True)


def ask(fake, path, method="GET", *, body=b"", token=None):
    """Status, headers and body of one request on a new connection."""
    headers = {} if token is None else {"X-Consul-Token": token}
    with contextlib.closing(http.client.HTTPConnection(fake.address.removeprefix("http://"), timeout=5)) as connection:
        connection.request(method, path, body or None, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()


def text(fake, path, method="GET"):
    status, _, body = ask(fake, path, method)
    return status, body


def keys(fake, path, **options):
    """The keys of a list, and whether Consul hides some."""
    status, headers, body = ask(fake, path, **options)
    assert status in {200, 404}
    return json.loads(body or "[]"), "X-Consul-Results-Filtered-By-Acls" in headers


def index(fake, path="/v1/kv/t/?keys"):
    return int(ask(fake, path)[1]["X-Consul-Index"])


@contextlib.contextmanager
def later(action, *arguments):
    timer = threading.Timer(0.05, action, arguments)
    timer.start()
    yield
    timer.join()


# Names.


@versions("1.21.5")
@pytest.mark.parametrize(
    "name", ["u@example.org", "a+b", "a:b", "*", "a%25b", "a%20b", "~a", "%C3%A9", "a..b", "..%2f.."]
)
def test_consul_1_21_5_refuses_names_outside_its_alphabet(fake, name):
    for method in ("GET", "PUT", "DELETE"):
        assert text(fake, f"/v1/kv/t/{name}", method) == (500, CHARSET)
    assert text(fake, f"/v1/kv/t/{name}?recurse") == (500, CHARSET)
    assert text(fake, f"/v1/kv/t/{name}?keys") == (500, CHARSET)


@versions("1.21.5")
def test_consul_1_21_5_accepts_any_name_without_its_path_filter(fake):
    fake.disable_kv_key_validation = True
    assert text(fake, "/v1/kv/t/u@example.org") == (500, CHARSET)
    fake.disable_http_unprintable_char_filter = True
    assert text(fake, "/v1/kv/t/u@example.org") == (404, "")


@versions("1.22", "1.22.4")
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("a%20", BLANKS),
        ("u%2520x", BLANKS),
        ("x%252e%252ey", TRAVERSAL),
        ("a..b%2541", TRAVERSAL),
        ("..%2f..%2f..%2fa", TRAVERSAL),
        ("a..b", None),
        ("%20a", None),
        ("u%25zz%2520x", None),
        ("u@example.org", None),
    ],
)
def test_consul_1_22_refuses_names_with_blanks_or_traversal(fake, name, fault):
    expected = (404, "") if fault is None else (500, fault)
    assert text(fake, f"/v1/kv/t/{name}") == text(fake, f"/v1/kv/t/{name}?recurse") == expected


@versions("1.22", "1.22.4")
def test_consul_1_22_accepts_any_name_without_validation_and_warns(fake):
    fake.disable_http_unprintable_char_filter = True
    assert text(fake, "/v1/kv/t/a%20") == (500, BLANKS)
    fake.disable_kv_key_validation = True
    status, headers, _ = ask(fake, "/v1/kv/t/a%20")
    assert (status, headers["X-Consul-Kv-Warning"].startswith(f"KV key validation bypassed: {BLANKS}.")) == (404, True)
    assert "X-Consul-Kv-Warning" not in ask(fake, "/v1/kv/t/a")[1]


@versions("1.21.5", "1.22", "1.22.4")
def test_escaped_dots_are_normalized_to_another_key(fake):
    status, _, body = ask(fake, "/v1/kv/u/%2e%2e/t/a")
    assert (status, json.loads(body)[0]["Key"]) == (200, "t/a")
    assert keys(fake, "/v1/kv/u/..%2ft/?keys")[0] == ["t/a"]


@versions()
def test_no_version_reads_a_path_with_plain_dots(fake):
    status, headers, _ = ask(fake, "/v1/kv/u/../t/a")
    assert (status, headers["Location"]) == (307 if fake.since >= (1, 22) else 301, "/v1/kv/t/a")


@versions()
def test_transaction_accepts_keys_that_no_url_can_name(fake):
    names = [" a", "b//c", "d/../e", "u%20x"]
    operations = [{"KV": {"Verb": "set", "Key": f"t/{name}", "Value": "eA=="}} for name in names]
    assert ask(fake, "/v1/txn", "PUT", body=json.dumps(operations).encode())[0] == 200
    assert keys(fake, "/v1/kv/t/?keys")[0] == sorted(["t/a", *(f"t/{name}" for name in names)])


# Access.


@versions()
def test_hidden_keys_are_reported_since_1_11_to_requests_with_a_token(fake):
    fake.tokens = dict.fromkeys(("anonymous", "s3cret"), READ_ALL + '\nkey "t/vip" { policy = "deny" }')
    fake.put(b"t/vip", b"x")
    for query in ("recurse", "keys", "keys&separator=/"):
        for token, reported in (("s3cret", fake.since >= (1, 11)), ("anonymous", False), (None, False)):
            headers = ask(fake, f"/v1/kv/t/?{query}", token=token)[1]
            assert ("X-Consul-Results-Filtered-By-Acls" in headers) is reported
    assert "X-Consul-Results-Filtered-By-Acls" not in ask(fake, "/v1/kv/t/vip", token="s3cret")[1]


@versions()
def test_rule_of_the_key_wins_over_the_longest_prefix(fake):
    fake.tokens["s3cret"] = READ_ALL + '\nkey_prefix "t/b/" { policy = "deny" }\nkey "t/b/c" { policy = "read" }'
    for key in (b"t/b/c", b"t/b/cd"):
        fake.put(key, b"x")
    assert keys(fake, "/v1/kv/t/?keys", token="s3cret")[0] == ["t/a", "t/b/c"]
    assert [ask(fake, f"/v1/kv/t/b/{name}", token="s3cret")[0] for name in ("c", "cd")] == [200, 403]


@versions()
def test_changed_rules_move_no_index_and_end_no_wait(fake):
    fake.tokens["s3cret"] = READ_ALL + '\nkey "t/a" { policy = "deny" }'
    fake.put(b"t/b", b"x")
    before = index(fake)
    with later(fake.tokens.update, {"s3cret": READ_ALL}):
        waited = keys(fake, f"/v1/kv/t/?keys&index={before}&wait=200ms", token="s3cret")
    assert waited == (["t/b"], fake.since >= (1, 11))
    assert keys(fake, "/v1/kv/t/?keys", token="s3cret") == (["t/a", "t/b"], False)
    assert index(fake) == before


@versions()
def test_list_policy_refuses_a_list_without_the_list_permission(fake):
    fake.key_list_policy = True
    fake.tokens["s3cret"] = READ_ALL
    status, _, body = ask(fake, "/v1/kv/t/?keys", token="s3cret")
    assert (status, "key:list" in body) == (403, fake.since >= (1, 12))
    fake.tokens["s3cret"] = READ_ALL.replace("read", "list")
    assert keys(fake, "/v1/kv/t/?keys", token="s3cret") == (["t/a"], False)


@versions()
def test_refusals_name_the_key_since_1_12(fake):
    fake.denied = (b"t/a",)
    assert ("t/a" in ask(fake, "/v1/kv/t/a", token="s3cret")[2]) is (fake.since >= (1, 12))


# Waits.


@versions()
def test_wait_ends_only_with_a_change_below_its_prefix(fake):
    fake.put(b"u/a", b"x")
    before = index(fake)
    with later(fake.put, b"u/a", b"y"):
        began = time.monotonic()
        assert index(fake, f"/v1/kv/t/?keys&index={before}&wait=200ms") == before
        assert time.monotonic() - began >= 0.2
    with later(fake.put, b"t/a", b"y"):
        assert index(fake, f"/v1/kv/t/?keys&index={before}&wait=5s") == fake.index


@versions()
def test_index_of_a_prefix_outlives_a_deletion_but_not_its_tombstone(fake):
    fake.put(b"t/b", b"x")
    fake.delete(b"t/b")
    assert index(fake) == fake.index
    fake.store.reap()
    assert index(fake) == fake.index - 2
    fake.delete(b"t/a")
    fake.put(b"u", b"x")
    assert index(fake) == fake.index - 1
    fake.store.reap()
    assert index(fake) == fake.index


@pytest.mark.parametrize(("jitter", "least"), [(0.0, 0.16), (1.0, 0.17)])
def test_wait_is_prolonged_by_at_most_a_sixteenth(fake, jitter, least):
    fake.jitter = jitter
    began = time.monotonic()
    ask(fake, f"/v1/kv/t/?keys&index={fake.index}&wait=160ms")
    assert time.monotonic() - began >= least


def test_wait_is_bounded_by_max_query_time(fake):
    fake.max_query_time = 0.05
    assert ask(fake, f"/v1/kv/t/?keys&index={fake.index}&wait=10m")[0] == 200


def test_wait_without_news_may_end_with_an_error(fake):
    fake.wait_error = "rpc error making call: i/o deadline reached"
    assert text(fake, f"/v1/kv/t/?keys&index={fake.index}&wait=10ms") == (500, fake.wait_error)
    assert ask(fake, "/v1/kv/t/?keys")[0] == 200


# Timeouts of the HTTP server.


def test_only_consul_1_22_4_limits_the_time_of_an_answer_by_default():
    limits = {}
    for version in VERSIONS:
        with FakeConsul(version=version) as fake:
            limits[version] = fake.write_timeout
    assert limits == {"1.8.7": None, "1.21.5": None, "1.22": None, "1.22.4": 30.0}


@pytest.mark.parametrize("late", [False, True])
def test_answer_after_the_write_timeout_is_a_closed_connection(fake, late):
    fake.write_timeout, fake.closes_late = 0.1, late
    began = time.monotonic()
    with pytest.raises(http.client.RemoteDisconnected):
        ask(fake, f"/v1/kv/t/?keys&index={fake.index}&wait=300ms")
    assert (time.monotonic() - began >= 0.3) is late
    assert ask(fake, f"/v1/kv/t/?keys&index={fake.index}&wait=10ms")[0] == 200


def test_connection_without_requests_closes_after_the_idle_timeout(fake):
    fake.idle_timeout = 0.05
    with contextlib.closing(http.client.HTTPConnection(fake.address.removeprefix("http://"), timeout=5)) as connection:
        connection.request("GET", "/v1/kv/t/a")
        connection.getresponse().read()
        assert connection.sock.recv(1) == b""


# Limits.


@versions()
def test_requests_over_the_limit_are_refused_writes_by_the_leader(fake):
    fake.rate_limited = True
    read, written = text(fake, "/v1/kv/t/a"), text(fake, "/v1/kv/t/a", "PUT")
    if fake.since < (1, 15):
        assert read == written == (429, "RPC rate limit exceeded")
    else:
        assert read == (429, "rate limit exceeded, try again later or against a different server")
        assert written[0] == 503


@versions()
def test_transaction_has_at_most_64_operations_and_128_since_1_14(fake):
    most = 64 if fake.since < (1, 14) else 128
    for count, status in ((most, 200), (most + 1, 413)):
        operations = [{"KV": {"Verb": "get", "Key": "t/a"}}] * count
        assert ask(fake, "/v1/txn", "PUT", body=json.dumps(operations).encode())[0] == status


@versions()
def test_transaction_with_a_conflict_changes_nothing(fake):
    operations = [
        {"KV": {"Verb": "set", "Key": "t/b", "Value": "eA=="}},
        {"KV": {"Verb": "cas", "Key": "t/a", "Value": "eQ==", "Index": 1}},
        {"KV": {"Verb": "delete-cas", "Key": "t/a", "Index": 1}},
    ]
    status, _, body = ask(fake, "/v1/txn", "PUT", body=json.dumps(operations).encode())
    assert (status, [each["OpIndex"] for each in json.loads(body)["Errors"]]) == (409, [1, 2])
    assert keys(fake, "/v1/kv/t/?keys")[0] == ["t/a"]
