"""Records dialogues of real smtpds that speak imsg with table-consul into ``tests/transcripts/imsg``.

``python -m tests.e2e.record_imsg``, as root. Each line of a transcript is what one read or one write carried, in
hexadecimal digits: ``>`` from smtpd, ``<`` to smtpd; ``#`` begins a comment.
"""

from __future__ import annotations

import contextlib
import smtplib
import sys
import tempfile
from pathlib import Path

from tests.dialogue import ENTRIES, write_source
from tests.e2e.programs import Programs
from tests.rig.opensmtpd import CONFIG, LAUNCHER, LIBEXEC
from tests.rig.root import File, Root, certificate
from tests.rig.sink import Sink
from tests.rig.waiting import wait_for

RELEASES = ("6.8", "7.4")
FOLDER = Path(__file__).parents[1] / "transcripts" / "imsg"
RECORD = "/tmp/record"

# Relays between smtpd and the program, and records every message.
TEE = f"""\
#!/usr/bin/python3 -I
import os, select, socket, subprocess, sys
ours, theirs = socket.socketpair()
subprocess.Popen(["/{LIBEXEC}/table-consul.real", *sys.argv[1:]], stdin=theirs, stdout=subprocess.DEVNULL)
theirs.close()
with open("{RECORD}", "w") as record:
    ends = {{0: (ours.fileno(), ">"), ours.fileno(): (0, "<")}}
    while True:
        for end in select.select(list(ends), [], [])[0]:
            data = os.read(end, 65536)
            if not data:
                sys.exit()
            other, mark = ends[end]
            print(mark, data.hex(), file=record, flush=True)
            os.write(other, data)
"""
CONF = """
pki "mail.example.org" cert "/etc/ssl/mail.example.org.crt"
pki "mail.example.org" key "/etc/ssl/mail.example.org.key"
table consul consul:/etc/mail/table-consul.toml
listen on 127.0.0.1 port $smtp_port tls pki "mail.example.org" auth-optional <consul>
action "local" mbox alias <consul>
action "out" relay host "smtp+notls://{sink}" src <consul> helo-src <consul>
match from src <consul> mail-from <consul> for domain <consul> action "local"
match from any for local action "local"
match from any for any action "out"
"""
MORE = {
    "consul/addrname/192.0.2.1": b"mx1.example.org",
    "consul/netaddr/127.0.0.0/30": b"",
    "consul/alias/gilles@example.org": b"gilles",
}


def record(release: str, folder: Path) -> str:
    """The conversation of an smtpd of this release, from start to end."""
    root = Root(release)
    files = {
        "/etc/mail/export.json": write_source(folder, ENTRIES | MORE).read_bytes(),
        CONFIG: '[consul]\naddress = "file:///etc/mail/export.json"\n',
        RECORD: File("", 0o666),
    }
    programs = {"table-consul": TEE, "table-consul.real": LAUNCHER}
    with Sink() as sink:
        conf = CONF.format(sink=f"{sink.address}:{sink.port}")
        with Programs(root, conf, files | certificate(root), programs, processes=2) as server:
            server.send("root@localhost", "staff@localhost", "nobody-of-this-name@localhost", subject="local")
            server.send("gilles@example.org", sender="gilles@poolp.org")
            server.send("gilles@example.org", sender="eric@poolp.org", source="127.0.0.9")
            server.send("command@localhost")
            server.send("bob@example.com", subject="out")
            with contextlib.suppress(smtplib.SMTPAuthenticationError):
                server.send("root@localhost", auth=("gilles", "wrong"), starttls=True)
            server.smtpctl("update", "table", "consul")
            wait_for(lambda: "fetch" in server.log, 20, lambda: server.log)
            recorded = server.read(RECORD)
    return (
        f"# OpenSMTPD {root.version}, {sys.byteorder} endian, answered from tests.dialogue.ENTRIES | MORE\n{recorded}"
    )


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for release in RELEASES:
        with tempfile.TemporaryDirectory() as name:
            (FOLDER / f"smtpd-{release}.hex").write_text(record(release, Path(name)))


if __name__ == "__main__":
    main()
