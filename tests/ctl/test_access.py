"""Keys that the token may not read, in `lint` and `policy --check`, with a real Consul and with fakes."""

from __future__ import annotations

import json

import pytest

from tests.consul.real import agent_or_skip
from tests.control import control
from tests.fake_consul import FakeConsul
from tests.rig.consul import consul_version

STORE = {
    "t/alias/root": "gilles",
    "t/alias/vip": "eric",
    "t/alias/u%20x": "joerg",
    "t/domain/example.org": "",
    "t/string/a": "b",
}
READ = 'key_prefix "t/" { policy = "read" }\n'
DENY = READ + 'key "t/alias/vip" { policy = "deny" }\nkey "t/alias/later" { policy = "deny" }\n'
LISTER = 'key_prefix "t/" { policy = "read" }'
AUDITOR = 'acl = "read"'
LAYOUT = '[tables.t]\nservices = ["alias", "domain", "string"]\n'


def config(folder, address, token, more=""):
    path = folder / "c.toml"
    (folder / "token").write_text(token)
    path.write_text(f'[consul]\naddress = "{address}"\ntoken_file = "{folder}/token"\n{LAYOUT}{more}')
    return path


@pytest.fixture
def guarded(consul_with_acl):
    consul_with_acl.kv_txn(STORE)
    return consul_with_acl


@pytest.fixture
def run(guarded, tmp_path):
    """Runs a command with a token of these rules in the configuration and an optional one in the environment."""

    def run(rules, *command, operator=None, more=""):
        path = config(tmp_path, f"http://{guarded.address}", guarded.token(rules), more)
        environ = {"CONSUL_HTTP_TOKEN": operator} if operator else {}
        return control("-c", path, *command, **environ)

    return run


def places(done):
    return [line.partition(": ")[0] for line in done.text.splitlines()]


def test_token_with_all_permissions_has_no_problem(guarded, run):
    for operator in (None, guarded.token(LISTER), guarded.management_token):
        done = run(READ, "policy", "--check", operator=operator)
        assert (done.status, done.text) == (0, ""), done.said
        assert done.said.startswith("checked: 3 folders, 5 keys, " if operator else "checked: 3 folders, 0 keys, ")


def test_denied_key_is_found_with_a_token_that_lists_keys_or_reads_policies(guarded, run):
    for rules, keys in ((LISTER, ["t/alias/vip"]), (AUDITOR, ["t/alias/later", "t/alias/vip"])):
        done = run(DENY, "policy", "--check", operator=guarded.token(rules))
        assert (done.status, places(done)) == (1, keys), done.said
        assert "may not read this key" in done.text
    done = run(DENY, "policy", "--check", operator=guarded.management_token)
    assert (done.status, places(done)) == (1, ["t/alias/later", "t/alias/vip"])
    assert "3 folders, 5 keys, 1 policy (test-" in done.said


def test_denied_key_is_found_in_the_policies_of_a_role_and_in_json(guarded, run, tmp_path):
    rules = {"key_prefix": {"t/": {"policy": "read"}, "t/alias/v": {"policy": "deny"}}}
    policy = guarded.request(
        "PUT", "/v1/acl/policy", json.dumps({"Name": "narrow", "Rules": json.dumps(rules)}).encode()
    )
    try:
        role = {"Name": "mail", "Policies": [{"Name": "narrow"}]}
        role = guarded.request("PUT", "/v1/acl/role", json.dumps(role).encode())
        made = guarded.request("PUT", "/v1/acl/token", json.dumps({"Roles": [{"Name": "mail"}]}).encode())
        path = config(tmp_path, f"http://{guarded.address}", made["SecretID"])
        done = control("-c", path, "policy", "--check", CONSUL_HTTP_TOKEN=guarded.token(AUDITOR))
        assert (done.status, places(done), "1 policy (narrow)" in done.said) == (1, ["t/alias/v"], True)
        guarded.request("DELETE", f"/v1/acl/role/{role['ID']}")
    finally:
        guarded.request("DELETE", f"/v1/acl/policy/{policy['ID']}")


def test_token_of_the_daemon_finds_the_folder_of_a_denied_key_where_consul_reports_it(run):
    done = run(DENY, "policy", "--check")
    reported = consul_version() >= (1, 11)
    assert (done.status, places(done)) == ((1, ["t/alias/"]) if reported else (0, [])), done.said
    assert ("Consul hides keys of this folder" in done.text) is reported


def test_token_without_the_rule_list_is_found_where_consul_requires_it(tmp_path):
    hcl = 'acl { enabled = true\n default_policy = "deny"\n enable_key_list_policy = true }\n'
    with agent_or_skip(hcl=hcl) as agent:
        agent.management_token = agent.bootstrap()
        agent.kv_txn(STORE)
        path = config(tmp_path, f"http://{agent.address}", agent.token(DENY))
        done = control("-c", path, "policy", "--check")
        assert (done.status, places(done)) == (1, ["t/alias/", "t/domain/", "t/string/"]), done.said
        assert done.text.count("may not list this folder") == 3
        path = config(tmp_path, f"http://{agent.address}", agent.token(READ.replace("read", "list")))
        done = control("-c", path, "policy", "--check")
        assert (done.status, done.text) == (0, ""), done.said


def test_forbidden_folder_is_found_with_any_token(run):
    done = run(READ + 'key_prefix "t/domain/" { policy = "deny" }', "policy", "--check")
    assert (done.status, places(done), "may not read this folder" in done.text) == (1, ["t/domain/"], True)


@pytest.mark.parametrize("mode", ["mirror", "direct"])
def test_lint_names_a_denied_key_and_checks_the_others(guarded, run, mode):
    done = run(DENY, "lint", operator=guarded.token(LISTER), more=f'mode = "{mode}"\n')
    assert (done.status, places(done)) == (2, ["t/alias/vip", "t/alias/u%20x"]), done.said
    assert "4 entries, 2 problems (Consul at" in done.said
    assert "; not checked in full: the token may not read all of t/alias/vip" in done.said
    document = json.loads(
        run(DENY, "lint", "--json", operator=guarded.management_token, more=f'mode = "{mode}"\n').text
    )
    (table,) = document["tables"]
    assert (table["entries"], len(table["problems"])) == (4, 3)
    assert table["error"] == "not checked in full: the token may not read all of t/alias/later, t/alias/vip"


def test_lint_checks_the_services_beside_a_forbidden_folder(run):
    for mode in ("mirror", "direct"):
        rules = READ + 'key_prefix "t/domain/" { policy = "deny" }'
        done = run(rules, "lint", more=f'mode = "{mode}"\n')
        assert (done.status, places(done)) == (2, ["t/domain/", "t/alias/u%20x"]), done.said
        assert "may not read all of t/domain/" in done.said


def test_many_keys_are_checked_in_several_requests(guarded, run):
    guarded.kv_txn({f"t/string/{number:03}": "x" for number in range(200)})
    denied = [f"t/string/{number:03}" for number in (0, 63, 64, 199)]
    rules = READ + "\n".join(f'key "{key}" {{ policy = "deny" }}' for key in denied)
    done = run(rules, "policy", "--check", operator=guarded.token(LISTER))
    assert (places(done), "205 keys" in done.said) == (denied, True)
    done = run(rules, "lint", operator=guarded.token(LISTER))
    assert (done.status, sorted({*denied} - {*places(done)})) == (2, [])
    assert "may not read all of t/string/000, t/string/063, t/string/064, 1 more" in done.said


def test_consul_without_acls_has_no_problem(consul, tmp_path):
    consul.kv_txn(STORE)
    path = tmp_path / "c.toml"
    path.write_text(f'[consul]\naddress = "http://{consul.address}"\n{LAYOUT}')
    done = control("-c", path, "policy", "--check", CONSUL_HTTP_TOKEN="x")
    assert (done.status, done.text) == (0, ""), done.said


# A fake, which reports hidden keys but has no endpoints for tokens and policies.


@pytest.fixture
def flagged(tmp_path):
    """Runs a command against a fake of this version that denies one key to the configured token."""

    def run(version, *command, mode="mirror"):
        with FakeConsul(version=version) as fake:
            for key, value in STORE.items():
                fake.put(key.encode(), value.encode())
            fake.tokens["T"] = DENY
            path = config(tmp_path, fake.address, "T", f'mode = "{mode}"\n')
            return control("-c", path, *command)

    return run


@pytest.mark.parametrize("mode", ["mirror", "direct"])
@pytest.mark.parametrize("version", ["1.21.5", "1.22", "1.22.4"])
def test_lint_names_the_folder_where_consul_hides_keys(flagged, version, mode):
    if version == "1.21.5" and mode == "direct":
        version = "1.22"  # 1.21.5 refuses the names of these keys
    done = flagged(version, "lint", mode=mode)
    assert (done.status, places(done)[0]) == (2, "t/alias/"), done.said
    assert "no problems" not in done.said
    assert "not checked in full: the token may not read all of t/alias/" in done.said


@pytest.mark.parametrize("version", ["1.21.5", "1.22", "1.22.4"])
def test_export_and_import_refuse_a_folder_where_consul_hides_keys(flagged, tmp_path, version):
    lines = tmp_path / "lines"
    lines.write_text("root: eric\n")
    for command in (
        ["export", "t", "alias"],
        ["export", "t", "alias", "--format", "export"],
        ["import", "t", "alias", lines],
    ):
        done = flagged(version, *command)
        assert (done.status, done.text, "hides keys under t/alias/" in done.said) == (2, "", True), done
    assert flagged(version, "export", "t", "string") == (0, b"a\tb\n", b"")


def test_import_does_not_overwrite_a_key_that_consul_before_1_11_hides(flagged, tmp_path):
    lines = tmp_path / "lines"
    lines.write_text("vip: robert\n")
    assert flagged("1.8.7", "export", "t", "alias").text == "root:\tgilles\nu%20x:\tjoerg\n"
    done = flagged("1.8.7", "import", "t", "alias", lines)
    assert done.status == 2, done
    assert "0 of 1 key written" in done.said


def test_policy_check_accepts_no_other_option(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(LAYOUT)
    for option in ("--write", "--list", "--json"):
        done = control("-c", path, "policy", "--check", option)
        assert (done.status, "cannot be combined with other options" in done.said) == (2, True)


def test_policy_check_without_consul_is_an_error(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(f'[consul]\naddress = "http://127.0.0.1:1"\n{LAYOUT}')
    done = control("-c", path, "policy", "--check")
    assert (done.status, "127.0.0.1:1" in done.said) == (2, True)
