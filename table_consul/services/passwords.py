"""Hashes of passwords: which formats there are, what one costs to verify, and whether a password is the one.

Knows nothing of tables, of Consul or of smtpd. What calculates is not ours: the system's own crypt(3), through crypt-r,
and argon2, through argon2-cffi; both are imported when the first password comes, for few tables see any.

No text here ever holds a password, or any part of a hash beyond its format and its cost.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from table_consul.errors import ConfigError, EntryError, PeerError

# crypt(3) of libxcrypt takes no longer one (CRYPT_MAX_PASSPHRASE_SIZE), so that none has ever made such a hash.
PASSWORD_BYTES = 511
# Dovecot writes the format before the hash (doc.dovecot.org, Password Schemes); crypt(3) takes that for a part of it.
SCHEME_PREFIXES = (b"{CRYPT}", b"{BLF-CRYPT}", b"{SHA256-CRYPT}", b"{SHA512-CRYPT}", b"{ARGON2ID}", b"{ARGON2I}")
# What passwd -l, and others, put before a hash or in its place.
LOCK_MARKERS = (b"!", b"*")
LOCKED_ACCOUNT = b"*LK*"
# How many entries are looked at for a hash that tells what those of the table cost.
SAMPLE_SIZE = 8

_ITOA64 = b"./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def _number(digits: bytes) -> int:
    """A number as scrypt's and yescrypt's settings spell it, its low digit first."""
    return sum(_ITOA64.index(digit) << 6 * place for place, digit in enumerate(digits))


def _scrypt_units(cost: bytes) -> int:
    return (1 << _ITOA64.index(cost[0])) * _number(cost[1:6]) * _number(cost[6:])


def _yescrypt_units(cost: bytes) -> int:
    return (1 << _ITOA64.index(cost[1]) + 1) * (_ITOA64.index(cost[2]) + 1)


def _argon2_units(cost: bytes) -> int:
    memory, passes = re.findall(rb"\d+", cost)[:2]
    return int(memory) * int(passes)


class Scheme(NamedTuple):
    """One format of hashes. ``pattern`` tells the setting from the digest; the unit of cost takes so many seconds."""

    name: str
    pattern: bytes
    units: Callable[[bytes], int] = lambda _: 1
    unit_seconds: float = 0.0
    """About twice what a core of 2020 takes: an estimate that shall be too high rather than too low."""


_B64 = rb"[./0-9A-Za-z]"
_SALT = rb"[!-#%-9;-~]"  # printable, but for $ and the colon

SCHEMES = (
    Scheme("bcrypt", rb"(\$2[abxy]\$(\d\d)\$%b{22})%b{31}" % (_B64, _B64), lambda cost: 1 << int(cost), 1e-4),
    Scheme("SHA-512", rb"(\$6\$(?:rounds=(\d{1,9})\$)?%b{0,16}\$)%b{86}" % (_SALT, _B64), int, 1e-6),
    Scheme("SHA-256", rb"(\$5\$(?:rounds=(\d{1,9})\$)?%b{0,16}\$)%b{43}" % (_SALT, _B64), int, 1e-6),
    Scheme("yescrypt", rb"(\$g?y\$(j%b{2})\$%b{0,86}\$)%b{43}" % (_B64, _B64, _B64), _yescrypt_units, 4e-7),
    Scheme("scrypt", rb"(\$7\$(%b{11})%b{0,86}\$)%b{43}" % (_B64, _B64, _B64), _scrypt_units, 4e-7),
    Scheme("MD5", rb"(\$1\$%b{0,8}\$)()%b{22}" % (_SALT, _B64)),
    Scheme("DES", rb"(%b{2})()%b{11}" % (_B64, _B64)),
    Scheme(
        "argon2",
        rb"(\$argon2(?:id|i|d)\$(?:v=\d{1,3}\$)?(m=\d{1,9},t=\d{1,9},p=\d{1,2})\$[A-Za-z0-9+/]{11,}\$)[A-Za-z0-9+/]{6,}",
        _argon2_units,
        2e-6,
    ),
)


class Hash(NamedTuple):
    """A hash whose format is known, without its digest where that is not needed."""

    scheme: str
    text: bytes
    setting: bytes
    seconds: float
    """What it takes to verify a password, about."""

    def with_dummy_digest(self) -> Hash:
        """The same format, setting and cost with a digest that no password has."""
        filler = b"A" if self.scheme == "argon2" else b"."
        return self._replace(text=self.setting + filler * (len(self.text) - len(self.setting)))


# What `smtpctl encrypt` makes where crypt(3) can: a stand-in until a hash of the table has been seen.
DEFAULT = Hash("SHA-512", b"$6$tableconsul$" + b"." * 86, b"$6$tableconsul$", 0.005)


@functools.cache
def _compiled(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(pattern)


def strip_scheme(text: bytes) -> bytes:
    """The hash without Dovecot's mark, and bcrypt by the name that every crypt(3) knows; all else as it is.

    A text is taken for a hash only if it has the form of one: clear text to relay with passes unharmed.
    """
    end = text.find(b"}") + 1
    if text[:1] == b"{" and text[:end].upper() in SCHEME_PREFIXES:
        bare = text[end:]
        if bare.startswith(LOCK_MARKERS) or looks_like_a_hash(bare):
            text = bare
    return b"$2b$" + text[4:] if text.startswith(b"$2y$") and parse(text) else text


def looks_like_a_hash(text: bytes) -> bool:
    """Whether some crypt(3) might know the format, be it one that is not known here."""
    return _compiled(rb"\$[0-9a-z-]+[$,].+|_[./0-9A-Za-z]{19}|[./0-9A-Za-z]{13}").fullmatch(text) is not None


def parse(text: bytes) -> Hash | None:
    """The hash, if this is one of a format that can be verified; None for any other text."""
    for scheme in SCHEMES:
        found = _compiled(scheme.pattern).fullmatch(text)
        if found is not None:
            cost = found[2] or (b"5000" if scheme.units is int else b"")
            return Hash(scheme.name, text, found[1], scheme.units(cost) * scheme.unit_seconds)
    return None


def hash_part(credential: bytes) -> bytes:
    """What of a credential is the hash: ``HASH``, or what follows the colon of ``USER:HASH``."""
    _, colon, after = credential.partition(b":")
    return after if colon else credential


def verifiable_hash(credential: bytes, most: float) -> Hash | None:
    """The hash of a credential, ready to verify a password with; None for one that is locked.

    Raises:
        EntryError: it is no hash, or one of a format that is not known, or would take more than so many seconds.
    """
    text = hash_part(credential)
    if text.startswith(LOCK_MARKERS):
        return None
    known = parse(text)
    if known is None:
        raise EntryError(
            "the value is no hash that can be verified (allowed: what crypt(3) or argon2 make, such as the output of "
            "`smtpctl encrypt`)"
        )
    if known.seconds > most:
        raise EntryError(
            f"the hash takes about {known.seconds:.1f} s to verify, more than the deadline of {most:g} s, in which the "
            "mail server waits; lower its cost, or raise the deadline"
        )
    return known


class Verifier:
    """Verifies passwords. Its only memory is what the hashes of each table cost, with no digest of any."""

    def __init__(self) -> None:
        self._typical: dict[str, Hash] = {}

    def verify(self, table: str, stored: bytes | None, password: bytes, others: Iterable[bytes], most: float) -> bool:
        """Whether this is the password of the stored credential. None has none, and takes as long to find out.

        ``others`` are credentials of the same table; where there is no hash to verify, the first of them that is one
        says what that costs, else the last that was seen. ``most`` bounds the cost, in seconds.

        Raises:
            EntryError: what is stored can be verified by nobody here.
            ConfigError: the package that could is not installed.
            PeerError: the password is no UTF-8, and crypt-r takes nothing else.
        """
        known = None if stored is None else verifiable_hash(stored, most)
        if known is not None:
            self._typical[table] = known.with_dummy_digest()
            return _verify(known, password)
        typical = next((model for model in map(_cheap(most), others) if model is not None), None)
        blank = (typical or self._typical.get(table, DEFAULT)).with_dummy_digest()
        with contextlib.suppress(EntryError):  # that there is no such user is certain, whatever becomes of the others
            _verify(blank, password)
        return False


def _cheap(most: float) -> Callable[[bytes], Hash | None]:
    def model(credential: bytes) -> Hash | None:
        known = parse(hash_part(credential))
        return known if known is not None and known.seconds <= most else None

    return model


def _verify(known: Hash, password: bytes) -> bool:
    return (_verify_argon2 if known.scheme == "argon2" else _verify_crypt)(known, password)


def _verify_crypt(known: Hash, password: bytes) -> bool:
    from hmac import compare_digest

    binding = _binding()
    try:
        word = password.decode()
    except UnicodeDecodeError:
        raise PeerError("the password is no UTF-8, and crypt-r takes nothing else") from None
    if len(password) > PASSWORD_BYTES or b"\0" in password:
        return False
    text = b"$2b$" + known.text[4:] if known.text.startswith(b"$2y$") else known.text
    try:
        made: str = binding.crypt(word, text.decode())
    except OSError:
        made = "*"
    if made.startswith("*"):
        raise EntryError(f"the value is a hash by {known.scheme}, which crypt(3) of this system does not know")
    return compare_digest(made.encode(), text)


def _verify_argon2(known: Hash, password: bytes) -> bool:
    _package("argon2", "argon2-cffi")
    from argon2 import exceptions, low_level

    kind = {b"$argon2id": low_level.Type.ID, b"$argon2i": low_level.Type.I, b"$argon2d": low_level.Type.D}
    try:
        return low_level.verify_secret(known.text, password, kind[known.text[: known.text.index(b"$", 1)]])
    except exceptions.VerifyMismatchError:
        return False
    except exceptions.VerificationError:
        raise EntryError("the value is a hash by argon2 that cannot be verified: damaged, or too large") from None


def _binding() -> Any:  # noqa: ANN401 - a module
    """The system's crypt(3): crypt-r, or up to Python 3.12 the standard library's, from which crypt-r was made."""
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its removal in 3.13, where crypt-r takes its place
        return importlib.import_module("crypt")
    return _package("crypt_r", "crypt-r")


def _package(module: str, package: str) -> Any:  # noqa: ANN401 - a module
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f"auth: passwords cannot be verified, as the Python package {package} is not installed; "
            "install table-consul[auth]"
        ) from None
