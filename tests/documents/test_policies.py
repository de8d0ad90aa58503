"""The policies of contrib/policies grant exactly the documented permissions, with a real Consul and the program."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.dialogue import Child, eventually, write_config
from tests.documents.document import CONTRIB, CONTROL
from tests.rig.consul import ConsulError

FILES = sorted((CONTRIB / "policies").glob("*.hcl"))
TABLES = re.findall(r"^table (\S+) ", (CONTRIB / "smtpd.conf.example").read_text(), re.MULTILINE)
# One entry in each of these tables, and a question that it answers.
ENTRIES = {
    "mail/alias/root": ("gilles", "lookup|alias|1|root", "found|gilles"),
    "mail/domain/example.org": ("", "check|domain|1|example.org", "found"),
    "virtuals/alias/@example.org": ("eric", "lookup|alias|1|@example.org", "found|eric"),
    "mail/credentials/gilles": ("$6$salt$hash", "lookup|credentials|1|gilles", "found|$6$salt$hash"),
    "mail/mailaddrmap/gilles": ("@example.org", "lookup|mailaddrmap|1|gilles", "found|@example.org"),
    "secrets/credentials/smarthost": ("me:secret", "lookup|credentials|1|smarthost", "found|me:secret"),
    "mail/source/192.0.2.25": ("", "fetch|source|1", "found|192.0.2.25"),
    "mail/addrname/192.0.2.25": ("mail.example.org", "lookup|addrname|1|192.0.2.25", "found|mail.example.org"),
    "mail/netaddr/203.0.113.0/24": ("", "check|netaddr|1|203.0.113.9", "found"),
}


def rules(name):
    return (CONTRIB / "policies" / f"{name}.hcl").read_text()


def prefixes(text):
    return re.findall(r'^key_prefix "(.*)" \{$', text, re.MULTILINE)


def answers(consul, token, folder):
    """The answers of the program to each question with this token."""
    path = folder / "token"
    path.write_text(token)
    more = f'[log]\ntarget = "stderr"\n[consul]\naddress = "http://{consul.address}"\ntoken_file = "{path}"\n'
    config = folder / "table-consul.toml"
    config.write_text(more)
    found = {}
    for key, (_, question, _) in ENTRIES.items():
        table = key.partition("/")[0]
        with Child(str(config)) as child:
            child.handshake(table.encode())
            said = child.ask(f"table|0.1|0|{table}|{question}".encode()).decode()
            found[key] = said.split("|", 2)[2]
            child.end()
    return found


def fill(consul):
    for key, (value, _, _) in ENTRIES.items():
        consul.kv_put(key, value)
    consul.kv_put("mail-of-another-system/credentials/root", "secret")


EXPECTED = {key: answer for key, (_, _, answer) in ENTRIES.items()}


def test_entries_here_cover_every_table_of_the_example():
    assert {key.partition("/")[0] for key in ENTRIES} == {*TABLES}


@pytest.mark.parametrize("name", ["table-consul", "table-consul-list", "postmaster"])
def test_each_table_of_the_example_has_its_block(name):
    assert prefixes(rules(name)) == [f"{table}/" for table in TABLES]


@pytest.mark.parametrize(
    ("name", "option"), [("table-consul", None), ("table-consul-list", "--list"), ("postmaster", "--write")]
)
def test_file_grants_what_the_command_would_write(name, option, tmp_path):
    (tmp_path / "table-consul.toml").write_text("")
    made = subprocess.run(
        [
            *CONTROL,
            *("-c", str(tmp_path / "table-consul.toml"), "policy", *TABLES, *([option] if option else [])),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    grants = re.compile(r'^(key(?:_prefix)?) "(.*)" \{\n  policy = "(.*)"\n\}$', re.MULTILINE)
    assert sorted(grants.findall(made)) == sorted(grants.findall(rules(name)))


def test_every_policy_ends_its_folders_with_a_slash():
    assert [(path.name, each) for path in FILES for each in prefixes(path.read_text()) if not each.endswith("/")] == []


def test_policy_of_mail_servers_serves_every_table(consul_with_acl, tmp_path):
    fill(consul_with_acl)
    assert answers(consul_with_acl, consul_with_acl.token(rules("table-consul")), tmp_path) == EXPECTED


@pytest.mark.parametrize("name", ["table-consul", "table-consul-list", "postmaster", "helpdesk"])
def test_no_policy_reaches_beyond_its_tables(consul_with_acl, name):
    fill(consul_with_acl)
    token = consul_with_acl.token(rules(name))
    for method, body in (("GET", None), ("PUT", b"mine")):
        with pytest.raises(ConsulError) as refused:
            consul_with_acl.request(method, "/v1/kv/mail-of-another-system/credentials/root", body, token=token)
        assert refused.value.status == 403


@pytest.mark.parametrize("name", ["table-consul", "table-consul-list"])
def test_mail_servers_may_write_nothing(consul_with_acl, name):
    token = consul_with_acl.token(rules(name))
    for key in ENTRIES:
        with pytest.raises(ConsulError) as refused:
            consul_with_acl.request("PUT", f"/v1/kv/{key}", b"mine", token=token)
        assert refused.value.status == 403


def test_policy_with_list_serves_every_table_where_lists_need_it(consul_with_list_policy, tmp_path):
    fill(consul_with_list_policy)
    token = consul_with_list_policy.token(rules("table-consul-list"))
    assert answers(consul_with_list_policy, token, tmp_path) == EXPECTED


def test_policy_without_list_is_an_error_where_lists_need_it(consul_with_list_policy, tmp_path):
    fill(consul_with_list_policy)
    token = consul_with_list_policy.token(rules("table-consul"))
    found = answers(consul_with_list_policy, token, tmp_path)
    assert {answer.partition("|")[0] for answer in found.values()} == {"error"}


def test_postmaster_may_put_and_delete_in_every_table(consul_with_acl):
    token = consul_with_acl.token(rules("postmaster"))
    for key in ENTRIES:
        assert consul_with_acl.request("PUT", f"/v1/kv/{key}", b"mine", token=token) is True
        assert consul_with_acl.request("DELETE", f"/v1/kv/{key}", token=token) is True


def test_help_desk_edits_aliases_and_sees_no_hash(consul_with_acl):
    fill(consul_with_acl)
    token = consul_with_acl.token(rules("helpdesk"))
    for key in ("mail/alias/root", "virtuals/alias/@example.org"):
        assert consul_with_acl.request("PUT", f"/v1/kv/{key}", b"eric", token=token) is True
    assert consul_with_acl.request("GET", "/v1/kv/mail/domain/?keys", token=token) == ["mail/domain/example.org"]
    listed = consul_with_acl.request("GET", "/v1/kv/?keys", token=token)
    assert sorted({key.rpartition("/")[0] for key in listed}) == ["mail/alias", "mail/domain", "virtuals/alias"]
    for key in ("mail/credentials/gilles", "secrets/credentials/smarthost"):
        with pytest.raises(ConsulError) as refused:
            consul_with_acl.request("GET", f"/v1/kv/{key}", token=token)
        assert refused.value.status == 403


def test_mail_servers_answer_with_the_edit_of_the_help_desk(consul_with_acl, tmp_path):
    fill(consul_with_acl)
    desk, server = (consul_with_acl.token(rules(name)) for name in ("helpdesk", "table-consul"))
    (tmp_path / "token").write_text(server)
    config = write_config(tmp_path, address=f'http://{consul_with_acl.address}"\ntoken_file = "{tmp_path}/token')
    with Child(str(config)) as child:
        child.handshake(b"mail")
        question = b"table|0.1|0|mail|lookup|alias|1|root"
        assert child.ask(question) == b"lookup-result|1|found|gilles"
        consul_with_acl.request("PUT", "/v1/kv/mail/alias/root", b"eric", token=desk)
        for _ in eventually("the edit is in the answer"):
            if child.ask(question) == b"lookup-result|1|found|eric":
                break
