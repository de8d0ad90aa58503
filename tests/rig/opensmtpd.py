"""A real smtpd on a disposable layer above a root.

Every smtpd runs on its own copy-on-write layer, in separate mount and process namespaces. This keeps tests independent,
leaves no mounts behind, and ends all processes with the first of the namespace.
"""

from __future__ import annotations

import contextlib
import email
import email.policy
import functools
import mailbox
import os
import re
import shutil
import signal
import smtplib
import socket
import ssl
import subprocess
import tempfile
from email.message import EmailMessage
from pathlib import Path
from typing import TYPE_CHECKING

from tests.rig import cache, package
from tests.rig.consul import free_ports
from tests.rig.root import File, Root
from tests.rig.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Self

LIBEXEC = "usr/libexec/opensmtpd"
CONFIG = "/etc/mail/table-consul.toml"
START_SECONDS = 20.0

LAUNCHER = """\
#!/usr/bin/python3 -I
import sys
sys.path[:0] = ["/opt/table-consul/own", "/opt/table-consul/dependencies"]
from table_consul.cli import main
sys.exit(main())
"""

# $1 the root, $2 the folder of this instance, $3 and $4 what the launcher imports; then smtpd's arguments.
ENTER = """\
set -e
root=$1 base=$2 own=$3 dependencies=$4; shift 4
if [ -d "$base/upper" ]; then
    mount -t overlay overlay -o "lowerdir=$root,upperdir=$base/upper,workdir=$base/work" "$base/root"
fi
mount --rbind /dev "$base/root/dev"
mount -t proc proc "$base/root/proc"
mkdir -p "$base/root/opt/table-consul/own" "$base/root/opt/table-consul/dependencies"
mount --bind "$own" "$base/root/opt/table-consul/own"
mount --bind "$dependencies" "$base/root/opt/table-consul/dependencies"
chroot "$base/root" smtpd "$@" &
wait $!
"""


@functools.cache
def _overlays() -> bool:
    """Whether this kernel supports a copy-on-write layer over the folder of temporary files."""
    with tempfile.TemporaryDirectory() as name:
        for part in ("lower", "upper", "work", "root"):
            (Path(name) / part).mkdir()
        options = f"lowerdir={name}/lower,upperdir={name}/upper,workdir={name}/work"
        command = ("unshare", "--mount", "mount", "-t", "overlay", "overlay", "-o", options, f"{name}/root")
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


class Smtpd:
    """An smtpd as a context manager, which starts it and waits until it answers on ``port``.

    Args:
        root: the OpenSMTPD.
        conf: the text of smtpd.conf; ``listen on 127.0.0.1 port $smtp_port`` gets the port from a macro put before it.
        files: more files by absolute path, such as ``CONFIG``.
        backend: a program in place of table-consul, for tests of the rig itself.
        environment: more variables for smtpd, which the backend inherits.
    """

    def __init__(
        self,
        root: Root,
        conf: str,
        files: Mapping[str, File | str | bytes] | None = None,
        *,
        backend: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.root = root
        (self.port,) = free_ports(1)
        self.place = Path(tempfile.mkdtemp(prefix="table-consul-smtpd-"))
        self.place.chmod(0o755)
        self._process: subprocess.Popen[bytes] | None = None
        self._environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", **(environment or {})}
        (self.place / "root").mkdir()
        if _overlays():
            (self.place / "work").mkdir()
            (self.place / "upper").mkdir(mode=0o755)
            self._tree = self.place / "upper"
        else:
            self._tree = self.place / "root"
            cache.run("cp", "-a", "--reflink=auto", f"{root.path}/.", self._tree)
        self._tables = len(re.findall(r'^\s*table\s+\S+\s+"?consul\b', conf, re.MULTILINE))
        self.write("/etc/smtpd.conf", f'smtp_port = "{self.port}"\n{conf}')
        self.write(f"/{LIBEXEC}/table-consul", File(backend or LAUNCHER, 0o755))
        for path, file in (files or {}).items():
            self.write(path, file)

    def write(self, path: str, file: File | str | bytes) -> None:
        """Write a file into its tree, atomically, also while smtpd runs."""
        wanted = file if isinstance(file, File) else File(file)
        target = self._running_tree / path.lstrip("/")
        for folder in reversed(target.relative_to(self._running_tree).parents[:-1]):
            if not (self._running_tree / folder).exists():
                (self._running_tree / folder).mkdir()
                (self._running_tree / folder).chmod(0o755)
                with contextlib.suppress(FileNotFoundError):
                    shutil.copystat(self.root.path / folder, self._running_tree / folder)
        beside = target.with_name(target.name + ".new")
        beside.write_bytes(wanted.content.encode() if isinstance(wanted.content, str) else wanted.content)
        os.chown(beside, self.root.accounts[wanted.owner][0], self.root.accounts[wanted.group][1])
        beside.chmod(wanted.mode)
        beside.rename(target)

    @property
    def _running_tree(self) -> Path:
        # Writing below a mounted layer is undefined; through the root of one of its processes it is an ordinary write.
        main = self._main_pid() if self._process else None
        return Path(f"/proc/{main}/root") if main else self._tree

    def start(self, *, trace: str = "lookup") -> None:
        """Start, or restart on the existing tree. Returns once the port answers.

        Raises:
            AssertionError: it exits or does not answer; with its log.
        """
        assert not self._process, "it is running"
        own, dependencies = self._imported()
        namespaces = ("unshare", "--mount", "--pid", "--fork", "--kill-child")
        places = map(str, (self.root.path, self.place, own, dependencies))
        arguments = ("-d", "-f", "/etc/smtpd.conf", *(("-T", trace) if trace else ()))
        with (self.place / "log").open("ab") as log:
            self._process = subprocess.Popen(
                (*cache.DIES_WITH_US, *namespaces, "sh", "-c", ENTER, "enter", *places, *arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
            )

        def answers() -> bool:
            assert self._process
            assert self._process.poll() is None, f"smtpd ended with {self._process.returncode}:\n{self.log}"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                # smtpd listens before its children have become backends.
                return len(self.backends) == self._tables
            return False

        wait_for(answers, START_SECONDS, lambda: f"smtpd does not answer:\n{self.log}")

    def _imported(self) -> tuple[Path, Path]:
        """The two folders that the launcher imports from: the project and its requirements."""
        return package.unpacked(), package.dependencies(self.root.python)

    def stop(self) -> None:
        """Stop smtpd, and wait for the end of all its processes."""
        if process := self._process:
            if main := self._main_pid():
                os.kill(main, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
            process.kill()
            process.wait()
            self._process = None

    def close(self) -> None:
        """Stop it and remove its tree; its mounts end with the namespace."""
        self.stop()
        shutil.rmtree(self.place, ignore_errors=True)

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

    @property
    def log(self) -> str:
        """The output of smtpd and its children so far, over all its starts."""
        path = self.place / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def pids(self) -> dict[int, str]:
        """The command lines of smtpd and of its backends by process id, without those of deliveries."""
        main = self._main_pid()
        if not main:
            return {}
        lines = {pid: _command_line(pid) for pid in _descendants(main)}
        # A child for a delivery is a copy of smtpd's first process until it executes the delivery agent.
        lasting = {pid: line for pid, line in lines.items() if line.startswith("smtpd: ") or "/table-consul" in line}
        return {main: _command_line(main), **lasting}

    @property
    def backends(self) -> list[int]:
        """The process ids of its table-consul children."""
        return [pid for pid, line in self.pids.items() if "/table-consul" in line]

    def exists(self, path: str) -> bool:
        """Whether smtpd or a delivery has created this path."""
        return (self._tree / path.lstrip("/")).exists()

    @property
    def alive(self) -> bool:
        """Whether smtpd's own processes run, including the one that reads tables."""
        return bool(self._process) and sum("smtpd" in line for line in self.pids.values()) >= 7

    def _main_pid(self) -> int | None:
        assert self._process
        # unshare, the shell that is the first process of the namespace, smtpd.
        for pid in _descendants(self._process.pid):
            if _command_line(pid).startswith(("smtpd", "/usr/sbin/smtpd")):
                return pid
        return None

    def smtpctl(self, *arguments: str) -> str:
        """The output of ``smtpctl``, as by `run`."""
        return self.run("smtpctl", *arguments)

    def run(self, *command: str) -> str:
        """The output of a command, both streams, run as root beside smtpd.

        Raises:
            CalledProcessError: it failed; ``output`` holds its output.
        """
        enter = ("nsenter", "--target", str(self._main_pid()), "--mount", "--pid", "--root", "--wd")
        done = subprocess.run(
            (*enter, *command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=30,
            check=False,
        )
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, done.args, done.stdout)
        return done.stdout

    def queue(self) -> list[str]:
        """The envelopes in the queue, a line of ``smtpctl show queue`` each."""
        return self.smtpctl("show", "queue").splitlines()

    def mails(self, user: str) -> list[EmailMessage]:
        """The mails delivered to a user, in ``~/Maildir``, or for root in ``/var/mail``."""
        home = "root" if user == "root" else f"home/{user}"
        found = [path.read_bytes() for path in sorted((self._tree / home / "Maildir/new").glob("*"))]
        spool = self._tree / "var/mail" / user
        if spool.exists():
            with contextlib.closing(mailbox.mbox(spool, create=False)) as box:
                found += [message.as_bytes() for message in box]
        return [email.message_from_bytes(text, policy=email.policy.default) for text in found]

    def subjects(self, user: str) -> list[str]:
        """The subjects of the mails delivered to a user."""
        return [str(message["Subject"]) for message in self.mails(user)]

    def wait_for_mail(self, user: str, subject: str, timeout: float = 10.0) -> EmailMessage:
        """The mail with this subject, as soon as it is delivered to the user.

        Raises:
            AssertionError: it is not delivered within ``timeout`` seconds; with the log.
        """

        def has_come() -> bool:
            return subject in self.subjects(user)

        wait_for(has_come, timeout, lambda: f"no mail {subject!r} for {user} within {timeout} s:\n{self.log}")
        return next(message for message in self.mails(user) if message["Subject"] == subject)

    def wait_for_log(self, pattern: str, timeout: float = 10.0) -> re.Match[str]:
        """The first match of a pattern in the log, as soon as it appears."""
        wait_for(lambda: bool(re.search(pattern, self.log)), timeout, lambda: f"no {pattern!r} in the log:\n{self.log}")
        found = re.search(pattern, self.log)
        assert found
        return found

    def send(
        self,
        *recipients: str,
        sender: str = "alice@remote.example",
        subject: str = "hello",
        helo: str = "remote.example",
        auth: tuple[str, str] | None = None,
        starttls: bool = False,
        source: str = "127.0.0.1",
        timeout: float = 60.0,
    ) -> dict[str, tuple[int, str]]:
        """The final reply for each recipient: to MAIL or RCPT if refused, otherwise to the message.

        Raises:
            smtplib.SMTPAuthenticationError: the password is rejected.
        """
        with smtplib.SMTP("127.0.0.1", self.port, helo, timeout, (source, 0)) as session:
            session.ehlo(helo)
            if starttls:
                session.starttls(context=_trusting())
                session.ehlo(helo)
            if auth:
                session.login(*auth)
            code, text = session.mail(sender)
            if code != 250:
                return dict.fromkeys(recipients, (code, text.decode()))
            outcomes = {}
            for recipient in recipients:
                code, text = session.rcpt(recipient)
                outcomes[recipient] = (code, text.decode())
            accepted = [recipient for recipient, (code, _) in outcomes.items() if code == 250]
            if accepted:
                head = f"From: <{sender}>\r\nTo: {', '.join(recipients)}\r\nSubject: {subject}\r\n"
                code, text = session.data(f"{head}\r\nHello.\r\n")
                outcomes.update(dict.fromkeys(accepted, (code, text.decode())))
            return outcomes


def _trusting() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _descendants(ancestor: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found: list[int] = []
    waiting = [ancestor]
    while waiting:
        direct = sorted(children.get(waiting.pop(0), []))
        found += direct
        waiting += direct
    return found


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""
