from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import stat
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from table_consul import __version__
from table_consul.backoff import Backoff
from table_consul.counters import CELLS_MAX, Counters
from table_consul.errors import ConfigError, Unreachable
from table_consul.metrics import Reader
from table_consul.protocol import Failed, Found, NotFound, Request, Updated
from table_consul.services import Table
from tests.dialogue import Child, eventually, write_config
from tests.fake_consul import FakeConsul, stall


def parsed(text):
    """Every sample by name, and by its labels without their names, in alphabetical order of those."""
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = tuple(value for _, value in sorted(sample.labels.items()))
            assert key not in samples.setdefault(sample.name, {}), f"{sample} twice, which node_exporter refuses"
            samples[sample.name][key] = sample.value
    return samples


def asked(connection):
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        assert answer.status == 200
        return parsed(answer.read().decode())


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost", timeout=10)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


def scraped(path):
    return asked(UnixConnection(path))


def read(path):
    """What the file holds, once it is there."""
    for _ in eventually(f"{path} is written"):
        if path.exists():
            return parsed(path.read_text())
    return None


def soon(path, name, labels, expected):
    """All samples, as soon as the one named has this value."""
    samples = {}
    for _ in eventually(f"{name}{labels} = {expected}"):
        # The name is in the folder a moment before anybody listens.
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            samples = scraped(path)
        if samples.get(name, {}).get(labels) == expected:
            break
    return samples


def configured(folder, *defaults, address=None, textfile=False, listen=None):
    lines = ["[metrics]"]
    lines += [f'textfile = "{folder}/{{table}}.prom"'] if textfile else []
    lines += [f'listen = "{listen}"'] if listen else []
    return str(write_config(folder, *defaults, more="\n".join(lines), address=address))


def free_port(family=socket.AF_INET, host="127.0.0.1"):
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def request(service="alias", op="lookup", table="aliases"):
    return Request(op, b"1", table, service, b"root")


def layout(name):
    if name == "..":
        raise ConfigError("no such name")
    return Table(name or "consul", deadline=2.0)


def added(tally, answered, seconds):
    for asked_for, kind in answered:
        tally.add(asked_for, kind, seconds)


def counts(tally):
    return {key: sum(cell[:-1]) for key, cell in tally.cells().items()}


# ---- the tally ----


def test_requests_are_counted_by_table_service_operation_and_kind_of_reply():
    tally = Counters(layout)
    added(tally, [(request(), Found), (request(), Found), (request("domain", "check"), NotFound)], 0.0)
    added(tally, [(request("", "update"), Updated), (request(), Failed)], 0.0)
    assert {
        ("aliases", "alias", "lookup", Found): 2,
        ("aliases", "domain", "check", NotFound): 1,
        ("aliases", "", "update", Updated): 1,
        ("aliases", "alias", "lookup", Failed): 1,
    } == counts(tally)


@pytest.mark.parametrize(("seconds", "place"), [(0.0, 0), (0.00001, 0), (0.00002, 1), (0.05, 7), (1.5, 10), (99.0, 11)])
def test_an_answer_is_counted_in_the_interval_of_its_seconds_whose_end_belongs_to_it(seconds, place):
    tally = Counters(layout)
    added(tally, [(request(), Found), (request(), Found)], seconds)
    (cell,) = tally.cells().values()
    assert [2 if number == place else 0 for number in range(12)] == cell[:-1]
    assert 2 * seconds == pytest.approx(cell[-1])


def test_answers_that_took_their_deadline_are_counted_by_table():
    tally = Counters(layout)
    for seconds in (1.99, 2.0, 3.0):
        added(tally, [(request(), Failed)], seconds)
    added(tally, [(request(table=".."), Failed)], 3.0)
    assert tally.deadline_hits == {"aliases": 2}


def test_names_that_strangers_could_invent_do_not_become_series():
    tally = Counters(layout)
    for number in range(10):
        added(tally, [(request(f"service{number}", f"op{number}"), Failed)], 0.0)
    assert {("aliases", "(other)", "(other)", Failed): 10} == counts(tally)


def test_tables_beyond_the_bound_are_counted_together():
    tally = Counters(layout)
    for number in range(CELLS_MAX + 10):
        added(tally, [(request(table=f"table{number}"), Found)], 3.0)
        tally.failed(f"table{number}", Unreachable("away"), 0.0)
    assert (len(tally.cells()), counts(tally)["(other)", "alias", "lookup", Found]) == (CELLS_MAX + 1, 10)
    assert (len(tally.deadline_hits), len(tally.failures)) == (CELLS_MAX, CELLS_MAX)


def test_a_source_has_recovered_when_it_has_told_anything_since_it_last_could_not():
    tally = Counters(layout)
    added(tally, [(request(), Found)], 0.0)
    seen = [tally.recovered("aliases")]
    tally.failed("aliases", Unreachable("away"), 0.0)
    added(tally, [(request(), Failed)], 0.0)
    seen.append(tally.recovered("aliases"))
    added(tally, [(request(), NotFound)], 0.0)
    assert [*seen, tally.recovered("aliases")] == [True, False, True]


# ---- the reader ----


def collected(reader):
    registry = CollectorRegistry()
    registry.register(reader)
    return parsed(generate_latest(registry).decode())


def kept(tally, *watches):
    return SimpleNamespace(
        config=SimpleNamespace(consul=SimpleNamespace(addresses=("http://127.0.0.1:8500",))),
        tally=tally,
        started=1.0,
        table=layout,
        watches=lambda: [("aliases", watch) for watch in watches],
    )


def watch(**more):
    return SimpleNamespace(
        **{
            "prefix": b"aliases/",
            "too_large": False,
            "backoff": Backoff("aliases/", "error"),
            "index": 7,
            "reloads": 3,
            "load_seconds": 0.5,
            "mirror": SimpleNamespace(state=None, max_age=86400.0),
            **more,
        }
    )


def test_failures_of_one_outage_after_another_add_up():
    outage = Backoff("aliases/", "error")
    reader = Reader("aliases", kept(Counters(layout), watch(backoff=outage)))
    seen = []
    for failures in (0, 2, 1, 0, 3):
        for number in range(failures):
            outage.failure(Unreachable("away"), 100.0 + number, 0.0)
        samples = collected(reader)
        seen.append(
            (
                samples["table_consul_failures_total"]["aliases/", "aliases"],
                samples["table_consul_up"]["aliases/", "aliases"],
            )
        )
        if failures == 1:
            outage.success(200.0)
    assert seen == [(0, 1), (2, 0), (3, 0), (3, 1), (6, 0)]


def test_a_table_too_large_to_be_mirrored_counts_as_one_that_is_read_directly():
    tally = Counters(layout)
    added(tally, [(request(), Found)], 0.0)
    samples = collected(Reader("aliases", kept(tally, watch(too_large=True, index=0))))
    assert samples["table_consul_up"] == {("aliases/", "aliases"): 1}
    assert "table_consul_reloads_total" not in samples
    assert samples["table_consul_too_large"] == {("aliases/", "aliases"): 1}


def test_errors_are_counted_by_table_from_nothing_on():
    tally = Counters(layout)
    seen = []
    for answered in ([], [(request(), Found), (request(), Failed)], [(request("domain", "check"), Failed)]):
        added(tally, answered, 0.0)
        seen.append(collected(Reader("aliases", kept(tally)))["table_consul_errors_total"])
    assert seen == [{("aliases",): 0}, {("aliases",): 1}, {("aliases",): 2}]


def test_the_last_error_of_a_mirror_is_told_with_its_moment_and_stays_when_consul_is_back():
    outage = Backoff("aliases/", "error")
    reader = Reader("aliases", kept(Counters(layout), watch(backoff=outage)))
    assert "table_consul_last_error_timestamp_seconds" not in collected(reader)
    outage.failure(Unreachable("no leader"), time.monotonic() - 200, 0.0)
    outage.failure(Unreachable("connection refused"), time.monotonic() - 100, 0.0)
    outage.success(time.monotonic())
    (told,) = collected(reader)["table_consul_last_error_timestamp_seconds"].items()
    assert (told[0], told[1]) == (
        ("connection refused", "aliases/", "aliases"),
        pytest.approx(time.time() - 100, abs=5),
    )


def test_the_last_error_of_a_table_that_is_read_directly_or_from_a_file_is_told():
    tally = Counters(layout)
    added(tally, [(request(), Failed)], 0.0)
    tally.failed("aliases", Unreachable("no answer in time"), time.monotonic() - 50)
    tally.failed("..", Unreachable("never told"), 0.0)
    for address in ("http://127.0.0.1:8500", "file:///export.json"):
        own = kept(tally)
        own.config = SimpleNamespace(consul=SimpleNamespace(addresses=(address,)))
        told = collected(Reader("aliases", own))["table_consul_last_error_timestamp_seconds"]
        assert told == {("no answer in time", "aliases/", "aliases"): pytest.approx(time.time() - 50, abs=5)}


def test_an_error_of_one_cause_is_one_series_and_no_token_is_in_it():
    outage = Backoff("aliases/", "error")
    reader = Reader("aliases", kept(Counters(layout), watch(backoff=outage)))
    texts = set()
    for number in range(3):
        token = f"0123456{number}-89ab-cdef-0123-456789abcdef"
        outage.failure(Unreachable(f"away for {number}.5 s: 500 of {token} {'a1' * 20}{number}"), 100.0, 0.0)
        texts |= {key[0] for key in collected(reader)["table_consul_last_error_timestamp_seconds"]}
    assert texts == {"away for ...: 500 of ... ..."}


def test_services_that_may_not_be_read_are_told_apart():
    snapshot = SimpleNamespace(
        entries={"alias": SimpleNamespace(errors={}), "domain": SimpleNamespace(errors={})},
        forbidden={"domain": 1},
        size=1,
    )
    mirror = SimpleNamespace(state=(snapshot, time.monotonic() - 30), max_age=600.0)
    samples = collected(Reader("aliases", kept(Counters(layout), watch(mirror=mirror))))
    assert samples["table_consul_service_hidden"] == {
        ("aliases/", "alias", "aliases"): 0,
        ("aliases/", "domain", "aliases"): 1,
    }
    assert samples["table_consul_snapshot_max_age_seconds"] == {("aliases/", "aliases"): 600}


# ---- what is said of the numbers elsewhere ----

CONTRIB = Path(__file__).parents[2] / "contrib"
RULES = (CONTRIB / "prometheus" / "table-consul.rules.yml").read_text()
DASHBOARD = json.loads((CONTRIB / "grafana" / "table-consul.json").read_text())
NAMES = re.compile(r"\btable_consul_[a-z_]+")


def published():
    """The names of all that can be published, as Prometheus stores them."""
    names = set()
    for family in Reader("aliases", kept(Counters(layout))).collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}.get(family.type, [""])
        names |= {family.name + suffix for suffix in suffixes}
    return names


def panels_at(panel):
    return {
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    }


def test_alerts_and_dashboard_name_only_what_is_published():
    named = {*NAMES.findall(RULES), *NAMES.findall(json.dumps(DASHBOARD))}
    assert sorted(named - published()) == []


def test_the_dashboard_shows_all_that_is_published():
    assert sorted(published() - {*NAMES.findall(json.dumps(DASHBOARD))}) == []


def test_each_panel_of_the_dashboard_has_a_place_an_explanation_and_the_datasource_that_was_chosen():
    panels = DASHBOARD["panels"]
    places = [place for panel in panels for place in panels_at(panel)]
    assert len(places) == len({*places})
    assert max(x for x, _ in places) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["description"]
        for asked_for in (panel, *panel["targets"]):
            assert asked_for["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_each_alert_has_a_summary_a_runbook_and_a_severity():
    for alert in RULES.split("- alert: ")[1:]:
        name = alert.partition("\n")[0]
        for key in ("summary: ", "runbook: ", "severity: "):
            assert alert.count(f"\n          {key}") == 1, f"{name} has no {key}"


def test_requests_without_a_name_count_for_the_table_of_the_process():
    tally = Counters(layout)
    added(tally, [(request(table=""), Found), (request(table="aliases"), Found)], 3.0)
    samples = collected(Reader("aliases", kept(tally)))
    assert samples["table_consul_requests_total"] == {("lookup", "found", "alias", "aliases"): 2}
    assert samples["table_consul_deadline_hits_total"] == {("aliases",): 2}


def test_numbers_can_be_read_while_others_are_counted():
    tally, stop = Counters(layout), threading.Event()

    def count():
        while not stop.is_set() and len(tally.cells()) < CELLS_MAX:
            added(tally, [(request(table=f"table{len(tally.cells())}"), Found)], 0.0)

    thread = threading.Thread(target=count)
    thread.start()
    try:
        sizes = [len(counts(tally))]
        while thread.is_alive():
            sizes.append(len(counts(tally)))
    finally:
        stop.set()
        thread.join()
    assert sizes == sorted(sizes)


# ---- the program ----

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


def converse(child):
    child.handshake()
    for number, line in enumerate(DIALOGUE):
        child.ask(b"table|0.1|0|aliases|" + line % number)
    child.say(b"no line of smtpd's\n")
    return child.ask(b"table|0.1|0|aliases|update|99")


EXPECTED = {
    ("lookup", "found", "alias", "aliases"): 2,
    ("lookup", "not-found", "alias", "aliases"): 1,
    ("lookup", "error", "alias", "aliases"): 2,
    ("check", "found", "alias", "aliases"): 1,
    ("check", "found", "domain", "aliases"): 1,
    ("check", "not-found", "domain", "aliases"): 1,
    ("fetch", "found", "source", "aliases"): 1,
    ("lookup", "error", "(other)", "aliases"): 1,
    ("(other)", "error", "alias", "aliases"): 1,
    ("update", "ok", "", "aliases"): 1,
}


def test_a_dialogue_is_counted_exactly(tmp_path):
    path = tmp_path / "aliases.sock"
    with Child(configured(tmp_path, listen=f"unix://{tmp_path}/{{table}}.sock")) as child:
        assert converse(child) == b"update-result|99|ok"
        samples = soon(path, "table_consul_requests_total", ("update", "ok", "", "aliases"), 1)
        assert samples["table_consul_requests_total"] == EXPECTED
        assert sum(EXPECTED.values()) == sum(samples["table_consul_request_seconds_count"].values())
        assert samples["table_consul_malformed_lines_total"] == {("aliases",): 3}
        assert samples["table_consul_deadline_hits_total"] == {("aliases",): 0}
        assert {("aliases", __version__): 1} == samples["table_consul_build_info"]
        assert child.end() == 0


def test_a_pipelined_dialogue_is_counted_like_one_with_pauses(tmp_path):
    path = tmp_path / "aliases.sock"
    with Child(configured(tmp_path, listen=f"unix://{path}")) as child:
        child.handshake()
        child.say(b"".join(b"table|0.1|0|aliases|lookup|alias|%d|root\n" % number for number in range(5000)))
        for _ in range(5000):
            child.line()
        samples = soon(path, "table_consul_requests_total", ("lookup", "found", "alias", "aliases"), 5000)
        assert samples["table_consul_request_seconds_count"] == {("alias", "aliases"): 5000}


def test_a_textfile_of_a_table_from_a_file_is_written_after_the_handshake_and_at_update(tmp_path):
    path = tmp_path / "aliases.prom"
    with Child(configured(tmp_path, textfile=True)) as child:
        child.handshake()
        assert {("aliases", __version__): 1} == read(path)["table_consul_build_info"]
        child.ask(b"table|0.1|0|aliases|lookup|alias|1|root")
        child.ask(b"table|0.1|0|aliases|update|2")
        for _ in eventually("the answer is in the file"):
            if ("lookup", "found", "alias", "aliases") in read(path).get("table_consul_requests_total", {}):
                break
        assert "table_consul_up" not in read(path)
        assert child.end() == 0


def test_a_textfile_of_a_mirror_tells_of_its_snapshot(tmp_path):
    path, place = tmp_path / "aliases.prom", ("mail/aliases/", "aliases")
    with FakeConsul() as fake:
        fake.put(b"mail/aliases/alias/root", b"gilles")
        fake.put(b"mail/aliases/alias/staff", b"gilles, eric")
        fake.put(b"mail/aliases/alias/broken", b"|/bin/sh")
        config = configured(tmp_path, 'prefix = "mail"', address=fake.address, textfile=True)
        with Child(config) as child:
            child.handshake()
            assert child.ask(b"table|0.1|0|aliases|lookup|alias|1|root").partition(b"|1|")[2] == b"found|gilles"
            child.ask(b"table|0.1|0|aliases|update|2")
            for _ in eventually("the snapshot is in the file"):
                samples = read(path)
                # The index is the last to be noted of what was taken over.
                if samples.get("table_consul_snapshot_index") == {place: fake.index}:
                    break
            assert (
                {place: 3},
                {place: fake.index},
                {place: 1},
                {place: 1},
                {place: 1},
                {place: 0},
            ) == tuple(
                samples[f"table_consul_{name}"]
                for name in (
                    "snapshot_keys",
                    "snapshot_index",
                    "entries_refused",
                    "up",
                    "reloads_total",
                    "failures_total",
                )
            )
            assert 0 <= samples["table_consul_snapshot_age_seconds"][place] < 30
            assert 0 <= samples["table_consul_load_seconds"][place] < 30


def test_a_mirror_that_loses_consul_is_down_until_it_is_back(tmp_path):
    path, place = tmp_path / "sock", ("aliases/", "aliases")
    with FakeConsul() as fake:
        fake.put(b"aliases/alias/root", b"gilles")
        with Child(configured(tmp_path, address=fake.address, listen=f"unix://{path}")) as child:
            child.handshake()
            soon(path, "table_consul_up", place, 1)
            fake.stop()
            samples = soon(path, "table_consul_up", place, 0)
            assert (
                samples["table_consul_snapshot_keys"][place],
                samples["table_consul_failures_total"][place] >= 1,
            ) == (1, True)
            fake.start()
            soon(path, "table_consul_up", place, 1)
            fake.put(b"aliases/alias/staff", b"eric")
            samples = soon(path, "table_consul_snapshot_keys", place, 2)
            assert samples["table_consul_reloads_total"][place] == 2


def test_a_table_read_directly_is_down_until_consul_answers_again(tmp_path):
    path, place = tmp_path / "sock", ("aliases/", "aliases")
    with FakeConsul() as fake:
        fake.put(b"aliases/alias/root", b"gilles")
        config = configured(tmp_path, 'mode = "direct"', address=fake.address, listen=f"unix://{path}")
        with Child(config) as child:
            child.handshake()
            child.ask(b"table|0.1|0|aliases|lookup|alias|1|root")
            samples = soon(path, "table_consul_up", place, 1)
            assert {place: 0} == samples["table_consul_failures_total"]
            fake.stop()
            child.ask(b"table|0.1|0|aliases|lookup|alias|2|root")
            samples = soon(path, "table_consul_up", place, 0)
            assert {place: 1} == samples["table_consul_failures_total"]
            ((reason, *labels),) = samples["table_consul_last_error_timestamp_seconds"]
            assert (tuple(labels), fake.address in reason) == (place, True)
            fake.start()
            for _ in eventually("Consul is asked again"):
                if b"found" in child.ask(b"table|0.1|0|aliases|lookup|alias|3|root"):
                    break
            soon(path, "table_consul_up", place, 1)


def test_an_answer_at_the_deadline_is_counted_as_one(tmp_path):
    path = tmp_path / "sock"
    with FakeConsul() as fake:
        fake.handle = stall
        config = configured(
            tmp_path, 'mode = "direct"', "deadline = 0.05", address=fake.address, listen=f"unix://{path}"
        )
        with Child(config) as child:
            child.handshake()
            assert b"|error|" in child.ask(b"table|0.1|0|aliases|lookup|alias|1|root")
            soon(path, "table_consul_deadline_hits_total", ("aliases",), 1)


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_numbers_are_served_on_a_loopback_port(tmp_path, family, host):
    try:
        port = free_port(family, host)
    except OSError:
        pytest.skip(f"this machine has no {host}: enable IPv6 on its loopback interface")
    listen = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with Child(configured(tmp_path, listen=listen)) as child:
        child.handshake()
        samples = {}
        for _ in eventually("the port answers"):
            try:
                samples = asked(http.client.HTTPConnection(host, port, timeout=10))
                break
            except ConnectionRefusedError:
                pass
        assert {("aliases", __version__): 1} == samples["table_consul_build_info"]


def test_the_socket_is_for_anyone_who_reaches_its_folder_and_replaces_that_of_a_dead_process(tmp_path):
    path = tmp_path / "aliases.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with Child(configured(tmp_path, listen=f"unix://{path}")) as child:
        child.handshake()
        for _ in eventually("the socket answers"):
            try:
                scraped(path)
                break
            except (ConnectionRefusedError, FileNotFoundError):  # the dead one, or neither yet
                pass
        assert stat.S_IMODE(path.stat().st_mode) == 0o666


def test_a_file_that_is_no_socket_is_left_alone(tmp_path):
    path = tmp_path / "precious"
    path.write_text("data")
    with Child(configured(tmp_path, listen=f"unix://{path}")) as child:
        child.handshake()
        child.ask(b"table|0.1|0|aliases|update|1")
        assert child.end() == 0
        assert path.read_text() == "data"


def test_of_two_processes_with_one_socket_the_first_serves_and_the_other_says_so_once_and_answers(tmp_path):
    path = tmp_path / "shared.sock"
    config = configured(tmp_path, listen=f"unix://{path}", textfile=True)
    with Child(config) as first, Child(config) as second:
        first.handshake()
        soon(path, "table_consul_build_info", ("aliases", __version__), 1)
        second.handshake(b"table-name")
        answers = {second.ask(b"table|0.1|0|table-name|lookup|alias|1|root")}
        for number in range(3):
            (tmp_path / "table-name.prom").unlink(missing_ok=True)
            second.ask(b"table|0.1|0|table-name|update|%d" % number)
            read(tmp_path / "table-name.prom")
        assert ({b"lookup-result|1|found|gilles"}, 0) == (answers, second.end())
        assert second.log().count(f"metrics.listen unix://{path}: [Errno 98] Address already in use") == 1
        assert {("aliases", __version__): 1} == scraped(path)["table_consul_build_info"]


def test_a_port_that_is_taken_is_logged_and_used_once_it_is_free(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = configured(tmp_path, listen=f"127.0.0.1:{port}", textfile=True)
        child = Child(config)
        child.handshake()
        read(tmp_path / "aliases.prom")
        assert b"|found|gilles" in child.ask(b"table|0.1|0|aliases|lookup|alias|1|root")
    with child:
        for _ in eventually("the port answers"):
            child.ask(b"table|0.1|0|aliases|update|2")
            try:
                asked(http.client.HTTPConnection("127.0.0.1", port, timeout=10))
                break
            except (ConnectionRefusedError, ConnectionResetError):
                pass
        assert child.end() == 0
        assert "Address already in use; trying again every 15 s" in child.log()


def test_a_file_that_cannot_be_written_is_one_line_and_written_once_it_can_be(tmp_path):
    folder = tmp_path / "later"
    config = str(write_config(tmp_path, more=f'[metrics]\ntextfile = "{folder}/{{table}}.prom"'))
    with Child(config) as child:
        child.handshake()
        for number in range(20):
            child.ask(b"table|0.1|0|aliases|update|%d" % number)
        folder.mkdir()
        for _ in eventually("the file is written"):
            child.ask(b"table|0.1|0|aliases|update|99")
            if (folder / "aliases.prom").exists():
                break
        assert child.end() == 0
        log = child.log()
    assert log.count("No such file or directory") <= 1
    assert log.count("back after") == log.count("No such file or directory")


def test_an_update_moves_the_numbers_to_where_the_new_configuration_wants_them(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    with Child(configured(tmp_path)) as child:
        child.handshake()
        for path in (old, new):
            configured(tmp_path, listen=f"unix://{path}")
            assert child.ask(b"table|0.1|0|aliases|update|1") == b"update-result|1|ok"
            soon(path, "table_consul_build_info", ("aliases", __version__), 1)
        with pytest.raises(ConnectionRefusedError):
            scraped(old)
        assert child.end() == 0


def test_without_the_library_one_line_says_what_to_install_and_all_is_answered(tmp_path):
    library = tmp_path / "without" / "prometheus_client"
    library.mkdir(parents=True)
    (library / "__init__.py").write_text("raise ModuleNotFoundError('blocked', name='prometheus_client')")
    config = configured(tmp_path, textfile=True, listen=f"unix://{tmp_path}/sock")
    with Child(config, environ={"PYTHONPATH": str(library.parent)}) as child:
        child.handshake()
        assert child.ask(b"table|0.1|0|aliases|lookup|alias|1|root") == b"lookup-result|1|found|gilles"
        assert child.end() == 0
        log = child.log()
    assert log.count("prometheus_client is not installed; install table-consul[metrics]") == 1
    assert "Traceback" not in log


def test_the_library_is_imported_only_where_metrics_are_configured(tmp_path):
    library = tmp_path / "telling" / "prometheus_client"
    library.mkdir(parents=True)
    (library / "__init__.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    with Child(str(write_config(tmp_path)), environ={"PYTHONPATH": str(library.parent)}) as child:
        child.handshake()
        child.ask(b"table|0.1|0|aliases|lookup|alias|1|root")
        assert child.end() == 0
    assert not (tmp_path / "imported").exists()


def test_a_client_that_says_nothing_or_nonsense_keeps_nobody_from_an_answer(tmp_path):
    path = tmp_path / "sock"
    with Child(configured(tmp_path, listen=f"unix://{path}")) as child, socket.socket(socket.AF_UNIX) as silent:
        child.handshake()
        soon(path, "table_consul_build_info", ("aliases", __version__), 1)
        for said in (b"", b"\0\xff\n", b"GET", b"POST / HTTP/1.1\r\n\r\n", b"GET /" + b"x" * 70000):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
                client.sendall(said)
        silent.connect(str(path))
        assert child.ask(b"table|0.1|0|aliases|lookup|alias|1|root") == b"lookup-result|1|found|gilles"
        silent.close()
        soon(path, "table_consul_requests_total", ("lookup", "found", "alias", "aliases"), 1)
        assert child.end() == 0


DOCUMENT = Path(__file__).parents[2] / "docs" / "operating.md"


def test_all_that_is_published_is_documented_and_nothing_else():
    documented = {*re.findall(r"^\| `(table_consul_\w+)`", DOCUMENT.read_text(), re.MULTILINE)}
    names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in published()}
    assert documented == names


def test_every_alert_is_documented():
    documented = re.findall(r"^\| `(TableConsul\w+)` \|", DOCUMENT.read_text(), re.MULTILINE)
    assert documented == re.findall(r"- alert: (\w+)", RULES)
