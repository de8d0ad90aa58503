"""Our child between a client that asks without pause and a cluster of three that falls ill: every answer is judged."""

from __future__ import annotations

import pytest

from tests.rig import cache
from tests.rig.consul import ConsulCluster


def cluster_or_skip(*, acl: bool = False, client_agent: bool = False) -> ConsulCluster:
    """Three Consul servers to be entered, where there can be any."""
    try:
        return ConsulCluster(acl=acl, client_agent=client_agent)
    except cache.Unavailable as error:
        pytest.skip(str(error))
