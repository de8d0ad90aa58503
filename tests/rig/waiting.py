"""Wait for other processes, with a timeout."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def wait_for(condition: Callable[[], bool], seconds: float, failure: Callable[[], str]) -> None:
    """Return once the condition is true, which is checked every few milliseconds.

    Raises:
        AssertionError: it is false for ``seconds``; with the text of ``failure``.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(failure())
        time.sleep(0.01)
