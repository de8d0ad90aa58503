"""Password hashes: their formats, the cost of verifying one, and whether a password matches it.

crypt-r (the system's own crypt(3)) and argon2-cffi calculate; both are imported for the first password, because few
tables ever get one. No message contains a password, or any part of a hash beyond its format and its cost.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterable
from math import inf
from typing import Any, NamedTuple

from table_consul.errors import ConfigError, EntryError, PeerError, Unreachable
from table_consul.services import compiled

# crypt(3) of libxcrypt rejects a longer one (CRYPT_MAX_PASSPHRASE_SIZE), so none has a hash.
PASSWORD_BYTES = 511
# Dovecot writes the format before the hash (doc.dovecot.org, Password Schemes); crypt(3) does not read these.
SCHEME_PREFIXES = (b"{CRYPT}", b"{BLF-CRYPT}", b"{SHA256-CRYPT}", b"{SHA512-CRYPT}", b"{ARGON2ID}", b"{ARGON2I}")
# Markers that passwd -l and others put before a hash, or in its place.
LOCK_MARKERS = (b"!", b"*")
LOCKED_ACCOUNT = b"*LK*"
_BARE_LOCKS = (b"*", b"!", b"!!")
# Bounds on the memory and on argon2's threads for verifying one password, whatever the deadline is. libsodium's
# MODERATE and yescrypt of cost 9 just fit.
MAX_MEMORY = 256 << 20
MAX_LANES = 16
# SHA-crypt hashes the password in every round: this many bytes more take as long as the round of a short one. With
# glibc 511 bytes take 8 (SHA-512) to 9.6 (SHA-256) times as long as 8.
ROUND_BYTES = 55
SHORT_PASSWORD = 16
# How many kinds of hashes are remembered for a table that is read key by key.
MAX_KINDS = 16

_ITOA64 = b"./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def _number(digits: bytes) -> int:
    """A number as the settings of scrypt and yescrypt write it, its low digit first."""
    return sum(_ITOA64.index(digit) << 6 * place for place, digit in enumerate(digits))


_B64 = rb"[./0-9A-Za-z]"
_SALT = rb"[!-#%-9;-~]"  # printable, except $ and the colon


class Cost(NamedTuple):
    work: int
    """In units of the format."""
    memory: int = 0
    """Bytes, where that is more than a few pages."""
    lanes: int = 1
    """Threads, or passes that take the place of threads."""


Kind = tuple[str, Cost]
"""Name of a format, and cost."""


def _yescrypt(cost: bytes) -> Cost:
    blocks = (_number(cost[1:]) + 1) << (_number(cost[:1]) + 1)
    return Cost(blocks, blocks * 128)


def _scrypt(cost: bytes) -> Cost:
    n, r, p = 1 << _number(cost[:1]), _number(cost[1:6]), _number(cost[6:])
    return Cost(n * r * p, 128 * r * (n + p), p)


def _argon2(cost: bytes) -> Cost:
    memory, passes, lanes = (int(part.partition(b"=")[2]) for part in cost.split(b","))
    return Cost(memory * passes, memory << 10, lanes)


def _rounds(cost: bytes) -> Cost:
    return Cost(int(cost or 5000))


# Formats: name; expression, whose first group is the setting (all before the digest) and whose second is the cost;
# its parser; seconds for a unit of work: about twice the time on a core of 2020, to be safe.
SCHEMES: tuple[tuple[str, bytes, Callable[[bytes], Cost], float], ...] = (
    ("bcrypt", rb"(\$2[abxy]\$(\d\d)\$%b{22})%b{31}" % (_B64, _B64), lambda cost: Cost(1 << int(cost)), 1e-4),
    ("SHA-512", rb"(\$6\$(?:rounds=(\d{1,9})\$)?%b{0,16}\$)%b{86}" % (_SALT, _B64), _rounds, 1e-6),
    ("SHA-256", rb"(\$5\$(?:rounds=(\d{1,9})\$)?%b{0,16}\$)%b{43}" % (_SALT, _B64), _rounds, 1e-6),
    ("yescrypt", rb"(\$g?y\$j(%b{2})\$%b{0,86}\$)%b{43}" % (_B64, _B64, _B64), _yescrypt, 4e-7),
    ("scrypt", rb"(\$7\$(%b{11})%b{0,86}\$)%b{43}" % (_B64, _B64, _B64), _scrypt, 4e-7),
    ("MD5", rb"(\$1\$%b{0,8}\$)()%b{22}" % (_SALT, _B64), lambda _: Cost(1), 1e-3),
    ("DES", rb"(%b{2})()%b{11}" % (_B64, _B64), lambda _: Cost(1), 1e-4),
    (
        "argon2",
        rb"(\$argon2(?:id|i|d)\$(?:v=\d{1,3}\$)?(m=\d{1,9},t=\d{1,9},p=\d{1,9})\$[A-Za-z0-9+/]{11,}\$)[A-Za-z0-9+/]{6,}",
        _argon2,
        3e-6,
    ),
)


class Hash(NamedTuple):
    """A hash of a known format."""

    scheme: str
    text: bytes
    setting: bytes
    cost: Cost
    seconds: float
    """An estimate of the time to verify a short password."""

    @property
    def kind(self) -> Kind:
        """Hashes of one kind take the same time."""
        return self.scheme, self.cost

    def seconds_for(self, password: bytes) -> float:
        """An estimate of the time to verify this password."""
        more = max(0, min(len(password), PASSWORD_BYTES) - SHORT_PASSWORD) / ROUND_BYTES
        return self.seconds * (1 + more if self.scheme in ("SHA-512", "SHA-256", "MD5") else 1)

    def with_dummy_digest(self) -> Hash:
        """The same format, setting and cost with a digest that matches no password."""
        digest = (b"A" if self.scheme == "argon2" else b".") * (len(self.text) - len(self.setting))
        return self._replace(text=self.setting + digest)


# The format of `smtpctl encrypt` where crypt(3) has it; used until a hash of the table has been seen.
DEFAULT = Hash("SHA-512", b"$6$tableconsul$" + b"." * 86, b"$6$tableconsul$", Cost(5000), 0.005)


def strip_scheme(credential: bytes) -> bytes:
    """The credential without Dovecot's prefix, with bcrypt under the prefix that every crypt(3) reads.

    A bare lock becomes one that is long enough for smtpd. Any other text, such as a clear-text relay password, is
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
    """Whether some crypt(3) may read the format, even if it cannot be verified here."""
    return compiled(rb"\$[0-9a-z-]+[$,].+|_[./0-9A-Za-z]{19}|[./0-9A-Za-z]{13}").fullmatch(text) is not None


def is_crypt_hash(text: bytes) -> bool:
    """Whether it can be the output of some crypt(3): a known prefix, or DES, whose last letter has two bits of zero.

    Thirteen letters without a capital count as a word, not a DES hash: one hash in 1,000 has no capital.
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
    for name, pattern, read, unit_seconds in SCHEMES:
        if found := compiled(pattern).fullmatch(text):
            cost = read(found[2] or b"")
            return Hash(name, text, found[1], cost, cost.work * unit_seconds)
    return None


def hash_part(credential: bytes) -> bytes:
    """The hash within a credential, ``HASH`` or ``USER:HASH``."""
    return credential[credential.find(b":") + 1 :]


def verifiable_hash(credential: bytes, most: float) -> Hash | None:
    """The hash of a credential, ready to verify a password with; None for one that is locked.

    Raises:
        EntryError: not a hash, an unknown format, or a hash that takes more than ``most`` seconds to verify, or too
            much memory or too many threads.
    """
    text = hash_part(credential)
    if text.startswith(LOCK_MARKERS):
        return None
    parsed = parse(text)
    if parsed is None:
        raise EntryError("not a hash that can be verified (use the output of `smtpctl encrypt`, or argon2)")
    if parsed.seconds > most:
        raise EntryError(
            f"the hash takes about {parsed.seconds:.1f} s to verify, more than the deadline of {most:g} s "
            "(lower its cost or raise the deadline)"
        )
    if parsed.cost.memory > MAX_MEMORY:
        raise EntryError(
            f"the hash takes about {parsed.cost.memory >> 20} MiB to verify, more than {MAX_MEMORY >> 20} MiB "
            "(lower its memory cost)"
        )
    if parsed.cost.lanes > MAX_LANES:
        raise EntryError(f"the hash has a parallelism of {parsed.cost.lanes}, more than {MAX_LANES} (lower it)")
    return parsed


def calculated_hash(credential: bytes, most: float) -> Hash | None:
    """As `verifiable_hash`, but None instead of an error."""
    try:
        return verifiable_hash(credential, most)
    except EntryError:
        return None


def verify_hash(parsed: Hash, password: bytes) -> bool:
    """Whether the password matches the hash.

    Raises:
        EntryError: this system does not support the format of the hash, or the hash is damaged.
        ConfigError: the package that verifies it is not installed.
        PeerError: the password is not UTF-8, which crypt-r requires.
    """
    if parsed.scheme == "argon2":
        argon2 = _package("argon2", "argon2-cffi")
        try:
            return bool(argon2.PasswordHasher().verify(parsed.text, password))
        except argon2.exceptions.VerifyMismatchError:
            return False
        except argon2.exceptions.VerificationError:
            raise EntryError("the argon2 hash cannot be verified: damaged, or too large") from None
    from hmac import compare_digest

    binding = _binding()
    try:
        word = password.decode()
    except UnicodeDecodeError:
        raise PeerError("the password is not UTF-8, which crypt-r requires") from None
    if len(password) > PASSWORD_BYTES or b"\0" in password:
        return False
    try:
        made: str = binding.crypt(word, parsed.text.decode())
    except OSError:
        made = "*"
    if made.startswith("*"):
        raise EntryError(f"crypt(3) of this system does not support hashes by {parsed.scheme}")
    return compare_digest(made.encode(), parsed.text)


def make_hash(scheme: str, password: str, salt: bytes) -> bytes | None:
    """A new hash; None if crypt(3) of this system does not support the scheme: ``yescrypt``, ``bcrypt`` or ``argon2``.

    ``salt`` are 16 random bytes; argon2 ignores them and gets its own from the system.

    Raises:
        ConfigError: the package that calculates it is not installed.
    """
    if scheme == "argon2":
        made: str = _package("argon2", "argon2-cffi").PasswordHasher().hash(password)
        return made.encode()
    if scheme == "yescrypt":
        number = int.from_bytes(salt, "little")
        setting = b"$y$j9T$" + bytes(_ITOA64[number >> 6 * place & 63] for place in range(22))
    else:  # bcrypt has an alphabet of its own
        from base64 import b64encode

        alphabet = bytes.maketrans(_ITOA64[12:] + _ITOA64[2:12] + b"+/", _ITOA64[:2] + _ITOA64[12:] + _ITOA64[2:12])
        setting = b"$2b$12$" + b64encode(salt)[:22].translate(alphabet)
    with contextlib.suppress(OSError):
        made = _binding().crypt(password, setting.decode()) or ""
        if (parsed := parse(made.encode())) is not None and parsed.scheme == scheme:
            return parsed.text
    return None


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
        text = f"auth: the Python package {package} is not installed (install table-consul[auth])"
        raise ConfigError(text) from None


class Verifier:
    """Verifies passwords; the time of a failed login does not depend on the user.

    A failed login costs one hash of each kind in the table, whether or not the user has a hash. For tables that are
    read key by key, the cost parameters are remembered, never a digest.
    """

    def __init__(self, verify: Callable[[Hash, bytes], bool] = verify_hash) -> None:
        self._verify = verify
        self._seen: dict[str, dict[Kind, Hash]] = {}

    def verify(
        self,
        table: str,
        stored: bytes | None,
        password: bytes,
        others: Iterable[bytes],
        most: float,
        left: float = inf,
        *,
        complete: bool = False,
    ) -> bool:
        """Whether the password matches the stored credential; None never matches, but takes the same time.

        ``others`` are credentials of the same table: one of each kind if ``complete``, otherwise those seen before are
        added. ``most`` bounds the time for a hash: the deadline in seconds, of which ``left`` remain.

        Raises:
            Unreachable: too little time is left for the hashes.
            EntryError, ConfigError, PeerError: as by `verifiable_hash` and `verify_hash`.
        """
        parsed = None if stored is None else verifiable_hash(stored, most)
        hashes = (*(calculated_hash(credential, most) for credential in others), parsed)
        kinds = {each.kind: each.with_dummy_digest() for each in hashes if each is not None}
        if not complete:
            seen = self._seen.setdefault(table, {})
            kinds |= {each: seen[each] for each in seen if seen[each].seconds <= most}
            if len(kinds) <= MAX_KINDS:
                self._seen[table] = dict(kinds)
        work = _affordable(kinds.values() or (DEFAULT,), most)
        if parsed is not None and parsed.kind not in (each.kind for each in work):
            work.append(parsed)
        if sum(each.seconds_for(password) for each in work) > left:
            raise Unreachable(f"too little time left before the deadline of {most:g} s to verify a password")
        if parsed is not None and self._verify(parsed, password):
            return True
        for each in work:
            if parsed is None or each.kind != parsed.kind:
                with contextlib.suppress(EntryError):  # a bad hash of another user does not matter
                    self._verify(each, password)
        return False


def _affordable(hashes: Iterable[Hash], most: float) -> list[Hash]:
    """The most expensive of these hashes, and as many of the others as leave half of the time."""
    costliest, *others = sorted(hashes, key=lambda each: each.seconds, reverse=True)
    chosen, room = [costliest], most / 2 - costliest.seconds
    for each in others:
        if each.seconds <= room:
            chosen.append(each)
            room -= each.seconds
    return chosen
