"""Reading and writing files line by line: file: tables, aliases(5), passwd files, exports, and binary files."""

from __future__ import annotations

import base64
import gzip
import io
import json
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from table_consul.ctl import formats
from table_consul.ctl.formats import FormatError, read_aliases
from table_consul.errors import SourceError
from table_consul.services import SERVICES
from table_consul.sources.export import export_entry
from tests.ctl.parsed import ALIAS, CREDENTIALS, DOMAIN, HASH, PATH, STRING, USERINFO, pairs, problems, read

contents = st.binary(max_size=300) | st.lists(
    st.sampled_from([b"a", b"[", b"]", b":", b" ", b"\t", b"\n", b"#", b"\\", b'"', b"|", b",", b"x", b"@list", b"{"])
).map(b"".join)


# smtpd's tables. Each case was tried against parse_table_line of 7.8.0p1.


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        (b"root gilles", b"root", b"gilles"),
        (b"root:gilles", b"root", b"gilles"),
        (b"root: gilles, eric", b"root", b"gilles, eric"),
        (b"\troot \t gilles \r", b"root", b"gilles"),
        (b"Root: Gilles", b"root", b"Gilles"),
        (b"foo::bar", b"foo", b":bar"),
        (b"list: :include:/etc/list", b"list", b":include:/etc/list"),
        (b"[::1]:localhost", b"[::1]", b"localhost"),
        (b"[::1] localhost", b"[::1]", b"localhost"),
        (b"label user:password # 1", b"label", b"user:password # 1"),
        (b"a\xe9 b\xe9", b"a\xe9", b"b\xe9"),
        (b"key value\\", b"key", b"value\\"),
    ],
)
def test_mapping_line_is_read_as_smtpd_reads_it(line, key, value):
    assert pairs(formats.read_table(line + b"\n", STRING)) == [(key, value)]


def test_file_without_values_is_a_list_of_whole_lines():
    text = b"# domains\n\n  example.org  \n*.Example.NET\n\t# more\nexample.com"
    assert pairs(formats.read_table(text, DOMAIN)) == [
        (b"example.org", b""),
        (b"*.example.net", b""),
        (b"example.com", b""),
    ]


def test_list_comment_forces_a_list():
    assert pairs(formats.read_table(b"#  @list \na b\nc: d\n", STRING)) == [(b"a b", b""), (b"c: d", b"")]


def test_list_comment_after_the_first_entry_is_ignored():
    assert pairs(formats.read_table(b"a b\n# @list\nc d\n", STRING)) == [(b"a", b"b"), (b"c", b"d")]


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        (b"a b\nc\n", 2, "no value"),
        (b"a b\n\n# x\nc:   \n", 4, "no value"),
        (b"a b\n:c\n", 2, "no key"),
        (b"a b\n[::1 c\n", 2, "has no ]"),
        (b"[::1\n", 1, "has no ]"),
        (b"foo : bar\n", 1, "blank before its colon"),
    ],
)
def test_bad_table_line_is_a_problem_with_its_number(text, line, expected):
    assert expected in problems(formats.read_table(text, STRING))[line]


@pytest.mark.parametrize("host", [b"[smtp.example.net]", b"smtp.example.net"])
@pytest.mark.parametrize("port", [b"587", b"submission", b"smtps"])
def test_port_of_a_postfix_sasl_passwd_map_is_a_problem(host, port):
    text = b"label mailer:secret\n%b:%b  gilles@example.net:secret\n" % (host, port)
    parsed = read(text, CREDENTIALS, "auto")
    assert "the port of a Postfix sasl_passwd map" in problems(parsed)[2]
    assert [entry.key for entry in parsed.entries] == [b"label"]


@pytest.mark.parametrize(
    ("line", "value"),
    [
        (b"smtp.example.net gilles:secret", b"gilles:secret"),
        (b"smtp.example.net:587:secret", b"587:secret"),
        (b"smtp.example.net\t587 gilles:secret", b"587 gilles:secret"),
    ],
)
def test_relay_credentials_without_a_port_are_read_as_smtpd_reads_them(line, value):
    assert pairs(read(line, CREDENTIALS, "table")) == [(b"smtp.example.net", value)]


def test_list_for_a_service_with_values_is_one_problem():
    assert list(problems(formats.read_table(b"\nroot\neric\ngilles\n", ALIAS))) == [2]


@pytest.mark.parametrize(
    ("line", "service"),
    [
        (b"10.0.0.1 REJECT", "netaddr"),
        (b"2001:db8::/32", "netaddr"),
        (b"[2001:db8::1] OK", "netaddr"),
        (b"example.com REJECT", "domain"),
        (b"example.org #note", "domain"),
        (b"example.org\t# note", "domain"),
        (b"example.org:", "domain"),
        (b"example.org: relay", "domain"),
        (b"^a b$", "regex"),
    ],
)
def test_mapping_for_a_service_of_lists_is_one_problem(line, service):
    for wanted in ("auto", "table"):
        parsed = read(b"# x\n%b\nb c\nd\n" % line, SERVICES[service], wanted)
        assert parsed.entries == []
        assert list(problems(parsed)) == [2]
        assert f"as a mapping, but {service} requires a list (" in problems(parsed)[2]
        assert len(pairs(read(b"# @list\n%b\n" % line, SERVICES[service], wanted))) == 1


@pytest.mark.parametrize("service", ["mailaddr", "source", "relayhost", "string"])
def test_mapping_for_a_service_with_lists_and_mappings_is_read(service):
    assert pairs(read(b"a b\n", SERVICES[service], "auto")) == [(b"a", b"b")]


# aliases(5).


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        (b"root: gilles", b"root", b"gilles"),
        (b"root:gilles,eric", b"root", b"gilles,eric"),
        (b"root gilles", b"root", b"gilles"),
        (b"Root : Gilles@Example.ORG", b"root", b"Gilles@Example.ORG"),
        (b'"john doe" : john', b"john doe", b"john"),
        (b"root: gilles, # the boss", b"root", b"gilles"),
        (b"root: gilles#1", b"root", b"gilles#1"),
        (b'x: "|/bin/a # b"', b"x", b'"|/bin/a # b"'),
        (b'x: |"/bin/a -f, b"', b"x", b'"|/bin/a -f, b"'),
        (b'x: y, |"/bin/a b" , z', b"x", b'y, "|/bin/a b", z'),
        (b"x: |/bin/cat", b"x", b"|/bin/cat"),
        (b"x: :include:/etc/list", b"x", b":include:/etc/list"),
        (b"x :include:/etc/list", b"x", b":include:/etc/list"),
        (b"x::include:/etc/list", b"x", b":include:/etc/list"),
        (b"x: :error:550 no such user", b"x", b":error:550 no such user"),
        (b"@example.org postmaster", b"@example.org", b"postmaster"),
        (b"user+tag@example.org: gilles", b"user+tag@example.org", b"gilles"),
        (b"a:\\gilles\r", b"a", b"\\gilles"),
    ],
)
def test_alias_line_is_read_as_in_aliases_5(line, key, value):
    assert pairs(read_aliases(line)) == [(key, value)]


def test_indented_line_continues_the_line_before():
    text = b"# x\nall: a,\n  b,\n# between\n\n\tc\nroot: all\n"
    parsed = read_aliases(text, cautious=True)
    assert pairs(parsed) == [(b"all", b"a, b, c"), (b"root", b"all")]
    assert [entry.line for entry in parsed.entries] == [2, 7]


def test_indented_line_after_a_comma_is_not_ambiguous():
    parsed = read(b"all: a,\n  error:550 gone\n", ALIAS, "auto")
    assert pairs(parsed) == [(b"all", b"a, error:550 gone")]


def test_backslash_joins_lines_as_makemap_does():
    assert pairs(read_aliases(b"all: a, \\\nb, \\\n c\nroot: x\n", cautious=True)) == [
        (b"all", b"a, b, c"),
        (b"root", b"x"),
    ]


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        (b"  root: x\n", 1, "no previous line"),
        (b"root:\n", 1, "no value"),
        (b"root: ,\n", 1, "no value"),
        (b"a: b\n\nroot\n", 3, "no value"),
        (b": x\n", 1, "no key"),
        (b'"root: x\n', 1, "quote"),
        (b'"root" x\n', 1, "quote"),
    ],
)
def test_bad_alias_line_is_a_problem_with_its_number(text, line, expected):
    assert expected in problems(read_aliases(text))[line]


def test_ambiguous_indented_line_requires_a_format():
    text = b"root: gilles\n  eric: joerg\n"
    assert "--format" in problems(read(text, ALIAS, "auto"))[2]
    assert pairs(read(text, ALIAS, "table")) == [(b"root", b"gilles"), (b"eric", b"joerg")]
    assert pairs(read(text, ALIAS, "aliases")) == [(b"root", b"gilles eric: joerg")]


# Users.


# Exports.


def exported(*keys):
    return json.dumps([{"key": key, "flags": 7, "value": base64.b64encode(b"v").decode()} for key in keys]).encode()


def keys_of(parsed):
    return [entry.key for entry in parsed.entries]


def test_export_with_the_same_folder_leaves_out_other_folders():
    data = exported("aliases/", "aliases/alias/", "aliases/alias/Root", "aliases/domain/x", "other/alias/y")
    parsed = read(data, ALIAS, "auto")
    assert (parsed.format, keys_of(parsed), parsed.left_out) == ("export", [b"Root"], 3)
    assert parsed.entries[0] == (b"Root", b"v", 3, 7)


def test_export_of_another_table_uses_its_only_folder_of_that_name():
    parsed = read(exported("old/mail/alias/a", "old/mail/alias/b/c", "old/mail/domain/d"), ALIAS, "auto")
    assert (keys_of(parsed), parsed.left_out) == ([b"a", b"b/c"], 1)


@pytest.mark.parametrize("keys", [("one/alias/a", "two/alias/b"), ("people/a", "people/b")])
def test_export_with_several_folders_or_none_requires_a_name(keys):
    with pytest.raises(FormatError, match="--from"):
        read(exported(*keys), ALIAS, "auto")
    folder = keys[0].rpartition("/")[0]
    assert b"a" in keys_of(read(exported(*keys), ALIAS, "auto", below=folder))


def test_export_without_the_named_folder_is_an_error():
    with pytest.raises(FormatError, match="contains no keys below none/"):
        read(exported("a/b"), ALIAS, "export", below="none")


@pytest.mark.parametrize("data", [b"[{", b"{}", b'[{"key": 1}]', b'[{"key": "a", "value": "?"}]', b"root: gilles", b""])
def test_bad_export_is_an_error(data):
    with pytest.raises(SourceError, match="not the output of `consul kv export`"):
        read(data, ALIAS, "export")


def test_empty_export_has_no_entries():
    assert read(b"[]\n", ALIAS, "auto")[:4] == ("export", [], [], 0)


def test_export_entries_are_read_back_unchanged():
    entries = [(PATH + b"a", b"\xff\n", 5), (PATH + "gr\u00fc\u00df".encode(), b"", 0)]
    parsed = read(b"[%b]" % b",".join(export_entry(*each) for each in entries), ALIAS, "auto")
    assert parsed.entries == [(b"a", b"\xff\n", 1, 5), ("gr\u00fc\u00df".encode(), b"", 2, 0)]


# Detection of the format, and files that are not text.


@pytest.mark.parametrize(
    ("text", "service", "name"),
    [
        (b"root: gilles\n", "alias", "aliases"),
        (b"vera:*:1:1::/home/vera:/bin/sh\n", "userinfo", "passwd"),
        (b"# users\nvera\t1:1:/home/vera\n", "userinfo", "table"),
        (b"vera:1:1:/home/vera\neric:1:1:\n", "userinfo", "table"),
        (b"vera:x:1:1:Vera:/home/vera\n", "userinfo", "passwd"),
        (b"vera::1:1\n", "userinfo", "passwd"),
        (b"label:relay:pass:word\n", "credentials", "table"),
        (b"label:administrator:secret\n", "credentials", "table"),
        (b"label:vera@example.org:%b\n" % HASH, "credentials", "table"),
        (b"label user:pass:word:with:many:colons:in:it\n", "credentials", "table"),
        (b"[::1]\n[2001:db8::/32]\n", "netaddr", "table"),
        (b" [ ]\n", "netaddr", "export"),
        (b'[{"key": "x"}]', "netaddr", "export"),
        (b"", "domain", "table"),
    ],
)
def test_detect_format_recognizes_each_format(text, service, name):
    assert formats.detect_format(text, SERVICES[service]) == name


@pytest.mark.parametrize(
    "password",
    [
        HASH,
        b"$6$salt$" + b"a" * 86,
        b"$y$j9T$salt$" + b"a" * 43,
        b"$argon2id$v=19$m=65536,t=3,p=1$c2FsdHNhbHQ$aGFzaGhhc2g",
        b"{BLF-CRYPT}" + HASH,
        b"{SHA512-CRYPT.b64}JDYkc2FsdA==",
        b"{plain}secret",
        b"!",
        b"*",
    ],
)
@pytest.mark.parametrize(
    "rest",
    [b":", b":5000", b"::", b":5000:5000", b":5000:5000:", b":5000:5000:Eric Smith", b":5000:5000::/var/vmail/eric"],
)
@pytest.mark.parametrize("service", ["credentials", "auth"])
def test_hash_with_fields_after_it_is_a_passwd_line(service, password, rest):
    text = b"Vera:%b\neric@example.org:%b%b\n" % (HASH, password, rest)
    parsed = read(text, SERVICES[service], "auto")
    stored = b"*" if password == b"!" else password
    assert (parsed.format, pairs(parsed)) == ("passwd", [(b"vera", HASH), (b"eric@example.org", stored)])


@pytest.mark.parametrize("password", [b"secret", b"abJnggxhB/yWI", b"x", b""])
@pytest.mark.parametrize(
    "rest", [b":5000:5000", b":5000:5000:", b":5000:5000::", b":5000:5000::/srv/eric", b"::::/srv/eric"]
)
def test_ids_after_a_password_make_a_passwd_line(password, rest):
    assert formats.detect_format(b"eric:" + password + rest, CREDENTIALS) == "passwd"


@pytest.mark.parametrize("data", [b'{"a": 1}', b' {"a":\n "b"}\n', b'["a", "b"]\n', b"{}"])
@pytest.mark.parametrize("service", ["alias", "domain", "credentials"])
def test_detect_format_rejects_other_json(data, service):
    with pytest.raises(FormatError, match="JSON, but not the output of `consul kv export`"):
        formats.detect_format(data, SERVICES[service])


def test_detect_format_rejects_lines_that_fit_two_formats():
    with pytest.raises(FormatError, match="passwd entries in 1 of 2 lines"):
        formats.detect_format(b"vera:*:1:1::/home/vera:/bin/sh\neric 1:1:/home/eric\n", USERINFO)


def _tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("aliases"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (gzip.compress(b"root: gilles\n", mtime=0), "decompress"),
        (_tar(), "line 1 contains a NUL byte"),
        ("root: gilles\n".encode("utf-16"), "convert it to UTF-8"),
        (b"a: b\nc\0: d\n", "line 2 contains a NUL byte"),
    ],
)
def test_file_that_is_not_text_is_rejected(data, expected):
    with pytest.raises(FormatError, match=expected):
        read(data, ALIAS, "auto")


def test_compressed_file_without_a_nul_byte_has_no_valid_line():
    assert 1 in problems(read(b"\x1f\x8b\x08rest", ALIAS, "auto"))


def test_byte_order_mark_is_not_part_of_the_first_key():
    assert pairs(read(b"\xef\xbb\xbfroot: gilles\n", ALIAS, "auto")) == [(b"root", b"gilles")]


@given(contents, st.sampled_from([SERVICES[name] for name in ("alias", "domain", "userinfo", "string", "credentials")]))
def test_any_file_gives_entries_and_problems_with_existing_lines(data, service):
    for wanted in formats.FORMATS:
        if (wanted == "passwd" and not service.fields) or (wanted == "aliases" and service != ALIAS):
            continue
        try:
            parsed = read(data, service, wanted)
        except (FormatError, SourceError):
            continue
        lines = data.count(b"\n") + 1
        for entry in parsed.entries:
            assert entry.key
            assert 1 <= entry.line <= lines
            assert b"\n" not in entry.key + entry.value
        assert all(1 <= problem.line <= lines and problem.text for problem in parsed.problems)


# Files for smtpd.

texts = st.lists(
    st.sampled_from(
        [b"a", b"B", b" ", b"\t", b":", b"#", b"[", b"]", b"\\", b'"', b",", b"\r", b"\n", b"\0", b"\xc3\xa9"]
    ),
    max_size=8,
).map(b"".join) | st.binary(max_size=8)

# Consul writes them in JSON.
consul_keys = texts.map(lambda key: key.decode(errors="ignore").encode().lower()).filter(bool)


@given(
    st.dictionaries(consul_keys, texts, max_size=4),
    st.sampled_from(["alias", "string", "domain", "mailaddr", "userinfo"]),
)
def test_table_text_is_read_back_unchanged(entries, name):
    service = SERVICES[name]
    text, left_out = formats.table_text(service, entries.items())
    expected = {key: value for key, value in entries.items() if key not in left_out}
    parsed = read(text, service, "auto")
    found = dict(pairs(parsed))
    if name == "domain":
        expected = dict.fromkeys(expected, b"")
    elif service.answers == "entry" and any(entries.values()):
        expected = {key: value or key for key, value in expected.items()}
    assert found == expected


def test_table_text_for_a_service_of_lists_has_no_values():
    assert formats.table_text(DOMAIN, [(b"a", b"x"), (b"b", b"")]) == (b"# @list\na\nb\n", [])


def test_table_text_marks_a_list_that_looks_like_a_mapping():
    assert formats.table_text(STRING, [(b"a b", b""), (b"c", b"")]) == (b"# @list\na b\nc\n", [])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"a b", b"x"),
        (b"a:b", b"x"),
        (b"#a", b"x"),
        (b"a", b"x\ny"),
        (b"a", b" x"),
        (b"a", b""),
        (b"a" * 1024, b"x"),
        (b"[a", b"x"),
    ],
)
def test_table_text_names_the_keys_it_cannot_hold(key, value):
    assert formats.table_text(ALIAS, [(b"root", b"gilles"), (key, value)]) == (b"root:\tgilles\n", [key])
