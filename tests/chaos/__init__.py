"""A table under constant requests on a cluster of three with faults; every answer is judged."""

from __future__ import annotations

import os

import pytest

from tests.rig import cache
from tests.rig.consul import ConsulCluster

LONG = os.environ.get("TABLE_CONSUL_CHAOS") == "long"
"""Whether the faults are those of `make chaos`: more of them, for longer."""


def cluster_or_skip(*, acl: bool = False, client_agent: bool = False) -> ConsulCluster:
    """A cluster of three Consul servers; skips the test if there is none."""
    try:
        return ConsulCluster(acl=acl, client_agent=client_agent)
    except cache.Unavailable as error:
        pytest.skip(str(error))
