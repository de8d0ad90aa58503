"""Every fault under load gives 0 wrong answers, 0 falsely absent, 0 late, 0 exits."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import re
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.chaos import LONG, cluster_or_skip
from tests.chaos.asker import raise_priority
from tests.chaos.client import ENTRIES, FILLER, SLOW_SECONDS, STEADY, Client, Judgement, number_of
from tests.chaos.history import HOT, Writer
from tests.dialogue import Child
from tests.rig.proxy import Cutting, Informing, Refusing, Trickling
from tests.rig.waiting import wait_for

pytestmark = [pytest.mark.real, pytest.mark.alone]

HEALTHY_SECONDS = 5.0 if LONG else 1.0
ILL_SECONDS = 30.0 if LONG else 4.0
# For faults with an early effect.
BRIEF_SECONDS = 30.0 if LONG else 2.0
RECOVERY_SECONDS = 5.0
CUT_SECONDS = 6.0
# A change of ACLs ends no wait, and the test makes no edit during this time.
LIFTED_SECONDS = 15.0
# Until a watch has seen the last edit and waits again.
SETTLED_SECONDS = 1.0
# A table watched in ranges has more connections than this: one for each range. A whole table has one.
RANGED_CONNECTIONS = 20
# One for each folder, and another when it recovers; not one for each lookup.
MOST_WARNINGS = 20


@pytest.fixture(scope="module")
def cluster():
    with cluster_or_skip(acl=True, client_agent=True) as made:
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
    """The parts of the setup that a fault can affect."""

    proxy: Any = None
    client: Client
    healed: float | None = None
    """The earliest time of recovery, if other than the end of the fault."""

    def __init__(self, cluster, table, contacted):
        self.cluster = cluster
        self.table = table
        self.contacted = contacted
        self.leader = cluster.leader
        self.token = self.leader.token(self.rules())
        self.writer = Writer(cluster.members, table)

    def rules(self, *denied):
        """Rules that allow reading every key of the table except these; one that ends in / is a folder."""
        rules = [f'key_prefix "{self.table}/" {{ policy = "read" }}']
        for key in denied:
            kind = "key_prefix" if key.endswith("/") else "key"
            rules.append(f'{kind} "{self.table}/{key}" {{ policy = "deny" }}')
        return "\n".join(rules)

    def narrow(self, *denied, questions):
        """Hide these keys; returns once each of the questions about them is answered with an error."""
        numbers = [number_of(key) for key in questions]
        self.writer.hidden = dict.fromkeys(numbers, (time.monotonic(), float("inf"))) | self.writer.hidden
        self.leader.set_rules(self.token, self.rules(*denied))

        def is_noticed() -> bool:
            return all(self.client.latest[number].startswith(b"error|") for number in numbers)

        wait_for(
            is_noticed, RECOVERY_SECONDS, lambda: f"{denied} are hidden: {[self.client.latest[n] for n in numbers]}"
        )

    def lift(self):
        """Stop hiding keys; returns once that is noticed, or after a timeout."""
        self.leader.set_rules(self.token, self.rules())
        lifted = self.healed = time.monotonic()
        for number, (since, _) in self.writer.hidden.items():
            self.writer.hidden[number] = since, lifted + LIFTED_SECONDS
        with contextlib.suppress(AssertionError):
            wait_for(lambda: self.client.is_well(self.writer, [0] * HOT), LIFTED_SECONDS + 1, lambda: "")

    def delete(self, key):
        asked = time.monotonic()
        number = number_of(key)
        self.writer.deleted[number] = asked, float("inf")
        self.leader.kv_delete(f"{self.table}/alias/{key.decode()}")
        self.writer.deleted[number] = asked, time.monotonic()

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
def all_stopped(scene):
    for member in scene.cluster.members:
        member.pause()
    yield
    for member in scene.cluster.members:
        member.resume()


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
    assert scene.proxy.harm, "no byte passed through the bad network"
    scene.proxy.bad.clear()


@contextlib.contextmanager
def answers_announced(scene):
    scene.proxy.bad.set()
    yield
    assert scene.proxy.harm, "no answer was announced"
    scene.proxy.bad.clear()


@contextlib.contextmanager
def waits_cut(scene):
    proxy = scene.proxy
    with scene.writer.pausing():
        proxy.bad.set()
        wait_for(lambda: proxy.harm, 3 * CUT_SECONDS, lambda: f"no wait of {CUT_SECONDS} s: {proxy.requests[-3:]}")

        def later() -> list[str]:
            """The requests that followed a cut wait for the same path."""
            return [
                target
                for when, target in [*proxy.requests]
                if when > proxy.cut.get(target.partition("?")[0], float("inf"))
            ]

        wait_for(later, RECOVERY_SECONDS, lambda: "no wait follows the one that was cut")
        yield
    waits = [re.search(r"[?&]index=[1-9][0-9]*&wait=([0-9]+)ms", target) for target in later()]
    assert all(wait and int(wait[1]) < CUT_SECONDS * 1000 for wait in waits), f"after a wait was cut: {later()}"
    proxy.bad.clear()


@contextlib.contextmanager
def range_refused(scene):
    proxy = scene.proxy
    proxy.path = f"/v1/kv/{scene.table}/alias/c"
    proxy.bad.set()
    wait_for(lambda: proxy.harm, RECOVERY_SECONDS, lambda: f"no range was refused: {proxy.requests[-40:]}")
    yield
    proxy.bad.clear()


@contextlib.contextmanager
def rules_narrowed(scene):
    keys = ("alias/still", "userinfo/boss")
    scene.narrow(*keys, questions=(b"still", b"boss"))
    scene.delete(b"leaving")
    scene.narrow(*keys, "domain/", questions=(b"still", b"boss", b"example.org"))
    yield
    with scene.writer.pausing():
        time.sleep(SETTLED_SECONDS)
        scene.lift()


class Fault(NamedTuple):
    inflict: Callable[[Scene], contextlib.AbstractContextManager[None]]
    proxy: Callable[..., Any] | None = None
    """The proxy in front of the contacted agent."""
    by_client_agent: bool = False
    """The contacted agent is a client agent; otherwise a server that is not the leader."""
    is_outage: bool = True
    """Consul may be unreadable, which allows outdated answers, and errors in direct mode."""
    from_memory: bool = True
    """A mirror never reads Consul for an answer."""
    warns: bool = True
    """The log may contain warnings."""
    seconds: float = ILL_SECONDS
    recovery_seconds: float = RECOVERY_SECONDS


FAULTS = {
    "leader killed and restarted": Fault(leader_killed),
    "leader stopped and resumed": Fault(leader_stopped),
    "contacted agent killed and restarted": Fault(contacted_killed),
    "contacted agent stopped and resumed": Fault(contacted_stopped),
    "all three killed and restarted": Fault(all_killed),
    "token revoked and restored": Fault(token_revoked),
    "snapshot restored": Fault(snapshot_restored),
    "table rewritten under load": Fault(table_rewritten),
    "network of the agent trickles": Fault(network_trickles, Trickling),
    "waits cut": Fault(waits_cut, functools.partial(Cutting, seconds=CUT_SECONDS), is_outage=False, warns=False),
    "answers announced by 1xx": Fault(
        answers_announced, Informing, is_outage=False, warns=False, seconds=BRIEF_SECONDS
    ),
    "rules narrowed and lifted": Fault(
        rules_narrowed,
        is_outage=False,
        from_memory=False,
        seconds=BRIEF_SECONDS,
        recovery_seconds=LIFTED_SECONDS,
    ),
    "client agent killed and restarted": Fault(contacted_killed, by_client_agent=True, seconds=BRIEF_SECONDS),
    "client agent stopped and resumed": Fault(contacted_stopped, by_client_agent=True),
    "servers of a client agent killed": Fault(all_killed, by_client_agent=True),
    "servers of a client agent stopped": Fault(all_stopped, by_client_agent=True, seconds=BRIEF_SECONDS),
}


# The whole table can still be read, so no answer may be outdated; a hanging query shows only after some time.
REFUSED = {
    f"a range refused, {kind}": Fault(
        range_refused,
        functools.partial(Refusing, kind=kind),
        is_outage=kind == "stalled",
        warns=False,
        seconds=BRIEF_SECONDS,
    )
    for kind in ("429", "stalled", *(("500", "403", "closed") if LONG else ()))
}
LARGE = {name: FAULTS[name] for name in ("leader killed and restarted", "snapshot restored", "waits cut")}
if LONG:
    LARGE = FAULTS
LARGE = {**LARGE, **REFUSED}

# Without data in memory, errors are right.
DIRECT = ["contacted agent stopped and resumed", "token revoked and restored", "answers announced by 1xx"]
# Only in the long version: much like another fault to the daemon.
MIRROR = [name for name in FAULTS if LONG or name != "client agent stopped and resumed"]
if LONG:
    DIRECT = [name for name in FAULTS if name != "waits cut"]  # there are no waits
CASES = [
    *((name, "mirror", FAULTS[name]) for name in MIRROR),
    *((name, "direct", FAULTS[name]) for name in DIRECT),
    *((name, "large", fault) for name, fault in LARGE.items()),
]


@pytest.mark.timeout(600 if LONG else 180)
@pytest.mark.parametrize(("name", "kind", "fault"), CASES, ids=["-".join(case[:2]) for case in CASES])
def test_fault_causes_no_wrong_absent_or_late_answer(cluster, report, tmp_path, name, kind, fault):
    row, message = run_fault(cluster, report, tmp_path, name, kind, fault)
    assert kind == "direct" or not fault.from_memory or row.slowest <= SLOW_SECONDS, message


def sockets(folder):
    """The number of sockets among the open files in this folder of /proc."""
    found = 0
    for each in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since
            found += os.readlink(each).startswith("socket:")
    return found


def run_fault(cluster, report, tmp_path, name, kind, fault):
    """Run one fault; the judgement, and the message of a failure: its row, examples, and the log of the table.

    ``kind`` of table: in direct mode, or a mirror, which if it is large is watched in ranges.
    """
    table = f"chaos{random.getrandbits(32):08x}"
    entries = ENTRIES | (FILLER if kind == "large" else {})
    cluster.leader.kv_txn({f"{table}/{key}": value for key, value in entries.items()})
    follower = next(member for member in cluster.members if member is not cluster.leader)
    scene = Scene(cluster, table, cluster.client if fault.by_client_agent else follower)
    writer = scene.writer
    writer.write_all()
    (tmp_path / "token").write_text(scene.token)
    with contextlib.ExitStack() as stack:
        address = scene.contacted.address
        if fault.proxy is not None:
            scene.proxy = stack.enter_context(fault.proxy(scene.contacted))
            address = scene.proxy.address
        config = tmp_path / "table-consul.toml"
        config.write_text(
            f'[consul]\naddress = "http://{address}"\ntoken_file = "{tmp_path}/token"\n'
            f'[defaults]\nmode = "{"direct" if kind == "direct" else "mirror"}"\n[log]\ntarget = "stderr"\n'
        )
        child = stack.enter_context(Child(str(config)))
        raise_priority(child.process.pid)
        reader = threading.Thread(target=child.log)  # a full pipe would stop the child
        reader.start()
        child.handshake(table.encode())
        # The first answer waits for the data, which are loaded from here on.
        assert child.ask(b"table|0.1|0|%b|lookup|alias|0|still" % table.encode()) == b"lookup-result|0|found|gilles"
        client = scene.client = Client(child, table.encode())
        if kind == "large":
            folder = Path(f"/proc/{child.process.pid}/fd")
            wait_for(lambda: sockets(folder) > RANGED_CONNECTIONS, 10, lambda: "no ranges are watched")
        client.start()
        writer.start()
        wait_for(lambda: all(client.newest), 10, lambda: f"no answers: {client.answers[-1:]} {client.gone}")
        time.sleep(HEALTHY_SECONDS)
        began = time.monotonic()
        failure = ""
        try:
            with fault.inflict(scene):
                time.sleep(max(0.0, began + fault.seconds - time.monotonic()))
        except AssertionError as error:
            failure = str(error)
        for agent in cluster.agents:
            agent.wait_for_leader()
        wanted = writer.write_all()
        ended = scene.healed or time.monotonic()
        with contextlib.suppress(AssertionError):
            wait_for(lambda: client.is_well(writer, wanted), 30, lambda: "")
        back = time.monotonic()
        recovered = back - ended if client.is_well(writer, wanted) else float("inf")
        time.sleep(HEALTHY_SECONDS)
        writer.stop()
        client.stop()
        row = client.judge(
            name if kind == "mirror" else f"{name}, {kind}", writer, (began, back if fault.is_outage else began)
        )
        row.recovered = recovered
        try:
            row.exits += child.end() != 0
        except TimeoutError:
            failure += "; the child hangs"
            child.process.kill()
        report.append(row)
        reader.join()
        log = child.log()
    warnings = log.count("WARNING")
    message = "\n".join([failure, Judgement.HEAD, str(row), *row.examples, f"{warnings} warnings:", log[:5_000]])
    assert not failure, message
    assert (row.wrong, row.absent, row.late, row.exits) == (0, 0, 0, 0), message
    assert row.recovered <= fault.recovery_seconds, message
    assert row.errors == 0 or (kind == "direct" and fault.is_outage), message
    assert row.answers > HOT + len(STEADY), message
    assert warnings <= (MOST_WARNINGS if fault.warns else 0), message
    return row, message
