from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from table_consul.backoff import FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS, Backoff, delay
from table_consul.errors import Unreachable


def outage():
    return Backoff("Consul at X", "answering error until it is back")


def lines(caplog):
    return [record.getMessage() for record in caplog.records]


def test_pauses_double_up_to_a_cap():
    assert [delay(failures, 0.0) for failures in range(1, 7)] == [0.25, 0.5, 1.0, 2.0, 4.0, 4.0]


def test_delay_without_a_failure_is_the_first_pause():
    assert delay(0, 0.0) == FIRST_PAUSE_SECONDS


def test_jitter_shortens_a_pause_by_up_to_a_quarter():
    assert (delay(99, 1.0), delay(99, 0.0)) == (LAST_PAUSE_SECONDS * 0.75, LAST_PAUSE_SECONDS)


@given(failures=st.integers(0, 10**9), chance=st.floats(0, 1))
def test_delay_never_exceeds_the_longest_pause(failures, chance):
    assert 0 < delay(failures, chance) <= LAST_PAUSE_SECONDS


def test_outage_logs_one_line_at_its_start_and_one_at_its_end(caplog):
    caplog.set_level(logging.DEBUG)
    found = outage()
    for second in range(5):
        found.failure(Unreachable("connection refused"), 100.0 + second, 0.0)
    found.success(107.5)
    found.success(108.0)
    assert lines(caplog) == [
        "Consul at X: connection refused; answering error until it is back",
        "Consul at X: recovered after 7.5 s (5 failed attempts)",
    ]


def test_success_without_an_outage_logs_nothing(caplog):
    outage().success(1.0)
    assert lines(caplog) == []


def test_second_outage_is_logged_and_starts_with_the_first_pause(caplog):
    found = outage()
    for now in (0.0, 1.0, 2.0):
        found.failure(Unreachable("a"), now, 0.0)
    found.success(3.0)
    assert (found.not_before, found.failure(Unreachable("b"), 4.0, 0.0)) == (0.0, FIRST_PAUSE_SECONDS)
    assert lines(caplog)[-1] == "Consul at X: b; answering error until it is back"


@pytest.mark.parametrize("now", [0.0, 1e9])
def test_no_attempt_is_made_during_a_pause(now):
    found = outage()
    wait = found.failure(Unreachable("a"), now, 0.5)
    assert (now + wait, now, "a") == (found.not_before, found.since, found.last_error)


def test_one_failed_attempt_is_logged_in_the_singular(caplog):
    found = outage()
    found.failure(Unreachable("a"), 1.0, 0.0)
    found.success(2.0)
    assert lines(caplog)[-1] == "Consul at X: recovered after 1.0 s (1 failed attempt)"
