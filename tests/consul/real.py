"""A table in a real Consul, and the failures of its watch."""

from __future__ import annotations

import time

import pytest

from table_consul.services import Table
from tests.dialogue import eventually
from tests.rig import cache
from tests.rig.consul import ConsulAgent

TABLE = Table("aliases", prefix="mail", services=("alias", "domain"))
READ = 'key_prefix "mail/aliases/" { policy = "read" }'


def fill(agent):
    agent.kv_put("mail/aliases/alias/root", "gilles")
    agent.kv_put("mail/aliases/domain/example.org", "")
    return agent


def url(agent):
    return f"http://{agent.address}"


def noticed(source, kind, agent=None):
    """Poll until the watch has failed with ``kind``.

    With ``agent``, keep editing: a waiting query keeps the ACLs of its start until an edit ends it.
    """
    (one,) = source.watches
    for _ in eventually(f"{kind.__name__} is noticed", 20):
        if agent is not None:
            agent.kv_put("mail/aliases/beside", str(time.monotonic()))  # in no bucket
        if one.backoff.since is not None and isinstance(one.mirror.last_error, kind):
            return


def agent_or_skip(**options):
    try:
        return ConsulAgent(**options)
    except cache.Unavailable as error:
        pytest.skip(str(error))
