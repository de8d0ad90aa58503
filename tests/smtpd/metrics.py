"""Samples from scrapes and text files, and a stand-in for the tables that an exporter reads."""

from __future__ import annotations

import contextlib
import http.client
import socket
from types import SimpleNamespace

from prometheus_client.parser import text_string_to_metric_families

from table_consul import __version__
from table_consul.config import ConsulConfig
from table_consul.errors import ConfigError
from table_consul.responder import Counters
from table_consul.services import Table
from tests.dialogue import eventually, write_config

BUILD_INFO = {("aliases", __version__): 1}


def parse_samples(text):
    """Every sample by name, and by its label values in alphabetical order of the label names."""
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


def scrape(listen):
    """All samples of an address or Unix socket."""
    if str(listen).startswith(("127.", "[")):
        host, _, port = listen.rpartition(":")
        connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=10)
    else:
        connection = UnixConnection(listen)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        assert response.status == 200
        return parse_samples(response.read().decode())


def connect(path):
    """A connected client of this Unix socket."""
    client = socket.socket(socket.AF_UNIX)
    try:
        client.connect(str(path))  # no timeout: a full queue must block, not fail
    except OSError:
        client.close()
        raise
    client.settimeout(10)
    return client


def read_textfile(path):
    """The samples in the text file, once it exists."""
    for _ in eventually(f"{path} is written"):
        if path.exists():
            return parse_samples(path.read_text())
    return None


def scrape_until(listen, name, labels, expected):
    """All samples, once this one has the expected value."""
    samples = {}
    for _ in eventually(f"{name}{labels} = {expected}"):
        # The socket exists shortly before the server listens.
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError, ConnectionResetError):
            samples = scrape(listen)
        if samples.get(name, {}).get(labels) == expected:
            break
    return samples


def metrics_config(folder, *defaults, address=None, textfile=False, listen=None):
    lines = ["[metrics]"]
    lines += [f'textfile = "{folder}/{{table}}.prom"'] if textfile else []
    lines += [f'listen = "{listen}"'] if listen else []
    return str(write_config(folder, *defaults, more="\n".join(lines), address=address))


def table_layout(name):
    if name == "..":
        raise ConfigError("no such name")
    return Table(name or "consul", deadline=2.0)


def fake_tables(*watches, counters=None, address="http://127.0.0.1:8500", textfile=None, listen=None):
    """The parts of Tables that metrics read, without its cache of layouts."""
    return SimpleNamespace(
        config=SimpleNamespace(
            consul=ConsulConfig((address,)),
            metrics=SimpleNamespace(textfile=textfile and str(textfile), listen=listen and str(listen)),
            table=table_layout,
        ),
        counters=counters or Counters(table_layout),
        started=1.0,
        watches=lambda: [("aliases", watch) for watch in watches],
    )
