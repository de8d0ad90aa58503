from __future__ import annotations

import os
import pty
import random
import re
import signal
import socket
import subprocess
import sys

import pytest

from tests.dialogue import (
    ENTRIES,
    PATIENCE_SECONDS,
    TRANSCRIPTS,
    Child,
    eventually,
    read_transcript,
    write_config,
    write_source,
)

HANDSHAKE = b"config|tablename|aliases\nconfig|ready\n"
ROOT = b"table|0.1|0|aliases|lookup|alias|%08x|root"
UPDATE = b"table|0.1|0|aliases|update|%08x"


@pytest.fixture
def configured(tmp_path):
    return str(write_config(tmp_path))


def started(tmp_path, *defaults, **options):
    return Child(str(write_config(tmp_path, *defaults, **options)))


# ---- transcripts ----


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_the_child_answers_a_transcript_turn_by_turn_and_ends_with_it(path, tmp_path):
    dialogue = read_transcript(path)
    with started(tmp_path, *dialogue.defaults) as child:
        for said, answered in dialogue.turns:
            child.say(said)
            assert answered == b"".join(child.line() + b"\n" for _ in range(answered.count(b"\n")))
            assert child.quiet()
        assert (child.rest(), child.end()) == (b"", 0)


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_the_child_answers_a_transcript_in_one_piece(path, tmp_path):
    dialogue = read_transcript(path)
    with started(tmp_path, *dialogue.defaults) as child:
        child.say(dialogue.said)
        assert (dialogue.answered, 0) == (child.rest(), child.end())


# ---- any input ----


def nonsense(chance, number):
    """A line that smtpd would not say: of random bytes, of random fields, or a request with something wrong in it."""
    what = chance.randrange(4)
    if what == 0:
        return chance.randbytes(chance.randrange(60)).replace(b"\n", b"")
    fields = [b"table", b"0.1", b"0", b"aliases", b"lookup", b"alias", b"%08x" % number, b"root"]
    if what == 1:
        chance.shuffle(fields)
    elif what == 2:
        fields[chance.randrange(8)] = chance.choice(
            [
                b"",
                b"\0",
                b"\xff\xfe",
                b"\r",
                b"..",
                b"../../x",
                b"check",
                b"fetch",
                b"update",
                b"config",
                b"ready",
                b"%n",
            ]
        )
    else:
        del fields[chance.randrange(8) :]
    return b"|".join(fields)


def test_tens_of_thousands_of_random_lines_end_nothing_and_draw_only_replies_to_what_was_asked(configured):
    chance = random.Random(20)
    lines, certain = [], {}
    for number in range(40_000):
        if number % 10:
            lines.append(nonsense(chance, number))
        else:
            key, answer = chance.choice(
                [(b"root", b"found|gilles"), (b"nobody", b"not-found"), (b"a|b", b"found|pipes")]
            )
            lines.append(b"table|0.1|0|aliases|lookup|alias|%08x|%b" % (number, key))
            certain[b"%08x" % number] = b"lookup-result|%08x|%b" % (number, answer)
    # A second handshake is answered like the first; that smtpd says it never.
    lines = [line for line in lines if not line.startswith(b"config|ready")]
    with Child(configured) as child, open(os.devnull, "wb") as nowhere:
        drain = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.buffer.read()"], stdin=child.process.stderr, stdout=nowhere
        )
        child.say(HANDSHAKE)
        while child.line() != b"register|ready":
            pass
        replies = []
        for at in range(0, len(lines), 500):
            child.say(b"\n".join(lines[at : at + 500]) + b"\n" + ROOT % (0xF0000000 + at) + b"\n")
            while (reply := child.line()) != b"lookup-result|%08x|found|gilles" % (0xF0000000 + at):
                replies.append(reply)
        assert (child.rest(), child.end()) == (b"", 0)
        drain.wait(PATIENCE_SECONDS)
    asked = iter(lines)
    for reply in replies:
        word, ident, outcome = reply.split(b"|", 2)
        assert re.fullmatch(rb"not-found|ok|found|found\|[^\r\0]+|error\|.*", outcome, re.DOTALL), reply
        op = word.removesuffix(b"-result")
        assert any({op, ident} <= set(line.split(b"|")) for line in asked), f"nobody asked for {reply!r}, in this order"
    assert certain == {
        ident: reply for reply in replies if (ident := reply.split(b"|")[1]) in certain and certain[ident] == reply
    }


def test_pipelined_requests_are_answered_in_order(configured):
    with Child(configured) as child:
        child.handshake()
        child.say(b"".join(ROOT % number + b"\n" for number in range(1000)))
        assert [b"lookup-result|%08x|found|gilles" % number for number in range(1000)] == [
            child.line() for _ in range(1000)
        ]


def test_requests_may_follow_the_handshake_in_the_same_breath(configured):
    with Child(configured) as child:
        child.say(HANDSHAKE + ROOT % 1 + b"\n")
        assert child.rest().endswith(b"register|ready\nlookup-result|00000001|found|gilles\n")


# ---- the end ----


def test_the_end_of_the_file_is_the_end_with_status_0(configured):
    with Child(configured) as child:
        child.handshake()
        assert child.end() == 0


def test_the_end_in_the_middle_of_a_line_is_the_end_with_status_0(configured):
    with Child(configured) as child:
        child.handshake()
        child.say(ROOT % 1)
        assert (child.rest(), child.end()) == (b"", 0)


def test_a_peer_that_vanishes_while_it_is_answered_is_the_end_with_status_0(tmp_path):
    folder = tmp_path
    path = write_config(folder)
    write_source(folder, {**ENTRIES, "aliases/string/long": b"x" * 100_000})
    with Child(str(path)) as child:
        child.handshake()
        child.say(b"".join(b"table|0.1|0|aliases|lookup|string|%08x|long\n" % number for number in range(100)))
        child.line()
        child.wire.close()
        assert (child.process.wait(PATIENCE_SECONDS), problems(child)) == (0, "")


def test_signals_that_smtpd_ignores_end_nothing(configured):
    with Child(configured) as child:
        child.handshake()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            child.process.send_signal(number)
        assert child.ask(ROOT % 1) == b"lookup-result|00000001|found|gilles"


def test_a_socket_that_does_not_block_is_waited_for(tmp_path):
    path = write_config(tmp_path)
    write_source(tmp_path, {**ENTRIES, "aliases/string/long": b"x" * 100_000})
    theirs_flags = "import os; os.set_blocking(0, False); from table_consul.cli import main; raise SystemExit(main())"
    with Child(str(path), command=[sys.executable, "-c", theirs_flags]) as child:
        child.handshake()
        child.say(b"".join(b"table|0.1|0|aliases|lookup|string|%08x|long\n" % number for number in range(30)))
        answers = [child.line() for _ in range(30)]
        assert [b"lookup-result|%08x|found|" % n + b"x" * 100_000 for n in range(30)] == answers
        assert child.end() == 0


def problems(child):
    """What the log says beside that it has begun."""
    return "".join(line for line in child.log().splitlines(keepends=True) if ": INFO: " not in line)


# ---- the wire is nobody else's ----

STRAY = """
import os, sys
from table_consul import cli, responder
found = responder.Responder.answer
def answer(*arguments):
    print("stray 1"); sys.stdout.flush(); os.write(1, b"stray 2\\n"); os.system("echo stray 3")
    sys.stdin.read(); os.read(0, 1)
    return found(*arguments)
responder.Responder.answer = answer
raise SystemExit(cli.main(sys.argv[1:]))
"""


def test_what_a_library_prints_or_reads_is_not_smtpds(configured):
    with Child(configured, command=[sys.executable, "-c", STRAY]) as child:
        child.handshake()
        assert child.ask(ROOT % 1) == b"lookup-result|00000001|found|gilles"
        assert (child.rest(), child.end()) == (b"", 0)
        assert {"stray 1", "stray 2", "stray 3"} <= {*child.log().splitlines()}


@pytest.mark.parametrize("closed", ["2>&-", "2>&- 3>&-"])
def test_without_standard_error_what_a_library_prints_is_nobodys(configured, closed):
    silent = STRAY.replace("print(", "(lambda *_: 0)(")
    shell = ["/bin/sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", silent]
    with Child(configured, command=shell) as child:
        child.handshake()
        assert child.ask(ROOT % 1) == b"lookup-result|00000001|found|gilles"
        assert (child.rest(), child.end()) == (b"", 0)


def test_a_bug_in_answering_is_an_error_reply_and_the_next_answer_is_good(configured):
    bug = (
        STRAY[: STRAY.index("def answer")]
        + (
            "def answer(self, request, *more):\n"
            "    if request.key == b'bug': raise RuntimeError('secret\\x1b[31m')\n"
            "    return found(self, request, *more)\n"
        )
        + STRAY[STRAY.index("responder.Responder.answer = ") :]
    )
    with Child(configured, command=[sys.executable, "-c", bug]) as child:
        child.handshake()
        reply = child.ask(b"table|0.1|0|aliases|lookup|alias|00000001|bug")
        assert reply == b"lookup-result|00000001|error|internal error (RuntimeError); see the log of table-consul"
        child.ask(b"table|0.1|0|aliases|lookup|alias|00000002|bug")
        assert child.ask(ROOT % 3) == b"lookup-result|00000003|found|gilles"
        assert child.end() == 0
        assert (child.log().count("internal error; please report it"), child.log().count("\x1b")) == (1, 0)


# ---- configuration ----


def test_a_bad_configuration_still_shakes_hands_says_why_and_recovers_with_an_update(tmp_path):
    path = write_config(tmp_path)
    good = path.read_text()
    path.write_text("[consul]\naddres = 1\n")
    with Child(str(path)) as child:
        assert b"alias" in child.handshake()
        reason = b"error|%b: consul.addres: unknown key" % str(path).encode()
        for answer in (child.ask(ROOT % 1), child.ask(UPDATE % 2)):
            assert answer.split(b"|", 2)[2].startswith(reason)
        path.write_text(good)
        assert child.ask(UPDATE % 3) == b"update-result|00000003|ok"
        assert child.ask(ROOT % 4) == b"lookup-result|00000004|found|gilles"
        assert child.end() == 0


def test_an_update_with_a_bad_configuration_keeps_the_old_one(tmp_path):
    path = write_config(tmp_path)
    with Child(str(path)) as child:
        child.handshake()
        path.write_text("[consul]\naddress = 1\n")
        assert child.ask(UPDATE % 1).startswith(b"update-result|00000001|error|")
        assert child.ask(ROOT % 2) == b"lookup-result|00000002|found|gilles"


def test_an_update_brings_a_new_configuration_into_force(tmp_path):
    path = write_config(tmp_path)
    ask = b"table|0.1|0|aliases|lookup|alias|%08x|command"
    with Child(str(path)) as child:
        child.handshake()
        refused = child.ask(ask % 1)
        path.write_text(path.read_text().replace("[defaults]", "[defaults]\nallow_commands = true"))
        assert (refused.split(b"|")[2], child.ask(UPDATE % 2).split(b"|")[2]) == (b"error", b"ok")
        assert child.ask(ask % 3) == b"lookup-result|00000003|found||/bin/sh"


def test_an_update_brings_another_log_level_into_force(tmp_path):
    path = write_config(tmp_path, more='[log]\nlevel = "error"\ntarget = "stderr"\n')
    write_source(tmp_path, {"aliases/netaddr/quiet": b""})
    with Child(str(path)) as child:
        child.handshake()
        child.ask(b"table|0.1|0|aliases|check|netaddr|1|quiet")
        path.write_text(path.read_text().replace('"error"', '"warning"'))
        write_source(tmp_path, {"aliases/netaddr/loud": b""})
        child.ask(UPDATE % 2)
        child.ask(b"table|0.1|0|aliases|check|netaddr|3|loud")
        child.end()
        assert re.findall("netaddr/[a-z]+", child.log()) == ["netaddr/loud"]


def test_the_reply_word_may_differ_by_table(tmp_path):
    more = '[tables.old]\nprocexec_reply = "table-result"'
    with started(tmp_path, more=more) as child:
        assert [child.ask(b"table|0.1|0|%b|lookup|%d|alias|x" % asked) for asked in ((b"new", 1), (b"old", 2))] == [
            b"table-response|1|not-found",
            b"table-result|2|not-found",
        ]


def test_a_source_that_changes_answers_at_once(tmp_path):
    with started(tmp_path) as child:
        child.handshake()
        before = child.ask(ROOT % 1)
        write_source(tmp_path, {"aliases/alias/root": b"marie"})
        assert (before, child.ask(ROOT % 2)) == (
            b"lookup-result|00000001|found|gilles",
            b"lookup-result|00000002|found|marie",
        )


@pytest.mark.parametrize(
    ("version", "auth"),
    [
        (b"7.9.0-portable", True),
        (b"7.10", True),
        (b"8.0", True),
        (b"7.8.0p1", False),
        (b"7.6.0", False),
        (b"x", False),
        (b"", False),
    ],
)
def test_auth_is_registered_only_with_an_smtpd_that_keeps_passwords_as_they_are(tmp_path, version, auth):
    with started(tmp_path, 'services = ["alias", "auth"]') as child:
        assert [b"alias", b"auth"][: 1 + auth] == child.handshake(version=version)


def test_with_auth_alone_an_older_smtpd_is_still_told_of_services_it_knows(tmp_path):
    with started(tmp_path, 'services = ["auth"]') as child:
        names = child.handshake(version=b"7.6.0")
        assert (b"alias" in names, b"auth" in names) == (True, False)


# ---- secrets and strangers ----


def test_no_secret_and_no_control_character_reaches_log_or_wire(tmp_path):
    log = '[log]\nlevel = "debug"\ntarget = "stderr"'
    path = write_config(tmp_path, more=log)
    write_source(
        tmp_path,
        {
            "aliases/credentials/gilles": b"hunter2\nhunter2",
            "aliases/credentials/eric": b"eric:",
            "aliases/alias/root": b"|hunter2",
            "aliases/alias/a\x1b[31mb": b"|hunter2",
            "aliases/userinfo/gilles": b"hunter2",
        },
    )
    with Child(str(path), environ={"CONSUL_HTTP_TOKEN": "hunter2"}) as child:
        child.handshake()
        for number, (service, key) in enumerate(
            [
                (b"credentials", b"gilles"),
                (b"credentials", b"eric"),
                (b"alias", b"root"),
                (b"alias", b"a\x1b[31mb"),
                (b"userinfo", b"gilles"),
                (b"al\x1b[31mias", b"x"),
                (b"alias", b"\x1b]0;x\x07"),
            ]
        ):
            answer = child.ask(b"table|0.1|0|aliases|lookup|%b|%08x|%b" % (service, number, key))
            assert (b"hunter2" in answer, answer.decode().isprintable()) == (False, True)
        child.say(b"\x1b[2Jhello\n")
        assert child.end() == 0
        assert ([line for line in child.log().splitlines() if not line.isprintable()], "hunter2" in child.log()) == (
            [],
            False,
        )


@pytest.mark.parametrize("mode", ["direct", "mirror"])
def test_with_consul_away_every_answer_is_an_error_in_time_and_no_token_is_told(tmp_path, mode):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, and not listening: whoever connects is refused
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        log = '[log]\nlevel="debug"\ntarget="stderr"'
        path = write_config(tmp_path, f'mode = "{mode}"', "deadline = 0.5", address=address, more=log)
        with Child(str(path), environ={"CONSUL_HTTP_TOKEN": "hunter2"}) as child:
            child.handshake()
            answers = [child.ask(ROOT % number) for number in range(6)]
            assert [b"lookup-result|%08x|error" % number for number in range(6)] == [
                b"|".join(answer.split(b"|")[:3]) for answer in answers
            ]
            assert child.end() == 0
            assert ("hunter2" in child.log(), "returning errors" in child.log()) == (False, True)


def test_a_consul_that_never_answers_does_not_delay_the_handshake(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        path = write_config(tmp_path, "deadline = 30", address=f"http://127.0.0.1:{silent.getsockname()[1]}")
        with Child(str(path)) as child:
            child.wire.settimeout(10)
            assert b"alias" in child.handshake()


# ---- people ----


def test_on_a_terminal_it_says_what_it_is_and_ends_with_status_2():
    ours, theirs = pty.openpty()
    try:
        run = subprocess.run(
            [sys.executable, "-m", "table_consul"],
            stdin=theirs,
            capture_output=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert (run.returncode, run.stdout, b"is started by OpenSMTPD's smtpd" in run.stderr) == (2, b"", True)


@pytest.mark.parametrize("said", [b"", b"hello\n", b"GET / HTTP/1.0\r\n\r\n"])
def test_where_nobody_speaks_a_dialect_it_says_what_it_is_and_ends_with_status_2(configured, said):
    run = subprocess.run(
        [sys.executable, "-m", "table_consul", configured],
        input=said,
        capture_output=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert (run.returncode, run.stdout, b"is started by OpenSMTPD's smtpd" in run.stderr) == (2, b"", True)


@pytest.mark.parametrize("closed", ["<&-", "<&- >&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_without_standard_input_it_ends_with_status_2_and_no_traceback(configured, closed):
    run = subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "table_consul", configured],
        capture_output=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert (run.returncode, b"Traceback" in run.stdout + run.stderr) == (2, False)


def test_the_dialogue_that_it_suggests_works(configured):
    run = subprocess.run(
        [sys.executable, "-m", "table_consul", configured],
        input=b"config|ready\ntable|0.1|0|aliases|lookup|alias|1|root\n",
        capture_output=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert (run.returncode, run.stdout.splitlines()[-1]) == (0, b"lookup-result|1|found|gilles")


def test_it_takes_little_to_shake_hands():
    """Heavy imports belong where they are needed; smtpd waits for its handshake."""
    code = "import sys; from table_consul import cli; print(*sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.split()
    assert set() == {"requests", "urllib3", "consul", "ssl", "http.client", "table_consul.kv"} & {*modules}


def test_the_end_is_noticed_while_a_mirror_waits_for_consul(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        path = write_config(tmp_path, "deadline = 0.2", address=f"http://127.0.0.1:{silent.getsockname()[1]}")
        with Child(str(path)) as child:
            child.handshake()
            child.ask(ROOT % 1)
            child.wire.close()
            for _ in eventually("the child has ended", 10):
                if child.process.poll() is not None:
                    break
            assert child.process.returncode == 0
