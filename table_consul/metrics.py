"""The program's numbers, and Prometheus' ways of fetching them: a text file, a loopback port, a unix socket.

Strategy: what an answer costs is in tally.py. All else is read where it is kept anyway, when somebody asks, by a thread
of its own. prometheus_client is imported by that thread alone, and this module only when ``[metrics]`` is configured.

Every series carries the table's name: node_exporter refuses files that hold the same series, and each table has a
process, and a file, of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

from table_consul import __version__
from table_consul.backoff import Backoff
from table_consul.counters import BOUNDS_SECONDS, OTHER, OUTCOMES, Counters
from table_consul.errors import ConfigError, printable
from table_consul.protocol import Failed
from table_consul.services import SERVICES, Table

if TYPE_CHECKING:
    import socketserver

    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

    from table_consul.config import Config
    from table_consul.sources.watch import Watch

log = logging.getLogger("table_consul")

# Prometheus scrapes node_exporter every 15 s or more rarely.
EVERY_SECONDS = 15.0
# By then what a start or an update sets in motion has ended, as a rule, and the numbers of its middle need not stay.
SOON_SECONDS = 1.0
# For one read or write of whoever connects: connections are served one after the other.
CLIENT_SECONDS = 5.0
ERROR_CHARACTERS = 200
# In an error's text: what differs from one failure to the next of the same cause would make each a series of its own.
_VARYING = re.compile(r"\b\d+(?:\.\d+)? s\b|\b[0-9a-f]{8}-[0-9a-f-]{27}\b|\b[0-9a-f]{16,}\b", re.IGNORECASE)


class Kept(Protocol):
    """What keeps the numbers, as far as it is read here; see sources.Tables."""

    config: Config | None
    counters: Counters
    started: float

    def table(self, name: str) -> Table: ...

    def watches(self) -> list[tuple[str, Watch]]: ...


class Reader:
    """The numbers as Prometheus' metrics, each time somebody asks."""

    def __init__(self, table: str, kept: Kept) -> None:
        """``table`` is that of the process; in the dialects of 2020 requests may name others."""
        self._table = table
        self._kept = kept

    def collect(self) -> Iterator[Metric]:
        """Every metric with its samples."""
        from prometheus_client.core import GaugeMetricFamily

        build = GaugeMetricFamily("table_consul_build_info", "1, with the version.", labels=("table", "version"))
        build.add_metric((self._table, __version__), 1)
        started = GaugeMetricFamily(
            "table_consul_start_time_seconds", "When the process started, since the epoch.", labels=("table",)
        )
        started.add_metric((self._table,), self._kept.started)
        yield build
        yield started
        yield from self._requests()
        yield from self._state()

    def _name(self, table: str) -> str:
        return table or self._table

    def _requests(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        tally = self._kept.counters
        counts: dict[tuple[str, str, str, str], float] = {}
        times: dict[tuple[str, str], list[float]] = {}
        for (table, service, op, kind), cell in tally.cells().items():
            answered = (self._name(table), service, op, OUTCOMES[kind])
            counts[answered] = counts.get(answered, 0) + sum(cell[:-1])
            former = times.get(answered[:2], [0.0] * len(cell))
            times[answered[:2]] = [a + b for a, b in zip(former, cell, strict=True)]
        requests = CounterMetricFamily(
            "table_consul_requests", "Requests answered.", labels=("table", "service", "op", "outcome")
        )
        for labels, count in counts.items():
            requests.add_metric(labels, count)
        seconds = HistogramMetricFamily(
            "table_consul_request_seconds",
            "Seconds from the moment a request was read until its reply was there.",
            labels=("table", "service"),
        )
        for place, cell in times.items():
            below, buckets = 0.0, []
            for bound, count in zip((*map(repr, BOUNDS_SECONDS), "+Inf"), cell[:-1], strict=True):
                below += count
                buckets.append((bound, below))
            seconds.add_metric(place, buckets, cell[-1])
        late = CounterMetricFamily(
            "table_consul_deadline_hits", "Answers that took the deadline of their table, or longer.", labels=("table",)
        )
        errors = CounterMetricFamily(
            "table_consul_errors", "Answers that were an error, so that the mail waits.", labels=("table",)
        )
        failed: dict[str, float] = {self._table: 0}
        for (table, _, _, outcome), count in counts.items():
            failed[table] = failed.get(table, 0) + (count if outcome == OUTCOMES[Failed] else 0)
        for table, count in failed.items():
            errors.add_metric((table,), count)
        hits: dict[str, int] = {self._table: 0}
        for table, hit in tally.deadline_hits.copy().items():
            hits[self._name(table)] = hits.get(self._name(table), 0) + hit
        for table, hit in hits.items():
            late.add_metric((table,), hit)
        malformed = CounterMetricFamily(
            "table_consul_malformed_lines", "Lines that smtpd's protocol does not know.", labels=("table",)
        )
        malformed.add_metric((self._table,), tally.malformed)
        yield from (requests, seconds, errors, late, malformed)

    def _state(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        def gauge(name: str, text: str, *more: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"table_consul_{name}", text, labels=("table", "prefix", *more))

        up = gauge("up", "1 while Consul answers: the last attempt to read the prefix told what is there.")
        age = gauge("snapshot_age_seconds", "Since Consul last confirmed the snapshot.")
        limit = gauge("snapshot_max_age_seconds", "The age from which on the snapshot is not believed: max_age.")
        index = gauge("snapshot_index", "Consul's index of the snapshot; 0 if it is from the disk.")
        keys = gauge("snapshot_keys", "Entries in the snapshot.")
        refused = gauge("entries_refused", "Entries of the snapshot whose value cannot be used; the log names each.")
        hidden = gauge("service_hidden", "1 where Consul lets the token not read the service's folder.", "service")
        large = gauge("too_large", "1 while the prefix holds more than max_keys, and every answer reads Consul.")
        load = gauge("load_seconds", "From the first byte of Consul's latest answer until it was taken over.")
        reloads = CounterMetricFamily(
            "table_consul_reloads", "Snapshots taken from Consul.", labels=("table", "prefix")
        )
        failures = CounterMetricFamily(
            "table_consul_failures",
            "Failed attempts to read the prefix; of a mirror, as far as seen when these numbers were fetched.",
            labels=("table", "prefix"),
        )
        error = gauge("last_error_timestamp_seconds", "When Consul last could not be read, and why.", "error")
        now, today = time.monotonic(), time.time()
        mirrored = set()
        for table, watch in self._kept.watches():
            labels = (table, printable(watch.prefix))
            large.add_metric(labels, int(watch.too_large))
            if watch.too_large:
                continue
            mirrored.add(table)
            if watch.outage.total:
                text = _lasting(watch.outage.last_error)
                error.add_metric((*labels, text), today - (now - watch.outage.failed_at))
            up.add_metric(labels, int(watch.index > 0 and watch.outage.since is None))
            reloads.add_metric(labels, watch.reloads)
            failures.add_metric(labels, watch.outage.total)
            if watch.mirror.state is not None:
                snapshot, confirmed = watch.mirror.state
                age.add_metric(labels, now - confirmed)
                limit.add_metric(labels, watch.mirror.max_age)
                index.add_metric(labels, watch.index)
                keys.add_metric(labels, snapshot.size)
                refused.add_metric(labels, sum(len(bucket.errors) for bucket in snapshot.entries.values()))
                load.add_metric(labels, watch.took)
                for service in snapshot.entries:
                    hidden.add_metric((*labels, service), int(service in snapshot.forbidden))
        for table, labels in self._direct(mirrored):
            up.add_metric(labels, int(self._kept.counters.recovered(table)))
            failures.add_metric(labels, self._kept.counters.failures.get(table, (0, 0.0))[0])
        for labels, text, moment in self._reasons(mirrored):
            error.add_metric((*labels, _lasting(text)), today - (now - moment))
        yield from (up, age, limit, index, keys, refused, hidden, large, load, reloads, failures, error)

    def _reasons(self, mirrored: set[str]) -> Iterator[tuple[tuple[str, str], str, float]]:
        """Why answers from elsewhere than a mirror could last not be given: labels, text, moment."""
        told = set(mirrored)
        for name, (text, moment) in self._kept.counters.last_errors.copy().items():
            with contextlib.suppress(ConfigError):
                table = self._kept.table(name)
                if table.name not in told:
                    told.add(table.name)
                    yield (table.name, table.root.decode()), text, moment

    def _direct(self, mirrored: set[str]) -> Iterator[tuple[str, tuple[str, str]]]:
        """The tables whose requests each read Consul, as they were called, and their labels."""
        config = self._kept.config
        if config is None or config.consul.addresses[0].startswith("file://"):
            return
        told = {OTHER, *mirrored}
        for name in dict.fromkeys(table for table, service, *_ in self._kept.counters.cells() if service in SERVICES):
            with contextlib.suppress(ConfigError):
                table = self._kept.table(name)
                if name not in told and table.name not in told:
                    told.add(table.name)
                    yield name, (table.name, table.root.decode())


class Exporter(threading.Thread):
    """Writes the file and serves the port or socket of ``[metrics]``, whatever it says at the moment."""

    def __init__(self, table: str, kept: Kept) -> None:
        super().__init__(name="metrics", daemon=True)
        self._table = table
        self._kept = kept
        self._wake = threading.Event()
        self._outages: dict[str, Backoff] = {}
        self._server: tuple[str, socketserver.TCPServer] | None = None

    def wake(self) -> None:
        """Write the file now, and look at the configuration again."""
        self._wake.set()

    def run(self) -> None:
        try:
            registry = _registry(Reader(self._table, self._kept).collect)
        except ImportError as error:
            log.warning(
                "no metrics: [metrics] is configured, but %s is not installed;"
                " install table-consul[metrics] or python3-prometheus-client, then: smtpctl update table %s",
                error.name or "prometheus_client",
                self._table,
            )
            return
        pause = SOON_SECONDS
        while True:
            self._export(registry)
            pause = SOON_SECONDS if self._wake.wait(pause) else EVERY_SECONDS
            self._wake.clear()

    def _export(self, registry: CollectorRegistry) -> None:
        from prometheus_client import write_to_textfile

        settings = self._kept.config.metrics if self._kept.config is not None else None
        if settings is None:
            return
        textfile = settings.textfile and settings.textfile.replace("{table}", self._table)
        listen = settings.listen and settings.listen.replace("{table}", self._table)
        if textfile:
            self._try(f"metrics.textfile {textfile}", lambda: write_to_textfile(textfile, registry))
        if self._server is not None and self._server[0] != listen:
            _, server = self._server
            self._server = None
            server.shutdown()
            server.server_close()
        if listen and self._server is None:
            self._try(f"metrics.listen {listen}", lambda: self._listen(listen, registry))

    def _try(self, what: str, act: Callable[[], None]) -> None:
        outage = self._outages.setdefault(what, Backoff(what, f"trying again every {EVERY_SECONDS:.0f} s"))
        try:
            act()
        except Exception as error:  # noqa: BLE001 - numbers are worth a log line, not the thread
            outage.failure(error, time.monotonic(), random.random())  # noqa: S311 - jitter, no secret
        else:
            outage.success(time.monotonic())

    def _listen(self, listen: str, registry: CollectorRegistry) -> None:
        server = _server(listen, registry)
        threading.Thread(target=server.serve_forever, args=(1.0,), name="metrics http", daemon=True).start()
        self._server = (listen, server)


def _lasting(text: str) -> str:
    """The error without what differs each time it comes; nothing in it can be a token, whoever repeated that to us."""
    return printable(_VARYING.sub("...", text), ERROR_CHARACTERS)


def _registry(collect: Callable[[], Iterable[Metric]]) -> CollectorRegistry:
    from prometheus_client import CollectorRegistry
    from prometheus_client.registry import Collector

    class Live(Collector):
        def collect(self) -> Iterable[Metric]:
            return collect()

    registry = CollectorRegistry()
    registry.register(Live())
    return registry


def _server(listen: str, registry: CollectorRegistry) -> socketserver.TCPServer:
    """A server that listens at ``127.0.0.1:PORT``, ``[::1]:PORT`` or ``unix:///PATH``; raises OSError.

    It serves one connection at a time, so that nobody on this host can use up our descriptors.
    """
    import socket
    import socketserver

    from prometheus_client import MetricsHandler

    path = listen.removeprefix("unix://") if listen.startswith("unix://") else None
    host, _, port = listen.rpartition(":")

    class Server(socketserver.TCPServer):
        address_family = socket.AF_UNIX if path else socket.AF_INET6 if host.startswith("[") else socket.AF_INET
        allow_reuse_address = True

        def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002
            log.debug("metrics: a connection broke: %s", sys.exc_info()[1])

    handler = type("Handler", (MetricsHandler,), {"registry": registry, "timeout": CLIENT_SECONDS})
    if path is None:
        return Server((host.strip("[]"), int(port)), handler)
    _remove_stale(path)
    server = Server(path, handler)  # type: ignore[arg-type]  # the address of such a socket is its path
    os.chmod(path, 0o666)  # noqa: S103 - anyone may ask, as on a loopback port; the folder says who can reach it
    return server


def _remove_stale(path: str) -> None:
    """Remove the socket of a process that is gone; one that is served stays, and binding will fail."""
    import socket

    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
