"""`table-consulctl lint`: every problem with its key and a hint, and no false alarms."""

from __future__ import annotations

import json
import random
import re
import subprocess
from collections import Counter
from urllib.parse import unquote_to_bytes

import pytest

from table_consul.services import SERVICES
from tests.control import at_terminal, control
from tests.dialogue import Child, eventually, write_source
from tests.fake_consul import VERSIONS, FakeConsul
from tests.rig.consul import consul_binary

GOOD = {
    "aliases/alias/": b"",
    "aliases/alias/root": b"gilles\n",
    "aliases/alias/Staff": b"gilles, eric",
    "aliases/domain/*.example.org": b"",
    "aliases/userinfo/*": b"1000:1000:/home/%u",
    "aliases/netaddr/192.0.2.0/24": b"",
    "aliases/oops/": b"",
}


@pytest.fixture
def lint(tmp_path):
    """Runs lint on a file with these entries and these lines of configuration."""

    def run(entries, more="", *arguments):
        path = tmp_path / "c.toml"
        path.write_text(f'[consul]\naddress = "file://{write_source(tmp_path, entries)}"\n{more}')
        return control("-c", path, "lint", *(arguments or ["aliases"]))

    return run


@pytest.fixture(params=VERSIONS)
def fake(request):
    with FakeConsul(version=request.param) as fake:
        yield fake


@pytest.fixture
def live(fake, tmp_path):
    def run(entries, more="", *arguments):
        for key, value in entries.items():
            fake.put(key.encode(), value)
        path = tmp_path / "c.toml"
        path.write_text(f'[consul]\naddress = "{fake.address}"\n{more}')
        return control("-c", path, "lint", *(arguments or ["aliases"]))

    return run


def test_good_entries_have_no_problem(lint, tmp_path):
    done = lint(GOOD)
    assert done == (0, b"", f"aliases: 5 entries, no problems ({tmp_path}/export.json)\n".encode())


MISSING = "no keys in this folder (check the name of the table, `prefix` and `paths`)"


def test_table_without_keys_is_reported_as_a_missing_folder(lint):
    done = lint({"alias/alias/root": b"gilles", "aliases2/alias/root": b"gilles"})
    assert (done.status, done.text) == (1, f"aliases/: {MISSING}\n")
    assert "0 entries, 1 problem (" in done.said
    elsewhere = '[defaults]\nprefix = "mail"\npaths = { alias = "people" }'
    assert lint(GOOD, elsewhere).text.splitlines() == [f"people/: {MISSING}", f"mail/aliases/: {MISSING}"]


@pytest.mark.parametrize("mode", ["mirror", "direct"])
def test_missing_folder_is_found_in_consul(live, mode):
    more = f'[defaults]\nmode = "{mode}"'
    done = live({"other/alias/root": b"gilles"}, more, "other", "aliases")
    assert (done.status, done.text) == (1, f"aliases/: {MISSING}\n")


@pytest.mark.parametrize("key", ["aliases/", "aliases/alias/", "aliases/alias/root"])
@pytest.mark.parametrize("mode", ["mirror", "direct"])
def test_table_with_a_single_key_has_a_folder(live, mode, key):
    done = live({key: b"gilles" if key.endswith("t") else b""}, f'[defaults]\nmode = "{mode}"')
    assert (done.status, done.text) == (0, "")


@pytest.mark.parametrize("mode", ["mirror", "direct"])
def test_aliases_that_smtpd_cannot_expand_are_problems(live, mode):
    more = f'[defaults]\nmode = "{mode}"\nservices = ["alias"]'
    done = live({"aliases/alias/eva": b"b", "aliases/alias/b": b"Eva", "aliases/alias/c": b"b, gilles"}, more)
    loops = ["b: an alias loop (b -> eva -> b)", "eva: an alias loop (eva -> b -> eva)"]
    text = "so smtpd rejects mail to this alias; break the loop"
    assert done == (1, "".join(f"aliases/alias/{each}, {text}\n" for each in loops).encode(), done.err)
    live({"aliases/alias/b": b"|broken"}, more)
    assert [line.partition(":")[0] for line in live({}, more).text.splitlines()] == ["aliases/alias/b"]


def test_alias_loop_by_a_tag_depends_on_the_delimiter_of_the_table(live):
    looping = {"aliases/alias/b": b"eva_x", "aliases/alias/eva": b"b_y"}
    assert live(looping, '[defaults]\nsubaddress_delimiter = "_"').text.count("an alias loop") == 2
    assert live({}).text == ""


def test_alias_is_reported_in_its_stored_case(lint):
    assert lint({"aliases/alias/Loop@d.org": b"loop@d.org"}).text.startswith(
        "aliases/alias/Loop@d.org: an alias loop ("
    )


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("alias/command", b"|/bin/sh", "; set allow_commands = true to permit them"),
        ("alias/long", b"x" * 3000, "(split it into several aliases)"),
        (
            "alias/a b ",
            b"vera",
            "the key begins or ends with white space; smtpd never asks for such a key (rename it)",
        ),
        ("credentials/vera", b"{SSHA}abcdef", "no login can succeed (use the output of `smtpctl encrypt`"),
        ("userinfo/root", b"0:0:/root", "; set allow_root = true"),
        ("userinfo/vera", b"vera", "(expected UID:GID:HOME, such as 1000:1000:/home/gilles)"),
        ("netaddr/192.0.2.0/99", b"", ""),
        *(
            (f"{service}/empty", value, f"missing value: {service} requires one")
            for service in ("alias", "credentials", "userinfo", "mailaddrmap")
            for value in (b"", b" \n")
        ),
        ("alias/nobody", b"# nobody yet", "missing value: alias requires one"),
        ("addrname/192.0.2.1", b"", "missing value: addrname requires one"),
        ("alias/twice/", b"vera", "move the value to the key without the /"),
        ("alias/a//b", b"vera", "no URL can name this key"),
        ("alias/../b", b"vera", "no URL can name this key"),
        ("alias/a\nb", b"vera", "no URL can name this key"),
        ("alias/a%20b", b"vera", "escapes such as %41 that decode to a blank or .., so no URL can read"),
        (
            "alias/a%2e%2eb",
            b"vera",
            "no URL can read or delete it on Consul 1.21.6 and later (store the entry under another key",
        ),
        ("alias/a..b%41", b"vera", "delete this one with `table-consulctl import --prune`"),
        ("alias/a\u200eb", b"vera", "the key has an unprintable character"),
        ("alias/a b ", b"vera", "the key has a leading or trailing blank, so no URL can read"),
        ("regex/a ", b"", "the key has a leading or trailing blank, so no URL can read"),
        ("credentials/record", b'{"uid": 1}', "no field for credentials (add one of: password)"),
        ("userinfo/record", b'{"password": "x"}', "no field for userinfo (add one of: uid, gid, home)"),
        (
            "root",
            b"vera",
            "not an entry: no service between table and key (use aliases/SERVICE/KEY, such as aliases/alias/root)",
        ),
        ("alias", b"vera", "not an entry: no service between table and key"),
    ],
)
def test_problem_has_its_key_and_a_hint(lint, key, value, problem):
    done = lint({**GOOD, f"aliases/{key}": value})
    (line,) = done.text.splitlines()
    shown = f"aliases/{key}".replace("\n", "\\n").replace("\u200e", "\\u200e")
    assert (done.status, line.startswith(f"{shown}: "), problem in line) == (1, True, True), line
    assert ", 1 problem (" in done.said


@pytest.mark.parametrize(
    ("folder", "hint"),
    [
        ("aliases", "rename the folder to alias"),
        ("Alias", "rename the folder to alias"),
        ("domains", "rename the folder to domain"),
        ("credential", "rename the folder to credentials"),
        ("user-info", "rename the folder to userinfo"),
        ("mailaddrs", "rename the folder to mailaddr"),
        ("relay", "rename the folder to relayhost"),
        ("xyz", "use one of alias, domain, "),
        ("auth", "auth is not among the services of table aliases (add it to `services`)"),
    ],
)
def test_unused_folder_is_one_problem_with_the_likely_name(lint, folder, hint):
    done = lint({**GOOD, f"aliases/{folder}/a": b"x", f"aliases/{folder}/b/c": b"x"})
    (line,) = done.text.splitlines()
    assert (done.status, line.startswith(f"aliases/{folder}/: 2 entries are never read: ")) == (1, True)
    assert hint in line


def test_entries_of_a_service_with_another_path_are_reported(lint):
    done = lint({**GOOD, "people/vera": b"vera"}, '[defaults]\npaths = { alias = "people" }')
    assert done.text.splitlines() == [
        "aliases/alias/: 2 entries are never read: `paths` sets the folder of alias to people/ (move the entries there)"
    ]


def test_entries_read_through_paths_or_another_table_are_not_reported(lint):
    own = '[tables.aliases]\npaths = { alias = "aliases/people" }\n[tables.other]\npaths = { string = "aliases/words" }'
    entries = {"aliases/people/vera": b"vera", "aliases/words/a": b"b"}
    assert lint(entries, own)[:2] == (0, b"")
    assert lint(entries, own.partition("\n[tables.other]")[0]).status == 1


def test_record_usable_by_one_service_of_its_folder_has_no_problem(lint):
    shared = '[defaults]\npaths = { credentials = "people", userinfo = "people" }'
    assert lint({"people/vera": b'{"uid": 1, "gid": 1, "home": "/h"}'}, shared).status == 0
    done = lint({"people/vera": b'{"shell": "/bin/sh"}'}, shared)
    assert done.text == (
        "people/vera: the record has no field for credentials or userinfo (add one of: password, uid, gid, home)\n"
    )


def test_case_variants_of_a_key_are_reported(lint):
    done = lint({"aliases/alias/Root": b"a", "aliases/alias/root": b"b"})
    assert (done.status, done.text.startswith("aliases/alias/Root: ")) == (1, True)
    assert "aliases/alias/root, which takes precedence; delete one of the two" in done.text


def test_upper_case_key_is_a_problem_in_direct_mode(live):
    done = live(GOOD, '[defaults]\nmode = "direct"')
    assert (done.status, [line.partition(":")[0] for line in done.text.splitlines()]) == (1, ["aliases/alias/Staff"])
    assert "rename it" in done.text


def test_unused_entries_are_reported_in_direct_mode(live):
    done = live({**GOOD, "aliases/aliases/x": b"y"}, '[defaults]\nmode = "direct"')
    assert "aliases/aliases/: 1 entry is never read" in done.text


def test_direct_mode_with_a_file_address_does_not_contact_consul(lint, monkeypatch):
    monkeypatch.setattr("table_consul.kv.Client.visible_keys", lambda *_, **__: pytest.fail("Consul was contacted"))
    done = lint({**GOOD, "aliases/aliases/x": b"y"}, '[defaults]\nmode = "direct"')
    assert (done.status, "aliases/aliases/: 1 entry is never read" in done.text) == (1, True)


def test_table_too_large_to_mirror_is_reported_and_checked_as_in_direct_mode(live):
    done = live(GOOD, "[defaults]\nmax_keys = 2")
    keys = [line.partition(":")[0] for line in done.text.splitlines()]
    assert (done.status, keys) == (1, ["aliases/"])  # keys in any case are found, as in a mirror
    assert "more than max_keys = 2 keys" in done.text


def test_entries_hidden_by_acls_are_an_error(live, fake):
    fake.denied = (b"aliases/alias/",)
    done = live(GOOD)
    assert (done.status, "may not read all of aliases/alias/" in done.said) == (2, True)


def test_unreachable_consul_is_an_error(live, fake):
    fake.stop()
    done = live({}, "[defaults]\ndeadline = 0.5")
    assert (done.status, done.text) == (2, "")
    assert done.said.startswith("aliases: not checked: Consul at http://127.0.0.1:")


def test_unreadable_table_does_not_stop_the_check_of_others(live, fake):
    fake.denied = (b"aliases/",)
    entries = {**GOOD, "domains/oops": b"x"}
    done = live(entries, "", "aliases", "domains")
    assert (done.status, done.text.partition(":")[0]) == (2, "domains/oops")
    assert "aliases: not checked: " in done.said
    aliases, domains = json.loads(live(entries, "", "aliases", "domains", "--json").text)["tables"]
    assert (set(aliases), len(domains["problems"])) == ({"table", "error"}, 1)


def test_snapshot_is_checked_unless_live_is_given(live, fake, tmp_path):
    more = f'[defaults]\nsnapshot = "{tmp_path}/copy.json"'
    live(GOOD, more)
    with Child(str(tmp_path / "c.toml")) as child:
        child.handshake()
        for _ in eventually("the daemon has written its copy"):
            if (tmp_path / "copy.json").exists():
                break
    assert live({"aliases/oops/a": b"x"}, more).status == 0
    done = live({}, more, "aliases", "--live")
    assert (done.status, done.text.startswith("aliases/oops/: 1 entry")) == (1, True)


def test_unused_entries_are_reported_from_the_snapshot(live, tmp_path):
    more = f'[defaults]\nsnapshot = "{tmp_path}/copy.json"'
    live({**GOOD, "aliases/oops/a": b"x", "aliases/alias/folder/": b"x"}, more)
    with Child(str(tmp_path / "c.toml")) as child:
        child.handshake()
        for _ in eventually("the daemon has written its copy"):
            if (tmp_path / "copy.json").exists():
                break
    done = live({}, more)
    assert [line.partition(": ")[0] for line in done.text.splitlines()] == ["aliases/alias/folder/", "aliases/oops/"]
    assert "copy.json, written " in done.said


def test_json_is_one_document(lint, tmp_path):
    done = lint({**GOOD, "aliases/alias/c\x1b": b"|/bin/sh", "aliases/root": b"x"}, "", "aliases", "domains", "--json")
    document = json.loads(done.text)
    aliases, domains = document["tables"]
    missing = {"key": "domains/", "problem": MISSING}
    assert domains == {"table": "domains", "source": [f"{tmp_path}/export.json"], "entries": 0, "problems": [missing]}
    found = [(problem["key"], problem.get("service")) for problem in aliases["problems"]]
    assert found == [("aliases/alias/c\\x1b", "alias"), ("aliases/alias/c\\x1b", "alias"), ("aliases/root", None)]
    assert all(problem["problem"] for problem in aliases["problems"])
    assert (done.status, done.said) == (1, "")


def test_terminal_of_40_columns_wraps_at_words_below_each_key(lint, tmp_path):
    lint({**GOOD, "aliases/alias/command": b"|/bin/sh"})
    status, shown = at_terminal("-c", tmp_path / "c.toml", "lint", "aliases", COLUMNS="40")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    assert (status, lines[0]) == (1, "aliases/alias/command")
    assert all(line.startswith("    ") and len(line) <= 40 for line in lines[1:-1])
    assert len(lines) > 5


def test_no_part_of_a_value_is_shown(lint):
    record = b'{"password": "secret", "uid": "secret", "gid": 1, "home": "secret"}'
    entries = {f"aliases/{service}/k": record for service in SERVICES} | {"aliases/secrets/x": b"secret"}
    entries |= {"aliases/credentials/a": b"{SSHA}secret", "aliases/userinfo/b": b"secret", "aliases/oops": b"secret"}
    done = lint(entries, '[defaults]\nservices = ["alias", "credentials", "userinfo", "auth"]')
    assert (done.status, "secret" in done.text.replace("secrets", "")) == (1, False)


def test_lint_prints_every_problem_the_daemon_logs(lint, tmp_path):
    rng = random.Random(3)
    values = [b"x", b"|sh", b"a\nb", b"", b"0:0:/", b"1:1:/h", b'{"uid": 1}', b'{"a"', b'"open', b"{SSHA}x", b"a b c"]
    keys = ["root", "Root", "a b", " x", "192.0.2.0/99", "a:b", "(", "*", "long" * 60, "long" * 60 + "2", "x: y"]
    services = [name for name in SERVICES if name != "auth"]
    entries = {f"aliases/{name}/{key}": rng.choice(values) for name in services for key in keys}
    done = lint(entries, '[log]\nlevel = "warning"\ntarget = "stderr"\n')
    told = set(done.text.splitlines())
    with Child(str(tmp_path / "c.toml")) as child:
        child.handshake()
        for name in services:
            child.ask(f"table|0.1|0|aliases|check|{name}|1|root".encode())
        child.end()
        logged = child.log().splitlines()
    lines = [re.sub(r"^.*?(aliases/)", r"\1", line) for line in logged if "aliases/" in line]
    assert len(lines) > 30
    # The daemon cuts long keys.
    heads = Counter(line.partition("...: ")[0] for line in lines if "...: " in line)
    assert [line for line in lines if line not in told and "...: " not in line] == []
    assert [head for head in heads if len([line for line in told if line.startswith(head)]) < heads[head]] == []


# ---- a real Consul ----


def test_keys_that_no_url_can_name_are_reported_with_a_hint_that_works(consul, tmp_path):
    consul.kv_txn({"aliases/alias/a//b": "x", "aliases/alias/c\nd": "x", "aliases/alias/root": "x"})
    path = tmp_path / "c.toml"
    path.write_text(f'[consul]\naddress = "http://{consul.address}"\n')
    done = control("-c", path, "lint", "aliases")
    assert [line.partition(": no URL")[0] for line in done.text.splitlines()] == [
        "aliases/alias/a//b",
        "aliases/alias/c\\nd",
    ]

    def kv(*arguments):
        command = [consul_binary(), "kv", arguments[0], f"-http-addr={consul.address}", *arguments[1:]]
        return subprocess.run(command, check=False, capture_output=True)

    for odd in ("aliases/alias/a//b", "aliases/alias/c\nd"):
        kv("put", odd, "y")
        kv("delete", odd)
    stored = {entry["Key"]: entry["Value"] for entry in consul.request("GET", "/v1/kv/aliases/alias?recurse")}
    assert [stored[odd] for odd in ("aliases/alias/a//b", "aliases/alias/c\nd")] == ["eA==", "eA=="]
    for beginning in ("aliases/alias/a/", "aliases/alias/c"):
        assert kv("delete", "-recurse", beginning).returncode == 0
    done = control("-c", path, "lint", "aliases")
    assert (done.status, done.text, "1 entry, no problems" in done.said) == (0, "", True)


reads_any_name = pytest.mark.parametrize("fake", [each for each in VERSIONS if each != "1.21.5"], indirect=True)
# Consul lists the first three alike, and so the next two. A byte may be the first of a longer key in UTF-8.
NOT_UTF8 = ("%80", "%81", "%C3", "a%FFb%FE", "a%FEb%FF", "%E2%82x", "caf%E9@example.org")
UTF8 = ("\u00e9", "\u20acx", "a", "a\u00ffb\u00fe")


def stored_keys(report):
    return {line.split(":")[0] for line in report.splitlines() if "not UTF-8" in line}


def deletions(report):
    return set(re.findall(r"DELETE /v1/kv/aliases/alias/([^)]*)", report))


@reads_any_name
def test_keys_that_are_not_utf8_are_reported_by_their_bytes(fake, live):
    for name in NOT_UTF8:
        fake.put(b"aliases/alias/" + unquote_to_bytes(name), b"eric")
    result = live({f"aliases/alias/{name}": b"eric" for name in UTF8})
    assert deletions(result.text) == {*NOT_UTF8}
    assert stored_keys(result.text) == {
        "aliases/alias/" + re.sub("%(..)", lambda x: "\\x" + x[1].lower(), n) for n in NOT_UTF8
    }
    for name in NOT_UTF8:
        fake.delete(b"aliases/alias/" + unquote_to_bytes(name))
    assert "not UTF-8" not in live({}).text


@pytest.mark.parametrize("fake", ["1.21.5"], indirect=True)
def test_keys_that_consul_does_not_read_are_reported_as_it_lists_them(fake, live):
    fake.put(b"aliases/alias/\x80", b"eric")
    assert "aliases/alias/\ufffd: the key is not UTF-8" in live({"aliases/alias/a": b"eric"}).text


@reads_any_name
def test_replacement_character_itself_is_reported_by_its_bytes(fake, live):
    result = live({"aliases/alias/\ufffd": b"eric", "aliases/alias/a\ufffd\ufffd": b"eric"})
    assert deletions(result.text) == {"%EF%BF%BD", "a%EF%BF%BD%EF%BF%BD"}


def test_keys_with_too_many_bytes_that_are_not_utf8_are_reported_as_listed(fake, live):
    fake.put(b"aliases/alias/" + b"\x80" * 30, b"eric")
    result = live({"aliases/alias/a": b"eric"})
    assert "lint --live prints the request" in result.text
    assert len(stored_keys(result.text)) == 1


@pytest.mark.real
def test_reported_request_deletes_a_key_that_is_not_utf8_from_a_real_consul(consul, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(f'[consul]\naddress = "http://{consul.address}"\n')
    for name in NOT_UTF8:
        consul.request("PUT", f"/v1/kv/aliases/alias/{name}", b"eric")
    reported = deletions(control("-c", path, "lint", "aliases").text)
    assert reported == {*NOT_UTF8}
    for name in reported:
        consul.request("DELETE", f"/v1/kv/aliases/alias/{name}")
    consul.kv_put("aliases/alias/root", "eric")
    assert control("-c", path, "lint", "aliases").status == 0
