"""Stored values, alias lines, services and settings of a table for property tests."""

from __future__ import annotations

import json

from hypothesis import strategies as st
from msgspec.structs import replace

from table_consul.services import SERVICES
from tests.services.parsing import TABLE

LINES = st.lists(st.sampled_from([b"a", b"|", b"/", b",", b" ", b"\\", b'"', b"'", b"include:", b":", b"\t"])).map(
    b"".join
)
ELEMENTS = (
    st.lists(
        st.sampled_from(
            (
                *(b"a", b"gilles", b"@", b".", b"-_+", b"x.org", b"error:", b":Error:", b"550 ", b"450 4.2.0 x", b":"),
                *(b":include:", b"include:", b"/", b"|", b'"', b" ", b"<", b">", b"!", b"\xc3\xa4"),
                *(b"a" * 250, b"x" * 1020),
            )
        ),
        min_size=1,
        max_size=5,
    )
    .map(lambda pieces: b"".join(pieces).strip())
    .filter(bool)
)
"""Elements of an alias after splitting."""
RAW = st.one_of(
    st.binary(),
    st.text('"[],\\|/:#0149ua \n\r\t\0é\ud800').map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.recursive(st.text(), lambda inner: st.lists(inner, max_size=3)).map(lambda value: json.dumps(value).encode()),
    st.lists(st.sampled_from(["0", "1000", "9" * 5000, ":", "/h", " ", "+"])).map(
        lambda parts: "".join(parts).encode()
    ),
    st.none(),
)
TABLES = st.builds(
    replace,
    st.just(TABLE),
    value_format=st.sampled_from(["auto", "text", "json"]),
    allow_commands=st.booleans(),
    allow_root=st.booleans(),
    fetch=st.sampled_from(["keys", "values"]),
)
SERVICE = st.sampled_from(sorted(SERVICES.values()))
