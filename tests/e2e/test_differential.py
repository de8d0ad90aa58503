"""Two smtpds, one with tables in files and one with the same tables in Consul, give the same replies.

``TABLE_CONSUL_SEED`` selects other tables and sessions, ``TABLE_CONSUL_SESSIONS`` their number. A failure shows the
first sessions that differ, up to the first different reply and lookup, and the entries of the tables involved.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import zip_longest
from random import Random
from subprocess import CalledProcessError
from typing import NamedTuple

import pytest

from tests.e2e import table_files
from tests.e2e.entries import LISTS, PASSWORD, RDNS, Table, tables
from tests.e2e.sessions import Client, Reply, Session, play
from tests.rig.consul import free_ports
from tests.rig.opensmtpd import CONFIG, Smtpd
from tests.rig.root import USERS, File, Root, certificate
from tests.rig.waiting import wait_for

SEED = int(os.environ.get("TABLE_CONSUL_SEED", "8"))
SESSIONS = int(os.environ.get("TABLE_CONSUL_SESSIONS", "400"))
SEEDS = range(SEED, SEED + 2)
"""Each seed generates its own tables, and runs its share of the sessions."""
DELIMITERS = dict(zip(SEEDS, "_+", strict=True))
"""Delimiters of tags; the names of `entries` have tags of both kinds."""
DEFAULTS = not os.environ.keys() & {"TABLE_CONSUL_SEED", "TABLE_CONSUL_SESSIONS"}
"""With these settings each service must have lookups that succeed and lookups that fail; other seeds may lack some."""
SHOWN = 3
"""The number of different sessions to report, because one cause makes many sessions differ."""

FILTERS = {
    "early": (
        "connect match src <far>",
        "connect match src regex <shapes>",
        "connect match rdns <names>",
        "connect match rdns regex <shapes>",
        "helo match helo <names>",
        "helo match helo regex <shapes>",
        "ehlo match helo <names>",
        "ehlo match helo regex <shapes>",
        "ehlo match rdns <mixed>",
    ),
    "late": (
        "mail-from match mail-from <writers>",
        "mail-from match mail-from regex <shapes>",
        "mail-from match auth <logins>",
        "mail-from match auth regex <shapes>",
        "rcpt-to match rcpt-to <people>",
        "rcpt-to match rcpt-to regex <shapes>",
        "rcpt-to match helo <mixed>",
        "data match mail-from <mixed>",
        "data match src <far>",
        "commit match rdns regex <mixed>",
    ),
}
LISTENERS = ("rules", *FILTERS)
RULES = (
    "from src <near> for domain <hosts>",
    "from src regex <shapes> for rcpt-to <people>",
    "! from src <near> for domain regex <patterns> mail-from <writers>",
    "from rdns <hosts> for rcpt-to regex <patterns>",
    "from rdns regex <shapes> for any rcpt-to <mixed>",
    "from mail-from <people> for domain <mixed> helo <hosts>",
    "from mail-from regex <patterns> for rcpt-to regex <shapes>",
    "from any helo regex <patterns> for domain <names>",
    "from any ! mail-from regex <mixed> for domain regex <mixed> ! helo <mixed>",
    "from auth <logins> for any",
    "from auth regex <patterns> for any",
    "from any auth <users> for domain <names>",
    "from any auth <mixed> for any",
    "from src <mixed> for domain <mixed>",
    "from any for local",
    "from src regex <mixed> for any",
    "from any ! for rcpt-to <writers>",
)
OPTIONS = ("virtual <virtuals>", "alias <aliases>", "userbase <accounts>", "alias <aliases> userbase <accounts>", "")

LOOKUP = re.compile(r'lookup: (?:match|lookup) "(.*)" as (\w+) in table \w+:(\w+) -> (.*)')
DELIVERY = re.compile(r"mda delivery evpid=(\w{8})\w{8} (from=.*) delay=\S+ (result=\S+)")


class Lookup(NamedTuple):
    key: str
    service: str
    table: str
    answer: str


class Outcome(NamedTuple):
    replies: list[Reply]
    lookups: list[Lookup]


class Twin(Smtpd):
    """One of the two smtpds."""

    def __init__(self, root: Root, conf: str, files: Mapping[str, File | str], listed: list[Table]) -> None:
        self.ports = dict(zip(LISTENERS, free_ports(len(LISTENERS)), strict=True))
        self._unusable = {(table.name, key) for table in listed for key in table.unusable}
        super().__init__(root, conf + rules(self.ports), {**files, **certificate(root), **names()})

    def outcomes(self, sessions: list[Session]) -> list[Outcome]:
        """The outcome of each session. Paused deliveries keep their lookups apart from those of sessions."""
        self.smtpctl("pause", "mda")
        outcomes = []
        with (self.place / "log").open(errors="replace") as log:
            log.read()
            for session in sessions:
                replies = play(session, self.ports)
                outcomes.append(Outcome(replies, [self._lookup(found) for found in LOOKUP.findall(log.read())]))
        return outcomes

    def _lookup(self, found: tuple[str, ...]) -> Lookup:
        lookup = Lookup(*found)
        # smtpd fails to parse such a value from a file, and table-consul returns an error; both are failures for smtpd.
        failed = lookup.answer.startswith(('"', "error: ")) and (lookup.table, lookup.key.lower()) in self._unusable
        return lookup._replace(answer="unusable") if failed else lookup

    def deliveries(self) -> tuple[list[str], list[str]]:
        """Where the waiting mails were delivered: log lines, and file by file."""
        self.smtpctl("resume", "mda")
        wait_for(lambda: not self.waiting(), 60, lambda: f"{self.waiting()} are not delivered:\n{self.log[-5000:]}")
        lines = [" ".join(found[1:]) for found in DELIVERY.findall(self.log)]
        files = []
        for path in self._tree.glob("home/*/*/new/*"):
            subject = re.search(r"^Subject: (.*)", path.read_text(errors="replace"), re.MULTILINE)
            files.append(f"{path.parts[-4]}/{path.parts[-3]}: {subject and subject[1]}")
        return sorted(lines), sorted(files)

    def waiting(self) -> list[str]:
        try:
            return self.queue()
        except CalledProcessError as failed:
            return [failed.output]


def rules(ports: dict[str, int]) -> str:
    """smtpd.conf without its tables."""
    lines = ['pki "mail.example.org" cert "/etc/ssl/mail.example.org.crt"']
    lines.append('pki "mail.example.org" key "/etc/ssl/mail.example.org.key"')
    for chain, conditions in FILTERS.items():
        for number, condition in enumerate(conditions):
            lines.append(f'filter "{chain}-{number}" phase {condition} reject "550 {chain} {number}: no"')
        members = ", ".join(f'"{chain}-{number}"' for number in range(len(conditions)))
        lines.append(f'filter "{chain}" chain {{ {members} }}')
    lines.append("listen on 127.0.0.1 port $smtp_port")
    options = 'tls pki "mail.example.org" auth-optional <users>'
    for name, port in ports.items():
        filtered = f'filter "{name}"' if name in FILTERS else ""
        lines += [f'listen on "{host}" port {port} {options} {filtered}' for host in ("127.0.0.1", "::1")]
    for number, rule in enumerate(RULES):
        lines.append(f'action "rule-{number}" maildir "~/rule-{number}" {OPTIONS[number % len(OPTIONS)]}')
        lines.append(f'match {rule} action "rule-{number}"')
    return "\n".join((*lines, ""))


def names() -> dict[str, str]:
    """The files with which smtpd resolves the addresses of clients."""
    hosts = "".join(f"{address} {name}\n" for address, name in RDNS.items())
    return {"/etc/hosts": hosts, "/etc/resolv.conf": "lookup file\n"}


def describe(number: int, session: Session, in_file: Outcome, in_consul: Outcome, listed: list[Table]) -> str:
    """A session that differs: up to the first different reply, the first different lookup, and its tables."""
    lines = [f"session {number} from {session.source} to {session.listener}, logged in as {session.login}:"]
    at = first_other(in_file.replies, in_consul.replies)
    lines += [f"    {command} -> {code} {text!r}" for command, code, text in in_file.replies[:at]]
    asked_at = first_other(in_file.lookups, in_consul.lookups)
    tables = set()
    for place, outcome in (("file", in_file), ("Consul", in_consul)):
        lines += [f"  {place}: {reply}" for reply in outcome.replies[at : at + 1]]
        for lookup in outcome.lookups[asked_at : asked_at + 1]:
            lines.append(f"  {place}: {lookup}")
            tables.add(lookup.table)
    return "\n".join(lines + [f"  {table}" for table in listed if table.name in tables])


def first_other(these: Sequence[object], those: Sequence[object]) -> int:
    """The index of the first difference; the length if there is none."""
    pairs = enumerate(zip_longest(these, those))
    return next((at for at, (this, that) in pairs if this != that), len(these))


def incomplete_services(outcomes: list[Outcome]) -> set[tuple[str, bool]]:
    """The services without a successful lookup or without a failed one, and which of the two is missing."""
    answers = {(found.service, found.answer not in ("false", "none")) for each in outcomes for found in each.lookups}
    services = {*LISTS, "alias", "credentials", "userinfo"}
    return {(service, found) for service in services for found in (True, False)} - answers


@pytest.mark.timeout(120 + SESSIONS)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("root", ["7.9"], indirect=True)
def test_tables_in_files_and_in_consul_give_the_same_replies(consul, root, seed):
    rng = Random(seed)
    # Not by smtpctl, whose hashes take a tenth of a second to verify at each login.
    encrypted = root.run("openssl", "passwd", "-6", "-salt", f"seed{seed}"[:16], PASSWORD).strip()
    listed = tables(rng, {user: root.accounts[user] for user in USERS}, encrypted)
    client = Client(rng, listed, LISTENERS)
    sessions = [client.session(number) for number in range(SESSIONS // len(SEEDS))]
    for table in listed:
        consul.kv_txn(table.keys)
    delimiter = f'smtp sub-addr-delim "{DELIMITERS[seed]}"\n'
    in_files = delimiter + "".join(table.declaration for table in listed)
    in_consul = delimiter + "".join(f"table {table.name} consul:{CONFIG}\n" for table in listed)
    settings = f'subaddress_delimiter = "{DELIMITERS[seed]}"\n'
    configuration = table_files(consul, settings + "".join(table.section for table in listed))
    with ExitStack() as running, ThreadPoolExecutor(2) as pool:
        twins = [
            running.enter_context(Twin(root, in_files, {table.path: table.text for table in listed}, listed)),
            running.enter_context(Twin(root, in_consul, configuration, listed)),
        ]
        theirs, ours = pool.map(lambda twin: twin.outcomes(sessions), twins)
        differing = [number for number in range(len(sessions)) if theirs[number] != ours[number]]
        report = [describe(n, sessions[n], theirs[n], ours[n], listed) for n in differing[:SHOWN]]
        assert not differing, f"seed {seed}: {len(differing)} sessions differ\n" + "\n".join(report)
        delivered = list(pool.map(Twin.deliveries, twins))
        assert delivered[0] == delivered[1], f"seed {seed}"
        assert all(twin.alive for twin in twins)
    # A lookup that was never made was not compared.
    if DEFAULTS:
        assert incomplete_services(theirs) == set()
        assert len(delivered[0][1]) > len(sessions) // 10
