"""Regular expressions in the index: matches, and refused expressions."""

from __future__ import annotations

import re
import sys

import pytest

from table_consul.errors import EntryError
from table_consul.services import MAX_KEY_BYTES
from table_consul.services.index import Regexes
from table_consul.services.regex import regcomp


@pytest.mark.parametrize(
    ("entry", "matching", "other"),
    [
        (b"a**b", b"aab", b"aa"),
        (b"a+?$", b"aa", None),
        (b"a{,2}$", b"", None),
        (b"^a{0}$", b"", b"a"),
        (b"a}", b"a}", b"a"),
        (b"a.b", b"a\nb", b"ab"),
        (b"a$", b"a", b"a\n"),
        (b"^(|a)$", b"", b"b"),
        (b"()*a", b"a", b"b"),
        (b"[]a]$", b"]", b"b"),
        (b"^[^]a]$", b"b", b"]"),
        (b"^[a-]$", b"-", b"b"),
        (b"^[--/]$", b".", b"0"),
        (b"^[a---]$", b"-", b"b"),
        (b"^[\\]$", b"\\", b"a"),
        (b"^[[.-.]x]$", b"-", b"."),
        (b"^[[=a=]]$", b"a", b"="),
        (b"^[[:alpha:]-]$", b"-", b":"),
        (b"^\\w\\W\\s\\S$", b"a-\vb", b"aa b"),
        (b"\\bfoo\\b", b"a foo b", b"afoo"),
        (b"o\\Bo", b"foo", b"o o"),
        (b"\\`a\\'", b"a", b"aa"),
        (b"\\d", b"d", b"1"),
        (b"(?i)^[a-c]\\.x$", b"B.X", b"d.x"),
        (b"(?i)[[:upper:]]", b"a", b"1"),
        (b"(?i)[[:lower:]]", b"A", b"1"),
        (b"(?i)\\a|^$", b"", b"a"),
        (b"^[^\\W\\w]*$", b"[]", b"w"),
        (b"\xfc", "ü".encode("latin-1"), b"\xdc"),
        (b"(?i)\xfc", "ü".encode("latin-1"), b"\xdc"),
    ],
)
def test_regex_matches_as_in_glibc(entry, matching, other):
    assert entry == Regexes([entry]).find(matching)
    assert other is None or Regexes([entry]).find(other) is None


@pytest.mark.parametrize(
    "entry",
    [
        b"(a)\\1",
        b"\\<a",
        b"(a",
        b"[a",
        b"[[:alpha:",
        b"[[.a",
        b"[[:nope:]]",
        b"[[.ab.]]",
        b"[b-a]",
        b"[a-z-9]",
        b"[a-[:digit:]]",
        b"*a",
        b"^*",
        b"a|*b",
        b"(?:a)",
        b"a{",
        b"a{}",
        b"a{x}",
        b"a{2,1}",
        b"{2}",
        b"a{1001}",
        b"a\\",
        b"((a{500}){500}){500}",
        b"(" * 500 + b")" * 500 + b"(",
        b"a" * (MAX_KEY_BYTES + 1),
    ],
)
def test_regex_that_is_rejected_is_a_problem_and_affects_no_other(entry):
    index = Regexes([entry, b"b$"])
    assert [entry] == [problem for problem, _ in index.problems]
    assert index.find(b"a") is None
    assert index.find(b"b") == b"b$"


@pytest.mark.parametrize(
    ("entry", "hint"),
    [
        (b"(a)\\1", "back-reference"),
        (b"\\<a", "write \\b"),
        (b"(a", "write \\( for the character"),
        (b"[a", "write \\[ for the character"),
        (b"[[.a", "write \\[ for the character"),
        (b"[[:nope:]]", "such as [:alpha:]"),
        (b"[[.ab.]]", "write it out"),
        (b"[b-a]", "write it in ascending order"),
        (b"[a-z-9]", "put it last, before the ]"),
        (b"*a", "put a \\ before it"),
        (b"a{x}", "{n}, {n,} or {n,m}; put a \\ before it"),
        (b"a{2,1}", "exchange them"),
        (b"a{1001}", "repeat less"),
        (b"a\\", "write \\\\ for the character"),
        (b"((a{500}){500}){500}", "split it into several entries"),
    ],
)
def test_regex_that_is_rejected_comes_with_a_hint(entry, hint):
    with pytest.raises(EntryError, match=re.escape(hint)):
        regcomp(entry)


def test_regex_escape_of_another_dialect_is_a_problem():
    ((entry, remedy),) = Regexes([b"^\\d+$", b"\\\\d", b"\\.\\w"]).problems
    assert entry == b"^\\d+$"
    assert "[0-9]" in remedy


def test_regex_without_google_re2_is_a_problem_and_proves_no_absence(monkeypatch):
    monkeypatch.setitem(sys.modules, "re2", None)
    index = Regexes([b"a", b"b"])
    with pytest.raises(EntryError, match="google-re2; install it"):
        index.find(b"a")
    assert [entry for entry, remedy in index.problems if "google-re2" in remedy] == [b"a", b"b"]


def test_regexes_match_again_once_google_re2_is_installed(monkeypatch):
    pytest.importorskip("re2")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "re2", None)
        index = Regexes([b"a"])
    index.change([b"b"], [], [b"a", b"b"], {b"a", b"b"}.__contains__)
    assert (index.find(b"a"), index.find(b"c"), index.problems) == (b"a", None, [])


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("def f(:", "reinstall it"),
        ("raise ImportError('undefined symbol')", "reinstall it"),
        ("raise RuntimeError('bug')", "reinstall it"),
        ("raise SystemExit('needs Python 3.14')", "reinstall it"),
        ("from re import compile, error, purge", "replace it"),
    ],
)
def test_broken_re2_is_a_problem_of_the_expressions_only(text, hint, tmp_path, monkeypatch):
    (tmp_path / "re2.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "re2", None)
    monkeypatch.delitem(sys.modules, "re2")
    problems = Regexes([b"a", b"b"]).problems
    assert [entry for entry, remedy in problems if "google-re2" in remedy and hint in remedy] == [b"a", b"b"]


@pytest.mark.parametrize("memory", [1, 2_000, 20_000])
def test_regex_set_out_of_memory_is_an_error(memory, monkeypatch):
    monkeypatch.setattr("table_consul.services.regex.REGEX_SET_BYTES", memory)
    index = Regexes([b"^host-[0-9]+-%d\\.(foo|bar)" % n for n in range(40)])
    for key in (b"host-1-7.bar", b"host-1-77.bar"):
        with pytest.raises(EntryError, match="too much memory"):
            index.find(key)


def test_regexes_in_several_sets_are_distinguished():
    index = Regexes([b"^x%04d$" % n for n in range(1000)])
    assert [b"^x%04d$" % n for n in range(1000)] == [index.find(b"x%04d" % n) for n in range(1000)]
