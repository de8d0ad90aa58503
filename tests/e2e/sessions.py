"""SMTP sessions generated from a seed, and the replies of a server to their commands."""

from __future__ import annotations

import base64
import functools
import re
import smtplib
import ssl
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, ip_network
from typing import TYPE_CHECKING

from tests.e2e import entries
from tests.rig.opensmtpd import _trusting

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from random import Random

TIMEOUT_SECONDS = 30.0
# Rare, because smtpd delays each by up to a second.
WRONG_LOGINS = 0.05
LOGINS = 0.4
SPOKEN = ("domain", "mailaddr", "alias", "netaddr")
LOOPBACK = IPv4Network("127.0.0.0/8")
ODD_HOSTS = ("[127.0.0.2]", "[IPv6:::1]", "localhost", "no_host*", "a" * 300, "127.0.0.1")
ODD_SENDERS = ("", "a", "gilles@[127.0.0.1]", "jürgen@ä.example", "a..b@example", "a@" + "b" * 300)
ODD_RECIPIENTS = ("postmaster", "gilles", "eric@[127.0.0.1]", "@example", "ab+" + "a" * 250 + "@a.example")

Reply = tuple[str, int, str]
"""A command, the code and the text."""


@dataclass(frozen=True)
class Transaction:
    sender: str
    recipients: tuple[str, ...]
    subject: str
    """Empty if the session ends before DATA."""


@dataclass(frozen=True)
class Session:
    """The commands of a client from one address to one listener; ``login`` is a user and a password."""

    source: str
    listener: str
    greetings: tuple[str, ...]
    login: tuple[str, str] | None
    transactions: tuple[Transaction, ...]


class Client:
    """Generates sessions that sometimes match entries of these tables, or nearly match them."""

    def __init__(self, rng: Random, listed: Iterable[entries.Table], listeners: Sequence[str]) -> None:
        self._rng = rng
        self._listeners = listeners
        asked = {service: [key for t in listed if service in t.services for key in t.entries] for service in SPOKEN}
        self._domains = asked["domain"]
        self._addresses = [key for service in ("mailaddr", "alias") for key in asked[service] if "@" in key]
        self._sources = [source for key in asked["netaddr"] for source in at_the_edges(key)]

    def session(self, number: int) -> Session:
        """Session ``number``."""
        rng = self._rng
        login = None
        if rng.random() < LOGINS:
            unknown = rng.random() < 2 * WRONG_LOGINS
            user = rng.choice(("broken", entries.NOBODY) if unknown else entries.LOGINS)
            password = entries.PASSWORD.lower() if rng.random() < WRONG_LOGINS else entries.PASSWORD
            login = (entries.any_case(rng, user), password)
        transactions = tuple(
            Transaction(
                self._sender(),
                tuple(self._recipient() for _ in range(rng.randrange(1, 5))),
                f"mail {number}.{turn}" if rng.random() < 0.6 else "",
            )
            for turn in range(rng.randrange(1, 4))
        )
        greetings = tuple(self._greeting() for _ in range(rng.choice((1, 1, 2, 3))))
        source = rng.choice(entries.SOURCES if rng.random() < 0.5 else self._sources or entries.SOURCES)
        return Session(source, rng.choice(self._listeners), greetings, login, transactions)

    def _host(self) -> str:
        rng = self._rng
        if rng.random() < 0.5 or not self._domains:
            return entries.host(rng)
        return self._without_stars(rng.choice(self._domains))

    def _address(self) -> str:
        rng = self._rng
        if rng.random() < 0.5 or not self._addresses:
            return entries.address(rng)
        user, _, domain = rng.choice(self._addresses).rpartition("@")
        user = user or rng.choice(entries.USERS)
        return f"{user}{rng.choice(entries.TAGS)}@{self._without_stars(domain) or entries.host(rng)}"

    def _without_stars(self, pattern: str) -> str:
        return re.sub(r"\*+", lambda _: self._rng.choice(("", "a", "b", "mx", "b.a", "mx1.ab")), pattern)

    def _greeting(self) -> str:
        verb = self._rng.choice(("EHLO", "EHLO", "HELO"))
        odd = self._rng.random() < 0.15
        return f"{verb} {self._rng.choice(ODD_HOSTS) if odd else entries.any_case(self._rng, self._host())}"

    def _sender(self) -> str:
        return self._rng.choice(ODD_SENDERS) if self._rng.random() < 0.12 else self._address()

    def _recipient(self) -> str:
        return self._rng.choice(ODD_RECIPIENTS) if self._rng.random() < 0.08 else self._address()


def at_the_edges(network: str) -> list[str]:
    """The first and last address of a network and their neighbours, if a client can have them."""
    octets, slash, bits = network.partition("/")
    given = octets.split(".")
    try:
        block = ip_network((".".join((given + ["0"] * 3)[:4]), int(bits) if slash else 8 * len(given)), strict=False)
    except ValueError:
        return []
    edges = [int(block[0]) + step for step in (-1, 0, 1)] + [int(block[-1]) + step for step in (-1, 0, 1)]
    return [str(IPv4Address(edge)) for edge in edges if int(LOOPBACK[0]) < edge < int(LOOPBACK[-1])]


def play(session: Session, ports: Mapping[str, int]) -> list[Reply]:
    """The replies of a server to each command, with the parts that differ from session to session masked.

    Args:
        ports: those of the server's listeners, by name.
    """
    replies: list[Reply] = []
    try:
        _converse(session, ports[session.listener], replies)
    except (smtplib.SMTPServerDisconnected, ConnectionError):
        replies.append(("", 0, "the server closed the connection"))
    return replies


def _converse(session: Session, port: int, replies: list[Reply]) -> None:
    def heard(command: str, reply: tuple[int, bytes]) -> bool:
        text = re.sub(r"\b[0-9a-f]{8} Message accepted", "ID Message accepted", reply[1].decode(errors="replace"))
        replies.append((command, reply[0], text))
        return reply[0] < 400

    def say(command: str) -> bool:
        return heard(command, client.docmd(command))

    host = "::1" if ":" in session.source else "127.0.0.1"
    client = smtplib.SMTP(local_hostname="client", timeout=TIMEOUT_SECONDS, source_address=(session.source, 0))
    client.command_encoding = "utf-8"
    try:
        if not heard("", client.connect(host, port)):
            return
        greeted = False
        for greeting in session.greetings:
            greeted = say(greeting) or greeted
        if session.login and greeted and say("STARTTLS"):
            _encrypt(client, host)
            say(session.greetings[-1]) or say("EHLO a.example")
            secret = "\0{}\0{}".format(*session.login).encode()
            say(f"AUTH PLAIN {base64.b64encode(secret).decode()}")
        for transaction in session.transactions:
            say(f"MAIL FROM:<{transaction.sender}>")
            for recipient in transaction.recipients:
                say(f"RCPT TO:<{recipient}>")
            if transaction.subject and say("DATA"):
                text = f"Subject: {transaction.subject}\r\n\r\nHello.\r\n.\r\n"
                client.send(text.encode())
                heard("the message", client.getreply())
            say("RSET")
        say("QUIT")
    finally:
        client.close()


def _encrypt(client: smtplib.SMTP, host: str) -> None:
    assert client.sock
    client.sock = _context().wrap_socket(client.sock, server_hostname=host)
    client.file = None


@functools.cache
def _context() -> ssl.SSLContext:
    # Made once, because it reads all certificates of the system, only to trust none.
    return _trusting()
