"""Tables with entries generated from a seed, as files for smtpd and as keys for Consul.

The alphabets are small, so that sessions sometimes match an entry, and entries overlap. Intended differences are left
out (aliases that are commands, keys that differ only in case), as are expressions undefined in POSIX
(``\\d``, a ``*`` with nothing before it), where glibc and RE2 need not agree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random

SOURCES = (
    *("127.0.0.1", "127.0.0.2", "127.0.0.9", "127.0.1.1", "127.0.128.1", "127.1.0.1", "127.64.0.1", "127.255.255.254"),
    "::1",
)
# Some addresses have no name.
RDNS = {
    "127.0.0.1": "localhost",
    "127.0.0.2": "mx.a.example",
    "127.0.0.9": "A.Example",
    "127.0.1.1": "b.ab.example",
    "127.64.0.1": "mx1.example",
    "::1": "ab.example",
}
ODD_NETWORKS = (
    *("local", "LOCAL", "127.64", "127.0.128", "127.0.0", "0x7f01/16", "0x7F0001", "10", "127.1/20", "127.0.0.0/33"),
    *("::/0", "[::/0]", "::1/0x0", "ipv6:127.0.0.2", "[127.0.0.1]", "IPv6:::1", "[IPv6:::1]", "127.0.0.2/", "mx.a"),
)
LABELS = ("a", "b", "ab", "mx", "mx1")
USERS = ("gilles", "eric", "joerg", "a", "b", "ab", "a*", "a.b", "a/b", "a?b", "a%62")
TAGS = ("", "", "", "+a", "_a", "+b", "_b", "+a+b", "_a+b", "+")
LISTS = ("netaddr", "domain", "mailaddr", "regex", "string")


@dataclass(frozen=True)
class Table:
    """Entries by key; a list has ``None`` for values.

    Args:
        services: the services that smtpd looks up in it.
        inline: a list within smtpd.conf, not a file.
        shared: all its services read one folder of Consul.
        direct: in direct mode, not mirrored.
        unusable: keys whose value smtpd rejects.
    """

    name: str
    services: tuple[str, ...]
    entries: Mapping[str, str | None]
    inline: bool = False
    shared: bool = False
    direct: bool = False
    unusable: frozenset[str] = frozenset()

    @property
    def path(self) -> str:
        return f"/etc/mail/{self.name}"

    @property
    def declaration(self) -> str:
        """Its line in smtpd.conf, as a file or inline."""
        if self.inline:
            return f"table {self.name} {{ {', '.join(json.dumps(entry) for entry in self.entries)} }}\n"
        return f"table {self.name} file:{self.path}\n"

    @property
    def text(self) -> str:
        """The text of the file (smtpd: util.c, parse_table_line)."""
        if None in self.entries.values():
            return "\n".join(("# @list", *self.entries, ""))
        return "".join(f"{key}\t{value}\n" for key, value in self.entries.items())

    @property
    def keys(self) -> dict[str, str]:
        """The entries as keys of Consul."""
        folders = ("entry",) if self.shared else self.services
        keys = {f"{self.name}/{folder}/{key}": value for folder in folders for key, value in self.entries.items()}
        # A read of one key in Consul is case-sensitive, and smtpd looks up keys in lower case.
        return {key.lower() if self.direct else key: value or "" for key, value in keys.items()}

    @property
    def section(self) -> str:
        """Its section in the configuration of table-consul."""
        text = f'[tables.{self.name}]\nmode = "{"direct" if self.direct else "mirror"}"\n'
        if self.shared:
            text += f"[tables.{self.name}.paths]\n"
            text += "".join(f'{service} = "{self.name}/entry"\n' for service in self.services)
        return text


def any_case(rng: Random, text: str) -> str:
    return rng.choice((text, text, text, text.upper(), text.title()))


def host(rng: Random) -> str:
    labels = rng.choices(LABELS, k=rng.choice((0, 1, 1, 2)))
    return ".".join((*labels, rng.choice(("example", "example", "localhost"))))


def address(rng: Random) -> str:
    """A mail address for a session."""
    return any_case(rng, f"{rng.choice(USERS)}{rng.choice(TAGS)}@{host(rng)}")


def domain_entry(rng: Random) -> str:
    labels = host(rng).split(".")
    for at in range(len(labels) - 1):
        if rng.random() < 0.4:
            labels[at] = rng.choice(("*", "*", labels[at] + "*", "*" + labels[at], "**"))
    if rng.random() < 0.02:
        labels[-1] = "*"
    return any_case(rng, ".".join(labels))


def netaddr_entry(rng: Random) -> str:
    source = rng.choice(SOURCES)
    if rng.random() < 0.25:
        return rng.choice(ODD_NETWORKS)
    if ":" in source:
        bits = f"/{rng.choice((128, 127, 64, 1))}" if rng.random() < 0.5 else ""
        text = rng.choice(("::1", "0:0::1", "::2", "::3")) + bits
        return rng.choice((text, f"[{text}]", f"ipv6:{text}"))
    if rng.random() < 0.3:
        return source
    octets = source.split(".")
    octets[rng.randrange(1, 4)] = str(rng.choice((0, 1, 64, 128, 255)))
    return f"{'.'.join(octets)}/{rng.choice((*range(9, 33), 30, 31, 32))}"


def mailaddr_entry(rng: Random) -> str:
    user = rng.choice(USERS) + rng.choice(TAGS)
    form = rng.random()
    if form < 0.03:
        return "@"
    if form < 0.15:
        return any_case(rng, user + rng.choice(("", "@")))
    if form < 0.35:
        return "@" + domain_entry(rng)
    return any_case(rng, f"{user}@") + domain_entry(rng)


def regex_entry(rng: Random) -> str:
    if rng.random() < 0.2:
        return rng.choice(("^127\\.0\\.[0-9]\\.", "\\.(1|2)$", "^\\[::", "^127\\.[1-9]{1,2}\\.", "^[^.]*$", "^local$"))
    atoms = ("a", "b", "mx", "[ab]", "[^a]", "(a|b)", "(mx)?", "b+", "[[:digit:]]", "[a-m]{2}", "\\.", "\\+", ".")
    start = rng.choice(("", "^", "^", "@", "\\.", "^(gilles|eric)"))
    end = rng.choice(("", "", "$", "@", "\\.example$", "\\.localhost$"))
    text = start + "".join(rng.choices(atoms, k=rng.randrange(1, 4))) + end
    if rng.random() < 0.08:
        text += rng.choice(("(", "[a", "{2,1}", "[[:none:]]"))
    return rng.choice(("", "", "(?i)")) + text


def string_entry(rng: Random) -> str:
    return any_case(rng, rng.choice(LOGINS))


ENTRY = {
    "netaddr": netaddr_entry,
    "domain": domain_entry,
    "mailaddr": mailaddr_entry,
    "regex": regex_entry,
    "string": string_entry,
}
LOGINS = ("gilles", "eric@a.example", "joerg+a@b.example", "a|b", "ab", "a@localhost")
NOBODY = "b"
PASSWORD = "Correct Horse"


def distinct(rng: Random, count: int, *makers: str) -> dict[str, str | None]:
    """``count`` entries of these services that differ in more than case."""
    found: dict[str, str | None] = {}
    while len(found) < count:
        entry = ENTRY[rng.choice(makers)](rng)
        found.setdefault(entry if entry.lower() not in map(str.lower, found) else next(iter(found)), None)
    return found


def alias_value(rng: Random) -> str:
    def node() -> str:
        user = rng.choice(USERS[:6]) + rng.choice(TAGS)
        return rng.choice((user, user, rng.choice(USERS[:3]), f"{user}@{host(rng)}"))

    if rng.random() < 0.05:
        return rng.choice(("error:550 5.1.1 gone", "error:450 4.2.0 later"))
    return ", ".join(node() for _ in range(rng.choice((1, 1, 1, 2, 3))))


def aliases(rng: Random) -> dict[str, str | None]:
    """Entries of a table for ``alias``: a key is a user, with or without a tag."""
    keys = {any_case(rng, rng.choice(USERS[1:]) + rng.choice(TAGS)).lower() for _ in range(14)}
    return {any_case(rng, key): alias_value(rng) for key in sorted(keys)}


def virtuals(rng: Random) -> dict[str, str | None]:
    """Entries of a table for ``virtual``: a key may be ``user@host``, ``user``, ``@host`` or ``@`` as well."""
    keys = {f"{rng.choice(USERS)}{rng.choice(TAGS)}@{host(rng)}" for _ in range(40)}
    keys |= {f"@{host(rng)}" for _ in range(6)} | {rng.choice(USERS) + rng.choice(TAGS) for _ in range(6)}
    keys |= {"@"} if rng.random() < 0.5 else set()
    return {any_case(rng, key): alias_value(rng) for key in sorted(keys)}


def tables(rng: Random, accounts: Mapping[str, tuple[int, int]], encrypted: str) -> list[Table]:
    """The tables of test_differential's smtpd.conf.

    Args:
        accounts: user and group id by name of the local users.
        encrypted: the hash of ``PASSWORD``.
    """

    def direct() -> bool:
        return rng.random() < 0.3

    def listed(name: str, count: int, service: str, *, inline: bool = False) -> Table:
        return Table(name, (service,), distinct(rng, count, service), inline=inline, direct=direct())

    uid, gid = accounts["gilles"]
    userinfo = {
        user: f"{accounts[name][0]}:{accounts[name][1]}:/home/{name}"
        for user, name in zip(("gilles", "Eric", "a", "b"), rng.choices(sorted(accounts), k=4), strict=True)
    }
    credentials = {any_case(rng, login): rng.choice(("", "someone:")) + encrypted for login in LOGINS}
    return [
        listed("near", 9, "netaddr"),
        listed("far", 5, "netaddr", inline=True),
        # smtpd looks up the name of a client in "from rdns <hosts>" as netaddr (ruleset.c, ruleset_match_from).
        Table("hosts", ("domain", "netaddr"), distinct(rng, 9, "domain"), direct=direct()),
        listed("names", 7, "domain", inline=True),
        listed("people", 10, "mailaddr"),
        listed("writers", 14, "mailaddr"),
        listed("patterns", 7, "regex"),
        listed("shapes", 5, "regex"),
        Table(
            "mixed",
            LISTS,
            distinct(rng, 12, *LISTS),
            shared=True,
            direct=direct(),
        ),
        Table("logins", ("string", "credentials", "mailaddr"), distinct(rng, 3, "string"), direct=direct()),
        Table(
            "users",
            ("credentials", "string", "mailaddr"),
            {**credentials, "broken": "x"},
            direct=direct(),
            unusable=frozenset({"broken"}),
        ),
        Table("aliases", ("alias",), aliases(rng), direct=direct()),
        Table("virtuals", ("alias",), virtuals(rng), direct=direct()),
        Table(
            "accounts",
            ("userinfo",),
            {**userinfo, "joerg": f"{uid}:{gid}"},
            direct=direct(),
            unusable=frozenset({"joerg"}),
        ),
    ]
