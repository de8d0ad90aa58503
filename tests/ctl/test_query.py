"""`table-consulctl query`: what smtpd would be told, and why."""

from __future__ import annotations

import json
import os
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from table_consul.ctl.query import explain_value
from table_consul.errors import ConfigError, printable
from table_consul.services import SERVICES, Table, passwords
from tests.control import at_terminal, control
from tests.dialogue import Child, eventually, write_config, write_source
from tests.fake_consul import FakeConsul

PASSWORD = "horse: battery"
HASH = b"$6$saltsalt$hAzWx3ml3yFuEQKiNa01wOw1/Opb7vJFfeTIDFuZfx4Ifv.aO8KNOJLMbBKSfHIiqyPDl8uE5M3GwEaybYmqf/"
MARKED = b"{SHA512-CRYPT}" + HASH

STORE: dict[bytes, bytes] = {
    b"mail/aliases/alias/root": b"gilles\n",
    b"mail/aliases/alias/Staff": b"gilles\neric # no\n# none\n",
    b"mail/aliases/alias/listed": b'["gilles", "eric"]',
    b"mail/aliases/alias/command": b"|/bin/sh",
    b"mail/aliases/alias/odd": b"ok, \x1b[2J@example.org",
    b"mail/aliases/alias/latin": b"gr\xfc\xdfe",
    b"mail/aliases/domain/*.example.org": b"",
    b"mail/aliases/userinfo/*": b"1000:1000:/home/%u",
    b"mail/aliases/userinfo/vera": b'{"uid": 7, "gid": 8, "home": "/home/v", "password": "' + HASH + b'"}',
    b"mail/aliases/userinfo/admin": b"0:0:/root",
    b"mail/aliases/credentials/vera": MARKED,
    b"mail/aliases/source/192.0.2.1": b"",
    b"mail/aliases/source/192.0.2.2": b"",
    b"mail/aliases/string/list": b'["a", "b"]',
}
"""With `prefix = "mail"`."""


@pytest.fixture
def conf(tmp_path):
    path = tmp_path / "c.toml"
    source = write_source(tmp_path, {key.decode(): value for key, value in STORE.items()})
    path.write_text(f'[consul]\naddress = "file://{source}"\n[defaults]\nprefix = "mail"\n')
    return path


@pytest.fixture
def fake():
    with FakeConsul() as fake:
        for key, value in STORE.items():
            fake.put(key, value)
        yield fake


@pytest.fixture
def live(tmp_path, fake):
    """Writes a configuration that reads the fake Consul."""

    def write(*lines, tables=""):
        path = tmp_path / "live.toml"
        defaults = "\n".join(lines)
        path.write_text(f'[consul]\naddress = "{fake.address}"\n[defaults]\nprefix = "mail"\n{defaults}\n{tables}')
        return path

    return write


def query(conf, *arguments, **options):
    return control("-c", conf, "query", "aliases", *arguments, **options)


def traced(conf, *arguments):
    """The trace as ``what text`` lines, of one key."""
    (line,) = query(conf, *arguments, "--trace", "--json").text.splitlines()
    return [f"{step['what']} {step['text']}" for step in json.loads(line)["trace"]]


# ---- answers and exit statuses ----


def test_one_key_gives_its_value_alone(conf):
    assert query(conf, "alias", "root") == (0, b"gilles\n", b"")


def test_several_keys_give_key_and_value_a_line_each(conf):
    assert query(conf, "alias", "root", "listed") == (0, b"root\tgilles\nlisted\tgilles, eric\n", b"")


def test_what_is_not_found_is_said_and_ends_with_1(conf):
    assert query(conf, "alias", "nobody") == (1, b"", b"nobody: not found\n")


def test_an_error_is_said_and_outweighs_all_else(conf):
    done = query(conf, "alias", "command", "root", "nobody")
    assert (done.status, done.text) == (2, "root\tgilles\n")
    assert done.said.startswith("command: error: mail/aliases/alias/command: the value contains a |command")
    assert done.said.endswith("nobody: not found\n")


def test_keys_come_from_standard_input_a_line_each(conf):
    done = query(conf, "alias", "-", stdin=b"root\r\n\nnobody\nlisted")
    assert done == (1, b"root\tgilles\nlisted\tgilles, eric\n", b"nobody: not found\n")


def test_keys_are_asked_for_in_lower_case_as_smtpd_does(conf):
    assert query(conf, "alias", "ROOT", "STAFF").text == "ROOT\tgilles\nSTAFF\tgilles, eric # no\n"


def test_a_key_that_is_no_utf_8_is_asked_for_as_it_stands(conf):
    done = query(conf, "alias", os.fsdecode(b"gr\xfc\xdfe\x1b"))
    assert (done.status, done.said) == (1, "gr\\xfc\\xdfe\\x1b: not found\n")


def test_a_key_that_smtpd_cannot_ask_for_is_an_error(conf):
    done = query(conf, "alias", "x" * 1024)
    assert (done.status, "smtpd asks for no more than 1023" in done.said) == (2, True)
    assert query(conf, "alias", "x" * 1023).status == 1


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["domain", "mail.example.org"], (0, b"*.example.org\n")),
        (["domain", "mail.example.org", "--op", "check"], (0, b"found\n")),
        (["domain", "example.org", "--op", "check"], (1, b"")),
        (
            ["domain", "a.example.org", "b.example.org", "--op", "check"],
            (0, b"a.example.org\tfound\nb.example.org\tfound\n"),
        ),
        (["userinfo", "eric"], (0, b"1000:1000:/home/eric\n")),
        (["source", "--op", "fetch"], (0, b"192.0.2.1\n")),
        (["source", "--op", "fetch", "--count", "3"], (0, b"192.0.2.1\n192.0.2.2\n192.0.2.1\n")),
        (["relayhost", "--op", "fetch"], (1, b"")),
    ],
)
def test_each_operation_answers(conf, arguments, answer):
    assert query(conf, *arguments)[:2] == answer


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["alias"], "lookup needs a KEY"),
        (["source", "x", "--op", "fetch"], "fetch takes no KEY"),
        (["alias", "x", "--count", "2"], "--count is for --op fetch"),
        (["source", "--op", "fetch", "--count", "0"], "--count"),
        (["alias", "x", "--op", "update"], "--op"),
    ],
)
def test_what_makes_no_sense_is_a_mistake_on_the_command_line(conf, arguments, said):
    done = query(conf, *arguments)
    assert (done.status, done.text, said in done.said) == (2, "", True), done.said


def test_a_service_that_the_table_does_not_have_is_an_error(tmp_path):
    path = write_config(tmp_path, 'services = ["alias"]')
    done = query(path, "domain", "example.org")
    assert (done.status, "domain is not among the services of table 'aliases'" in done.said) == (2, True)


# ---- for programs, and for terminals ----


def test_json_is_one_object_a_line(conf):
    done = query(conf, "alias", "root", "nobody", "command", "latin", "--json")
    answers = [json.loads(line) for line in done.text.splitlines()]
    common = {"table": "aliases", "service": "alias", "op": "lookup"}
    assert answers[0] == {**common, "key": "root", "result": "found", "value": "gilles"}
    assert answers[1] == {**common, "key": "nobody", "result": "not-found"}
    assert (answers[2].pop("reason")[:26], answers[2]["result"]) == ("mail/aliases/alias/command", "error")
    assert answers[3]["value"] == "gr\\xfc\\xdfe"
    assert (done.status, done.said) == (2, "")


def test_a_pipe_gets_the_bytes_and_a_terminal_none_that_it_could_play_with(conf):
    arguments = ("-c", conf, "query", "aliases", "alias", "odd", "latin")
    assert control(*arguments).out == b"odd\tok, \x1b[2J@example.org\nlatin\tgr\xfc\xdfe\n"
    assert at_terminal(*arguments) == (
        0,
        "odd\\tok, \\x1b[2J@example.org\nlatin\\tgr\\xfc\\xdfe\n".replace("\\t", "\t"),
    )


# ---- passwords ----


@pytest.fixture
def with_auth(conf):
    try:
        passwords._binding()
    except ConfigError as error:
        pytest.skip(f"{error}; it is built from source: apt-get install gcc python3-dev libcrypt-dev")
    conf.write_text(conf.read_text() + '[tables.aliases]\nservices = ["alias", "auth"]\n')
    return conf


def test_a_password_is_checked_from_standard_input_and_shown_nowhere(with_auth):
    lines = f"vera:{PASSWORD}\nVERA:{PASSWORD}\nvera:wrong\nnobody:{PASSWORD}\nvera\n".encode()
    done = query(with_auth, "auth", "-", "--trace", stdin=lines)
    assert (done.status, done.text) == (2, "vera\tfound\nVERA\tfound\n")
    assert [line for line in done.said.splitlines() if line[0] != " "] == [
        "vera: not found",
        "nobody: not found",
        "vera: error: the service auth answers check alone, with a key USER:PASSWORD",
    ]
    said = done.text + done.said + query(with_auth, "auth", "-", "--trace", "--json", stdin=lines).text
    assert [secret for secret in (PASSWORD, "battery", "wrong", HASH.decode()) if secret in said] == []


def test_a_password_on_the_command_line_is_refused_without_repeating_it(with_auth):
    done = query(with_auth, "auth", f"vera:{PASSWORD}")
    assert (done.status, done.text, "can be seen by all users" in done.said, "battery" in done.said) == (
        2,
        "",
        True,
        False,
    )


def test_a_password_is_asked_for_at_a_terminal_which_does_not_show_it(with_auth):
    arguments = ("-c", with_auth, "query", "aliases", "auth", "vera")
    status, shown = at_terminal(*arguments, typed=PASSWORD.encode() + b"\n", wanted=b"Password of vera: ")
    assert (status, shown) == (0, "Password of vera: \nfound\n")
    assert at_terminal(*arguments, typed=b"wrong\n", wanted=b"Password of vera: ")[0] == 1


def test_without_a_terminal_nobody_is_asked_for_a_password(with_auth):
    done = query(with_auth, "auth", "vera")
    assert (done.status, "No terminal to ask" in done.said) == (2, True)


# ---- traces ----


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        (["alias", "root"], ["entry mail/aliases/alias/root", "value trailing white space is dropped"]),
        (
            ["alias", "STAFF"],
            [
                "asked staff: smtpd asks in lower case",
                "entry mail/aliases/alias/Staff, stored in another case",
                "value trailing white space is dropped",
                "value lines are joined to one list, without comments",
                (
                    "problem element 2 of the value is neither a user nor an address; "
                    "smtpd rejects the whole alias because of it"
                ),
            ],
        ),
        (
            ["alias", "listed"],
            [
                "entry mail/aliases/alias/listed",
                "value decoded from JSON (value_format = auto)",
                "value lines are joined to one list, without comments",
            ],
        ),
        (
            ["alias", "command"],
            ["entry mail/aliases/alias/command", "safety allow_commands = false refuses commands and files"],
        ),
        (["alias", "nobody"], ["entry none"]),
        (
            ["domain", "mail.example.org"],
            [
                "entry mail/aliases/domain/*.example.org, which matches mail.example.org",
                "value empty, so the entry itself is the answer",
            ],
        ),
        (
            ["domain", "mail.example.org", "--op", "check"],
            ["entry mail/aliases/domain/*.example.org, which matches mail.example.org"],
        ),
        (
            ["userinfo", "eric"],
            [
                "entry mail/aliases/userinfo/*, the default for users without an entry",
                "value %u, %n, %d in the home are filled in",
            ],
        ),
        (
            ["userinfo", "vera"],
            ["entry mail/aliases/userinfo/vera", "value uid, gid, home of the JSON object (value_format = auto)"],
        ),
        (
            ["userinfo", "admin"],
            ["entry mail/aliases/userinfo/admin", "safety allow_root = false refuses uid or gid 0"],
        ),
        (
            ["credentials", "vera"],
            ["entry mail/aliases/credentials/vera", "value the {SCHEME}, $2y$ or lock is rewritten for crypt(3)"],
        ),
        (["string", "list"], ["entry mail/aliases/string/list"]),
        (["source", "--op", "fetch"], ["value one of the keys per fetch, in the order of the keys (fetch = keys)"]),
    ],
)
def test_trace_names_entry_and_rules(conf, arguments, steps):
    source, read, *rest = traced(conf, *arguments)
    assert source == f"source {conf.parent}/export.json"
    assert read.startswith(f"read mail/aliases/{arguments[0]}/ (")
    assert rest == steps


def test_a_trace_for_people_follows_its_answer_on_standard_error(conf):
    done = query(conf, "alias", "root", "--trace")
    assert (done.text, done.said.splitlines()[1:]) == (
        "gilles\n",
        [
            "  read     mail/aliases/alias/ (6 entries)",
            "  entry    mail/aliases/alias/root",
            "  value    trailing white space is dropped",
        ],
    )


def test_a_trace_at_a_terminal_of_40_columns_wraps(conf):
    arguments = ("-c", conf, "query", "aliases", "alias", "staff", "--trace")
    status, shown = at_terminal(*arguments, COLUMNS="40")
    first, *lines = shown.splitlines()
    assert (status, first, [line for line in lines if len(line) > 40]) == (0, "gilles, eric # no", [])

    assert {line[:11].strip() for line in lines} == {"", "source", "read", "entry", "value", "problem"}


def test_trace_names_the_option_that_permits_a_value(conf):
    conf.write_text(conf.read_text() + "allow_commands = true\nallow_root = true\n")
    assert "safety allow_commands = true permits commands and files" in traced(conf, "alias", "command")
    assert "safety allow_root = true permits uid or gid 0" in traced(conf, "userinfo", "admin")


def test_trace_of_auth_covers_both_services(with_auth):
    done = query(with_auth, "auth", "-", "--trace", "--json", stdin=f"vera:{PASSWORD}\n".encode())
    steps = [step["text"] for step in json.loads(done.text)["trace"] if step["what"] == "entry"]
    assert steps == ["none", "mail/aliases/credentials/vera"]


BYTES = st.one_of(
    st.binary(max_size=30),
    st.sampled_from([b"a\nb", b"# c", b' "x" ', b'["a","b"]', b"|sh", b"/f", b"0:0:/", b"1:1:/h", b"!", b"{CRYPT}*"]),
    st.sampled_from([b"$2y$10$x", MARKED, b'{"uid":0,"gid":1,"home":"/"}', b'{"password":"!"}', b"{", b"null", b"a,b"]),
    st.just(b'{"password":"$6$secretsecret"}'),
)


@settings(max_examples=300)
@given(
    raw=BYTES,
    service=st.sampled_from([*SERVICES.values()]),
    form=st.sampled_from(["auto", "text", "json"]),
    allowed=st.booleans(),
)
def test_trace_explains_any_value_and_quotes_nothing_of_it(raw, service, form, allowed):
    table = Table("t", value_format=form, allow_commands=allowed, allow_root=allowed)
    steps = [*explain_value(table, service, b"key", raw)]
    assert {step.what for step in steps} <= {"value", "safety"}
    assert not any("secret" in step.text for step in steps)
    if form == "text":
        assert not any("JSON" in step.text for step in steps)
    if allowed:
        assert not any("refuses" in step.text for step in steps)


# ---- where the data come from ----


def test_consul_is_asked_and_the_trace_says_at_which_index(live, fake):
    conf = live()
    assert query(conf, "alias", "root") == (0, b"gilles\n", b"")
    assert traced(conf, "alias", "root")[0] == f"source Consul at {fake.address}, index {fake.index}"


def test_a_table_that_is_read_directly_is_asked_for_the_key_alone(live, fake):
    conf = live('mode = "direct"')
    assert traced(conf, "alias", "root") == [
        f"source Consul at {fake.address}, read directly",
        "read mail/aliases/alias/root",
        "entry mail/aliases/alias/root",
        "value trailing white space is dropped",
    ]
    assert [request.key for request in fake.requests] == [b"mail/aliases/alias/root"]
    # What smtpd would be told: a key with capitals is not found there.
    assert query(conf, "alias", "Staff").status == 1
    assert traced(conf, "userinfo", "eric")[1:4] == [
        "read mail/aliases/userinfo/eric",
        "read mail/aliases/userinfo/*",
        "entry mail/aliases/userinfo/*, the default for users without an entry",
    ]
    assert traced(conf, "domain", "a.example.org")[1] == "read mail/aliases/domain/ (1 entry)"


def test_a_table_that_is_too_large_is_read_directly_as_by_the_daemon(live, fake):
    conf = live("max_keys = 3")
    assert traced(conf, "alias", "root")[:2] == [
        f"source Consul at {fake.address}, read directly (more than max_keys = 3)",
        "read mail/aliases/alias/root",
    ]
    assert query(conf, "alias", "Staff").status == 1


@pytest.fixture
def kept(live, tmp_path):
    """A configuration with a snapshot, which a daemon has written; the fake Consul knows better by now."""
    conf = live(f'snapshot = "{tmp_path}/{{table}}.json"')
    copy = tmp_path / "aliases.json"
    with Child(str(conf)) as child:
        child.handshake()
        for _ in eventually("the daemon has written its copy"):
            if copy.exists():
                break
    return conf


def test_the_copy_on_disk_answers_and_live_asks_consul(kept, fake, tmp_path):
    fake.put(b"mail/aliases/alias/root", b"eric")
    asked = len(fake.requests)
    assert query(kept, "alias", "root").text == "gilles\n"
    assert len(fake.requests) == asked
    assert query(kept, "alias", "root", "--live").text == "eric\n"
    os.utime(tmp_path / "aliases.json", times=(time.time() - 10 * 86400, time.time() - 10 * 86400))
    assert query(kept, "alias", "root").text == "gilles\n", "the daemon writes it when something changes, however late"
    assert traced(kept, "alias", "root")[0] == f"source {tmp_path}/aliases.json, written 10 d ago"
    assert traced(kept, "alias", "root", "--live")[0].startswith("source Consul at ")


def test_the_copy_is_never_written(kept, fake, tmp_path):
    before = (tmp_path / "aliases.json").stat()
    fake.put(b"mail/aliases/alias/root", b"eric")
    for more in ([], ["--live"]):
        query(kept, "alias", "root", *more)
    after = (tmp_path / "aliases.json").stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    assert sorted(path.name for path in tmp_path.glob("*.json*")) == ["aliases.json"]


def test_without_a_copy_consul_is_asked(kept, tmp_path):
    (tmp_path / "aliases.json").unlink()
    assert query(kept, "alias", "root").text == "gilles\n"


@pytest.mark.parametrize("content", [b"[{", b"", b"\x00" * 100, b'{"a": 1}'])
def test_damaged_snapshot_file_is_an_error_that_names_live(kept, tmp_path, content):
    (tmp_path / "aliases.json").write_bytes(content)
    done = query(kept, "alias", "root")
    assert (done.status, "--live reads Consul" in done.said) == (2, True)
    assert query(kept, "alias", "root", "--live").status == 0


def test_a_copy_that_nobody_writes_to_is_not_waited_for(kept, tmp_path):
    (tmp_path / "aliases.json").unlink()
    os.mkfifo(tmp_path / "aliases.json")
    assert query(kept, "alias", "root").status == 2


def test_snapshot_file_that_cannot_be_opened_is_an_error_that_names_live(kept, tmp_path):
    (tmp_path / "aliases.json").unlink()
    (tmp_path / "aliases.json").symlink_to("aliases.json")  # fails for root, too, and does not exist for stat(2)
    done = query(kept, "alias", "root")
    assert (done.status, "symbolic links; --live reads Consul" in done.said) == (2, True)
    assert query(kept, "alias", "root", "--live").status == 0


def test_a_copy_from_before_a_service_was_added_proves_nothing_of_it(kept, tmp_path):
    copy = tmp_path / "aliases.json"
    entries = [entry for entry in json.loads(copy.read_text()) if "/domain/" not in entry["key"]]
    copy.write_text(json.dumps(entries))
    done = query(kept, "domain", "elsewhere.example")
    assert (done.status, "is not in the copy" in done.said) == (2, True)
    assert query(kept, "alias", "root").status == 0


def test_a_copy_of_another_table_is_passed_by(kept, tmp_path):
    (tmp_path / "aliases.json").write_text('[{"key": "other/alias/root", "flags": 0, "value": ""}]')
    assert query(kept, "alias", "root").text == "gilles\n"


def test_each_folder_of_paths_has_its_own_copy(live, fake, tmp_path):
    fake.put(b"people/root", b"vera")
    conf = live(f'snapshot = "{tmp_path}/{{table}}.json"', 'paths = { alias = "people" }')
    with Child(str(conf)) as child:
        child.handshake()
        for _ in eventually("the daemon has written its copies"):
            if len([*tmp_path.glob("aliases.json*")]) == 2 and not [*tmp_path.glob("*.tmp")]:
                break
    fake.stop()
    assert query(conf, "alias", "root").text == "vera\n"
    assert query(conf, "source", "--op", "fetch").text == "192.0.2.1\n"


def test_without_consul_many_keys_cost_no_more_than_one(live, fake):
    conf = live("deadline = 0.5")
    fake.stop()
    begun = time.monotonic()
    done = query(conf, "alias", "-", stdin=b"root\n" * 200)
    assert (done.status, len(done.said.splitlines())) == (2, 200)
    assert time.monotonic() - begun < 5


def test_a_token_that_may_not_read_is_an_error_and_is_not_shown(live, fake):
    fake.token = "right"
    done = control("-c", live(), "query", "aliases", "alias", "root", CONSUL_HTTP_TOKEN="5ecret-t0ken")
    assert (done.status, "refuses the token" in done.said, "5ecret" in done.said) == (2, True, False)
    assert control("-c", live(), "query", "aliases", "alias", "root", CONSUL_HTTP_TOKEN="right").status == 0


def test_what_acls_hide_is_an_error_and_no_absence(live, fake):
    fake.denied = (b"mail/aliases/alias/",)
    assert [query(live(), service, "x").status for service in ("alias", "domain")] == [2, 1]


# ---- the same as the daemon ----


def daemon_answers(conf, questions):
    """What the daemon says to the same questions: op, service, key."""
    answers = []
    with Child(str(conf)) as child:
        child.handshake()
        for number, (op, service, key) in enumerate(questions):
            head = f"table|0.1|0|aliases|{op}|{service}|{number}".encode()
            line = child.ask(head if op == "fetch" else head + b"|" + key.lower())
            answers.append(line.split(b"|", 2)[2])
        child.end()
    return answers


def control_answers(conf, questions):
    """What query says to them, in the words of the wire."""
    answers = []
    for op, service in dict.fromkeys((op, service) for op, service, _ in questions):
        keys = [key for each, name, key in questions if (each, name) == (op, service)]
        if op == "fetch":
            done = query(conf, service, "--op", op, "--count", len(keys), "--json")
        else:
            done = query(conf, service, "--op", op, "-", "--json", stdin=b"\n".join(keys))
        answers += [json.loads(line) for line in done.text.splitlines()]
    return answers


def said(answer):
    """As on the wire, where a reason is cut."""
    if answer["result"] == "found":
        return "found" + (f"|{answer['value']}" if "value" in answer else "")
    return "not-found" if answer["result"] == "not-found" else f"error|{printable(answer['reason'], 400)}"


def differing(conf, questions):
    """Those questions to which the daemon and query say different things, with both answers."""
    questions = sorted(questions)  # as control_answers asks them
    theirs = [line.decode("utf-8", "backslashreplace") for line in daemon_answers(conf, questions)]
    ours = [said(answer) for answer in control_answers(conf, questions)]
    both = [*zip(questions, theirs, ours, strict=True)]
    # What was all alike was not compared.
    assert {their.partition("|")[0] for their in theirs} == {"found", "not-found", "error"}
    return [each for each in both if each[1] != each[2]]


FETCHES = [("fetch", service, b"") for service in ("source", "relayhost", "alias", "string", "regex") for _ in range(7)]


def test_it_answers_as_the_daemon_does_from_a_file(tmp_path):
    keys = [b"root", b"staff", b"quoted", b"command", b"a|b", b"nobody", b"broken", b"gilles", b"example.org", b"*"]
    services = [name for name in SERVICES if name != "auth"]
    questions = [(op, service, key) for service in services for op in ("check", "lookup") for key in keys]
    assert differing(write_config(tmp_path), [*questions, *FETCHES]) == []


WORDS = {
    "alias": [
        "gilles",
        "gilles, eric@example.org",
        "a\nb\n# c",
        '"gilles"',
        '["a", "b"]',
        "|/bin/sh",
        "a b",
        "x" * 2100,
    ],
    "userinfo": ["1000:1000:/home/v", "0:0:/root", "nobody", '{"uid": 1, "gid": 1, "home": "/h"}', '{"password": "x"}'],
    "credentials": [MARKED.decode(), HASH.decode(), "vera:secret", "x", '{"password": "vera:secret"}', "!"],
    "mailaddrmap": ["a@b, @c", "a\nb", '"open'],
    "addrname": ["mail.example.org", ""],
}
NAMES = {
    "domain": ["*.example.org", "example.org", "mail.*", "*", "MAIL.example.org"],
    "netaddr": ["192.0.2.0/24", "2001:db8::/32", "local", "192.0.2.7", "no/99", "[2001:db8::1]"],
    "mailaddr": ["vera@example.org", "@example.org", "vera", "vera+tag@example.org", "@*.example.org"],
    "addrname": ["192.0.2.25", "::1", "[2001:db8::25]"],
    "source": ["192.0.2.25", "192.0.2.26", "2001:db8::25"],
    "relayhost": ["example.org", "smtps://label@mail.example.net"],
    "regex": ["^a+$", "(?i)ROOT", "("],
    "userinfo": ["*", "vera", "Root", "a:b"],
}
COMMON = ["root", "Root", "vera", "a/b", "a//b", "ROOT", "gr\u00fc\u00dfe", "a|b", " x", "folder/", "-", "sch\u00f6n@x"]
ASKED = [
    "192.0.2.200",
    "2001:db8::7",
    "[::1]",
    "mail.example.org",
    "eric@example.org",
    "nobody",
    "a:b",
    "../root",
    "aaa",
]


@pytest.mark.parametrize("layout", ["", 'mode = "direct"', "max_keys = 20", 'paths = { userinfo = "people" }'])
def test_it_answers_as_the_daemon_does_from_consul(consul, tmp_path, layout):
    rng = random.Random(layout)
    store, questions = {}, [*FETCHES]
    for service in SERVICES:
        if service == "auth":
            continue
        keys = [*NAMES.get(service, ()), *rng.sample(COMMON, 7), *(f"{service}-{number}" for number in range(15))]
        folder = "people" if "people" in layout and service == "userinfo" else f"mail/aliases/{service}"
        for key in keys:
            store[f"{folder}/{key}"] = rng.choice(WORDS.get(service, ["", "x", '"quoted"', "two\nlines", "[1]"]))
        asked = {key.encode() for key in [*keys, *COMMON, *ASKED] if key}
        questions += [(op, service, key) for op in ("check", "lookup") for key in asked]
    consul.kv_txn(store)
    conf = tmp_path / "c.toml"
    defaults = f'[defaults]\nprefix = "mail"\n{layout}\n[log]\nlevel = "error"\n'
    conf.write_text(f'[consul]\naddress = "http://{consul.address}"\n{defaults}')
    assert len(store) > 200
    assert differing(conf, questions) == []
