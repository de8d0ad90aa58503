from __future__ import annotations

import json
import re
from copy import copy
from itertools import count, product
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from table_consul.errors import EntryError
from table_consul.services import MAX_KEY_BYTES
from table_consul.services.forms import STEP_SECONDS
from table_consul.services.index import (
    INDEXES,
    WIDTH_SECONDS,
    Addresses,
    Domains,
    HostAddresses,
    Networks,
    Regexes,
)
from tests.services.matchers import MATCHERS, table_mailaddr_match

VECTORS = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "vectors" / "match-vectors.jsonl").read_text(encoding="utf-8").splitlines()
]


def walk(service, entries, key):
    """The first match of a walk over a table of smtpd (table_static.c, table_static_lookup)."""
    match = MATCHERS[service]
    if service == "addrname" and key in entries:
        return key
    return next((entry for entry in sorted(entries) if match(key, entry)), None)


@pytest.mark.parametrize("service", ["domain", "netaddr", "mailaddr", "regex"])
def test_matcher_answers_like_smtpd(service):
    vectors = [vector for vector in VECTORS if vector["service"] == service]
    wrong = [v for v in vectors if MATCHERS[service](v["query"].encode(), v["entry"].encode()) is not v["match"]]
    assert vectors
    assert wrong == []


@pytest.mark.parametrize("service", ["domain", "netaddr", "mailaddr", "regex"])
def test_index_of_one_entry_answers_like_smtpd(service):
    vectors = [vector for vector in VECTORS if vector["service"] == service]
    wrong = []
    for v in vectors:
        entry = v["entry"].encode()
        if INDEXES[service]([entry]).find(v["query"].encode()) != (entry if v["match"] else None):
            wrong.append(v)
    assert wrong == []


@pytest.mark.parametrize("service", ["domain", "netaddr", "mailaddr"])
def test_index_of_all_vector_entries_answers_like_a_walk(service):
    entries = {v["entry"].encode() for v in VECTORS if v["service"] == service}
    index = INDEXES[service](entries)
    queries = sorted({v["query"].encode() for v in VECTORS if v["service"] == service})[::5]
    assert {q: walk(service, entries, q) for q in queries} == {q: index.find(q) for q in queries}


def text(alphabet, size):
    return st.lists(st.sampled_from(alphabet), max_size=size).map(lambda pieces: "".join(pieces).encode())


def tables(entry, key):
    return st.lists(entry, max_size=12).flatmap(
        lambda entries: st.tuples(st.just(entries), st.one_of(key, st.sampled_from(entries)) if entries else key)
    )


HOSTS = text("ab.A*", 8)
PATTERNS = text("ab.*A", 8)
ADDRESSES = st.sampled_from(
    [
        b"10.0.0.1",
        b"10.0.0.129",
        b"10.9.0.1",
        b"192.0.2.7",
        b"[2001:db8::1]",
        b"2001:DB8:0::1",
        b"::1",
        b"[::ffff:1.2.3.4]",
    ]
)
NETWORKS = st.one_of(
    st.builds(lambda a, n: b"%s/%d" % (a.strip(b"[]"), n), ADDRESSES, st.integers(0, 130)),
    st.builds(lambda a, n: b"[%s/%d]" % (a.strip(b"[]"), n), ADDRESSES, st.integers(0, 130)),
    ADDRESSES,
    st.sampled_from(
        [b"local", b"LOCAL", b"10", b"10/8", b"0x0a", b"", b"[", b"[]", b"/8", b"ipv6:10.0.0.1", b"10.0.0.1/"]
    ),
)
EXPRESSION = ["a", "b", "A", ".", "*", "+", "?", "(", ")", "|", "[ab]", "[^a]", "^", "$", "{2}", "\\", "(?i)", "[", "{"]


@given(tables(PATTERNS, HOSTS))
@example(([b"*.b", b"**.b"], b"a.b"))
@example(([b"*.B", b"*.b"], b"a.b"))
@example(([b"*a*a", b"*aa*"], b"baaa"))
@example(([b"*b*b*", b"a*b*", b"*"], b"ab*b"))
def test_domains_answer_like_a_walk(case):
    entries, key = case
    assert walk("domain", entries, key) == Domains(entries).find(key)


@given(tables(text("ab.*+@@A", 7), text("ab.+@@A*", 7)))
def test_addresses_answer_like_a_walk(case):
    entries, key = case
    assert walk("mailaddr", entries, key) == Addresses(entries).find(key)


@pytest.mark.parametrize("service", ["domain", "mailaddr", "regex"])
@given(case=tables(PATTERNS, HOSTS), room=st.integers(0, 12))
def test_index_without_time_for_all_entries_answers_like_a_walk_or_fails(service, case, room):
    entries, key = case
    index = INDEXES[service](entries, room * (WIDTH_SECONDS * MAX_KEY_BYTES if service == "regex" else STEP_SECONDS))
    assert {*dict(index.problems)} <= {*entries}
    too_long = {entry for entry, problem in index.problems if "may take" in problem}
    refused = [entry for entry, problem in index.problems if "of this service would take" in problem]
    wanted = walk(service, {*entries} - too_long, key)
    if refused and (wanted is None or wanted >= min(refused)):
        with pytest.raises(EntryError, match="too many patterns"):
            index.find(key)
    else:
        assert wanted == index.find(key)


# The worst case: the name in HOSTILE follows every pattern to its end, and most expressions.
COSTLY = {
    "domain": [b"*%b*.example" % b"*".join(b"%c" % c for c in row) for row in product(b"ab", repeat=10)],
    "mailaddr": [b"user@*%b" % b"*".join(b"%c" % c for c in row) for row in product(b"ab", repeat=10)],
    "regex": [b"(.*[ab]){20}x%03d$" % n for n in range(200)],
}
HOSTILE = {"domain": b"ab" * 100, "mailaddr": b"user@" + b"ab" * 100, "regex": b"abba" * 200}


@pytest.mark.parametrize("service", COSTLY)
def test_patterns_that_take_more_than_a_tenth_of_the_deadline_are_refused(service):
    entries = [*COSTLY[service], b"user@example.org", b"zz"]
    index = INDEXES[service](entries, 0.01 if service == "regex" else 0.001)
    refused = [entry for entry, _ in index.problems]
    assert refused == sorted(COSTLY[service])[-len(refused) :] != []
    assert {text.rpartition("; ")[2] for _, text in index.problems} == {"simplify or delete some"}
    with pytest.raises(EntryError, match="too many patterns to match all within a tenth of the deadline"):
        index.find(b"zzz")
    assert INDEXES[service](entries, 6.0).problems == []


def test_pattern_below_the_refused_ones_is_still_found():
    index = Domains([b"!.example", b"zz.example", *COSTLY["domain"]], 0.001)
    assert index.find(b"!.example") == b"!.example"
    with pytest.raises(EntryError):
        index.find(b"zz.example")


def test_expression_that_takes_too_long_is_a_problem_and_affects_no_other():
    index = Regexes([b"a{900}", b"b$"], 0.01)
    ((entry, text),) = index.problems
    assert (entry, index.find(b"a" * 900), index.find(b"b")) == (b"a{900}", None, b"b$")
    assert re.search(r"may take 0\.\d\d s to match, more than a tenth of the deadline; repeat less", text)


@pytest.mark.parametrize("service", COSTLY)
def test_key_is_not_matched_when_too_little_time_is_left(service):
    index = INDEXES[service](COSTLY[service], 6.0)
    assert index.timed
    with pytest.raises(EntryError, match="too little time left before the deadline"):
        index.find(HOSTILE[service], lambda: 1e-4)
    assert index.find(HOSTILE[service], lambda: 60.0) == walk(service, COSTLY[service], HOSTILE[service])


def test_name_that_takes_more_than_a_tenth_of_the_deadline_is_an_error_whatever_is_left():
    index = Regexes([b"(a|b)*a(a|b){20}x%d" % n for n in range(1000)], 0.2)
    slow, fast = count(), count()
    assert index.find(HOSTILE["regex"], lambda: 60.0 - 1e-5 * next(fast)) is None
    with pytest.raises(EntryError, match="more than a tenth of the deadline to match this name; simplify them"):
        index.find(HOSTILE["regex"], lambda: 60.0 - 0.03 * next(slow))


def test_ordinary_patterns_are_not_refused_or_timed():
    index = Domains([*(b"*.example%d.org" % n for n in range(20_000)), *(b"mx*.a%d.*" % n for n in range(2_000))])
    assert (index.problems, index.timed) == ([], False)
    assert index.find(b"mx1.a1999.example") == b"mx*.a1999.*"


def test_thousands_of_ordinary_expressions_are_not_refused():
    host = rb"^[a-z0-9-]+\.(dyn|pool|dsl)[0-9]{1,3}\.(north|south|east|west)-%d\.customers\.example-%d\.(net|com)$"
    index = Regexes([host % (n, n) for n in range(1000)])
    assert index.problems == []
    assert index.find(b"a-1.pool17.west-999.customers.example-999.com") == host % (999, 999)


@given(tables(text("ab.*+_@A", 7), text("ab.+_@A*", 7)), st.sampled_from([b"_", b".", b"a", b"+"]))
@example(([b"a"], b"a_b@b"), b"_")
@example(([b"a"], b"a+b@b"), b"_")
def test_addresses_with_another_delimiter_answer_like_a_walk(case, delimiter):
    entries, key = [entry.lower() for entry in case[0]], case[1].lower()  # a delimiter is compared case-sensitively
    first = next((entry for entry in sorted(entries) if table_mailaddr_match(key, entry, delimiter)), None)
    assert first == Addresses(entries, delimiter=delimiter).find(key)


@given(tables(NETWORKS, NETWORKS))
def test_networks_answer_like_a_walk(case):
    entries, key = case
    assert walk("netaddr", entries, key) == Networks(entries).find(key)


@given(tables(NETWORKS, NETWORKS))
def test_host_addresses_answer_like_a_walk(case):
    entries, key = case
    assert walk("addrname", entries, key) == HostAddresses(entries).find(key)


@given(tables(text(EXPRESSION, 6), text("abA(", 5)))
def test_regexes_answer_like_a_walk(case):
    entries, key = case
    assert walk("regex", entries, key) == Regexes(entries).find(key)


ENTRIES = {
    "domain": PATTERNS,
    "mailaddr": st.one_of(text("ab.*+@@A", 7), st.just(b"u" * 256 + b"@b")),
    "netaddr": NETWORKS,
    "addrname": NETWORKS,
    "regex": text(EXPRESSION, 6),
}


@pytest.mark.parametrize("service", INDEXES)
@given(data=st.data(), room=st.one_of(st.none(), st.integers(0, 12)))
def test_changed_index_answers_like_one_that_was_built_from_scratch(service, data, room):
    tables = st.sets(ENTRIES[service], max_size=10)
    seconds = 2.0 if room is None else room * (WIDTH_SECONDS * MAX_KEY_BYTES if service == "regex" else STEP_SECONDS)

    def answers(index):
        for key in keys:
            try:
                yield index.find(key)
            except EntryError as error:
                yield str(error)

    before = data.draw(tables)
    index = INDEXES[service](before, seconds)
    for after in data.draw(st.lists(tables, min_size=1, max_size=3)):
        keys = [*before, *after, b"a.b", b"ab@a.b", b"10.0.0.1", b"::1"]
        former, known = index, [*answers(index)]
        index = copy(index)
        index.change(after - before, before - after, after, after.__contains__)
        scratch = INDEXES[service](after, seconds)
        assert [*answers(index)] == [*answers(scratch)]
        assert (sorted(index.problems), index.timed) == (sorted(scratch.problems), scratch.timed)
        assert known == [*answers(former)]
        before = after


@given(st.sampled_from(sorted(INDEXES)), st.lists(st.binary(max_size=40), max_size=8), st.binary(max_size=60))
def test_index_never_raises(service, entries, key):
    index = INDEXES[service](entries)
    found = index.find(key)
    assert found is None or found in entries
    assert all(entry in entries and "\n" not in remedy for entry, remedy in index.problems)
    for entry in entries:
        MATCHERS[service](key, entry)


@pytest.mark.parametrize(
    ("service", "entries", "key", "answer"),
    [
        ("domain", [b"example.org", b"*.example.org", b"*"], b"mail.example.org", b"*"),
        ("domain", [b"example.org", b"*.example.org"], b"mail.example.org", b"*.example.org"),
        ("domain", [b"*.example.org"], b"example.org", None),
        ("domain", [b"*.example.org"], b"a.b.example.org", None),
        ("domain", [b"*.*.example.org"], b"a.b.example.org", b"*.*.example.org"),
        ("domain", [b"mx*", b"mx1"], b"mx1", b"mx*"),
        ("domain", ["müller.example".encode()], "müller.example".encode(), "müller.example".encode()),
        ("domain", ["*.müller.example".encode()], "a.müller.example".encode(), "*.müller.example".encode()),
        ("netaddr", [b"192.0.2.0/24", b"192.0.2.1", b"192.0.0.0/16"], b"192.0.2.1", b"192.0.0.0/16"),
        ("netaddr", [b"10/8", b"10.0.0.0/8"], b"10.1.2.3", b"10.0.0.0/8"),
        ("netaddr", [b"2001:db8::/32"], b"[2001:db8::1]", b"2001:db8::/32"),
        ("netaddr", [b"[2001:db8::/32]"], b"[2001:db8::1]", b"[2001:db8::/32]"),
        ("netaddr", [b"0.0.0.0/0"], b"[2001:db8::1]", None),
        ("netaddr", [b"0.0.0.0/0", b"::/0", b"local"], b"local", b"local"),
        ("netaddr", [b"fe80::/10"], b"[fe80::1%eth0]", None),
        ("mailaddr", [b"user@example.org", b"@example.org"], b"user@example.org", b"@example.org"),
        ("mailaddr", [b"user"], b"user+tag@example.org", b"user"),
        ("mailaddr", [b"user+tag@example.org"], b"user+tag@example.org", b"user+tag@example.org"),
        ("mailaddr", [b"user+tag@example.org"], b"user+other@example.org", None),
        ("mailaddr", [b"user@*.example.org"], b"user+tag@a.example.org", b"user@*.example.org"),
        ("mailaddr", [b"@"], b"anybody@anywhere", b"@"),
        ("mailaddr", ["jürgen@*.example".encode()], "jürgen@ä.example".encode(), "jürgen@*.example".encode()),
        ("netaddr", [b"0x0a", b"0xc00002/23"], b"192.0.3.1", b"0xc00002/23"),
        ("netaddr", [b"[ipv6:2001:db8::/ +32]"], b"[2001:db8::1]", b"[ipv6:2001:db8::/ +32]"),
        ("netaddr", [b"224"], b"239.0.0.1", None),
        ("netaddr", [b"172.16", b"192.0.2", b"240"], b"172.16.9.9", b"172.16"),
        ("regex", [b"^b", b"^a", b"a"], b"abc", b"^a"),
        ("regex", [b"(?i)^FOO"], b"foo", b"(?i)^FOO"),
        ("addrname", [b"::1"], b"[::1]", b"::1"),
        ("addrname", [b"::1", b"[::1]"], b"[::1]", b"[::1]"),
        ("addrname", [b"0:0::1", b"::1"], b"[::1]", b"0:0::1"),
        ("addrname", [b"192.0.2.1"], b"192.0.2.1", b"192.0.2.1"),
        ("addrname", [b"::ffff:c000:201"], b"[::ffff:192.0.2.1]", b"::ffff:c000:201"),
        ("addrname", [b"::ffff:192.0.2.1"], b"192.0.2.1", None),
        ("addrname", [b"fe80::1%eth0"], b"[fe80::1%eth0]", b"fe80::1%eth0"),
        ("addrname", [b"fe80::1"], b"[fe80::1%eth0]", None),
    ],
)
def test_index_finds_the_lowest_matching_entry(service, entries, key, answer):
    assert answer == INDEXES[service](entries).find(key)
    assert answer == INDEXES[service](reversed(entries)).find(key)


# The answers of glibc's regcomp(3) and regexec(3) in the C locale; none of these are among the vectors.
@pytest.mark.parametrize(
    ("service", "entry"),
    [
        ("netaddr", b"example.org"),
        ("netaddr", b"192.0.2.0/33"),
        ("netaddr", b"[2001:db8::]/32"),
        ("netaddr", b"1" * (MAX_KEY_BYTES + 1)),
        ("addrname", b"example.org"),
        ("addrname", b"192.0.2"),
        ("addrname", b"192.0.2.256"),
        ("addrname", b"1" * (MAX_KEY_BYTES + 1)),
        ("mailaddr", b"u" * 256 + b"@example.org"),
        ("mailaddr", b"@" + b"h" * 256),
        ("domain", b"h" * (MAX_KEY_BYTES + 1)),
    ],
)
def test_index_reports_an_unusable_entry_once(service, entry):
    index = INDEXES[service]([entry, b"local" if service == "netaddr" else b"192.0.2.1"])
    assert [entry] == [problem for problem, _ in index.problems]


@pytest.mark.parametrize("service", ["domain", "netaddr", "mailaddr", "addrname"])
def test_hostile_keys_are_answered_like_a_walk(service):
    hosts = [b"%s*%sexample%d.org" % (b"m" * (n % 8), b"abc.."[n % 5 : n % 5 + 1], n) for n in range(500)]
    nets = [b"10.%d.0.0/%d" % (n % 250, n % 33) for n in range(250)] + [b"%x::/%d" % (n, n % 129) for n in range(250)]
    entries = {"domain": hosts, "mailaddr": [b"user@" + h for h in hosts], "netaddr": nets, "addrname": nets}[service]
    index = INDEXES[service](entries)
    keys = [b"*" * 1023, b"a." * 511, b"m" * 1023, b"@" * 1023, b"u+" * 127 + b"@" + b"mc." * 85, b"1" * 1023]
    keys += [
        b"[" + b"::" * 500 + b"]",
        b"10.0.0.1",
        b"[::1]",
        b":" * 1023,
        b"0x" + b"f" * 1021,
        b"::1.2.3." + b"4" * 999,
    ]
    keys += [b"0" * 20_000, b"::/" + b"1" * 20_000]
    assert [walk(service, entries, key) for key in keys] == [index.find(key) for key in keys]
