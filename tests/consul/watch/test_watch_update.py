from __future__ import annotations

import contextlib
import threading

import pytest
from msgspec.structs import replace

from table_consul.config import Config, ConsulConfig
from table_consul.errors import ConfigError, SourceError, Unreachable
from tests.consul.clients import closed_port
from tests.consul.watch.watching import (
    ROOT,
    TABLE,
    ask,
    ask_table,
    becomes,
    lines,
    settled,
)
from tests.dialogue import eventually
from tests.fake_consul import FakeConsul

pytestmark = pytest.mark.parametrize("version", ["1.22"])


def test_update_wakes_a_pausing_watch(fake, sources, monkeypatch):
    monkeypatch.setattr("table_consul.backoff.FIRST_PAUSE_SECONDS", 60.0)
    monkeypatch.setattr("table_consul.backoff.LAST_PAUSE_SECONDS", 60.0)
    fake.stop()
    source = sources(fake.address)
    with pytest.raises(Unreachable):
        ask_table(source)
    fake.start()
    source.update()
    for _ in eventually("Consul is back", 10):
        with contextlib.suppress(SourceError):
            assert ask_table(source) == b"gilles"
            return


def test_update_reads_the_token_file_again_and_reports_a_failure(fake, sources, tmp_path):
    path = tmp_path / "token"
    path.write_text("first")
    fake.token = "first"
    source = sources(fake.address, token_file=str(path))
    assert ask_table(source) == b"gilles"
    path.unlink()
    with pytest.raises(SourceError, match="token file"):
        source.update()
    assert ask_table(source) == b"gilles"
    path.write_text("second")
    fake.token = "second"
    source.update()
    fake.put(ROOT, b"eric")
    for _ in eventually("the edit", 10):
        if ask_table(source) == b"eric":
            break


def test_token_replaced_in_its_file_needs_no_update(fake, mirrored, tmp_path):
    path = tmp_path / "token"
    path.write_text("first")
    fake.token = "first"
    source = mirrored(fake.address, token_file=str(path))
    assert ask(source) == b"gilles"
    fake.token = "second"
    path.write_text("second")
    fake.put(ROOT, b"eric")
    becomes(source, b"eric")


def test_update_with_a_bad_configuration_keeps_the_old_one(fake, sources):
    source = sources(fake.address)
    assert ask_table(source) == b"gilles"
    source.box[0] = ConfigError("no TOML")
    with pytest.raises(ConfigError, match="no TOML"):
        source.update()
    fake.put(ROOT, b"eric")
    for _ in eventually("the edit", 10):
        if ask_table(source) == b"eric":
            break


def test_update_with_another_address_reads_from_it(fake, sources):
    source = sources(fake.address)
    assert ask_table(source) == b"gilles"
    with FakeConsul() as other:
        other.put(ROOT, b"eric")
        source.box[0] = Config(None, consul=ConsulConfig(addresses=(other.address,)), defaults=TABLE)
        source.update()
        assert ask_table(source) == b"eric"


def test_update_to_a_working_address_recovers_from_a_failed_first_load(fake, sources):
    source = sources(closed_port())
    with pytest.raises(Unreachable):
        ask_table(source)
    source.box[0] = Config(None, consul=ConsulConfig(addresses=(fake.address,)), defaults=TABLE)
    source.update()
    assert ask_table(source) == b"gilles"


def test_update_during_an_outage_keeps_the_last_good_copy(fake, sources):
    source = sources(fake.address)
    assert ask_table(source) == b"gilles"
    fake.stop()
    settings = ConsulConfig(addresses=(fake.address, closed_port()))
    source.box[0] = Config(None, consul=settings, defaults=TABLE)
    source.update()
    assert (ask_table(source), ask_table(source, b"nobody")) == (b"gilles", None)
    fake.start()
    fake.put(ROOT, b"eric")
    for _ in eventually("Consul is back", 10):
        if ask_table(source) == b"eric":
            break


@pytest.mark.parametrize(
    "setting",
    [
        {"max_age": 1000.0},
        {"deadline": 0.4},
        {"snapshot": "/nonexistent/copy"},
        {"procexec_reply": "table-result"},
        {"max_keys": 1000},
        {"services": ("domain", "alias", "credentials")},
        {"paths": {"domain": "mail/domains"}},
    ],
)
def test_update_of_an_unrelated_setting_keeps_the_data_during_an_outage(fake, sources, setting):
    source = sources(fake.address)
    assert ask_table(source) == b"gilles"
    fake.stop()
    source.box[0] = Config(None, consul=ConsulConfig(addresses=(fake.address,)), defaults=replace(TABLE, **setting))
    source.update()
    assert (ask_table(source), ask_table(source, b"nobody")) == (b"gilles", None)


def test_stopped_watch_does_not_end_the_outage_of_its_successor(fake, mirrored, caplog):
    held = threading.Event()
    source = mirrored(fake.address)
    settled(source)
    fake.handle = lambda request: held.wait(10) and fake.consul(request)
    source.update()
    former = source.watches[0]
    source.close()
    latter = mirrored(closed_port(), former=source)
    for _ in eventually("the watch fails", 10):
        if latter.watches[0].backoff.failures > 1:
            break
    held.set()
    fake.put(ROOT, b"eric")
    former.join(10)
    assert not any("recovered" in line for line in lines(caplog))
    assert latter.watches[0].backoff.since is not None
    assert ask(latter) == b"gilles"


def test_update_that_ends_an_outage_logs_its_end(fake, sources, caplog):
    caplog.set_level("INFO")
    source = sources(fake.address)
    assert ask_table(source) == b"gilles"
    fake.stop()
    for _ in eventually("the outage is logged", 10):
        if any("serving the last good copy" in line for line in caplog.messages):
            break
    fake.start()
    source.box[0] = Config(None, consul=ConsulConfig(addresses=(fake.address, closed_port())), defaults=TABLE)
    source.update()
    assert ask_table(source) == b"gilles"
    for _ in eventually("the end of the outage is logged", 10):
        if any(" recovered after " in line for line in caplog.messages):
            break


def test_entries_validated_by_other_settings_are_not_adopted(fake, sources):
    fake.put(ROOT, b"|sh")
    source = sources(fake.address, replace(TABLE, allow_commands=True))
    assert ask_table(source) == b"|sh"
    fake.stop()
    source.box[0] = Config(None, consul=ConsulConfig(addresses=(fake.address,)), defaults=TABLE)
    source.update()
    with pytest.raises(SourceError):
        ask_table(source)


def test_service_added_by_an_update_during_an_outage_is_an_error(fake, sources):
    fake.put(b"mail/aliases/string/vera", b"x")
    source = sources(fake.address)
    assert ask_table(source) == b"gilles"
    fake.stop()
    table = replace(TABLE, services=(*TABLE.services, "string"))
    source.box[0] = Config(None, consul=ConsulConfig(addresses=(fake.address,)), defaults=table)
    source.update()
    assert (ask_table(source), ask_table(source, b"nobody")) == (b"gilles", None)
    for key in (b"vera", b"nobody"):
        with pytest.raises(SourceError):
            ask_table(source, key, "string")
    fake.start()
    for _ in eventually("Consul is back", 10):
        with contextlib.suppress(SourceError):
            if ask_table(source, b"vera", "string") == b"x":
                break


def test_folder_moved_by_an_update_during_an_outage_is_an_error(fake, sources):
    source = sources(fake.address)
    assert ask_table(source, b"example.org", "domain") == b"example.org"
    fake.stop()
    table = replace(TABLE, paths={"domain": "mail/aliases/domains"})
    source.box[0] = Config(None, consul=ConsulConfig(addresses=(fake.address,)), defaults=table)
    source.update()
    assert ask_table(source) == b"gilles"
    with pytest.raises(SourceError):
        ask_table(source, b"example.org", "domain")
