"""The running program and its socket: transcripts, any input, stray output, secrets."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys

import pytest

from tests.dialogue import TIMEOUT_SECONDS, TRANSCRIPTS, Child, read_transcript, write_config, write_source
from tests.smtpd.process import NO_THREADS, ROOT, start_child

HANDSHAKE = b"config|tablename|aliases\nconfig|ready\n"


# ---- transcripts ----


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_transcript_is_answered_turn_by_turn_and_ends_with_status_0(path, tmp_path):
    dialogue = read_transcript(path)
    with start_child(tmp_path, *dialogue.defaults) as child:
        for sent, answered in dialogue.turns:
            child.say(sent)
            assert answered == b"".join(child.line() + b"\n" for _ in range(answered.count(b"\n")))
            assert child.quiet()
        assert (child.rest(), child.end()) == (b"", 0)


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_transcript_sent_in_one_piece_is_answered(path, tmp_path):
    dialogue = read_transcript(path)
    with start_child(tmp_path, *dialogue.defaults) as child:
        child.say(dialogue.said)
        assert (dialogue.answered, 0) == (child.rest(), child.end())


# ---- any input ----


def nonsense(chance, number):
    """A line that smtpd would not send: random bytes, random fields, or an invalid request."""
    what = chance.randrange(4)
    if what == 0:
        return chance.randbytes(chance.randrange(60)).replace(b"\n", b"")
    fields = [b"table", b"0.1", b"0", b"aliases", b"lookup", b"alias", b"%08x" % number, b"root"]
    if what == 1:
        chance.shuffle(fields)
    elif what == 2:
        fields[chance.randrange(8)] = chance.choice(
            [
                *(b"", b"\0", b"\xff\xfe", b"\r", b"..", b"../../x", b"%n"),
                *(b"check", b"fetch", b"update", b"config", b"ready"),
            ]
        )
    else:
        del fields[chance.randrange(8) :]
    return b"|".join(fields)


def test_random_lines_get_replies_only_to_requests(entries_config):
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
    # A second handshake, which smtpd never sends, is answered like the first.
    lines = [line for line in lines if not line.startswith(b"config|ready")]
    with Child(entries_config) as child, open(os.devnull, "wb") as nowhere:
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
        drain.wait(TIMEOUT_SECONDS)
    asked = iter(lines)
    for reply in replies:
        word, ident, outcome = reply.split(b"|", 2)
        assert re.fullmatch(rb"not-found|ok|found|found\|[^\r\0]+|error\|.*", outcome, re.DOTALL), reply
        op = word.removesuffix(b"-result")
        assert any({op, ident} <= set(line.split(b"|")) for line in asked), f"{reply!r} answers no request"
    assert certain == {
        ident: reply for reply in replies if (ident := reply.split(b"|")[1]) in certain and certain[ident] == reply
    }


def test_pipelined_requests_are_answered_in_order(entries_config):
    with Child(entries_config) as child:
        child.handshake()
        child.say(b"".join(ROOT % number + b"\n" for number in range(1000)))
        assert [b"lookup-result|%08x|found|gilles" % number for number in range(1000)] == [
            child.line() for _ in range(1000)
        ]


def test_requests_sent_together_with_the_handshake_are_answered(entries_config):
    with Child(entries_config) as child:
        child.say(HANDSHAKE + ROOT % 1 + b"\n")
        assert child.rest().endswith(b"register|ready\nlookup-result|00000001|found|gilles\n")


# ---- output and input of libraries ----


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


def test_library_that_prints_or_reads_does_not_touch_the_socket(entries_config):
    with Child(entries_config, command=[sys.executable, "-c", STRAY]) as child:
        child.handshake()
        assert child.ask(ROOT % 1) == b"lookup-result|00000001|found|gilles"
        assert (child.rest(), child.end()) == (b"", 0)
        assert {"stray 1", "stray 2", "stray 3"} <= {*child.log().splitlines()}


@pytest.mark.parametrize("closed", ["2>&-", "2>&- 3>&-"])
def test_library_output_without_standard_error_is_dropped(entries_config, closed):
    silent = STRAY.replace("print(", "(lambda *_: 0)(")
    shell = ["/bin/sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", silent]
    with Child(entries_config, command=shell) as child:
        child.handshake()
        assert child.ask(ROOT % 1) == b"lookup-result|00000001|found|gilles"
        assert (child.rest(), child.end()) == (b"", 0)


def test_bug_is_an_error_reply_and_the_next_request_is_answered(entries_config):
    bug = (
        STRAY[: STRAY.index("def answer")]
        + (
            "def answer(self, request, *more):\n"
            "    if request.key == b'bug': raise RuntimeError('secret\\x1b[31m')\n"
            "    return found(self, request, *more)\n"
        )
        + STRAY[STRAY.index("responder.Responder.answer = ") :]
    )
    with Child(entries_config, command=[sys.executable, "-c", bug]) as child:
        child.handshake()
        reply = child.ask(b"table|0.1|0|aliases|lookup|alias|00000001|bug")
        assert reply == b"lookup-result|00000001|error|internal error (RuntimeError); see the log of table-consul"
        child.ask(b"table|0.1|0|aliases|lookup|alias|00000002|bug")
        assert child.ask(ROOT % 3) == b"lookup-result|00000003|found|gilles"
        assert child.end() == 0
        assert (child.log().count("internal error; please report it"), child.log().count("\x1b")) == (1, 0)


def test_limit_of_threads_does_not_end_the_program(entries_config):
    with Child(entries_config, command=[sys.executable, "-c", NO_THREADS]) as child:
        child.handshake()
        assert child.ask(ROOT % 1) == b"lookup-result|00000001|found|gilles"
        assert child.end() == 0


# ---- secrets ----


def test_log_and_replies_contain_no_secret_and_no_control_character(tmp_path):
    path = write_config(tmp_path, more='[log]\nlevel = "debug"\ntarget = "stderr"')
    entries = {
        "credentials/gilles": b"hunter2\nhunter2",
        "credentials/eric": b"eric:",
        "alias/root": b"|hunter2",
        "alias/a\x1b[31mb": b"|hunter2",
        "userinfo/gilles": b"hunter2",
    }
    write_source(tmp_path, {f"aliases/{name}": value for name, value in entries.items()})
    with Child(str(path), environ={"CONSUL_HTTP_TOKEN": "hunter2"}) as child:
        child.handshake()
        for number, name in enumerate((*entries, "al\x1b[31mias/x", "alias/\x1b]0;x\x07")):
            service, _, key = name.encode().partition(b"/")
            answer = child.ask(b"table|0.1|0|aliases|lookup|%b|%08x|%b" % (service, number, key))
            assert (b"hunter2" in answer, answer.decode().isprintable()) == (False, True)
        child.say(b"\x1b[2Jhello\n")
        assert child.end() == 0
        assert [line for line in child.log().splitlines() if not line.isprintable()] == []
        assert "hunter2" not in child.log()
