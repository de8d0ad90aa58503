"""The output line of ``table-consulctl status --nagios``, for Nagios, Icinga and Naemon."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from table_consul.ctl.main import NAGIOS_UNKNOWN, UNCUT, duration
from table_consul.errors import counted, printable

if TYPE_CHECKING:
    from table_consul.ctl.state import Prefix, Status

OK, WARNING, CRITICAL, UNKNOWN = 0, 1, 2, NAGIOS_UNKNOWN
NAMES = ("OK", "WARNING", "CRITICAL", "UNKNOWN")
# The worst first.
_ORDER = (CRITICAL, WARNING, UNKNOWN, OK)
_BY_STATE = {"no data": CRITICAL, "expired": CRITICAL, "not running": CRITICAL, "unknown": UNKNOWN}
LINE_MAX = 4000
"""Nagios cuts a line at 4,096 bytes up to version 3, and at 8,192 since."""


class Limits(NamedTuple):
    """Warning and critical thresholds: maximum age of the data in seconds, minimum number of keys."""

    age: tuple[float | None, float | None] = (None, None)
    keys: tuple[float | None, float | None] = (None, None)


def report(statuses: Sequence[Status], limits: Limits) -> tuple[int, str]:
    """The exit status and the line."""
    found = [(status, _judged(status, limits)) for status in statuses]
    worst = min((code for _, (code, _) in found), key=_ORDER.index)
    bad = sorted(
        (_ORDER.index(code), f"{printable(status.table)}: {text}") for status, (code, text) in found if code != OK
    )
    good = len(found) - len(bad)
    parts = [text for _, text in bad] + ([f"{counted(good, 'table', 'tables')} ok"] if good else [])
    text = line(worst, ", ".join(parts))
    data = " ".join(each for status in statuses for each in _performance(status, limits))
    return worst, f"{text} | {data}" if data and len(text) + len(data) < LINE_MAX else text


def line(code: int, text: str) -> str:
    """The line without performance data; these would start at a ``|``."""
    return f"TABLE-CONSUL {NAMES[code]}: {printable(text, LINE_MAX // 2).replace('|', '/')}"


def _judged(status: Status, limits: Limits) -> tuple[int, str]:
    """The code of a table and the reasons for it."""
    reasons = [reason for prefix in status.prefixes for reason in _reasons(prefix, limits)]
    if not status.prefixes:
        code = _BY_STATE.get(status.state, OK)
        reasons = [(code, "; ".join((status.state, *status.remarks)))]
    code = min((code for code, _ in reasons), key=_ORDER.index, default=OK)
    return code, "; ".join(dict.fromkeys(text for reason, text in reasons if reason != OK))


def _reasons(prefix: Prefix, limits: Limits) -> Iterator[tuple[int, str]]:
    # Without data to serve, every lookup in an outage returns an error.
    lost = prefix.state == "outage" and prefix.age is None
    if prefix.healthy is False:
        code = CRITICAL if lost else _BY_STATE.get(prefix.state, WARNING)
        since = "" if prefix.age is None else f" (data {duration(prefix.age)} old)"
        state = f"{prefix.state}{since}" if prefix.state not in ("following", "direct", "file") else ""
        yield code, "; ".join(filter(None, (state, *prefix.remarks)))
    for code, most, least in zip((WARNING, CRITICAL), limits.age, limits.keys, strict=True):
        if prefix.age is not None and most is not None and prefix.age > most:
            yield code, f"data {duration(prefix.age)} old (more than {duration(most)})"
        if prefix.keys is not None and least is not None and prefix.keys < least:
            yield code, f"{counted(prefix.keys, 'key', 'keys')} (fewer than {least:g})"


def _performance(status: Status, limits: Limits) -> Iterator[str]:
    """Age, keys and refused entries of each folder, with the thresholds."""
    several = len(status.prefixes) > 1
    for prefix in status.prefixes:
        name = re.sub("['=|]", "_", printable(f"{status.table} {prefix.prefix}" if several else status.table, UNCUT))
        values = (
            ("age", prefix.age, "s", [_number(limit) for limit in limits.age]),
            ("keys", prefix.keys, "", [f"{_number(limit)}:" if limit is not None else "" for limit in limits.keys]),
            ("refused", prefix.refused, "", ["", ""]),
        )
        for what, value, unit, (warning, critical) in values:
            if value is not None:
                yield f"'{name} {what}'={_number(value)}{unit};{warning};{critical};0".rstrip(";")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}".rstrip("0").rstrip(".")
