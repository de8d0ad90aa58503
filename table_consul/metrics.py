"""Prometheus metrics, computed when they are read: a text file, a loopback port, or a unix socket."""

from __future__ import annotations

import contextlib
import errno
import http.server
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
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import msgspec

from table_consul import __version__
from table_consul.backoff import Backoff
from table_consul.errors import ConfigError, printable
from table_consul.files import replace_file
from table_consul.responder import BOUNDS_SECONDS, OTHER, OUTCOMES
from table_consul.services import SERVICES

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

    from table_consul.tables import Tables

log = logging.getLogger("table_consul")

# Prometheus scrapes node_exporter every 15 s or less often.
WRITE_INTERVAL_SECONDS = 15.0
# A start or an update usually completes within this, and the file should soon show the result.
FIRST_WRITE_SECONDS = 1.0
# A bound on the descriptors and threads that local users can occupy.
CONNECTIONS_MAX = 8
INSTALL_HINT = "install table-consul[metrics] or python3-prometheus-client, then run: smtpctl update table NAME"

# Errors contain no token, but any local user may read metrics, so whatever looks like one is removed.
_TOKEN = re.compile(r"\b[0-9a-f]{8}-[0-9a-f-]{27}\b|\b[0-9a-f]{16,}\b", re.IGNORECASE)
LAST_ERROR = b"# table_consul_last_error "
"""The start of a comment with a JSON list of table, prefix and text, which Prometheus ignores."""

# Name without "table_consul_", type, help text, and labels besides "table". All have that one, because each table has a
# process of its own, and node_exporter rejects text files that share a series.
METRICS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("build_info", "Gauge", "Always 1; the label is the version of table-consul.", ("version",)),
    ("start_time_seconds", "Gauge", "When the process started, in seconds since the epoch.", ()),
    ("requests", "Counter", "Requests answered.", ("service", "op", "outcome")),
    ("request_seconds", "Histogram", "Seconds from reading a request until its reply was ready.", ("service",)),
    ("errors", "Counter", "Error replies; the sending server keeps the message and retries.", ()),
    ("deadline_hits", "Counter", "Replies that took the deadline of their table or longer.", ()),
    ("malformed_lines", "Counter", "Input lines that do not follow smtpd's table protocol.", ()),
    ("up", "Gauge", "1 if the last attempt to read the prefix from Consul succeeded.", ("prefix",)),
    ("snapshot_age_seconds", "Gauge", "Seconds since Consul last confirmed the snapshot.", ("prefix",)),
    ("snapshot_max_age_seconds", "Gauge", "Age at which the snapshot expires (max_age).", ("prefix",)),
    ("snapshot_index", "Gauge", "Consul's index of the snapshot; 0 if it was loaded from disk.", ("prefix",)),
    ("snapshot_keys", "Gauge", "Entries in the snapshot.", ("prefix",)),
    ("entries_refused", "Gauge", "Entries of the snapshot that smtpd cannot use; the log lists them.", ("prefix",)),
    ("service_hidden", "Gauge", "1 if the token may not read the folder of the service.", ("prefix", "service")),
    ("deletions_held", "Gauge", "Entries deleted in Consul that are still served.", ("prefix",)),
    ("deletions_held_seconds", "Gauge", "Seconds until the first of them expire; 0 if there are none.", ("prefix",)),
    ("too_large", "Gauge", "1 while the prefix holds more than max_keys keys (direct mode).", ("prefix",)),
    ("load_seconds", "Gauge", "Seconds from the first byte of Consul's last response until it was used.", ("prefix",)),
    ("reloads", "Counter", "Snapshots loaded from Consul.", ("prefix",)),
    ("failures", "Counter", "Failed attempts to read the prefix.", ("prefix",)),
    (
        "last_error_timestamp_seconds",
        "Gauge",
        "When reading Consul last failed, and the kind of error.",
        ("prefix", "error"),
    ),
)


def _requests(own: str, tables: Tables) -> Iterator[tuple[Any, ...]]:
    yield "build_info", (own, __version__), 1
    yield "start_time_seconds", (own,), tables.started
    yield "malformed_lines", (own,), tables.counters.malformed
    totals = defaultdict[Any, float](float, {("errors", (own,)): 0, ("deadline_hits", (own,)): 0})
    by_service = defaultdict(list)
    for (name, service, op, reply), sums in tables.counters.sums().items():
        table, outcome, count = name or own, OUTCOMES[reply], sum(sums[2:])
        totals["requests", (table, service, op, outcome)] += count
        totals["errors", (table,)] += count if outcome == "error" else 0
        totals["deadline_hits", (table,)] += sums[1]
        by_service[table, service].append(sums)
    yield from ((*sample, total) for sample, total in totals.items())
    bounds = (*map(str, BOUNDS_SECONDS), "+Inf")
    for labels, same in by_service.items():
        seconds, _, *counts = map(sum, zip(*same, strict=True))
        yield "request_seconds", labels, [*zip(bounds, accumulate(counts), strict=True)], seconds


class _Failures(NamedTuple):
    """Whether a prefix can be read, how often that failed, and the kind, text and time of the last error."""

    labels: tuple[str, str]
    up: bool
    total: int
    kind: str
    text: str
    at: float


def _sources(own: str, tables: Tables) -> Iterator[tuple[Any, ...]]:
    assert tables.config is not None  # or there would be no exporter
    now = time.monotonic()
    for table, watch in tables.watches():
        labels = (table, watch.prefix.decode())
        yield "too_large", labels, int(watch.too_large)
        if watch.too_large:
            continue
        yield "reloads", labels, watch.reloads
        if (state := watch.mirror.state) is not None:
            snapshot, confirmed = state
            yield "snapshot_age_seconds", labels, now - confirmed
            yield "snapshot_max_age_seconds", labels, watch.mirror.max_age
            yield "snapshot_index", labels, watch.index
            yield "snapshot_keys", labels, snapshot.size
            yield "entries_refused", labels, sum(entries.refused for entries in snapshot.entries.values())
            yield "deletions_held", labels, sum(len(held.keys) for held in snapshot.held.values())
            left = max(snapshot.held_until - now, 0.0) if snapshot.held else 0.0
            yield "deletions_held_seconds", labels, left
            yield "load_seconds", labels, watch.load_seconds
            for service in snapshot.entries:
                yield "service_hidden", (*labels, service), int(service in snapshot.hidden)
    for prefix in _failures(own, tables):
        if tables.config.consul.file is None:
            yield "up", prefix.labels, int(prefix.up)
            yield "failures", prefix.labels, prefix.total
        if prefix.total:
            yield "last_error_timestamp_seconds", (*prefix.labels, prefix.kind), time.time() - now + prefix.at


def _failures(own: str, tables: Tables) -> list[_Failures]:
    config, counters = tables.config, tables.counters
    assert config is not None  # or there would be no exporter
    found: list[_Failures] = []
    for table, watch in tables.watches():
        if not watch.too_large:
            last, up = watch.backoff, watch.index > 0 and watch.backoff.since is None
            labels = (table, watch.prefix.decode())
            found.append(_Failures(labels, up, last.total, last.last_kind, last.last_error, last.failed_at))
    # The other tables read Consul, or the file, once per request.
    failures = counters.failures.copy()
    asked = (table for table, service, *_ in counters.sums() if service in SERVICES and table != OTHER)
    names = {name or own: name for name in (*asked, *failures)}
    for table in names.keys() - {each.labels[0] for each in found}:
        total, kind, text, at, answers = failures.get(names[table], (0, "", "", 0.0, -1.0))
        with contextlib.suppress(ConfigError):  # in the dialects of 2020 a request may have an invalid name
            labels = (table, config.table(table).root.decode())
            found.append(_Failures(labels, counters.answers(names[table]) > answers, total, kind, text, at))
    return found


class Exporter(threading.Thread):
    """Writes the text file and serves the address of ``[metrics]``; set ``changed`` when the configuration changes."""

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
            from prometheus_client import generate_latest  # noqa: F401 - whether `text` can import it
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a broken package may raise anything
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            problem = f"{missing} is not installed" if missing else f"{type(error).__name__}: {error}"
            log.warning("no metrics: %s (%s)", problem, INSTALL_HINT)
            return
        pause = FIRST_WRITE_SECONDS
        while True:
            self.export()
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

    def comments(self) -> bytes:
        """The texts of the last errors as comments, because as a label each text would be a series."""
        last = [each for each in _failures(self._table, self._tables) if each.total]
        lines = ([*each.labels, printable(_TOKEN.sub("...", each.text), 200)] for each in last)
        return b"".join(LAST_ERROR + msgspec.json.encode(line) + b"\n" for line in lines)

    def text(self) -> bytes:
        """All metrics and comments, in the format that Prometheus reads."""
        from prometheus_client import generate_latest

        return generate_latest(cast("Collector", self)) + self.comments()

    def export(self) -> None:
        """Write the file once, and start or stop the server if the configuration has changed."""
        assert self._tables.config is not None  # or there would be no exporter
        metrics = self._tables.config.metrics
        textfile, listen = ((s or "").replace("{table}", self._table) for s in (metrics.textfile, metrics.listen))
        if textfile:
            self._guarded(f"metrics.textfile {textfile}", lambda: replace_file(textfile, self.text(), mode=0o644))
        if self._server is not None and self._server.listen != listen:
            self._server.stop()
            self._server = None
        if listen and self._server is None:
            self._server = self._guarded(f"metrics.listen {listen}", lambda: Server(listen, self.text))

    def _guarded(self, what: str, action: Callable[[], Any]) -> Any:  # noqa: ANN401 - that of the action
        backoff = self._backoffs.setdefault(what, Backoff(what, f"retrying every {WRITE_INTERVAL_SECONDS:.0f} s"))
        try:
            result = action()
        except Exception as error:  # noqa: BLE001 - a failure is logged and must not end the thread
            # Without "[Errno 13]", which str() adds to the text of the system.
            plain = OSError(error.strerror) if isinstance(error, OSError) and error.strerror else error
            backoff.failure(plain, time.monotonic(), 0.0)
            return None
        backoff.success(time.monotonic())
        return result


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    timeout = 5.0

    def do_GET(self) -> None:
        body = self.server.text()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        """Log nothing: scrapes are frequent."""


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Serves a text over HTTP at ``127.0.0.1:PORT``, ``[::1]:PORT`` or ``unix:///PATH``.

    Raises:
        OSError: the address cannot be bound.
    """

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, listen: str, text: Callable[[], bytes]) -> None:
        self.listen = listen
        self.text = text
        self._opened: list[socket.socket] = []
        if listen.startswith("unix://"):
            path, self.address_family = listen.removeprefix("unix://"), socket.AF_UNIX
            # Remove the socket of a process that has ended; binding to any other file fails.
            with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(FileNotFoundError):
                probe.setblocking(False)  # noqa: FBT003 - socket's way; a full queue would block a blocking one
                if stat.S_ISSOCK(os.lstat(path).st_mode) and probe.connect_ex(path) == errno.ECONNREFUSED:
                    os.unlink(path)
            super().__init__(path, _Handler)  # type: ignore[arg-type]  # the address of such a socket is its path
            os.chmod(path, 0o666)  # noqa: S103 - for anyone who can reach the folder, as a loopback port is
        else:
            host, _, port = listen.rpartition(":")
            self.address_family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
            super().__init__((host.strip("[]"), int(port)), _Handler)
        threading.Thread(target=self.serve_forever, name="metrics http", daemon=True).start()

    def stop(self) -> None:
        """Stop serving, and remove the unix socket, which is ours while we listen."""
        self.shutdown()
        if self.address_family == socket.AF_UNIX:
            with contextlib.suppress(OSError):
                os.unlink(self.listen.removeprefix("unix://"))
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - socketserver's method
        self._opened = [*(connection for connection in self._opened if connection.fileno() >= 0), request]
        if len(self._opened) > CONNECTIONS_MAX:
            with contextlib.suppress(OSError):  # it has just ended
                self._opened.pop(0).shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002 - socketserver's method
        log.debug("metrics: connection broken", exc_info=True)  # noqa: LOG014 - called in the handler of the exception
