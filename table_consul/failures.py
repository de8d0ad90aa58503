"""The errors of requests to Consul, from an error status and its body, or from a broken connection."""

from __future__ import annotations

import http.client
import re
import ssl
import warnings

import urllib3.exceptions

from table_consul.errors import BadResponse, Forbidden, SourceError, Unreachable, printable

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about versions of optional dependencies
    import requests

BROKEN = (OSError, urllib3.exceptions.HTTPError)  # What a request may raise; requests' errors are OSErrors.
# The error texts of Consul 1.8 to 2.0. If the request has a token, no other text is quoted: a proxy may echo the token
# in any encoding. The names of keys and tokens are left out.
_OWN_WORDS = re.compile(
    rb"Permission denied(?:: anonymous token)?|lacks permission '(?:key|acl):(?:read|write|list)'|ACL not found"
    rb"|ACL support disabled|Access is restricted|Endpoint is blocked by agent configuration"
    rb'|Invalid query parameter: "(?:ns|partition)" - (?:Namespaces|Partitions) are a Consul Enterprise feature'
    rb"|Cannot specify \?stale with \?consistent|Invalid (?:index|wait time)|Missing key name|Failed to parse body"
    rb"|(?i:invalid key name)(?:, leading/trailing spaces are not allowed|, path traversal is not allowed|, keys should"
    rb" respect the)?|Request body(?=\(\d+ bytes\) too large)|Transaction contains too many operations"
    rb"|rate limit exceeded(?: for operation that can only be performed by the leader)?(?:, try again later)?"
    rb"(?: or against a different server)?|RPC rate limit exceeded|Your IP is issuing too many concurrent connections"
    rb"|No cluster leader|No path to datacenter|Not ready to serve consistent reads|No known Consul servers"
    rb"|rpc error (?:making call|getting client)|failed to get conn|i/o (?:deadline reached|timeout)|EOF"
    rb"|connection re(?:fused|set by peer)|leadership lost while committing log|node is not the leader"
)
# Go's HTTP server limits the headers of a request, and a proxy its URL. Only the key makes a request this long.
_TOO_LONG = (414, 431)
# By words of Consul's errors.
NO_LEADER = "start a majority of the servers"
_HINTS = {
    "No known Consul servers": "join this agent to the servers",
    "leader|rpc error": NO_LEADER,
    "rate limit": "raise limits in Consul's configuration",
}


class BadRequest(BadResponse):
    """Consul rejects this request. Another address would reject it too; other requests may succeed."""


class TooManyConnections(Unreachable):
    """Consul accepts no further connections from this host; open ones still work."""


class BadName(BadRequest):
    """Consul rejects the name of this key, whether the key exists or not."""


def excerpt(body: bytes, *, token: bool) -> str:
    """The error text of Consul in a body. Without a token, other text is quoted too, to identify a proxy's page."""
    if words := _OWN_WORDS.findall(body[:1000]):
        return " ... ".join(word.decode() for word in dict.fromkeys(words))
    if body and token:
        return "(text not quoted: it may contain the token)"
    return printable(" ".join(body[:1000].decode(errors="backslashreplace").split()))


def refusal(consul: str, status: int, body: bytes, *, token: bool) -> SourceError:
    """The error for this status. ``consul`` names the server; ``token``: the request had a token."""
    reply = f"{status} {excerpt(body, token=token)}".rstrip()
    if status in (401, 403):
        if "Access is restricted" in reply:
            return Forbidden(f"{consul} rejects writes from this host: {reply}", "add it to allow_write_http_from")
        if "Endpoint is blocked" in reply:
            return Forbidden(f"{consul}: {reply}", "check http_config.block_endpoints")
        if not token:
            return Forbidden(f"{consul}: {reply}", "no token is configured: set token_file")
        return Forbidden(f"{consul} rejects the token: {reply}")
    if "Enterprise feature" in reply:
        setting = "partition" if "Partitions" in reply else "namespace"
        return SourceError(f"{consul}: {reply}", f"remove {setting} from the configuration")
    # 1.21.5 rejects the `@` of mail addresses (hashicorp/consul#22835), later versions a leading or trailing blank. If
    # this counted as an outage, one recipient could block the lookups of all others.
    if "invalid key name" in reply.lower():
        hint = "rename the key, or set disable_kv_key_validation in Consul's configuration"
        if "should respect" in reply:
            hint = "upgrade Consul 1.21.5, or set disable_http_unprintable_char_filter in its configuration"
        return BadName(f"{consul} rejects the name of this key: {reply}", hint)
    if status == 400 and not body:  # Consul's filter of unprintable characters; its other responses have a text
        return BadName(f"{consul} rejects the name of this key: {reply}", "remove unprintable characters from it")
    if status in _TOO_LONG:
        return BadName(f"{consul} rejects the name of this key: {reply}", "shorten it")
    if "too many concurrent connections" in reply:
        return TooManyConnections(f"{consul}: {reply}", "raise limits.http_max_conns_per_client")
    kind = Unreachable if status == 429 or status >= 500 else BadRequest if status >= 400 else BadResponse
    return kind(f"{consul}: {reply}", next((hint for words, hint in _HINTS.items() if re.search(words, reply)), ""))


def broken_exchange(consul: str, error: Exception, *, fresh: bool = False) -> SourceError:
    """The error for a broken connection; ``consul`` names the server.

    ``fresh``: the connection was new, and broke soon. Consul 1.8 closes connections beyond its limit without a
    response.
    """
    cause = cause_of(error)
    if fresh and isinstance(cause, ConnectionResetError | BrokenPipeError | ssl.SSLEOFError):  # RemoteDisconnected too
        hint = "this host may have too many connections: check limits.http_max_conns_per_client"
        return TooManyConnections(f"{consul}: {reason_of(cause)}", hint)
    ended = isinstance(cause, OSError | http.client.IncompleteRead)
    kind = BadResponse if isinstance(cause, http.client.HTTPException) and not ended else Unreachable
    return kind(f"{consul}: {reason_of(cause)}", _tls_hint(cause))


def _tls_hint(error: BaseException) -> str:
    match error:
        case ssl.SSLCertVerificationError():
            return "check ca_file and tls_server_name"
        case ssl.SSLError(reason="WRONG_VERSION_NUMBER"):
            return "should the address be http://?"
    return ""


def cause_of(error: BaseException) -> BaseException:
    """The error of the socket, TLS or http.client that urllib3 and requests wrap."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError | http.client.HTTPException) and not isinstance(inner, requests.RequestException):
            return inner
        inner = inner.__context__  # urllib3 gives some of its own errors no __cause__
    return error


def reason_of(error: BaseException) -> str:
    """The reason, as part of one log line."""
    match error:
        case TimeoutError():
            return "no answer in time"
        case http.client.RemoteDisconnected():
            return "connection closed without a response"
        case http.client.IncompleteRead():
            return "response truncated"
        case http.client.HTTPException() | urllib3.exceptions.HTTPError():
            return f"invalid HTTP response ({type(error).__name__})"
        case ssl.SSLCertVerificationError():
            return f"certificate verification failed: {error.verify_message}"
        case ssl.SSLError(reason="WRONG_VERSION_NUMBER"):
            return "the server did not speak TLS"
        case OSError(strerror=str(text)):
            return text.lower()
    return printable(f"{type(error).__name__}: {error}")
