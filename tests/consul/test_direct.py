from __future__ import annotations

import logging

import pytest

from table_consul.backoff import LAST_PAUSE_SECONDS
from table_consul.errors import BadRequest, BadResponse, EntryError, Forbidden, SourceError, TooLarge, Unreachable
from table_consul.services import SERVICES, Table
from table_consul.services.entries import Entries
from table_consul.sources.direct import CACHE_SECONDS, REFUSED_KEY_SECONDS, DirectSource
from table_consul.sources.mirror import Unlisted
from tests.consul.scripted import ROOT, Client

TABLE = Table("aliases", prefix="mail", mode="direct")
MIRRORED = Table("aliases", prefix="mail")


@pytest.fixture
def client():
    return Client()


@pytest.fixture
def direct(client):
    return DirectSource(client, client.clock)


def bucket(direct, service="alias", key=b"root", table=TABLE, left=2.0):
    return direct.entries(table, SERVICES[service], key, direct._clock() + left)


def lines(caplog):
    return [record.getMessage() for record in caplog.records]


def test_lookup_reads_one_key_once(client, direct):
    assert (bucket(direct).lookup(b"root"), client.asked) == (b"gilles", [("get", ROOT, 2.0)])


def test_key_proven_absent_is_none(client, direct):
    assert bucket(direct, key=b"nobody").lookup(b"nobody") is None


def test_bad_value_is_an_entry_error(client, direct):
    client.store[ROOT] = b"|sh"
    with pytest.raises(EntryError, match="mail/aliases/alias/root: "):
        bucket(direct).lookup(b"root")


@pytest.mark.parametrize(
    "key",
    [
        b".",
        b"..",
        b"../../other/secret",
        b"a/../../../other/secret",
        b"x//y",
        b"/root",
        b"a/./b",
        b"\x00",
        b"a\nb",
        b"\x7f",
        b"\xff",
        b"\xed\xa0\x80",
        "a\x85b".encode(),
    ],
)
def test_key_that_no_url_can_name_is_an_error_without_a_request(client, direct, key):
    with pytest.raises(SourceError, match="no URL can contain this key"):
        bucket(direct, key=key)
    assert client.asked == []


@pytest.mark.parametrize("key", [b"", b"/", b"root/"])
def test_folder_is_no_entry_and_needs_no_request(client, direct, key):
    client.store[b"mail/aliases/string/" + key] = b"x"
    assert not bucket(direct, "string", key).contains(key)
    assert client.asked == []


@pytest.mark.parametrize("key", [b"%2e%2e/secret", b"root?raw", b"root#x", b"?keys", b"..%2f..", b"a b", b"a;b"])
def test_key_with_url_syntax_is_read_unchanged(client, direct, key):
    bucket(direct, key=key)
    assert [("get", b"mail/aliases/alias/" + key, 2.0)] == client.asked


# ---- fetch ----


def test_fetch_returns_keys_relative_to_the_folder(client, direct):
    client.store = {b"mail/aliases/source/192.0.2.1": None, b"mail/aliases/source/": None, b"other/192.0.2.9": b""}
    found = bucket(direct, "source", None)
    assert (found.next_after(None), len(found)) == ((b"192.0.2.1", b"192.0.2.1"), 1)


def test_empty_list_is_verified_by_one_read_in_the_remaining_time(client, direct):
    client.takes = 0.5
    assert None is bucket(direct, "source", None).next_after(None)
    assert client.asked == [("list", b"mail/aliases/source/", 2.0), ("get", b"mail/aliases/source/-", 1.5)]


def test_empty_list_with_a_refused_probe_is_an_error(client, direct):
    client.errors[b"mail/aliases/source/-"] = Forbidden("403")
    with pytest.raises(Forbidden):
        bucket(direct, "source", None)


def test_list_with_hidden_keys_returns_the_visible_ones(client, direct):
    client.hides = True
    with pytest.raises(Forbidden, match="Consul hides keys under mail/aliases/source/"):
        bucket(direct, "source", None)
    client.store[b"mail/aliases/source/192.0.2.1"] = None
    assert bucket(direct, "source", None).next_after(None) == (b"192.0.2.1", b"192.0.2.1")


def test_pattern_lookup_with_hidden_keys_is_an_error_unless_a_visible_key_matches(client, network):
    client.hides = True
    assert network().find(b"192.0.2.1") is not None
    client.store.clear()
    client.now += 2 * CACHE_SECONDS
    for _ in range(2):
        with pytest.raises(Forbidden):
            network()


def test_fetch_never_uses_a_cached_list(client, direct):
    client.store = {b"mail/aliases/source/192.0.2.1": None}
    bucket(direct, "source", None)
    client.store = {b"mail/aliases/source/192.0.2.2": None}
    assert bucket(direct, "source", None).next_after(None) == (b"192.0.2.2", b"192.0.2.2")


# ---- pattern services read the whole folder and cache it ----


@pytest.fixture
def network(client, direct):
    """Look up the network that contains an address."""
    client.store = {b"mail/aliases/netaddr/192.0.2.0/24": None}
    return lambda: direct.entries(TABLE, SERVICES["netaddr"], b"192.0.2.1", client.now + 2.0)


def test_pattern_service_reads_the_whole_folder(network, client):
    assert network().find(b"192.0.2.1") is not None
    assert client.asked == [("list", b"mail/aliases/netaddr/", 2.0)]


def test_pattern_service_caches_its_folder(client, network):
    first = network()
    client.now += CACHE_SECONDS - 0.1
    kept = network()
    client.now += 0.2
    assert (first is kept, network() is kept, len(client.asked)) == (True, False, 2)


def test_update_clears_the_cache(network, direct):
    first = network()
    direct.update()
    assert network() is not first


# ---- the circuit breaker ----


def failing(client, direct, error, times=1):
    client.error = error
    for _ in range(times):
        with pytest.raises(type(error)):
            bucket(direct)
    client.error = None


def test_open_breaker_sends_no_request_and_reports_the_start_of_the_outage(client, direct):
    failing(client, direct, Unreachable("connection refused"))
    client.now += 0.1
    with pytest.raises(Unreachable, match=r"Consul has been unreachable for 0 s: connection refused"):
        bucket(direct)
    assert len(client.asked) == 1


def test_six_lookups_of_one_recipient_cost_one_deadline(client, direct):
    client.takes, began = 60.0, client.now
    failing(client, direct, Unreachable("no answer in time"), 6)
    assert (len(client.asked), client.now - began) == (1, 2.0)


def test_breaker_retries_after_its_pause_and_a_success_closes_it(client, direct):
    failing(client, direct, Unreachable("connection refused"))
    client.now += LAST_PAUSE_SECONDS
    assert (bucket(direct).lookup(b"root"), bucket(direct).lookup(b"root"), len(client.asked)) == (
        b"gilles",
        b"gilles",
        3,
    )


@pytest.mark.parametrize("error", [Forbidden("403"), BadResponse("not JSON"), SourceError("token file: gone")])
def test_error_of_a_single_key_does_not_open_the_breaker(client, direct, error):
    failing(client, direct, error, 3)
    assert (bucket(direct).lookup(b"root"), len(client.asked)) == (b"gilles", 4)


def test_refusal_closes_the_breaker(client, direct, caplog):
    failing(client, direct, Unreachable("connection refused"))
    client.now += LAST_PAUSE_SECONDS
    failing(client, direct, Forbidden("403"))
    assert "lookups from Consul: recovered after 4.0 s (1 failed attempt)" in lines(caplog)


def test_update_reads_the_token_and_retries_immediately(client, direct):
    failing(client, direct, Unreachable("connection refused"))
    direct.update()
    assert (bucket(direct).lookup(b"root"), client.tokens) == (b"gilles", 1)


def test_update_reports_an_unreadable_token(client, direct):
    client.error = SourceError("token file: gone")
    with pytest.raises(SourceError, match="token file: gone"):
        direct.update()


@pytest.mark.parametrize("left", [0.0, -1.0])
def test_expired_deadline_sends_no_request(client, direct, left):
    with pytest.raises(Unreachable, match="deadline expired"):
        bucket(direct, left=left)
    assert client.asked == []


def test_each_outage_logs_one_line_at_its_start_and_one_at_its_end(client, direct, caplog):
    caplog.set_level(logging.INFO)
    for _ in range(5):
        failing(client, direct, Unreachable("connection refused"), 2)
        client.now += LAST_PAUSE_SECONDS
    bucket(direct)
    bucket(direct)
    assert lines(caplog) == [
        "lookups from Consul: connection refused; returning errors until it is back",
        "lookups from Consul: recovered after 20.0 s (5 failed attempts)",
    ]


def test_outage_after_a_failover_does_not_name_the_former_address(client, direct, caplog):
    former, client.address = client.address, "http://other:8500"
    failing(client, direct, Unreachable(f"Consul at {client.address}: connection refused"))
    assert "Consul at http://other:8500: connection refused; returning errors" in caplog.text
    assert former not in caplog.text


def test_refused_list_of_a_folder_logs_one_line_at_its_start_and_one_at_its_end(client, direct, caplog):
    client.error = Forbidden("403: the token may not read this")
    for _ in range(4):
        with pytest.raises(Forbidden):
            bucket(direct, "source", None)
    client.error = None
    bucket(direct, "source", None)
    bucket(direct, "source", None)
    assert lines(caplog) == [
        "mail/aliases/source/: 403: the token may not read this; returning errors",
        "mail/aliases/source/: recovered after 0.0 s (4 failed attempts)",
    ]


def test_refused_keys_beside_readable_ones_log_one_line_in_five_minutes(client, direct, caplog):
    client.errors[b"mail/aliases/alias/vip"] = Forbidden("403")
    for _ in range(2):
        for _ in range(5):
            with pytest.raises(Forbidden):
                bucket(direct, key=b"vip")
            bucket(direct)
        client.now += REFUSED_KEY_SECONDS
    assert lines(caplog) == ["mail/aliases/alias/: 403; returning errors for such keys"] * 2


def test_close_closes_the_connection(client, direct):
    direct.close()
    assert client.closed


# ---- the default entry of userinfo ----

USERS = b"mail/aliases/userinfo/"


def test_user_with_an_entry_takes_one_read(client, direct):
    client.store[USERS + b"vera"] = b"1000:1000:/home/vera"
    assert bucket(direct, "userinfo", b"vera").lookup(b"vera") == b"1000:1000:/home/vera"
    assert [key for _, key, _ in client.asked] == [USERS + b"vera"]


def test_default_entry_is_read_within_the_same_deadline(client, direct):
    client.store[USERS + b"*"] = b"1000:1000:/home/%u"
    client.takes = 0.5
    assert bucket(direct, "userinfo", b"vera").lookup(b"vera") == b"1000:1000:/home/vera"
    assert client.asked == [("get", USERS + b"vera", 2.0), ("get", USERS + b"*", 1.5)]


def test_record_without_ids_falls_back_to_the_default_entry(client, direct):
    client.store[USERS + b"vera"] = b'{"password": "x"}'
    client.store[USERS + b"*"] = b"1000:1000:/home/%u"
    assert bucket(direct, "userinfo", b"vera").lookup(b"vera") == b"1000:1000:/home/vera"


def test_user_with_a_refused_entry_does_not_get_the_default(client, direct):
    client.store[USERS + b"vera"] = b"0:0:/root"
    client.store[USERS + b"*"] = b"1000:1000:/home/%u"
    with pytest.raises(EntryError, match="userinfo/vera: uid or gid 0"):
        bucket(direct, "userinfo", b"vera").lookup(b"vera")


def test_unreadable_default_entry_is_an_error(client, direct):
    client.errors[USERS + b"*"] = Forbidden("no")
    with pytest.raises(Forbidden):
        bucket(direct, "userinfo", b"vera")


def test_other_services_have_no_default_entry(client, direct):
    client.store[b"mail/aliases/alias/*"] = b"gilles"
    assert bucket(direct, key=b"nobody").lookup(b"nobody") is None
    assert len(client.asked) == 1


def test_problems_of_a_listed_folder_are_logged_once(client, direct, caplog):
    client.store[b"mail/aliases/netaddr/nonsense"] = b""
    for _ in range(3):
        bucket(direct, "netaddr", b"192.0.2.1")
        client.now += 2 * CACHE_SECONDS
    assert [line for line in lines(caplog) if "nonsense" in line] == [lines(caplog)[0]]


def test_refused_key_names_log_one_line_for_many_lookups(client, direct, caplog):
    for number in range(5):
        client.errors[b"mail/aliases/alias/%d@x" % number] = BadRequest(f"refuses the name of key {number}")
        with pytest.raises(BadRequest):
            bucket(direct, key=b"%d@x" % number)
        bucket(direct)
    assert lines(caplog) == ["mail/aliases/alias/: refuses the name of key 0; returning errors for such keys"]


def test_refused_key_names_are_logged_again_after_minutes_without_an_outage(client, direct, caplog):
    for number in range(30):
        client.now += REFUSED_KEY_SECONDS / 10
        client.errors[b"mail/aliases/alias/%d@x" % number] = BadRequest("refuses the name")
        with pytest.raises(BadRequest):
            bucket(direct, key=b"%d@x" % number)
        assert bucket(direct).lookup(b"root") == b"gilles"
    assert lines(caplog) == ["mail/aliases/alias/: refuses the name; returning errors for such keys"] * 3


# ---- tables too large for a mirror ----


def test_upper_case_key_is_found_in_a_cached_list_of_keys(client, direct):
    client.store[b"mail/aliases/alias/Eric"] = b"x"
    for _ in range(2):
        assert bucket(direct, key=b"eric", table=MIRRORED).lookup(b"eric") == b"x"
        assert bucket(direct, key=b"nobody", table=MIRRORED).lookup(b"nobody") is None
    assert [what for what, _, _ in client.asked].count("keys") == 1
    client.now += 2 * CACHE_SECONDS
    bucket(direct, key=b"nobody", table=MIRRORED)
    assert [what for what, _, _ in client.asked].count("keys") == 2


def test_slow_list_of_keys_is_cached_for_longer(client, direct):
    client.takes = 0.5
    for _ in range(2):
        bucket(direct, key=b"nobody", table=MIRRORED)
        client.now += CACHE_SECONDS
    assert [what for what, _, _ in client.asked].count("keys") == 1


def test_lower_case_key_takes_precedence_then_the_first_variant(client, direct):
    client.store |= {
        b"mail/aliases/alias/ROOT": b"x",
        b"mail/aliases/alias/Eric": b"2",
        b"mail/aliases/alias/ERIC": b"1",
    }
    assert bucket(direct, table=MIRRORED).lookup(b"root") == b"gilles"
    assert bucket(direct, key=b"eric", table=MIRRORED).lookup(b"eric") == b"1"


def test_key_without_letters_is_not_searched_in_a_list(client, direct):
    bucket(direct, key=b"4711", table=MIRRORED)
    assert [what for what, _, _ in client.asked] == ["get"]


def test_key_is_an_error_while_the_keys_cannot_be_listed(client, direct):
    client.errors[b"mail/aliases/alias/"] = Forbidden("no")
    with pytest.raises(Forbidden):
        bucket(direct, key=b"nobody", table=MIRRORED)


@pytest.mark.parametrize(("service", "key"), [("alias", b"nobody"), ("netaddr", b"192.0.2.1"), ("source", None)])
def test_folder_too_large_to_list_is_an_error_without_an_outage_or_a_second_list(client, direct, caplog, service, key):
    path = b"mail/aliases/%s/" % service.encode()
    client.errors[path], client.takes = TooLarge("9 MiB arrived"), 0.9
    for _ in range(2):
        with pytest.raises(TooLarge):
            bucket(direct, service, key, table=MIRRORED)
        assert bucket(direct, key=b"root", table=MIRRORED).lookup(b"root") == b"gilles"
    assert [place for what, place, _ in client.asked if what != "get"] == [path]
    hint = 'returning errors for lookups that need all keys (set mode = "mirror" and max_keys above their number)'
    assert lines(caplog) == [f"mail/aliases/{service}/: 9 MiB arrived; {hint}"]
    client.errors.clear()
    client.now += 5 * client.takes
    if service == "alias":
        assert bucket(direct, service, key, table=MIRRORED).lookup(key) is None
    else:
        bucket(direct, service, key, table=MIRRORED)


def test_hidden_key_is_read_in_its_stored_case_without_a_list(client, direct):
    client.store[b"mail/aliases/alias/Eric"] = b"x"
    listed = Entries(MIRRORED, SERVICES["alias"])
    unlisted = Unlisted(Forbidden("hidden"), listed, b"Eric")
    found = direct.entries_hidden(unlisted, MIRRORED, SERVICES["alias"], b"eric", client.now + 2.0)
    assert (found.lookup(b"eric"), client.asked) == (b"x", [("get", b"mail/aliases/alias/Eric", 2.0)])
    for service, key, stored in (("netaddr", b"192.0.2.1", b"192.0.2.1"), ("source", None, None)):
        unlisted = Unlisted(Forbidden("hidden"), listed, stored)
        with pytest.raises(Forbidden, match="hidden"):
            direct.entries_hidden(unlisted, MIRRORED, SERVICES[service], key, client.now + 2.0)
