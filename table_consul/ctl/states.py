"""What the numbers of a daemon say about its table: a state, whether all is well, and what to do where it is not.

Knows nothing of Consul but what the daemon said; status.py asks it.
"""

from __future__ import annotations

import msgspec

from table_consul.config import Config
from table_consul.ctl import published
from table_consul.errors import printable
from table_consul.services import Table

_NO_ANSWERS = "Consul cannot be read: every answer is an error"


class Prefix(msgspec.Struct):
    """One folder of Consul that a table is read from; None is what is not known, or is not so."""

    prefix: str
    state: str
    well: bool
    index: int | None = None
    age: float | None = None
    """Seconds since Consul confirmed the copy, when the numbers were taken."""
    keys: int | None = None
    refused: int | None = None
    hidden: list[str] = []
    """Services whose folder the token may not read."""
    last_error: str | None = None
    last_error_at: float | None = None
    consul_index: int | None = None
    ahead: bool | None = None
    """Whether Consul has what the table has not."""
    remarks: list[str] = []


class Status(msgspec.Struct):
    """One table; moments in seconds since the epoch. ``well`` is None where that cannot be told."""

    table: str
    state: str
    well: bool | None
    version: str | None = None
    started: float | None = None
    place: str | None = None
    taken: float | None = None
    """When the numbers were true."""
    live: bool = False
    """They come from a socket, not from a file."""
    remarks: list[str] = []
    prefixes: list[Prefix] = []


def status_of(config: Config, table: Table) -> Status:
    """What is published about the table, as a whole and for each folder of Consul; needs published.require_parser."""
    try:
        publication = published.read(config.metrics, table.name)
    except published.NobodyThere as error:
        return Status(table.name, "not running", well=False, remarks=[str(error)])
    except published.Unreadable as error:
        return Status(table.name, "unknown", well=None, remarks=[str(error)])
    place, taken, live = publication.place, publication.taken, publication.live
    status = Status(table.name, "direct", well=True, place=place, taken=taken, live=live)
    for sample in publication.samples:
        if sample.name == "table_consul_build_info":
            status.version = sample.labels.get("version")
        elif sample.name == "table_consul_start_time_seconds":
            status.started = sample.value
    prefixes = {
        sample.labels["prefix"]: None
        for sample in publication.samples
        if sample.labels.get("table") == table.name and "prefix" in sample.labels
    }
    status.prefixes = [_prefix(publication, table, prefix) for prefix in prefixes]
    if config.consul.addresses[0].startswith("file://"):
        status.remarks.append(f"answers from {printable(config.consul.addresses[0])}")
        for each in status.prefixes:
            each.state = "file"
        status.state = "file"
    elif not prefixes:
        status.remarks.append("nothing was asked yet")
    sum_up(status)
    return status


def sum_up(status: Status) -> None:
    """Give the table the state of that of its prefixes which is worst off."""
    if status.prefixes:
        worst = next((prefix for prefix in status.prefixes if not prefix.well), status.prefixes[0])
        status.state, status.well = worst.state, worst.well


def _prefix(publication: published.Publication, table: Table, name: str) -> Prefix:
    def value(metric: str) -> float | None:
        found = (sample.value for sample in publication.of(table.name, metric) if sample.labels.get("prefix") == name)
        return next(found, None)

    def whole(metric: str) -> int | None:
        number = value(metric)
        return None if number is None else int(number)

    prefix = Prefix(name, "direct", well=True)
    prefix.index, prefix.keys = whole("snapshot_index"), whole("snapshot_keys")
    prefix.age, prefix.refused = value("snapshot_age_seconds"), whole("entries_refused")
    prefix.hidden = sorted(
        sample.labels.get("service", "?")
        for sample in publication.of(table.name, "service_hidden")
        if sample.labels.get("prefix") == name and sample.value
    )
    for sample in publication.of(table.name, "last_error_timestamp_seconds"):
        if sample.labels.get("prefix") == name:
            prefix.last_error, prefix.last_error_at = sample.labels.get("error"), sample.value
    up, failures, max_age = value("up"), value("failures_total") or 0, value("snapshot_max_age_seconds")
    mirrored = value("reloads_total") is not None
    if value("too_large"):
        prefix.state, prefix.well = "too large", False
        prefix.remarks.append('raise max_keys, or configure mode = "direct"')
        if up == 0:
            prefix.remarks.append(_NO_ANSWERS)
    elif up:
        prefix.state = "following" if mirrored else "direct"
    elif mirrored and prefix.age is None:
        prefix.state, prefix.well = "no data" if failures else "loading", False
    elif mirrored and max_age is not None and prefix.age is not None and prefix.age > max_age:
        prefix.state, prefix.well = "expired", False
    elif mirrored:
        prefix.state, prefix.well = "outage" if failures else "loading", False
    elif up is not None:
        prefix.state, prefix.well = "outage", False
        prefix.remarks.append(_NO_ANSWERS)
    if prefix.hidden:
        prefix.well = False
        prefix.remarks.append(f"the token may not read {', '.join(prefix.hidden)}: answers there are errors")
    return prefix
