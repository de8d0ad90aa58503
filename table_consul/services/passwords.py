"""Password hashes: their formats, what one costs to verify, and whether a password matches it.

crypt-r (the system's own crypt(3)) and argon2-cffi calculate; both are imported for the first password, as few tables
ever see one. No message contains a password, or any part of a hash beyond its format and its cost.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterable
from math import inf, prod
from typing import Any, NamedTuple

from table_consul.errors import ConfigError, EntryError, PeerError, Unreachable
from table_consul.services import compiled

# crypt(3) of libxcrypt accepts no longer one (CRYPT_MAX_PASSPHRASE_SIZE), so no hash of a longer one exists.
PASSWORD_BYTES = 511
# Dovecot writes the format before the hash (doc.dovecot.org, Password Schemes); crypt(3) does not know these.
SCHEME_PREFIXES = (b"{CRYPT}", b"{BLF-CRYPT}", b"{SHA256-CRYPT}", b"{SHA512-CRYPT}", b"{ARGON2ID}", b"{ARGON2I}")
# What passwd -l and others put before a hash, or in its place.
LOCK_MARKERS = (b"!", b"*")
LOCKED_ACCOUNT = b"*LK*"
_BARE_LOCKS = (b"*", b"!", b"!!")
# How many entries are inspected to learn what the hashes of a table cost.
SAMPLE_SIZE = 8

_ITOA64 = b"./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def _number(digits: bytes) -> int:
    """A number as the settings of scrypt and yescrypt write it, its low digit first."""
    return sum(_ITOA64.index(digit) << 6 * place for place, digit in enumerate(digits))


_B64 = rb"[./0-9A-Za-z]"
_SALT = rb"[!-#%-9;-~]"  # printable, but for $ and the colon

# Formats: name; expression, whose first group is the setting (what precedes the digest) and whose second is the cost;
# the units of work of a cost; what one takes: about twice the time on a core of 2020, rather too much.
SCHEMES: tuple[tuple[str, bytes, Callable[[bytes], int], float], ...] = (
    ("bcrypt", rb"(\$2[abxy]\$(\d\d)\$%b{22})%b{31}" % (_B64, _B64), lambda cost: 1 << int(cost), 1e-4),
    ("SHA-512", rb"(\$6\$(?:rounds=(\d{1,9})\$)?%b{0,16}\$)%b{86}" % (_SALT, _B64), int, 1e-6),
    ("SHA-256", rb"(\$5\$(?:rounds=(\d{1,9})\$)?%b{0,16}\$)%b{43}" % (_SALT, _B64), int, 1e-6),
    (
        "yescrypt",
        rb"(\$g?y\$j(%b{2})\$%b{0,86}\$)%b{43}" % (_B64, _B64, _B64),
        lambda cost: (_number(cost[1:]) + 1) << (_number(cost[:1]) + 1),
        4e-7,
    ),
    (
        "scrypt",
        rb"(\$7\$(%b{11})%b{0,86}\$)%b{43}" % (_B64, _B64, _B64),
        lambda cost: (_number(cost[1:6]) * _number(cost[6:])) << _number(cost[:1]),
        4e-7,
    ),
    ("MD5", rb"(\$1\$%b{0,8}\$)()%b{22}" % (_SALT, _B64), lambda _: 1, 0.0),
    ("DES", rb"(%b{2})()%b{11}" % (_B64, _B64), lambda _: 1, 0.0),
    (
        "argon2",
        rb"(\$argon2(?:id|i|d)\$(?:v=\d{1,3}\$)?m=(\d{1,9},t=\d{1,9}),p=\d{1,2}\$[A-Za-z0-9+/]{11,}\$)[A-Za-z0-9+/]{6,}",
        lambda cost: prod(map(int, cost.split(b",t="))),
        2e-6,
    ),
)


class Hash(NamedTuple):
    """A hash of a known format."""

    scheme: str
    text: bytes
    setting: bytes
    seconds: float
    """About what it takes to verify a password."""

    def with_dummy_digest(self) -> Hash:
        """The same format, setting and cost with a digest that no password has."""
        digest = (b"A" if self.scheme == "argon2" else b".") * (len(self.text) - len(self.setting))
        return self._replace(text=self.setting + digest)


# What `smtpctl encrypt` makes where crypt(3) can; used until a hash of the table has been seen.
DEFAULT = Hash("SHA-512", b"$6$tableconsul$" + b"." * 86, b"$6$tableconsul$", 0.005)


def strip_scheme(credential: bytes) -> bytes:
    """The credential without Dovecot's prefix, with bcrypt under the name that every crypt(3) knows.

    A bare lock becomes one that smtpd does not find too short. Any other text, such as a clear-text relay password, is
    returned unchanged.
    """
    if credential in _BARE_LOCKS:
        return LOCKED_ACCOUNT
    text = hash_part(credential)
    user = credential.removesuffix(text)
    end = text.find(b"}") + 1
    bare = text[end:]
    if text[:end].upper() in SCHEME_PREFIXES and (bare.startswith(LOCK_MARKERS) or looks_like_a_hash(bare)):
        text = bare
    return user + (b"$2b$" + text[4:] if text.startswith(b"$2y$") and parse(text) else text)


def looks_like_a_hash(text: bytes) -> bool:
    """Whether some crypt(3) might know the format, even if it cannot be verified here."""
    return compiled(rb"\$[0-9a-z-]+[$,].+|_[./0-9A-Za-z]{19}|[./0-9A-Za-z]{13}").fullmatch(text) is not None


def is_crypt_hash(text: bytes) -> bool:
    """Whether it can be the output of some crypt(3): a known prefix, or DES, whose last letter has two bits of zero.

    Thirteen letters without a capital among them are a word, not a hash by DES: one hash in 1,000 has none.
    """
    return (
        compiled(
            rb"\$(?:1|2[abxy]|3|5|6|7|g?y|sha1|sm3y?|md5)[$,].+|_[./0-9A-Za-z]{19}"
            rb"|(?=.*[a-z])(?=.*[A-Z])[./0-9A-Za-z]{12}[.26AEIMQUYcgkosw]"
        ).fullmatch(text)
        is not None
    )


def has_fields_after_hash(credential: bytes) -> bool:
    """Whether a hash is followed by a colon, as in passwd(5), where smtpd would take it for a user or a clear text.

    DES hashes do not count: they look like words of 13 letters.
    """
    first, *more = credential.split(b":", 2)
    if more and compiled(rb"\$[0-9a-z-]+[$,].+|\{[A-Za-z0-9.-]+\}.*").fullmatch(first):
        return True
    second = compiled(rb"(?:\{[A-Za-z0-9.-]+\})?(\$.+)").fullmatch(more[0]) if len(more) > 1 else None
    return second is not None and parse(second[1]) is not None


def parse(text: bytes) -> Hash | None:
    """The hash, if its format can be verified here; None for any other text."""
    for name, pattern, units, unit_seconds in SCHEMES:
        if found := compiled(pattern).fullmatch(text):
            cost = found[2] or (b"5000" if units is int else b"")
            return Hash(name, text, found[1], units(cost) * unit_seconds)
    return None


def hash_part(credential: bytes) -> bytes:
    """The hash within a credential, ``HASH`` or ``USER:HASH``."""
    return credential[credential.find(b":") + 1 :]


def verifiable_hash(credential: bytes, most: float) -> Hash | None:
    """The hash of a credential, ready to verify a password with; None for one that is locked.

    Raises:
        EntryError: not a hash, an unknown format, or a hash that takes more than ``most`` seconds to verify.
    """
    text = hash_part(credential)
    if text.startswith(LOCK_MARKERS):
        return None
    known = parse(text)
    if known is None:
        raise EntryError("not a hash that can be verified (use the output of `smtpctl encrypt`, or argon2)")
    if known.seconds > most:
        raise EntryError(
            f"the hash takes about {known.seconds:.1f} s to verify, more than the deadline of {most:g} s "
            "(lower its cost or raise the deadline)"
        )
    return known


def verify_hash(known: Hash, password: bytes) -> bool:
    """Whether the hash is of this password.

    Raises:
        EntryError: this system does not know the format of the hash, or the hash is damaged.
        ConfigError: the package that verifies it is not installed.
        PeerError: the password is not UTF-8, and crypt-r takes nothing else.
    """
    if known.scheme == "argon2":
        argon2 = _package("argon2", "argon2-cffi")
        try:
            return bool(argon2.PasswordHasher().verify(known.text, password))
        except argon2.exceptions.VerifyMismatchError:
            return False
        except argon2.exceptions.VerificationError:
            raise EntryError("a hash by argon2 that cannot be verified: damaged, or too large") from None
    from hmac import compare_digest

    binding = _binding()
    try:
        word = password.decode()
    except UnicodeDecodeError:
        raise PeerError("the password is not UTF-8, and crypt-r takes nothing else") from None
    if len(password) > PASSWORD_BYTES or b"\0" in password:
        return False
    try:
        made: str = binding.crypt(word, known.text.decode())
    except OSError:
        made = "*"
    if made.startswith("*"):
        raise EntryError(f"a hash by {known.scheme}, which crypt(3) of this system does not know")
    return compare_digest(made.encode(), known.text)


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
        text = f"auth: the Python package {package} is not installed; install table-consul[auth]"
        raise ConfigError(text) from None


def _check_time(known: Hash, most: float, left: float) -> None:
    if known.seconds > left:
        raise Unreachable(f"too little left of the deadline of {most:g} s to verify a password")


class Verifier:
    """Verifies passwords. Remembers only the cost parameters of each table's hashes, never a digest."""

    def __init__(self, verify: Callable[[Hash, bytes], bool] = verify_hash) -> None:
        self._verify = verify
        self._typical: dict[str, Hash] = {}

    def verify(
        self,
        table: str,
        stored: bytes | None,
        password: bytes,
        others: Iterable[bytes],
        most: float,
        left: float = inf,
    ) -> bool:
        """Whether the stored credential is of this password. None never matches, after the same time.

        ``others`` are credentials of the same table: without a stored hash the time is spent on the format and cost of
        the first hash among them, else of the last one seen. ``most`` bounds that time, in seconds:
        the deadline, of which ``left`` are left now.

        Raises:
            Unreachable: what is left is too short for the hash.
            EntryError, ConfigError, PeerError: as by `verifiable_hash` and `verify_hash`.
        """
        known = None if stored is None else verifiable_hash(stored, most)
        if known is not None:
            self._typical[table] = known.with_dummy_digest()
            _check_time(known, most, left)
            return self._verify(known, password)
        hashes = (parse(hash_part(credential)) for credential in others)
        last = self._typical.get(table, DEFAULT)
        typical = next((each for each in hashes if each is not None and each.seconds <= most), last)
        _check_time(typical, most, left)
        with contextlib.suppress(EntryError):  # with any hash of another user, this user cannot log in
            self._verify(typical.with_dummy_digest(), password)
        return False
