from __future__ import annotations

import json
from itertools import cycle, islice

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from table_consul.errors import EntryError
from table_consul.protocol import Found
from table_consul.services import (
    DEFAULT_SERVICES,
    LINE_MAX,
    SERVICES,
    Bucket,
    Builder,
    Table,
    alias_nodes,
    fold,
    read_value,
    sayable,
)

TABLE = Table("aliases")
COMMANDS = replace(TABLE, allow_commands=True)
ROOT_ALLOWED = replace(TABLE, allow_root=True)
LISTS = ("domain", "netaddr", "source", "mailaddr", "relayhost", "regex")


def read(raw, service="alias", table=TABLE, key=b"root", value_format="auto"):
    return read_value(replace(table, value_format=value_format), SERVICES[service], key, raw)


def refusal(raw, service="alias", table=TABLE, key=b"root", value_format="auto"):
    with pytest.raises(EntryError) as caught:
        read(raw, service, table, key, value_format)
    return str(caught.value)


def bucket(service, *pairs, table=TABLE):
    return Bucket(table, SERVICES[service], pairs)


# ---- layout ----


def test_entries_lie_under_prefix_table_and_service():
    assert replace(TABLE, prefix="mail/hosts").path(SERVICES["alias"]) == b"mail/hosts/aliases/alias/"


def test_without_prefix_a_table_is_a_folder_at_the_top():
    assert TABLE.path(SERVICES["domain"]) == b"aliases/domain/"


def test_paths_give_a_service_another_folder_and_leave_the_others():
    table = replace(TABLE, prefix="mail", paths={"alias": "shared/people"})
    assert tuple(table.path(SERVICES[name]) for name in ("alias", "domain")) == (
        b"shared/people/",
        b"mail/aliases/domain/",
    )


def test_auth_is_registered_only_when_configured():
    assert {*SERVICES} - {"auth"} == {*DEFAULT_SERVICES}


def test_service_bits_are_those_of_smtpd():
    assert [1 << n for n in range(13)] == [service.bit for service in SERVICES.values()]


# ---- keys ----


def test_stored_keys_are_folded_with_ascii_rules_alone():
    assert "straße@É.example".encode() == fold("STRAßE@É.Example".encode())


def test_an_upper_case_key_answers_for_the_lower_case_question():
    assert bucket("alias", (b"Root", b"gilles")).lookup(b"root") == b"gilles"


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_spellings_the_lower_case_one_answers_and_a_warning_names_both(order):
    found = bucket("alias", *[(b"Root", b"eric"), (b"root", b"gilles")][::order])
    (problem,) = found.problems
    assert (
        found.lookup(b"root"),
        problem.startswith("aliases/alias/Root: "),
        "aliases/alias/root, which answers" in problem,
    ) == (b"gilles", True, True)


def test_of_two_spellings_without_a_lower_case_one_the_first_in_order_answers():
    found = bucket("alias", (b"ROOT", b"gilles"), (b"Root", b"eric"))
    assert (found.lookup(b"root"), len(found.problems)) == (b"gilles", 1)


def test_a_good_spelling_replaces_a_refused_one_and_the_other_way_round():
    mended = bucket("alias", (b"Root", b"|sh"), (b"root", b"gilles"))
    broken = bucket("alias", (b"Root", b"gilles"), (b"root", b"|sh"))
    assert (mended.lookup(b"root"), mended.refused, broken.values) == (b"gilles", {}, {})


def test_folders_and_the_bucket_itself_are_no_entries():
    found = bucket("alias", (b"", None), (b"staff/", None), (b"staff/root", b"gilles"))
    assert (len(found), found.check(b"staff/"), found.lookup(b"staff/root")) == (1, False, b"gilles")


def test_keys_may_contain_slashes():
    assert bucket("netaddr", (b"192.0.2.0/24", None)).check(b"192.0.2.0/24")


def test_keys_and_values_in_utf_8_pass_as_they_are():
    key, value = "jörg@exämple.org".encode(), "jörg".encode()
    assert value == bucket("string", (key, value)).lookup(key)


def test_an_absent_key_is_none():
    assert (
        bucket("alias", (b"root", b"gilles")).lookup(b"nobody"),
        bucket("alias").check(b"nobody"),
    ) == (None, False)


# ---- formats ----


def test_trailing_white_space_is_dropped_as_echo_adds_a_newline():
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
        (b'"gilles', None),
    ],
)
def test_auto_decodes_json_typed_in_the_ui(raw, value):
    assert value == (read(raw) if value is not None else None if refusal(raw) else b"")


@pytest.mark.parametrize("raw", [b"[2001:db8::1]", b"[::1]:25", b"{}", b"null", b"12", b'["a", 1]', b'[["a"]]'])
def test_auto_takes_all_other_json_and_what_looks_like_it_as_text(raw):
    assert raw == read(raw, "string")


def test_auto_takes_quotes_around_bytes_that_are_no_utf_8_as_text():
    assert read(b'"\xff"', "string") == b'"\xff"'


def test_auto_takes_json_with_a_lone_surrogate_as_text():
    assert read(b'"\\ud800"', "string") == b'"\\ud800"'


def test_text_format_decodes_nothing():
    assert read(b'"gilles"', "string", value_format="text") == b'"gilles"'


@pytest.mark.parametrize(("raw", "value"), [(b' "gilles"\n', b"gilles"), (b"null", b""), (b"", b""), (None, b"")])
def test_json_format_reads_strings_and_null(raw, value):
    assert value == read(raw, value_format="json")


@pytest.mark.parametrize("raw", [b"gilles", b"{}", b"12", b'"gilles', b"[1]", b'"\xff"'])
def test_json_format_refuses_everything_else_and_says_what_is_allowed(raw):
    assert 'allowed: "gilles"' in refusal(raw, value_format="json")


def test_a_list_is_refused_where_one_value_is_wanted():
    assert refusal(b'["1:1:/a", "2:2:/b"]', "userinfo") == "the value is a list, and userinfo takes one"


def test_a_list_of_one_is_one_value():
    assert read(b'["1:1:/a"]', "userinfo") == b"1:1:/a"


def test_an_array_of_commands_keeps_each_one_whole():
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
def test_a_quoted_command_reaches_smtpd_as_the_same_command(raw, command):
    """aliases(5) writes commands in quotes, which JSON would take away; what smtpd makes of the answer decides."""
    (node,) = alias_nodes(read(raw, table=COMMANDS))
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
def test_elsewhere_several_lines_or_a_nul_are_refused(service, raw):
    assert "several lines or a NUL" in refusal(raw, service)


def test_a_nul_and_a_lone_carriage_return_are_refused_in_lists_too():
    assert all("several lines or a NUL" in refusal(raw) for raw in (b"gil\0les", b"gil\rles"))


def test_a_hash_sign_elsewhere_is_no_comment():
    assert read(b"#1", "string") == b"#1"


# ---- empty ----


@pytest.mark.parametrize("service", LISTS)
@pytest.mark.parametrize("raw", [b"", None, b" \n", b'""'])
def test_in_a_list_service_a_key_without_value_is_a_member_and_answers_with_itself(service, raw):
    found = bucket(service, (b"example.org", raw))
    assert (found.check(b"example.org"), found.lookup(b"example.org")) == (True, b"example.org")


@pytest.mark.parametrize("service", ["alias", "credentials", "userinfo", "addrname", "mailaddrmap", "string"])
@pytest.mark.parametrize("raw", [b"", None, b" \n"])
def test_elsewhere_a_key_without_value_is_there_but_its_lookup_is_an_error(service, raw):
    found = bucket(service, (b"root", raw))
    with pytest.raises(EntryError, match=f"aliases/{service}/root: there is no value"):
        found.lookup(b"root")
    assert found.check(b"root")


def test_a_list_entry_with_a_value_answers_with_the_value():
    assert bucket("domain", (b"example.org", b"yes")).lookup(b"example.org") == b"yes"


def test_a_relayhost_with_a_value_is_a_domain_and_its_host_as_in_a_file():
    relays = bucket("relayhost", (b"example.org", b"smtp://mx.example.net"), (b"smtp://mx.example.com", b""))
    assert relays.lookup(b"example.org") == b"smtp://mx.example.net"
    assert relays.lookup(b"smtp://mx.example.com") == b"smtp://mx.example.com"


@pytest.mark.parametrize("key", [b"a\nb", b"a\rb", b"a\0b"])
def test_an_entry_that_cannot_be_said_is_an_error_not_an_answer(key):
    with pytest.raises(EntryError, match="holds a control character"):
        bucket("domain", (key, None)).lookup(key)


# ---- limits ----


@pytest.mark.parametrize("service", ["alias", "credentials"])
def test_a_value_of_2047_bytes_is_what_smtpd_takes(service):
    assert len(read(b"a" * 2047, service)) == LINE_MAX - 1


@pytest.mark.parametrize("service", ["alias", "credentials"])
def test_a_value_of_2048_bytes_is_refused_with_the_limit(service):
    assert "the value has 2048 bytes, and smtpd refuses 2048 and more" in refusal(b"a" * 2048, service)


def test_the_limit_counts_what_smtpd_is_told_not_what_was_typed():
    assert read(b"a\n# " + b"x" * 4000) == b"a"


def test_other_services_have_no_limit_of_ours():
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
def test_commands_files_and_includes_are_refused_in_every_disguise(raw):
    text = refusal(raw)
    assert "set allow_commands = true" in text


@pytest.mark.parametrize("raw", COMMANDS_IN_DISGUISE)
def test_commands_are_taken_when_allowed(raw):
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
def test_users_addresses_and_errors_need_no_permission(raw):
    assert raw == read(raw)


def test_a_pipe_elsewhere_than_in_an_alias_is_data():
    assert read(b"|x", "string") == b"|x"


@pytest.mark.parametrize("raw", [b"it's", b'"gilles', b"gilles\\", b"'a\", b", b"a, 'b"])
def test_an_alias_that_smtpd_would_refuse_as_a_whole_says_why(raw):
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
# (uid_t)-1 tells setresuid(2) to leave the ids as they are: those of root. What is 2**32 and more may wrap to 0.
WRAPPING = [b"4294967295:1000:/", b"1000:4294967295:/", b"4294967296:1000:/", b"1000:18446744073709551616:/"]


@pytest.mark.parametrize("raw", ROOT_IN_DISGUISE)
def test_uid_and_gid_0_are_refused_in_every_spelling(raw):
    assert "uid or gid 0; set allow_root = true" in refusal(raw, "userinfo")


@pytest.mark.parametrize("raw", ROOT_IN_DISGUISE)
def test_root_is_taken_when_allowed(raw):
    assert raw == read(raw, "userinfo", ROOT_ALLOWED)


@pytest.mark.parametrize("table", [TABLE, ROOT_ALLOWED])
@pytest.mark.parametrize("raw", NO_USERS)
def test_what_is_no_user_is_refused(raw, table):
    assert "allowed: UID:GID:HOME" in refusal(raw, "userinfo", table)


@pytest.mark.parametrize("table", [TABLE, ROOT_ALLOWED])
@pytest.mark.parametrize("raw", WRAPPING)
def test_ids_that_would_leave_the_process_root_are_refused_always(raw, table):
    assert "1 to 4294967294" in refusal(raw, "userinfo", table)


def test_an_id_of_thousands_of_digits_is_refused_like_any_other():
    assert "1 to 4294967294" in refusal(b"9" * 5000 + b":1000:/home", "userinfo")


def test_the_largest_ids_are_users():
    assert read(b"4294967294:4294967294:/home/x", "userinfo") == b"4294967294:4294967294:/home/x"


def test_a_user_name_with_a_colon_cannot_smuggle_another_uid():
    assert "the key holds a colon" in refusal(b"1000:1000:/home/x", "userinfo", key=b"gilles:0")


@pytest.mark.parametrize("raw", [b"$6$salt$hash", b"gilles:secret", b"gilles:se:cret", b"abc"])
def test_credentials_are_a_hash_or_a_user_and_a_password(raw):
    assert raw == read(raw, "credentials")


@pytest.mark.parametrize("raw", [b"ab", b":secret", b"gilles:", b"a:", b":::"])
def test_what_smtpd_takes_for_no_credential_is_refused(raw):
    assert "the value is no credential" in refusal(raw, "credentials")


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
def test_no_refusal_holds_any_part_of_the_value(service, raw):
    assert "hunter2" not in refusal(raw, service) + "".join(bucket(service, (b"k", raw)).problems)


# ---- buckets ----


def test_an_entry_that_is_no_good_harms_no_other():
    found = bucket("alias", (b"bad", b"|sh"), (b"root", b"gilles"), (b"worse", b'"\xff'))
    assert (b"gilles", {b"bad", b"worse"}, 2) == (found.lookup(b"root"), set(found.refused), len(found.problems))


def test_a_refused_entry_is_in_the_table_and_its_lookup_names_the_key():
    found = bucket("alias", (b"bad", b"|sh"))
    with pytest.raises(EntryError, match=r"^aliases/alias/bad: the value holds a \|command"):
        found.lookup(b"bad")
    assert found.check(b"bad")


def test_control_characters_of_a_key_are_escaped_in_messages():
    (problem,) = bucket("alias", (b"a\x1b[31m\n", b"|sh")).problems
    assert problem.startswith("aliases/alias/a\\x1b[31m\\n: ")


def test_asking_for_a_refused_entry_again_and_again_holds_on_to_nothing():
    found = bucket("alias", (b"bad", b"|sh"))
    depth = 0
    for _ in range(50):
        with pytest.raises(EntryError) as caught:
            found.lookup(b"bad")
        depth = len(caught.traceback)
    assert depth < 10


class TestBuilder:
    def build(self, *pairs, former=None, table=TABLE, service="alias"):
        builder = Builder(table, SERVICES[service], former)
        builder.take(pairs)
        return builder

    def test_in_several_goes_is_as_in_one(self):
        builder = self.build((b"Root", b"eric"))
        builder.take([(b"root", b"gilles"), (b"bad", b"|sh")])
        whole = bucket("alias", (b"Root", b"eric"), (b"root", b"gilles"), (b"bad", b"|sh"))
        built = builder.finish()
        assert (whole.values, whole.problems) == (built.values, built.problems)

    def test_what_has_not_changed_is_the_former_bucket_itself(self):
        former = bucket("alias", (b"root", b"gilles\n"), (b"bad", b"|sh"))
        assert former is self.build((b"root", b"gilles"), (b"bad", b"|sh"), former=former).finish()

    def test_what_has_changed_is_another_bucket_and_leaves_the_former_one_as_it_was(self):
        former = bucket("alias", (b"root", b"gilles"))
        built = self.build((b"root", b"eric"), former=former).finish()
        assert (built.lookup(b"root"), former.lookup(b"root")) == (b"eric", b"gilles")

    def test_what_has_not_changed_is_the_former_bucket_even_where_an_entry_is_no_pattern(self):
        former = bucket("netaddr", (b"192.0.2.0/24", None), (b"nonsense/99", None))
        same = self.build(*((key, None) for key in former.values), former=former, service="netaddr").finish()
        assert (former is same, len(former.problems)) == (True, 1)

    def test_a_spelling_that_is_gone_is_a_problem_no_more(self):
        former = bucket("alias", (b"Root", b"x"), (b"root", b"gilles"))
        assert self.build((b"root", b"gilles"), former=former).finish().problems == []

    def test_lost_are_the_keys_that_only_the_former_bucket_had(self):
        former = bucket("alias", (b"root", b"gilles"), (b"bad", b"|sh"), (b"kept", b"eric"))
        builder = self.build((b"kept", b"x"), former=former)
        assert ([*builder.lost()], [*self.build((b"a", b"b")).lost()]) == ([b"root", b"bad"], [])

    def test_a_permission_taken_away_is_not_outlived_by_what_was_judged_before(self):
        former = bucket("alias", (b"root", b"|sh"), table=COMMANDS)
        assert {b"root"} == set(self.build((b"root", b"|sh"), former=former).finish().refused)


# ---- fetch ----


def fetched(found, count):
    last, values = None, []
    for _ in range(count):
        last, value = found.after(last)
        values.append(value)
    return values


def test_fetch_gives_the_keys_in_order_and_wraps():
    found = bucket("source", (b"192.0.2.2", None), (b"192.0.2.1", b"x"))
    assert fetched(found, 3) == [b"192.0.2.1", b"192.0.2.2", b"192.0.2.1"]


def test_fetch_gives_values_when_configured_and_the_key_where_there_is_none():
    table = replace(TABLE, fetch="values")
    assert fetched(bucket("source", (b"192.0.2.1", b"uplink"), (b"192.0.2.2", b""), table=table), 2) == [
        b"uplink",
        b"192.0.2.2",
    ]


def test_fetch_of_an_empty_bucket_is_nothing():
    assert (bucket("source").after(None), bucket("source").after(b"gone")) == (None, None)


def test_fetch_passes_over_what_cannot_be_said():
    assert fetched(bucket("source", (b"a", None), (b"b\n", None), (b"c", None)), 4) == [b"a", b"c"] * 2


def test_fetch_of_values_passes_over_what_is_refused():
    table = replace(TABLE, fetch="values")
    assert fetched(bucket("string", (b"a", b"x"), (b"b", b"y\nz"), (b"c", b""), table=table), 2) == [b"x", b"x"]


def test_fetch_is_an_error_where_nothing_can_be_said():
    with pytest.raises(EntryError, match=r"aliases/source/a\\n: the key holds a control character"):
        bucket("source", (b"b\r", None), (b"a\n", None)).after(None)


KEYS = st.sampled_from([bytes([c]) for c in b"abcdefgh"])


@settings(deadline=None)
@given(
    stays=st.sets(KEYS, min_size=1),
    changes=st.lists(st.sets(KEYS), min_size=1, max_size=40),
)
def test_whatever_comes_and_goes_every_key_that_stays_is_fetched_once_a_round(stays, changes):
    last, values = None, []
    for others in changes:
        last, value = bucket("source", *((key, None) for key in sorted(stays | others))).after(last)
        values.append(value)
    steady = [value for value in values if value in stays]
    assert [*islice(cycle(sorted(stays)), len(steady))] == steady


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
def test_alias_nodes_are_those_of_smtpd(line):
    try:
        nodes = alias_nodes(line)
    except EntryError:
        nodes = None
    assert expand_line_split(line) == nodes


@settings(deadline=None)
@given(LINES)
def test_no_alias_that_smtpd_takes_for_a_command_passes(line):
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
def test_a_value_is_sayable_or_empty_or_an_entry_error(table, service, key, raw):
    try:
        value = read_value(table, service, key, raw)
    except EntryError:
        return
    assert value == b"" or sayable(value)


@settings(deadline=None)
@given(table=TABLES, service=SERVICE, key=st.binary(min_size=1), raw=RAW)
def test_what_a_bucket_answers_can_be_said(table, service, key, raw):
    found = Bucket(table, service, [(key, raw)])
    for ask in (lambda: found.lookup(fold(key)), lambda: (found.after(None) or (None, None))[1]):
        try:
            value = ask()
        except EntryError:
            continue
        assert value is None or Found(value).value == value


@settings(deadline=None)
@given(table=TABLES, service=SERVICE, key=st.binary(min_size=1), raw=RAW)
def test_a_value_read_again_from_what_it_became_is_the_same(table, service, key, raw):
    """A Builder takes over what stood there before: what it would have read must be what stood there."""
    former = Bucket(table, service, [(key, raw)])
    again = [(key, former.values.get(fold(key), raw))]
    builder = Builder(table, service, former)
    builder.take(again)
    fresh = Bucket(table, service, again)
    assert (fresh.values, set(fresh.refused)) == (builder.values, set(builder.refused))
