"""The cache of downloads and root directories, and their sources."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()
"""A prefix for commands: the kernel ends the command with the test run."""

OUTDATED_SECONDS = 3600
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class Unavailable(Exception):
    """A requirement is missing on this machine; the text has the reason and a hint."""


def folder() -> Path:
    """The cache folder of this user, created if missing.

    Raises:
        Unavailable: it cannot be made.
    """
    chosen = os.environ.get("TABLE_CONSUL_CACHE")
    path = Path(chosen or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = path if chosen else path / "table-consul"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"no cache folder: {error}: set TABLE_CONSUL_CACHE to a folder of yours") from error
    return path.resolve()


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock ``name``, which one process at a time has; the kernel releases it when the process ends."""
    with (folder() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cached(stem: str, build: Callable[[Path], str]) -> Path:
    """The newest folder ``<stem>-<version>`` in the cache, built if there is none.

    ``build`` fills an empty folder and returns the version, which starts with a digit. The folder gets its name
    when it is complete, so that an interrupted run leaves no folder that looks finished.

    Raises:
        Unavailable: from ``build``.
    """
    with locked(stem):
        if whole := finished(stem):
            return whole
        for left_over in folder().glob(f"{stem}.*.partial"):
            shutil.rmtree(left_over, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{stem}.", suffix=".partial", dir=folder()))
        try:
            partial.chmod(0o755)
            version = build(partial)
            return partial.rename(folder() / f"{stem}-{version}")
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def current(kind: str, digest: str, build: Callable[[Path], str]) -> Path:
    """The folder of `cached` for the sources with this digest; others of this kind are removed after an hour.

    Every edit of the sources makes a new one; a recent one may be in use by another run.
    """
    if not finished(f"{kind}-{digest}"):
        for left in folder().glob(f"{kind}-*"):
            if left.stat().st_mtime < time.time() - OUTDATED_SECONDS:
                (shutil.rmtree if left.is_dir() else Path.unlink)(left)
    return cached(f"{kind}-{digest}", build)


def finished(stem: str) -> Path | None:
    """The newest folder of an earlier run for ``stem``; None if there is none."""
    return max(folder().glob(f"{stem}-[0-9]*/"), key=lambda path: path.stat().st_mtime, default=None)


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Standard output of a setup command.

    Raises:
        Unavailable: it is not installed, or failed; the text ends with the last lines it wrote.
    """
    try:
        done = subprocess.run(
            command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
    except FileNotFoundError as error:
        raise Unavailable(f"{command[0]} is not installed") from error
    if done.returncode:
        last = " / ".join((done.stderr or done.stdout).strip().splitlines()[-4:])
        raise Unavailable(f"{command[0]} ... {command[-1]} failed with {done.returncode}: {last}")
    return done.stdout


def mirror() -> str:
    """The address of a Debian mirror: $TABLE_CONSUL_MIRROR, or the one this machine's apt uses.

    Raises:
        Unavailable: this is no Debian machine, and the variable is not set.
    """
    if chosen := os.environ.get("TABLE_CONSUL_MIRROR"):
        return chosen
    remedy = "set TABLE_CONSUL_MIRROR to the address of a Debian mirror"
    system = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    releases = {system.get("VERSION_CODENAME", "").strip('"'), "oldstable", "stable", "testing", "unstable", "sid"}
    if system.get("ID", "").strip('"') != "debian":
        raise Unavailable(f"this is no Debian machine, so its apt names no mirror: {remedy}")
    listed = run("apt-get", "indextargets", "--format", "$(REPO_URI)|$(RELEASE)|$(COMPONENT)", "Created-By: Packages")
    rows = [line.split("|") for line in listed.splitlines()]
    found = [uri.rstrip("/") for uri, release, component in rows if component == "main" and release in releases]
    if not found:
        raise Unavailable(f"apt's configuration names no mirror of {' or '.join(sorted(releases))}: {remedy}")
    # Other publishers use Debian's names of releases too; a mirror of Debian itself ends in its name by custom.
    return next((uri for uri in found if uri.endswith("/debian")), found[0])


def source_line(suite: str) -> str:
    """The line of a sources.list for ``suite``, its signatures checked with Debian's own keys."""
    signed = f" [signed-by={KEYRING}]" if KEYRING.exists() else ""
    return f"deb{signed} {mirror()} {suite} main"


def transport_options() -> list[str]:
    """Options for apt: the network settings of this machine, and permission to use a frozen mirror."""
    dumped = run("apt-config", "dump", "Acquire").splitlines()
    return [line.rstrip(";") for line in dumped if line.startswith(("Acquire::http", "Acquire::https"))] + [
        'Acquire::Check-Valid-Until "false"'
    ]


def download(package: str, suite: str, into: Path) -> str:
    """Unpack ``package`` of ``suite`` into a folder; its version.

    Works for any user and uses a separate apt state.

    Raises:
        Unavailable: no mirror, no network, no such package.
    """
    with tempfile.TemporaryDirectory(prefix="table-consul-apt-") as name:
        state = Path(name)
        (state / "sources.list").write_text(source_line(suite) + "\n")
        options = {
            "Dir::State": state,
            "Dir::State::Lists": state / "lists",
            "Dir::Cache": state / "cache",
            "Dir::Etc::sourcelist": state / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "APT::Sandbox::User": "",
            "Acquire::Check-Valid-Until": "false",
            "APT::Update::Error-Mode": "any",
        }
        apt = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in options.items())]
        run(*apt, "update")
        run(*apt, "download", package, cwd=state)
        archive = next(state.glob("*.deb"))
        run("dpkg", "-x", archive, into)
        return run("dpkg-deb", "-f", archive, "Version").strip()
