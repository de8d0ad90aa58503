"""Values of credentials and auth, hashes of other programs, and records with the fields of a user."""

from __future__ import annotations

import json

import pytest

from tests.services.parsing import read, refusal

SHA512 = b"$6$saltsalt$TVLlQcbpFVof5W3Yz4DTP6gRstiNuHwwTt6GLc1E5n0U0aDehy0S5knV8wiOQSpT0Y77vwPZN.Pq.H91p5hVO1"
BCRYPT = b"$2b$10$abcdefghijklmnopqrstuuqflPDzB6gcMhKa1rZqKiun2YGL5sa2u"
ARGON2 = b"$argon2id$v=19$m=65536,t=3,p=4$c2FsdHNhbHQ$qVQ8m7ozNVzoeV1W0lpcI9V2SPUOK+NCcQHYOu+C/us"


@pytest.mark.parametrize("raw", [b"$6$salt$hash", b"gilles:secret", b"gilles:se:cret", b"abc"])
def test_credential_is_a_hash_or_a_user_and_a_password(raw):
    assert raw == read(raw, "credentials")


@pytest.mark.parametrize("raw", [b"ab", b":secret", b"gilles:", b"a:", b":::"])
def test_malformed_credential_is_rejected(raw):
    assert "not a credential (expected HASH, USER:HASH or, to relay, USER:PASSWORD)" in refusal(raw, "credentials")


@pytest.mark.parametrize("service", ["credentials", "auth"])
@pytest.mark.parametrize("hashed", [SHA512, BCRYPT, ARGON2, b"{BLF-CRYPT}" + BCRYPT])
@pytest.mark.parametrize("rest", [b":", b":5000", b":5000:5000::/var/vmail/eric"])
@pytest.mark.parametrize("user", [b"", b"eric:"])
def test_passwd_line_is_not_a_credential(service, user, hashed, rest):
    text = "the value continues after its hash with a colon; store nothing but the hash"
    assert text in refusal(user + hashed + rest, service)
    assert text in refusal(json.dumps({"password": (hashed + rest).decode()}).encode(), service)


@pytest.mark.parametrize("raw", [b"{CRYPT}:clear", b"{PLAIN}secret:5000:5000::/srv", b"$5$salt$hash:clear"])
def test_hash_or_scheme_is_not_a_user(raw):
    assert "the value continues after its hash" in refusal(raw, "credentials")


@pytest.mark.parametrize(
    "raw", [b"administrator:secret", b"user:administrator:secret", b"user:$5$a:b", b"user:{a}b:c", b"_user:a:b"]
)
def test_relay_password_may_contain_a_colon(raw):
    assert read(raw, "credentials") == raw


# ---- hashes ----


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
        b"{CRYPT}clear",
        b"{SSHA512}abcdef",
    ],
)
def test_relay_password_in_clear_text_is_unchanged(raw):
    assert read(raw, "credentials") == raw


@pytest.mark.parametrize("service", ["credentials", "auth"])
@pytest.mark.parametrize("raw", [b"*", b"!", b"!!", b"*LK*"])
def test_bare_lock_becomes_a_locked_account(service, raw):
    """smtpd treats fewer than three bytes as a temporary error, not as a rejection (smtpd: table_parse_lookup)."""
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
        ({"home": "/hunter2\n"}, "userinfo", None),
        ({"home": "/hunter2\n/x"}, "userinfo", "a line break"),
        ({"uid": None}, "userinfo", "the record has no uid, which userinfo needs"),
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


@pytest.mark.parametrize(("home", "value"), [(None, b""), ("", b""), ("vera", b"vera")])
def test_record_without_a_home_or_with_a_relative_one_is_a_user(home, value):
    assert read(record(**USER | {"home": home}), "userinfo") == b"1000:1001:" + value
    assert read(record(uid=1000, gid=1001), "userinfo") == b"1000:1001:"


def test_invalid_record_field_of_another_service_is_ignored():
    assert read(record(**USER | {"uid": [], "home": 5}), "credentials") == SHA512


def test_relay_password_in_a_record_may_contain_a_colon():
    assert read(record(password="se:cret"), "credentials", key=b"label") == b"label:se:cret"
    assert "the key contains a colon" in refusal(record(password="se:cret"), "credentials", key=b"la:bel")


@pytest.mark.parametrize(
    "raw",
    [
        b'{"password": "hunter2"',
        b"{'password': 'hunter2'}",
        b'{"a": ' + b"[" * 100000,
        b"{password:%b,uid:1000,gid:1000}" % SHA512,
        b'{ password: "hunter2" }',
    ],
)
def test_broken_json_object_is_rejected(raw):
    assert refusal(raw, "credentials") == "the value starts like a JSON object but is not valid JSON"


@pytest.mark.parametrize("service", ["credentials", "auth", "userinfo"])
@pytest.mark.parametrize("space", [b" ", b"\t", b"\n", b"\r\n "])
def test_white_space_before_a_record_is_rejected(service, space):
    text = "the value has white space before a JSON object (remove it)"
    assert refusal(space + record(**USER), service) == text
    assert read(space + record(**USER), service, value_format="json") == read(record(**USER), service)


@pytest.mark.parametrize("raw", [b" user:secret", b"{1:secret", b"{PLAIN}secret"])
def test_user_of_a_relay_is_not_a_json_object(raw):
    assert read(raw, "credentials") == raw
