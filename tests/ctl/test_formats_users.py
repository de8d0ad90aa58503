"""Files of users: passwd(5), master.passwd, shadow, Dovecot's, and records."""

from __future__ import annotations

import json

import pytest

from table_consul.ctl.formats import read_passwd
from table_consul.services import SERVICES
from tests.ctl.parsed import CREDENTIALS, HASH, USERINFO, pairs, problems, read


def test_passwd_line_gives_each_service_its_fields():
    line = b"Vera:%b:1000:100:Vera,,,:/home/vera:/bin/sh:extra=1\n" % HASH
    assert pairs(read_passwd(line, CREDENTIALS)) == [(b"vera", HASH)]
    assert pairs(read_passwd(line, SERVICES["auth"])) == [(b"vera", HASH)]
    assert pairs(read_passwd(line, USERINFO)) == [(b"vera", b"1000:100:/home/vera")]
    ((_, record),) = pairs(read_passwd(line, USERINFO, record=True))
    assert json.loads(record) == {"password": HASH.decode(), "uid": 1000, "gid": 100, "home": "/home/vera"}


def test_master_passwd_home_is_found():
    line = b"vera:%b:1000:100:staff:0:0:Vera:/home/vera:/bin/ksh\n" % HASH
    assert pairs(read_passwd(line, USERINFO)) == [(b"vera", b"1000:100:/home/vera")]


def test_shadow_gives_hashes_and_locked_accounts():
    text = b"vera:%b:19000:0:99999:7:::\ndaemon:*:19000:0:99999:7:::\nsync:!*:19000::::::\n" % HASH
    assert pairs(read(text, CREDENTIALS, "auto")) == [
        (b"vera", HASH),
        (b"daemon", b"*"),
        (b"sync", b"*"),
    ]


@pytest.mark.parametrize("days", [b"19000:0:99999:7:::", b"19000:7:99999:7:30:20000:", b"19000::::::", b":::::20000:"])
def test_shadow_days_are_neither_ids_nor_a_home(days):
    line = b"vera:%b:%b" % (HASH, days)
    assert "no uid and gid" in problems(read_passwd(line, USERINFO))[1]
    ((_, record),) = pairs(read_passwd(line, CREDENTIALS, record=True))
    assert json.loads(record) == {"password": HASH.decode()}


def test_dovecot_user_without_home_in_nine_fields_is_not_shadow():
    line = b"vera:%b:1000:100:::::" % HASH
    assert pairs(read_passwd(line, USERINFO)) == [(b"vera", b"1000:100:")]


def test_dovecot_user_may_have_an_address_and_a_hash_with_scheme():
    text = b"# users\nvera@example.org:{BLF-CRYPT}%b:1000:1000::/srv/mail/vera::quota=1G\n" % HASH
    assert pairs(read_passwd(text, CREDENTIALS)) == [(b"vera@example.org", b"{BLF-CRYPT}" + HASH)]


@pytest.mark.parametrize(
    ("line", "service", "expected"),
    [
        (b"vera:x:1000:1000::/home/vera:/bin/sh", "credentials", "/etc/shadow"),
        (b"vera::1000:1000::/home/vera:/bin/sh", "credentials", "no password"),
        (b"vera:*::::/home/vera:/bin/sh", "userinfo", "no uid"),
        (b"vera:*:1000", "userinfo", "no uid"),
        (b":*:1:1::/h:/s", "userinfo", "no user"),
        (b"+::::::", "userinfo", "NIS"),
        (b"vera", "credentials", "no colon"),
    ],
)
def test_user_without_a_needed_field_is_a_problem_with_its_line(line, service, expected):
    assert expected in problems(read_passwd(b"# x\n" + line, SERVICES[service]))[2]


def test_dovecot_extra_fields_are_not_master_passwd():
    line = b"vera:%b:1000:1000::::userdb_mail=maildir:/srv/mail/vera:INDEX=/srv/index\n" % HASH
    ((_, record),) = pairs(read_passwd(line, CREDENTIALS, record=True))
    assert json.loads(record) == {"password": HASH.decode(), "uid": 1000, "gid": 1000}


def test_record_keeps_an_id_that_is_not_a_number():
    text = b"vera:*:mail:%b::/home/vera:\neric::::::\n\xff:\xff::\n" % (b"9" * 5000)
    parsed = read_passwd(text, CREDENTIALS, record=True)
    assert json.loads(parsed.entries[0].value) == {
        "password": "*",
        "uid": "mail",
        "gid": "9" * 5000,
        "home": "/home/vera",
    }
    assert {line: "neither" in expected or "UTF-8" in expected for line, expected in problems(parsed).items()} == {
        2: True,
        3: True,
    }


def test_record_leaves_out_missing_fields():
    assert pairs(read_passwd(b"vera:x:1000:1000::/home/vera:\neric:*\n", CREDENTIALS, record=True)) == [
        (b"vera", b'{"uid":1000,"gid":1000,"home":"/home/vera"}'),
        (b"eric", b'{"password":"*"}'),
    ]
