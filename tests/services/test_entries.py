from __future__ import annotations

from itertools import cycle, islice

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from table_consul.errors import EntryError
from table_consul.protocol import Found
from table_consul.services import DEFAULT_SERVICES, SERVICES, Table, fold_key
from table_consul.services.entries import Entries, EntriesBuilder
from tests.services.test_values import RAW, SERVICE, TABLES

TABLE = Table("aliases")
COMMANDS = replace(TABLE, allow_commands=True)
LISTS = ("domain", "netaddr", "source", "mailaddr", "relayhost", "regex")


def entries(service, *pairs, table=TABLE):
    return Entries(table, SERVICES[service], pairs)


# ---- layout ----


def test_path_is_prefix_table_and_service():
    assert replace(TABLE, prefix="mail/hosts").path(SERVICES["alias"]) == b"mail/hosts/aliases/alias/"


def test_path_without_prefix_begins_with_the_table():
    assert TABLE.path(SERVICES["domain"]) == b"aliases/domain/"


def test_paths_move_one_service_only():
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


def test_fold_key_changes_ascii_letters_only():
    assert "straße@É.example".encode() == fold_key("STRAßE@É.Example".encode())


def test_upper_case_key_answers_a_lower_case_lookup():
    assert entries("alias", (b"Root", b"gilles")).lookup(b"root") == b"gilles"


@pytest.mark.parametrize("order", [1, -1])
def test_lower_case_key_takes_precedence_and_a_problem_names_both(order):
    found = entries("alias", *[(b"Root", b"eric"), (b"root", b"gilles")][::order])
    (problem,) = found.problems
    assert (
        found.lookup(b"root"),
        str(problem).startswith("aliases/alias/Root: "),
        "only in case from aliases/alias/root, which takes precedence" in str(problem),
    ) == (b"gilles", True, True)


def test_first_of_two_upper_case_keys_takes_precedence():
    found = entries("alias", (b"ROOT", b"gilles"), (b"Root", b"eric"))
    assert (found.lookup(b"root"), len(found.problems)) == (b"gilles", 1)


def test_lower_case_key_replaces_a_case_variant_good_or_bad():
    fixed = entries("alias", (b"Root", b"|sh"), (b"root", b"gilles"))
    broken = entries("alias", (b"Root", b"gilles"), (b"root", b"|sh"))
    assert (fixed.lookup(b"root"), fixed.errors, broken.values) == (b"gilles", {}, {})


def test_folders_are_not_entries():
    found = entries("alias", (b"", None), (b"staff/", None), (b"staff/root", b"gilles"))
    assert (len(found), found.find(b"staff/"), found.lookup(b"staff/root")) == (1, None, b"gilles")


def test_keys_may_contain_slashes():
    assert entries("netaddr", (b"192.0.2.0/24", None)).find(b"192.0.2.0/24") is not None


def test_utf_8_keys_and_values_are_unchanged():
    key, value = "jörg@exämple.org".encode(), "jörg".encode()
    assert value == entries("string", (key, value)).lookup(key)


def test_lookup_of_an_absent_key_is_none():
    assert entries("alias", (b"root", b"gilles")).lookup(b"nobody") is None
    assert entries("alias").find(b"nobody") is None


# ---- empty ----


@pytest.mark.parametrize("service", LISTS)
@pytest.mark.parametrize("raw", [b"", None, b" \n", b'""'])
def test_list_entry_without_value_answers_with_its_key(service, raw):
    found = entries(service, (b"example.org", raw))
    assert (found.find(b"example.org"), found.lookup(b"example.org")) == (b"example.org", b"example.org")


@pytest.mark.parametrize("service", ["alias", "credentials", "userinfo", "addrname", "mailaddrmap", "string"])
@pytest.mark.parametrize("raw", [b"", None, b" \n"])
def test_value_entry_without_value_exists_but_its_lookup_is_an_error(service, raw):
    found = entries(service, (b"root", raw))
    with pytest.raises(EntryError, match=f"aliases/{service}/root: there is no value"):
        found.lookup(b"root")
    assert found.find(b"root") is not None


def test_list_entry_with_a_value_answers_with_the_value():
    assert entries("domain", (b"example.org", b"yes")).lookup(b"example.org") == b"yes"


def test_relayhost_with_a_value_answers_with_the_host():
    relays = entries("relayhost", (b"example.org", b"smtp://mx.example.net"), (b"smtp://mx.example.com", b""))
    assert relays.lookup(b"example.org") == b"smtp://mx.example.net"
    assert relays.lookup(b"smtp://mx.example.com") == b"smtp://mx.example.com"


@pytest.mark.parametrize("key", [b"a\nb", b"a\rb", b"a\0b"])
def test_key_that_is_no_valid_reply_is_an_error(key):
    with pytest.raises(EntryError, match="contains a control character"):
        entries("domain", (key, None)).lookup(key)


# ---- bad entries ----


def test_bad_entry_affects_no_other():
    found = entries("alias", (b"bad", b"|sh"), (b"root", b"gilles"), (b"worse", b'"\xff'))
    assert (b"gilles", {b"bad", b"worse"}, 2) == (found.lookup(b"root"), set(found.errors), len(found.problems))


def test_bad_entry_exists_and_its_lookup_names_the_key():
    found = entries("alias", (b"bad", b"|sh"))
    with pytest.raises(EntryError, match=r"^aliases/alias/bad: the value contains a \|command"):
        found.lookup(b"bad")
    assert found.find(b"bad") is not None


def test_problem_escapes_control_characters_of_its_key():
    (problem,) = entries("alias", (b"a\x1b[31m\n", b"|sh")).problems
    assert str(problem).startswith("aliases/alias/a\\x1b[31m\\n: ")


def test_repeated_lookups_of_a_bad_entry_do_not_grow_the_traceback():
    found = entries("alias", (b"bad", b"|sh"))
    depth = 0
    for _ in range(50):
        with pytest.raises(EntryError) as caught:
            found.lookup(b"bad")
        depth = len(caught.traceback)
    assert depth < 10


class TestBuilder:
    def build(self, *pairs, former=None, table=TABLE, service="alias"):
        builder = EntriesBuilder(table, SERVICES[service], former)
        builder.take(pairs)
        return builder

    def test_several_takes_equal_one(self):
        builder = self.build((b"Root", b"eric"))
        builder.take([(b"root", b"gilles"), (b"bad", b"|sh")])
        whole = entries("alias", (b"Root", b"eric"), (b"root", b"gilles"), (b"bad", b"|sh"))
        built = builder.finish()
        assert (whole.values, whole.problems) == (built.values, built.problems)

    def test_unchanged_entries_are_the_former_object(self):
        former = entries("alias", (b"root", b"gilles\n"), (b"bad", b"|sh"))
        assert former is self.build((b"root", b"gilles"), (b"bad", b"|sh"), former=former).finish()

    def test_changed_entries_leave_the_former_ones_alone(self):
        former = entries("alias", (b"root", b"gilles"))
        built = self.build((b"root", b"eric"), former=former).finish()
        assert (built.lookup(b"root"), former.lookup(b"root")) == (b"eric", b"gilles")

    def test_unchanged_entries_with_a_bad_pattern_are_the_former_object(self):
        former = entries("netaddr", (b"192.0.2.0/24", None), (b"nonsense/99", None))
        same = self.build(*((key, None) for key in former.values), former=former, service="netaddr").finish()
        assert (former is same, len(former.problems)) == (True, 1)

    def test_deleted_case_variant_is_no_longer_a_problem(self):
        former = entries("alias", (b"Root", b"x"), (b"root", b"gilles"))
        assert self.build((b"root", b"gilles"), former=former).finish().problems == []

    def test_missing_keys_are_those_of_the_former_entries_only(self):
        former = entries("alias", (b"root", b"gilles"), (b"bad", b"|sh"), (b"kept", b"eric"))
        builder = self.build((b"kept", b"x"), former=former)
        assert ([*builder.missing_keys()], [*self.build((b"a", b"b")).missing_keys()]) == ([b"root", b"bad"], [])

    def test_revoked_permission_applies_to_unchanged_values(self):
        former = entries("alias", (b"root", b"|sh"), table=COMMANDS)
        assert {b"root"} == set(self.build((b"root", b"|sh"), former=former).finish().errors)

    def test_bad_case_variant_does_not_shadow_good_key(self):
        former = entries("alias", (b"root", b"gilles"))
        built = self.build((b"Root", b"|sh"), (b"root", b"gilles"), former=former).finish()
        assert (built.lookup(b"root"), built.errors, len(built)) == (b"gilles", {}, 1)
        assert [problem.key for problem in built.problems] == [b"aliases/alias/Root"]

    def test_key_stored_anew_in_another_case_is_reported_and_missed_in_that_case(self):
        former = entries("alias", (b"Root", b"gilles"))
        built = self.build((b"root", b"gilles"), former=former).finish()
        assert [*self.build(former=built).missing_keys()] == [b"root"]

    def test_missing_keys_are_known_after_a_change_of_settings(self):
        former = entries("alias", (b"Root", b"gilles"))
        table = replace(TABLE, allow_commands=True)
        assert self.build(former=former, table=table).missing_keys() == {b"root": b"Root"}
        moved = replace(TABLE, paths={"alias": "elsewhere"})
        assert self.build(former=former, table=moved).missing_keys() == {}


# ---- records and the default entry ----

RECORD = b'{"password": "$6$salt$hash", "uid": 1000, "gid": "1000", "home": "/home/vera", "quota": [1, {"a": null}]}'


def test_records_serve_several_services():
    assert entries("userinfo", (b"vera", RECORD)).lookup(b"vera") == b"1000:1000:/home/vera"
    assert entries("credentials", (b"vera", RECORD)).lookup(b"vera") == b"$6$salt$hash"


def test_record_for_another_service_is_an_error_but_no_problem():
    found = entries("userinfo", (b"vera", b'{"password": "x"}'))
    with pytest.raises(EntryError, match="aliases/userinfo/vera: the record has no uid and no gid and no home, which"):
        found.lookup(b"vera")
    assert (found.problems, found.find(b"vera")) == ([], b"vera")


def test_record_without_some_fields_is_a_problem():
    found = entries("userinfo", (b"vera", b'{"uid": 1, "home": null}'), (b"*", b"1000:1000:/home/%u"))
    with pytest.raises(EntryError, match="the record has no gid and no home"):
        found.lookup(b"vera")
    assert len(found.problems) == 1


DEFAULT = (b"*", b"5000:5000:/var/vmail/%d/%n")


def test_default_entry_answers_for_users_without_entry():
    users = entries("userinfo", DEFAULT, (b"gilles", b"1000:1000:/home/gilles"), (b"eric", b'{"password": "x"}'))
    assert [users.lookup(user) for user in (b"gilles", b"vera@example.org")] == [
        b"1000:1000:/home/gilles",
        b"5000:5000:/var/vmail/example.org/vera",
    ]
    with pytest.raises(EntryError, match=r"aliases/userinfo/\*: the user name cannot .* or no domain for %d"):
        users.lookup(b"eric")
    assert (users.contains(b"vera"), users.find(b"vera")) == (True, None)


@pytest.mark.parametrize(
    ("home", "user", "answer"),
    [
        (b"/home/%u", b"vera", b"/home/vera"),
        (b"/home/%u", b"vera@example.org", b"/home/vera@example.org"),
        (b"/home/%n", b"vera", b"/home/vera"),
        (b"/home/%n", b"a@b@example.org", b"/home/a@b"),
        (b"/100%%/%u%%", b"%u", b"/100%/%u%"),
        (b"/home/all", b"vera", b"/home/all"),
        (b"/home/%u", "jörg".encode(), "/home/jörg".encode()),
        (b"/home/%u", b"*", b"/home/*"),
        (b"/home/%u", b"\\1\\g<0>", b"/home/\\1\\g<0>"),
        (b"/home/%u", b"...", b"/home/..."),
    ],
)
def test_default_home_is_filled_in_with_the_user(home, user, answer):
    assert entries("userinfo", (b"*", b"5000:5000:" + home)).lookup(user) == b"5000:5000:" + answer


@pytest.mark.parametrize(
    "user", [b"..", b".", b"a/b", b"/", b"../x", b"a\x1bb", b"a\x7f", b"", b"x:0", b"x:0:0:/root", b"a\0"]
)
@pytest.mark.parametrize("home", [b"/home/%u", b"/home/%n", b"/home/all"])
def test_default_home_cannot_be_escaped_by_a_user_name(user, home):
    users = entries("userinfo", (b"*", b"5000:5000:" + home))
    if user in (b"..", b".") and b"%" not in home:
        assert users.lookup(user) == b"5000:5000:/home/all"
        return
    with pytest.raises(EntryError, match=r"^aliases/userinfo/\*: the user name cannot be used in the default home"):
        users.lookup(user)


def test_default_home_that_expands_to_two_dots_is_an_error():
    with pytest.raises(EntryError, match="cannot be used in the default home"):
        entries("userinfo", (b"*", b"5000:5000:/home/.%u/x")).lookup(b".")


def test_bad_default_entry_is_an_error_only_for_users_without_entry():
    users = entries("userinfo", (b"*", b"0:0:/root"), (b"gilles", b"1000:1000:/home/gilles"))
    assert users.lookup(b"gilles") == b"1000:1000:/home/gilles"
    with pytest.raises(EntryError, match="uid or gid 0"):
        users.lookup(b"vera")


def test_absent_user_without_default_entry_is_none():
    assert entries("userinfo", (b"gilles", b"1000:1000:/")).lookup(b"vera") is None


def test_star_is_an_ordinary_key_in_other_services():
    assert entries("string", (b"*", b"x")).lookup(b"vera") is None


@pytest.mark.parametrize("address", [b"192.0.2.25", b"2001:db8::25", b"[2001:db8::25]", b"fe80::1%eth0"])
def test_source_address_is_no_problem(address):
    assert entries("source", (address, None)).problems == []
    assert entries("source", (b"first", address), table=replace(TABLE, fetch="values")).problems == []


@settings(deadline=None)
@given(user=st.binary() | st.text(".%/:@aun\0").map(str.encode), home=st.text("/%und.").map(lambda h: f"/{h}".encode()))
def test_default_entry_keeps_its_ids_and_home_for_any_user(user, home):
    users = entries("userinfo", (b"*", b"5000:5001:" + home))
    try:
        value = users.lookup(user)
    except EntryError:
        return
    name, uid, gid, path = (user + b":" + value).split(b":", 3)  # smtpd: to.c, text_to_userinfo
    assert (name, uid, gid, path[:1], value.count(b"\n")) == (user, b"5000", b"5001", b"/", 0)
    assert b"%" not in home or b".." not in path.split(b"/")


# ---- warnings ----


@pytest.mark.parametrize(
    ("service", "key", "raw", "warning"),
    [
        ("alias", b" root", b"gilles", "begins or ends with white space"),
        ("domain", b"example.org\n", None, "begins or ends with white space"),
        ("alias", b"root", b"gilles, eric schmidt", "element 2 of the value is neither a user nor an address"),
        ("alias", b"root", "jörg@exämple.org".encode(), "element 1 of the value is neither a user nor an address"),
        ("alias", b"root", "joerg@exämple.org".encode(), "delivers to the local user before the @"),
        ("alias", b"root", b"error:nonsense", "element 1 of the value is neither"),
        (
            "mailaddrmap",
            b"vera",
            b"a@example.org, " + b"x" * 300 + b"@example.org",
            "element 2 of the value has more than 255 bytes before",
        ),
        ("credentials", b"vera", b"hunter2", "not a hash that smtpd's crypt"),
        ("credentials", b"vera", b"{SSHA512}hunter2", "not a hash that smtpd's crypt"),
        ("credentials", b"vera", b"vera:{plain}hunter2", "not a hash that smtpd's crypt"),
        (
            "credentials",
            b"vera",
            b"{ARGON2ID}$argon2id$v=19$m=65536,t=3,p=4$c2FsdHNhbHQ$qVQ8m7ozNVzo",
            "not a hash that",
        ),
        ("auth", b"vera", b"{SSHA512}hunter2", "not a hash that can be verified"),
        ("alias", b"root", None, "there is no value, and alias needs one"),
        ("mailaddrmap", b"vera", b" \n", "there is no value, and mailaddrmap needs one"),
        ("auth", b"vera", None, "there is no value, and auth needs one"),
        ("source", b"mail.example.org", None, "not an address to send mail from"),
        ("source", b"192.0.2.256", None, "not an address to send mail from"),
        ("source", b"192.0.2.0/24", None, "not an address to send mail from"),
        ("auth", b"vera", b"$2b$31$abcdefghijklmnopqrstuuqflPDzB6gcMhKa1rZqKiun2YGL5sa2u", "to verify, more than the"),
    ],
)
def test_value_that_smtpd_would_reject_is_served_with_a_warning(service, key, raw, warning):
    found = entries(service, (key, raw), (b"other", None if service == "domain" else b"other@example.org"))
    (problem,) = [problem for problem in found.problems if "/other" not in str(problem)]
    assert warning in str(problem)
    assert str(problem).startswith("aliases/")
    assert "hunter2" not in str(problem)
    assert (key in found.values, found.errors) == (True, {})


@pytest.mark.parametrize(
    ("service", "raw"),
    [
        ("alias", b"gilles, eric@example.org, error:550 no such user, a.b+c@x-y.org, :error:450 4.2.1 later"),
        ("alias", b"bang!path%x@example.org"),
        ("mailaddrmap", b'gilles@example.org, @example.com, "a b"@example.org'),
        ("credentials", b"vera:clear {text}"),
        ("credentials", b"vera:{something} else"),
        ("credentials", b"!$6$salt$hash"),
        ("credentials", b"$sha1$1$salt$rtI8apYHXaqy9MbxM3TD51VTdkna"),
        ("credentials", b"vera:$2b$10$abcdefghijklmnopqrstuuqflPDzB6gcMhKa1rZqKiun2YGL5sa2u"),
        ("auth", b"*"),
        ("auth", b"!$6$salt$hash"),
        ("string", b"anything"),
    ],
)
def test_valid_value_has_no_problem(service, raw):
    assert entries(service, (b"vera", raw)).problems == []


def test_permitted_commands_have_no_problem():
    values = b'"|command, with comma", /var/mail/x, :include:/etc/list, |plain'
    assert entries("alias", (b"root", values), table=COMMANDS).problems == []


def test_argon2_credential_is_no_problem_with_auth():
    table = replace(TABLE, services=("auth", "credentials"))
    argon2 = b"$argon2id$v=19$m=65536,t=3,p=4$c2FsdHNhbHQ$qVQ8m7ozNVzoeV1W0lpcI9V2SPUOK+NCcQHYOu+C/us"
    assert entries("credentials", (b"vera", argon2), table=table).problems == []


def test_upper_case_key_in_direct_mode_is_a_problem():
    direct = replace(TABLE, mode="direct")
    (problem,) = entries("relayhost", (b"Example.org", b"smtp://mx"), table=direct).problems
    assert "aliases/relayhost/Example.org: smtpd asks in lower case" in str(problem)
    assert entries("domain", (b"Example.org", None), table=direct).problems == []


def test_warning_of_an_unchanged_entry_remains_when_others_change():
    former = entries("credentials", (b"vera", b"hunter2"), (b"gone", b"hunter2"))
    builder = EntriesBuilder(TABLE, SERVICES["credentials"], former)
    builder.take([(b"vera", b"hunter2"), (b"new", b"$6$salt$hash")])
    built = builder.finish()
    assert [str(problem).partition(":")[0] for problem in built.problems] == ["aliases/credentials/vera"]
    builder = EntriesBuilder(TABLE, SERVICES["credentials"], built)
    builder.take([(b"vera", b"hunter2"), (b"new", b"$6$salt$hash")])
    assert builder.finish() is built


# ---- internationalised names ----

NAMES = ["jörg@exämple.org", "用户@例子.公司", "пользователь@пример.рф", "δοκιμή@παράδειγμα.ελ", "a\u0301@e\u0301.org"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("service", ["alias", "mailaddrmap", "mailaddr", "string"])
def test_internationalised_names_are_unchanged(service, name):
    key = name.encode()
    found = entries(service, (key, key))
    assert (found.lookup(key), found.find(key)) == (key, key)


@pytest.mark.parametrize("name", NAMES)
def test_internationalised_domains_match_as_bytes(name):
    domain = name.partition("@")[2].encode()
    found = entries("domain", (b"*." + domain, None))
    assert (found.find(b"mx." + domain), found.find(domain)) == (b"*." + domain, None)


def test_unicode_normal_forms_are_different_keys():
    composed, decomposed = "j\u00f6rg".encode(), "jo\u0308rg".encode()
    assert entries("alias", (composed, b"gilles")).lookup(decomposed) is None


def test_bytes_that_are_not_utf_8_are_unchanged():
    assert entries("alias", (b"j\xf6rg", b"j\xf6rg")).lookup(b"j\xf6rg") == b"j\xf6rg"


# ---- fetch ----


def fetched(found, count):
    last, values = None, []
    for _ in range(count):
        last, value = found.next_after(last)
        values.append(value)
    return values


def test_fetch_returns_the_keys_in_order_and_wraps():
    found = entries("source", (b"192.0.2.2", None), (b"192.0.2.1", b"x"))
    assert fetched(found, 3) == [b"192.0.2.1", b"192.0.2.2", b"192.0.2.1"]


def test_fetch_of_values_returns_the_key_where_there_is_none():
    table = replace(TABLE, fetch="values")
    assert fetched(entries("source", (b"192.0.2.1", b"uplink"), (b"192.0.2.2", b""), table=table), 2) == [
        b"uplink",
        b"192.0.2.2",
    ]


def test_fetch_without_entries_is_none():
    assert (entries("source").next_after(None), entries("source").next_after(b"gone")) == (None, None)


def test_fetch_skips_keys_that_are_no_valid_reply():
    assert fetched(entries("source", (b"a", None), (b"b\n", None), (b"c", None)), 4) == [b"a", b"c"] * 2


def test_fetch_of_values_skips_bad_entries():
    table = replace(TABLE, fetch="values")
    assert fetched(entries("string", (b"a", b"x"), (b"b", b"y\nz"), (b"c", b""), table=table), 2) == [b"x", b"x"]


def test_fetch_is_an_error_if_all_entries_are_bad():
    with pytest.raises(EntryError, match=r"aliases/source/a\\n: the key contains a control character"):
        entries("source", (b"b\r", None), (b"a\n", None)).next_after(None)


KEYS = st.sampled_from([bytes([c]) for c in b"abcdefgh"])


@settings(deadline=None)
@given(
    stays=st.sets(KEYS, min_size=1),
    changes=st.lists(st.sets(KEYS), min_size=1, max_size=40),
)
def test_fetch_returns_each_remaining_key_once_a_round_whatever_changes(stays, changes):
    last, values = None, []
    for others in changes:
        last, value = entries("source", *((key, None) for key in sorted(stays | others))).next_after(last)
        values.append(value)
    steady = [value for value in values if value in stays]
    assert [*islice(cycle(sorted(stays)), len(steady))] == steady


# ---- properties ----


@settings(deadline=None)
@given(table=TABLES, service=SERVICE, key=st.binary(min_size=1), raw=RAW)
def test_answers_are_valid_replies(table, service, key, raw):
    found = Entries(table, service, [(key, raw)])
    for ask in (lambda: found.lookup(fold_key(key)), lambda: (found.next_after(None) or (None, None))[1]):
        try:
            value = ask()
        except EntryError:
            continue
        assert value is None or Found(value).value == value


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
]
SHA512 = b"$6$saltsalt$" + b"." * 86
STORED = st.sampled_from(
    [
        b'"gilles"', b'"\\"gilles\\""', b'["gilles"]', b"|sh", b'"|sh"', b"gilles, eric schmidt", b"a\nb",
        b"gilles", b"gilles\n", b"", None, b"1000:1000:/home/x", b"0:0:/root", RECORD, b'{"password": "hunter2"}',
        b'{"uid": 1}', b"{}", b"{CRYPT}" + SHA512, SHA512, b"vera:hunter2", b"hunter2", b"*", b"*LK*", b"192.0.2.1",
        b"$2b$15$" + b"." * 53,
    ]
)  # fmt: skip
PAIRS = st.lists(st.tuples(st.sampled_from(CASE_VARIANTS), STORED), unique_by=lambda pair: pair[0])
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


def state(found):
    def answer(key):
        try:
            return found.lookup(key)
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
        "answers": [answer(fold_key(key)) for key in [*CASE_VARIANTS, b"nobody"]],
    }


@pytest.mark.parametrize("service", SERVICES)
@settings(deadline=None)
@given(stages=st.lists(st.tuples(REUSING_TABLES, PAIRS), min_size=2, max_size=4))
@example(stages=[(TABLE, [(b"root", b"gilles")]), (TABLE, [(b"Root", b"|sh"), (b"root", b"gilles")])])
@example(stages=[(TABLE, [(b"Root", b"")]), (TABLE, [(b"root", b"")])])
@example(stages=[(TABLE, [(b"root", b'"\\"gilles\\""')]), (TABLE, [(b"root", b'"gilles"')])])
def test_entries_built_on_former_ones_equal_those_built_from_scratch(service, stages):
    former = None
    for table, pairs in stages:
        builder = EntriesBuilder(table, SERVICES[service], former)
        for pair in pairs:
            builder.take([pair])
        former = builder.finish()
        assert state(former) == state(Entries(table, SERVICES[service], pairs))


@settings(deadline=None)
@given(table=TABLES, service=SERVICE, key=st.binary(min_size=1), raw=RAW)
def test_parsed_value_stored_again_is_the_same(table, service, key, raw):
    """EntriesBuilder reuses a value that equals the former one: parsing it again must not change it."""
    former = Entries(table, service, [(key, raw)])
    again = [(key, former.values.get(fold_key(key), raw))]
    builder = EntriesBuilder(table, service, former)
    builder.take(again)
    fresh = Entries(table, service, again)
    assert (fresh.values, set(fresh.errors)) == (builder.values, set(builder.errors))
