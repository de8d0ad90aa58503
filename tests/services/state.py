"""All answers of entries, for comparison; and keys and values of every kind."""

from __future__ import annotations

from hypothesis import strategies as st
from msgspec.structs import replace

from table_consul.errors import EntryError
from table_consul.services import fold_key
from tests.services.parsing import COMMANDS, RECORD, TABLE

SHA512 = b"$6$saltsalt$" + b"." * 86
CASE_VARIANTS = [
    b"root",
    b"Root",
    b"ROOT",
    b"*",
    b" Root",
    b"vera",
    b"Vera",
    b"a:b",
    b"192.0.2.1",
    b"::1",
    b"A@b",
    b"x/",
    b"*b*A",
    "\ufffd".encode(),
    b"(?i)^[R]oot",
]
STORED = st.sampled_from(
    [
        b'"gilles"',
        b'"\\"gilles\\""',
        b'["gilles"]',
        b"|sh",
        b'"|sh"',
        b"gilles, eric schmidt",
        b"a\nb",
        b"gilles",
        b"gilles\n",
        b"",
        None,
        b"1000:1000:/home/x",
        b"0:0:/root",
        RECORD,
        b'{"password": "hunter2"}',
        b'{"uid": 1}',
        b"{}",
        b"{CRYPT}" + SHA512,
        SHA512,
        b"vera:hunter2",
        b"hunter2",
        b"*",
        b"*LK*",
        b"192.0.2.1",
        b"$2b$15$" + b"." * 53,
        b"vera:$2b$10$" + b"." * 53,
        b"*a*b*",
        b"(a|b){9}",
    ]
)
REUSING_TABLES = st.sampled_from(
    [
        TABLE,
        COMMANDS,
        replace(TABLE, value_format="text"),
        replace(TABLE, value_format="json"),
        replace(TABLE, services=("auth", "credentials"), deadline=0.1),
        replace(TABLE, services=("auth", "credentials"), deadline=60.0),
    ]
)


PATTERN_KEYS = [
    *(
        b"10/8",
        b"10.0.0.0/8",
        b"192.0.2.0/24",
        b"0x0a",
        b"2001:db8::/32",
        b"[2001:db8::1]",
        b"0:0::1",
        b"[::1]",
        b"local",
    ),
    *(b"*.b", b"**.b", b"a*b*", b"@", b"a@", b"a", b"a@*.b", b"a@**.b", b"a+b@b", b"h" * 256 + b"@b", b"h" * 1024),
]
QUESTIONS = [*CASE_VARIANTS, *PATTERN_KEYS, b"nobody", b"a.b", b"b@a.b", b"10.1.2.3", b"[2001:db8::2]", b"aab", b"\x80"]


def state(found):
    def answer(ask, key):
        try:
            return ask(key)
        except EntryError as error:
            return type(error), str(error)

    return {
        "values": found.values,
        "errors": found.errors,
        "incomplete": found.incomplete,
        "warnings": found.warnings,
        "problems": sorted(found.problems),
        "spelling": sorted(found.spelling),
        "original_case": found.original_case,
        "kinds": {*found.kinds},
        "answers": [
            answer(ask, fold_key(key))
            for key in QUESTIONS
            for ask in (found.lookup, found.contains, found.next_after, found.uses_default)
        ],
        "shape": (len(found), found.plain, found.timed, found.refused),
    }
