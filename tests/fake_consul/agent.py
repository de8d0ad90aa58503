"""Responses of Consul's HTTP interface, by version."""

from __future__ import annotations

import gzip
import json
import re
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from tests.fake_consul import acl, names, txn
from tests.fake_consul.acl import Identity, Rules
from tests.fake_consul.messages import Answer, Request, text, to_json

if TYPE_CHECKING:
    from tests.fake_consul.server import FakeConsul

JSON = {"Content-Type": "application/json"}
MAX_BODY_BYTES = 512 * 1024
BUFFER_BYTES = 2048  # Go sends a longer body in chunks.


class Error(Exception):
    """An error response with a text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.answer = Answer(status, {"Content-Type": "text/plain; charset=utf-8"}, text.encode())


def answer(fake: FakeConsul, request: Request) -> Answer:
    """The response to a request, after all checks, with its body encoded."""
    if not (names.printable(request.path) or fake.disable_http_unprintable_char_filter):
        return Answer(400)
    location = names.redirect(fake.since, request.target)
    if location is not None:
        return _redirected(fake, request, location)
    base = b"/v1/kv/" if request.path.startswith(b"/v1/kv/") else request.path
    endpoint, *methods = ENDPOINTS.get(base, (None,))
    if endpoint is None:
        return _unknown(fake, request.path)
    try:
        found = _checked(fake, request, methods) or endpoint(fake, request)
    except Error as error:
        found = error.answer
    found.headers |= {"Vary": "Accept-Encoding"}
    if fake.since >= (1, 9):
        found.headers["X-Consul-Default-Acl-Policy"] = "deny" if fake.acl else "allow"
    least = 1400 if fake.since >= (1, 9) else 1
    if len(found.body) >= least and _accepts_gzip(request):
        found.headers["Content-Encoding"] = "gzip"
        found.body = gzip.compress(found.body)
    found.chunked = len(found.body) > BUFFER_BYTES
    return found


def _checked(fake: FakeConsul, request: Request, methods: list[str]) -> Answer | None:
    """The response of the endpoint, or the refusal of a request regardless of its key."""
    if request.path.startswith(fake.block_endpoints or (b"\0",)):
        raise Error(403, "Endpoint is blocked by agent configuration")
    writes = request.method not in {"GET", "HEAD", "OPTIONS"}
    if writes and not fake.write_allowed:
        raise Error(403, "Access is restricted")
    allow = {"Allow": ",".join(["OPTIONS", *methods])}
    if request.method == "OPTIONS":
        typed = {"Content-Type": "application/json; charset=utf-8"} if fake.since >= (1, 20) else {}
        return Answer(200, allow | typed)
    if request.method not in methods:
        error = Error(405, f"method {request.method} not allowed")
        error.answer.headers |= allow
        raise error
    if fake.rate_limited:
        raise Error(*_limit(fake.since, leader=writes))
    return None


def _limit(version: tuple[int, ...], *, leader: bool) -> tuple[int, str]:
    if version < (1, 15):
        return 429, "RPC rate limit exceeded"
    if leader:
        operation = "operation that can only be performed by the leader"
        return 503, f"rate limit exceeded for {operation}, try again later"
    return 429, "rate limit exceeded, try again later or against a different server"


def _accepts_gzip(request: Request) -> bool:
    return re.search(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))", request.headers.get("accept-encoding", "")) is not None


def _redirected(fake: FakeConsul, request: Request, location: str) -> Answer:
    status, name = (307, "Temporary Redirect") if fake.since >= (1, 22) else (301, "Moved Permanently")
    if request.method != "GET":
        return Answer(status, {"Location": location})
    page = f'<a href="{location.replace("&", "&amp;")}">{name}</a>.\n\n'.encode()
    return Answer(status, {"Content-Type": "text/html; charset=utf-8", "Location": location}, page)


def _unknown(fake: FakeConsul, path: bytes) -> Answer:
    if fake.since < (1, 11):
        return Answer(404)
    what = "not a recognized HTTP API endpoint"
    if not path.startswith(b"/v1/"):
        what = "if attempting to use the HTTP API, ensure the path starts with '/v1/'"
    return Error(404, f"Invalid URL path: {what}\n").answer


def _leader(fake: FakeConsul, _request: Request) -> Answer:
    return Answer(200, JSON.copy(), b'"127.0.0.1:8300"' if fake.leader else b'""')


def identify(fake: FakeConsul, request: Request) -> Identity:
    """The identity whose rules apply to a request."""
    secret = request.token
    if not fake.acl:
        return Identity(secret, None, fake.denied)
    if secret == fake.token is not None:
        return Identity(secret, None, fake.denied)
    if secret in {None, "anonymous"}:
        return Identity(secret, Rules(fake.tokens.get("anonymous", "")), fake.denied)
    if secret not in fake.tokens:
        raise Error(403, "ACL not found")
    return Identity(secret, Rules(fake.tokens[secret]), fake.denied)


def meta(fake: FakeConsul, index: int) -> dict[str, str]:
    """The headers of a read, found or not."""
    headers = {
        "X-Consul-Index": str(max(index, 1)),
        "X-Consul-Knownleader": "true" if fake.leader else "false",
        "X-Consul-Lastcontact": str(fake.last_contact),
    }
    return headers | ({"X-Consul-Query-Backend": "blocking-query"} if fake.since >= (1, 11) else {})


def _kv(fake: FakeConsul, request: Request) -> Answer:
    after, wait = _options(fake, request)
    key = names.key(fake.since, request.path)
    warning = _validate(fake, key)
    identity = identify(fake, request)
    if not fake.leader and "stale" not in request.params:
        raise Error(500, "No cluster leader")
    if request.method != "GET":
        found = _written(fake, request, identity, key)
    elif "recurse" in request.params or "keys" in request.params:
        found = _listed(fake, request, identity, key, after, wait)
    else:
        found = _single(fake, request, identity, key)
    found.headers |= warning
    return found


def _validate(fake: FakeConsul, key: bytes) -> dict[str, str]:
    """A header with a warning if an invalid name is accepted."""
    fault = names.fault(fake.since, key)
    if fault is None:
        return {}
    if fake.since == (1, 21, 5) and fake.disable_http_unprintable_char_filter:
        return {}
    if fake.since == (1, 21, 5) or not fake.disable_kv_key_validation:
        raise Error(500, fault)
    warning = f"KV key validation bypassed: {fault}. Consider enabling key validation for security."
    return {"X-Consul-Kv-Warning": warning}


def _options(fake: FakeConsul, request: Request) -> tuple[int, float]:
    """The index and the seconds of a wait."""
    params = request.params
    if "stale" in params and "consistent" in params:
        raise Error(400, "Cannot specify ?stale with ?consistent, conflicting semantics.")
    for name, plural in {"ns": "Namespaces", "partition": "Partitions"}.items():
        if name in params and (name == "ns" or fake.since >= (1, 11)):
            before = "" if fake.since >= (1, 11) else "Bad request: "
            raise Error(400, f'{before}Invalid query parameter: "{name}" - {plural} are a Consul Enterprise feature')
    if params.get("dc") not in {None, *fake.datacenters}:
        raise Error(500, "No path to datacenter")
    wait = re.fullmatch(r"([0-9.]+)(ms|s|m)", params.get("wait", "300s"))
    if wait is None:
        raise Error(400, "Invalid wait time")
    seconds = min(float(wait[1]) * {"ms": 0.001, "s": 1, "m": 60}[wait[2]], fake.max_query_time)
    if not params.get("index", "0").isdigit():
        raise Error(400, "Invalid index")
    return int(params.get("index", "0")), seconds * (1 + fake.jitter / 16)


def _single(fake: FakeConsul, request: Request, identity: Identity, key: bytes) -> Answer:
    if not key:
        raise Error(400, "Missing key name")
    if not identity.allows(key):
        raise Error(403, identity.refusal(fake.since, key))
    with fake.store.changed:
        entry, index = fake.store.entries.get(key), fake.store.index
    if entry is None:
        return Answer(404, meta(fake, index))
    headers = meta(fake, entry.modified)
    if "raw" in request.params:
        plain = "text/plain" if fake.since < (1, 20) else "text/plain; charset=utf-8"
        safe = {"Content-Security-Policy": "sandbox", "X-Content-Type-Options": "nosniff"}
        return Answer(200, headers | safe | {"Content-Type": plain}, entry.value or b"")
    return Answer(200, JSON | headers, to_json([entry.to_dict(key)]))


def _listed(fake: FakeConsul, request: Request, identity: Identity, prefix: bytes, after: int, wait: float) -> Answer:
    if fake.key_list_policy and not identity.allows(prefix, "list"):
        raise Error(403, identity.refusal(fake.since, prefix, "list"))
    end = time.monotonic() + wait
    if request.deadline is not None and not fake.closes_late:
        end = min(end, request.deadline)
    listing = fake.store.listed(prefix, after, end, request.stopping)
    if listing.timed_out and fake.wait_error is not None:
        raise Error(500, fake.wait_error)
    identity = replace(identity, denied=fake.denied)
    shown = {key: entry for key, entry in listing.entries.items() if identity.allows(key)}
    headers = meta(fake, listing.index)
    if len(shown) != len(listing.entries) and identity.named and fake.since >= (1, 11):
        headers["X-Consul-Results-Filtered-By-Acls"] = "true"
    if "keys" in request.params:
        keys = _rolled_up(shown, prefix, request.params.get("separator", "").encode())
        found: list[object] = [text(key) for key in keys]
    else:
        found = [entry.to_dict(key) for key, entry in shown.items()]
    if not found and (prefix or "keys" not in request.params):
        return Answer(404, headers)
    return Answer(200, JSON | headers, to_json(found))


def _written(fake: FakeConsul, request: Request, identity: Identity, key: bytes) -> Answer:
    params, tree = request.params, request.method == "DELETE" and "recurse" in request.params
    if not key and not tree:
        raise Error(400, "Missing key name")
    if request.method == "PUT":
        _fits(fake, request, "kv_max_value_size")
    if not identity.allows(key, "write"):
        raise Error(403, identity.refusal(fake.since, key, "write"))
    with fake.store.changed:
        old = fake.store.entries.get(key)
        stale = "cas" in params and int(params["cas"]) != (old.modified if old else 0)
        if request.method == "PUT" and not stale:
            fake.store.put(key, request.body, int(params.get("flags", "0")))
        elif request.method == "DELETE" and old is None:
            stale = False
        elif request.method == "DELETE" and not stale:
            fake.store.delete(key)
        if tree:
            fake.store.replace({each: old for each, old in fake.store.entries.items() if not each.startswith(key)})
    return Answer(200, JSON.copy(), b"false" if stale else b"true")


def _fits(fake: FakeConsul, request: Request, setting: str) -> None:
    if len(request.body) > MAX_BODY_BYTES:
        page = "https://www.consul.io/docs/agent/options.html"
        if fake.since >= (1, 20):
            page = "https://developer.hashicorp.com/docs/agent/config/config-files"
        size = f"Request body({len(request.body)} bytes) too large, max size: {MAX_BODY_BYTES} bytes"
        raise Error(413, f"{size}. See {page}#{setting}.")


def _transaction(fake: FakeConsul, request: Request) -> Answer:
    _fits(fake, request, "txn_max_req_len")
    try:
        count = len(json.loads(request.body))
    except ValueError:
        raise Error(400, "Failed to parse body: unexpected EOF") from None
    if count > txn.most(fake.since):
        raise Error(413, f"Transaction contains too many operations ({count} > {txn.most(fake.since)})")
    return txn.run(fake, identify(fake, request), request.body)


def _self(fake: FakeConsul, request: Request) -> Answer:
    secret = request.token
    found = secret is not None and (secret == "anonymous" or secret in fake.tokens)
    headers = meta(fake, fake.index)
    if not found:
        error = Error(403, "ACL not found" if fake.since < (1, 20) else "token does not exist: ACL not found")
        known = {} if fake.since < (1, 20) else {"X-Consul-Index": "1", "X-Consul-Knownleader": "false"}
        error.answer.headers |= headers | known
        raise error
    return Answer(200, JSON | headers, to_json(acl.token_info(secret, fake.tokens, fake.policies)))


def _authorize(fake: FakeConsul, request: Request) -> Answer:
    identity = identify(fake, request)
    asked = json.loads(request.body)
    return Answer(
        200,
        JSON.copy(),
        to_json([each | {"Allow": identity.allows(each["Segment"].encode(), each["Access"])} for each in asked]),
    )


def _rolled_up(keys: dict[bytes, object], prefix: bytes, separator: bytes) -> list[bytes]:
    """The keys up to the first separator after the prefix, each once."""
    if not separator:
        return list(keys)
    return list(dict.fromkeys(prefix + _head(key[len(prefix) :], separator) for key in keys))


def _head(name: bytes, separator: bytes) -> bytes:
    before, found, _ = name.partition(separator)
    return before + found


ENDPOINTS = {
    b"/v1/kv/": (_kv, "GET", "PUT", "DELETE"),
    b"/v1/txn": (_transaction, "PUT"),
    b"/v1/status/leader": (_leader, "GET"),
    b"/v1/acl/token/self": (_self, "GET"),
    b"/v1/internal/acl/authorize": (_authorize, "POST"),
}
