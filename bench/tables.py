"""The tables in Consul for the bench, and the keys and expected answers of the driver."""

from __future__ import annotations

import random
import re
from pathlib import Path


def aliases(count: int) -> dict[str, str]:
    """Keys of exactly 100 bytes with values of 30 to 60."""
    chance = random.Random(count)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    table: dict[str, str] = {}
    for number in range(count):
        head = f"user{number:07}."
        key = head + "".join(chance.choices(letters, k=88 - len(head))) + "@example.org"
        name = f"{chance.getrandbits(32):08x}" + "".join(chance.choices(letters, k=chance.randrange(10, 41)))
        table[key] = f"{name}@example.net"
    return table


SYLLABLES = re.findall(
    r"\w+", "an bel cor dov el fen gra hol is jon kar lem mor nik ol per ros ten tov ur ven wil xav yor zel"
)


def people(count: int) -> dict[str, str]:
    """Realistic keys: all first letters, some upper case, users and whole addresses, of any length."""
    chance = random.Random(count)
    table: dict[str, str] = {}
    folded: set[str] = set()
    while len(table) < count:
        first, last = ("".join(chance.choices(SYLLABLES, k=chance.randrange(1, 4))) for _ in range(2))
        if chance.random() < 0.1:
            first, last = first.title(), last.title()
        key = chance.choice([f"{first}.{last}", f"{first[0]}{last}", f"{last}{chance.randrange(100)}"])
        if chance.random() < 0.7:
            key += f"@{chance.choice(SYLLABLES)}{chance.randrange(30)}.example.org"
        elif chance.random() < 0.5:
            key += f".{chance.randrange(10_000)}"
        if key.lower() not in folded:
            folded.add(key.lower())
            table[key] = f"{last}@box{chance.randrange(30)}.example.net"
    return table


def absent(count: int) -> dict[str, str | None]:
    """``count`` keys as long as those of `aliases` that are in no table."""
    chance = random.Random(-count)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    names = (f"absent{number}." for number in range(count))
    return {head + "".join(chance.choices(letters, k=88 - len(head))) + "@example.org": None for head in names}


def networks(count: int) -> tuple[dict[str, str], dict[str, str | None]]:
    """Networks and single addresses of both families, and addresses with the answers of smtpd's matcher."""
    chance = random.Random(count)
    entries: dict[str, str] = {}
    asked: dict[str, str | None] = {f"192.168.{number % 256}.{number // 256}": None for number in range(5_000)}
    for number in range(count):
        high, low = number // 256 % 256, number % 256
        last = chance.randrange(1, 255)
        kind = number * 10 // count
        if kind < 6:
            entry, inside = f"10.{high}.{low}.0/24", f"10.{high}.{low}.{last}"
        elif kind < 9:
            network = f"2001:{number >> 16:x}db8:{number & 0xFFFF:x}"
            entry, inside = f"{network}::/48", f"[{network}::{last:x}:1]"
        else:
            entry, inside = f"172.{high}.{low}.{last}", f"172.{high}.{low}.{last}"
        if kind == 1:
            entry, inside = f"10.{high}.{low}.64/28", f"10.{high}.{low}.{64 + last % 16}"
        entries[entry] = ""
        if number % 5 == 0:
            asked[inside] = ""
    return entries, asked


def domains(count: int) -> tuple[dict[str, str], dict[str, str | None]]:
    """Domains, a fifth of them with a star, and host names with the answers of smtpd's matcher."""
    entries: dict[str, str] = {}
    asked: dict[str, str | None] = {f"absent{number}.example.com": None for number in range(5_000)}
    for number in range(count):
        if number % 5:
            entry = inside = f"mail{number}.example{number % 97}.org"
        else:
            entry, inside = f"*.zone{number}.example.net", f"mx{number % 7}.zone{number}.example.net"
        entries[entry] = ""
        if number % 5 < 2:
            asked[inside] = ""
    return entries, asked


def addresses(count: int) -> tuple[dict[str, str], dict[str, str | None]]:
    """Users, hosts and users at hosts, and mail addresses, some tagged, with the answers of smtpd's matcher."""
    entries: dict[str, str] = {}
    asked: dict[str, str | None] = {f"absent{number}@nowhere.example.com": None for number in range(5_000)}
    for number in range(count):
        if number % 5 == 0:
            entry, inside = f"@host{number}.example.net", f"anyone@host{number}.example.net"
        elif number % 5 == 1:
            entry, inside = f"user{number}", f"user{number}@anywhere.example"
        else:
            entry, inside = f"user{number}@example{number % 97}.org", f"user{number}+tag@example{number % 97}.org"
        entries[entry] = ""
        if number % 5 < 3:
            asked[inside] = ""
    return entries, asked


def expressions(count: int) -> tuple[dict[str, str], dict[str, str | None]]:
    """A hundredth as many expressions, and texts with the answers of regexec(3)."""
    entries: dict[str, str] = {}
    asked: dict[str, str | None] = {f"host-absent-{number}.example.org": None for number in range(1_000)}
    for number in range(count // 100):
        entries[f"^host-[0-9]+-{number}\\.(foo|bar)$"] = ""
        asked[f"host-{number % 7}-{number}.bar"] = ""
    return entries, asked


def write_keys(path: Path, asked: dict[str, str | None]) -> None:
    path.write_text("".join(f"{key}\n" if value is None else f"{key}\t{value}\n" for key, value in asked.items()))
