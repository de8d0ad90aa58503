"""The state of each table and of the folders that it is read from, from the metrics that its daemon publishes."""

from __future__ import annotations

import contextlib
import glob
import http.client
import os
import re
import socket
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from table_consul.config import Config
from table_consul.ctl import smtpdconf
from table_consul.errors import UNDECODABLE, ConfigError, SourceError, TableConsulError, printable, problem_of
from table_consul.files import open_regular_file, read_bounded
from table_consul.metrics import LAST_ERROR, WRITE_INTERVAL_SECONDS

# After three missed writes the process is gone, and its file remains.
STALE_SECONDS = 3 * WRITE_INTERVAL_SECONDS
# A daemon closes each connection within about half of this.
ANSWER_SECONDS = 10.0
# At about 200 bytes per series, more than one process has.
SIZE_MAX = 16 << 20
OWN = "table_consul_"
# No time, index or count is larger, and time.localtime() rejects much larger numbers.
VALUE_MAX = 1e15


class Prefix(msgspec.Struct):
    """A folder of Consul that a table is read from; None where a value is unknown or does not apply."""

    prefix: str
    state: str
    healthy: bool | None
    index: int | None = None
    age: float | None = None
    """Seconds from when Consul confirmed the data until the metrics were taken."""
    keys: int | None = None
    refused: int | None = None
    held: int | None = None
    """Entries that still answer although they are deleted in Consul."""
    held_seconds: float | None = None
    """How much longer they answer, from when the metrics were taken."""
    hidden: list[str] = []
    """Services whose folder the token may not read."""
    last_error: str | None = None
    last_error_at: float | None = None
    consul_index: int | None = None
    ahead: bool | None = None
    """Whether Consul has changes that the table lacks."""
    remarks: list[str] = []


class Status(msgspec.Struct):
    """One table; times in seconds since the epoch. ``healthy`` is None if unknown."""

    table: str
    state: str
    healthy: bool | None
    version: str | None = None
    started: float | None = None
    place: str | None = None
    taken: float | None = None
    """When the metrics were written or fetched."""
    live: bool = False
    """The metrics come from a socket, not from a file."""
    remarks: list[str] = []
    prefixes: list[Prefix] = []


def published_statuses(config: Config, tables: Sequence[str] = ()) -> list[Status]:
    """The published state of these tables; without any, of all that are configured, in smtpd.conf or publish metrics.

    Raises:
        TableConsulError: metrics cannot be read on this host.
        ConfigError: a name is not a valid table name.
    """
    try:
        import prometheus_client.parser  # noqa: F401 - without it the daemons publish nothing either
    except ImportError:
        raise TableConsulError(
            "prometheus_client is missing", "install table-consul[metrics] or python3-prometheus-client"
        ) from None
    known = {*config.tables, *published_tables(config), *smtpdconf.tables_of(config.path)}
    wanted = tables or sorted(known) or (config.defaults.name,)
    return [status_of(config, config.table(name).name) for name in dict.fromkeys(wanted)]


def published_tables(config: Config) -> set[str]:
    """The tables that have a text file or socket, even if their process has ended."""
    found = set()
    for pattern in (config.metrics.textfile or "", (config.metrics.listen or "").removeprefix("unix://")):
        before, *rest = pattern.split("{table}")
        expression = re.escape(before) + "([^/]+)" + r"\1".join(map(re.escape, rest))
        for path in glob.iglob("*".join(map(glob.escape, (before, *rest)))) if rest else ():
            if matched := re.fullmatch(expression, path):
                with contextlib.suppress(ConfigError):  # not a table name: a file of another program
                    found.add(config.table(matched[1]).name)
    return found


def status_of(config: Config, table: str, *, timeout: float = ANSWER_SECONDS) -> Status:
    """The published metrics of this table: from ``listen`` if it answers within ``timeout`` seconds, or ``textfile``.

    Without metrics the table is not running, or unknown, and the remarks give the reason. Requires prometheus_client.
    """
    status = Status(table, "not running", healthy=False)
    patterns = ((config.metrics.listen, True), (config.metrics.textfile, False))
    for place, live in ((pattern.replace("{table}", table), live) for pattern, live in patterns if pattern):
        try:
            data, taken = _fetch(place, timeout, live=live)
            age = time.time() - taken
            if age <= STALE_SECONDS:
                running = _parsed(data, table)
                running.place, running.taken, running.live = place, taken, live
                if config.consul.file is not None:
                    running.state, running.remarks = "file", [f"read from {config.consul.addresses[0]}"]
                    for prefix in running.prefixes:  # published after an error
                        prefix.state = "file"
                return running
            text = f"last written {age:.0f} s ago, so the process has ended (remove the file if the table is gone)"
        except FileNotFoundError as error:
            text = f"{problem_of(error)} (check that smtpd runs, and its log)"
        except ConnectionRefusedError as error:
            gone = "; remove the socket if the table is gone" if place.startswith("unix://") else ""
            status.remarks.append(
                f"{place}: {problem_of(error)}, so the process has ended (check that smtpd runs{gone})"
            )
            return status  # its text file may still be new
        except (OSError, http.client.HTTPException, SourceError) as error:
            text = getattr(error, "strerror", None) or str(error) or type(error).__name__
            status.state, status.healthy = "unknown", None
        status.remarks.append(f"{place}: {text}")
    return status


class _Socket(socket.socket):
    """A socket with a deadline for the whole response; the timeout of a socket applies to each read."""

    deadline: float

    def recv_into(self, *arguments: Any) -> int:  # noqa: ANN401 - passed on
        if (left := self.deadline - time.monotonic()) <= 0:
            raise TimeoutError("timed out")
        self.settimeout(left)
        return super().recv_into(*arguments)


def _fetch(place: str, timeout: float, *, live: bool) -> tuple[bytes, float]:
    if not live:
        with open(place, "rb", opener=open_regular_file) as file:
            written = os.fstat(file.fileno()).st_mtime
            if written - time.time() > STALE_SECONDS:
                raise SourceError("dated in the future, so the process may have ended (check the clock)")
            return read_bounded(file, SIZE_MAX), written
    path = place.removeprefix("unix://")
    connection = http.client.HTTPConnection(place if path == place else "localhost", timeout=timeout)
    with contextlib.closing(connection):
        if path == place:
            connection.connect()
        connection.sock = _Socket(fileno=connection.sock.detach()) if path == place else _Socket(socket.AF_UNIX)
        connection.sock.deadline = time.monotonic() + timeout
        connection.sock.settimeout(timeout)
        if path != place:
            connection.sock.connect(path)
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        if response.status != 200:
            raise SourceError(f"returned status {response.status} instead of metrics")
        return read_bounded(response, SIZE_MAX), time.time()


def _parsed(data: bytes, table: str) -> Status:
    from prometheus_client.parser import text_string_to_metric_families

    try:
        every = [sample for family in text_string_to_metric_families(data.decode()) for sample in family.samples]
    except Exception as error:  # noqa: BLE001 - a malformed line raises any exception in the parser
        raise SourceError(f"not Prometheus metrics ({type(error).__name__})") from None
    own = [(name[len(OWN) :], labels, value) for name, labels, value, *_ in every if name.startswith(OWN)]
    if not all(abs(value) < VALUE_MAX for _, _, value in own):
        raise SourceError("contains values that table-consul does not write")  # NaN among them
    tables = {labels.get("table", "") for name, labels, _ in own if name == "build_info"}
    if table not in tables:
        hint = "name that table, or add {table} to the place" if tables else "add {table} to its name"
        others = ", ".join(sorted(map(printable, tables))) or "other programs"
        raise SourceError(f"contains only metrics of {others} ({hint})")
    status = Status(table, "direct", healthy=True)
    prefixes: dict[str, tuple[Prefix, dict[str, float]]] = {}
    for name, labels, value in own:
        if name == "build_info":
            status.version = labels.get("version")
        elif name == "start_time_seconds":
            status.started = value
        elif labels.get("table") == table and "prefix" in labels:
            prefix, values = prefixes.setdefault(labels["prefix"], (Prefix(labels["prefix"], "", healthy=False), {}))
            values[name] = value
            if name == "service_hidden" and value:
                prefix.hidden.append(labels.get("service", "?"))
            elif name == "last_error_timestamp_seconds":
                prefix.last_error, prefix.last_error_at = labels.get("error"), value
    for line in filter(lambda line: line.startswith(LAST_ERROR), data.splitlines()):
        with contextlib.suppress(*UNDECODABLE):
            owner, name, text = msgspec.json.decode(line.removeprefix(LAST_ERROR), type=tuple[str, str, str])
            if owner == table and name in prefixes:
                prefixes[name][0].last_error = text
    for prefix, values in prefixes.values():
        _judge(prefix, values)
    status.prefixes = [prefix for prefix, _ in prefixes.values()]
    status.remarks = [] if prefixes else ["no requests yet"]
    return status


def _judge(prefix: Prefix, values: dict[str, float]) -> None:
    whole = {metric: int(value) for metric, value in values.items()}
    prefix.index, prefix.keys, prefix.refused = map(whole.get, ("snapshot_index", "snapshot_keys", "entries_refused"))
    prefix.held, prefix.held_seconds = whole.get("deletions_held"), values.get("deletions_held_seconds")
    prefix.age, mirrored = values.get("snapshot_age_seconds"), "reloads_total" in values
    states = {
        "too large": values.get("too_large"),
        "held": mirrored and values.get("up") and prefix.held,
        "following": mirrored and values.get("up"),
        "direct": not mirrored and values.get("up", 1),
        "outage": not mirrored,
        "expired": prefix.age is not None and prefix.age > values.get("snapshot_max_age_seconds", prefix.age),
        "loading": not values.get("failures_total"),
        "no data": prefix.age is None,
    }
    prefix.state = next((state for state, holds in states.items() if holds), "outage")
    prefix.healthy = prefix.state in ("following", "direct") and not prefix.hidden
    remarks = {
        'raise max_keys, or set mode = "direct"': prefix.state == "too large",
        "Consul cannot be read: every lookup returns an error": not mirrored and values.get("up") == 0,
        f"the token may not read {', '.join(prefix.hidden)}: lookups there return errors": prefix.hidden,
    }
    prefix.remarks = [text for text, applies in remarks.items() if applies]
