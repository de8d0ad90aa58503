"""Waiting for what other processes do: as short as can be, and never for ever."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def wait_for(condition: Callable[[], bool], seconds: float, failure: Callable[[], str]) -> None:
    """Return as soon as the condition holds; it is asked every few milliseconds.

    Raises:
        AssertionError: it does not within ``seconds``; with the text that ``failure`` makes then.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(failure())
        time.sleep(0.01)
