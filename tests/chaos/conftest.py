"""The short version of the chaos tests, as in CI, does not wait 15 minutes for Consul."""

from __future__ import annotations

from tests.chaos import LONG

collect_ignore = [] if LONG else ["test_tombstones.py"]
