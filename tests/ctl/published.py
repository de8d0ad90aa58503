"""Metrics as a daemon publishes them, and the configuration with which `table-consulctl status` finds them."""

from __future__ import annotations

import json
import time

from table_consul import __version__
from tests.dialogue import write_config

FOLLOWING = {
    "up": 1,
    "too_large": 0,
    "snapshot_index": 12,
    "snapshot_age_seconds": 3,
    "snapshot_max_age_seconds": 86400,
    "snapshot_keys": 2,
    "entries_refused": 0,
    "reloads_total": 1,
    "failures_total": 0,
}
LOST = {**FOLLOWING, "up": 0, "failures_total": 4}
READ_DIRECTLY = {"up": 1, "failures_total": 0}


def sample(name, value, **labels):
    return f"table_consul_{name}{{{','.join(f'{key}={json.dumps(text)}' for key, text in labels.items())}}} {value}\n"


def numbers(table="aliases", more="", **metrics):
    """The metrics of a table with one prefix."""
    text = sample("build_info", 1, table=table, version=__version__)
    text += sample("start_time_seconds", time.time() - 7200, table=table)
    return text + "".join(sample(n, v, table=table, prefix=f"{table}/") for n, v in metrics.items()) + more


def publish(folder, table="aliases", more="", **metrics):
    path = folder / f"{table}.prom"
    path.with_suffix(".tmp").write_text(numbers(table, more, **metrics))
    path.with_suffix(".tmp").rename(path)
    return path


def configured(folder, *defaults, address="http://127.0.0.1:9", metrics=None, more=""):
    lines = metrics if metrics is not None else f'textfile = "{folder}/{{table}}.prom"'
    return str(write_config(folder, *defaults, address=address, more=f"[metrics]\n{lines}\n{more}"))


def only_table(outcome):
    """The only table in the JSON of an outcome."""
    (table,) = json.loads(outcome[1])["tables"]
    return table
