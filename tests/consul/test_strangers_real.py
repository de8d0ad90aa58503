"""Recipients, HELO names and AUTH users sent by strangers remain data: end to end against a real Consul."""

from __future__ import annotations

import pytest

from table_consul.services import DEFAULT_SERVICES, SERVICES
from tests.consul.test_kv_real import HOSTILE
from tests.dialogue import Child

pytestmark = pytest.mark.real

SECRET = "hunter2"
# Values of other keys: an answer with one of them shows that the wrong key was read.
OUTSIDE = {
    "other/secret": SECRET,
    "secret": SECRET,
    "consul/secret": SECRET,
    "consul/other/secret": SECRET,
    "other/alias/root": SECRET,
}


def is_valid_reply_value(key):
    """smtpd sends no line feed within a key (smtpd: table_proc.c), and no NUL, which ends its strings."""
    return b"\n" not in key and b"\0" not in key


KEYS = sorted(
    {key for key in (*HOSTILE, b"", b"/", b"root/", b"x//y", b"root?raw", b"root#x") if is_valid_reply_value(key)}
)


@pytest.fixture(params=["direct", "mirror"])
def child(request, consul, tmp_path):
    for key, value in OUTSIDE.items():
        consul.kv_put(key, value)
    for service in DEFAULT_SERVICES:
        consul.kv_put(f"consul/{service}/root", "1000:1000:/inside" if service == "userinfo" else "inside")
    path = tmp_path / "table-consul.toml"
    path.write_text(
        f'[consul]\naddress = "http://{consul.address}"\n'
        f'[defaults]\nmode = "{request.param}"\n[log]\ntarget = "stderr"\n'
    )
    with Child(str(path)) as made:
        made.handshake(b"consul")
        yield made


@pytest.mark.parametrize("service", DEFAULT_SERVICES)
def test_no_key_from_a_stranger_reads_another_key(child, service):
    name = service.encode()
    # Patterns match "root" as smtpd's do: in ROOT, or in the middle of a text.
    allowed = {b"not-found", b"error"} | ({b"found"} if SERVICES[service].patterns else set())
    wrong = []
    for number, key in enumerate(KEYS):
        for op in (b"lookup", b"check"):
            answer = child.ask(b"table|0.1|0|consul|%b|%b|%08x|%b" % (op, name, number, key))
            outcome, _, value = answer.removeprefix(b"%b-result|%08x|" % (op, number)).partition(b"|")
            if outcome not in allowed or (outcome == b"found" and value not in (b"", b"inside")):
                wrong.append((op, key, answer))
    assert wrong == []
    assert child.ask(b"table|0.1|0|consul|check|%b|ffffffff|root" % name) == b"check-result|ffffffff|found"
    child.wire.shutdown(1)
    assert SECRET not in child.log()
