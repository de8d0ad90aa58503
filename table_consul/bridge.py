"""Answers by asking a child: started when it is needed, started again after a pause when it failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from random import random

from table_consul.backoff import Backoff
from table_consul.child import END_SECONDS, Child, ChildError, HandshakeRefused
from table_consul.protocol import Failed, Reply, Request
from table_consul.services import DEFAULT_SERVICES, SERVICES


class Bridge:
    """One command, at most one process of it at a time. Its methods are those that server.Server calls.

    Which dialect the command speaks is found out once. Its first process is told the handshake of ``smtpd-tables``, to
    which one of 2020 answers nothing, or by ending: then it is spoken to as one of 2020. While neither has led to an
    answer, its processes are spoken to in turns.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[], Sequence[str]],
        dialect: str | None,
        deadline: float,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random,
    ) -> None:
        """``command`` finds the command called ``name`` each time it is started, and may raise OSError.

        ``dialect`` is None to find it out; ``deadline`` is the time from the arrival of a request to its answer, in
        seconds.
        """
        self._name = name
        self._command = command
        self._known = dialect
        self._guess = dialect
        self._deadline = deadline
        self._clock = clock
        self._chance = chance
        self._child: Child | None = None
        self._outage = Backoff(name, "answering error until it runs again")

    def services(self, table: str) -> list[str]:
        """Those that the child offers, if it says so in time; else all. In imsg smtpd is not told."""
        try:
            offered = self._running(table).offered(self._clock() + self._deadline)
        except HandshakeRefused:
            self._drop()
            self._guess = "procexec"
            offered = set()
        except ChildError as error:
            self._failed(error)
            offered = set()
        return [name for name in SERVICES if name in offered] or list(DEFAULT_SERVICES)

    def warm_up(self, table: str) -> None:
        """Start the child, that it may be ready when the first question comes."""
        try:
            self._running(table)
        except ChildError as error:
            self._failed(error)

    def answer(self, request: Request, arrived: float) -> Reply:
        """What the child answers, else Failed; within the deadline either way."""
        if self._child is None and self._clock() < self._outage.not_before:
            error = ChildError(self._outage.last_error)
            return Failed(f"{self._name}: {error}; it will be started again", error)
        try:
            reply = self._ask(request, arrived + self._deadline)
        except ChildError as error:
            self._failed(error)
            return Failed(f"{self._name}: {error}", error)
        return reply

    def close(self) -> None:
        """End the child as smtpd would, by end of file."""
        if self._child is not None:
            self._child.close(END_SECONDS)
            self._child = None

    def _ask(self, request: Request, deadline: float) -> Reply:
        child = self._child or self._running(request.table)
        try:
            reply = child.ask(request, deadline)
        except HandshakeRefused:
            if self._known is not None or self._guess == "procexec":
                raise
            self._drop()
            self._guess = "procexec"
            child = self._running(request.table)
            reply = child.ask(request, deadline)
        if child.proven and (self._known is None or self._outage.since is not None):
            self._known = child.dialect
            self._outage.success(self._clock())
        return reply

    def _running(self, table: str) -> Child:
        if self._child is None:
            try:
                command = self._command()
            except OSError as error:
                raise ChildError(error.strerror or str(error)) from error
            self._child = Child(command, table, self._known or self._guess, self._clock)
        return self._child

    def _failed(self, error: ChildError) -> None:
        child = self._child
        if child is not None and child.proven:
            self._known = child.dialect
        elif self._known is None:
            self._guess = None if self._guess == "procexec" else "procexec"
        self._drop()
        self._outage.failure(error, self._clock(), self._chance())

    def _drop(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None
