"""The history of keys in Consul (written, deleted, hidden), and the answers allowed at a given time."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

from tests.rig.consul import ConsulError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.rig.consul import ConsulAgent

# The last key of one range of a large table and the first of the next: both watched, one in the rest, both in the rest.
NAMES = (
    *("bzzz", "c000", "hzzz", "i000", "user000999z", "user001", "user004999z", "user005"),
    *("xzzz", "y000", "yzzz", "z000"),
)
HOT = len(NAMES)
# An edit takes effect within milliseconds; this allows for processors that are busy with the test.
FRESH_SECONDS = 3.0


class Writer(threading.Thread):
    """Writes new values to the ``NAMES`` below a prefix, through any member that accepts them, until it is stopped.

    An unacknowledged write may still take effect later. Every write depends on the last index (``cas``): a late one
    fails, and versions only grow.
    """

    def __init__(self, members: list[ConsulAgent], folder: str) -> None:
        super().__init__(name="writer", daemon=True)
        self._members = list(members)
        self._folder = folder
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._version = 0
        self.attempted = [0] * HOT
        self.acknowledged: list[list[tuple[float, int]]] = [[] for _ in range(HOT)]
        self.hidden: dict[int, tuple[float, float]] = {}
        """The periods in which a question may be an error because its key is hidden, by number of the question."""
        self.deleted: dict[int, tuple[float, float]] = {}
        """The times when the deletion of a key was requested and acknowledged, by number of its question."""

    def run(self) -> None:
        number = 0
        while not self._end.is_set():
            with self._turn:
                self.write(number % HOT, seconds=0.0)
            number += 1
            self._end.wait(0.02)

    def stop(self) -> None:
        self._end.set()
        self.join()

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """Write nothing within the block, so that no edit ends a wait."""
        with self._turn:
            yield

    def write(self, key: int, seconds: float) -> int:
        """Write a new version, with retries for ``seconds``; its number. With 0, one failed attempt is ignored."""
        with self._lock:
            self._version += 1
            version = self._version
            self.attempted[key] = version
            deadline = time.monotonic() + seconds
            while not self._put(f"/v1/kv/{self._folder}/alias/{NAMES[key]}", f"v{version}"):
                if time.monotonic() > deadline:
                    assert not seconds, "the cluster accepts no write after the end of the fault"
                    return version
                time.sleep(0.02)
            self.acknowledged[key].append((time.monotonic(), version))
            return version

    def write_all(self, seconds: float = 30.0) -> list[int]:
        """Write a new version of every key, all acknowledged; versions by key."""
        return [self.write(key, seconds) for key in range(HOT)]

    def _put(self, path: str, value: str) -> bool:
        try:
            index = self._index(path)
            done = self._members[0].request("PUT", f"{path}?cas={index}", value.encode(), timeout=1) is True
        except (OSError, ConsulError):
            done = False
        if not done:
            self._members.append(self._members.pop(0))
        return done

    def _index(self, path: str) -> int:
        try:
            return self._members[0].request("GET", f"{path}?consistent", timeout=1)[0]["ModifyIndex"]
        except ConsulError as error:
            if error.status == 404:
                return 0
            raise

    def newest(self, key: int, before: float) -> int:
        """The last version acknowledged before this time; 0 for none."""
        with self._lock:
            known = self.acknowledged[key]
        return max((version for when, version in known if when <= before), default=0)
