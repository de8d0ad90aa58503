"""Metrics of the running program, read from its socket or text file."""

from __future__ import annotations

import os
import select
from pathlib import Path
from types import SimpleNamespace

import pytest

import table_consul
from table_consul import __version__
from tests.dialogue import Child, eventually, write_config
from tests.fake_consul import FakeConsul, stall
from tests.smtpd.metrics import BUILD_INFO, connect, metrics_config, read_textfile, scrape, scrape_until

CHECKOUT = Path(table_consul.__file__).parents[1]
DIALOGUE = (
    b"lookup|alias|%d|root",
    b"lookup|alias|%d|root",
    b"lookup|alias|%d|nobody",
    b"lookup|alias|%d|command",
    b"check|alias|%d|root",
    b"check|domain|%d|example.org",
    b"check|domain|%d|example.net",
    b"fetch|source|%d",
    b"lookup|nonsense|%d|root",
    b"dance|alias|%d|root",
    b"lookup|alias|%d",
)
EXPECTED = {
    ("lookup", "found", "alias", "consul"): 2,
    ("lookup", "not-found", "alias", "consul"): 1,
    ("lookup", "error", "alias", "consul"): 2,
    ("check", "found", "alias", "consul"): 1,
    ("check", "found", "domain", "consul"): 1,
    ("check", "not-found", "domain", "consul"): 1,
    ("fetch", "found", "source", "consul"): 1,
    ("lookup", "error", "(other)", "consul"): 1,
    ("(other)", "error", "alias", "consul"): 1,
    ("update", "ok", "", "consul"): 1,
}


def samples_of(samples, table):
    return {labels: value for labels, value in samples.items() if labels[-1] == table}


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    """The program, answering from a file as table aliases. Tests share it; each uses its own table name."""
    folder = tmp_path_factory.mktemp("child")
    with Child(metrics_config(folder, textfile=True, listen=f"unix://{folder}/{{table}}.sock")) as child:
        child.folder, child.socket = folder, folder / "aliases.sock"
        child.handshake()
        scrape_until(child.socket, "table_consul_build_info", ("aliases", __version__), 1)
        yield child
        assert child.end() == 0


def test_dialogue_is_counted_exactly(child):
    malformed = scrape(child.socket)["table_consul_malformed_lines_total"]["aliases",]
    for number, line in enumerate(DIALOGUE):
        child.ask(b"table|0.1|0|consul|" + line % number)
    child.say(b"not a protocol line\n")
    assert child.ask(b"table|0.1|0|consul|update|99") == b"update-result|99|ok"
    samples = scrape_until(child.socket, "table_consul_requests_total", ("update", "ok", "", "consul"), 1)
    assert samples_of(samples["table_consul_requests_total"], "consul") == EXPECTED
    assert sum(samples_of(samples["table_consul_request_seconds_count"], "consul").values()) == sum(EXPECTED.values())
    assert samples["table_consul_malformed_lines_total"] == {("aliases",): malformed + 3}
    assert samples["table_consul_deadline_hits_total"]["consul",] == 0


def test_pipelined_requests_are_counted_like_single_ones(child):
    for _ in range(50):  # the replies to all requests at once may be more than the socket holds
        child.say(b"".join(b"table|0.1|0|table-name|lookup|alias|%d|root\n" % number for number in range(100)))
        for _ in range(100):
            child.line()
    labels = ("lookup", "found", "alias", "table-name")
    samples = scrape_until(child.socket, "table_consul_requests_total", labels, 5000)
    assert samples_of(samples["table_consul_request_seconds_count"], "table-name") == {("alias", "table-name"): 5000}


def test_text_file_is_written_after_the_handshake_and_at_an_update(child):
    path = child.folder / "aliases.prom"
    assert read_textfile(path)["table_consul_build_info"] == BUILD_INFO
    child.ask(b"table|0.1|0|aliases|lookup|alias|1|staff")
    child.ask(b"table|0.1|0|aliases|update|2")
    for _ in eventually("the reply is in the file"):
        if ("lookup", "found", "alias", "aliases") in read_textfile(path).get("table_consul_requests_total", {}):
            break
    assert "table_consul_up" not in read_textfile(path)


def test_silent_and_malformed_clients_delay_no_reply(child):
    for sent in (b"", b"\0\xff\n", b"GET", b"POST / HTTP/1.1\r\n\r\n", b"GET /" + b"x" * 70000):
        with connect(child.socket) as client:
            client.sendall(sent)
    with connect(child.socket):
        assert child.ask(b"table|0.1|0|third|lookup|alias|1|root") == b"lookup-result|1|not-found"
        scrape_until(child.socket, "table_consul_requests_total", ("lookup", "not-found", "alias", "third"), 1)


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """The program with a mirror of a Consul that has two good entries, a bad one, and two that smtpd would reject."""
    folder = tmp_path_factory.mktemp("mirror")
    with FakeConsul() as fake:
        fake.put(b"mail/aliases/alias/root", b"gilles")
        fake.put(b"mail/aliases/alias/staff", b"gilles, eric")
        fake.put(b"mail/aliases/alias/broken", b"|/bin/sh")
        fake.put(b"mail/aliases/alias/*", b"two words")
        fake.put(b"mail/aliases/relayhost/example.org", b"lmtp://mx")
        fake.put(b"mail/aliases/netaddr/mx.example.org", b"")
        config = metrics_config(folder, 'prefix = "mail"', address=fake.address, listen=f"unix://{folder}/sock")
        with Child(config) as child:
            child.handshake()
            # The index is published last of a snapshot.
            labels = ("mail/aliases/", "aliases")
            scrape_until(folder / "sock", "table_consul_snapshot_index", labels, fake.index)
            yield SimpleNamespace(fake=fake, child=child, socket=folder / "sock", labels=labels)


def test_mirror_publishes_its_snapshot(mirror):
    samples, labels = scrape(mirror.socket), mirror.labels
    expected = {
        "snapshot_keys": 6,
        "snapshot_index": mirror.fake.index,
        "entries_refused": 3,
        "up": 1,
        "reloads_total": 1,
        "failures_total": 0,
        "too_large": 0,
    }
    assert {name: samples[f"table_consul_{name}"] for name in expected} == {
        name: {labels: value} for name, value in expected.items()
    }
    assert 0 <= samples["table_consul_snapshot_age_seconds"][labels] < 30
    assert 0 <= samples["table_consul_load_seconds"][labels] < 30


def test_mirror_is_down_from_the_loss_of_consul_to_its_return(mirror):
    before = scrape(mirror.socket)
    scrape_until(mirror.socket, "table_consul_up", mirror.labels, 1)
    mirror.fake.stop()
    samples = scrape_until(mirror.socket, "table_consul_up", mirror.labels, 0)
    assert samples["table_consul_snapshot_keys"] == before["table_consul_snapshot_keys"]
    assert samples["table_consul_failures_total"][mirror.labels] >= 1
    mirror.fake.start()
    scrape_until(mirror.socket, "table_consul_up", mirror.labels, 1)
    mirror.fake.put(b"mail/aliases/alias/other", b"eric")
    keys = before["table_consul_snapshot_keys"][mirror.labels] + 1
    samples = scrape_until(mirror.socket, "table_consul_snapshot_keys", mirror.labels, keys)
    assert samples["table_consul_reloads_total"][mirror.labels] == 2


def test_direct_table_is_down_from_the_loss_of_consul_to_the_next_answer(tmp_path):
    path, labels = tmp_path / "sock", ("aliases/", "aliases")
    with FakeConsul() as fake:
        fake.put(b"aliases/alias/root", b"gilles")
        config = metrics_config(tmp_path, 'mode = "direct"', address=fake.address, listen=f"unix://{path}")
        with Child(config) as child:
            child.handshake()
            child.ask(b"table|0.1|0|aliases|lookup|alias|1|root")
            samples = scrape_until(path, "table_consul_up", labels, 1)
            assert samples["table_consul_failures_total"] == {labels: 0}
            fake.stop()
            child.ask(b"table|0.1|0|aliases|lookup|alias|2|root")
            samples = scrape_until(path, "table_consul_up", labels, 0)
            assert samples["table_consul_failures_total"] == {labels: 1}
            assert list(samples["table_consul_last_error_timestamp_seconds"]) == [("unreachable", *labels)]
            fake.start()
            for _ in eventually("Consul is contacted again"):
                if b"found" in child.ask(b"table|0.1|0|aliases|lookup|alias|3|root"):
                    break
            scrape_until(path, "table_consul_up", labels, 1)


def test_reply_at_the_deadline_is_counted_as_a_deadline_hit(tmp_path):
    path = tmp_path / "sock"
    with FakeConsul() as fake:
        fake.handle = stall
        config = metrics_config(
            tmp_path, 'mode = "direct"', "deadline = 0.05", address=fake.address, listen=f"unix://{path}"
        )
        with Child(config) as child:
            child.handshake()
            assert b"|error|" in child.ask(b"table|0.1|0|aliases|lookup|alias|1|root")
            scrape_until(path, "table_consul_deadline_hits_total", ("aliases",), 1)


def test_update_starts_and_moves_the_exporter(tmp_path):
    with Child(metrics_config(tmp_path)) as child:
        child.handshake()
        for path in (tmp_path / "old", tmp_path / "new"):
            metrics_config(tmp_path, listen=f"unix://{path}")
            assert child.ask(b"table|0.1|0|aliases|update|1") == b"update-result|1|ok"
            scrape_until(path, "table_consul_build_info", ("aliases", __version__), 1)
        assert child.end() == 0


def read_log(child, text):
    """Read the log until it contains this text."""
    for _ in eventually(f"{text!r} is logged"):
        if select.select([child.process.stderr], [], [], 0)[0]:
            child._log += os.read(child.process.stderr.fileno(), 65536)
        if text in child._log:
            break


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("raise ModuleNotFoundError('blocked', name='prometheus_client')", "prometheus_client is not installed"),
        ("raise RuntimeError('bug')", "RuntimeError: bug"),
    ],
)
def test_library_that_does_not_load_is_logged_once_and_requests_are_answered(tmp_path, text, problem):
    library = tmp_path / "without" / "prometheus_client"
    library.mkdir(parents=True)
    (library / "__init__.py").write_text(text)
    config = metrics_config(tmp_path, textfile=True, listen=f"unix://{tmp_path}/sock")
    with Child(config, environ={"PYTHONPATH": f"{library.parent}:{CHECKOUT}"}) as child:
        child.handshake()
        assert child.ask(b"table|0.1|0|aliases|lookup|alias|1|root") == b"lookup-result|1|found|gilles"
        # The thread that imports the library may be slower than the whole conversation.
        read_log(child, f"{problem} (install table-consul[metrics] or python3-prometheus-client, then run: ".encode())
        assert child.end() == 0
        log = child.log()
    assert log.count("no metrics: ") == 1
    assert "Traceback" not in log


def test_library_is_imported_only_if_metrics_are_configured(tmp_path):
    library = tmp_path / "traced" / "prometheus_client"
    library.mkdir(parents=True)
    (library / "__init__.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    with Child(str(write_config(tmp_path)), environ={"PYTHONPATH": str(library.parent)}) as child:
        child.handshake()
        child.ask(b"table|0.1|0|aliases|lookup|alias|1|root")
        assert child.end() == 0
    assert not (tmp_path / "imported").exists()
