"""What `table-consulctl` reads from smtpd.conf: its tables, and the services that smtpd looks up in them."""

from __future__ import annotations

import pytest

from table_consul.ctl import smtpdconf


@pytest.fixture
def read(tmp_path):
    def run(text, **files):
        for name, content in {"smtpd.conf": text, **files}.items():
            (tmp_path / name).write_text(content.replace("HERE", str(tmp_path)))
        return smtpdconf.read(str(tmp_path / "smtpd.conf"))

    return run


def services(conf, name="t"):
    return [use.services for use in conf.tables[name].uses]


@pytest.mark.parametrize(
    ("line", "config"),
    [
        ("table t consul", None),
        ('table "t" "consul"', None),
        ("table 't' consul:/etc/x.toml  # a comment", "/etc/x.toml"),
        ("table \\\n t\\\n consul", None),
        ('table t "procexec:/usr/libexec/opensmtpd/table-consul /etc/x.toml"', "/etc/x.toml"),
        ('table t "procexec:/usr/libexec/smtpd/table-consul"', None),
        ('c = "consul:/etc/x.toml"\ntable t $c', "/etc/x.toml"),
        ('line = "table t consul:/etc/x.toml"\n$line', "/etc/x.toml"),
        ('c = "con\\\nsul"\ntable t $c', None),
    ],
)
def test_table_of_table_consul_is_found(read, line, config):
    assert {name: each.config for name, each in read(line + "\n").tables.items()} == {"t": config}


@pytest.mark.parametrize(
    "line",
    [
        "table t file:/etc/aliases",
        "table t { a = b }",
        'table t { "table x consul" }',
        "# table t consul",
        "table t redis:/etc/consul",
        'listen on lo tag "table t consul"',
    ],
)
def test_other_tables_are_left_out(read, line):
    conf = read(line)
    assert (conf.tables, conf.problems) == ({}, [])


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ('action "a" maildir alias <t>', [("alias",)]),
        ('action "a" maildir virtual <t> userbase <t>', [("alias",), ("userinfo",)]),
        (
            'action "a" relay host smtps://x auth <t> src <t> helo-src <t>',
            [("credentials",), ("source",), ("addrname",)],
        ),
        ('action "a" relay domain <t>', [("relayhost",)]),
        ("match from src <t> for domain <t> action a", [("netaddr",), ("domain",)]),
        ("match from any for domain regex <t> action a", [("regex",)]),
        ("match ! from rdns <t> for rcpt-to <t> action a", [("domain",), ("mailaddr",)]),
        ("match from auth <t> for any action a", [("string", "mailaddr")]),
        ("listen on lo auth <t> hostnames <t> senders <t>", [("credentials", "auth"), ("addrname",), ("mailaddrmap",)]),
        ('listen on lo auth-optional \\\n < "t" >', [("credentials", "auth")]),
        ('filter f phase connect match src <t> disconnect "550 no"', [("netaddr",)]),
        ("filter f phase commit match auth <t> junk", [("string", "credentials")]),
    ],
)
def test_use_of_a_table_determines_its_service(read, statement, expected):
    assert services(read(f"table t consul\n{statement}\n")) == expected


def test_includes_are_followed_and_lines_are_those_of_their_file(read, tmp_path):
    conf = read('include "HERE/more"\naction a maildir alias <t>\n', more="\n\ntable t consul\n")
    table = conf.tables["t"]
    assert (table.where, table.uses[0].where) == (f"{tmp_path}/more:3", f"{tmp_path}/smtpd.conf:2")


def test_include_in_a_macro_is_followed(read):
    assert [*read('file = "\\"HERE/more\\""\ninclude $file\n', more="table t consul\n").tables] == ["t"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('include "/nowhere/x"\n', "cannot include /nowhere/x: no such file or directory"),
        ('include "HERE/smtpd.conf"\n', "includes are nested more than 16 deep"),
        ("table t $missing\n", "macro missing is not defined"),
        ("match from src <t> for any action a\n", "table t is used but not defined"),
        ('include "HERE"\n', "is a directory"),
    ],
)
def test_problem_has_its_place(read, text, problem):
    ((where, what),) = read(text).problems
    assert (where.endswith("/smtpd.conf:1"), problem in what) == (True, True)


@pytest.mark.parametrize(
    "text", ["", "}", "{", '"', "'open", "<", "table", "table t", "= = =", "\\", "$", "\x00\xff", "<t"]
)
def test_broken_file_is_read_without_an_error(read, text):
    assert read(text).tables == {}


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        smtpdconf.read(str(tmp_path / "none"))
