"""The dialogues of docs/protocols.md are real, in reads of any size."""

from __future__ import annotations

import contextlib
import itertools
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from struct import calcsize
from sys import byteorder

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from table_consul.imsg import NAMES
from table_consul.server import Server
from tests.dialogue import TIMEOUT_SECONDS, open_tables, read_transcript, write_config, write_source
from tests.documents.document import page

PAGE = page("docs/protocols.md")
ENTRIES = {
    key: value.strip().encode()
    for block in PAGE.fenced("entries")
    for key, value in (line.split(" =", 1) for line in block.text.splitlines())
}
ATOM = re.compile(r'(?:(\d+)\*)?(?:"([^"]*)"|((?:[0-9a-f]{2})+))')


def spelled(text):
    """The bytes of one line of an imsg transcript."""
    return b"".join(
        int(count or 1) * (bytes.fromhex(number) if number else words.encode())
        for count, words, number in (ATOM.fullmatch(atom).groups() for atom in text.split())
    )


def read_imsg(text):
    turns = []
    for line in text.splitlines():
        if line.startswith("> "):
            turns.append([spelled(line[2:]), b""])
        elif line.startswith("< "):
            turns[-1][1] += spelled(line[2:])
        else:
            assert line.startswith("# "), line
    return turns


def serve(sources, wire):
    with wire:
        Server(sources, lambda _table: None, procexec_reply=sources.procexec_reply).serve(wire.fileno(), wire.fileno())


def say(wire, chunks):
    with contextlib.suppress(BrokenPipeError):  # the program reads nothing after CLOSE
        for chunk in chunks:
            wire.send(chunk)
        wire.shutdown(socket.SHUT_WR)


def replayed(sources, chunks):
    """All replies to smtpd's messages in these reads, which this kind of socket keeps separate."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(TIMEOUT_SECONDS)
    with ours, ThreadPoolExecutor() as threads:
        done = [threads.submit(serve, sources, theirs), threads.submit(say, ours, chunks)]
        answered = b"".join(iter(lambda: ours.recv(1 << 20), b""))
        for each in done:
            each.result(TIMEOUT_SECONDS)
    return answered


@pytest.fixture(scope="module", params=[*PAGE.fenced("transcript", "imsg")], ids=lambda block: f"line {block.line}")
def conversation(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("protocols")
    if request.param.language == "imsg":
        assert (byteorder, calcsize("@N")) == ("little", 8), "the page shows another byte order"
        defaults, turns = (), read_imsg(request.param.text)
    else:
        (folder / "page").write_text(request.param.text)
        dialogue = read_transcript(folder / "page")
        defaults, turns = dialogue.defaults, dialogue.turns
    config = write_config(folder, *defaults, address=f"file://{write_source(folder, ENTRIES)}")
    return turns, lambda chunks: replayed(open_tables(config), chunks)


def test_page_shows_every_dialect():
    words = {line[2:].partition("|")[0] for block in PAGE.fenced("transcript") for line in block.text.splitlines()}
    assert {"table-response", "table-result", "lookup-result", "fetch-result", "update-result", "register"} <= words
    assert len([*PAGE.fenced("imsg")]) == 1


def test_page_has_the_bit_of_every_service_of_imsg():
    row = re.search(r"^\| (alias \|.*) \|\n\|[-|]+\n\| (.*) \|$", PAGE.text, re.MULTILINE)
    told = dict(zip(row[1].split(" | "), (int(bit, 0) for bit in row[2].split(" | ")), strict=True))
    assert told == {name: bit for bit, name in NAMES.items() if name != "auth"}


def test_each_turn_gets_the_replies_of_the_page(conversation):
    turns, replay = conversation
    for number in range(len(turns)):
        so_far = turns[: number + 1]
        assert b"".join(answer for _, answer in so_far) == replay([said for said, _ in so_far])


def test_dialogue_in_one_piece_gets_the_same_replies(conversation):
    turns, replay = conversation
    assert b"".join(answer for _, answer in turns) == replay([b"".join(said for said, _ in turns)])


def test_dialogue_byte_by_byte_gets_the_same_replies(conversation):
    turns, replay = conversation
    said = b"".join(said for said, _ in turns)
    assert b"".join(answer for _, answer in turns) == replay(bytes([each]) for each in said)


@settings(max_examples=20, deadline=None)
@given(cuts=st.sets(st.integers(0, 3000)))
def test_dialogue_in_random_cuts_gets_the_same_replies(conversation, cuts):
    turns, replay = conversation
    said = b"".join(said for said, _ in turns)
    places = sorted({0, *(cut for cut in cuts if cut < len(said)), len(said)})
    assert b"".join(answer for _, answer in turns) == replay(said[a:b] for a, b in itertools.pairwise(places))
