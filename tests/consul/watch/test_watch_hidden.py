from __future__ import annotations

import time

import pytest
from msgspec.structs import replace

from table_consul.errors import Forbidden, SourceError
from table_consul.services import SERVICES
from table_consul.sources import mirror
from tests.consul.watch.watching import (
    ALIAS,
    DOMAIN,
    PREFIX,
    ROOT,
    TABLE,
    ask,
    becomes,
    lines,
    logged,
    reports_hidden_keys,
    settled,
    written,
)
from tests.dialogue import eventually

READ = 'key_prefix "mail/" { policy = "read" } '


def deny(key, kind="key"):
    return f'{kind} "{key.decode()}" {{ policy = "deny" }} '


@pytest.fixture
def ruled(fake, mirrored, waits_of):
    """Make a mirror whose token "any" has these rules and one that reads the whole table."""

    def make(*rules, wait=None, **table):
        if wait is not None:
            waits_of(wait)
        fake.tokens["any"] = READ + "".join(rules)
        return mirrored(fake.address, replace(TABLE, **table))

    return make


def hidden(source):
    """The services in which the mirror has noticed hidden keys."""
    state = source.watches[0].mirror.state
    return set() if state is None else set(state[0].hidden)


def notices(source, services):
    for _ in eventually(f"keys of {services} are hidden", 10):
        if hidden(source) == services:
            return


def narrow(fake, source, *rules):
    """Change the rules, and wait for a query that starts afterwards: a query keeps the rules of its start."""
    fake.tokens["any"] = READ + "".join(rules)
    fake.put(ROOT, b"narrowed")
    becomes(source, b"narrowed")
    fake.put(ROOT, b"gilles")


@pytest.mark.parametrize("services", [TABLE.services, (*TABLE.services, "source")], ids=["filled", "one empty"])
def test_table_that_the_token_may_no_longer_read_keeps_the_last_good_copy(fake, mirrored, caplog, services):
    source = mirrored(fake.address, replace(TABLE, services=services))
    settled(source)
    fake.denied = (PREFIX,)
    fake.put(b"mail/aliases/zz", b"wakes the watch")
    logged(caplog, "the token may no longer read anything")
    assert (ask(source), ask(source, b"nobody")) == (b"gilles", None)
    fake.denied = ()
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")


def test_emptied_table_is_accepted_and_logged_with_numbers(fake, mirrored, caplog):
    source = mirrored(fake.address)
    assert ask(source) == b"gilles"
    fake.delete(ROOT)
    fake.delete(DOMAIN + b"example.org")
    becomes(source, None)
    becomes(source, None, b"example.org", service="domain")
    logged(caplog, "mail/aliases/alias/: 1 of 1 entry deleted at once; 0 are left")
    logged(caplog, "mail/aliases/domain/: 1 of 1 entry deleted at once; 0 are left")


def test_loss_of_more_than_half_of_a_folder_is_logged(fake, mirrored, caplog):
    for number in range(7):
        fake.put(ALIAS + b"%d" % number, b"x")
    source = mirrored(fake.address)
    settled(source)
    with fake.store.changed:
        for number in range(4):
            fake.delete(ALIAS + b"%d" % number)
    becomes(source, None, b"0")
    assert lines(caplog) == []
    with fake.store.changed:
        for number in range(4, 7):
            fake.delete(ALIAS + b"%d" % number)
    becomes(source, None, b"4")
    logged(caplog, "mail/aliases/alias/: 3 of 4 entries deleted at once; 1 is left")


def test_table_that_is_empty_at_start_is_logged(fake, mirrored, caplog):
    settled(mirrored(fake.address, replace(TABLE, name="typo")))
    logged(caplog, "mail/typo/: no entries: every lookup returns not-found")


def test_forbidden_folder_is_an_error_until_the_permission_is_granted(fake, ruled, caplog):
    source = ruled(deny(DOMAIN, "key_prefix"), wait=0.2)
    assert ask(source) == b"gilles"
    with pytest.raises(Forbidden):
        ask(source, b"example.org", "domain")
    fake.tokens["any"] = READ
    becomes(source, b"example.org", b"example.org", service="domain")
    logged(caplog, "mail/aliases/: all services readable again")


@reports_hidden_keys
def test_hidden_key_affects_no_other_key(fake, ruled):
    fake.put(ALIAS + b"vip", b"x")
    source = ruled(deny(ALIAS + b"vip"))
    assert (ask(source), ask(source, b"nobody"), ask(source, b"example.org", "domain")) == (
        b"gilles",
        None,
        b"example.org",
    )
    with pytest.raises(Forbidden):
        ask(source, b"vip")
    assert hidden(source) == {"alias"}
    assert source.entries(source.table, SERVICES["alias"], None, time.monotonic() + 2).next_after(None) is not None


@reports_hidden_keys
def test_lookups_of_hidden_and_other_keys_log_one_more_line(fake, ruled, caplog):
    fake.put(ALIAS + b"vip", b"x")
    source = ruled(deny(ALIAS + b"vip"))
    settled(source)
    before = lines(caplog)
    for _ in range(5):
        with pytest.raises(Forbidden):
            ask(source, b"vip")
        assert ask(source, b"nobody") is None
    assert (len(before), len(lines(caplog))) == (1, 2)


@pytest.mark.parametrize("version", ["1.8.7"])
def test_key_hidden_from_the_start_looks_absent_before_consul_1_11(fake, ruled):
    fake.put(ALIAS + b"vip", b"x")
    source = ruled(deny(ALIAS + b"vip"))
    assert (ask(source), ask(source, b"vip"), hidden(source)) == (b"gilles", None, set())


@reports_hidden_keys
def test_hidden_key_that_is_created_later_is_an_error(fake, ruled):
    source = ruled(deny(ALIAS + b"vip"))
    assert ask(source, b"nobody") is None
    fake.put(ALIAS + b"vip", b"x")
    becomes(source, Forbidden, b"vip")


@pytest.mark.parametrize("version", ["1.22", "1.22.4"])  # 1.21.5 refuses to read the key `*`.
def test_hidden_user_does_not_get_the_ids_of_the_default(fake, ruled):
    users = PREFIX + b"userinfo/"
    fake.put(users + b"boss", b"1000:1000:/home/boss")
    fake.put(users + b"*", b"5000:5000:/var/vmail/%u")
    source = ruled(deny(users + b"boss"), services=("alias", "userinfo"))
    assert ask(source, b"vera", "userinfo") == b"5000:5000:/var/vmail/vera"
    with pytest.raises(Forbidden):
        ask(source, b"boss", "userinfo")


@reports_hidden_keys
def test_lookup_of_a_hidden_pattern_is_an_error_and_a_visible_one_matches(fake, ruled):
    networks = PREFIX + b"netaddr/"
    fake.put(networks + b"192.0.2.0/24", b"")
    fake.put(networks + b"203.0.113.0/24", b"")
    source = ruled(deny(networks + b"203.0.113.0/24"), services=("alias", "netaddr"))
    assert source.entries(source.table, SERVICES["netaddr"], b"192.0.2.1", time.monotonic() + 2).contains(b"192.0.2.1")
    for address in (b"203.0.113.1", b"198.51.100.1"):
        with pytest.raises(SourceError, match="hides keys"):
            ask(source, address, "netaddr")


def test_hidden_key_outside_every_folder_affects_no_service(fake, ruled):
    fake.put(PREFIX + b"string/secret", b"x")
    source = ruled(deny(PREFIX + b"string/secret"))
    assert (ask(source, b"nobody"), hidden(source)) == (None, set())


def test_deletion_of_some_keys_does_not_prove_that_a_hidden_one_is_absent(fake, ruled):
    names = [b"a%d" % number for number in range(9)]
    for name in (*names, b"zoe"):
        fake.put(ALIAS + name, b"x")
    source = ruled()
    assert ask(source, b"zoe") == b"x"
    narrow(fake, source, deny(ALIAS + b"zoe"))
    with fake.store.changed:
        for name in names:
            fake.delete(ALIAS + name)
    becomes(source, None, b"a0")
    with pytest.raises(Forbidden):
        ask(source, b"zoe")
    assert (ask(source), ask(source, b"a8")) == (b"gilles", None)


def test_hidden_key_is_read_in_its_stored_case(fake, ruled):
    fake.put(ALIAS + b"Eric", b"x")
    source = ruled()
    assert ask(source, b"eric") == b"x"
    narrow(fake, source, deny(ALIAS + b"Eric"))
    becomes(source, Forbidden, b"eric")
    fake.put(ROOT, b"robert")  # the next edit keeps the stored case, too
    becomes(source, b"robert")
    with pytest.raises(Forbidden):
        ask(source, b"eric")


def test_removed_deny_rule_takes_effect_without_an_edit(fake, ruled, caplog):
    fake.put(ALIAS + b"Vip", b"x")
    source = ruled(wait=0.2)
    assert ask(source, b"vip") == b"x"
    narrow(fake, source, deny(ALIAS + b"Vip"))
    becomes(source, Forbidden, b"vip")
    fake.tokens["any"] = READ
    becomes(source, b"x", b"vip")
    notices(source, set())
    logged(caplog, "all services readable again")


@reports_hidden_keys
def test_rule_that_is_added_and_removed_at_one_index_is_noticed(fake, ruled):
    fake.put(ALIAS + b"vip", b"x")
    source = ruled(wait=0.2)
    settled(source)
    for _ in range(2):
        fake.tokens["any"] = READ + deny(ALIAS + b"vip")
        becomes(source, Forbidden, b"vip")
        fake.tokens["any"] = READ
        becomes(source, b"x", b"vip")


@reports_hidden_keys
def test_rule_that_moves_to_another_folder_at_one_index_is_noticed(fake, ruled):
    fake.put(ALIAS + b"vip", b"x")
    source = ruled(deny(ALIAS + b"vip"), wait=0.2)
    becomes(source, Forbidden, b"vip")
    fake.tokens["any"] = READ + deny(DOMAIN + b"example.org")
    becomes(source, b"x", b"vip")
    fake.put(DOMAIN + b"example.net", b"")
    becomes(source, b"example.net", b"example.net", service="domain")
    notices(source, {"domain"})


def test_list_policy_without_the_rule_list_is_an_error_with_the_reason_of_consul(fake, ruled):
    fake.key_list_policy = True
    source = ruled()
    with pytest.raises(
        Forbidden, match="lacks permission 'key:list'" if fake.since >= (1, 12) else "Permission denied"
    ):
        ask(source)
    fake.tokens["any"] = 'key_prefix "mail/" { policy = "list" }'
    becomes(source, b"gilles")


@reports_hidden_keys
def test_empty_folder_that_is_hidden_before_it_fills_is_an_error(fake, ruled, caplog):
    fake.delete(DOMAIN + b"example.org")
    source = ruled()
    assert ask(source, b"example.org", "domain") is None
    narrow(fake, source, deny(DOMAIN, "key_prefix"))
    fake.put(DOMAIN + b"example.org", b"")
    becomes(source, Forbidden, b"example.org", service="domain")
    logged(caplog, "mail/aliases/: keys may be hidden under: domain; reading Consul for each key that is not listed")


@pytest.mark.parametrize("version", ["1.8.7"])
def test_many_deletions_do_not_delay_reads_of_hidden_keys(fake, ruled, monkeypatch):
    monkeypatch.setattr(mirror, "MAX_ABSENCE_CHECKS", 4)
    names = [b"b%02d" % number for number in range(20)]
    for name in (*names, b"a", b"m"):
        fake.put(ALIAS + name, b"x")
    source = ruled(wait=0.1)
    assert ask(source, b"m") == b"x"
    narrow(fake, source, *(deny(ALIAS + name) for name in (b"a", b"b00", b"m")))
    fake.delete(ALIAS + b"b00")
    for name in names[1:]:
        fake.delete(ALIAS + name)
        becomes(source, None, name)
    fake.tokens["any"] = READ + deny(ALIAS + b"m")
    becomes(source, b"x", b"a")
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    with pytest.raises(Forbidden):
        ask(source, b"m")
    assert hidden(source) == {"alias"}


@pytest.mark.parametrize("version", ["1.21.5"])  # which refuses to read the key `*`
def test_listed_default_user_answers_where_a_hidden_user_has_a_refused_name(fake, ruled):
    users = PREFIX + b"userinfo/"
    fake.put(users + b"boss", b"1000:1000:/home/boss")
    fake.put(users + b"*", b"5000:5000:/var/vmail/%u")
    source = ruled(deny(users + b"boss"), services=("alias", "userinfo"))
    assert ask(source, b"vera", "userinfo") == b"5000:5000:/var/vmail/vera"
    with pytest.raises(Forbidden):
        ask(source, b"boss", "userinfo")


@reports_hidden_keys
def test_snapshot_of_a_single_service_is_written_while_a_key_is_hidden(fake, ruled, tmp_path):
    fake.put(ALIAS + b"vip", b"x")
    path = tmp_path / "copy.json"
    ruled(deny(ALIAS + b"vip"), services=("alias",), snapshot=str(path))
    written(path, {ROOT.decode(): b"gilles", ALIAS.decode(): b"incomplete"})
