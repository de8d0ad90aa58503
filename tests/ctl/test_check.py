"""`table-consulctl check`: every fault between smtpd and Consul, with a stand-in for smtpd."""

from __future__ import annotations

import json
import os

import pytest

from table_consul import __version__
from table_consul.ctl import smtpdconf
from tests.control import control
from tests.ctl.hosts import CONF, program
from tests.fake_consul import Answer, FakeConsul
from tests.smtpd.configuration import HINT


def check(host, *arguments, address, more="", **environ):
    (host / "c.toml").write_text(f'[consul]\naddress = "{address}"\n{more}')
    done = control("-c", host / "c.toml", "check", *arguments, **environ)
    if "--json" not in arguments:
        assert [line for line in done.text.splitlines() if not HINT.search(line)] == []
    return done


@pytest.fixture
def filled(consul):
    consul.kv_txn({"aliases/alias/root": "gilles", "aliases/domain/example.org": ""})
    return f"http://{consul.address}"


def test_host_without_problems_is_status_0_with_a_summary(host, filled):
    done = check(host, address=filled)
    assert (done.status, done.text) == (0, ""), done.text
    for what in ("smtpd.conf (1 table)", "libexec/table-consul\n", "c.toml, as user", "Consul 1", f" at {filled}"):
        assert what in done.said


def test_table_without_the_folder_that_smtpd_looks_up_is_reported(host, filled, consul):
    consul.kv_delete("aliases/domain/example.org")
    done = check(host, address=filled)
    assert (done.status, done.text.count("\n")) == (1, 1)
    assert done.text.startswith(
        f"aliases/domain/: smtpd looks up domain here ({host}/smtpd.conf:3), but this folder has no keys"
    )


@pytest.mark.parametrize(
    ("conf", "more", "arguments", "problem"),
    [
        (CONF + "table other consul\n", "", (), "smtpd.conf:4: table other is defined but never used"),
        ("listen on lo\n", "", (), "smtpd.conf: no table with the backend consul (add: table aliases consul)"),
        (CONF, "", ("aliases", "virtuals"), "smtpd.conf: table virtuals is not defined"),
        (CONF, '[defaults]\nservices = ["alias"]\n', (), "smtpd.conf:3: smtpd looks up domain in table aliases (add"),
        (CONF + "include /none\n", "", (), ""),
        (CONF + 'include "/none"\n', "", (), "smtpd.conf:4: cannot include /none: no such file or directory"),
        (CONF, 'token_file = "/none"\n', (), "c.toml: consul.token_file: /none: not found"),
        (CONF, "[defaults]\nmode = 1\n", (), "c.toml: defaults.mode: must be one of"),
    ],
)
def test_problem_of_a_file_is_a_line_with_its_place(host, filled, conf, more, arguments, problem):
    (host / "smtpd.conf").write_text(conf)
    done = check(host, *arguments, address=filled, more=more)
    assert (done.status >= 1 or not problem, f"{host}/{problem}" in done.text or not problem) == (True, True), done.text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("echo table-consul 0.0.1", f"is table-consul 0.0.1, but table-consulctl is {__version__} (run make install)"),
        ("echo no module >&2; exit 1", "cannot run it: no module (run make install)"),
    ],
)
def test_program_that_smtpd_cannot_start_is_reported(host, filled, text, problem):
    program(host, text)
    done = check(host, address=filled)
    assert (done.status, f"{host}/libexec/table-consul: " in done.text, problem in done.text) == (1, True, True), (
        done.text
    )


def test_python_that_smtpd_s_user_cannot_run_is_reported_with_the_remedy(host, filled):
    """`make install` as root writes root's own Python into the program, and installing it again changes nothing."""
    (host / "python").touch(mode=0o600)
    (host / "libexec/table-consul").write_text(f"#!{host}/python\n")
    done = check(host, address=filled)
    hint = "cannot run it: permission denied (run make install with a PYTHON that this user can run)"
    assert (done.status, hint in done.text) == (1, True), done.text


@pytest.mark.parametrize(
    ("smtpd", "status", "problem"),
    [
        ("libexec", 2, "cannot read it: is a directory (try: "),
        ("empty", 1, "smtpd: not found on this host, so the folder of its table programs is unknown"),
    ],
)
def test_smtpd_that_cannot_be_read_is_reported_beside_the_other_problems(
    host, filled, monkeypatch, smtpd, status, problem
):
    (host / "smtpd.conf").write_text(CONF + "table other consul\n")
    (host / "empty").touch()
    monkeypatch.setattr(smtpdconf, "program", lambda: f"{host}/{smtpd}")
    done = check(host, "--smtpd-conf", f"{host}/smtpd.conf", address=filled)
    assert (done.status, problem in done.text) == (status, True), done.text
    assert "table other is defined but never used" in done.text


def test_missing_program_is_reported_with_the_folder(host, filled):
    (host / "libexec" / "table-consul").unlink()
    done = check(host, address=filled)
    assert (done.status, f"not found (run make install LIBEXECDIR={host}/libexec)" in done.text) == (1, True)


def test_unreachable_consul_is_status_2_and_the_rest_is_still_checked(host):
    (host / "smtpd.conf").write_text(CONF + "table other consul\n")
    done = check(host, address="http://127.0.0.1:9")
    assert (done.status, "is defined but never used" in done.text) == (2, True)
    assert "Consul at http://127.0.0.1:9: connection refused (check that Consul runs there)" in done.text


def test_section_without_a_table_in_smtpd_conf_is_named_but_not_a_problem(host, filled):
    done = check(host, address=filled, more="[tables.alaises]\nallow_commands = true\n")
    assert (done.status, "checked: no table in smtpd.conf uses [tables.alaises]\n" in done.said) == (0, True)


def test_unreadable_token_file_is_not_blamed_on_consul(host, filled):
    done = check(host, address=filled, more='token_file = "/none"\n')
    assert (done.status, "token file /none: No such file or directory (correct this file)\n" in done.text) == (2, True)
    assert "check that Consul runs there" not in done.text


def test_missing_smtpd_conf_is_status_2_and_named_tables_are_checked(host, filled):
    done = check(host, "aliases", "--smtpd-conf", f"{host}/none", address=filled)
    assert (done.status, done.text) == (2, f"{host}/none: no such file or directory (correct the path)\n")


def test_unknown_token_is_reported_once(host, consul_with_acl):
    address = f"http://{consul_with_acl.address}"
    token = host / "token"
    token.write_text("11111111-2222-3333-4444-555555555555")
    token.chmod(0o640)
    done = check(host, address=address, more=f'token_file = "{token}"\n')
    hint = "create a token with the rules that table-consulctl policy prints"
    assert (done.status, done.text) == (1, f"Consul at {address}: rejects the token: 403 ACL not found ({hint})\n")


def test_folder_that_the_token_may_not_read_is_reported_by_name(host, consul_with_acl):
    consul_with_acl.kv_txn({"aliases/alias/root": "gilles", "aliases/domain/example.org": ""})
    token = host / "token"
    token.write_text(consul_with_acl.token('key_prefix "aliases/alias/" { policy = "read" }'))
    token.chmod(0o640)
    done = check(host, address=f"http://{consul_with_acl.address}", more=f'token_file = "{token}"\n')
    assert "aliases/domain/: the token may not read this folder" in done.text
    assert "aliases/alias/" not in done.text
    assert "version unknown (the token may not read it)" in done.said


def test_token_of_the_operator_is_not_used(host, consul_with_acl):
    consul_with_acl.kv_txn({"aliases/alias/root": "gilles", "aliases/domain/example.org": ""})
    token = host / "token"
    token.write_text(consul_with_acl.token('key_prefix "aliases/" { policy = "read" }'))
    token.chmod(0o640)
    more, address = f'token_file = "{token}"\n', f"http://{consul_with_acl.address}"
    done = check(host, address=address, more=more, CONSUL_HTTP_TOKEN_FILE="/none")
    assert (done.status, done.text) == (0, "")


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("1.21.4", "its UI cannot create or edit values"),
        ("1.21.5+ent", "rejects URLs that contain @"),
        ("1.22.4", "ends requests after 30 seconds"),
        ("1.22.5", None),
    ],
)
def test_version_of_consul_with_a_known_fault_is_reported(host, version, problem):
    with FakeConsul() as fake:
        fake.put(b"aliases/alias/root", b"gilles")
        fake.put(b"aliases/domain/example.org", b"")
        about = Answer(200, {"Content-Type": "application/json"}, json.dumps({"Config": {"Version": version}}).encode())
        fake.handle = lambda request: about if request.path == b"/v1/agent/self" else fake.consul(request)
        done = check(host, address=fake.address)
    assert (done.status, done.text.startswith(f"Consul {version}: ")) == (int(problem is not None), problem is not None)
    assert problem is None or problem in done.text


def test_cluster_without_a_leader_is_one_line_and_status_2(host):
    with FakeConsul() as fake:
        fake.leader = False
        done = check(host, address=fake.address)
    line = f"Consul leader: none, according to {fake.address} (start a majority of the servers)\n"
    assert (done.status, done.text) == (2, line)


def test_leader_is_among_what_was_checked(host, filled):
    assert "checked: Consul leader 127.0.0.1:" in check(host, address=filled).said


@pytest.mark.parametrize("status", [403, 404])
def test_proxy_for_keys_alone_is_not_a_problem(host, status):
    with FakeConsul() as fake:
        fake.put(b"aliases/alias/root", b"gilles")
        fake.put(b"aliases/domain/example.org", b"")
        body = b"Endpoint is blocked by agent configuration\n" if status == 403 else b"not found"
        fake.handle = lambda r: fake.consul(r) if r.path.startswith(b"/v1/kv/") else Answer(status, {}, body)
        token = host / "token"
        token.write_text("x")
        token.chmod(0o640)
        done = check(host, address=fake.address, more=f'token_file = "{token}"\n')
    assert (done.status, done.text) == (0, ""), done.text


def test_agent_without_servers_is_reported_with_a_hint(host):
    with FakeConsul() as fake:
        fake.handle = lambda _request: Answer(500, {}, b"No known Consul servers")
        done = check(host, address=fake.address)
    assert (done.status, "No known Consul servers (join this agent to the servers)\n" in done.text) == (2, True)


def test_unknown_datacenter_is_reported_with_a_hint(host):
    with FakeConsul() as fake:
        done = check(host, address=fake.address, more='datacenter = "mars"\n')
    hint = "500 No path to datacenter (check datacenter in the configuration)\n"
    assert (done.status, hint in done.text) == (2, True), done.text


JSON = {"Content-Type": "application/json", "X-Consul-Index": "1", "X-Consul-Knownleader": "true"}


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (
            Answer(500, {}, b"a secret"),
            "500 (text not quoted: it may contain the token) (check that Consul runs there)",
        ),
        (Answer(502, {}, b"Bad Gateway (nginx)"), "502 Bad Gateway (nginx) (check that Consul runs there)"),
        (Answer(429, {}, b"rate limit exceeded"), "429 rate limit exceeded (raise limits in Consul's configuration)"),
        (Answer(500, {}, b"No cluster leader"), "500 No cluster leader (start a majority of the servers)"),
        (Answer(400, {}, b"Missing key name"), "400 Missing key name (check that this is Consul's address)"),
        (Answer(302, {}, b""), "302 (check that this is Consul's address)"),
        (Answer(200, JSON, b"[1"), ") (check that this is Consul's address)"),
        (Answer(200, {}, b"[]"), "status 200, but not from Consul's key-value store (check that this is Consul's addr"),
        (Answer(429, {}, b"Your IP is issuing too many concurrent connections"), "(raise limits.http_max_conns_per_c"),
        (Answer(400, {}, b"Invalid key name, keys should respect the"), "(upgrade Consul 1.21.5, or set disable_http"),
    ],
)
def test_every_error_of_consul_has_one_hint(host, answer, problem):
    token = host / "token"
    token.write_text("x")
    token.chmod(0o640)
    more = f'token_file = "{token}"\n' if answer.body == b"a secret" else ""
    with FakeConsul() as fake:
        fake.handle = lambda r: answer if r.path.startswith(b"/v1/kv/") else Answer(404)
        done = check(host, address=fake.address, more=more)
        (line,) = done.text.splitlines()
    assert (done.status, line.startswith(f"Consul at {fake.address}"), problem in line) == (2, True, True), line


def test_server_without_tls_has_a_hint(host, fake):
    done = check(host, address=fake.address.replace("http:", "https:"))
    assert (done.status, "did not speak TLS (should the address be http://?)\n" in done.text) == (2, True), done.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs smtpd -n")
@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo /x.conf:3: syntax error >&2; exit 1", "/x.conf:3: syntax error"),
        ("exit 3", "exit status 3"),
        ("exec sleep 20", "no answer in 2 s"),
    ],
)
def test_error_of_smtpd_has_a_hint(host, filled, script, problem, monkeypatch):
    monkeypatch.setattr("table_consul.ctl.check.PROGRAM_SECONDS", 2.0)
    smtpd = host / "bin" / "smtpd"
    smtpd.write_text(smtpd.read_text().replace("\nexit\n", f"\n{script}\nexit\n"))
    done = check(host, address=filled)
    assert (done.status, done.text) == (1, f"{host}/smtpd.conf: smtpd -n: {problem} (see smtpd.conf(5))\n")


def test_smtpd_conf_that_is_too_large_has_a_hint(host, filled, monkeypatch):
    monkeypatch.setattr(smtpdconf, "SIZE_MAX", 1)
    done = check(host, address=filled)
    assert (done.status, done.text) == (2, f"{host}/smtpd.conf: larger than 0 MiB (correct the path)\n")


@pytest.mark.parametrize("rules", ["", 'key_prefix "aliases/alias/" { policy = "read" }'])
def test_without_a_token_the_anonymous_token_is_named(host, rules):
    with FakeConsul() as fake:
        fake.tokens["anonymous"] = rules
        fake.put(b"aliases/alias/root", b"gilles")
        done = check(host, address=fake.address)
    problem = "the anonymous token may not read this folder; lookups return errors (set token_file to a token with"
    closed = ["aliases/alias/", "aliases/domain/"] if not rules else ["aliases/domain/"]
    assert done.status == 1
    assert [line.partition(": ")[0] for line in done.text.splitlines() if problem in line] == closed, done.text
    assert "checked: no token is configured, so Consul uses the anonymous token\n" in done.said


def test_without_a_token_a_real_consul_uses_the_anonymous_token(host, consul_with_acl):
    consul_with_acl.kv_put("aliases/alias/root", "gilles")
    done = check(host, address=f"http://{consul_with_acl.address}")
    assert (done.status, "the token" in done.text, done.text.count("the anonymous token may not")) == (1, False, 2)
    assert "no token is configured" in done.said


def test_json_has_problems_and_a_summary(host, filled, consul):
    consul.kv_delete("aliases/domain/example.org")
    done = check(host, "--json", address=filled)
    document = json.loads(done.text)
    assert (done.status, done.said) == (1, "")
    assert [(each["where"], each["unknown"]) for each in document["problems"]] == [("aliases/domain/", False)]
    assert f"{host}/smtpd.conf (1 table)" in document["checked"]


def test_environment_variable_is_named_because_smtpd_may_lack_it(host, filled):
    done = check(host, address=filled, CONSUL_HTTP_TOKEN="anything")
    assert "with CONSUL_HTTP_TOKEN from this environment, which smtpd may not have" in done.said


def test_configuration_named_in_smtpd_conf_is_used_for_its_table(host, filled):
    (host / "smtpd.conf").write_text(CONF.replace("consul\n", f"consul:{host}/other.toml\n"))
    (host / "other.toml").write_text("[consul]\nadress = 1\n")
    done = check(host, address=filled)
    assert (done.status, f"{host}/other.toml: consul.adress: unknown key" in done.text) == (1, True)
