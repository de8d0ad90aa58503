"""Prometheus metrics, computed when they are read: a text file, a loopback port, or a unix socket."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import socket
import socketserver
import stat
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

from table_consul import __version__
from table_consul.backoff import Backoff
from table_consul.counters import BOUNDS_SECONDS, OTHER, OUTCOMES
from table_consul.errors import ConfigError, printable
from table_consul.services import SERVICES

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from table_consul.tables import Tables

log = logging.getLogger("table_consul")

# Prometheus scrapes node_exporter every 15 s or less often.
WRITE_INTERVAL_SECONDS = 15.0
# What a start or an update sets in motion usually ends within this, and the file should show its end soon.
FIRST_WRITE_SECONDS = 1.0
# A bound on the descriptors and threads that local users can occupy.
CONNECTIONS_MAX = 8
# Parts of an error's text that differ between failures of the same cause: each would create a new series. Also tokens.
_VARIABLE_PARTS = re.compile(r"\b\d+(?:\.\d+)? s\b|\b[0-9a-f]{8}-[0-9a-f-]{27}\b|\b[0-9a-f]{16,}\b", re.IGNORECASE)

# Name without "table_consul_", type, help text, and labels besides "table", which all have: each table has a process of
# its own, and node_exporter rejects text files that share a series.
METRICS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("build_info", "Gauge", "Always 1; the label is the version of table-consul.", ("version",)),
    ("start_time_seconds", "Gauge", "When the process started, in seconds since the epoch.", ()),
    ("requests", "Counter", "Requests answered.", ("service", "op", "outcome")),
    ("request_seconds", "Histogram", "Seconds from reading a request until its reply was ready.", ("service",)),
    ("errors", "Counter", "Replies that were an error; the sending server keeps the message and retries.", ()),
    ("deadline_hits", "Counter", "Replies that took the deadline of their table or longer.", ()),
    ("malformed_lines", "Counter", "Input lines that do not follow smtpd's table protocol.", ()),
    ("up", "Gauge", "1 if the last attempt to read the prefix from Consul succeeded.", ("prefix",)),
    ("snapshot_age_seconds", "Gauge", "Seconds since Consul last confirmed the snapshot.", ("prefix",)),
    ("snapshot_max_age_seconds", "Gauge", "Age at which the snapshot expires (max_age).", ("prefix",)),
    ("snapshot_index", "Gauge", "Consul's index of the snapshot; 0 if it was loaded from disk.", ("prefix",)),
    ("snapshot_keys", "Gauge", "Entries in the snapshot.", ("prefix",)),
    ("entries_refused", "Gauge", "Entries of the snapshot with an invalid value; the log names them.", ("prefix",)),
    ("service_hidden", "Gauge", "1 if the token may not read the folder of the service.", ("prefix", "service")),
    ("too_large", "Gauge", "1 while the prefix holds more than max_keys keys (direct mode).", ("prefix",)),
    ("load_seconds", "Gauge", "Seconds from the first byte of Consul's last answer until it was used.", ("prefix",)),
    ("reloads", "Counter", "Snapshots loaded from Consul.", ("prefix",)),
    ("failures", "Counter", "Failed attempts to read the prefix.", ("prefix",)),
    ("last_error_timestamp_seconds", "Gauge", "When Consul last could not be read, and why.", ("prefix", "error")),
)


def _requests(own: str, tables: Tables) -> Iterator[tuple[Any, ...]]:
    yield "build_info", (own, __version__), 1
    yield "start_time_seconds", (own,), tables.started
    yield "malformed_lines", (own,), tables.counters.malformed
    totals = defaultdict[Any, float](float, {("errors", (own,)): 0, ("deadline_hits", (own,)): 0})
    cells = defaultdict(list)
    for (name, service, op, reply), cell in tables.counters.cells().items():
        table, outcome, count = name or own, OUTCOMES[reply], sum(cell[2:])
        totals["requests", (table, service, op, outcome)] += count
        totals["errors", (table,)] += count if outcome == "error" else 0
        totals["deadline_hits", (table,)] += cell[1]
        cells[table, service].append(cell)
    yield from ((*sample, total) for sample, total in totals.items())
    bounds = (*map(str, BOUNDS_SECONDS), "+Inf")
    for labels, same in cells.items():
        seconds, _, *counts = map(sum, zip(*same, strict=True))
        yield "request_seconds", labels, [*zip(bounds, accumulate(counts), strict=True)], seconds


def _sources(own: str, tables: Tables) -> Iterator[tuple[Any, ...]]:
    config, counters, now = tables.config, tables.counters, time.monotonic()
    assert config is not None  # else there would be no exporter
    states: list[tuple[tuple[str, str], bool, int, str, float]] = []
    for table, watch in tables.watches():
        labels, backoff = (table, printable(watch.prefix)), watch.backoff
        yield "too_large", labels, int(watch.too_large)
        if watch.too_large:
            continue
        up = watch.index > 0 and backoff.since is None
        states.append((labels, up, backoff.total, backoff.last_error, backoff.failed_at))
        yield "reloads", labels, watch.reloads
        if (state := watch.mirror.state) is not None:
            snapshot, confirmed = state
            yield "snapshot_age_seconds", labels, now - confirmed
            yield "snapshot_max_age_seconds", labels, watch.mirror.max_age
            yield "snapshot_index", labels, watch.index
            yield "snapshot_keys", labels, snapshot.size
            yield "entries_refused", labels, sum(len(entries.errors) for entries in snapshot.entries.values())
            yield "load_seconds", labels, watch.load_seconds
            for service in snapshot.entries:
                yield "service_hidden", (*labels, service), int(service in snapshot.hidden)
    # The other tables read Consul, or the file, once per request.
    failures = counters.failures.copy()
    asked = (table for table, service, *_ in counters.cells() if service in SERVICES and table != OTHER)
    names = {name or own: name for name in (*asked, *failures)}
    for table in names.keys() - {table for (table, _), *_ in states}:
        total, error, failed_at, answers = failures.get(names[table], (0, "", 0.0, -1))
        with contextlib.suppress(ConfigError):  # requests of 2020 can bring names that no table can have
            labels = (table, config.table(table).root.decode())
            states.append((labels, counters.answers(names[table]) > answers, total, error, failed_at))
    for labels, up, total, error, failed_at in states:
        if not config.consul.addresses[0].startswith("file://"):
            yield "up", labels, int(up)
            yield "failures", labels, total
        if total:
            text = printable(_VARIABLE_PARTS.sub("...", error), 200)
            yield "last_error_timestamp_seconds", (*labels, text), time.time() - now + failed_at


class Exporter(threading.Thread):
    """Writes the text file and serves the address of ``[metrics]``; set ``changed`` to have it look again."""

    def __init__(self, table: str, tables: Tables) -> None:
        """``table`` is that of the process; in the dialects of 2020 requests may name others."""
        super().__init__(name="metrics", daemon=True)
        self._table = table
        self._tables = tables
        self.changed = threading.Event()
        self._backoffs: dict[str, Backoff] = {}
        self._server: Server | None = None

    def run(self) -> None:
        try:
            from prometheus_client import CollectorRegistry
        except ImportError as error:
            log.warning(
                "no metrics: %s is not installed; install table-consul[metrics] and update the table", error.name
            )
            return
        registry = CollectorRegistry()
        registry.register(self)
        pause = FIRST_WRITE_SECONDS
        while True:
            self.export(registry)
            pause = FIRST_WRITE_SECONDS if self.changed.wait(pause) else WRITE_INTERVAL_SECONDS
            self.changed.clear()

    def collect(self) -> Iterator[Any]:
        """Every metric with its current samples, computed from copies or single references; for any thread."""
        from prometheus_client import core

        families: dict[str, Any] = {
            name: getattr(core, f"{kind}MetricFamily")(f"table_consul_{name}", text, labels=("table", *labels))
            for name, kind, text, labels in METRICS
        }
        for name, labels, *values in chain(_requests(self._table, self._tables), _sources(self._table, self._tables)):
            families[name].add_metric(labels, *values)
        yield from families.values()

    def export(self, registry: CollectorRegistry) -> None:
        """Write the file once, and start or stop the server if the configuration has changed."""
        from prometheus_client import write_to_textfile

        assert self._tables.config is not None  # else there would be no exporter
        metrics = self._tables.config.metrics
        textfile, listen = ((s or "").replace("{table}", self._table) for s in (metrics.textfile, metrics.listen))
        if textfile:
            self._guarded(f"metrics.textfile {textfile}", lambda: write_to_textfile(textfile, registry))
        if self._server is not None and self._server.listen != listen:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        if listen and self._server is None:
            self._server = self._guarded(f"metrics.listen {listen}", lambda: Server(listen, registry))

    def _guarded(self, what: str, action: Callable[[], Any]) -> Any:  # noqa: ANN401 - that of the action
        backoff = self._backoffs.setdefault(what, Backoff(what, f"trying again every {WRITE_INTERVAL_SECONDS:.0f} s"))
        try:
            result = action()
        except Exception as error:  # noqa: BLE001 - metrics are worth a log line, not the thread
            backoff.failure(error, time.monotonic(), 0.0)
            return None
        backoff.success(time.monotonic())
        return result


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Serves a registry over HTTP at ``127.0.0.1:PORT``, ``[::1]:PORT`` or ``unix:///PATH``; or raises OSError."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, listen: str, registry: CollectorRegistry, client_seconds: float = 5.0) -> None:
        from prometheus_client import MetricsHandler

        self.listen = listen
        self._opened: list[socket.socket] = []
        handler: Any = MetricsHandler.factory(registry)
        handler.timeout = client_seconds
        if listen.startswith("unix://"):
            path, self.address_family = listen.removeprefix("unix://"), socket.AF_UNIX
            # The socket of a process that has ended goes; binding to any other file fails.
            with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(FileNotFoundError):
                probe.setblocking(False)  # noqa: FBT003 - socket's way; a full queue would block a blocking one
                if stat.S_ISSOCK(os.lstat(path).st_mode) and probe.connect_ex(path) == errno.ECONNREFUSED:
                    os.unlink(path)
            super().__init__(path, handler)  # type: ignore[arg-type]  # the address of such a socket is its path
            os.chmod(path, 0o666)  # noqa: S103 - for anyone who can reach the folder, as a loopback port is
        else:
            host, _, port = listen.rpartition(":")
            self.address_family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
            super().__init__((host.strip("[]"), int(port)), handler)
        threading.Thread(target=self.serve_forever, name="metrics http", daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - socketserver's method
        self._opened = [*(connection for connection in self._opened if connection.fileno() >= 0), request]
        if len(self._opened) > CONNECTIONS_MAX:
            with contextlib.suppress(OSError):  # it has just ended
                self._opened.pop(0).shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002 - socketserver's method
        log.debug("metrics: connection broken", exc_info=True)  # noqa: LOG014 - called in the handler of the exception
