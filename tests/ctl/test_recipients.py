"""Aliases that smtpd cannot expand. tests/e2e/test_expansion.py asks smtpd itself about the same tables."""

from __future__ import annotations

import pytest

from table_consul.ctl import recipients
from tests.ctl.expansions import LOCAL, VIRTUAL, chain


def failures(aliases):
    return dict(recipients.rejected_aliases({key.encode(): value.encode() for key, value in aliases.items()}))


@pytest.mark.parametrize("table", [LOCAL, VIRTUAL])
def test_aliases_that_smtpd_rejects_are_found(table):
    assert {key.decode() for key in failures(table.aliases)} == table.rejected


@pytest.mark.parametrize(
    ("aliases", "key", "cause"),
    [
        ({"a": "b", "b": "a"}, b"a", "an alias loop (a -> b -> a)"),
        ({"x": "a", "a": "b", "b": "A"}, b"x", "an alias loop (a -> b -> a)"),
        ({"@d.org": "x@d.org"}, b"@d.org", "an alias loop (@d.org -> @d.org)"),
        (
            {"a@d.org": "b@D.org, eric", "b@d.org": "a@d.org"},
            b"a@d.org",
            "an alias loop (a@d.org -> b@d.org -> a@d.org)",
        ),
        (chain("n", 9), b"n1", "a chain of too many aliases (n1 -> n2 -> n3 -> n4 -> n5 -> n6 -> n7 -> n8 -> n9)"),
    ],
)
def test_failure_names_its_cause(aliases, key, cause):
    advice = "break the loop" if "loop" in cause else "shorten the chain"
    assert failures(aliases)[key] == f"{cause}, so smtpd rejects mail to this alias; {advice}"


def test_tag_begins_with_the_delimiter_of_smtpd():
    aliases = {b"a": b"b_x", b"b": b"a_y"}
    assert [
        [*recipients.rejected_aliases(aliases)],
        [key for key, _ in recipients.rejected_aliases(aliases, b"_")],
    ] == [[], [b"a", b"b"]]


def test_alias_with_an_error_or_without_value_is_not_followed():
    assert failures({"a": "b", "b": ""}) == {}


@pytest.mark.parametrize(
    "element", ["|cat a@d.org", "/srv/a@d.org", '"|x a@d.org"', ":include:/a@d.org", "error:550 a@d.org"]
)
def test_special_elements_are_not_addresses(element):
    assert failures({"@d.org": element}) == {}


def test_addresses_of_other_domains_are_not_followed():
    assert failures({"a": "a@example.com", "b@d.org": "b@example.com", "@example.net": "c@example.com"}) == {}


@pytest.mark.slow
def test_incomplete_search_is_reported():
    lists = {f"a{n}@d": ",".join(f"a{m}@d" for m in range(100)) for n in range(100)}
    assert set(failures(lists).values()) == {recipients.TOO_NESTED}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("aliases", "count"),
    [
        ({f"a{n}": f"a{n + 1}" for n in range(10_000)}, 10_000 - 8),
        ({f"a{n}": f"a{(n + 1) % 10_000}" for n in range(10_000)}, 10_000),
        ({f"a{n}": ",".join(f"a{m}" for m in range(50)) for n in range(50)}, 0),
        ({f"a{n}": ",".join(f"a{m}" for m in range(n)) + ",a9" for n in range(1, 80)}, 0),
        ({f"a{n}@d": ",".join(f"a{m}@d" for m in range(100)) for n in range(100)}, 100),
        ({f"a{n}": ",".join(f"u{m}" for m in range(100)) for n in range(100)}, 0),
    ],
    ids=["chain", "loop", "lists-of-lists", "lists-of-former-lists", "address-lists", "lists"],
)
def test_no_table_takes_more_than_linear_time(aliases, count):
    """Quadratic time, or the exponential time of smtpd's own expansion, would exceed the timeout of this test."""
    assert len(failures(aliases)) == count
