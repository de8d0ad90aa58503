from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import select
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
from table_consul.metrics import CONNECTIONS_MAX, Exporter, Server
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
            assert key not in samples.setdefault(sample.name, {}), f"{sample} twice, which node_exporter rejects"
            samples[sample.name][key] = sample.value
    return samples


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost", timeout=10)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


def scraped(listen):
    if str(listen).startswith(("127.", "[")):
        host, _, port = listen.rpartition(":")
        connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=10)
    else:
        connection = UnixConnection(listen)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        assert response.status == 200
        return parsed(response.read().decode())


def read(path):
    """The samples in the text file, once it exists."""
    for _ in eventually(f"{path} is written"):
        if path.exists():
            return parsed(path.read_text())
    return None


def soon(listen, name, labels, expected):
    """All samples, as soon as this one has the expected value."""
    samples = {}
    for _ in eventually(f"{name}{labels} = {expected}"):
        # The name is in the folder a moment before anybody listens.
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError, ConnectionResetError):
            samples = scraped(listen)
        if samples.get(name, {}).get(labels) == expected:
            break
    return samples


def configured(folder, *defaults, address=None, textfile=False, listen=None):
    lines = ["[metrics]"]
    lines += [f'textfile = "{folder}/{{table}}.prom"'] if textfile else []
    lines += [f'listen = "{listen}"'] if listen else []
    return str(write_config(folder, *defaults, more="\n".join(lines), address=address))


def request(service="alias", op="lookup", table="aliases"):
    return Request(op, b"1", table, service, b"root")


def layout(name):
    if name == "..":
        raise ConfigError("no such name")
    return Table(name or "consul", deadline=2.0)


def add(counters, seconds, *replies):
    for asked, reply in replies:
        counters.add(asked, reply, seconds)


def counts(counters):
    return {labels: sum(cell[2:]) for labels, cell in counters.cells().items()}


# ---- counters ----


def test_requests_are_counted_by_table_service_operation_and_reply():
    counters = Counters(layout)
    add(counters, 0.0, (request(), Found), (request(), Found), (request("domain", "check"), NotFound))
    add(counters, 0.0, (request("", "update"), Updated), (request(), Failed))
    assert counts(counters) == {
        ("aliases", "alias", "lookup", Found): 2,
        ("aliases", "domain", "check", NotFound): 1,
        ("aliases", "", "update", Updated): 1,
        ("aliases", "alias", "lookup", Failed): 1,
    }


@pytest.mark.parametrize(
    ("seconds", "interval"), [(0.0, 0), (0.00001, 0), (0.00002, 1), (0.05, 7), (1.5, 10), (99.0, 11)]
)
def test_interval_of_a_reply_includes_its_upper_end(seconds, interval):
    counters = Counters(layout)
    add(counters, seconds, (request(), Found), (request(), Found))
    ((total, _, *intervals),) = counters.cells().values()
    assert intervals == [2 if number == interval else 0 for number in range(12)]
    assert total == pytest.approx(2 * seconds)


def test_unknown_services_and_operations_share_one_series():
    counters = Counters(layout)
    for number in range(10):
        add(counters, 0.0, (request(f"service{number}", f"op{number}"), Failed))
    assert counts(counters) == {("aliases", "(other)", "(other)", Failed): 10}


def test_tables_beyond_the_limit_share_one_series():
    counters = Counters(layout)
    for number in range(CELLS_MAX + 10):
        add(counters, 3.0, (request(table=f"table{number}"), Found))
        counters.failed(f"table{number}", Unreachable("away"), 0.0)
    assert len(counters.cells()) == CELLS_MAX + 1
    assert counts(counters)["(other)", "alias", "lookup", Found] == 10
    assert len(counters.failures) == CELLS_MAX


def test_counters_can_be_read_while_requests_are_counted():
    counters, stop = Counters(layout), threading.Event()

    def count():
        while not stop.is_set() and len(counters.cells()) < CELLS_MAX:
            add(counters, 0.0, (request(table=f"table{len(counters.cells())}"), Found))

    thread = threading.Thread(target=count)
    thread.start()
    try:
        sizes = [len(counts(counters))]
        while thread.is_alive():
            sizes.append(len(counts(counters)))
    finally:
        stop.set()
        thread.join()
    assert sizes == sorted(sizes)


# ---- collector ----


def registered(collector):
    registry = CollectorRegistry()
    registry.register(collector)
    return registry


def collected(tables):
    return parsed(generate_latest(registered(Exporter("aliases", tables))).decode())


def fake_tables(*watches, counters=None, address="http://127.0.0.1:8500", textfile=None, listen=None):
    """What metrics may read of Tables; reading a layout through its cache is not among it."""
    return SimpleNamespace(
        config=SimpleNamespace(
            consul=SimpleNamespace(addresses=(address,)),
            metrics=SimpleNamespace(textfile=textfile and str(textfile), listen=listen and str(listen)),
            table=layout,
        ),
        counters=counters or Counters(layout),
        started=1.0,
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


def test_failures_of_several_outages_add_up():
    outage = Backoff("aliases/", "error")
    tables = fake_tables(watch(backoff=outage))
    seen = []
    for failures in (0, 2, 1, 0, 3):
        for number in range(failures):
            outage.failure(Unreachable("away"), 100.0 + number, 0.0)
        samples = collected(tables)
        seen.append(
            (
                samples["table_consul_failures_total"]["aliases/", "aliases"],
                samples["table_consul_up"]["aliases/", "aliases"],
            )
        )
        if failures == 1:
            outage.success(200.0)
    assert seen == [(0, 1), (2, 0), (3, 0), (3, 1), (6, 0)]


def test_table_too_large_to_mirror_is_published_as_direct():
    tables = fake_tables(watch(too_large=True, index=0))
    add(tables.counters, 0.0, (request(), Found))
    samples = collected(tables)
    assert samples["table_consul_up"] == {("aliases/", "aliases"): 1}
    assert "table_consul_reloads_total" not in samples
    assert samples["table_consul_too_large"] == {("aliases/", "aliases"): 1}


def test_direct_table_is_down_from_a_failure_to_the_next_answer():
    tables, seen = fake_tables(), []
    add(tables.counters, 0.0, (request(), Found))
    for reply in (Found, Failed, Failed, NotFound):
        add(tables.counters, 0.0, (request(), reply))
        if reply is Failed:
            tables.counters.failed("aliases", Unreachable("away"), 0.0)
        samples = collected(tables)
        seen.append((samples["table_consul_up"], samples["table_consul_failures_total"]))
    labels = ("aliases/", "aliases")
    assert seen == [({labels: up}, {labels: failures}) for up, failures in ((1, 0), (0, 1), (0, 2), (1, 2))]


def test_errors_are_counted_by_table_and_begin_at_zero():
    tables, seen = fake_tables(), []
    for replies in ([], [(request(), Found), (request(), Failed)], [(request("domain", "check"), Failed)]):
        add(tables.counters, 0.0, *replies)
        seen.append(collected(tables)["table_consul_errors_total"])
    assert seen == [{("aliases",): 0}, {("aliases",): 1}, {("aliases",): 2}]


def test_replies_that_missed_the_deadline_are_counted_by_table():
    tables = fake_tables()
    for seconds in (1.99, 2.0, 3.0):
        add(tables.counters, seconds, (request(), Failed))
    add(tables.counters, 3.0, (request(table=".."), Failed))
    assert collected(tables)["table_consul_deadline_hits_total"] == {("aliases",): 2, ("..",): 0}


def test_requests_without_a_table_name_count_for_the_table_of_the_process():
    tables = fake_tables()
    add(tables.counters, 3.0, (request(table=""), Found), (request(table="aliases"), Found))
    samples = collected(tables)
    assert samples["table_consul_requests_total"] == {("lookup", "found", "alias", "aliases"): 2}
    assert samples["table_consul_deadline_hits_total"] == {("aliases",): 2}
    assert samples["table_consul_up"] == {("aliases/", "aliases"): 1}


def test_histogram_adds_up_all_operations_of_a_service():
    tables = fake_tables()
    add(tables.counters, 0.00002, (request(), Found), (request(op="check"), NotFound))
    add(tables.counters, 99.0, (request(), Failed))
    samples = collected(tables)
    buckets = {le: count for (le, _, _), count in samples["table_consul_request_seconds_bucket"].items()}
    assert [buckets[le] for le in ("1e-05", "2.5e-05", "2.5", "+Inf")] == [0, 2, 2, 3]
    assert samples["table_consul_request_seconds_sum"] == {("alias", "aliases"): pytest.approx(99.00004)}


def test_last_error_of_a_mirror_has_its_time_and_stays_after_recovery():
    outage = Backoff("aliases/", "error")
    tables = fake_tables(watch(backoff=outage))
    assert "table_consul_last_error_timestamp_seconds" not in collected(tables)
    outage.failure(Unreachable("no leader"), time.monotonic() - 200, 0.0)
    outage.failure(Unreachable("connection refused"), time.monotonic() - 100, 0.0)
    outage.success(time.monotonic())
    assert collected(tables)["table_consul_last_error_timestamp_seconds"] == {
        ("connection refused", "aliases/", "aliases"): pytest.approx(time.time() - 100, abs=5)
    }


@pytest.mark.parametrize("address", ["http://127.0.0.1:8500", "file:///export.json"])
def test_last_error_of_a_direct_or_file_table_is_published(address):
    tables = fake_tables(address=address)
    add(tables.counters, 0.0, (request(), Failed))
    tables.counters.failed("aliases", Unreachable("no answer in time"), time.monotonic() - 50)
    tables.counters.failed("..", Unreachable("not a table"), 0.0)
    assert collected(tables)["table_consul_last_error_timestamp_seconds"] == {
        ("no answer in time", "aliases/", "aliases"): pytest.approx(time.time() - 50, abs=5)
    }


def test_errors_of_one_cause_share_a_series_without_a_token():
    outage = Backoff("aliases/", "error")
    tables = fake_tables(watch(backoff=outage))
    texts = set()
    for number in range(3):
        token = f"0123456{number}-89ab-cdef-0123-456789abcdef"
        outage.failure(Unreachable(f"away for {number}.5 s: 500 of {token} {'a1' * 20}{number}"), 100.0, 0.0)
        texts |= {key[0] for key in collected(tables)["table_consul_last_error_timestamp_seconds"]}
    assert texts == {"away for ...: 500 of ... ..."}


def test_forbidden_services_are_published_by_name():
    snapshot = SimpleNamespace(
        entries={"alias": SimpleNamespace(errors={}), "domain": SimpleNamespace(errors={})},
        forbidden={"domain": 1},
        size=1,
    )
    mirror = SimpleNamespace(state=(snapshot, time.monotonic() - 30), max_age=600.0)
    samples = collected(fake_tables(watch(mirror=mirror)))
    assert samples["table_consul_service_hidden"] == {
        ("aliases/", "alias", "aliases"): 0,
        ("aliases/", "domain", "aliases"): 1,
    }
    assert samples["table_consul_snapshot_max_age_seconds"] == {("aliases/", "aliases"): 600}
    assert samples["table_consul_snapshot_age_seconds"]["aliases/", "aliases"] == pytest.approx(30, abs=5)


# ---- alerts, dashboard and documents ----

CONTRIB = Path(__file__).parents[2] / "contrib"
RULES = (CONTRIB / "prometheus" / "table-consul.rules.yml").read_text()
DASHBOARD = json.loads((CONTRIB / "grafana" / "table-consul.json").read_text())
NAMES = re.compile(r"\btable_consul_[a-z_]+")


def published():
    """The names of all that can be published, as Prometheus stores them."""
    names = set()
    for family in Exporter("aliases", fake_tables()).collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}.get(family.type, [""])
        names |= {family.name + suffix for suffix in suffixes}
    return names


def grid_cells(panel):
    return {
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    }


def test_alerts_and_dashboard_use_only_published_metrics():
    named = {*NAMES.findall(RULES), *NAMES.findall(json.dumps(DASHBOARD))}
    assert sorted(named - published()) == []


def test_dashboard_shows_every_metric():
    assert sorted(published() - {*NAMES.findall(json.dumps(DASHBOARD))}) == []


def test_dashboard_panel_has_position_description_and_chosen_datasource():
    panels = DASHBOARD["panels"]
    cells = [cell for panel in panels for cell in grid_cells(panel)]
    assert len(cells) == len({*cells})
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["description"]
        for query in (panel, *panel["targets"]):
            assert query["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_alert_has_summary_runbook_and_severity():
    for alert in RULES.split("- alert: ")[1:]:
        name = alert.partition("\n")[0]
        for key in ("summary: ", "runbook: ", "severity: "):
            assert alert.count(f"\n          {key}") == 1, f"{name} has no {key}"


DOCUMENT = Path(__file__).parents[2] / "docs" / "operating.md"


def test_every_metric_is_documented_and_nothing_else():
    documented = {*re.findall(r"^\| `(table_consul_\w+)`", DOCUMENT.read_text(), re.MULTILINE)}
    names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in published()}
    assert documented == names


def test_every_alert_is_documented():
    documented = re.findall(r"^\| `(TableConsul\w+)` \|", DOCUMENT.read_text(), re.MULTILINE)
    assert documented == re.findall(r"- alert: (\w+)", RULES)


# ---- exporter ----


@pytest.fixture
def exporter():
    """A function that makes an exporter for some tables; called without a thread, it exports once."""
    made = []

    def make(tables, table="aliases"):
        exporter = Exporter(table, tables)
        registry = registered(exporter)
        made.append((exporter, tables, registry))
        return lambda: exporter.export(registry)

    yield make
    for exporter, tables, registry in made:
        tables.config.metrics = SimpleNamespace(textfile=None, listen=None)
        exporter.export(registry)


@pytest.fixture
def serve():
    """A function that serves metrics at this address."""
    servers = []

    def start(listen, **more):
        servers.append(Server(str(listen), registered(Exporter("aliases", fake_tables())), **more))

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def free_port(family=socket.AF_INET, host="127.0.0.1"):
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def connected(path):
    client = socket.socket(socket.AF_UNIX)
    try:
        client.connect(str(path))  # without a timeout, else a full queue would be an error
    except OSError:
        client.close()
        raise
    client.settimeout(10)
    return client


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_server_listens_on_a_loopback_port(serve, family, host):
    try:
        port = free_port(family, host)
    except OSError:
        pytest.skip(f"this machine has no {host}: enable IPv6 on its loopback interface")
    listen = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    serve(listen)
    assert scraped(listen)["table_consul_build_info"] == {("aliases", __version__): 1}


def test_socket_is_for_everyone_and_replaces_that_of_a_dead_process(tmp_path, serve):
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    serve(f"unix://{path}")
    assert scraped(path)["table_consul_build_info"] == {("aliases", __version__): 1}
    assert stat.S_IMODE(path.stat().st_mode) == 0o666


def test_file_that_is_not_a_socket_is_left_alone(tmp_path, serve):
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(OSError, match="in use"):
        serve(f"unix://{path}")
    assert path.read_text() == "data"


def test_socket_in_use_is_left_alone_even_if_its_queue_is_full(tmp_path, serve):
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as taken, contextlib.ExitStack() as clients:
        taken.bind(str(path))
        taken.listen(0)
        clients.enter_context(connected(path))
        with pytest.raises(OSError, match="in use"):
            serve(f"unix://{path}")
        assert path.exists()


def test_silent_clients_do_not_block_a_scrape(tmp_path, serve):
    path = tmp_path / "sock"
    serve(f"unix://{path}")
    with contextlib.ExitStack() as clients:
        for said in (b"", b"GET", b"GET / HTTP/1.0\r\n"):
            clients.enter_context(connected(path)).sendall(said)
        assert scraped(path)["table_consul_build_info"] == {("aliases", __version__): 1}


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.0\r\n"])
def test_silent_client_is_disconnected_in_time(tmp_path, serve, said):
    path = tmp_path / "sock"
    serve(f"unix://{path}", client_seconds=0.1)
    with connected(path) as client:
        client.sendall(said)
        assert client.recv(1) == b""


def test_oldest_connection_is_closed_when_there_are_too_many(tmp_path, serve):
    path = tmp_path / "sock"
    serve(f"unix://{path}")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(path)) for _ in range(CONNECTIONS_MAX + 1)]
        assert clients[0].recv(1) == b""
        assert scraped(path)["table_consul_build_info"] == {("aliases", __version__): 1}
        assert clients[1].recv(1) == b""


def test_exporter_moves_to_the_address_of_a_new_configuration(tmp_path, exporter):
    old, new = tmp_path / "{table}.old", tmp_path / "{table}.new"
    tables = fake_tables(listen=f"unix://{old}")
    export = exporter(tables)
    export()
    assert scraped(tmp_path / "aliases.old")["table_consul_build_info"] == {("aliases", __version__): 1}
    tables.config.metrics.listen = f"unix://{new}"
    with connected(tmp_path / "aliases.old") as slow:
        export()
        assert scraped(tmp_path / "aliases.new")["table_consul_build_info"] == {("aliases", __version__): 1}
        with contextlib.suppress(ConnectionResetError):  # its turn had not come
            assert slow.recv(1) == b""
    for _ in eventually("the old address is closed"):
        try:
            connected(tmp_path / "aliases.old").close()
        except ConnectionRefusedError:
            break


def test_address_that_another_process_serves_is_logged_once(tmp_path, exporter, caplog):
    path = tmp_path / "sock"
    export_first = exporter(fake_tables(listen=f"unix://{path}"))
    export_second = exporter(fake_tables(listen=f"unix://{path}", textfile=tmp_path / "{table}.prom"), "second")
    export_first()
    for _ in range(3):
        (tmp_path / "second.prom").unlink(missing_ok=True)
        export_second()
        assert read(tmp_path / "second.prom")["table_consul_build_info"] == {("second", __version__): 1}
    assert caplog.text.count(f"metrics.listen unix://{path}: [Errno 98] Address already in use") == 1
    assert scraped(path)["table_consul_build_info"] == {("aliases", __version__): 1}


def test_port_in_use_is_served_once_it_is_free(exporter, caplog):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        export = exporter(fake_tables(listen=listen))
        export()
        assert "Address already in use; trying again every 15 s" in caplog.text
    export()
    assert scraped(listen)["table_consul_build_info"] == {("aliases", __version__): 1}
    assert f"metrics.listen {listen}: recovered after" in caplog.text


def test_file_that_cannot_be_written_is_logged_once_and_written_once_it_can_be(tmp_path, exporter, caplog):
    folder = tmp_path / "later"
    export = exporter(fake_tables(textfile=folder / "{table}.prom"))
    for _ in range(20):
        export()
    folder.mkdir()
    export()
    assert caplog.text.count("No such file or directory") == 1
    assert caplog.text.count("recovered after") == 1
    assert read(folder / "aliases.prom")["table_consul_build_info"] == {("aliases", __version__): 1}


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


def of_table(samples, table):
    return {labels: value for labels, value in samples.items() if labels[-1] == table}


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    """The program, answering from a file as table aliases. Tests share it, so each counts on a table of its own."""
    folder = tmp_path_factory.mktemp("child")
    with Child(configured(folder, textfile=True, listen=f"unix://{folder}/{{table}}.sock")) as child:
        child.folder, child.socket = folder, folder / "aliases.sock"
        child.handshake()
        soon(child.socket, "table_consul_build_info", ("aliases", __version__), 1)
        yield child
        assert child.end() == 0


def test_dialogue_is_counted_exactly(child):
    malformed = scraped(child.socket)["table_consul_malformed_lines_total"]["aliases",]
    for number, line in enumerate(DIALOGUE):
        child.ask(b"table|0.1|0|consul|" + line % number)
    child.say(b"not a protocol line\n")
    assert child.ask(b"table|0.1|0|consul|update|99") == b"update-result|99|ok"
    samples = soon(child.socket, "table_consul_requests_total", ("update", "ok", "", "consul"), 1)
    assert of_table(samples["table_consul_requests_total"], "consul") == EXPECTED
    assert sum(of_table(samples["table_consul_request_seconds_count"], "consul").values()) == sum(EXPECTED.values())
    assert samples["table_consul_malformed_lines_total"] == {("aliases",): malformed + 3}
    assert samples["table_consul_deadline_hits_total"]["consul",] == 0


def test_pipelined_requests_are_counted_like_single_ones(child):
    child.say(b"".join(b"table|0.1|0|table-name|lookup|alias|%d|root\n" % number for number in range(5000)))
    for _ in range(5000):
        child.line()
    labels = ("lookup", "found", "alias", "table-name")
    samples = soon(child.socket, "table_consul_requests_total", labels, 5000)
    assert of_table(samples["table_consul_request_seconds_count"], "table-name") == {("alias", "table-name"): 5000}


def test_text_file_is_written_after_the_handshake_and_at_an_update(child):
    path = child.folder / "aliases.prom"
    assert read(path)["table_consul_build_info"] == {("aliases", __version__): 1}
    child.ask(b"table|0.1|0|aliases|lookup|alias|1|staff")
    child.ask(b"table|0.1|0|aliases|update|2")
    for _ in eventually("the reply is in the file"):
        if ("lookup", "found", "alias", "aliases") in read(path).get("table_consul_requests_total", {}):
            break
    assert "table_consul_up" not in read(path)


def test_silent_and_malformed_clients_delay_no_reply(child):
    for said in (b"", b"\0\xff\n", b"GET", b"POST / HTTP/1.1\r\n\r\n", b"GET /" + b"x" * 70000):
        with connected(child.socket) as client:
            client.sendall(said)
    with connected(child.socket):
        assert child.ask(b"table|0.1|0|third|lookup|alias|1|root") == b"lookup-result|1|not-found"
        soon(child.socket, "table_consul_requests_total", ("lookup", "not-found", "alias", "third"), 1)


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """The program with a mirror of a Consul that has two good entries and a bad one."""
    folder = tmp_path_factory.mktemp("mirror")
    with FakeConsul() as fake:
        fake.put(b"mail/aliases/alias/root", b"gilles")
        fake.put(b"mail/aliases/alias/staff", b"gilles, eric")
        fake.put(b"mail/aliases/alias/broken", b"|/bin/sh")
        config = configured(folder, 'prefix = "mail"', address=fake.address, listen=f"unix://{folder}/sock")
        with Child(config) as child:
            child.handshake()
            # The index is the last to be noted of what was taken over.
            labels = ("mail/aliases/", "aliases")
            soon(folder / "sock", "table_consul_snapshot_index", labels, fake.index)
            yield SimpleNamespace(fake=fake, child=child, socket=folder / "sock", labels=labels)


def test_mirror_publishes_its_snapshot(mirror):
    samples, labels = scraped(mirror.socket), mirror.labels
    expected = {
        "snapshot_keys": 3,
        "snapshot_index": mirror.fake.index,
        "entries_refused": 1,
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
    before = scraped(mirror.socket)
    soon(mirror.socket, "table_consul_up", mirror.labels, 1)
    mirror.fake.stop()
    samples = soon(mirror.socket, "table_consul_up", mirror.labels, 0)
    assert samples["table_consul_snapshot_keys"] == before["table_consul_snapshot_keys"]
    assert samples["table_consul_failures_total"][mirror.labels] >= 1
    mirror.fake.start()
    soon(mirror.socket, "table_consul_up", mirror.labels, 1)
    mirror.fake.put(b"mail/aliases/alias/other", b"eric")
    samples = soon(mirror.socket, "table_consul_snapshot_keys", mirror.labels, 4)
    assert samples["table_consul_reloads_total"][mirror.labels] == 2


def test_direct_table_is_down_from_the_loss_of_consul_to_the_next_answer(tmp_path):
    path, labels = tmp_path / "sock", ("aliases/", "aliases")
    with FakeConsul() as fake:
        fake.put(b"aliases/alias/root", b"gilles")
        config = configured(tmp_path, 'mode = "direct"', address=fake.address, listen=f"unix://{path}")
        with Child(config) as child:
            child.handshake()
            child.ask(b"table|0.1|0|aliases|lookup|alias|1|root")
            samples = soon(path, "table_consul_up", labels, 1)
            assert samples["table_consul_failures_total"] == {labels: 0}
            fake.stop()
            child.ask(b"table|0.1|0|aliases|lookup|alias|2|root")
            samples = soon(path, "table_consul_up", labels, 0)
            assert samples["table_consul_failures_total"] == {labels: 1}
            ((reason, *others),) = samples["table_consul_last_error_timestamp_seconds"]
            assert (tuple(others), fake.address in reason) == (labels, True)
            fake.start()
            for _ in eventually("Consul is asked again"):
                if b"found" in child.ask(b"table|0.1|0|aliases|lookup|alias|3|root"):
                    break
            soon(path, "table_consul_up", labels, 1)


def test_reply_at_the_deadline_is_counted_as_a_deadline_hit(tmp_path):
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


def test_update_starts_and_moves_the_exporter(tmp_path):
    with Child(configured(tmp_path)) as child:
        child.handshake()
        for path in (tmp_path / "old", tmp_path / "new"):
            configured(tmp_path, listen=f"unix://{path}")
            assert child.ask(b"table|0.1|0|aliases|update|1") == b"update-result|1|ok"
            soon(path, "table_consul_build_info", ("aliases", __version__), 1)
        assert child.end() == 0


def read_log(child, text):
    """Read the log until it contains this text."""
    for _ in eventually(f"{text!r} is logged"):
        if select.select([child.process.stderr], [], [], 0)[0]:
            child._log += os.read(child.process.stderr.fileno(), 65536)
        if text in child._log:
            break


def test_missing_library_is_logged_once_and_requests_are_answered(tmp_path):
    library = tmp_path / "without" / "prometheus_client"
    library.mkdir(parents=True)
    (library / "__init__.py").write_text("raise ModuleNotFoundError('blocked', name='prometheus_client')")
    config = configured(tmp_path, textfile=True, listen=f"unix://{tmp_path}/sock")
    with Child(config, environ={"PYTHONPATH": str(library.parent)}) as child:
        child.handshake()
        assert child.ask(b"table|0.1|0|aliases|lookup|alias|1|root") == b"lookup-result|1|found|gilles"
        # The thread that imports it may be slower than the whole conversation.
        read_log(child, b"prometheus_client is not installed; install table-consul[metrics]")
        assert child.end() == 0
        log = child.log()
    assert log.count("is not installed") == 1
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
