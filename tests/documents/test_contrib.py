"""The examples under contrib/ work as documented: smtpd.conf, for Terraform, and from an LDAP server."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import hcl2
import pytest

from tests.dialogue import converse, open_tables, write_config, write_source
from tests.documents.document import CONTRIB, smtpd_check

# ---- contrib/smtpd.conf.example ----


@pytest.mark.real
@pytest.mark.parametrize("through", ["consul", "procexec"])
@pytest.mark.parametrize("release", ["6.8", "7.4", "7.6", "7.9"])
def test_smtpd_accepts_the_example(release, through):
    text = (CONTRIB / "smtpd.conf.example").read_text()
    if through == "procexec":
        text = text.replace("table mail     consul", "#", 1).replace("#table mail procexec:", "table mail procexec:")
        assert "\ntable mail procexec:/" in text
    assert smtpd_check(release, text) == "configuration OK\n"


def test_listeners_of_the_example_do_not_share_a_port():
    """`smtpd -n` accepts an address beside 0.0.0.0, but smtpd exits on Linux: listen: Address already in use."""
    text = (CONTRIB / "smtpd.conf.example").read_text()
    ports = re.findall(r"^listen on \S+(?: port (\d+))?", text, re.MULTILINE)
    assert sorted(port or "25" for port in ports) == ["25", "587"]


# ---- contrib/terraform ----

# From the documentation of the provider (registry.terraform.io/providers/hashicorp/consul, version 2.21).
ARGUMENTS = {
    "consul_key_prefix": {"path_prefix", "subkeys", "subkey", "datacenter", "namespace", "partition"},
    "consul_keys": {"key", "datacenter", "namespace", "partition"},
    "consul_acl_policy": {"name", "description", "rules", "datacenters", "namespace", "partition"},
    "consul_acl_token": {"accessor_id", "description", "policies", "roles", "local", "expiration_time", "for_each"},
}


def unquoted(tree):
    """The parsed value with unquoted strings and without the marks of the parser."""
    if isinstance(tree, dict):
        return {unquoted(key): unquoted(value) for key, value in tree.items() if not key.startswith("__")}
    if isinstance(tree, list):
        return [unquoted(each) for each in tree]
    return json.loads(tree) if isinstance(tree, str) and tree.startswith('"') else tree


@pytest.fixture
def terraform():
    return unquoted(hcl2.loads((CONTRIB / "terraform/main.tf").read_text()))


def resources(terraform):
    return [
        (kind, name, body)
        for each in terraform["resource"]
        for kind, named in each.items()
        for name, body in named.items()
    ]


def test_terraform_uses_only_attributes_of_the_provider(terraform):
    assert {kind for kind, _, _ in resources(terraform)} == set(ARGUMENTS)
    assert [(kind, key) for kind, _, body in resources(terraform) for key in body if key not in ARGUMENTS[kind]] == []
    keys = [key for kind, _, body in resources(terraform) if kind == "consul_keys" for key in body["key"]]
    assert [key for key in keys if set(key) - {"path", "value", "delete", "flags"}] == []


def test_tables_answer_with_the_values_of_terraform(terraform, tmp_path):
    entries = {}
    for kind, _, body in resources(terraform):
        if kind == "consul_key_prefix":
            entries |= {body["path_prefix"] + key: value.encode() for key, value in body["subkeys"].items()}
        elif kind == "consul_keys":
            entries |= {key["path"]: key["value"].encode() for key in body["key"] if "${" not in key["value"]}
    sources = open_tables(write_config(tmp_path, address=f"file://{write_source(tmp_path, entries)}"))
    said = [
        "table|0.1|0|mail|check|1|domain|mail.example.org",
        "table|0.1|0|mail|lookup|2|alias|postmaster",
        "table|0.1|0|mail|lookup|3|alias|root",
    ]
    answered = converse(sources, [f"{line}\n".encode() for line in said]).decode().splitlines()
    assert answered == [
        "table-response|1|found",
        "table-response|2|found|root",
        "table-response|3|found|gilles, eric@example.org",
    ]


def test_files_that_terraform_reads_exist(terraform):
    named = re.findall(r'file\("\$\{path\.module\}/([^"]+)"\)', (CONTRIB / "terraform/main.tf").read_text())
    assert named
    assert [name for name in named if not (CONTRIB / "terraform" / name).exists()] == []


# ---- contrib/ldif-to-lines.py ----


def lines_of(ldif, template):
    done = subprocess.run(
        [sys.executable, str(CONTRIB / "ldif-to-lines.py"), template],
        input=ldif,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


LDIF = """\
version: 1

# a comment
dn: uid=gilles,dc=example,dc=org
uid: gilles
mail: gilles@example.org
mail: postmaster@example.org
cn:: R2lsbGVzIMOJLg==
description: folded h
 ere

dn: uid=eric,dc=example,dc=org
uid: eric
"""


def test_ldif_becomes_a_line_for_each_value_of_the_first_attribute():
    assert lines_of(LDIF, "{mail}: {uid}") == (
        0,
        "gilles@example.org: gilles\npostmaster@example.org: gilles\n",
        "uid=eric,dc=example,dc=org: no mail\n",
    )


def test_ldif_attributes_are_decoded_unfolded_and_become_lists():
    assert lines_of(LDIF.replace("\n", "\r\n"), "{uid} {mail} {cn} {description}")[1] == (
        "gilles gilles@example.org, postmaster@example.org Gilles É. folded here\n"
    )


def test_ldif_script_without_a_template_prints_its_usage():
    status, said, told = lines_of(LDIF, "nothing")
    assert (status, said) == (2, "")
    assert "table-consulctl import" in told
