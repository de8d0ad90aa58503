"""Direct mode against each version of Consul: absence, permissions and unusual key names."""

from __future__ import annotations

import contextlib
import time

import pytest
from msgspec.structs import replace

from table_consul import kv
from table_consul.config import ConsulConfig
from table_consul.errors import Forbidden, SourceError
from table_consul.services import SERVICES, Table
from table_consul.sources.direct import DirectSource
from tests.consul.clients import TRUE
from tests.fake_consul import VERSIONS, Answer, FakeConsul

TABLE = Table("aliases", prefix="mail", deadline=2.0)
ALIAS, USERS = b"mail/aliases/alias/", b"mail/aliases/userinfo/"
READ = 'key_prefix "mail/" { policy = "read" }'


@pytest.fixture(params=VERSIONS)
def fake(request):
    with FakeConsul(version=request.param) as fake:
        fake.put(ALIAS + b"root", b"gilles")
        fake.put(b"mail/other/secret", b"secret")
        yield fake


@pytest.fixture
def direct(fake):
    source = DirectSource(kv.Client(ConsulConfig(addresses=(fake.address,), token="s3cret")))
    yield source
    source.close()


def lookup(direct, key, service="alias"):
    return direct.entries(TABLE, SERVICES[service], key, time.monotonic() + TABLE.deadline).lookup(key)


def test_entry_is_found_and_an_absent_key_is_not(direct):
    assert (lookup(direct, b"root"), lookup(direct, b"nobody")) == (b"gilles", None)


def test_denied_key_is_an_error_and_its_neighbours_are_not(direct, fake):
    fake.tokens["s3cret"] = f'{READ}\nkey "mail/aliases/alias/vip" {{ policy = "deny" }}'
    for _ in range(2):
        with pytest.raises(Forbidden):
            lookup(direct, b"vip")
        fake.put(ALIAS + b"vip", b"x")
    assert (lookup(direct, b"root"), lookup(direct, b"nobody")) == (b"gilles", None)


def test_unknown_token_is_an_error(direct, fake):
    fake.tokens["other"] = READ
    with pytest.raises(Forbidden, match="ACL not found"):
        lookup(direct, b"root")


def test_denied_user_does_not_get_the_ids_of_the_default(direct, fake):
    fake.put(USERS + b"boss", b"1000:1000:/home/boss")
    fake.put(USERS + b"*", b"5000:5000:/var/vmail/%u")
    fake.tokens["s3cret"] = f'{READ}\nkey "mail/aliases/userinfo/boss" {{ policy = "deny" }}'
    with pytest.raises(Forbidden):
        lookup(direct, b"boss", "userinfo")
    if fake.since == (1, 21, 5):
        with pytest.raises(SourceError, match="rejects the name"):  # of the key `*`
            lookup(direct, b"vera", "userinfo")
    else:
        assert lookup(direct, b"vera", "userinfo") == b"5000:5000:/var/vmail/vera"


@pytest.mark.parametrize(
    "name", ["../../other/secret", "..%2f..%2fother%2fsecret", "%2e%2e/%2e%2e/other/secret", "./root", "x/../root"]
)
def test_name_that_consul_normalizes_finds_no_other_key(direct, fake, name):
    with contextlib.suppress(SourceError):
        assert lookup(direct, name.encode()) is None
    assert all(request.key.startswith(ALIAS) for request in fake.requests)
    assert not any(b"/../" in request.path or b"/./" in request.path for request in fake.requests)


def test_name_that_consul_refuses_is_an_error_and_others_are_answered(direct, fake):
    if fake.since < (1, 21, 5):
        assert lookup(direct, b"u%20x") is None
    else:
        with pytest.raises(SourceError, match="rejects the name"):
            lookup(direct, b"u%20x")
    assert lookup(direct, b"root") == b"gilles"


@pytest.mark.parametrize("consistency", ["default", "stale"])
def test_server_that_has_not_read_its_log_yet_makes_no_key_absent(fake, consistency):
    def starting(request):
        if "consistent" in request.params:
            return fake.consul(request)
        return Answer(404, TRUE)

    fake.put(b"mail/aliases/alias/Vera", b"eric")
    fake.put(b"mail/aliases/mailaddr/@example.org", b"")
    fake.put(b"mail/aliases/source/192.0.2.1", b"")
    fake.handle = starting
    direct = DirectSource(kv.Client(ConsulConfig(addresses=(fake.address,), consistency=consistency)))

    def found(service, key, table=TABLE):
        return direct.entries(table, SERVICES[service], key, time.monotonic() + 2)

    assert found("alias", b"root").lookup(b"root") == b"gilles"
    assert found("alias", b"nobody").lookup(b"nobody") is None
    assert found("alias", b"vera", replace(TABLE, mode="mirror")).lookup(b"vera") == b"eric"
    assert found("mailaddr", b"x@example.org").find(b"x@example.org") is not None
    assert found("mailaddr", b"x@example.net").find(b"x@example.net") is None
    assert [*found("source", None).values] == [b"192.0.2.1"]
    direct.close()
