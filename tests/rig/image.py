"""The container image, built from the Dockerfile, and compose.yaml as Docker Compose reads it.

``python -m tests.rig.image FOLDER`` writes the image into a folder, as an OCI archive.

buildah builds in a chroot without a container engine, on a base made from Debian's packages under the name in the
Dockerfile. Settings of mirrors are passed in with the options that operators use.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from table_consul import __version__
from tests.rig import cache
from tests.rig.package import CHECKOUT, digest
from tests.rig.root import require_root

CONTEXT = (
    *("Dockerfile", ".dockerignore", "LICENSE", "Makefile", "pyproject.toml"),
    *(path.name for path in CHECKOUT.glob("*.md")),
    *("contrib", "debian", "docs", "man", "table_consul"),
)
COMPOSE_SUITE = "trixie"
# The fields of OCI's configuration; Docker also reads Healthcheck there.
FIELDS = ("User", "ExposedPorts", "Env", "Entrypoint", "Cmd", "Volumes", "WorkingDir", "StopSignal", "Healthcheck")
# As in Debian's own image of this name: packages start no services, and no manuals are installed.
LIKE_SLIM = (
    *("--skip=output/dev,output/mknod", "--dpkgopt=path-exclude=/usr/share/man/*"),
    *("--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-include=/usr/share/doc/*/copyright"),
    *("--dpkgopt=path-exclude=/usr/share/locale/*",),
    """--customize-hook=printf '#!/bin/sh\\nexit 101\\n' >"$1/usr/sbin/policy-rc.d" """,
    '--customize-hook=chmod 0755 "$1/usr/sbin/policy-rc.d"',
    '--customize-hook=rm -f "$1/etc/apt/sources.list" "$1/etc/apt/apt.conf.d/99mmdebstrap" "$1/etc/resolv.conf"',
)


@dataclass(frozen=True, slots=True)
class Image:
    """An image: its files, which are read-only, and its configuration for containers in the terms of Docker."""

    files: Path
    config: dict[str, Any]


@functools.cache
def built() -> Image:
    """The image of this checkout, built once and kept until the checkout changes.

    Raises:
        Unavailable: we are not root, or what builds it cannot be had.
        AssertionError: the Dockerfile does not build; with the end of what was said.
    """
    require_root()
    kept = cache.current("image", digest(CHECKOUT, CONTEXT), _build)
    return Image(kept / "files", json.loads((kept / "config.json").read_text()))


@functools.cache
def compose(service: str = "") -> dict[str, Any]:
    """compose.yaml as Docker Compose resolves it: all of it, or one service.

    Raises:
        Unavailable: Debian's Docker Compose cannot be downloaded.
        AssertionError: it refuses the file; with the reason.
    """
    kept = cache.cached(
        f"docker-compose-{COMPOSE_SUITE}", lambda into: cache.download("docker-compose", COMPOSE_SUITE, into)
    )
    command = (kept / "usr/libexec/docker/cli-plugins/docker-compose", "--file", CHECKOUT / "compose.yaml")
    done = subprocess.run((*command, "config", "--format", "json"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "level=warning" not in done.stderr, done.stderr
    whole = json.loads(done.stdout)
    return whole["services"][service] if service else whole


def base_name() -> str:
    """The base image in the Dockerfile."""
    found = re.search(r"^ARG BASE=(\S+)$", (CHECKOUT / "Dockerfile").read_text(), re.MULTILINE)
    assert found
    return found[1]


def _build(into: Path) -> str:
    if not shutil.which("buildah"):
        cache.run("apt-get", "install", "-qq", "--no-install-recommends", "buildah")
    tag = base_name().rpartition(":")[2]
    suite, date, _ = tag.split("-")
    base = cache.cached(f"container-base-{suite}", lambda path: _make_base(suite, date, path))
    with tempfile.TemporaryDirectory(prefix="table-consul-image-") as name:
        place = Path(name)
        # The namespace ends with its mounts. vfs, because some kernels do not support the faster drivers.
        buildah = (*cache.DIES_WITH_US, "unshare", "--mount", "buildah")
        storage = (*buildah, f"--root={place / 'storage'}", f"--runroot={place / 'run'}", "--storage-driver=vfs")
        from_scratch = cache.run(*storage, "from", "scratch").strip()
        cache.run(*storage, "add", "--quiet", from_scratch, base / "base.tar", "/")
        cache.run(*storage, "commit", "--quiet", "--rm", from_scratch, base_name())
        options = (
            "--isolation=chroot",
            "--pull-never",
            "--format=docker",
            "--tag=table-consul",
            *_secrets(suite, place),
        )
        done = subprocess.run(
            (*storage, "bud", *options, CHECKOUT),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        assert done.returncode == 0, "\n".join(done.stdout.splitlines()[-40:])
        container = cache.run(*storage, "from", "--pull-never", "table-consul").strip()
        # With the driver vfs this is a plain folder without mounts.
        cache.run("mv", cache.run(*storage, "mount", container).strip(), into / "files")
        inspected = json.loads(cache.run(*storage, "inspect", "--type=image", "table-consul"))
    (into / "config.json").write_text(json.dumps(inspected["Docker"]["config"], indent=1))
    return "0"


def _make_base(suite: str, date: str, path: Path) -> str:
    if not shutil.which("mmdebstrap"):
        cache.run("apt-get", "install", "-qq", "mmdebstrap")
    options = [f"--aptopt={line}" for line in cache.transport_options()]
    made = ("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", *LIKE_SLIM, *options)
    cache.run(*made, suite, path / "base.tar", cache.source_line(suite))
    return date


def _secrets(suite: str, place: Path) -> list[str]:
    """The settings with which this machine reaches Debian, as the options in the head of the Dockerfile."""
    apt = [*cache.transport_options(), 'Dir::Etc::SourceList "/run/secrets/apt.sources"', 'Dir::Etc::SourceParts "-"']
    files = {
        "apt.conf": "".join(f"{line};\n" for line in apt),
        "apt.sources": f"Types: deb\nURIs: {cache.mirror()}\nSuites: {suite}\nComponents: main\n",
    }
    for name, text in files.items():
        (place / name).write_text(text)
    return [f"--secret=id={name},src={place / name}" for name in files]


def health_command(healthcheck: dict[str, Any]) -> tuple[str, ...]:
    """The command of a health check, of an image or of a service."""
    kind, *command = healthcheck.get("Test") or healthcheck["test"]
    return tuple(command) if kind == "CMD" else ("/bin/sh", "-c", shlex.join(command))


def archive(image: Image, into: Path, seconds: int) -> Path:
    """Write an image into a folder as an OCI archive with one layer, and return its path.

    The same files give the same bytes: ``seconds``, since the epoch, is the time of all files but Python's sources,
    whose time is in their compiled files.
    """
    created = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for path in sorted(set(image.files.rglob("*")) - {image.files / "etc/hostname"}):  # mmdebstrap's, of this host
            member = tar.gettarinfo(path, str(path.relative_to(image.files)))
            member.uname = member.gname = ""
            member.mtime = seconds if path.suffix != ".py" else int(member.mtime)
            if member.isreg():
                with path.open("rb") as file:
                    tar.addfile(member, file)
            else:
                tar.addfile(member)
    labels = {name: text for name, text in image.config["Labels"].items() if name.startswith("org.opencontainers")}
    labels |= {"org.opencontainers.image.version": __version__}
    del labels["org.opencontainers.image.base.name"]  # The base is made of Debian's packages, not pulled.
    config = {
        "created": created,
        "architecture": cache.run("dpkg", "--print-architecture").strip(),
        "os": "linux",
        "config": {name: image.config[name] for name in FIELDS if image.config.get(name)} | {"Labels": labels},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer.getbuffer()).hexdigest()}"]},
    }
    blobs = {}

    def blob(kind: str, content: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = content
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(content)}

    manifest = {
        "schemaVersion": 2,
        "config": blob("config.v1+json", json.dumps(config).encode()),
        "layers": [blob("layer.v1.tar+gzip", gzip.compress(layer.getbuffer(), 6, mtime=0))],
    }
    name = {"annotations": {"org.opencontainers.image.ref.name": f"table-consul:{__version__}"}}
    index = {"schemaVersion": 2, "manifests": [blob("manifest.v1+json", json.dumps(manifest).encode()) | name]}
    whole = into / f"table-consul-{__version__}-image.tar"
    with tarfile.open(whole, "w") as tar:
        parts = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}', "index.json": json.dumps(index).encode()} | blobs
        for path, content in parts.items():
            member = tarfile.TarInfo(path)
            member.size, member.mtime = len(content), seconds
            tar.addfile(member, io.BytesIO(content))
    return whole


def _release_date() -> int:
    """The time of ``debian/changelog``, in seconds since the epoch."""
    found = re.search(r"^ -- .*>  (.*)$", (CHECKOUT / "debian/changelog").read_text(), re.MULTILINE)
    assert found
    return int(parsedate_to_datetime(found[1]).timestamp())


if __name__ == "__main__":
    try:
        print(archive(built(), Path(sys.argv[1]), _release_date()))
    except cache.Unavailable as error:
        print(f"the image is not built: {error}")
