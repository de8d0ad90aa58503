"""One fault after the other, under load: 0 wrong, 0 falsely absent, 0 late, 0 exits."""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
import urllib.request

import pytest

from tests.chaos import cluster_or_skip
from tests.chaos.asker import go_first
from tests.chaos.client import SLOW_SECONDS, STEADY, Client, Judgement
from tests.chaos.history import HOT, Writer
from tests.chaos.trickle import Trickle
from tests.dialogue import Child
from tests.rig.waiting import wait_for

pytestmark = [pytest.mark.real, pytest.mark.alone]

LONG = os.environ.get("TABLE_CONSUL_CHAOS") == "long"
HEALTHY_SECONDS = 5.0 if LONG else 1.0
ILL_SECONDS = 30.0 if LONG else 4.0
RECOVERY_SECONDS = 5.0


@pytest.fixture(scope="module")
def cluster():
    with cluster_or_skip(acl=True) as made:
        yield made


@pytest.fixture(scope="module")
def report(request):
    rows: list[Judgement] = []
    yield rows
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is None:  # a worker of pytest-xdist has none
        return
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        terminal.ensure_newline()
        for line in (Judgement.HEAD, *rows):
            terminal.write_line(str(line))


class Scene:
    """What a fault may be done to."""

    def __init__(self, cluster, table, token, proxy):
        self.cluster = cluster
        self.table = table
        self.token = token
        self.proxy = proxy
        leader = cluster.leader
        self.leader = leader
        self.contacted = next(member for member in cluster.members if member is not leader)

    def restored(self, snapshot):
        request = urllib.request.Request(
            f"http://{self.cluster.leader.address}/v1/snapshot",
            snapshot,
            {"X-Consul-Token": self.leader.management_token},
            method="PUT" if snapshot else "GET",
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()


@contextlib.contextmanager
def leader_killed(scene):
    scene.leader.kill()
    yield
    scene.leader.launch()


@contextlib.contextmanager
def leader_stopped(scene):
    scene.leader.pause()
    yield
    scene.leader.resume()


@contextlib.contextmanager
def contacted_killed(scene):
    scene.contacted.kill()
    yield
    scene.contacted.launch()


@contextlib.contextmanager
def contacted_stopped(scene):
    scene.contacted.pause()
    yield
    scene.contacted.resume()


@contextlib.contextmanager
def all_killed(scene):
    for member in scene.cluster.members:
        member.kill()
    yield
    for member in scene.cluster.members:
        member.launch()


@contextlib.contextmanager
def token_revoked(scene):
    member = scene.cluster.leader
    own = member.request("GET", "/v1/acl/token/self", token=scene.token)
    member.revoke(scene.token)
    yield
    again = {key: own[key] for key in ("AccessorID", "SecretID", "Policies")}
    member.request("PUT", "/v1/acl/token", json.dumps(again).encode())


@contextlib.contextmanager
def snapshot_restored(scene):
    snapshot = scene.restored(None)
    yield
    scene.restored(snapshot)


@contextlib.contextmanager
def table_rewritten(scene):
    member = scene.cluster.leader
    end = time.monotonic() + ILL_SECONDS
    while time.monotonic() < end:
        number = random.random()
        member.kv_txn({f"{scene.table}/alias/bulk{key:05}": f"bulk{number}" for key in range(2000)})
    yield


@contextlib.contextmanager
def network_trickles(scene):
    scene.proxy.bad.set()
    yield
    assert scene.proxy.passed, "nothing went through the bad network"
    scene.proxy.bad.clear()


FAULTS = {
    "leader killed and restarted": leader_killed,
    "leader stopped and resumed": leader_stopped,
    "contacted agent killed and restarted": contacted_killed,
    "contacted agent stopped and resumed": contacted_stopped,
    "all three killed and restarted": all_killed,
    "token revoked and restored": token_revoked,
    "snapshot restored": snapshot_restored,
    "table rewritten under load": table_rewritten,
    "network of the agent trickles": network_trickles,
}


# Without a copy in memory there are errors, and nothing worse.
DIRECT = FAULTS if LONG else ["contacted agent stopped and resumed", "token revoked and restored"]
CASES = [*((name, "mirror") for name in FAULTS), *((name, "direct") for name in DIRECT)]


@pytest.mark.timeout(600 if LONG else 180)
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_no_fault_makes_an_answer_wrong_absent_or_late(cluster, report, tmp_path, name, mode):
    row, message = suffer(cluster, report, tmp_path, name, mode)
    assert mode == "direct" or row.slowest <= SLOW_SECONDS, message


def suffer(cluster, report, tmp_path, name, mode):
    """The judgement on one fault, and the message of a failure: its row, examples, and the log of the table."""
    table = f"chaos{random.getrandbits(32):08x}"
    head = cluster.leader
    entries = {"alias/still": "gilles", "domain/example.org": "", "source/192.0.2.1": "", "source/192.0.2.2": ""}
    head.kv_txn({f"{table}/{key}": value for key, value in entries.items()})
    token = head.token(f'key_prefix "{table}/" {{ policy = "read" }}')
    (tmp_path / "token").write_text(token)
    writer = Writer(cluster.members, table)
    writer.write_all()
    with contextlib.ExitStack() as stack:
        scene = Scene(cluster, table, token, None)
        scene.proxy = stack.enter_context(Trickle(scene.contacted))
        address = scene.proxy.address if FAULTS[name] is network_trickles else scene.contacted.address
        config = tmp_path / "table-consul.toml"
        config.write_text(
            f'[consul]\naddress = "http://{address}"\ntoken_file = "{tmp_path}/token"\n'
            f'[defaults]\nmode = "{mode}"\n[log]\ntarget = "stderr"\n'
        )
        child = stack.enter_context(Child(str(config)))
        go_first(child.process.pid)
        child.handshake(table.encode())
        # From here on there are data; the first answer waits for them.
        assert child.ask(b"table|0.1|0|%b|lookup|alias|0|still" % table.encode()) == b"lookup-result|0|found|gilles"
        client = Client(child, table.encode())
        client.start()
        writer.start()
        wait_for(lambda: all(client.newest), 10, lambda: f"no answers: {client.answers[-1:]} {client.gone}")
        time.sleep(HEALTHY_SECONDS)
        began = time.monotonic()
        with FAULTS[name](scene):
            time.sleep(max(0.0, began + ILL_SECONDS - time.monotonic()))
        for member in cluster.members:
            member.wait_for_leader()
        wanted = writer.write_all()
        ended = time.monotonic()

        def is_back():
            return all(have >= want for have, want in zip(client.newest, wanted, strict=True))

        with contextlib.suppress(AssertionError):
            wait_for(is_back, 30, lambda: "")
        back = time.monotonic()
        time.sleep(HEALTHY_SECONDS)
        writer.stop()
        client.stop()
        row = client.judge(name if mode == "mirror" else f"{name}, {mode}", writer, (began, back))
        row.recovered = back - ended if is_back() else float("inf")
        row.exits += child.end() != 0
        report.append(row)
        log = child.log()
    message = "\n".join([Judgement.HEAD, str(row), *row.examples, log])
    assert (row.wrong, row.absent, row.late, row.exits) == (0, 0, 0, 0), message
    assert row.recovered <= RECOVERY_SECONDS, message
    assert row.errors == 0 or mode == "direct", message
    assert row.answers > HOT + len(STEADY), message
    return row, message
