"""Messages for requests that Consul refuses, and how much of its response they quote."""

from __future__ import annotations

import base64
import urllib.parse

import pytest

from table_consul import kv
from table_consul.errors import BadName, BadRequest, BadResponse, Forbidden, SourceError, Unreachable
from tests.consul.clients import ROOT, TRUE, failure
from tests.fake_consul import Answer, FakeConsul, entry

TOKEN = "8a4c19f2-77b0-4d3e-9b61-0c5d2e7fa835"


@pytest.fixture
def answered(fake, connect):
    """The error of a read that gets this response, with or without a token."""

    def make(status, text, token=TOKEN):
        fake.handle = lambda request: Answer(status, {}, text.encode())
        return failure(connect(fake.address, token=token))

    return make


# Names of keys.

LATER = "rename the key, or set disable_kv_key_validation in Consul's configuration"


@pytest.mark.parametrize(
    ("version", "name", "words", "hint"),
    [
        ("1.21.5", b"user@example.org", "keys should respect the", "upgrade Consul 1.21.5"),
        ("1.22", b"root ", "leading/trailing spaces are not allowed", LATER),
        ("1.22", b"u%20x", "leading/trailing spaces are not allowed", LATER),
        ("1.22", b"x%2e%2ey", "path traversal is not allowed", LATER),
    ],
)
def test_refused_name_is_reported_with_the_reason_of_consul(connect, version, name, words, hint):
    with FakeConsul(version=version) as fake:
        error = failure(connect(fake.address), b"consul/alias/" + name)
    assert isinstance(error, BadName)
    text = str(error)
    assert f"rejects the name of this key: 500 invalid key name, {words}" in text
    assert hint in text
    assert ("disable_http_unprintable_char_filter" in text) == (version == "1.21.5")
    assert name.decode() not in text


# What a real 1.8.7 and a real 1.22 answered: the path, the status, a header and the body.
REDIRECTED = (301, {"Location": "/v1/kv/other/secret"}, b'<a href="/v1/kv/other/secret">Moved Permanently</a>.\n\n')
OTHER = b'[{"LockIndex":0,"Key":"other/secret","Flags":0,"Value":"cw==","CreateIndex":29,"ModifyIndex":29}]'
CLEANED = (200, TRUE, OTHER)
ROOT_CLEANED = (200, TRUE, OTHER.replace(b"other/secret", b"aliases/alias/root"))
RECORDED = [
    ("..%2f..%2fother%2fsecret", REDIRECTED),
    ("%2e%2e/%2e%2e/other/secret", REDIRECTED),
    ("../../other/secret", REDIRECTED),
    ("/root", REDIRECTED),
    ("..%2f..%2fother%2fsecret", CLEANED),
    ("%2e%2e/%2e%2e/other/secret", CLEANED),
    ("../../other/secret", (307, *REDIRECTED[1:])),
    ("./root", (307, *REDIRECTED[1:])),
    ("%2Froot", ROOT_CLEANED),
]


@pytest.mark.parametrize(("path", "recorded"), RECORDED)
def test_name_that_consul_normalizes_is_not_sent_and_its_answer_is_an_error(fake, connect, path, recorded):
    client = connect(fake.address)
    fake.handle = lambda request: Answer(*recorded)
    for name in (path, urllib.parse.unquote(path)):
        key = b"aliases/alias/" + name.encode()
        fake.requests.clear()
        if not kv.is_url_safe(key):
            with pytest.raises(ValueError, match="no URL can name"):
                client.get(key, timeout=1)
            assert fake.requests == []
            continue
        assert isinstance(failure(client, key), BadResponse)
        assert {request.path for request in fake.requests} == {b"/v1/kv/" + key}
        assert path not in fake.requests[-1].target
    assert isinstance(failure(client, b"aliases/alias/nobody"), BadResponse)


# Statuses.


def test_403_with_a_token_is_forbidden(answered):
    text = "Permission denied: token with AccessorID '5c1b' lacks permission 'key:read' on \"aliases/alias/vera@x\""
    error = answered(403, text)
    assert isinstance(error, Forbidden)
    assert str(error).endswith("denies the token access: 403 Permission denied ... lacks permission 'key:read'")


def test_403_for_an_unknown_token_is_forbidden(answered):
    for text in ("ACL not found", "token does not exist: ACL not found"):
        error = answered(403, text)
        assert isinstance(error, Forbidden)
        assert str(error).endswith("rejects the token: 403 ACL not found")


@pytest.mark.parametrize("text", ["Permission denied", "ACL not found", ""])
def test_403_without_a_token_reports_the_missing_token(answered, text):
    error = answered(403, text, token=None)
    assert isinstance(error, Forbidden)
    assert f"403 {text}".strip() in str(error)
    assert "no token is configured" in str(error)
    assert "rejects the token" not in str(error)


@pytest.mark.parametrize("token", [None, TOKEN])
@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("Access is restricted", "allow_write_http_from"),
        ("Endpoint is blocked by agent configuration", "http_config.block_endpoints"),
    ],
)
def test_403_due_to_an_agent_setting_names_the_setting_and_no_token(answered, text, setting, token):
    error = answered(403, text, token)
    assert isinstance(error, Forbidden)
    assert f"403 {text}" in str(error)
    assert setting in str(error)
    assert "token" not in str(error)


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (429, "rate limit exceeded, try again later or against a different server"),
        (429, "RPC rate limit exceeded"),
        (429, "Your IP is issuing too many concurrent connections"),
        (503, "rate limit exceeded for operation that can only be performed by the leader, try again later"),
        (500, "No cluster leader"),
        (500, "rpc error making call ... i/o deadline reached"),
    ],
)
def test_limits_and_outages_are_quoted_and_fail_over(answered, fake, connect, status, text):
    error = answered(status, text.replace(" ... ", ": "))
    assert isinstance(error, Unreachable)
    assert f": {status} {text}" in str(error)
    with FakeConsul() as other:
        other.put(ROOT, b"gilles")
        assert connect(fake.address, other.address, token=TOKEN).get(ROOT, timeout=1).value == b"gilles"


@pytest.mark.parametrize("token", [None, TOKEN])
def test_http_to_a_tls_port_is_reported_with_a_hint_and_fails_over(answered, fake, connect, token):
    error = answered(400, "Client sent an HTTP request to an HTTPS server.\n", token)
    assert ": 400 Client sent an HTTP request to an HTTPS server" in str(error)
    assert str(error).endswith("(should the address be https://?)")
    with FakeConsul() as other:
        other.put(ROOT, b"gilles")
        assert connect(fake.address, other.address, token=token).get(ROOT, timeout=1).value == b"gilles"


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("namespace", 'Bad request: Invalid query parameter: "ns" - Namespaces are a Consul Enterprise feature'),
        ("partition", 'Invalid query parameter: "partition" - Partitions are a Consul Enterprise feature'),
    ],
)
def test_enterprise_setting_is_named(answered, setting, text):
    error = answered(400, text)
    assert not isinstance(error, BadRequest | Unreachable)  # neither about one key nor an outage
    assert f"400 {text.removeprefix('Bad request: ')} (remove {setting} from the configuration)" in str(error)


def test_partition_ignored_by_an_old_consul_is_logged_once(connect, caplog):
    with FakeConsul(version="1.8.7") as fake:
        fake.put(ROOT, b"gilles")
        client = connect(fake.address, partition="mail")
        for _ in range(3):
            assert client.get(ROOT, timeout=1).value == b"gilles"
    lines = [record.getMessage() for record in caplog.records]
    assert ["ignores partition = mail" in line for line in lines] == [True]


def test_partition_of_an_enterprise_server_is_not_logged(fake, connect, caplog):
    answer = entry(ROOT, "Zg==")
    answer.headers["X-Consul-Query-Backend"] = "blocking-query"
    fake.handle = lambda request: answer
    assert connect(fake.address, partition="mail").get(ROOT, timeout=1).value == b"f"
    assert caplog.records == []


# Secrets.

SPELLINGS = [
    TOKEN,
    TOKEN.upper(),
    TOKEN.replace("-", ""),
    TOKEN[:-1],
    TOKEN[1:],
    TOKEN[::-1],
    f"x{TOKEN}x",
    "".join(f"%{ord(character):02x}" for character in TOKEN),
    "".join(f"&#{ord(character)};" for character in TOKEN),
    base64.b64encode(TOKEN.encode()).decode(),
    TOKEN.encode().hex(),
    " ".join(TOKEN),
    TOKEN.replace("-", "\n"),
]
AROUND = [
    "<html><title>Bad Gateway</title>{}",
    "{}",
    "Permission denied: token with AccessorID '{}' lacks permission 'key:read' on \"{}\"",
    "rpc error making call: {}: EOF",
    "invalid key name, {}",
    'Invalid query parameter: "{}" - Namespaces are a Consul Enterprise feature',
    "Request body({} bytes) too large, max size: {} bytes",
]


def shared(text, spelling, length=6):
    """Parts of the encoded token that occur in the text."""
    return [
        spelling[at : at + length] for at in range(len(spelling) - length + 1) if spelling[at : at + length] in text
    ]


@pytest.mark.parametrize("status", [200, 202, 301, 400, 401, 403, 404, 413, 429, 500, 502, 503])
@pytest.mark.parametrize("around", AROUND)
def test_no_part_of_an_echoed_token_is_quoted(fake, connect, status, around):
    client = connect(fake.address, token=TOKEN)
    for spelling in SPELLINGS:
        body = around.replace("{}", spelling).encode()
        fake.handle = lambda request, body=body: Answer(status, {}, body)
        with pytest.raises(SourceError) as caught:
            client.get(ROOT, timeout=1)
        assert shared(str(caught.value).replace("\\n", "\n"), spelling) == []


def test_proxy_page_is_quoted_if_no_token_was_sent(answered):
    assert "502 <html><title>Bad Gateway" in str(answered(502, "<html><title>Bad Gateway</title>", token=None))
    assert "502 (text not quoted" in str(answered(502, "<html><title>Bad Gateway</title>"))


def test_values_in_an_unexpected_response_are_not_quoted(fake, connect):
    secret = base64.b64encode(b"$6$salt$hash").decode()
    fake.handle = lambda request: Answer(200, {}, entry(ROOT, secret).body)
    for token in (None, TOKEN):
        assert secret[:8] not in str(failure(connect(fake.address, token=token)))
