"""The demo of the project: ``make demo``.

Mail to root goes to root; a key is put into Consul; mail to root goes to gilles; smtpd ran on. With a real Consul and a
real OpenSMTPD where they can be had, else by speaking to the program as smtpd would. Exits 1 when anything is not as it
should be.
"""

from __future__ import annotations

import argparse
import base64
import json
import select
import socket
import subprocess
import sys
import tempfile
import time
from io import RawIOBase
from pathlib import Path

from tests.rig import cache, package
from tests.rig.consul import ConsulAgent, consul_binary, consul_version
from tests.rig.opensmtpd import CONFIG, Smtpd
from tests.rig.root import SUITES, File, Root, require_root

RELEASE = "7.9"
ANSWER_SECONDS = 10.0
SMTPD_CONF = """\
table consul consul:/etc/mail/table-consul.toml
listen on 127.0.0.1 port $smtp_port
action "local" mbox alias <consul>
match from any for local action "local"
"""
KEY, VALUE = "consul/alias/root", "gilles"


class Unexpected(Exception):
    """The demo had an unexpected result."""


def say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


def step(number: int, title: str) -> None:
    say("", f"{number}. {title}")


def expect(what: str, wanted: object, came: object) -> None:
    """Print the result, and raise if it is not the wanted one."""
    verdict = "as it should be" if came == wanted else f"EXPECTED {wanted}"
    say(f"   {what}: {came}   [{verdict}]")
    if came != wanted:
        raise Unexpected(what)


def with_real_parts() -> None:
    """Run the demo with a real Consul and a real OpenSMTPD.

    Raises:
        Unavailable: one of them is not available.
        Unexpected: a result differs.
    """
    require_root()
    say(
        "Getting a Consul and an OpenSMTPD. Debian's packages of both are downloaded once, which takes a minute;",
        f"they are kept in {cache.folder()}.",
    )
    root = Root(RELEASE)
    consul_binary()
    package.dependencies(root.python)
    with ConsulAgent() as consul:
        config = f'[consul]\naddress = "http://{consul.address}"\n'
        with Smtpd(root, SMTPD_CONF, {CONFIG: File(config, 0o640, "root", "opensmtpd")}) as smtpd:
            say(
                "",
                "Real parts:",
                f"   Consul {'.'.join(map(str, consul_version()))}, a server at {consul.address}",
                f"   OpenSMTPD {root.version} of Debian {SUITES[RELEASE]}, in its own root, at 127.0.0.1:{smtpd.port}",
                f"   {package.wheel().name}, run by smtpd with Python {root.python}",
                "",
                f"{CONFIG}:",
                *(f"   {line}" for line in config.splitlines()),
                "/etc/smtpd.conf:",
                *(f"   {line}" for line in SMTPD_CONF.replace("$smtp_port", str(smtpd.port)).splitlines()),
            )
            try:
                _play(consul, smtpd)
            except (Unexpected, AssertionError, OSError):
                say("", "The end of smtpd's log:", *(f"   {line}" for line in smtpd.log.splitlines()[-12:]))
                raise


def _play(consul: ConsulAgent, smtpd: Smtpd) -> None:
    before = smtpd.pids
    say("", "smtpd and its children:", *(f"   {pid} {line}" for pid, line in before.items()))

    step(1, "Mail to root, with nothing in Consul")
    _post(smtpd, "before", "root", "none")

    step(2, f"An operator puts a key into Consul: consul kv put {KEY} {VALUE}")
    consul.kv_put(KEY, VALUE)
    expect(f"consul kv get {KEY}", VALUE, (consul.kv_get(KEY) or b"").decode())
    time.sleep(0.2)  # A mail within milliseconds of an edit could be faster than the mirror.

    step(3, "Mail to root again")
    _post(smtpd, "after", VALUE, f'"{VALUE}"')

    step(4, "Was smtpd restarted in between?")
    expect("process ids", " ".join(map(str, before)), " ".join(map(str, smtpd.pids)))


def _post(smtpd: Smtpd, subject: str, user: str, answer: str) -> None:
    read = len(smtpd.log)
    expect("SMTP reply", 250, smtpd.send("root@localhost", subject=subject)["root@localhost"][0])
    smtpd.wait_for_log(rf'(?s)\A.{{{read}}}.*result="?\w+', ANSWER_SECONDS)
    lookups = [line for line in smtpd.log[read:].splitlines() if "proc:consul" in line]
    say("   smtpd asked table-consul:", *(f"      {line.removeprefix('lookup: ')}" for line in lookups))
    expect("answer for root", answer, lookups[0].rpartition(" -> ")[2] if lookups else "not asked")
    people = [name for name in ("root", VALUE) if subject in smtpd.subjects(name)]
    expect("delivered to", user, " ".join(people) or "nobody")


def with_a_socket() -> None:
    """Run the same dialogue over the socket of the program, with a file in the format of ``consul kv export``.

    Raises:
        Unexpected: a result differs.
    """
    with tempfile.TemporaryDirectory(prefix="table-consul-demo-") as name:
        export, config = Path(name) / "export.json", Path(name) / "table-consul.toml"
        _export(export, {})
        config.write_text(f'[consul]\naddress = "file://{export}"\n')
        say(
            "",
            "Real parts: table-consul. This program plays smtpd's part; a file in the format of `consul kv export`",
            f"plays Consul's: {export}",
        )
        ours, childs = socket.socketpair()
        command = [sys.executable, "-m", "table_consul", str(config)]
        with ours:
            with childs:
                child = subprocess.Popen(command, stdin=childs.fileno(), stdout=childs.fileno())
            try:
                with ours.makefile("rb", buffering=0) as wire:
                    _converse(ours, wire, child, export)
            finally:
                ours.shutdown(socket.SHUT_WR)
                try:
                    child.wait(ANSWER_SECONDS)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
            expect("exit status at end of file", 0, child.returncode)


def _converse(ours: socket.socket, wire: RawIOBase, child: subprocess.Popen[bytes], export: Path) -> None:
    def ask(*lines: str) -> None:
        say(*(f"   smtpd        > {line}" for line in lines))
        ours.sendall("".join(f"{line}\n" for line in lines).encode())

    def answer() -> str:
        if not select.select([wire], [], [], ANSWER_SECONDS)[0]:
            raise Unexpected(f"no answer within {ANSWER_SECONDS} s")
        line = wire.readline().decode().rstrip("\n")
        say(f"   table-consul > {line}")
        if not line:
            raise Unexpected(f"table-consul ended with {child.wait()}")
        return line

    step(1, "smtpd starts the program and says who it is")
    ask(
        "config|smtpd-version|7.9.0-portable",
        "config|protocol|0.1",
        "config|tablename|consul",
        "config|ready",
    )
    registered = []
    while (line := answer()) != "register|ready":
        registered.append(line.removeprefix("register|"))
    expect("it serves aliases", "yes", "yes" if "alias" in registered else "no")

    step(2, "Mail to root, with nothing in Consul: who is root?")
    ask("table|0.1|1590631921.294411|consul|lookup|alias|00000001|root")
    expect("answer", "lookup-result|00000001|not-found", answer())

    step(3, f"An operator puts a key into Consul: {KEY} = {VALUE}")
    _export(export, {KEY: VALUE})
    say(*(f"   {line}" for line in export.read_text().splitlines()))
    time.sleep(0.2)

    step(4, "Mail to root again: who is root?")
    ask("table|0.1|1590631922.294411|consul|lookup|alias|00000002|root")
    expect("answer", f"lookup-result|00000002|found|{VALUE}", answer())
    expect("still the same process", "yes", "yes" if child.poll() is None else "no")
    say("   smtpd        > end of file")


def _export(path: Path, entries: dict[str, str]) -> None:
    rows = [
        {"key": key, "flags": 0, "value": base64.b64encode(value.encode()).decode()} for key, value in entries.items()
    ]
    written = path.with_suffix(".new")
    written.write_text(json.dumps(rows, indent=2) + "\n")
    written.rename(path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Mail to root goes where Consul says. Exits 1 if it does not.")
    parser.add_argument("--socket", action="store_true", help="without Consul and OpenSMTPD, even if there are any")
    options = parser.parse_args()
    try:
        if not options.socket:
            try:
                with_real_parts()
            except cache.Unavailable as reason:
                say("", f"Not with real parts: {reason}")
                options.socket = True
        if options.socket:
            with_a_socket()
    except (Unexpected, AssertionError, OSError) as error:
        say("", f"FAILED: {error}")
        return 1
    say("", "Mail went where Consul said, and nothing was restarted.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
