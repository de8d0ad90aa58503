"""Look up keys in a mirror of the fake, and wait for its watches."""

from __future__ import annotations

import base64
import json
import logging
import time

import pytest

from table_consul.errors import SourceError
from table_consul.services import SERVICES, Table
from table_consul.sources import ranges, watch
from tests.dialogue import eventually
from tests.fake_consul import VERSIONS

TABLE = Table("aliases", prefix="mail", services=("alias", "domain"), deadline=0.5)
PREFIX = b"mail/aliases/"
ALIAS, DOMAIN = PREFIX + b"alias/", PREFIX + b"domain/"
ROOT = ALIAS + b"root"
# How far beyond its deadline an answer may come on a busy machine.
SLACK = 0.3
# Consul before 1.11 reports no hidden keys.
reports_hidden_keys = pytest.mark.parametrize("version", [each for each in VERSIONS if each != "1.8.7"])


def ask(source, key=b"root", service="alias", left=None, table=None):
    table = table or source.table
    bucket = source.entries(table, SERVICES[service], key, time.monotonic() + (left or table.deadline))
    return bucket.lookup(key)


def becomes(source, wanted, key=b"root", **options):
    """Poll until the answer is ``wanted``: a value, None, or the type of an error."""
    got = None
    for _ in eventually(f"{key!r} becomes {wanted!r}", 10):
        try:
            got = ask(source, key, **options)
        except SourceError as error:
            got = type(error)
        if got == wanted:
            return


def settled(source):
    """Wait until all watches have finished their first load."""
    for _ in eventually("the first load", 10):
        if all(each.index for each in source.watches):
            return


def lists(fake):
    """The list requests so far, with and without a wait."""
    return [request for request in fake.requests if "recurse" in request.params]


def lines(caplog, level=logging.WARNING):
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


def logged(caplog, text):
    for _ in eventually(f"{text!r} is logged", 10):
        if any(text in line for line in lines(caplog)):
            return


def ask_table(source, key=b"root", service="alias", name="aliases"):
    return ask(source, key, service, table=source.table(name))


def snapshot_entries(path):
    return {entry["key"]: base64.b64decode(entry["value"]) for entry in json.loads(path.read_text())}


def written(path, wanted):
    for _ in eventually(f"{path} holds {wanted}", 10):
        if path.exists() and wanted.items() <= snapshot_entries(path).items():
            return


def write_snapshot(path, entries, mode=0o600):
    path.write_text(
        json.dumps([{"key": k, "flags": 0, "value": base64.b64encode(v).decode()} for k, v in entries.items()])
    )
    path.chmod(mode)


WHOLE = {"mail/aliases/alias/root": b"gilles", "mail/aliases/alias/": b"", "mail/aliases/domain/": b""}


def make_ranges_small(monkeypatch, size, late, soon):
    """Watch tables of 20 keys in ranges of ``size`` keys; names are listed after ``late`` and ``soon`` seconds."""
    monkeypatch.setattr(watch, "LEAST_KEYS", 20)
    monkeypatch.setattr(watch, "RANGED_SECONDS", 0.0)
    monkeypatch.setattr("table_consul.sources.cut.RANGE_KEYS", size)
    monkeypatch.setattr(ranges, "RANGE_KEYS", size)
    monkeypatch.setattr("table_consul.sources.cut.ASK_KEYS", 1)
    monkeypatch.setattr(ranges, "LATE_SECONDS", late)
    monkeypatch.setattr(ranges, "LIST_SECONDS", 2 * soon)
    monkeypatch.setattr(ranges, "LIST_SOON_SECONDS", soon)
    monkeypatch.setattr(ranges, "LIST_SHARE", 1.0)
