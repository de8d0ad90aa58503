"""How a large table is cut into ranges, as a pure function of its keys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from table_consul import kv
from table_consul.sources.cut import Range, covers, cut, gap

FOLDER = b"t/alias/"


def askable(prefix):
    return not kv.modern_name_problem(prefix.removesuffix(b"/"))


def prefixes(found):
    return [each.prefix for each in (*found.watched, *found.rest)]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr("table_consul.sources.cut.RANGE_KEYS", 4)
    monkeypatch.setattr("table_consul.sources.cut.ASK_KEYS", 1)


def numbered(count, form="user%07d"):
    return [(form % number).encode() for number in range(count)]


def test_keys_with_a_long_common_prefix_are_cut_behind_it():
    found = cut({FOLDER: numbered(30_000)}, askable)
    assert {prefix[: len(FOLDER) + 7] for prefix in prefixes(found)} == {
        FOLDER + b"user00" + each for each in (b"0", b"1", b"2")
    }
    assert max(each.size for each in found.watched) <= 10_000
    assert sum(each.size for each in found.watched) == 30_000


def test_names_are_cut_by_their_first_letter():
    names = [bytes([letter]) + b"%d" % number for letter in b"abcdefghijklmnopqrst" for number in range(1000)]
    found = cut({FOLDER: names}, askable)
    assert sorted(each.prefix for each in found.watched) == [FOLDER + bytes([each]) for each in b"abcdefghijklmnopqrst"]
    assert found.rest == []


def test_range_of_ten_thousand_keys_has_parts_of_a_thousand():
    found = cut({FOLDER: numbered(30_000)}, askable)
    assert [len(each.parts) for each in found.watched] == [10, 10, 10]
    assert {leaf.size for each in found.watched for leaf in each.leaves()} == {1_000}


def test_range_with_too_many_parts_has_none():
    names = [
        b"%c%c%03d" % (first, second, number) for first in b"ab" for second in range(48, 123) for number in range(120)
    ]
    found = cut({FOLDER: names}, askable)
    assert [each.parts for each in found.watched] == [(), ()]


def test_each_folder_is_a_range_before_any_is_cut():
    names = numbered(20_000, "%05d")
    found = cut({FOLDER: names, b"t/domain/": [b"example.org"], b"t/userinfo/": []}, askable)
    assert b"t/domain/" in prefixes(found)
    assert Range(b"t/userinfo/", 0) in found.rest
    assert all(each.size for each in found.watched)


def test_table_without_a_cut_is_one_range():
    assert cut({FOLDER: [b"a" * length for length in range(1, 12_000)]}, askable) is None


def test_table_of_one_range_has_parts():
    found = cut({FOLDER: numbered(12_000)}, askable)
    assert [each.prefix for each in found.watched] == [FOLDER]
    assert max(leaf.size for leaf in found.watched[0].leaves()) <= 1_000


def test_key_that_is_a_prefix_of_others_is_in_a_range(small):
    names = [b"s", *numbered(20, "s%03d"), *numbered(20, "t%03d")]
    found = cut({FOLDER: names}, askable)
    assert covers(sorted(prefixes(found)), [FOLDER + b"s"])


@pytest.mark.parametrize("first", [b".", b"..", b" ", b"./"])
def test_no_range_has_a_prefix_that_no_url_can_name(small, first):
    names = [b"a%d" % number for number in range(20)] + [first + b"x%d" % number for number in range(20)]
    found = cut({FOLDER: names}, askable)
    assert found is None or all(map(askable, prefixes(found)))


@pytest.mark.parametrize("name", [b" lead", b".hidden"])
def test_single_key_below_a_prefix_that_no_url_can_name_does_not_prevent_a_cut(small, name):
    found = cut({FOLDER: [name, *(b"%c%d" % (letter, number) for letter in b"abc" for number in range(4))]}, askable)
    assert FOLDER + name in prefixes(found)
    assert covers(sorted(prefixes(found)), [FOLDER + name])


def test_multibyte_characters_are_not_cut(small):
    names = [f"{letter}{number}".encode() for letter in "äöüéß日本語" for number in range(10)]
    found = cut({FOLDER: names}, askable)
    assert {prefix.decode().removeprefix("t/alias/")[0] for prefix in prefixes(found)} == set("äöüéß日本語")


def test_limit_reduces_the_number_of_ranges():
    names = [bytes([letter]) + b"%d" % number for letter in b"abcdefghijklmnopqrst" for number in range(1000)]
    found = cut({FOLDER: names}, askable, 4)
    assert found is None or len(found.watched) <= 4


def flat(found):
    """The ranges and all that are within them."""
    for each in found:
        yield each
        yield from flat(each.parts)


def without_nested(chosen):
    return [each for each in chosen if not any(each != other and each.startswith(other) for other in chosen)]


keys = st.sets(
    st.text("ab.é日 /Zz", min_size=1, max_size=6).map(str.encode)
    | st.integers(0, 300).map(lambda number: b"user%05d" % number),
    max_size=200,
)


@given(folders=st.dictionaries(st.sampled_from([b"t/alias/", b"t/domain/", b"t/d/"]), keys), most=st.integers(1, 8))
def test_every_key_is_in_exactly_one_range(folders, most):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("table_consul.sources.cut.RANGE_KEYS", 4)
        patched.setattr("table_consul.sources.cut.ASK_KEYS", 1)
        found = cut(folders, askable, most)
    if found is None:
        return
    assert len(found.watched) <= most
    names = sorted(path + key for path, each in folders.items() for key in each)
    for each in flat((*found.watched, *found.rest)):
        assert each.size == sum(part.size for part in each.parts) or not each.parts
        assert each.size == sum(name.startswith(each.prefix) for name in names)
        assert each.prefix in folders or askable(each.prefix)
    leaves = [leaf.prefix for each in (*found.watched, *found.rest) for leaf in each.leaves()]
    for chosen in (prefixes(found), leaves):
        assert all(sum(name.startswith(prefix) for prefix in chosen) == 1 for name in names)
        assert covers(sorted(chosen), names)


@given(
    st.sets(st.text("ab", min_size=1, max_size=3).map(str.encode), max_size=5),
    st.lists(st.text("abc", max_size=4).map(str.encode), max_size=20),
)
def test_covers_is_true_if_every_name_begins_with_a_prefix(chosen, names):
    disjoint = sorted(without_nested(chosen))
    expected = all(any(name.startswith(prefix) for prefix in disjoint) for name in names)
    assert covers(disjoint, sorted(names)) == expected


@given(
    st.sets(st.text("abé", min_size=1, max_size=3).map(str.encode), max_size=5), st.text("abcé", min_size=1, max_size=4)
)
def test_gap_is_the_shortest_prefix_outside_the_others(prefixes, name):
    whole = [FOLDER + each for each in without_nested(prefixes)]
    key = FOLDER + name.encode()
    if covers(sorted(whole), [key]):
        return
    found = gap(key, FOLDER, whole)
    if found is None:
        assert any(each.startswith(key) for each in whole)
    else:
        assert key.startswith(found)
        assert found.decode()
        assert not any(each.startswith(found) or found.startswith(each) for each in whole)
