"""Read-only Debian roots with a real OpenSMTPD, one for each dialect."""

from __future__ import annotations

import functools
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.rig import cache

SUITES = {"6.8": "bookworm", "7.4": "bookworm-backports", "7.6": "trixie", "7.9": "forky"}
USERS = ("gilles", "eric", "joerg")


class Root:
    """The root directory with OpenSMTPD ``release`` (a key of ``SUITES``), made at first use.

    Raises:
        Unavailable: not root, no mirror, or its Debian release has another OpenSMTPD.
    """

    def __init__(self, release: str) -> None:
        require_root()
        self.release = release
        suite = SUITES[release]
        self.path = cache.cached(f"opensmtpd-{suite}", lambda path: _make_root(suite, path))
        self.version = self.path.name.removeprefix(f"opensmtpd-{suite}-")
        if not self.version.startswith(release):
            raise cache.Unavailable(f"Debian's {suite} holds OpenSMTPD {self.version} by now, not {release}")

    @property
    def python(self) -> str:
        """The version of its Python, such as ``3.13``."""
        return (self.path / "usr/bin/python3").readlink().name.removeprefix("python")

    @functools.cached_property
    def accounts(self) -> dict[str, tuple[int, int]]:
        """User and group id by name; a group without a user of the same name has its id as both."""
        fields = [line.split(":") for line in (self.path / "etc/passwd").read_text().splitlines()]
        return {name: (int(uid), int(gid)) for name, _, uid, gid, *_ in fields}

    def run(self, *command: str) -> str:
        """Standard output of a command in the root, which must not write there."""
        mounts = 'mount --rbind /dev "$0/dev" && mount -t proc proc "$0/proc" && exec chroot "$0" "$@"'
        return cache.run("unshare", "--mount", "sh", "-c", mounts, self.path, *command)

    def encrypt(self, password: str) -> str:
        """The hash of a password for a table of credentials."""
        return self.run("smtpctl", "encrypt", password).strip()


def require_root() -> None:
    """Check for root, which chroot, mounts and mail delivery need.

    Raises:
        Unavailable: not root.
    """
    if os.geteuid() != 0:
        raise cache.Unavailable("a real OpenSMTPD needs root: run the same command as root")


def _make_root(suite: str, path: Path) -> str:
    if not shutil.which("mmdebstrap"):
        cache.run("apt-get", "install", "-qq", "mmdebstrap")
    base = suite.removesuffix("-backports")
    sources = [cache.source_line(name) for name in dict.fromkeys((base, suite))]
    hooks = [f'--customize-hook=chroot "$1" useradd -m {user}' for user in USERS]
    # smtpd needs the list of authorities when it relays or has a certificate.
    include = "python3,openssl,ca-certificates"
    if base == suite:
        include += ",opensmtpd"
    else:
        newer = f'chroot "$1" apt-get install -qq --no-install-recommends -t {suite} opensmtpd'
        hooks.insert(0, f"--customize-hook={newer}")
    options = [f"--aptopt={line}" for line in cache.transport_options()]
    made = ("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--include={include}")
    cache.run(*made, *options, *hooks, base, path, *sources)
    path.chmod(0o755)
    # The only source of names: a lookup over the network would make tests depend on DNS.
    (path / "etc/hosts").write_text("127.0.0.1 localhost\n")
    (path / "etc/resolv.conf").unlink(missing_ok=True)
    (path / "etc/resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    shutil.rmtree(path / "usr/share/doc", ignore_errors=True)
    return cache.run("chroot", path, "dpkg-query", "-W", "-f", "${Version}", "opensmtpd").strip()


@dataclass(frozen=True, slots=True)
class File:
    """A file for a root: its content and permissions."""

    content: str | bytes
    mode: int = 0o644
    owner: str = "root"
    group: str = "root"


def certificate(root: Root, host: str = "mail.example.org") -> dict[str, File]:
    """A self-signed certificate for a host, as the files ``/etc/ssl/HOST.crt`` and ``.key``."""
    both = root.run(
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={host}"),
        *("-addext", f"subjectAltName=DNS:{host}", "-keyout", "/dev/stdout", "-out", "/dev/stdout"),
    )
    key, certificate = re.findall(r"-----BEGIN [A-Z ]+-----.*?-----END [A-Z ]+-----\n", both, re.DOTALL)
    return {f"/etc/ssl/{host}.key": File(key, 0o600), f"/etc/ssl/{host}.crt": File(certificate)}
