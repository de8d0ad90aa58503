"""Hashes of one password by every method that the service auth verifies.

Modules that import this one are skipped where the packages of the extra `auth` are missing.
"""

from __future__ import annotations

import pytest

from table_consul.errors import ConfigError
from table_consul.services import passwords

try:
    binding = passwords._binding()
except ConfigError as error:
    pytest.skip(
        f"{error}; it is built from source: apt-get install gcc python3-dev libcrypt-dev", allow_module_level=True
    )
low_level = pytest.importorskip("argon2.low_level", reason="needs argon2-cffi: pip install 'table-consul[auth]'")

PASSWORD = "Correct Horse: bättery|"
SETTINGS = {
    "bcrypt": "$2b$04$abcdefghijklmnopqrstuu",
    "bcrypt of PHP": "$2y$04$abcdefghijklmnopqrstuu",
    "SHA-512": "$6$rounds=1000$saltsalt$",
    "SHA-512 without rounds": "$6$saltsalt$",
    "SHA-256": "$5$rounds=1000$saltsalt$",
    "yescrypt": "$y$j75$F5Jx5fExrKuPp53xLKQ..1$",
    "gost-yescrypt": "$gy$j75$F5Jx5fExrKuPp53xLKQ..1$",
    "scrypt": "$7$2/..../....saltsalt$",
    "MD5": "$1$saltsalt$",
    "DES": "ab",
}


def crypt(setting, password=PASSWORD):
    made = binding.crypt(password, setting)
    assert not made.startswith("*"), f"crypt(3) of this system does not know {setting}"
    return made.encode()


def argon2(password=PASSWORD, kind=low_level.Type.ID, memory=64, passes=1):
    return low_level.hash_secret(password.encode(), b"saltsalt", passes, memory, 1, 32, kind)


HASHES = {name: crypt(setting) for name, setting in SETTINGS.items()} | {
    "argon2id": argon2(),
    "argon2i": argon2(kind=low_level.Type.I),
    "argon2d": argon2(kind=low_level.Type.D),
}
SHA512 = HASHES["SHA-512"]
