"""The short version of the chaos tests, as in CI, does not wait 15 minutes for Consul."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TABLE_CONSUL_CHAOS") == "long" else ["test_tombstones.py"]
