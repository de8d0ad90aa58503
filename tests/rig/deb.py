"""The Debian package of this checkout, built in a root of Debian 13 without a network.

``python -m tests.rig.deb FOLDER`` builds it into a folder.
"""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.rig import bare, cache, package
from tests.rig.opensmtpd import LIBEXEC, Smtpd
from tests.rig.root import SUITES, Root, require_root

if TYPE_CHECKING:
    from collections.abc import Mapping

SUITE = "trixie"
PLACE = "/build/table-consul"
"""The path of the source in the root, fixed because the built bytes depend on it."""
# Files that neither belong to the package nor affect its build.
APART = ("tests", "bench", ".ci", "Dockerfile", "compose.yaml", ".dockerignore")
BUILD = f"""
umask 022
cd {PLACE}
find . -exec touch --no-dereference --date="$(dpkg-parsechangelog --show-field Date)" {{}} +
dpkg-buildpackage --build=binary --no-sign --ignore-builtin-builddeps
"""
DOWNLOAD = "apt-get -q -y --download-only install"
KEEP = "cp -r /var/lib/apt/lists /var/cache/apt/archives /mnt/into"
# systemd needs namespaces, its cgroups, and the folders it writes to before it mounts anything.
UNITS = "/etc/systemd/system"
BOOT = """
mount -t proc proc /proc; mount -t sysfs -o ro sysfs /sys; mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs tmpfs /run; mount -t tmpfs tmpfs /tmp
export container=lxc
exec /usr/lib/systemd/systemd --log-target=null
"""
UNIT = """
[Service]
Type=oneshot
ExecStart=-sh -c "sh -x /root/script >/root/said 2>&1"
ExecStopPost=systemctl poweroff --force --force
[Install]
WantedBy=multi-user.target
"""


def build_root() -> Path:
    """The root of Debian 13 with the build requirements of ``debian/control`` and lintian, made at first use.

    Raises:
        Unavailable: not root, or no mirror.
    """
    require_root()
    control = (package.CHECKOUT / "debian/control").read_text()
    needed = re.search(r"^Build-Depends:\n((?: .*\n)+)", control, re.MULTILINE)
    assert needed
    names = [line.split()[0].rstrip(",") for line in needed[1].splitlines()]
    virtual = {"debhelper-compat": "debhelper", "dh-sequence-python3": "dh-python"}
    packages = [*(virtual.get(name, name) for name in names), "lintian"]
    stem = f"build-{SUITE}-{hashlib.sha256(' '.join(packages).encode()).hexdigest()[:8]}"

    def make(path: Path) -> str:
        options = [f"--aptopt={line}" for line in cache.transport_options()]
        made = ("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--include={','.join(packages)}")
        cache.run(*made, *options, SUITE, path, cache.source_line(SUITE))
        path.chmod(0o755)
        return (path / "etc/debian_version").read_text().strip()

    return cache.cached(stem, make)


def build(source: Path, into: Path) -> Path:
    """Build the package of a source tree, on a copy of it, and put it into a folder.

    Raises:
        Unavailable: from `build_root`. AssertionError: it does not build; with what was said.
    """
    with tempfile.TemporaryDirectory(prefix="table-consul-deb-") as name:
        place = Path(name) / "table-consul"
        shutil.copytree(source, place, symlinks=True)
        cache.run("chmod", "-R", "u=rwX,go=rX", place)
        with bare.Layer(build_root(), {"/build": Path(name)}) as layer:
            layer.run(BUILD)
        (made,) = Path(name).glob("*.deb")
        return Path(shutil.copy(made, into))


@functools.cache
def built() -> Path:
    """The package of this checkout, built once and kept until the checkout changes.

    Raises:
        Unavailable: from `build_root`.
    """
    with tempfile.TemporaryDirectory(prefix="table-consul-source-") as name:
        source = package.copy(Path(name) / "table-consul", *APART)
        kept = cache.current("deb", package.digest(source), lambda into: _build(source, into))
    return next(kept.glob("*.deb"))


def lower(of: Path, into: Path) -> Path:
    """The package as version 0.9, with a module that later versions lack."""
    with tempfile.TemporaryDirectory(prefix="table-consul-lower-") as name:
        tree = Path(name) / "tree"
        cache.run("dpkg-deb", "--raw-extract", of, tree)
        control = tree / "DEBIAN/control"
        control.write_text(re.sub("^Version: .*", "Version: 0.9", control.read_text(), flags=re.MULTILINE))
        modules = tree / "usr/lib/python3/dist-packages/table_consul"
        (modules / "gone.py").write_text("")
        about = modules / "__init__.py"
        about.write_text(re.sub("__version__ = .*", '__version__ = "0.9"', about.read_text()))
        made = into / "table-consul_0.9_all.deb"
        cache.run("dpkg-deb", "--root-owner-group", "--build", tree, made)
        return made


def parts(root: Root, of: Path) -> Path:
    """A folder with the packages that apt needs in this root for the package, opensmtpd and systemd.

    Raises:
        Unavailable: no network.
    """
    wanted = DOWNLOAD + cache.run("dpkg-deb", "--field", of, "Depends", "Recommends")
    stamp = hashlib.sha256(wanted.encode()).hexdigest()[:8]

    def download(into: Path) -> str:
        bound = {"/mnt/deb": of.parent, "/mnt/into": into}
        with bare.Layer(root.path, bound, network=True) as layer:
            try:
                layer.run(f"apt-get -q update; {DOWNLOAD} /mnt/deb/{of.name} systemd procps")
                layer.run(f"{DOWNLOAD} --reinstall opensmtpd; {KEEP}")
            except AssertionError as error:
                raise cache.Unavailable(str(error)) from error
        return "0"

    return cache.cached(f"parts-{SUITES[root.release]}-{stamp}", download)


class Host(Smtpd):
    """A mail host to install the package on: ``sh`` runs scripts as root, and apt needs no network."""

    def __init__(self, release: str, conf: str, environment: Mapping[str, str]) -> None:
        self._deb = built()
        root = Root(release)
        self._exports = "".join(f"export {name}={value}\n" for name, value in environment.items())
        self._bound = {"/mnt/parts": parts(root, self._deb)}
        super().__init__(root, conf, environment=environment)
        (self._tree / LIBEXEC / "table-consul").unlink()
        self.write("/mnt/new.deb", self._deb.read_bytes())
        with tempfile.TemporaryDirectory() as name:
            self.write("/mnt/lower.deb", lower(self._deb, Path(name)).read_bytes())

    def _imported(self) -> tuple[Path, Path]:
        return self.place, self.place  # the package has its own launcher

    def boot(self, script: str) -> str:
        """The output of a script under systemd, after the start of all enabled units; systemd stops after the script.

        Raises:
            AssertionError: it takes longer than a minute.
        """
        for path, text in {"/root/boot": BOOT, "/root/script": script, f"{UNITS}/script.service": UNIT}.items():
            self.write(path, text)
        namespaces = "--pid --fork --kill-child --mount --uts --ipc --net --cgroup"
        return self.sh(f"""
            systemctl --quiet enable script.service
            systemctl --quiet set-default multi-user.target
            timeout 60 unshare {namespaces} sh /root/boot || true
            cat /root/said
        """)

    def exit_status(self) -> int:
        """Wait for the end of smtpd; its exit status."""
        assert self._process
        return self._process.wait(10)

    def sh(self, script: str) -> str:
        """The output of a script, run beside smtpd, or in its root if smtpd is stopped.

        Raises:
            AssertionError, CalledProcessError: it failed; with its output.
        """
        script = self._exports + script
        if self.alive:
            return self.run("sh", "-ec", script)
        with bare.Layer(self.root.path, self._bound, base=self.place) as layer:
            return layer.run(script)


def _build(source: Path, into: Path) -> str:
    return build(source, into).name.split("_")[1]


if __name__ == "__main__":
    try:
        print(shutil.copy(built(), sys.argv[1]))
    except cache.Unavailable as error:
        sys.exit(str(error))
