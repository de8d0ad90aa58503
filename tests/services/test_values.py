from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from table_consul.errors import EntryError
from table_consul.services import SERVICES, Table
from table_consul.services.entries import Entries
from table_consul.services.values import LINE_MAX, is_plain_list, is_valid_reply_value, parse_value, split_list

TABLE = Table("aliases")
COMMANDS = replace(TABLE, allow_commands=True)
ROOT_ALLOWED = replace(TABLE, allow_root=True)


def read(raw, service="alias", table=TABLE, key=b"root", value_format="auto"):
    return parse_value(replace(table, value_format=value_format), SERVICES[service], key, raw)


def refusal(raw, service="alias", table=TABLE, key=b"root", value_format="auto"):
    with pytest.raises(EntryError) as caught:
        read(raw, service, table, key, value_format)
    return str(caught.value)


def bucket(service, *pairs, table=TABLE):
    return Entries(table, SERVICES[service], pairs)


# ---- formats ----


def test_trailing_white_space_is_dropped():
    assert read(b"gilles \t\r\n") == b"gilles"


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b'"gilles"', b"gilles"),
        (b'"gilles"\n', b"gilles"),
        (b'["gilles", "eric"]', b"gilles, eric"),
        (b"[]", b""),
        (b'""', b""),
        (b'"gi\\u006cles"', b"gilles"),
        (b"gilles", b"gilles"),
    ],
)
def test_auto_format_decodes_json_strings_and_arrays(raw, value):
    assert read(raw) == value


@pytest.mark.parametrize("raw", [b"[2001:db8::1]", b"[::1]:25", b"{}", b"null", b"12", b'["a", 1]', b'[["a"]]'])
def test_auto_format_reads_other_json_as_text(raw):
    assert raw == read(raw, "string")


def test_auto_format_reads_quoted_invalid_utf_8_as_text():
    assert read(b'"\xff"', "string") == b'"\xff"'


def test_auto_format_reads_a_lone_surrogate_as_text():
    assert read(b'"\\ud800"', "string") == b'"\\ud800"'


def test_text_format_decodes_nothing():
    assert read(b'"gilles"', "string", value_format="text") == b'"gilles"'


@pytest.mark.parametrize(("raw", "value"), [(b' "gilles"\n', b"gilles"), (b"null", b""), (b"", b""), (None, b"")])
def test_json_format_reads_strings_and_null(raw, value):
    assert value == read(raw, value_format="json")


@pytest.mark.parametrize("raw", [b"gilles", b"{}", b"12", b'"gilles', b"[1]", b'"\xff"'])
def test_json_format_rejects_everything_else(raw):
    assert 'such as "a" or ["a", "b"]' in refusal(raw, value_format="json")


def test_list_for_a_service_of_single_values_is_rejected():
    assert refusal(b'["1:1:/a", "2:2:/b"]', "userinfo") == "the value is a list; userinfo takes a single value"


def test_list_of_one_is_a_single_value():
    assert read(b'["1:1:/a"]', "userinfo") == b"1:1:/a"


def test_array_of_commands_keeps_each_command_whole():
    assert read(b'["gilles", "|a, b", "|c"]', table=COMMANDS) == b'gilles, "|a, b", "|c"'


@pytest.mark.parametrize(
    ("raw", "command"),
    [
        (b'"|command, with comma"', b"command, with comma"),
        (b'"|plain"', b"plain"),
        (b'"|echo it\'s"', b"echo it's"),
        (b'"|echo \\"a, b\\""', b'echo "a, b"'),
        (b'"|printf a\\\\nb"', b"printf a\\nb"),
    ],
)
def test_quoted_command_reaches_smtpd_unchanged(raw, command):
    """aliases(5) writes commands in quotes, which JSON would remove; what smtpd reads from the answer decides."""
    (node,) = split_list(read(raw, table=COMMANDS))
    assert command == (node[2:-1] if node.startswith(b'"') else node[1:])


# ---- lines ----


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b"gilles\neric\n", b"gilles, eric"),
        (b"gilles,\r\neric,\r\n", b"gilles, eric"),
        (b"# who reads root\ngilles\n\n  # and\n\teric", b"gilles, eric"),
        (b"# nobody", b""),
        (b" # nobody", b""),
        (b"  gilles", b"gilles"),
        (b"\n", b""),
    ],
)
@pytest.mark.parametrize("service", ["alias", "mailaddrmap"])
def test_lines_and_comments_become_one_list(service, raw, value):
    assert value == read(raw, service)


@pytest.mark.parametrize("service", sorted({*SERVICES} - {"alias", "mailaddrmap"}))
@pytest.mark.parametrize("raw", [b"one\ntwo", b"one\rtwo", b"one\0two"])
def test_line_break_or_nul_is_rejected(service, raw):
    assert "a line break or a NUL; " in refusal(raw, service)


def test_nul_or_lone_carriage_return_in_a_list_is_rejected():
    assert all("a line break or a NUL; " in refusal(raw) for raw in (b"gil\0les", b"gil\rles"))


def test_hash_sign_in_a_single_value_is_data():
    assert read(b"#1", "string") == b"#1"


# ---- limits ----


@pytest.mark.parametrize("service", ["alias", "credentials"])
def test_value_of_2047_bytes_is_accepted(service):
    assert len(read(b"a" * 2047, service)) == LINE_MAX - 1


@pytest.mark.parametrize("service", ["alias", "credentials"])
def test_value_of_2048_bytes_is_rejected(service):
    assert "the value has 2048 bytes; smtpd rejects 2048 or more" in refusal(b"a" * 2048, service)


def test_value_limit_counts_the_reply_not_the_stored_text():
    assert read(b"a\n# " + b"x" * 4000) == b"a"


def test_value_of_other_services_has_no_limit():
    assert len(read(b"a" * 5000, "string")) == 5000


# ---- safety ----

COMMANDS_IN_DISGUISE = [
    b"|/bin/sh",
    b"gilles,|/bin/sh",
    b"gilles, |/bin/sh",
    b"gilles\n|/bin/sh",
    b'"|/bin/sh -c id"',
    b'"|/bin/sh, -c, id"',
    b'gilles, "|sh"',
    b"\\|sh",
    b"\\\\|sh"[1:],
    b'\\"|sh\\"',
    b"\\ |sh",
    b"\\\t\\ |sh",
    b"/etc/passwd",
    b"\\/etc/passwd",
    b" /var/mail/x",
    b":include:/etc/passwd",
    b"include:/etc/passwd",
    b":INCLUDE:/etc/passwd",
    b"InClude:/x",
    b"\\:include:/x",
    b":inc\\lude:/x",
    b"i\\n\\c\\l\\u\\d\\e:/x",
    b'["gilles", "|sh"]',
    b'["gilles", "/tmp/x"]',
    b'"gilles, |sh"',
    b'"\\u007csh"',
    b"'a, b', |sh",
    b'"a, b",\\|sh',
    b"a\\, b\n|sh",
    b"error:550 no,|sh",
    b"\x0b|sh",
    b",,|sh",
]


@pytest.mark.parametrize("raw", COMMANDS_IN_DISGUISE)
def test_alias_command_file_or_include_is_rejected_in_every_disguise(raw):
    text = refusal(raw)
    assert "set allow_commands = true" in text


@pytest.mark.parametrize("raw", COMMANDS_IN_DISGUISE)
def test_alias_command_is_accepted_with_allow_commands(raw):
    assert read(raw, table=COMMANDS)


@pytest.mark.parametrize(
    "raw",
    [
        b"error:550 no such user",
        b":error:450 try again, later",
        b"gilles",
        b"gilles@example.org, eric+x@example.org",
        b"a\\|b",
        b"'|' is no command",
        b"",
    ],
)
def test_alias_users_addresses_and_errors_need_no_permission(raw):
    assert raw == read(raw)


def test_pipe_in_a_string_is_data():
    assert read(b"|x", "string") == b"|x"


@pytest.mark.parametrize("raw", [b"it's", b'"gilles', b"gilles\\", b"'a\", b", b"a, 'b"])
def test_alias_with_an_open_quote_or_escape_is_rejected(raw):
    assert "ends within a quote or an escape" in refusal(raw, table=COMMANDS)


ROOT_IN_DISGUISE = [b"0:0:/root", b"0:1000:/", b"1000:0:/", b"00:1000:/", b"1000:000000000000:/"]
NO_USERS = [
    b"+0:1000:/",
    b"-0:1000:/",
    b"0x0:1000:/",
    b" 0:1000:/",
    "\u0660:1000:/".encode(),
    b"1000",
    b"1000:1000",
    b"1000:1000:",
    b"1000:1000:home",
    b":1000:/",
    b"gilles:1000:1000:/home",
    b"1_0:10:/",
    b"\xb2:10:/",
]
# (uid_t)-1 makes setresuid(2) leave the ids as they are: those of root. 2**32 and more may wrap to 0.
WRAPPING = [b"4294967295:1000:/", b"1000:4294967295:/", b"4294967296:1000:/", b"1000:18446744073709551616:/"]


@pytest.mark.parametrize("raw", ROOT_IN_DISGUISE)
def test_uid_or_gid_0_is_rejected_in_every_notation(raw):
    assert "mail as root; set allow_root = true" in refusal(raw, "userinfo")


@pytest.mark.parametrize("raw", ROOT_IN_DISGUISE)
def test_uid_or_gid_0_is_accepted_with_allow_root(raw):
    assert raw == read(raw, "userinfo", ROOT_ALLOWED)


@pytest.mark.parametrize("table", [TABLE, ROOT_ALLOWED])
@pytest.mark.parametrize("raw", NO_USERS)
def test_malformed_user_is_rejected(raw, table):
    assert "expected UID:GID:HOME" in refusal(raw, "userinfo", table)


@pytest.mark.parametrize("table", [TABLE, ROOT_ALLOWED])
@pytest.mark.parametrize("raw", WRAPPING)
def test_ids_that_would_leave_the_process_root_are_always_rejected(raw, table):
    assert "1 to 4294967294" in refusal(raw, "userinfo", table)


def test_id_of_thousands_of_digits_is_rejected():
    assert "1 to 4294967294" in refusal(b"9" * 5000 + b":1000:/home", "userinfo")


def test_largest_ids_are_accepted():
    assert read(b"4294967294:4294967294:/home/x", "userinfo") == b"4294967294:4294967294:/home/x"


def test_user_name_with_a_colon_cannot_inject_another_uid():
    assert "the key contains a colon" in refusal(b"1000:1000:/home/x", "userinfo", key=b"gilles:0")


@pytest.mark.parametrize("raw", [b"$6$salt$hash", b"gilles:secret", b"gilles:se:cret", b"abc"])
def test_credential_is_a_hash_or_a_user_and_a_password(raw):
    assert raw == read(raw, "credentials")


@pytest.mark.parametrize("raw", [b"ab", b":secret", b"gilles:", b"a:", b":::"])
def test_malformed_credential_is_rejected(raw):
    assert "not a credential (expected HASH, USER:HASH or, to relay, USER:PASSWORD)" in refusal(raw, "credentials")


@pytest.mark.parametrize(
    ("service", "raw"),
    [
        ("credentials", b"hunter2\nhunter2"),
        ("credentials", b"hunter2:"),
        ("credentials", b"hunter2" * 400),
        ("userinfo", b"hunter2"),
        ("alias", b"|hunter2"),
        ("alias", b"hunter2'"),
        ("string", b'["hunter2", "hunter2"]'),
    ],
)
def test_messages_contain_no_part_of_the_value(service, raw):
    assert "hunter2" not in refusal(raw, service) + "".join(map(str, bucket(service, (b"k", raw)).problems))


# ---- hashes ----

SHA512 = b"$6$saltsalt$TVLlQcbpFVof5W3Yz4DTP6gRstiNuHwwTt6GLc1E5n0U0aDehy0S5knV8wiOQSpT0Y77vwPZN.Pq.H91p5hVO1"
BCRYPT = b"$2b$10$abcdefghijklmnopqrstuuqflPDzB6gcMhKa1rZqKiun2YGL5sa2u"
ARGON2 = b"$argon2id$v=19$m=65536,t=3,p=4$c2FsdHNhbHQ$qVQ8m7ozNVzoeV1W0lpcI9V2SPUOK+NCcQHYOu+C/us"


@pytest.mark.parametrize("service", ["credentials", "auth"])
@pytest.mark.parametrize("user", [b"", b"vera:"])
@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b"{CRYPT}" + SHA512, SHA512),
        (b"{sha512-crypt}" + SHA512, SHA512),
        (b"{SHA256-CRYPT}$5$saltsalt$0IyaXrmV7.sGNS6tirgqHLqX/G.FBvgkYA.lpPdS5sA", None),
        (b"{Blf-Crypt}" + BCRYPT, BCRYPT),
        (b"{BLF-CRYPT}" + BCRYPT.replace(b"2b", b"2y"), BCRYPT),
        (BCRYPT.replace(b"2b", b"2y"), BCRYPT),
        (b"{CRYPT}abNANd1rDfiNc", b"abNANd1rDfiNc"),
        (b"{CRYPT}!" + SHA512, b"!" + SHA512),
        (b"{ARGON2ID}" + ARGON2, ARGON2),
        (b"{ARGON2I}" + ARGON2, ARGON2),
        (SHA512, SHA512),
    ],
)
def test_scheme_prefix_is_stripped_in_any_case(service, user, raw, value):
    assert read(user + raw, service) == user + (raw.partition(b"}")[2] if value is None else value)


@pytest.mark.parametrize(
    "raw",
    [
        b"vera:{CRYPT}",
        b"vera:{CRYPT}clear text",
        b"vera:{PLAIN}clear",
        b"vera:{clear}",
        b"vera:$2y$ is a bank note",
        b"vera:a{CRYPT}" + SHA512,
        b"{CRYPT}:clear",
        b"{CRYPT}clear",
        b"{SSHA512}abcdef",
    ],
)
def test_relay_password_in_clear_text_is_unchanged(raw):
    assert read(raw, "credentials") == raw


@pytest.mark.parametrize("service", ["credentials", "auth"])
@pytest.mark.parametrize("raw", [b"*", b"!", b"!!", b"*LK*"])
def test_bare_lock_becomes_a_locked_account(service, raw):
    """Fewer than three bytes are a temporary error to smtpd, not a rejection (smtpd: table_parse_lookup)."""
    assert read(raw, service) in (b"*LK*", raw)
    assert len(read(raw, service)) >= 3


def test_scheme_prefix_in_a_string_is_data():
    assert read(b"{CRYPT}" + SHA512, "string") == b"{CRYPT}" + SHA512


# ---- records ----


def record(**fields):
    return json.dumps(fields).encode()


USER = {"password": "{CRYPT}" + SHA512.decode(), "uid": 1000, "gid": "1001", "home": "/home/vera", "extra": [None]}


@pytest.mark.parametrize("value_format", ["auto", "json"])
@pytest.mark.parametrize(
    ("service", "value"),
    [("userinfo", b"1000:1001:/home/vera"), ("credentials", SHA512), ("auth", SHA512)],
)
def test_record_has_the_value_of_each_service(service, value, value_format):
    assert read(record(**USER) + b"\n", service, value_format=value_format) == value


def test_text_format_decodes_no_record():
    assert "not a user" in refusal(record(**USER), "userinfo", value_format="text")


def test_object_for_a_service_without_fields_is_text():
    assert read(record(a="b"), "string") == record(a="b")


@pytest.mark.parametrize(
    ("fields", "service", "why"),
    [
        ({"uid": True}, "userinfo", "the record's uid is not a whole number"),
        ({"uid": 1.5}, "userinfo", "the record's uid is not a whole number"),
        ({"gid": [0]}, "userinfo", "the record's gid is not a whole number"),
        ({"gid": "0:0"}, "userinfo", "the record's gid is not a whole number"),
        ({"uid": "1000:0"}, "userinfo", "the record's uid is not a whole number"),
        ({"uid": -1}, "userinfo", "the record's uid is not a whole number"),
        ({"uid": 0}, "userinfo", "uid or gid 0"),
        ({"uid": 2**32}, "userinfo", "uid or gid out of range"),
        ({"home": 5}, "userinfo", "the record's home is not a string"),
        ({"home": "hunter2"}, "userinfo", "not a user"),
        ({"home": "/hunter2\n"}, "userinfo", None),
        ({"home": "/hunter2\n/x"}, "userinfo", "a line break"),
        ({"home": None}, "userinfo", "the record has no home, which userinfo needs"),
        ({"home": ""}, "userinfo", "the record has no home, which userinfo needs"),
        ({"password": 12345}, "auth", "the record's password is not a string"),
        ({"password": None}, "credentials", "the record has no password, which credentials needs"),
        ({"password": "a\nhunter2"}, "credentials", "a line break"),
    ],
)
def test_invalid_record_error_names_the_field_and_no_value(fields, service, why):
    raw = record(**USER | fields)
    if why is None:
        assert read(raw, service) == b"1000:1001:/hunter2"
        return
    text = refusal(raw, service)
    assert why in text
    assert not {"hunter2", "12345", "1.5"} & {*text.replace("'", " ").split()}


def test_invalid_record_field_of_another_service_is_ignored():
    assert read(record(**USER | {"uid": [], "home": 5}), "credentials") == SHA512


def test_relay_password_in_a_record_may_contain_a_colon():
    assert read(record(password="se:cret"), "credentials", key=b"label") == b"label:se:cret"
    assert "the key contains a colon" in refusal(record(password="se:cret"), "credentials", key=b"la:bel")


@pytest.mark.parametrize("raw", [b'{"password": "hunter2"', b"{'password': 'hunter2'}", b'{"a": ' + b"[" * 100000])
def test_broken_json_object_is_rejected(raw):
    assert refusal(raw, "credentials") == "the value starts like a JSON object but is not valid JSON"


def test_default_home_with_an_unknown_placeholder_is_rejected():
    assert read(b"1:1:/%u/%n/%d/%%x", "userinfo", key=b"*") == b"1:1:/%u/%n/%d/%%x"
    for home in (b"/%h", b"/%", b"/%%%x"):
        assert "unknown placeholder" in refusal(b"1:1:" + home, "userinfo", key=b"*")
        assert read(b"1:1:" + home, "userinfo", key=b"vera") == b"1:1:" + home


# ---- properties ----


def expand_line_split(line):
    """smtpd: expand.c, expand_line and expand_line_split, as they stand there; None where smtpd refuses the line."""
    line += b"\0"
    found, at = [], 0
    while True:
        buffer, esc, dq, sq = b"", 0, 0, 0
        while True:
            s = line[at : at + 1]
            if s == b"\0":
                ret = -1 if esc or dq or sq else 1 if buffer else 0
                break
            at += 1
            if esc:
                buffer += s
                esc = 0
                continue
            if s == b"\\":
                esc = 1
                continue
            if s == b"," and not dq and not sq:
                ret = 1
                break
            buffer += s
            if s == b'"' and not sq:
                dq ^= 1
            if s == b"'" and not dq:
                sq ^= 1
        if ret < 0:
            return None
        if ret == 0:
            return found
        if buffer.strip(b" \t\n\v\f\r"):
            found.append(buffer.strip(b" \t\n\v\f\r"))


def alias_type(node):
    """smtpd: to.c, text_to_expandnode, as far as it leads out of the mail system."""
    if node.lower().startswith((b":error:", b"error:")):
        return None
    if node.lower().startswith((b":include:", b"include:")):
        return "include"
    return "filter" if node[node[:1] == b'"' :].startswith(b"|") else "filename" if node.startswith(b"/") else None


LINES = st.lists(st.sampled_from([b"a", b"|", b"/", b",", b" ", b"\\", b'"', b"'", b"include:", b":", b"\t"])).map(
    b"".join
)


@settings(deadline=None)
@given(LINES)
@example(b"a\\")
@example(b'"\'"')
def test_split_list_splits_like_smtpd(line):
    try:
        nodes = split_list(line)
    except EntryError:
        nodes = None
    assert expand_line_split(line) == nodes


@settings(deadline=None)
@given(LINES)
def test_alias_that_smtpd_reads_as_a_command_is_rejected(line):
    try:
        value = read(line)
    except EntryError:
        return
    assert [node for node in expand_line_split(value) or [] if alias_type(node)] == []


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


@settings(deadline=None)
@given(table=TABLES, service=SERVICE, key=st.binary(min_size=1), raw=RAW)
def test_parsed_value_is_a_valid_reply_or_empty(table, service, key, raw):
    try:
        value = parse_value(table, service, key, raw)
    except EntryError:
        return
    assert value == b"" or is_valid_reply_value(value)


# ---- lists ----


@pytest.mark.parametrize("raw", [b"o'brien@example.org", b"gilles@example.org\\"])
def test_mailaddrmap_with_an_open_quote_or_escape_is_rejected(raw):
    assert "ends within a quote or an escape" in refusal(raw, "mailaddrmap")


@settings(deadline=None)
@given(LINES | st.from_regex(rb"[a-z.@,|/: ]{0,12}", fullmatch=True))
def test_plain_list_contains_nothing_that_smtpd_rejects_or_runs(line):
    if is_plain_list(line):
        nodes = expand_line_split(line)
        assert all(alias_type(node) is None and b"'" not in node and b'"' not in node for node in nodes)
        assert nodes == split_list(line)
