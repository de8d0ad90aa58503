"""Real Consul agents on loopback: a server, a client agent, a cluster."""

from __future__ import annotations

import atexit
import base64
import functools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.rig import cache
from tests.rig.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import TracebackType
    from typing import Self

SUITE = "bullseye"
"""The last Debian release with a Consul that includes its UI."""

PORTS = ("http", "server", "serf_lan", "serf_wan")
# Below the range of ephemeral ports, so that the ports of a stopped agent stay free.
FIRST_PORT, LAST_PORT = 20_000, 32_000
START_SECONDS = 30.0
STOP_SECONDS = 10.0


@functools.cache
def consul_binary() -> Path:
    """Path of a ``consul`` command: $TABLE_CONSUL_CONSUL, the one on PATH, or Debian's, downloaded once.

    Raises:
        Unavailable: there is none, and none can be downloaded.
    """
    if chosen := os.environ.get("TABLE_CONSUL_CONSUL"):
        if os.access(chosen, os.X_OK):
            return Path(chosen)
        raise cache.Unavailable(f"TABLE_CONSUL_CONSUL: {chosen} is no program")
    if found := shutil.which("consul"):
        return Path(found)
    try:
        kept = cache.cached(f"consul-{SUITE}", lambda path: cache.download("consul", SUITE, path))
    except cache.Unavailable as error:
        remedy = "put a consul command on PATH, or its path into TABLE_CONSUL_CONSUL"
        raise cache.Unavailable(f"no Consul: {error}: {remedy}") from error
    return kept / "usr/bin/consul"


@functools.cache
def consul_version() -> tuple[int, ...]:
    """The version of `consul_binary`, such as ``(1, 8, 7)``."""
    found = re.search(r"v(\d+)\.(\d+)\.(\d+)", cache.run(consul_binary(), "version"))
    assert found
    return tuple(map(int, found.groups()))


def free_ports(count: int, addresses: Iterable[str] = ("127.0.0.1",)) -> list[int]:
    """Ports free on all of the addresses, neither for TCP nor for UDP.

    Each worker of pytest-xdist has its own ports, as a port stays free until the program it is given to binds it.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    chosen: list[int] = []
    while len(chosen) < count:
        port = random.randrange(FIRST_PORT + worker, LAST_PORT, workers)
        if port not in chosen and all(_is_free(address, port) for address in addresses):
            chosen.append(port)
    return chosen


def _is_free(address: str, port: int) -> bool:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as probe:
            try:
                probe.bind((address, port))
            except OSError:
                return False
    return True


class ConsulError(Exception):
    """Consul answered a request of a test with an error."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"{status}: {body}")
        self.status = status


class ConsulAgent:
    """A Consul agent as a context manager, which starts it and waits for a leader.

    Args:
        bind: the loopback address of this agent.
        ports: port by name of ``PORTS``; free ones by default. They stay the same over restarts.
        dev: ``-dev`` keeps nothing over a restart and pretty-prints its JSON, but starts in a blink; the default keeps
            its data and answers as a server in production does.
        acl: default policy deny, bootstrapped: ``management_token`` holds the secret of its first token.
        hcl: more configuration, such as ``ports { https = 8501 }``.
        arguments: more of the command line, such as the flags of a member of a cluster.
        server: false for a client agent, which keeps no data and forwards each read to a server it has joined.
    """

    def __init__(
        self,
        *,
        bind: str = "127.0.0.1",
        ports: dict[str, int] | None = None,
        dev: bool = False,
        acl: bool = False,
        hcl: str = "",
        arguments: tuple[str, ...] = ("-bootstrap-expect=1",),
        server: bool = True,
    ) -> None:
        self.bind = bind
        self.ports = ports or dict(zip(PORTS, free_ports(len(PORTS), (bind,)), strict=True))
        self.management_token: str | None = None
        self._acl = acl
        self._folder = Path(tempfile.mkdtemp(prefix="table-consul-agent-"))
        self._process: subprocess.Popen[bytes] | None = None
        # gossip at the pace of a local network, or each start and each lost leader costs seconds.
        (self._folder / "agent.hcl").write_text(
            "performance { raft_multiplier = 1 }\n"
            + ('acl { enabled = true\n default_policy = "deny" }\n' if acl else "")
            + hcl
        )
        self._command = [
            *(*cache.DIES_WITH_US, str(consul_binary()), "agent"),
            *(["-dev"] if dev else ["-data-dir", str(self._folder / "data"), *arguments]),
            *(["-server"] if server and not dev else []),
            *(f"-config-file={self._folder / 'agent.hcl'}", f"-bind={bind}", f"-client={bind}", "-dns-port=-1"),
            *("-grpc-port=-1", *(["-grpc-tls-port=-1"] if consul_version() >= (1, 14) else [])),
            *(f"-{name.replace('_', '-')}-port={port}" for name, port in self.ports.items()),
        ]

    @property
    def address(self) -> str:
        """``host:port`` of its HTTP API."""
        return f"{self.bind}:{self.ports['http']}"

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    @property
    def log(self) -> str:
        """The output of the agent so far, over all its starts."""
        path = self._folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> None:
        """Start or restart with the same ports and data; returns once a leader is elected."""
        self.launch()
        self.wait_for_leader()
        if self._acl and not self.management_token:
            self.management_token = self.bootstrap()

    def launch(self) -> None:
        """Start without waiting."""
        assert not self._process, "it is running"
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        atexit.register(self._end, signal.SIGKILL)

    def wait_for_leader(self, seconds: float = START_SECONDS) -> None:
        """Return once this agent knows a leader and accepts writes."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self._process
            if self._process.poll() is not None:
                raise AssertionError(f"consul ended with {self._process.returncode}:\n{self.log}")
            try:
                if self.request("GET", "/v1/status/leader", timeout=1):
                    # A new leader serves old data until it has opened its log.
                    self.request("GET", "/v1/catalog/nodes?consistent", timeout=1, token="")
                    return
            except (OSError, ConsulError):
                pass
            time.sleep(0.02)
        raise AssertionError(f"consul has no leader after {seconds} s:\n{self.log}")

    def stop(self) -> None:
        """Stop the agent, and wait for its end."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the agent."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Suspend the agent: the kernel accepts connections, which get no answer. Returns once it is suspended."""
        os.kill(self.pid, signal.SIGSTOP)
        wait_for(self._is_stopped, STOP_SECONDS, lambda: f"consul does not stop:\n{self.log}")

    def resume(self) -> None:
        """Continue after a pause; a running agent is unchanged. Returns once it runs."""
        os.kill(self.pid, signal.SIGCONT)
        wait_for(lambda: not self._is_stopped(), STOP_SECONDS, lambda: f"consul does not resume:\n{self.log}")

    def _is_stopped(self) -> bool:
        """Whether all threads of the agent are stopped, not only the first, whose state is in /proc/PID/stat."""
        # WNOWAIT keeps the state for a second pause, and the exit status for Popen.
        state = os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return state is not None and state.si_code == os.CLD_STOPPED

    def revive(self) -> None:
        """Return the agent to a running state with a leader."""
        if self._process and self._process.poll() is not None:
            self._process = None
        if self._process:
            self.resume()
            self.wait_for_leader()
        else:
            self.start()

    def _end(self, number: signal.Signals) -> None:
        if process := self._process:
            process.send_signal(number)
            process.send_signal(signal.SIGCONT)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            self._process = None
            atexit.unregister(self._end)

    def close(self) -> None:
        """End it and remove its data."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def request(
        self, method: str, path: str, body: bytes | None = None, *, timeout: float = 10, token: str | None = None
    ) -> Any:
        """The decoded JSON of a response of the HTTP API, requested with the management token if there is one.

        Raises:
            ConsulError: any status but 200.
            OSError: no answer.
        """
        headers = {"X-Consul-Token": self.management_token if token is None else token}
        request = urllib.request.Request(
            f"http://{self.address}{path}", body, {k: v for k, v in headers.items() if v}, method=method
        )
        try:
            with _NO_PROXY.open(request, timeout=timeout) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise ConsulError(error.code, error.read().decode(errors="replace")) from error
        return json.loads(text) if text else None

    def kv_put(self, key: str, value: str | bytes) -> None:
        assert self.request("PUT", "/v1/kv/" + urllib.parse.quote(key), _encoded(value)) is True

    def kv_get(self, key: str) -> bytes | None:
        """The value of a key, None if it is absent."""
        try:
            (entry,) = self.request("GET", "/v1/kv/" + urllib.parse.quote(key))
        except ConsulError as error:
            if error.status == 404:
                return None
            raise
        return base64.b64decode(entry["Value"] or "")

    def kv_delete(self, key: str, *, recurse: bool = False) -> None:
        self.request("DELETE", "/v1/kv/" + urllib.parse.quote(key) + ("?recurse" if recurse else ""))

    def kv_txn(self, entries: Mapping[str, str | bytes]) -> None:
        """Store many keys by transaction, also keys that no URL can name (``a//b``) or Consul refuses (``a ``)."""
        items = list(entries.items())
        for start in range(0, len(items), 64):
            operations = [
                {"KV": {"Verb": "set", "Key": key, "Value": base64.b64encode(_encoded(value)).decode()}}
                for key, value in items[start : start + 64]
            ]
            self.request("PUT", "/v1/txn", json.dumps(operations).encode())

    def token(self, rules: str) -> str:
        """The secret of a new token with these rules, such as ``key_prefix "consul/" { policy = "read" }``."""
        name = f"test-{random.getrandbits(64):016x}"
        self.request("PUT", "/v1/acl/policy", json.dumps({"Name": name, "Rules": rules}).encode())
        made = self.request("PUT", "/v1/acl/token", json.dumps({"Policies": [{"Name": name}]}).encode())
        return str(made["SecretID"])

    def set_rules(self, secret: str, rules: str) -> None:
        """Replace the rules of a token from `token`, which ends no blocking query for keys."""
        (policy,) = self.request("GET", "/v1/acl/token/self", token=secret)["Policies"]
        body = json.dumps({"Name": policy["Name"], "Rules": rules}).encode()
        self.request("PUT", f"/v1/acl/policy/{policy['ID']}", body)

    def revoke(self, secret: str) -> None:
        """Delete a token by its secret."""
        own = self.request("GET", "/v1/acl/token/self", token=secret)
        self.request("DELETE", f"/v1/acl/token/{own['AccessorID']}")

    def bootstrap(self) -> str:
        """The secret of the first token, which may do everything; works once."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return str(self.request("PUT", "/v1/acl/bootstrap")["SecretID"])
            except ConsulError:
                # A new server uses the legacy ACL system until it knows that all servers support the new one.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


def _encoded(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ConsulCluster:
    """Three servers on 127.0.0.2, .3 and .4, as a context manager; ``members`` are ordinary agents.

    With ``client_agent`` a ``client`` on 127.0.0.5 is started too: the agent of a mail host, which asks the servers.
    """

    ADDRESSES = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
    CLIENT_ADDRESS = "127.0.0.5"

    def __init__(self, *, acl: bool = False, hcl: str = "", client_agent: bool = False) -> None:
        self._acl = acl
        ports = dict(zip(PORTS, free_ports(len(PORTS), (*self.ADDRESSES, self.CLIENT_ADDRESS)), strict=True))
        join = [f"-retry-join={address}:{ports['serf_lan']}" for address in self.ADDRESSES]
        self.members = [
            ConsulAgent(
                bind=address,
                ports=ports,
                acl=acl,
                hcl=hcl,
                arguments=("-bootstrap-expect=3", f"-node=n{address[-1]}", "-retry-interval=1s", *join),
            )
            for address in self.ADDRESSES
        ]
        self.client = ConsulAgent(
            bind=self.CLIENT_ADDRESS,
            ports=ports,
            acl=acl,
            hcl=hcl,
            arguments=("-node=client", "-retry-interval=1s", *join),
            server=False,
        )
        self.agents = [*self.members, self.client] if client_agent else self.members
        """The started agents."""

    @property
    def leader(self) -> ConsulAgent:
        """The current leader, according to the members.

        Raises:
            AssertionError: there is none.
        """
        for member in self.members:
            try:
                address = member.request("GET", "/v1/status/leader", timeout=1)
            except (OSError, ConsulError):
                continue
            if address:
                return next(other for other in self.members if other.bind == address.split(":")[0])
        raise AssertionError("no leader")

    def __enter__(self) -> Self:
        try:
            for agent in self.agents:
                agent.launch()
            for agent in self.agents:
                agent.wait_for_leader()
            if self._acl:
                secret = self.members[0].bootstrap()
                for agent in self.agents:
                    agent.management_token = secret
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for agent in (*self.members, self.client):
            agent.close()
