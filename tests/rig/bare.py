"""A Debian root with disposable copy-on-write layers, in which commands run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.rig import cache
from tests.rig.opensmtpd import _overlays
from tests.rig.root import require_root

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Self

SUITE = "bookworm"
# Everything that README requires of a machine.
PACKAGES = "make,python3"

# $1 the root, $2 the folder of this layer; then pairs of what is bound where, up to --, and the command.
ENTER = """\
set -e
root=$1 base=$2; shift 2
if [ -d "$base/upper" ]; then
    mount -t overlay overlay -o "lowerdir=$root,upperdir=$base/upper,workdir=$base/work" "$base/root"
fi
mount --rbind /dev "$base/root/dev"
mount -t proc proc "$base/root/proc"
while [ "$1" != -- ]; do
    if [ -d "$1" ]; then mkdir -p "$base/root$2"; else mkdir -p "$base/root${2%/*}"; : >>"$base/root$2"; fi
    mount --bind "$1" "$base/root$2"
    shift 2
done
shift
chroot "$base/root" "$@" &
wait $!
"""


def debian() -> Path:
    """The root of a fresh Debian with only ``PACKAGES``, made at first use.

    Raises:
        Unavailable: not root, or no mirror.
    """
    require_root()

    def make(path: Path) -> str:
        options = [f"--aptopt={line}" for line in cache.transport_options()]
        made = ("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--include={PACKAGES}")
        cache.run(*made, *options, SUITE, path, cache.source_line(SUITE))
        path.chmod(0o755)
        return (path / "etc/debian_version").read_text().strip()

    return cache.cached(f"bare-{SUITE}", make)


class Layer:
    """A layer above a root, as a context manager.

    Args:
        root: the folder of the root.
        bound: folders and files of this machine by their path in the root.
        network: whether apt and pip reach the network, with the settings of this machine.
        base: the folder of an existing layer, such as that of a stopped smtpd, which is kept.
    """

    def __init__(
        self, root: Path, bound: Mapping[str, Path], *, network: bool = False, base: Path | None = None
    ) -> None:
        self._stays = base is not None
        self._base = base or Path(tempfile.mkdtemp(prefix="table-consul-layer-"))
        self._root = root
        self._bound = dict(bound)
        self._environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            "HOME": "/root",
        }
        if not base:
            self._make()
        if network:
            self._bound["/etc/resolv.conf"] = Path("/etc/resolv.conf").resolve()
            settings = pip_settings()
            for number, path in enumerate(named_paths(settings.values())):
                # Mounted at separate paths, because dpkg cannot replace a file of the root that is a mount point.
                self._bound[f"/mnt/network/{number}"] = path
                settings = {
                    name: value.replace(str(path), f"/mnt/network/{number}") for name, value in settings.items()
                }
            self._environment |= settings

    def _make(self) -> None:
        self._base.chmod(0o755)
        (self._base / "root").mkdir()
        if _overlays():
            (self._base / "work").mkdir()
            (self._base / "upper").mkdir(mode=0o755)
        else:
            cache.run("cp", "-a", "--reflink=auto", f"{self._root}/.", self._base / "root")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._stays:
            shutil.rmtree(self._base, ignore_errors=True)

    def run(self, script: str, timeout: float = 300.0) -> str:
        """The output of a shell script, both streams, run as root in the layer.

        Raises:
            AssertionError: the script failed; with its output.
        """
        bound = [part for place, path in self._bound.items() for part in (str(path), place)]
        namespaces = ("unshare", "--mount", "--pid", "--fork", "--kill-child")
        command = ("sh", "-c", ENTER, "enter", str(self._root), str(self._base), *bound, "--", "sh", "-ec", script)
        done = subprocess.run(
            (*cache.DIES_WITH_US, *namespaces, *command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=self._environment,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"{script}\nended with {done.returncode}:\n{done.stdout}"
        return done.stdout


def pip_settings() -> dict[str, str]:
    """The settings of this machine's pip (indexes, certificates), as environment variables."""
    listed = cache.run(sys.executable, "-m", "pip", "config", "list")
    settings = {}
    for line in listed.splitlines():
        if match := re.fullmatch(r"(?:global|install|:env:)\.([\w-]+)='(.*)'", line):
            settings[f"PIP_{match[1].upper().replace('-', '_')}"] = match[2].replace("\\n", " ").strip()
    return settings


def named_paths(values: Iterable[str]) -> list[Path]:
    """The files and folders named by such settings, the longest first; for an index, also its neighbours."""
    found = set()
    for word in " ".join(values).split():
        path = Path(word.removeprefix("file://"))
        if path.is_absolute() and path.exists():
            found.add(path.parent if word.startswith("file://") else path)
    return sorted(found, key=lambda path: len(str(path)), reverse=True)
