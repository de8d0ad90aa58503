"""Tests of the judgement: it must find each kind of bad answer."""

from __future__ import annotations

import pytest

from tests.chaos.client import DEADLINE_SECONDS, STEADY, Client, number_of
from tests.chaos.history import FRESH_SECONDS, HOT, Writer
from tests.chaos.witness import merged, stalled

ILL = (100.0, 110.0)
STILL, NOBODY, LEAVING = map(number_of, (b"still", b"nobody", b"leaving"))


@pytest.fixture
def writer():
    made = Writer([], "folder")
    made.attempted[0] = 4  # never acknowledged
    made.acknowledged[0] = [(10.0, 1), (50.0, 2), (105.0, 3)]
    return made


def judged(writer, *answers):
    client = Client(None, b"t")
    client.answers = [(when, 0.001, number, outcome) for when, number, outcome in answers]
    row = client.judge("none", writer, ILL)
    return row.wrong, row.absent, row.errors, row.late


@pytest.mark.parametrize(
    ("when", "number", "outcome", "verdict"),
    [
        (60.0, 0, b"found|v2", (0, 0, 0, 0)),
        (60.0, 0, b"found|v1", (1, 0, 0, 0)),  # outdated without a fault of Consul
        (50.0 + FRESH_SECONDS / 2, 0, b"found|v1", (0, 0, 0, 0)),
        (105.0, 0, b"found|v1", (0, 0, 0, 0)),  # the last good copy
        (105.0, 0, b"found|v4", (0, 0, 0, 0)),  # written, though not acknowledged by Consul
        (105.0, 0, b"found|v5", (1, 0, 0, 0)),  # was never the value
        (105.0, 0, b"found|gilles", (1, 0, 0, 0)),
        (105.0, 0, b"not-found", (0, 1, 0, 0)),
        (105.0, 0, b"error|away", (0, 0, 1, 0)),
        (120.0, 0, b"found|v3", (0, 0, 0, 0)),
        (120.0, 0, b"found|v2", (1, 0, 0, 0)),  # still outdated after recovery
        (105.0, HOT, b"found", (0, 0, 0, 0)),
        (105.0, HOT, b"not-found", (0, 1, 0, 0)),
        (105.0, NOBODY, b"not-found", (0, 0, 0, 0)),
        (105.0, NOBODY, b"found|x", (1, 0, 0, 0)),
    ],
)
def test_answer_is_judged_by_the_values_stored_in_consul(writer, when, number, outcome, verdict):
    assert judged(writer, (when, number, outcome)) == verdict


def test_edit_may_stay_unseen_for_longer_during_a_stall(writer):
    client = Client(None, b"t")
    client.answers = [(50.0 + FRESH_SECONDS + 0.2, 0.001, 0, b"found|v1")]
    assert client.judge("none", writer, ILL).wrong == 1
    client.witnesses.stalls = [(50.1, 50.4)]
    assert client.judge("none", writer, ILL).wrong == 0
    client.witnesses.stalls = [(50.1, 50.2)]
    assert client.judge("none", writer, ILL).wrong == 1


@pytest.mark.parametrize(
    ("when", "number", "outcome", "verdict"),
    [
        (60.0, STILL, b"error|hidden", (0, 0, 1, 0)),
        (75.0, STILL, b"error|hidden", (0, 0, 0, 0)),
        (75.0, STILL, b"found|gilles", (0, 0, 0, 0)),  # before it is noticed
        (75.0, STILL, b"found|eric", (1, 0, 0, 0)),
        (75.0, STILL, b"not-found", (0, 1, 0, 0)),  # hidden is not absent
        (75.0, 0, b"error|hidden", (0, 0, 1, 0)),  # another key
        (85.0, STILL, b"error|hidden", (0, 0, 1, 0)),  # too late
        (60.0, LEAVING, b"not-found", (0, 1, 0, 0)),
        (75.0, LEAVING, b"not-found", (0, 0, 0, 0)),
        (71.0 + FRESH_SECONDS / 2, LEAVING, b"found|eric", (0, 0, 0, 0)),
        (75.0, LEAVING, b"found|eric", (1, 0, 0, 0)),
        (75.0, LEAVING, b"error|hidden", (0, 0, 1, 0)),
        (105.0, LEAVING, b"found|eric", (0, 0, 0, 0)),  # the last good copy
    ],
)
def test_hidden_key_may_be_an_error_and_only_a_deleted_one_may_be_absent(writer, when, number, outcome, verdict):
    writer.hidden[STILL] = (70.0, 80.0)
    writer.deleted[LEAVING] = (70.0, 71.0)
    assert judged(writer, (when, number, outcome)) == verdict


def test_recovery_is_complete_when_each_latest_answer_is_right(writer):
    client = Client(None, b"t")
    client.newest = [5] * HOT
    client.latest[HOT:] = [outcomes[0] for _, _, outcomes in STEADY]
    assert client.is_well(writer, [5] * HOT)
    assert not client.is_well(writer, [6] * HOT)
    writer.deleted[LEAVING] = (1.0, 2.0)
    assert not client.is_well(writer, [5] * HOT)
    client.latest[LEAVING] = b"not-found"
    assert client.is_well(writer, [5] * HOT)
    client.latest[STILL] = b"error|hidden"
    assert not client.is_well(writer, [5] * HOT)


def test_late_answers_and_exits_are_counted(writer):
    client = Client(None, b"t")
    client.answers = [(60.0, DEADLINE_SECONDS + 0.1, HOT, b"found")]
    client.gone = "end of file"
    row = client.judge("none", writer, ILL)
    assert (row.late, row.exits, row.slowest) == (1, 1, DEADLINE_SECONDS + 0.1)


@pytest.mark.parametrize(
    ("stalls", "slowest"),
    [
        ([], 0.2),
        ([(1.0, 2.0)], 0.2),
        ([(60.0, 60.1), (60.15, 60.3)], 0.05),  # a stall covers 0.15 of the 0.2 seconds before 60.2
    ],
)
def test_stalls_are_subtracted_from_the_time_of_an_answer(writer, stalls, slowest):
    client = Client(None, b"t")
    client.witnesses.stalls = stalls
    client.answers = [(60.2, 0.2, HOT, b"found"), (61.0, 0.01, HOT, b"found")]
    row = client.judge("none", writer, ILL)
    assert (row.slowest, row.by_the_clock) == (pytest.approx(slowest), 0.2)


def test_stalls_seen_by_several_witnesses_count_once():
    assert merged([(3.0, 4.0), (1.0, 2.0), (1.5, 2.5)]) == [(1.0, 2.5), (3.0, 4.0)]
    assert stalled([(1.0, 2.5), (3.0, 4.0)], 2.0, 3.5) == 1.0
