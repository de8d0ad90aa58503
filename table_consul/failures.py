"""What went wrong with a request to Consul: an error status and its body, or an exchange that broke off."""

from __future__ import annotations

import http.client
import re
import ssl
import warnings

import urllib3.exceptions

from table_consul.errors import BadResponse, Forbidden, SourceError, Unreachable, printable

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about the versions of what it could use
    import requests

BROKEN = (OSError, urllib3.exceptions.HTTPError)  # What an exchange may raise; requests' errors are OSErrors.
# The words of Consul 1.8 to 2.0. Nothing else of an answer to a request with a token is quoted: a proxy may echo the
# token in any spelling. The names of keys and of tokens are left out.
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


class BadRequest(BadResponse):
    """Consul refuses this one request: another address would answer the same, and other requests may succeed."""


class TooManyConnections(Unreachable):
    """Consul takes no further connection from this host; those that are open go on, and fewer would do."""


class BadName(BadRequest):
    """Consul refuses the name of this key, whether there is such a key or not."""


def excerpt(body: bytes, *, token: bool) -> str:
    """Consul's own words in a body; of a request without a token, enough of any to recognise a proxy's page."""
    if words := _OWN_WORDS.findall(body[:1000]):
        return " ... ".join(word.decode() for word in dict.fromkeys(words))
    if body and token:
        return "(text not quoted: it may contain the token)"
    return printable(" ".join(body[:1000].decode(errors="backslashreplace").split()))


def refusal(consul: str, status: int, body: bytes, *, token: bool) -> SourceError:
    """The error for this status; ``consul`` names who answered, ``token``: the request had one."""
    said = f"{status} {excerpt(body, token=token)}".rstrip()
    if status in (401, 403):
        if "Access is restricted" in said:
            return Forbidden(f"{consul} refuses writes from this host: {said} (see its setting allow_write_http_from)")
        if "Endpoint is blocked" in said:
            return Forbidden(f"{consul}: {said} (see its setting http_config.block_endpoints)")
        if not token:
            return Forbidden(f"{consul}: {said} (no token is configured: set token_file)")
        return Forbidden(f"{consul} refuses the token: {said}")
    if "Enterprise feature" in said:
        setting = "partition" if "Partitions" in said else "namespace"
        return SourceError(f"{consul}: {said} (remove {setting} from the configuration)")
    # 1.21.5 refuses the `@` of mail addresses (hashicorp/consul#22835), later versions a blank at an end: were that an
    # outage, one recipient could stop the answers to all.
    if "invalid key name" in said.lower():
        hint = "rename the key, or set disable_kv_key_validation in Consul's configuration"
        if "should respect" in said:
            hint = "a limit of Consul 1.21.5: upgrade it, or set disable_http_unprintable_char_filter there"
        return BadName(f"{consul} refuses the name of this key: {said} ({hint})")
    if "too many concurrent connections" in said:
        return TooManyConnections(f"{consul}: {said} (see its setting limits.http_max_conns_per_client)")
    kind = Unreachable if status == 429 or status >= 500 else BadRequest if status >= 400 else BadResponse
    return kind(f"{consul}: {said}")


def broken_exchange(consul: str, error: Exception, *, fresh: bool = False) -> SourceError:
    """The error for an exchange that broke off; ``consul`` names who should have answered.

    ``fresh``: on a connection opened for it, at once. Consul 1.8 closes those beyond its limit without an answer.
    """
    cause = cause_of(error)
    if fresh and isinstance(cause, ConnectionResetError | BrokenPipeError | ssl.SSLEOFError):  # RemoteDisconnected too
        hint = "does this host have more than limits.http_max_conns_per_client connections?"
        return TooManyConnections(f"{consul}: {reason_of(cause)} ({hint})")
    ended = isinstance(cause, OSError | http.client.IncompleteRead)
    kind = BadResponse if isinstance(cause, http.client.HTTPException) and not ended else Unreachable
    return kind(f"{consul}: {reason_of(cause)}")


def cause_of(error: BaseException) -> BaseException:
    """The error of the socket, TLS or http.client below the wrappings of urllib3 and requests."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError | http.client.HTTPException) and not isinstance(inner, requests.RequestException):
            return inner
        inner = inner.__context__  # urllib3 gives some of its own errors no __cause__
    return error


def reason_of(error: BaseException) -> str:
    """What happened, for one line of an operator's log."""
    match error:
        case TimeoutError():
            return "no answer in time"
        case http.client.RemoteDisconnected():
            return "connection closed without an answer"
        case http.client.IncompleteRead():
            return "answer cut off"
        case http.client.HTTPException() | urllib3.exceptions.HTTPError():
            return f"no HTTP, or broken ({type(error).__name__})"
        case ssl.SSLCertVerificationError():
            return f"certificate verification failed: {error.verify_message}"
        case ssl.SSLError(reason="WRONG_VERSION_NUMBER"):
            return "the server did not speak TLS (should the address be http://?)"
        case OSError(strerror=str(text)):
            return text.lower()
    return printable(f"{type(error).__name__}: {error}")
