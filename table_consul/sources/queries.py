"""The blocking queries of a large table: each waits in a thread of its own, and the watch takes all responses."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable
from functools import partial

from msgspec.structs import replace

from table_consul import kv
from table_consul.errors import SourceError, printable
from table_consul.services import Table
from table_consul.sources import mirror
from table_consul.sources.mirror import QueryState

# For a new process, which may end soon.
LEAST_WAIT_SECONDS = 1.0
# The most to read of a response with nothing new, to keep the connection: enough for the completeness query.
DISCARD_BYTES = 1 << 10

Answer = tuple["Query", "kv.Response | Exception"]

# An error and its hint.
NO_THREAD = ("cannot start another thread", "raise the limit of processes or memory for smtpd")


class Query(threading.Thread):
    """A thread that sends blocking queries on a connection of its own, and queues the responses for the watch."""

    def __init__(self, prefix: bytes, client: kv.Client, answers: queue.SimpleQueue[Answer | None]) -> None:
        super().__init__(name=f"query {printable(prefix)}", daemon=True)
        self.prefix = prefix
        self.client = client
        client.transport.narrow = True
        client.discard_bytes = DISCARD_BYTES
        self.state = QueryState()
        self.due: float | None = 0.0
        """When to send the next query; None during a query."""
        self.asked = self.wait = 0.0
        self.asked_index = 0
        """The index of the latest query."""
        self.answered = 0.0
        """When the latest query was sent whose response was processed."""
        self.overtaken = math.inf
        """Since when its range is known to have changed during the query."""
        self.outdated = False
        """The response that it waits for no longer proves anything."""
        self.reload = False
        """Token and TLS files must be reread before the next query."""
        self.first = True
        """It waits on the index of the whole table, which may be above its own."""
        self._answers = answers
        self._questions: queue.SimpleQueue[Callable[[], kv.Response] | None] = queue.SimpleQueue()
        with contextlib.suppress(RuntimeError):  # a limit of processes or memory; `ask` reports it
            self.start()

    def ask(self, table: Table, most_wait: float, *, keys: bool, separator: str | None) -> None:
        """Send a query for changes after the latest index; ``keys``, ``separator`` as in `kv.Client.blocking_query`."""
        self.due, self.asked, self.asked_index = None, time.monotonic(), self.state.index
        self.overtaken = math.inf
        # While this query does not wait the others do, and a restored snapshot ends them. The first wait is short: if
        # an agent's max_query_time ended it, the range's own index would look as if it went backwards.
        state = replace(self.state, gap=self.first)
        self.wait = min(mirror.wait_seconds(state, table.max_age, hidden=False), most_wait)
        if not self.is_alive():
            self._answers.put((self, SourceError(*NO_THREAD)))
            return
        ask = partial(self.client.blocking_query, self.prefix, keys=keys, separator=separator)
        self._questions.put(partial(ask, index=self.state.index, wait=self.wait, timeout=table.deadline))

    def run(self) -> None:
        answer: kv.Response | Exception | None = None
        while (question := self._questions.get()) is not None:
            try:
                if self.reload:
                    self.reload = False
                    self.client.reload()
                answer = question()
            except Exception as error:  # noqa: BLE001 - the watch raises it
                answer = error
            self._answers.put((self, answer))
        if isinstance(answer, kv.Response):
            answer.close()
        self.client.close()

    def stop(self) -> None:
        """End the thread soon, without waiting for it."""
        self._questions.put(None)
        self.client.interrupt()


class Queries:
    """The queries of one watch, which outlive its ranges.

    Consul (1.8 to 1.22) does not notice that a client closes a connection with a waiting query: until the wait ends,
    the connection counts against the limit of the client's address.
    """

    def __init__(self, connect: Callable[[], kv.Client]) -> None:
        self.answers: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self._connect = connect
        self._by_prefix: dict[bytes, Query] = {}
        self._since = time.monotonic()

    def watch(self, prefix: bytes, index: int) -> Query:
        """The query for changes below this prefix after the index, a new one if there is none."""
        query = self._by_prefix.get(prefix)
        if query is not None and query.due is None and query.state.index > index:
            self.end(query)  # it would wait for an index that may be far away
            query = None
        if query is None:
            query = self._by_prefix[prefix] = Query(prefix, self._connect(), self.answers)
        query.outdated, query.first = query.due is None, True
        query.state = QueryState(index=index, seen=index, longest_wait=query.state.longest_wait)
        return query

    @property
    def most_wait(self) -> float:
        """In seconds, at most the age of the process: a restart loop must not fill Consul with long waits."""
        return max(LEAST_WAIT_SECONDS, time.monotonic() - self._since)

    def reload(self) -> None:
        """Make each thread reread token and TLS files before its next query."""
        for query in self._by_prefix.values():
            query.reload = True

    def end(self, query: Query) -> None:
        """End this query."""
        query.stop()
        if self._by_prefix.get(query.prefix) is query:
            del self._by_prefix[query.prefix]

    def end_idle(self) -> None:
        """End the queries that do not wait for Consul; to be called while no ranges are watched."""
        while not self.answers.empty():
            if (answered := self.answers.get()) is not None:
                query, answer = answered
                query.due = 0.0
                if isinstance(answer, kv.Response):
                    answer.close()
        for query in [*self._by_prefix.values()]:
            if query.due is not None:
                self.end(query)

    def close(self) -> None:
        """End all queries."""
        for query in [*self._by_prefix.values()]:
            self.end(query)
