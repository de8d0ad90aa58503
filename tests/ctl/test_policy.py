"""`table-consulctl policy`: the daemon needs every rule and no more."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from table_consul.ctl.policy import read_folders
from table_consul.protocol import Request
from table_consul.services import SERVICES, Table
from tests.control import control
from tests.dialogue import Child, open_tables
from tests.fake_consul import FakeConsul
from tests.rig.consul import ConsulError, consul_binary

BLOCK = re.compile(r'key_prefix "(.*)" \{\n\s*policy = "(\w+)"\n\s*\}')


@pytest.fixture
def policy(tmp_path):
    """Runs policy with this configuration."""

    def run(text="", *arguments, **environ):
        path = tmp_path / "policy.toml"
        path.write_text(text)
        return control("-c", path, "policy", *arguments, **environ)

    return run


def blocks(done):
    assert (done.status, done.said) == (0, "")
    return BLOCK.findall(done.text)


@pytest.mark.parametrize(
    ("text", "folders"),
    [
        ("[tables.consul]", ["consul/"]),
        ('[defaults]\nprefix = "mail"\n[tables.aliases]', ["mail/aliases/"]),
        ("[tables.b]\n[tables.a]", ["a/", "b/"]),
        ('[tables.a]\npaths = { alias = "people/x" }', ["a/", "people/x/"]),
        ('[tables.a]\npaths = { alias = "a/people" }', ["a/"]),
        ('[tables.a]\nservices = ["alias"]\npaths = { alias = "people" }', ["people/"]),
        ('[tables.a]\n[tables.b]\npaths = { alias = "a/alias" }', ["a/", "b/"]),
        ('[tables.a]\nmode = "direct"\nservices = ["alias", "domain"]', ["a/alias/", "a/domain/"]),
        ('[tables.a]\nmode = "direct"\nservices = ["auth"]', ["a/auth/", "a/credentials/"]),
        ('[tables.a]\nservices = ["auth"]\npaths = { auth = "x", credentials = "y" }', ["x/", "y/"]),
        ('[tables.a]\n[tables.b]\nmode = "direct"\nservices = ["alias"]\nprefix = "a"', ["a/"]),
        ("[tables.a]\n[tables.aa]", ["a/", "aa/"]),
    ],
)
def test_each_folder_has_one_rule_and_nested_folders_have_none(policy, text, folders):
    assert blocks(policy(text)) == [(folder, "read") for folder in folders]


def test_tables_without_a_section_are_named(policy):
    assert blocks(policy("[tables.a]", "c", "b", "c")) == [("b/", "read"), ("c/", "read")]


def test_options_select_the_policy_level(policy):
    assert [blocks(policy("", "consul", *more)) for more in ([], ["--list"], ["--write"], ["--list", "--write"])] == [
        [("consul/", level)] for level in ("read", "list", "write", "write")
    ]


def test_comment_names_the_purpose(policy):
    assert policy("", "a", "b").text.startswith("# Answer for the tables of table-consul: a, b\n")


def test_namespace_and_partition_enclose_the_rules(policy):
    text = '[consul]\nnamespace = "team"\npartition = "part"\n[tables.a]'
    assert policy(text).text.splitlines()[1:] == [
        'partition "part" {',
        '  namespace "team" {',
        '    key_prefix "a/" {',
        '      policy = "read"',
        "    }",
        "  }",
        "}",
    ]
    rules = {"key_prefix": {"a/": {"policy": "read"}}}
    assert json.loads(policy(text, "--json").text) == {"partition": {"part": {"namespace": {"team": rules}}}}
    assert 'namespace "env" {' in policy("[tables.a]", CONSUL_NAMESPACE="env").text


def test_file_address_needs_no_policy(policy):
    done = policy('[consul]\naddress = "file:///tmp/x.json"')
    assert (done.status, done.text, "requires no policy" in done.said) == (2, "", True)


NAMES = st.sampled_from(["alias", "domain", "userinfo", "source", "auth", "credentials"])
PATHS = st.sampled_from(["people", "mail/t/people", "mail/t", "mail", "other/x", "t"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    services=st.lists(NAMES, min_size=1, max_size=4, unique=True),
    paths=st.dictionaries(NAMES, PATHS, max_size=2),
    mode=st.sampled_from(["mirror", "direct"]),
)
def test_rules_cover_every_read_of_the_daemon_and_each_is_needed(tmp_path, services, paths, mode):
    table = Table("t", "mail", services=tuple(name for name in SERVICES if name in services), paths=paths, mode=mode)
    folders = read_folders([table])
    path = tmp_path / "c.toml"
    with FakeConsul() as fake:
        own = json.dumps({"prefix": "mail", "mode": mode, "services": services})
        lines = [f"{key} = {json.dumps(value)}" for key, value in json.loads(own).items()]
        lines.append(f"paths = {{ {', '.join(f'{name} = {json.dumps(at)}' for name, at in paths.items())} }}")
        path.write_text(f'[consul]\naddress = "{fake.address}"\n[tables.t]\n' + "\n".join(lines))
        sources = open_tables(path)
        assert sources.table("t") == table
        for name in table.services:
            for op in ["check"] if name == "auth" else ["check", "lookup", "fetch"]:
                sources.answer(Request(op, b"1", "t", name, b"vera:secret"), time.monotonic())
        sources.close()
        read = [request.key.decode() for request in fake.requests]
    assert [key for key in read if not key.startswith(tuple(folders))] == []
    assert [folder for folder in folders if not any(key.startswith(folder) for key in read)] == []


# ---- a real Consul with ACLs ----

STORE = {
    "mail/t/alias/root": "gilles",
    "mail/t/domain/*.example.org": "",
    "mail/t/source/192.0.2.25": "",
    "people/vera": "1000:1000:/home/vera",
    "mail/other/alias/root": "outside",
    "mail/tt/alias/root": "outside",
    "people2/vera": "outside",
}
QUESTIONS = {
    b"lookup|alias|1|root": b"found|gilles",
    b"lookup|alias|2|nobody": b"not-found",
    b"lookup|domain|3|mail.example.org": b"found|*.example.org",
    b"check|domain|4|example.org": b"not-found",
    b"fetch|source|5": b"found|192.0.2.25",
    b"lookup|userinfo|6|vera": b"found|1000:1000:/home/vera",
    b"lookup|userinfo|7|eric": b"not-found",
}
LAYOUT = """
[tables.t]
prefix = "mail"
services = ["alias", "domain", "source", "userinfo"]
paths = { userinfo = "people" }
"""


def conf_of(folder, agent, token, layout):
    path = folder / "real.toml"
    (folder / "token").write_text(token)
    connection = f'[consul]\naddress = "http://{agent.address}"\ntoken_file = "{folder}/token"\n'
    path.write_text(f'{connection}{layout}[log]\nlevel = "error"\ntarget = "stderr"\n')
    return path


def daemon_replies(folder, agent, token, layout, questions=QUESTIONS):
    with Child(str(conf_of(folder, agent, token, layout))) as child:
        child.handshake(b"t")
        said = [child.ask(b"table|0.1|0|t|" + question).split(b"|", 2)[2] for question in questions]
        child.end()
    return said


@pytest.fixture
def guarded(consul_with_acl):
    consul_with_acl.kv_txn(STORE)
    return consul_with_acl


@pytest.mark.parametrize("mode", ["mirror", "direct"])
@pytest.mark.parametrize("more", [[], ["--json"], ["--list"], ["--write"]])
def test_token_with_this_policy_answers_every_request_and_reads_no_other_key(guarded, policy, tmp_path, mode, more):
    layout = LAYOUT + f'mode = "{mode}"\n'
    token = guarded.token(policy(layout, *more).text)
    assert daemon_replies(tmp_path, guarded, token, layout) == [*QUESTIONS.values()]
    for outside in ("mail/other/alias/root", "mail/tt/alias/root", "people2/vera", "mail/t", "x"):
        with pytest.raises(ConsulError) as refused:
            guarded.request("GET", f"/v1/kv/{outside}", token=token)
        assert refused.value.status == 403
    listed = guarded.request("GET", "/v1/kv/?keys", token=token)
    assert sorted(listed) == sorted(key for key in STORE if "outside" not in STORE[key])


@pytest.mark.parametrize("mode", ["mirror", "direct"])
def test_missing_rule_causes_an_error(guarded, policy, tmp_path, mode):
    layout = LAYOUT + f'mode = "{mode}"\n'
    rules = BLOCK.findall(policy(layout).text)
    assert len(rules) == (2 if mode == "mirror" else 4)
    for left_out in rules:
        token = guarded.token(
            "\n".join(f'key_prefix "{at}" {{ policy = "{how}" }}' for at, how in rules if at != left_out[0])
        )
        said = daemon_replies(tmp_path, guarded, token, layout)
        assert any(answer.startswith(b"error") for answer in said), left_out
        assert not any(
            answer == b"not-found" != wanted for answer, wanted in zip(said, QUESTIONS.values(), strict=True)
        )


def test_list_policy_needs_list_instead_of_read(consul_with_list_policy, policy, tmp_path):
    agent = consul_with_list_policy
    agent.kv_txn(STORE)
    said = {}
    for name, more in (("read", []), ("list", ["--list"]), ("write", ["--write"])):
        said[name] = daemon_replies(tmp_path, agent, agent.token(policy(LAYOUT, *more).text), LAYOUT)
    assert said["list"] == said["write"] == [*QUESTIONS.values()]
    assert all(answer.startswith(b"error") for answer in said["read"])


def put(agent, token, key):
    operation = {"KV": {"Verb": "cas", "Index": 0, "Key": key, "Value": base64.b64encode(b"new").decode()}}
    return agent.request("PUT", "/v1/txn", json.dumps([operation]).encode(), token=token)


def test_import_needs_write_and_not_read(guarded, policy):
    reader = guarded.token(policy(LAYOUT).text)
    writer = guarded.token(policy(LAYOUT, "--write").text)
    assert put(guarded, writer, "mail/t/alias/new")["Errors"] is None
    assert put(guarded, writer, "people/new")["Errors"] is None
    for token, key in ((reader, "mail/t/alias/other"), (writer, "mail/tt/alias/new"), (writer, "people2/new")):
        with pytest.raises(ConsulError) as refused:
            put(guarded, token, key)
        assert "ermission denied" in str(refused.value)


@pytest.mark.parametrize("mode", ["mirror", "direct"])
def test_import_is_refused_without_write(guarded, policy, tmp_path, mode):
    layout = LAYOUT + f'mode = "{mode}"\n'
    aliases = tmp_path / "aliases"
    aliases.write_text("root: vera\npostmaster: root\n")
    for more, status, value in (([], 2, b"gilles"), (["--write"], 0, b"vera")):
        conf = conf_of(tmp_path, guarded, guarded.token(policy(layout, *more).text), layout)
        done = control("-c", conf, "import", "t", "alias", aliases)
        assert (done.status, guarded.kv_get("mail/t/alias/root")) == (status, value), done.said


def test_query_and_lint_need_no_more_than_the_daemon(guarded, policy, tmp_path):
    for mode in ("mirror", "direct"):
        layout = LAYOUT + f'mode = "{mode}"\n'
        conf = conf_of(tmp_path, guarded, guarded.token(policy(layout).text), layout)
        assert control("-c", conf, "query", "t", "alias", "root") == (0, b"gilles\n", b"")
        done = control("-c", conf, "lint")
        assert (done.status, done.text, "4 entries, no problems" in done.said) == (0, "", True)
        conf = conf_of(tmp_path, guarded, guarded.token('key_prefix "people/" { policy = "read" }'), layout)
        assert [control("-c", conf, *asked).status for asked in (["query", "t", "alias", "root"], ["lint"])] == [2, 2]


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_consul_reads_unusual_names_unchanged(guarded, policy, tmp_path, more):
    for number, odd in enumerate(['x"y', "a\\\\nb", "$y${z}", "${", "gr\u00fc\u00dfe", "%{a}", "#'"]):
        layout = f"[tables.t]\nservices = ['alias']\npaths = {{ alias = {json.dumps(odd)} }}\n"
        guarded.kv_txn({f"{odd}/root": "vera", f"{odd}{number}/root": "outside"})
        token = guarded.token(policy(layout, *more).text)
        conf = conf_of(tmp_path, guarded, token, layout)
        assert control("-c", conf, "query", "t", "alias", "root") == (0, b"vera\n", b"")
        assert guarded.request("GET", "/v1/kv/?keys", token=token) == [f"{odd}/root"]


def test_consul_command_reads_the_policy_from_standard_input(guarded, policy):
    """The pipeline in the help text."""
    done = subprocess.run(
        [consul_binary(), "acl", "policy", "create", "-name", "from-help", "-rules", "-"],
        input=policy(LAYOUT).out,
        env={"CONSUL_HTTP_ADDR": guarded.address, "CONSUL_HTTP_TOKEN": guarded.management_token},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b'key_prefix "mail/t/"' in done.stdout
