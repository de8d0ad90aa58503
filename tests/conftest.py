"""Fixtures with real programs, markers, and the rule that a skipped test names its requirement.

A test that uses ``consul``, ``root`` or ``smtpd`` is marked ``real``. If such a part cannot be had, the test is skipped
with the reason and how to fix it; with ``CI=true`` in the environment every skip is a failure.

With pytest-xdist each worker has its own Consul agents, and one worker runs all of a file, so that the fixtures of a
module are made once. Files with real parts come first, tests marked ``alone`` last.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from collections.abc import Callable, Iterator

import hypothesis
import pytest

from tests.rig import cache, package
from tests.rig.consul import ConsulAgent, ConsulCluster, consul_binary
from tests.rig.opensmtpd import Smtpd
from tests.rig.root import Root

REAL_PARTS = {"consul", "consul_with_acl", "consul_with_list_policy", "consul_cluster", "root", "smtpd"}
RELEASES = ("7.9", "7.6")
# Files in which most tests are slow; `make quick` skips them.
SLOW = {
    f"tests/{name}.py"
    for name in (
        "ctl/test_main",
        "ctl/test_query_daemon",
        "ctl/test_query_sources",
        "e2e/test_demo",
        "smtpd/test_metrics_counters",
        "smtpd/test_metrics_dashboard",
        "smtpd/test_metrics_listen",
        "smtpd/test_metrics_process",
        "smtpd/test_process",
        "smtpd/test_process_config",
        "smtpd/test_process_exit",
        "smtpd/test_process_outage",
        "smtpd/test_procexec_command",
        "smtpd/test_procexec_faults",
        "smtpd/test_procexec_imsg",
        "smtpd/test_procexec_lines",
        "smtpd/test_procexec_restart",
        "smtpd/test_procexec_trial",
        "test_release",
    )
}

# How long an example takes depends on the load of the machine.
hypothesis.settings.register_profile("table-consul", deadline=None)
hypothesis.settings.register_profile("quick", deadline=None, max_examples=6)
hypothesis.settings.load_profile("table-consul")


@pytest.fixture(autouse=True)
def _undo_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable the undo folder, so that tests save nothing outside their own folders."""
    monkeypatch.setenv("TABLE_CONSUL_UNDO_DIR", str(tmp_path_factory.getbasetemp() / "undo"))


@contextlib.contextmanager
def _or_skip() -> Iterator[None]:
    try:
        yield
    except cache.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def _consul_agent() -> Iterator[ConsulAgent]:
    with _or_skip():
        agent = ConsulAgent()
    with agent:
        yield agent


@pytest.fixture
def consul(_consul_agent: ConsulAgent) -> ConsulAgent:
    """A running Consul server without keys; a test may stop, pause and restart it."""
    return _emptied(_consul_agent)


@pytest.fixture(scope="session")
def _consul_agent_with_acl() -> Iterator[ConsulAgent]:
    with _or_skip():
        agent = ConsulAgent(acl=True)
    with agent:
        yield agent


@pytest.fixture
def consul_with_acl(_consul_agent_with_acl: ConsulAgent) -> ConsulAgent:
    """A running Consul server without keys whose ACLs deny by default."""
    return _emptied(_consul_agent_with_acl)


@pytest.fixture(scope="session")
def _consul_agent_with_list_policy() -> Iterator[ConsulAgent]:
    with _or_skip():
        more = ("-bootstrap-expect=1", "-hcl", "acl { enable_key_list_policy = true }")
        agent = ConsulAgent(acl=True, arguments=more)
    with agent:
        yield agent


@pytest.fixture
def consul_with_list_policy(_consul_agent_with_list_policy: ConsulAgent) -> ConsulAgent:
    """A running Consul server without keys whose ACLs also require the rule ``list`` for lists."""
    return _emptied(_consul_agent_with_list_policy)


def _emptied(agent: ConsulAgent) -> ConsulAgent:
    agent.revive()
    agent.kv_delete("", recurse=True)
    return agent


@pytest.fixture
def consul_cluster() -> Iterator[ConsulCluster]:
    """A new cluster of three Consul servers."""
    with _or_skip():
        cluster = ConsulCluster()
    with cluster:
        yield cluster


@pytest.fixture(scope="session", params=RELEASES)
def root(request: pytest.FixtureRequest) -> Root:
    """An OpenSMTPD, one after the other: the newest, and the first with the dialect ``smtpd-tables``."""
    with _or_skip():
        return Root(request.param)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Enable SIGINT and SIGHUP, which shells and nohup(1) ignore in background jobs, and child processes with them."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.fixture
def smtpd(root: Root) -> Iterator[Callable[..., Smtpd]]:
    """Starts an smtpd of ``root`` with the arguments of ``Smtpd``, and ends it after the test."""
    with contextlib.ExitStack() as running, _or_skip():
        yield lambda *arguments, **options: running.enter_context(Smtpd(root, *arguments, **options))


@pytest.hookimpl(tryfirst=True)  # before -m deselects tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if REAL_PARTS & set(getattr(item, "fixturenames", ())):
            item.add_marker("real")
        if item.path.relative_to(package.CHECKOUT).as_posix() in SLOW:
            item.add_marker("slow")
    real = {item.path for item in items if _has(item, "real")}
    items.sort(key=lambda item: (_has(item, "alone"), item.path not in real))  # stable: the order within a file remains


def _has(item: pytest.Item, marker: str) -> bool:
    return item.get_closest_marker(marker) is not None


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outside the timeout of pytest-timeout
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test marked ``alone`` runs while no other worker runs any."""
    with open(__file__) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if _has(item, "alone") else fcntl.LOCK_SH)
        return (yield)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build slow requirements before the timeout of the first test starts."""
    if session.config.option.collectonly:
        return
    used = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    called = [item.callspec.params for item in session.items if hasattr(item, "callspec")]
    with contextlib.suppress(cache.Unavailable):  # each fixture skips its test with this reason
        if used & REAL_PARTS:
            consul_binary()
        for release in sorted({params["root"] for params in called if "root" in params}):
            package.dependencies(Root(release).python)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    return _no_skip_in_ci((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    return _no_skip_in_ci((yield))


def _no_skip_in_ci(report):
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI") == "true":
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI=true does not allow: {report.longrepr[2]}"
    return report
