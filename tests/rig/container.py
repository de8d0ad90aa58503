"""Containers of an image without a container engine, in namespaces that are set up as by Docker.

The first process of a container is the first of its process namespace, which gives signals the same effect as in
Docker. Its network has only a loopback interface, on which neighbours can be started; /dev has the devices of Docker;
and root has the given capabilities only.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shlex
import shutil
import signal
import smtplib
import socket
import struct
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.rig import cache
from tests.rig.image import health_command
from tests.rig.opensmtpd import _overlays
from tests.rig.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import Any, Self

    from tests.rig.image import Image

# moby: oci/caps/defaults.go, DefaultCapabilities
DOCKER_CAPABILITIES = (
    *("CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP"),
    *("NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE"),
)
DEVICES = ("null", "zero", "full", "random", "urandom")
HOSTS = "127.0.0.1 localhost consul\n"
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1


class Container:
    """A container as a context manager, which starts its first process.

    Args:
        arguments: the arguments after the name of the image.
        environment: more variables than those of the image.
        service: the service of compose.yaml that describes it.
        files: files of the host by their path in the container, mounted read-only.
        volumes: a folder for the volumes, which other containers may share.
        user: the user that starts it, if not that of the image.
    """

    def __init__(
        self,
        image: Image,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        service: Mapping[str, Any] | None = None,
        files: Mapping[str, Path] | None = None,
        volumes: Path | None = None,
        user: str | None = None,
    ) -> None:
        self._image = image
        self._service = service or {}
        self.place = Path(tempfile.mkdtemp(prefix="table-consul-container-"))
        self.place.chmod(0o755)
        self.volumes = volumes or self.place / "volumes"
        self._files = dict(files or {})
        self._arguments = (*image.config["Entrypoint"], *(arguments or image.config["Cmd"] or ()))
        given = dict(variable.split("=", 1) for variable in image.config["Env"])
        self.environment = {**given, **self._service.get("environment", {}), **(environment or {})}
        self._user = user or image.config["User"]
        self._outer: subprocess.Popen[bytes] | None = None
        self._neighbours: list[subprocess.Popen[bytes]] = []

    # Start and end

    def create(self) -> None:
        """Create its namespaces and its network, without starting a process of the image."""
        namespaces = ("unshare", "--mount", "--pid", "--net", "--uts", "--ipc", "--fork", "--kill-child")
        with (self.place / "log").open("ab") as log:
            self._outer = subprocess.Popen(
                (*cache.DIES_WITH_US, *namespaces, "sh", "-ec", self._script()),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self.environment,
            )
        wait_for(lambda: self.pid is not None, 10, lambda: f"no namespaces:\n{self.log}")
        with self.network(), socket.socket() as any_socket:
            fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))

    def start(self) -> None:
        """Start its first process. Returns once it runs, or has already ended."""
        assert self._outer
        assert self._outer.stdin
        self._outer.stdin.close()

        def is_the_image_s() -> bool:
            with contextlib.suppress(OSError):
                return not Path(f"/proc/{self.pid}/cmdline").read_bytes().startswith((b"sh\0-ec", b"chroot\0"))
            return not self.running

        wait_for(is_the_image_s, 30, lambda: f"it does not start:\n{self.log}")

    def _script(self) -> str:
        root = self.place / "root"
        root.mkdir()
        lines = ["mount --make-rprivate /"]
        if _overlays():
            for part in ("upper", "work"):
                (self.place / part).mkdir()
            layers = f"lowerdir={self._image.files},upperdir={self.place}/upper,workdir={self.place}/work"
            lines.append(f"mount -t overlay overlay -o {layers} {root}")
        else:
            lines += [f"cp -a --reflink=auto {self._image.files}/. {root}", f"mount --bind {root} {root}"]

        lines += [f"mount -t proc proc {root}/proc", f"mount -t tmpfs -o nosuid,mode=755 tmpfs {root}/dev"]
        lines += [f": >{root}/dev/{name}; mount --bind /dev/{name} {root}/dev/{name}" for name in DEVICES]
        lines += [f"ln -s /proc/self/fd/{number} {root}/dev/{name}" for name, number in (("stdout", 1), ("stderr", 2))]
        hostname = self._service.get("hostname", "3f2a9c1b7700")
        (self.place / "hosts").write_text(HOSTS + f"127.0.0.1 {hostname}\n")
        (self.place / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
        theirs = {f"/etc/{name}": self.place / name for name in ("hosts", "resolv.conf")}
        for target, source in (theirs | self._files).items():
            lines += [
                f"mkdir -p {root}{Path(target).parent}; [ -e {root}{target} ] || : >{root}{target}",
                f"mount --bind {source} {root}{target}; mount -o remount,bind,ro {root}{target}",
            ]
        for target in self._image.config["Volumes"] or {}:
            kept = self.volume(target)
            if not kept.exists():
                kept.parent.mkdir(parents=True, exist_ok=True)
                cache.run("cp", "-a", f"{self._image.files}{target}", kept)
            lines.append(f"mount --bind {kept} {root}{target}")
        lines += [
            f"mount -t tmpfs -o nosuid,nodev,noexec tmpfs {root}{each}" for each in self._service.get("tmpfs", ())
        ]
        if self._service.get("read_only"):
            lines.append(f"mount -o remount,bind,ro {root}")
        lines += [f"hostname {hostname}", "read -r begin || true"]
        lines.append(f"exec chroot {root} {shlex.join((*self._privileges(self._user), *self._arguments))} </dev/null")
        return "\n".join(lines)

    def _privileges(self, user: str) -> tuple[str, ...]:
        """The command that drops the privileges the container lacks and then executes the following one."""
        kept = () if "ALL" in self._service.get("cap_drop", ()) else DOCKER_CAPABILITIES
        names = [f"+{name.lower()}" for name in (*kept, *self._service.get("cap_add", ()))]
        options = [f"--bounding-set=-all,{','.join(names)}"]
        if "no-new-privileges:true" in self._service.get("security_opt", ()):
            options.append("--no-new-privs")
        if user != "root":
            options += [f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        return ("setpriv", *options, "--")

    def stop(self, seconds: float = 10) -> tuple[int, float]:
        """Stop like ``docker stop``; the exit status of its first process, and the seconds until its end.

        Raises:
            AssertionError: it has not ended, and Docker would have killed it.
        """
        assert self._outer
        assert self.pid
        began = time.monotonic()
        os.kill(self.pid, getattr(signal, self._image.config["StopSignal"]))
        try:
            return self._outer.wait(seconds), time.monotonic() - began
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {seconds} s:\n{self.log}") from None

    def wait(self, seconds: float = 30) -> int:
        """Wait for the end of its first process; its exit status."""
        assert self._outer
        return self._outer.wait(seconds)

    def close(self) -> None:
        """End it and its neighbours, and remove its files, except volumes that were passed in."""
        for process in (*self._neighbours, *([self._outer] if self._outer else ())):
            process.kill()
            process.wait()
            if process.stdin:
                process.stdin.close()
        shutil.rmtree(self.place, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.create()
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Observation

    @property
    def pid(self) -> int | None:
        """The process id of its first process on the host."""
        assert self._outer
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                return int(child)
        return None

    @property
    def running(self) -> bool:
        """Whether its first process runs."""
        return bool(self._outer) and self._outer.poll() is None

    @property
    def log(self) -> str:
        """The output of ``docker logs``."""
        path = self.place / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def volume(self, target: str) -> Path:
        """The folder on the host that is mounted at this path."""
        return self.volumes / target.strip("/").replace("/", "-")

    def processes(self) -> dict[int, str]:
        """The command lines of its processes, by process id in the container."""
        listed = self.exec(
            *("sh", "-c", 'for p in /proc/[0-9]*; do printf "%s " ${p#/proc/}; tr "\\0" " " <$p/cmdline; echo; done')
        ).stdout
        rows = [line.partition(" ") for line in listed.splitlines()]
        return {int(pid): command for pid, _, command in rows if command and "/proc/[0-9]" not in command}

    def exec_command(self, *command: str) -> tuple[str, ...]:
        """The command that runs another in the container like ``docker exec``; start it with `environment`."""
        enter = (
            "nsenter",
            f"--target={self.pid}",
            *("--mount", "--pid", "--net", "--uts", "--ipc", "--root", "--wd"),
        )
        return (*enter, *self._privileges("root"), *command)

    def exec(self, *command: str, stdin: str = "", timeout: float = 30) -> subprocess.CompletedProcess[str]:
        """Run a command in the container like ``docker exec``; its status, and both its streams."""
        return subprocess.run(
            self.exec_command(*command),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env=self.environment,
        )

    def health(self) -> tuple[bool, str]:
        """Whether the health check of the image succeeds in time, and its output."""
        check = self._image.config["Healthcheck"]
        try:
            done = self.exec(*health_command(check), timeout=check["Timeout"] / 1e9)
        except subprocess.TimeoutExpired:
            return False, "timed out"
        return done.returncode == 0, (done.stdout + done.stderr).strip()

    def wait_for_health(self, wanted: bool = True, said: str = "", seconds: float = 30) -> str:
        """The output of the health check, as soon as its result is the wanted one and the output contains the text."""
        came: list[tuple[bool, str]] = []

        def comes_out() -> bool:
            came[:] = [self.health()]
            return came[0][0] == wanted and said in came[0][1]

        wait_for(comes_out, seconds, lambda: f"the health check still says {came[0][1]!r}:\n{self.log}")
        return came[0][1]

    # Surroundings

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """Within the block, new sockets belong to the container's network, and remain there."""
        setns = ctypes.CDLL(None, use_errno=True).setns
        with open("/proc/self/ns/net", "rb") as ours, open(f"/proc/{self.pid}/ns/net", "rb") as its:
            assert setns(its.fileno(), 0) == 0, os.strerror(ctypes.get_errno())
            try:
                yield
            finally:
                assert setns(ours.fileno(), 0) == 0, os.strerror(ctypes.get_errno())

    def beside_command(self, *command: str | Path) -> tuple[str, ...]:
        """The command that runs a program of the host in its network."""
        return ("nsenter", f"--net=/proc/{self.pid}/ns/net", *map(str, command))

    def beside(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """The output of a program of the host, run in its network."""
        return subprocess.run(self.beside_command(*command), capture_output=True, text=True, timeout=30, check=False)

    def neighbour(self, *command: str | Path) -> subprocess.Popen[bytes]:
        """Start a program of the host in its network, which ends with the container."""
        with (self.place / "neighbours").open("ab") as log:
            started = subprocess.Popen(
                (*cache.DIES_WITH_US, *self.beside_command(*command)), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._neighbours.append(started)
        return started

    def send(self, recipient: str, subject: str, source: str = "127.0.0.1") -> int:
        """The last reply code of smtpd for a mail to the recipient, sent over its port."""
        with self.network():
            session = smtplib.SMTP("127.0.0.1", 25, "remote.example", 30, (source, 0))
        with session:
            session.ehlo()
            code, _ = session.mail("alice@remote.example")
            if code == 250:
                code, _ = session.rcpt(recipient)
            if code == 250:
                code, _ = session.data(f"From: <alice@remote.example>\r\nSubject: {subject}\r\n\r\nHello.\r\n")
            return code

    def subjects(self, mailbox: str) -> Sequence[str]:
        """The subjects of the mails in a mailbox of the mail volume."""
        texts = [path.read_text() for path in sorted((self.volume("/var/vmail") / mailbox / "Maildir/new").glob("*"))]
        return [line[9:] for text in texts for line in text.splitlines() if line.startswith("Subject: ")]
