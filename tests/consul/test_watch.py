from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import socket
import threading
import time

import pytest
from msgspec.structs import replace

from table_consul import kv
from table_consul.config import Config, ConsulConfig
from table_consul.errors import ConfigError, Forbidden, SourceError, TooLarge, Unreachable
from table_consul.services import SERVICES, Table
from table_consul.sources.watch import MirrorSource, load_once
from table_consul.tables import MAX_MIRRORED_TABLES, Tables
from tests.dialogue import eventually
from tests.fake_consul import Answer, FakeConsul, cut, html, stall

TABLE = Table("aliases", prefix="mail", services=("alias", "domain"), deadline=0.5)
PREFIX = b"mail/aliases/"
ALIAS, DOMAIN = PREFIX + b"alias/", PREFIX + b"domain/"
ROOT = ALIAS + b"root"
# What an answer may take beyond its deadline on a busy machine.
SLACK = 0.3


@pytest.fixture
def fake():
    with FakeConsul() as server:
        server.put(ROOT, b"gilles")
        server.put(DOMAIN + b"example.org", b"")
        yield server


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr("table_consul.backoff.FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr("table_consul.backoff.LAST_PAUSE_SECONDS", 0.05)


@pytest.fixture
def mirrored():
    made = []

    def make(addresses, table=TABLE, former=None, **options):
        addresses = (addresses,) if isinstance(addresses, str) else tuple(addresses)
        # Consul says only to a token that it hides something.
        settings = ConsulConfig(addresses=addresses, **{"token": "any"} | options)
        made.append(MirrorSource(table, lambda: kv.Client(settings), former, write_seconds=0.0))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(autouse=True)
def no_thread_is_left_dead():
    failures = []
    before, threading.excepthook = threading.excepthook, failures.append
    yield
    threading.excepthook = before
    assert failures == []


def ask(source, key=b"root", service="alias", left=None, table=None):
    table = table or source.table
    bucket = source.entries(table, SERVICES[service], key, time.monotonic() + (left or table.deadline))
    return bucket.lookup(key)


def becomes(source, wanted, key=b"root", **options):
    """Poll until the answer is the wanted one; an error counts as its type."""
    got = None
    for _ in eventually(f"{key!r} becomes {wanted!r}", 10):
        try:
            got = ask(source, key, **options)
        except SourceError as error:
            got = type(error)
        if got == wanted:
            return


def settled(source):
    """Wait until all of its watches have read what there is, and wait for changes."""
    for _ in eventually("settled", 10):
        if all(each.index for each in source.watches):
            return


def lines(caplog, level=logging.WARNING):
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


def logged(caplog, text):
    for _ in eventually(f"{text!r} is logged", 10):
        if any(text in line for line in lines(caplog)):
            return


def closed():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


# ---- the first load ----


def test_the_first_answer_waits_for_the_first_load(fake, mirrored):
    fake.handle = lambda request: time.sleep(0.1) or fake.consul(request)
    assert ask(mirrored(fake.address)) == b"gilles"


def test_the_first_answer_waits_no_longer_than_the_deadline_and_the_next_not_at_all(fake, mirrored):
    fake.handle = stall
    source = mirrored(fake.address)
    for least, most in ((0.0, 0.5 + SLACK), (0.0, SLACK), (0.0, SLACK)):
        began = time.monotonic()
        with pytest.raises(Unreachable):
            ask(source)
        assert least <= time.monotonic() - began < most


def test_of_a_first_load_that_fails_the_answers_are_errors_at_once(mirrored):
    source = mirrored(closed())
    becomes(source, Unreachable)
    assert source.by_service["alias"].mirror.state is None
    began = time.monotonic()
    for _ in range(20):
        with pytest.raises(Unreachable, match="connection refused"):
            ask(source)
    assert time.monotonic() - began < SLACK


def test_absence_is_said_only_after_a_load(fake, mirrored):
    assert ask(mirrored(fake.address), b"nobody") is None


LIST = Answer(200, {"X-Consul-Index": "5", "X-Consul-Knownleader": "true"}, b'[{"Key":"mail/aliases/alias/eric"')


@pytest.mark.parametrize(
    "lie",
    [
        html,
        cut(LIST, 130),
        lambda request: Answer(404, {}, b"not found"),
        lambda request: Answer(500, {}, b"No cluster leader"),
        lambda request: Answer(200, {"X-Consul-Index": "0"}, b"[]"),
        lambda request: Answer(403, {}, b"ACL not found"),
    ],
)
def test_what_is_no_answer_of_consul_is_no_absence(fake, mirrored, lie):
    fake.handle = lie
    source = mirrored(fake.address)
    with pytest.raises(SourceError):
        ask(source, b"nobody")
    fake.handle = fake.consul
    becomes(source, None, b"nobody")


# ---- edits ----


def test_an_edit_an_addition_and_a_deletion_are_seen(fake, mirrored):
    source = mirrored(fake.address)
    assert ask(source) == b"gilles"
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    fake.put(ALIAS + b"new", b"x")
    becomes(source, b"x", b"new")
    fake.delete(ROOT)
    becomes(source, None)


def test_an_index_that_went_back_is_seen(fake, mirrored):
    # In the pause between two queries it is seen when the next has waited in vain.
    source = mirrored(fake.address, replace(TABLE, max_age=1.0))
    settled(source)
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    with fake.store.changed:
        fake.put(ROOT, b"from the snapshot")
        fake.reset_index(3)
    becomes(source, b"from the snapshot")
    fake.put(ROOT, b"after it")
    becomes(source, b"after it")


def test_the_same_index_is_not_read_again(fake, mirrored):
    source = mirrored(fake.address, replace(TABLE, max_age=0.3))
    (one,) = source.watches
    settled(source)
    kept, asked = one.mirror.state[0], len(fake.requests)
    for _ in eventually("several waits", 10):
        if len(fake.requests) > asked + 5:
            break
    assert (one.mirror.state[0], one.reloads) == (kept, 1)
    assert ask(source) == b"gilles"


def test_the_first_read_makes_sure_of_the_leader_and_the_wait_does_not(fake, mirrored):
    settled(mirrored(fake.address))
    for _ in eventually("the wait began", 10):
        lists = [request.params for request in fake.requests if "recurse" in request.params]
        if len(lists) > 1:
            break
    assert ("consistent" in lists[0], "index" in lists[0]) == (True, False)
    assert ("consistent" in lists[1], "index" in lists[1]) == (False, True)


def test_whoever_chose_stale_reads_gets_them(fake, mirrored):
    settled(mirrored(fake.address, consistency="stale"))
    assert all("stale" in request.params and "consistent" not in request.params for request in fake.requests)


def test_what_is_wrong_with_an_entry_is_said_once_and_again_when_it_changes(fake, mirrored, caplog):
    fake.put(ALIAS + b"bad", b"|sh")
    source = mirrored(fake.address)
    settled(source)
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    assert len([line for line in lines(caplog) if "alias/bad" in line]) == 1


# ---- outages ----


def test_the_last_good_copy_answers_through_an_outage_and_nothing_is_restarted(fake, mirrored):
    source = mirrored(fake.address)
    assert ask(source) == b"gilles"
    fake.stop()
    for _ in eventually("the outage is noticed", 10):
        if source.watches[0].backoff.since is not None:
            break
    assert (ask(source), ask(source, b"nobody")) == (b"gilles", None)
    fake.start()
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")


def test_after_max_age_the_last_good_copy_is_an_error_and_recovers(fake, mirrored):
    source = mirrored(fake.address, replace(TABLE, max_age=0.5))
    assert ask(source) == b"gilles"
    fake.stop()
    becomes(source, Unreachable)
    with pytest.raises(Unreachable, match="no data from Consul for"):
        ask(source, b"nobody")
    fake.start()
    becomes(source, b"gilles")


def test_an_outage_is_one_line_when_it_begins_and_one_when_it_ends(fake, mirrored, caplog):
    source = mirrored(fake.address)
    assert ask(source) == b"gilles"
    fake.stop()
    for _ in eventually("a few failures", 10):
        if source.watches[0].backoff.failures > 5:
            break
    fake.start()
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    for _ in eventually("the end is logged", 10):
        if len(lines(caplog)) > 1:
            break
    begin, end = lines(caplog)
    assert begin.startswith("mail/aliases/ from Consul: Consul at http://127.0.0.1:")
    assert begin.endswith("; serving the last good copy if there is one, otherwise returning errors")
    assert end.startswith("mail/aliases/ from Consul: recovered after ")


def test_a_bug_in_a_turn_is_an_outage_and_not_the_end_of_the_watch(fake, mirrored, monkeypatch, caplog):
    settled(source := mirrored(fake.address))

    def broken(*_arguments, **_options):
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(kv.Client, "blocking_query", broken)
        fake.put(ROOT, b"eric")
        for _ in eventually("the bug shows", 10):
            if "internal error; please report it" in lines(caplog):
                break
        assert ask(source) in (b"gilles", b"eric")
    becomes(source, b"eric")


# ---- absence is proven ----


def test_a_list_emptied_by_an_acl_is_not_believed(fake, mirrored):
    source = mirrored(fake.address)
    settled(source)
    fake.denied = (PREFIX,)
    fake.put(b"mail/aliases/zz", b"wakes the watch")
    for _ in eventually("it is noticed", 10):
        if source.watches[0].backoff.since is not None:
            break
    assert (ask(source), ask(source, b"nobody")) == (b"gilles", None)
    with pytest.raises(Forbidden):
        raise source.watches[0].mirror.last_error
    fake.denied = ()
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")


def test_a_table_that_was_emptied_is_believed(fake, mirrored):
    source = mirrored(fake.address)
    assert ask(source) == b"gilles"
    fake.delete(ROOT)
    fake.delete(DOMAIN + b"example.org")
    becomes(source, None)
    becomes(source, None, b"example.org", service="domain")


def test_a_bucket_that_may_not_be_read_is_an_error_until_it_may_without_any_edit(fake, mirrored, caplog):
    fake.denied = (DOMAIN,)
    source = mirrored(fake.address, replace(TABLE, max_age=0.9))
    assert ask(source) == b"gilles"
    with pytest.raises(Forbidden, match="mail/aliases/domain/ may not be read"):
        ask(source, b"example.org", "domain")
    fake.denied = ()
    becomes(source, b"example.org", b"example.org", service="domain")
    logged(caplog, "mail/aliases/: all services readable again")


def test_a_bucket_of_which_consul_hides_a_part_is_an_error(fake, mirrored):
    fake.denied = (ALIAS + b"secret", ALIAS + b"-")
    fake.put(ALIAS + b"secret", b"x")
    source = mirrored(fake.address)
    becomes(source, Forbidden, b"secret")
    assert (ask(source), ask(source, b"example.org", "domain")) == (b"gilles", b"example.org")
    with pytest.raises(Forbidden):
        ask(source, b"nobody")
    with pytest.raises(Forbidden):  # a fetch: it would leave out what is hidden
        source.entries(source.table, SERVICES["alias"], None, time.monotonic() + 2)


def test_a_bucket_that_was_empty_and_is_hidden_before_it_fills_is_an_error(fake, mirrored, caplog):
    fake.delete(DOMAIN + b"example.org")
    source = mirrored(fake.address)
    assert ask(source, b"example.org", "domain") is None
    fake.denied = (DOMAIN,)
    fake.put(DOMAIN + b"example.org", b"")
    becomes(source, Forbidden, b"example.org", service="domain")
    assert "mail/aliases/: the token may not read: domain; returning errors for these services" in lines(caplog)


def test_a_proof_that_fails_otherwise_leaves_the_last_good_copy(fake, mirrored):
    source = mirrored(fake.address)
    settled(source)
    fake.denied = (b"mail/aliases/zz",)
    fake.handle = lambda request: fake.consul(request) if "recurse" in request.params else html(request)
    fake.put(b"mail/aliases/zz", b"makes Consul say that it hides something")
    for _ in eventually("it is noticed", 10):
        if source.watches[0].backoff.since is not None:
            break
    assert (ask(source), ask(source, b"nobody")) == (b"gilles", None)
    fake.handle = fake.consul
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")


def test_a_deletion_is_believed_where_consul_refuses_the_name_of_the_key(fake, mirrored):
    fake.version = "1.21.5"
    fake.put(ALIAS + b"user@example.org", b"x")
    source = mirrored(fake.address)
    assert ask(source, b"user@example.org") == b"x"
    fake.delete(ALIAS + b"user@example.org")
    becomes(source, None, b"user@example.org")


@pytest.mark.parametrize("refusal", [Answer(302, {"Location": "/"}), Answer(451)], ids=["302", "451"])
def test_absence_of_a_key_is_not_proven_by_a_refusal_to_read_it(fake, mirrored, refusal):
    fake.put(ALIAS + b"hidden", b"x")
    source = mirrored(fake.address)
    assert ask(source, b"hidden") == b"x"
    fake.handle = lambda request: refusal if request.key == ALIAS + b"hidden" else fake.consul(request)
    fake.delete(ALIAS + b"hidden")
    for _ in eventually("the list is not believed", 10):
        if source.watches[0].backoff.since is not None:
            break
    assert ask(source, b"hidden") == b"x"


def test_a_key_that_is_there_but_not_listed_is_no_absence(fake, mirrored):
    source = mirrored(fake.address)
    settled(source)
    honest = fake.consul

    def shortened(request):
        answer = honest(request)
        if "recurse" in request.params:
            entries = [entry for entry in json.loads(answer.body) if not entry["Key"].endswith("root")]
            answer.body = json.dumps(entries).encode()
        return answer

    fake.handle = shortened
    # The first edit may still be answered by the honest one, if it sits on a query.
    for number, _ in enumerate(eventually("it is noticed", 10)):
        fake.put(ALIAS + b"new", b"%d" % number)
        if "does not list it" in str(source.watches[0].mirror.last_error):
            break
    assert ask(source) == b"gilles"
    fake.handle = honest
    fake.put(ALIAS + b"new", b"x")
    becomes(source, b"x", b"new")


# ---- large tables ----


@pytest.fixture
def sources(tmp_path):
    made = []

    def make(addresses, table=TABLE, **options):
        addresses = (addresses,) if isinstance(addresses, str) else tuple(addresses)
        box = [Config(None, consul=ConsulConfig(addresses=addresses, **options), defaults=table)]

        def load():
            if isinstance(box[0], Exception):
                raise box[0]
            return box[0]

        source = Tables(load)
        source.box = box
        made.append(source)
        return source

    yield make
    for source in made:
        source.close()


def test_a_table_that_stays_too_large_says_so_once(fake, mirrored, caplog):
    source = mirrored(fake.address, replace(TABLE, max_keys=1))
    for _ in range(3):
        asked = len(fake.requests)
        source.update()
        for _ in eventually("it was tried again", 10):
            if len(fake.requests) > asked and source.watches[0].too_large:
                break
    source.close()
    source.watches[0].join(10)
    assert len(lines(caplog)) == 1
    assert source.by_service["alias"].mirror.state is None


def told(source, key=b"root", service="alias", name="aliases"):
    return ask(source, key, service, table=source.table(name))


def test_a_table_above_max_keys_is_read_directly_from_the_first_answer_on_and_says_so_once(fake, sources, caplog):
    source = sources(fake.address, replace(TABLE, max_keys=1))
    assert [told(source), told(source, b"nobody"), told(source)] == [b"gilles", None, b"gilles"]
    assert [line for line in lines(caplog) if "max_keys" in line] == [
        "mail/aliases/ holds more than max_keys = 1 keys: falling back to direct mode (one Consul read per lookup)"
    ]


def test_a_table_that_grew_too_large_is_read_directly_and_mirrored_again_when_it_shrank(fake, sources, caplog):
    source = sources(fake.address, replace(TABLE, max_keys=2))
    assert told(source) == b"gilles"
    fake.put(ALIAS + b"one too many", b"x")
    ((_, one),) = source.watches()
    for _ in eventually("too large", 10):
        if one.too_large:
            break
    asked = len(fake.requests)
    assert (told(source), told(source, b"nobody"), len(fake.requests) - asked) == (b"gilles", None, 2)
    fake.delete(ALIAS + b"one too many")
    source.update()
    for _ in eventually("no longer too large", 10):
        if not one.too_large:
            break
    asked = len(fake.requests)
    assert told(source) == b"gilles"
    assert [request for request in fake.requests[asked:] if "recurse" not in request.params] == []
    assert "mail/aliases/: no longer too large, serving it from memory again" in lines(caplog)


def state_is_none(source):
    for _ in eventually("the state is None", 10):
        if source.by_service["alias"].mirror.state is None:
            return


def test_state_of_a_mirror_is_none_when_the_table_grew_too_large(fake, mirrored):
    source = mirrored(fake.address, replace(TABLE, max_keys=2))
    settled(source)
    assert source.by_service["alias"].mirror.state is not None
    fake.put(ALIAS + b"one too many", b"x")
    state_is_none(source)
    assert source.by_service["alias"].too_large
    with pytest.raises(TooLarge):
        ask(source)


def test_state_of_a_mirror_does_not_change_after_it_was_closed(fake, mirrored):
    held = threading.Event()
    source = mirrored(fake.address)
    settled(source)
    fake.handle = lambda request: held.wait(10) and fake.consul(request)
    source.update()
    source.close()
    state = source.by_service["alias"].mirror.state
    held.set()
    fake.put(ROOT, b"eric")
    source.watches[0].join(10)
    assert source.by_service["alias"].mirror.state is state


def test_table_with_more_data_than_may_be_held_is_read_directly(fake):
    client = kv.Client(ConsulConfig(addresses=(fake.address,)))
    client.body_bytes = 1000
    fake.put(ALIAS + b"large", b"x" * 2000)
    source = MirrorSource(TABLE, lambda: client)
    for _ in eventually("too large", 10):
        if source.by_service["alias"].too_large:
            break
    source.close()


def test_answer_with_the_known_index_is_read_when_an_acl_begins_to_hide_keys(fake, mirrored):
    source = mirrored(fake.address, replace(TABLE, max_age=0.6))
    settled(source)
    fake.denied = (DOMAIN,)
    becomes(source, b"gilles")
    for _ in eventually("it is noticed", 10):
        if isinstance(source.watches[0].mirror.last_error, Forbidden):
            break


def test_load_once_finds_what_a_watch_finds(fake):
    client = kv.Client(ConsulConfig(addresses=(fake.address,)))
    fake.denied = (DOMAIN,)
    stored = {}
    snapshot, index = load_once(client, TABLE, PREFIX, TABLE.services, stored.update)
    assert index == fake.index
    assert snapshot.entries["alias"].lookup(b"root") == b"gilles"
    assert list(snapshot.forbidden) == ["domain"]
    assert stored == {ROOT: b"gilles"}
    with pytest.raises(TooLarge):
        load_once(client, replace(TABLE, max_keys=0), PREFIX, TABLE.services, stored.update)
    client.close()


# ---- several tables, several folders ----


def test_a_path_elsewhere_has_a_watch_of_its_own(fake, mirrored):
    fake.put(b"shared/people/root", b"robert")
    source = mirrored(fake.address, replace(TABLE, paths={"alias": "shared/people"}))
    assert sorted(each.name for each in source.watches) == ["watch mail/aliases/", "watch shared/people/"]
    assert (ask(source), ask(source, b"example.org", "domain")) == (b"robert", b"example.org")
    fake.put(b"shared/people/root", b"eric")
    becomes(source, b"eric")


def test_a_bounded_number_of_tables_is_mirrored_and_the_others_are_read_directly(fake, sources):
    source = sources(fake.address)
    for number in range(MAX_MIRRORED_TABLES + 3):
        fake.put(b"mail/table%d/alias/root" % number, b"%d" % number)
    for number in range(MAX_MIRRORED_TABLES + 3):
        assert told(source, name=f"table{number}") == b"%d" % number
    assert len(source.watches()) == MAX_MIRRORED_TABLES


# ---- the copy on disk ----


def kept(path):
    return {entry["key"]: base64.b64decode(entry["value"]) for entry in json.loads(path.read_text())}


def written(path, wanted):
    for _ in eventually(f"{path} holds {wanted}", 10):
        if path.exists() and wanted.items() <= kept(path).items():
            return


def keep(path, entries, mode=0o600):
    path.write_text(
        json.dumps([{"key": k, "flags": 0, "value": base64.b64encode(v).decode()} for k, v in entries.items()])
    )
    path.chmod(mode)


WHOLE = {"mail/aliases/alias/root": b"gilles", "mail/aliases/alias/": b"", "mail/aliases/domain/": b""}


@pytest.fixture
def copied(tmp_path):
    return replace(TABLE, snapshot=str(tmp_path / "copy.json"))


def test_the_copy_is_an_export_for_its_owner_alone(fake, mirrored, copied, tmp_path):
    source = mirrored(fake.address, copied)
    path = tmp_path / "copy.json"
    written(path, {"mail/aliases/alias/root": b"gilles", "mail/aliases/domain/example.org": b""})
    assert (path.stat().st_mode & 0o777, os.listdir(tmp_path)) == (0o600, ["copy.json"])
    assert set(json.loads(path.read_text())[0]) == {"key", "flags", "value"}
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    written(path, {"mail/aliases/alias/root": b"eric"})


def test_with_consul_down_a_start_answers_from_the_copy(fake, mirrored, copied, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    source = mirrored(fake.address, copied)
    written(tmp_path / "copy.json", {"mail/aliases/alias/root": b"gilles"})
    source.close()
    again = mirrored(closed(), copied)
    becomes(again, b"gilles")
    assert (ask(again, b"nobody"), ask(again, b"example.org", "domain")) == (None, b"example.org")
    assert any("entries of 0 s ago from" in line for line in lines(caplog, logging.INFO))


def test_what_is_restored_follows_consul_when_it_comes_back(fake, mirrored, copied, tmp_path):
    keep(tmp_path / "copy.json", {**WHOLE, "mail/aliases/alias/old": b"x"})
    fake.stop()
    source = mirrored(fake.address, copied)
    becomes(source, b"x", b"old")
    fake.start()
    becomes(source, None, b"old")
    becomes(source, b"example.org", b"example.org", service="domain")


def test_with_consul_down_and_no_copy_a_start_answers_errors_and_recovers(fake, mirrored, copied):
    fake.stop()
    source = mirrored(fake.address, copied)
    becomes(source, Unreachable)
    fake.start()
    becomes(source, b"gilles")


@pytest.mark.parametrize("text", ["", "[", "no JSON", '[{"key": "a", "value": "!"}]', '{"key": "a"}', "[" * 5000])
def test_a_damaged_copy_is_refused_with_a_line(mirrored, copied, tmp_path, caplog, text):
    (tmp_path / "copy.json").write_text(text)
    (tmp_path / "copy.json").chmod(0o600)
    becomes(mirrored(closed(), copied), Unreachable)
    logged(caplog, f"{tmp_path}/copy.json: not used: not the output of `consul kv export`")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o602])
def test_a_copy_that_others_may_read_or_write_is_refused_with_a_line(mirrored, copied, tmp_path, caplog, mode):
    keep(tmp_path / "copy.json", WHOLE, mode)
    becomes(mirrored(closed(), copied), Unreachable)
    logged(caplog, "others may read it")


def test_a_copy_of_another_table_is_no_absence(mirrored, copied, tmp_path, caplog):
    keep(tmp_path / "copy.json", {key.replace("aliases", "other"): value for key, value in WHOLE.items()})
    becomes(mirrored(closed(), copied), Unreachable)
    logged(caplog, f"{tmp_path}/copy.json: ignored: contains no keys under mail/aliases/")


def test_a_copy_older_than_max_age_is_an_error(mirrored, copied, tmp_path):
    keep(tmp_path / "copy.json", WHOLE)
    os.utime(tmp_path / "copy.json", (time.time() - 90_000,) * 2)
    source = mirrored(closed(), copied)
    becomes(source, Unreachable)
    with pytest.raises(Unreachable, match=r"no data from Consul for 9\d{4} s"):
        ask(source)


def test_an_export_made_by_hand_answers_for_what_it_holds_and_proves_no_empty_bucket(mirrored, copied, tmp_path):
    keep(tmp_path / "copy.json", {"mail/aliases/alias/root": b"gilles"})
    source = mirrored(closed(), copied)
    becomes(source, b"gilles")
    with pytest.raises(SourceError, match="mail/aliases/domain/ is not in the copy"):
        ask(source, b"example.org", "domain")


def test_what_was_hidden_is_no_absence_after_a_start_from_the_copy(fake, mirrored, copied, tmp_path):
    fake.denied = (DOMAIN,)
    source = mirrored(fake.address, copied)
    written(tmp_path / "copy.json", {"mail/aliases/alias/root": b"gilles"})
    source.close()
    down = mirrored(closed(), copied)
    becomes(down, b"gilles")
    with pytest.raises(SourceError):
        ask(down, b"example.org", "domain")
    again = mirrored(fake.address, copied)
    settled(again)
    with pytest.raises(Forbidden):
        ask(again, b"example.org", "domain")


def test_a_copy_is_never_replaced_by_a_worse_one(fake, mirrored, copied, tmp_path):
    path = tmp_path / "copy.json"
    source = mirrored(fake.address, copied)
    written(path, {"mail/aliases/alias/root": b"gilles"})
    good = path.read_text()
    fake.denied = (PREFIX,)
    fake.put(b"mail/aliases/zz", b"wakes the watch")
    for _ in eventually("several failures", 10):
        if source.watches[0].backoff.failures > 3:
            break
    fake.handle = html
    for _ in eventually("several more", 10):
        if source.watches[0].backoff.failures > 6:
            break
    assert (path.read_text(), os.listdir(tmp_path)) == (good, ["copy.json"])


def test_a_copy_that_cannot_be_written_is_one_line_and_no_outage(fake, mirrored, tmp_path, caplog):
    table = replace(TABLE, snapshot=str(tmp_path / "none" / "copy.json"), max_age=0.3)
    source = mirrored(fake.address, table)
    settled(source)
    asked = len(fake.requests)
    for _ in eventually("several turns", 10):
        if len(fake.requests) > asked + 5:
            break
    assert lines(caplog) == [f"{tmp_path}/none/copy.json: not written: No such file or directory"]
    assert ask(source) == b"gilles"
    (tmp_path / "none").mkdir()
    written(tmp_path / "none" / "copy.json", {"mail/aliases/alias/root": b"gilles"})


def test_a_disk_that_is_full_leaves_the_old_copy_and_is_one_line(fake, mirrored, copied, tmp_path, monkeypatch, caplog):
    path = tmp_path / "copy.json"
    source = mirrored(fake.address, copied)
    written(path, {"mail/aliases/alias/root": b"gilles"})
    good = path.read_text()

    def full(*_arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("table_consul.files.AtomicWriter.write", full)
        for name in (b"eric", b"robert"):
            fake.put(ROOT, name)
            becomes(source, name)
        assert (path.read_text(), os.listdir(tmp_path)) == (good, ["copy.json"])
    assert lines(caplog) == [f"{path}: not written: No space left on device"]


def test_a_copy_whose_last_step_fails_is_one_line(fake, mirrored, copied, tmp_path, monkeypatch, caplog):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("table_consul.files.AtomicWriter.commit", full)
    source = mirrored(fake.address, copied)
    for name in (b"eric", b"robert"):
        fake.put(ROOT, name)
        becomes(source, name)
    source.close()
    fake.put(ROOT, b"gilles")
    source.watches[0].join(10)
    assert lines(caplog) == [f"{tmp_path}/copy.json: not written: No space left on device"]


def test_a_disk_without_any_room_is_one_line_and_no_outage(fake, mirrored, copied, tmp_path, monkeypatch, caplog):
    honest = os.open

    def full(path, flags, *mode):
        made = honest(path, flags, *mode)
        if not str(path).endswith(".tmp"):
            return made
        os.close(made)
        return honest("/dev/full", os.O_WRONLY)

    monkeypatch.setattr(os, "open", full)
    for number in range(400):  # more than a buffer holds: what is in it fails to be written once more at the end
        fake.put(ALIAS + b"%d" % number, b"x" * 50)
    source = mirrored(fake.address, copied)
    assert ask(source) == b"gilles"
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")
    assert lines(caplog) == [f"{tmp_path}/copy.json: not written: No space left on device"]
    assert os.listdir(tmp_path) == []


def test_of_a_bucket_that_is_known_in_part_no_copy_is_written(fake, mirrored, copied, tmp_path):
    fake.denied = (ALIAS + b"secret", ALIAS + b"-")
    fake.put(ALIAS + b"secret", b"x")
    source = mirrored(fake.address, copied)
    for name in (b"eric", b"robert"):
        fake.put(ROOT, name)
        becomes(source, name)
    source.close()
    fake.put(ROOT, b"gilles")
    source.watches[0].join(10)
    assert os.listdir(tmp_path) == []


# ---- update ----


def test_an_update_wakes_a_pausing_watch(fake, sources, monkeypatch):
    monkeypatch.setattr("table_consul.backoff.FIRST_PAUSE_SECONDS", 60.0)
    monkeypatch.setattr("table_consul.backoff.LAST_PAUSE_SECONDS", 60.0)
    fake.stop()
    source = sources(fake.address)
    with pytest.raises(Unreachable):
        told(source)
    fake.start()
    source.update()
    for _ in eventually("it is back", 10):
        with contextlib.suppress(SourceError):
            assert told(source) == b"gilles"
            return


def test_an_update_reads_the_token_file_again_and_says_when_it_cannot(fake, sources, tmp_path):
    path = tmp_path / "token"
    path.write_text("first")
    fake.token = "first"
    source = sources(fake.address, token_file=str(path))
    assert told(source) == b"gilles"
    path.unlink()
    with pytest.raises(SourceError, match="token file"):
        source.update()
    assert told(source) == b"gilles"
    path.write_text("second")
    fake.token = "second"
    source.update()
    fake.put(ROOT, b"eric")
    for _ in eventually("the edit", 10):
        if told(source) == b"eric":
            break


def test_a_token_replaced_in_its_file_needs_no_update(fake, mirrored, tmp_path):
    path = tmp_path / "token"
    path.write_text("first")
    fake.token = "first"
    source = mirrored(fake.address, token_file=str(path))
    assert ask(source) == b"gilles"
    fake.token = "second"
    path.write_text("second")
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")


def test_an_update_with_a_bad_configuration_keeps_the_old_one(fake, sources):
    source = sources(fake.address)
    assert told(source) == b"gilles"
    source.box[0] = ConfigError("no TOML")
    with pytest.raises(ConfigError, match="no TOML"):
        source.update()
    fake.put(ROOT, b"eric")
    for _ in eventually("the edit", 10):
        if told(source) == b"eric":
            break


def test_an_update_with_another_address_answers_from_there(fake, sources):
    source = sources(fake.address)
    assert told(source) == b"gilles"
    with FakeConsul() as other:
        other.put(ROOT, b"eric")
        source.box[0] = Config(None, consul=ConsulConfig(addresses=(other.address,)), defaults=TABLE)
        source.update()
        assert told(source) == b"eric"


def test_an_update_from_an_address_where_nothing_was_ever_read(fake, sources):
    source = sources(closed())
    with pytest.raises(Unreachable):
        told(source)
    source.box[0] = Config(None, consul=ConsulConfig(addresses=(fake.address,)), defaults=TABLE)
    source.update()
    assert told(source) == b"gilles"


def test_an_update_while_consul_is_away_does_not_throw_the_last_good_copy_away(fake, sources):
    source = sources(fake.address)
    assert told(source) == b"gilles"
    fake.stop()
    settings = ConsulConfig(addresses=(fake.address, closed()))
    source.box[0] = Config(None, consul=settings, defaults=TABLE)
    source.update()
    assert (told(source), told(source, b"nobody")) == (b"gilles", None)
    fake.start()
    fake.put(ROOT, b"eric")
    for _ in eventually("it is back", 10):
        if told(source) == b"eric":
            break


@pytest.mark.parametrize(
    "setting",
    [{"max_age": 1000.0}, {"deadline": 0.4}, {"snapshot": "/nonexistent/copy"}, {"procexec_reply": "table-result"}],
)
def test_update_of_a_setting_that_no_entry_depends_on_keeps_the_data_through_an_outage(fake, sources, setting):
    source = sources(fake.address)
    assert told(source) == b"gilles"
    fake.stop()
    source.box[0] = Config(None, consul=ConsulConfig(addresses=(fake.address,)), defaults=replace(TABLE, **setting))
    source.update()
    assert (told(source), told(source, b"nobody")) == (b"gilles", None)


def test_absence_is_proven_after_an_update_that_kept_the_data(fake, sources):
    source = sources(fake.address)
    assert told(source) == b"gilles"
    fake.stop()
    source.box[0] = Config(
        None, consul=ConsulConfig(addresses=(fake.address,)), defaults=replace(TABLE, max_age=1000.0)
    )
    source.update()
    assert told(source) == b"gilles"
    fake.denied = (ROOT,)
    hide_silently(fake)
    fake.start()
    ((_, one),) = source.watches()
    for _ in eventually("it is noticed", 10):
        if isinstance(one.mirror.last_error, Forbidden):
            break
    assert told(source) == b"gilles"


def hide_silently(fake):
    """Answer as Consul before 1.11, which does not report that a list is filtered."""

    def handle(request):
        answer = fake.consul(request)
        answer.headers.pop("X-Consul-Results-Filtered-By-ACLs", None)
        return answer

    fake.handle = handle


def test_hidden_key_with_capitals_is_not_taken_for_absent(fake, mirrored):
    fake.put(ALIAS + b"Eric", b"x")
    source = mirrored(fake.address)
    assert ask(source, b"eric") == b"x"
    fake.denied = (ALIAS + b"Eric",)
    hide_silently(fake)
    for _ in eventually("it is noticed", 10):
        fake.put(b"mail/aliases/zz", str(time.monotonic()).encode())
        if isinstance(source.watches[0].mirror.last_error, Forbidden):
            break
    assert ask(source, b"eric") == b"x"


def test_stopped_watch_does_not_end_the_outage_of_its_successor(fake, mirrored, caplog):
    held = threading.Event()
    source = mirrored(fake.address)
    settled(source)
    fake.handle = lambda request: held.wait(10) and fake.consul(request)
    source.update()
    former = source.watches[0]
    source.close()
    latter = mirrored(closed(), former=source)
    for _ in eventually("it fails", 10):
        if latter.watches[0].backoff.failures > 1:
            break
    held.set()
    fake.put(ROOT, b"eric")
    former.join(10)
    assert not any("recovered" in line for line in lines(caplog))
    assert latter.watches[0].backoff.since is not None
    assert ask(latter) == b"gilles"


def test_an_update_that_mends_an_outage_lets_its_end_be_told(fake, sources, caplog):
    caplog.set_level("INFO")
    source = sources(fake.address)
    assert told(source) == b"gilles"
    fake.stop()
    for _ in eventually("the outage is told", 10):
        if any("serving the last good copy" in line for line in caplog.messages):
            break
    fake.start()
    source.box[0] = Config(None, consul=ConsulConfig(addresses=(fake.address, closed())), defaults=TABLE)
    source.update()
    assert told(source) == b"gilles"
    for _ in eventually("its end is told", 10):
        if any(" recovered after " in line for line in caplog.messages):
            break


def test_entries_judged_by_other_rules_are_not_taken_over(fake, sources):
    fake.put(ROOT, b"|sh")
    source = sources(fake.address, replace(TABLE, allow_commands=True))
    assert told(source) == b"|sh"
    fake.stop()
    source.box[0] = Config(None, consul=ConsulConfig(addresses=(fake.address,)), defaults=TABLE)
    source.update()
    with pytest.raises(SourceError):
        told(source)


def test_a_watch_that_was_stopped_writes_no_copy(fake, mirrored, copied, tmp_path):
    held = threading.Event()

    def slow(request):
        held.wait(10)
        return fake.consul(request)

    fake.handle = slow
    source = mirrored(fake.address, copied)
    source.close()
    held.set()
    source.watches[0].join(10)
    assert (source.watches[0].is_alive(), os.listdir(tmp_path)) == (False, [])


# ---- several addresses ----


def test_the_first_answer_fails_over_inside_the_deadline(fake, mirrored):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hangs = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        assert ask(mirrored([hangs, fake.address], replace(TABLE, deadline=2.0))) == b"gilles"
        assert time.monotonic() - began < 2.0


def test_the_address_that_works_is_kept_and_another_taken_when_it_fails(fake, mirrored):
    with FakeConsul() as other:
        other.put(ROOT, b"eric")
        other.index = 500
        source = mirrored([closed(), fake.address, other.address])
        assert ask(source) == b"gilles"
        fake.put(ROOT, b"robert")
        becomes(source, b"robert")
        assert other.requests == []
        fake.stop()
        becomes(source, b"eric")


# ---- the end ----


def test_closing_ends_the_threads(fake, mirrored):
    source = mirrored(fake.address)
    settled(source)
    source.close()
    fake.put(ROOT, b"eric")
    for each in source.watches:
        each.join(10)
        assert not each.is_alive()


def test_a_bug_in_restoring_is_no_end_of_the_watch(fake, mirrored, copied, monkeypatch, caplog):
    def broken(*_arguments):
        raise ZeroDivisionError

    monkeypatch.setattr("table_consul.sources.snapshot.SnapshotFile.load", broken)
    assert ask(mirrored(fake.address, copied)) == b"gilles"
    assert "internal error; please report it" in lines(caplog)
