"""What the daemons publish about themselves: the text files and sockets of ``[metrics]``, found and read.

Knows nothing of Consul, and nothing of what the numbers mean: that is status.py's. The daemons' side is metrics.py.
"""

from __future__ import annotations

import contextlib
import glob
import http.client
import os
import re
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from table_consul import rules
from table_consul.config import MetricsConfig
from table_consul.errors import TableConsulError, printable
from table_consul.metrics import CLIENT_SECONDS, WRITE_INTERVAL_SECONDS

# A file that was left out three times: its process is gone, and the file stays.
STALE_SECONDS = 3 * WRITE_INTERVAL_SECONDS
# A daemon closes each connection within about half of this.
ANSWER_SECONDS = 2 * CLIENT_SECONDS
# Some 200 bytes a series: more tables than one process has cells for (counters.py).
SIZE_MAX = 16 << 20
READ_BYTES = 1 << 16
# No moment, index or count of ours is larger; time.localtime() takes none that is much so.
VALUE_MAX = 1e15


class NobodyThere(TableConsulError):
    """No process publishes there; the text says what there is instead."""


class Unreadable(TableConsulError):
    """Something is there that cannot be read, or is not of table-consul."""


class Sample(NamedTuple):
    """One number, with its labels."""

    name: str
    labels: Mapping[str, str]
    value: float


class Publication(NamedTuple):
    """All numbers of one process."""

    place: str
    """Where they come from, as a person would write it."""
    taken: float
    """When they were true, in seconds since the epoch."""
    live: bool
    """Asking again brings newer ones at once."""
    samples: tuple[Sample, ...]

    def of(self, table: str, name: str) -> Iterator[Sample]:
        """The samples of this metric that tell of this table."""
        return (s for s in self.samples if s.name == f"table_consul_{name}" and s.labels.get("table") == table)

    def tables(self) -> set[str]:
        """The tables that any of the numbers tells of."""
        return {sample.labels["table"] for sample in self.samples if "table" in sample.labels}


def require_parser() -> None:
    """Make sure that numbers can be read at all.

    Raises:
        TableConsulError: prometheus_client is not installed.
    """
    try:
        import prometheus_client.parser  # noqa: F401
    except ImportError as error:
        raise TableConsulError(
            f"what daemons publish is read with {error.name or 'prometheus_client'}, which is not installed;"
            " install table-consul[metrics] or python3-prometheus-client"
        ) from None


def names(metrics: MetricsConfig) -> set[str]:
    """The tables for which there is a file or socket, of a process that runs or of one that did."""
    found = set()
    for pattern in (metrics.textfile, metrics.listen and metrics.listen.removeprefix("unix://")):
        if not pattern or "{table}" not in pattern:
            continue
        before, *rest = pattern.split("{table}")
        expression = re.escape(before) + "([^/]+)" + r"\1".join(map(re.escape, rest))
        for path in glob.iglob("*".join(map(glob.escape, (before, *rest)))):
            if matched := re.fullmatch(expression, path):
                with contextlib.suppress(ValueError):  # no table has such a name, so this is somebody else's file
                    found.add(rules.table_name(matched[1]))
    return found


def read(metrics: MetricsConfig, table: str) -> Publication:
    """The latest that is published about this table, from ``listen`` if that answers, else from ``textfile``.

    Raises:
        NobodyThere: no process publishes it.
        Unreadable: something is there that does not tell.
    """
    told: list[TableConsulError] = []
    for pattern, read_one in ((metrics.listen, _ask), (metrics.textfile, _read_file)):
        if not pattern:
            continue
        try:
            publication = read_one(pattern.replace("{table}", table))
        except (NobodyThere, Unreadable) as error:
            told.append(error)
            continue
        if table in publication.tables():
            return publication
        others = ", ".join(sorted(map(printable, publication.tables())))
        told.append(Unreadable(f"{publication.place} tells of {others} alone (put {{table}} into its name)"))
    kind = Unreadable if any(isinstance(error, Unreadable) for error in told) else NobodyThere
    raise kind("; ".join(map(str, told)))


def _read_file(path: str) -> Publication:
    place = printable(path)
    try:
        # Without O_NONBLOCK a named pipe would wait for its writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Unreadable(f"{place} is no file")
            data = file.read(SIZE_MAX + 1)
    except FileNotFoundError:
        raise NobodyThere(f"there is no {place}") from None
    except OSError as error:
        raise Unreadable(f"{place}: {error.strerror}") from None
    publication = Publication(place, status.st_mtime, live=False, samples=_parsed(data, place))
    age = time.time() - publication.taken
    if age > STALE_SECONDS:
        version = next((s.labels.get("version", "?") for s in publication.samples if s.name.endswith("_info")), "?")
        raise NobodyThere(
            f"{place} was last written {age:.0f} s ago, by version {printable(version)}; a process that runs writes it"
            f" every {WRITE_INTERVAL_SECONDS:.0f} s (remove the file if there is no such table any more)"
        )
    return publication


class _Connection(http.client.HTTPConnection):
    """To a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=ANSWER_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _ask(listen: str) -> Publication:
    place = printable(listen)
    if listen.startswith("unix://"):
        connection: http.client.HTTPConnection = _Connection(listen.removeprefix("unix://"))
    else:
        host, _, port = listen.rpartition(":")
        connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=ANSWER_SECONDS)
    by = time.monotonic() + ANSWER_SECONDS
    data = b""
    try:
        connection.request("GET", "/metrics")
        with connection.getresponse() as answer:
            if answer.status != 200:
                raise Unreadable(f"{place} answers with {answer.status}, not with numbers of table-consul")
            while chunk := answer.read1(READ_BYTES):
                data += chunk
                if len(data) > SIZE_MAX or time.monotonic() > by:
                    raise Unreadable(f"{place} answers without end")
    except (FileNotFoundError, ConnectionRefusedError):
        raise NobodyThere(f"nobody listens at {place}") from None
    except TimeoutError:
        raise Unreadable(f"{place} does not answer within {ANSWER_SECONDS:.0f} s") from None
    except (OSError, http.client.HTTPException) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise Unreadable(f"{place}: {what}") from None
    finally:
        connection.close()
    return Publication(place, time.time(), live=True, samples=_parsed(data, place))


def _parsed(data: bytes, place: str) -> tuple[Sample, ...]:
    from prometheus_client.parser import text_string_to_metric_families

    if len(data) > SIZE_MAX:
        raise Unreadable(f"{place} holds more than {SIZE_MAX >> 20} MiB")
    try:
        families = list(text_string_to_metric_families(data.decode()))
    except Exception as error:  # noqa: BLE001 - its parser raises whatever an odd line makes its slices raise
        raise Unreadable(f"{place} holds no metrics of Prometheus ({type(error).__name__})") from None
    samples = tuple(Sample(s.name, s.labels, s.value) for family in families for s in family.samples)
    if not any(sample.name == "table_consul_build_info" for sample in samples):
        raise Unreadable(f"{place} holds nothing of table-consul")
    if not all(abs(sample.value) < VALUE_MAX for sample in samples if sample.name.startswith("table_consul_")):
        raise Unreadable(f"{place} holds numbers that table-consul does not write")  # NaN among them
    return samples
