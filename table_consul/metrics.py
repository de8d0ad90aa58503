"""Prometheus metrics, computed when they are read: a text file, a loopback port, or a unix socket.

Imported only where ``[metrics]`` is configured, and prometheus_client only in the exporter's thread. It writes nothing
that the server loop or the watches read. Every series carries the table's name: each table has a process of its own,
and node_exporter rejects text files that share a series.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import socket
import socketserver
import stat
import sys
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
from table_consul.protocol import Failed
from table_consul.services import SERVICES

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

    from table_consul.tables import Tables

log = logging.getLogger("table_consul")

# Prometheus scrapes node_exporter every 15 s or less often.
WRITE_INTERVAL_SECONDS = 15.0
# What a start or an update sets in motion usually ends within this, and the file should show its end soon.
FIRST_WRITE_SECONDS = 1.0
# For one connection from start to end, however slowly its client reads and writes.
CLIENT_SECONDS = 5.0
# A bound on the descriptors and threads that local users can occupy.
CONNECTIONS_MAX = 8
# Parts of an error's text that differ between failures of the same cause: each would create a new series.
_VARIABLE_PARTS = re.compile(r"\b\d+(?:\.\d+)? s\b|\b[0-9a-f]{8}-[0-9a-f-]{27}\b|\b[0-9a-f]{16,}\b", re.IGNORECASE)

# Name without "table_consul_", type, help text, and labels besides "table".
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


class Collector:
    """The metrics of this process, for a registry of prometheus_client."""

    def __init__(self, table: str, tables: Tables) -> None:
        """``table`` is that of the process; in the dialects of 2020 requests may name others."""
        self._table = table
        self._tables = tables

    def collect(self) -> Iterator[Metric]:
        """Every metric with its current samples, computed from copies or single references; for any thread."""
        from prometheus_client import core

        families: dict[str, Any] = {
            name: getattr(core, f"{kind}MetricFamily")(f"table_consul_{name}", text, labels=("table", *labels))
            for name, kind, text, labels in METRICS
        }
        for name, labels, *values in chain(self._requests(), self._sources()):
            families[name].add_metric(labels, *values)
        yield from families.values()

    def _requests(self) -> Iterator[tuple[Any, ...]]:
        own, counters = (self._table,), self._tables.counters
        yield "build_info", (*own, __version__), 1
        yield "start_time_seconds", own, self._tables.started
        yield "malformed_lines", own, counters.malformed
        totals = defaultdict[Any, float](float, {("errors", own): 0, ("deadline_hits", own): 0})
        cells = defaultdict(list)
        for (name, service, op, reply), cell in counters.cells().items():
            table, count = name or self._table, sum(cell[2:])
            totals["requests", (table, service, op, OUTCOMES[reply])] += count
            totals["errors", (table,)] += count if reply is Failed else 0
            totals["deadline_hits", (table,)] += cell[1]
            cells[table, service].append(cell)
        yield from ((*sample, total) for sample, total in totals.items())
        bounds = (*map(repr, BOUNDS_SECONDS), "+Inf")
        for labels, same in cells.items():
            seconds, _, *counts = map(sum, zip(*same, strict=True))
            yield "request_seconds", labels, [*zip(bounds, accumulate(counts), strict=True)], seconds

    def _sources(self) -> Iterator[tuple[Any, ...]]:
        config, counters, mirrored = self._tables.config, self._tables.counters, set()
        now = time.monotonic()
        epoch = time.time() - now
        for table, watch in self._tables.watches():
            labels, backoff = (table, printable(watch.prefix)), watch.backoff
            yield "too_large", labels, int(watch.too_large)
            if watch.too_large:
                continue
            mirrored.add(table)
            yield "up", labels, int(watch.index > 0 and backoff.since is None)
            yield "reloads", labels, watch.reloads
            yield "failures", labels, backoff.total
            if backoff.total:
                error = _without_variable_parts(backoff.last_error)
                yield "last_error_timestamp_seconds", (*labels, error), epoch + backoff.failed_at
            if (state := watch.mirror.state) is not None:
                snapshot, confirmed = state
                yield "snapshot_age_seconds", labels, now - confirmed
                yield "snapshot_max_age_seconds", labels, watch.mirror.max_age
                yield "snapshot_index", labels, watch.index
                yield "snapshot_keys", labels, snapshot.size
                yield "entries_refused", labels, sum(len(entries.errors) for entries in snapshot.entries.values())
                yield "load_seconds", labels, watch.load_seconds
                for service in snapshot.entries:
                    yield "service_hidden", (*labels, service), int(service in snapshot.forbidden)
        # The other tables read Consul, or the file, once per request.
        failures = counters.failures.copy()
        asked = (table for table, service, *_ in counters.cells() if service in SERVICES and table != OTHER)
        names = {name or self._table: name for name in (*asked, *failures)}
        assert config is not None  # else there would be no exporter
        for table in names.keys() - mirrored:
            total, text, failed_at, answers = failures.get(names[table], (0, "", 0.0, -1))
            with contextlib.suppress(ConfigError):  # requests of 2020 can bring names that no table can have
                labels = (table, config.table(table).root.decode())
                if not config.consul.addresses[0].startswith("file://"):
                    yield "up", labels, int(counters.answers(names[table]) > answers)
                    yield "failures", labels, total
                if total:
                    yield "last_error_timestamp_seconds", (*labels, _without_variable_parts(text)), epoch + failed_at


class Exporter(threading.Thread):
    """Writes the text file and serves the address of ``[metrics]``, as the current configuration says."""

    def __init__(self, table: str, tables: Tables) -> None:
        super().__init__(name="metrics", daemon=True)
        self._table = table
        self._tables = tables
        self._wake = threading.Event()
        self._backoffs: dict[str, Backoff] = {}
        self._server: Server | None = None

    def wake(self) -> None:
        """Write the file now, and read the configuration again."""
        self._wake.set()

    def run(self) -> None:
        try:
            from prometheus_client import CollectorRegistry
        except ImportError as error:
            advice = "install table-consul[metrics] or python3-prometheus-client, then: smtpctl update table"
            log.warning("no metrics: %s is not installed; %s %s", error.name, advice, self._table)
            return
        registry = CollectorRegistry()
        registry.register(Collector(self._table, self._tables))
        pause = FIRST_WRITE_SECONDS
        while True:
            self.export(registry)
            pause = FIRST_WRITE_SECONDS if self._wake.wait(pause) else WRITE_INTERVAL_SECONDS
            self._wake.clear()

    def export(self, registry: CollectorRegistry) -> None:
        """Write the file once, and start or stop the server if the configuration has changed."""
        from prometheus_client import write_to_textfile

        config = self._tables.config
        assert config is not None  # else there would be no exporter
        textfile = (config.metrics.textfile or "").replace("{table}", self._table)
        listen = (config.metrics.listen or "").replace("{table}", self._table)
        if textfile:
            self._guarded(f"metrics.textfile {textfile}", lambda: write_to_textfile(textfile, registry))
        if self._server is not None and self._server.listen != listen:
            self._server.stopped = True
            self._server = None
        if listen and self._server is None:
            self._server = self._guarded(f"metrics.listen {listen}", lambda: Server(listen, registry))

    def _guarded(self, what: str, action: Callable[[], Any]) -> Any:  # noqa: ANN401 - that of the action
        consequence = f"trying again every {WRITE_INTERVAL_SECONDS:.0f} s"
        backoff = self._backoffs.setdefault(what, Backoff(what, consequence))
        try:
            result = action()
        except Exception as error:  # noqa: BLE001 - metrics are worth a log line, not the thread
            backoff.failure(error, time.monotonic(), 0.0)
            return None
        backoff.success(time.monotonic())
        return result


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Serves a registry over HTTP at ``127.0.0.1:PORT``, ``[::1]:PORT`` or ``unix:///PATH`` until it is ``stopped``.

    Raises:
        OSError: the address cannot be used.
    """

    allow_reuse_address = True
    daemon_threads = True
    timeout = 1.0  # how soon it notices a slow client, or that it is stopped

    def __init__(self, listen: str, registry: CollectorRegistry, client_seconds: float = CLIENT_SECONDS) -> None:
        from prometheus_client import MetricsHandler

        self.listen, self.stopped = listen, False
        self._client_seconds = client_seconds
        self._opened: list[tuple[float, socket.socket]] = []
        handler = MetricsHandler.factory(registry)
        if listen.startswith("unix://"):
            path, self.address_family = listen.removeprefix("unix://"), socket.AF_UNIX
            _remove_stale(path)
            super().__init__(path, handler)  # type: ignore[arg-type]  # the address of such a socket is its path
            os.chmod(path, 0o666)  # noqa: S103 - for anyone who can reach the folder, as a loopback port is
        else:
            host, _, port = listen.rpartition(":")
            self.address_family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
            super().__init__((host.strip("[]"), int(port)), handler)
        threading.Thread(target=self._serve, name="metrics http", daemon=True).start()

    def _serve(self) -> None:
        with self:
            limit = CONNECTIONS_MAX
            while limit > 0:
                self.handle_request()
                limit = 0 if self.stopped else CONNECTIONS_MAX
                expired = time.monotonic() - self._client_seconds
                self._opened = [(at, connection) for at, connection in self._opened if connection.fileno() >= 0]
                for newer, (at, connection) in enumerate(reversed(self._opened)):
                    if at < expired or newer >= limit:
                        with contextlib.suppress(OSError):  # it has just ended
                            connection.shutdown(socket.SHUT_RDWR)

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - socketserver's method
        self._opened.append((time.monotonic(), request))
        super().process_request(request, client_address)

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002 - socketserver's method
        log.debug("metrics: connection broken", exc_info=sys.exc_info())


def _without_variable_parts(text: str) -> str:
    """The text of an error as a label, without anything that could be a token."""
    return printable(_VARIABLE_PARTS.sub("...", text), 200)


def _remove_stale(path: str) -> None:
    """Remove the socket of a process that has ended; any other file stays, and binding to it fails."""
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(FileNotFoundError):
        probe.setblocking(False)  # noqa: FBT003 - socket's way; a full queue would block a blocking one
        if stat.S_ISSOCK(os.lstat(path).st_mode) and probe.connect_ex(path) == errno.ECONNREFUSED:
            os.unlink(path)
