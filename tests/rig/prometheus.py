"""Debian's Prometheus, its promtool and its node_exporter, on loopback ports of their own."""

from __future__ import annotations

import functools
import json
import shutil
import signal
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.rig import cache
from tests.rig.consul import free_ports
from tests.rig.waiting import wait_for

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

SUITE = "bookworm"
"""Its programs need only the C library, of this release or later."""

START_SECONDS = 30.0


@functools.cache
def program(name: str) -> Path:
    """Path of ``prometheus``, ``promtool`` or ``prometheus-node-exporter``: the one on PATH, or Debian's, kept.

    Raises:
        Unavailable: it is not installed, and cannot be downloaded.
    """
    if found := shutil.which(name):
        return Path(found)
    package = "prometheus" if name == "promtool" else name
    try:
        kept = cache.cached(f"{package}-{SUITE}", lambda path: cache.download(package, SUITE, path))
    except cache.Unavailable as error:
        raise cache.Unavailable(f"no {name}: {error}: put one on PATH (apt-get install {package})") from error
    return kept / "usr/bin" / name


def promtool(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The output and the exit status of a promtool command."""
    command = (program("promtool"), *arguments)
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=60)


class _Server:
    """A program that serves HTTP on a loopback port, as a context manager."""

    def __init__(self) -> None:
        (port,) = free_ports(1)
        self.address = f"127.0.0.1:{port}"
        self._folder = Path(tempfile.mkdtemp(prefix="table-consul-prometheus-"))
        self._process: subprocess.Popen[bytes] | None = None

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _ready(self) -> str:
        """The path that answers 200 when the server is ready."""
        raise NotImplementedError

    @property
    def log(self) -> str:
        """The output so far."""
        path = self._folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def read(self, path: str) -> bytes:
        """The body of the response to GET. Raises OSError."""
        with _NO_PROXY.open(f"http://{self.address}{path}", timeout=10) as answer:
            return bytes(answer.read())

    def __enter__(self) -> Self:
        with (self._folder / "log").open("wb") as log:
            command = [*cache.DIES_WITH_US, *self._command()]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            wait_for(self._answers, START_SECONDS, lambda: f"not ready after {START_SECONDS} s:\n{self.log}")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answers(self) -> bool:
        assert self._process
        assert self._process.poll() is None, f"ended with {self._process.returncode}:\n{self.log}"
        try:
            self.read(self._ready())
        except OSError:
            return False
        return True

    def close(self) -> None:
        """End it and remove its data."""
        if self._process:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


class NodeExporter(_Server):
    """A node_exporter that reads only the text files of a folder."""

    def __init__(self, textfiles: Path) -> None:
        super().__init__()
        self._binary = program("prometheus-node-exporter")
        self._textfiles = textfiles

    def _command(self) -> list[str]:
        return [
            *(str(self._binary), "--collector.disable-defaults", "--collector.textfile"),
            *(f"--collector.textfile.directory={self._textfiles}", f"--web.listen-address={self.address}"),
        ]

    def _ready(self) -> str:
        return "/metrics"


class Prometheus(_Server):
    """A Prometheus with this configuration, whose relative files are in the folder ``beside``."""

    def __init__(self, configuration: str, beside: Path | None = None) -> None:
        super().__init__()
        self._binary = program("prometheus")
        for path in beside.iterdir() if beside is not None else ():
            shutil.copy(path, self._folder)
        (self._folder / "prometheus.yml").write_text(configuration)

    def _command(self) -> list[str]:
        return [
            *(str(self._binary), f"--config.file={self._folder / 'prometheus.yml'}", "--log.level=warn"),
            *(f"--storage.tsdb.path={self._folder / 'data'}", f"--web.listen-address={self.address}"),
        ]

    def _ready(self) -> str:
        return "/-/ready"

    def ask(self, path: str, **parameters: str) -> Any:
        """The data of a response of its HTTP API. Raises AssertionError with the reason of Prometheus."""
        try:
            body = self.read(f"/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from None
        return json.loads(body)["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """The current samples of an expression, each with its labels."""
        data = self.ask("query", query=expression)
        assert data["resultType"] == "vector", data
        return [(sample["metric"], float(sample["value"][1])) for sample in data["result"]]

    def alerts(self) -> dict[str, list[dict[str, Any]]]:
        """The alerts that are pending or firing, by name."""
        found: dict[str, list[dict[str, Any]]] = {}
        for alert in self.ask("alerts")["alerts"]:
            found.setdefault(alert["labels"]["alertname"], []).append(alert)
        return found


_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
