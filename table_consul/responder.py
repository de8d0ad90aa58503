"""What smtpd is told: a request and a bucket in, a reply out.

Decides between ``not-found``, which bounces the mail, and ``error``, which keeps it. Knows neither the wire nor where
buckets come from; time is a number that the caller reads.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, islice

from table_consul.errors import EntryError, SourceError, TableConsulError, printable
from table_consul.protocol import Failed, Found, NotFound, Reply, Request, Updated
from table_consul.services import SERVICES, Service, Table, fold_key
from table_consul.services.entries import Entries
from table_consul.services.passwords import SAMPLE_SIZE, Verifier
from table_consul.services.values import MissingFields
from table_consul.sources import Source


class Responder:
    """Answers requests for any number of tables. Its only memory is where each fetch stands, and what hashes cost."""

    def __init__(self, tables: Callable[[str], Table], source: Source) -> None:
        """``tables`` tells how the table of that name is laid out; it may raise ConfigError."""
        self.tables = tables
        self.source = source
        self._last: dict[tuple[str, str], bytes] = {}
        self._verifier = Verifier()

    def answer(self, request: Request, arrived: float) -> Reply:
        """The reply to this request, which arrived at this moment. Never raises what the package raises on purpose."""
        try:
            if request.op == "update":
                self.source.update()
                return Updated()
            service = SERVICES.get(request.service)
            if service is None:
                return Failed(f"unknown service {printable(request.service)!r}")
            table = self.tables(request.table)
            if service.name not in table.services:
                return Failed(f"service {service.name} is not among the services of table {printable(table.name)!r}")
            return self._ask(request, service, table, arrived + table.deadline)
        except TableConsulError as error:
            return Failed(str(error), error)

    def _ask(self, request: Request, service: Service, table: Table, deadline: float) -> Reply:
        if service.answers == "check":
            return self._authenticate(request, table, deadline)
        if request.op == "fetch":
            bucket = self.source.entries(table, service, None, deadline)
            place = (table.name, service.name)
            after = bucket.next_after(self._last.get(place))
            if after is None:
                return NotFound()
            self._last[place], value = after
            return Found(value)
        bucket = self.source.entries(table, service, request.key, deadline)
        if request.op == "check":
            return Found() if bucket.contains(request.key) else NotFound()
        found = bucket.lookup(request.key)
        return NotFound() if found is None else Found(found)

    def _authenticate(self, request: Request, table: Table, deadline: float) -> Reply:
        """Whether the password is that of the user; nothing that is said or kept holds either of them.

        smtpd puts a colon between the two (smtpd: lka.c, lka_authenticate), so no user's name can hold one. Users are
        looked up in lower case like all else; the password is taken as it is. Both buckets are asked for whoever it is:
        where that is a read of Consul, the time it takes would tell who is in the first.
        """
        user, colon, password = request.key.partition(b":")
        if request.op != "check" or not colon:
            return Failed("the service auth answers check alone, with a key USER:PASSWORD")
        user = fold_key(user)
        buckets: list[Entries] = []
        stored: bytes | None = None
        place = b""
        lacking: MissingFields | None = None
        for name in ("auth", "credentials"):
            try:
                bucket = self.source.entries(table, SERVICES[name], user, deadline)
            except SourceError:
                if stored is None:
                    raise
                continue
            buckets.append(bucket)
            if stored is not None:
                continue
            place = bucket.path
            try:
                stored = bucket.lookup(user)
            except MissingFields as error:
                lacking = error
        if stored is None and lacking is not None:
            raise lacking.with_traceback(None)
        others = islice(chain.from_iterable(bucket.values.values() for bucket in buckets), SAMPLE_SIZE)
        try:
            verified = self._verifier.verify(table.name, stored, password, others, table.deadline)
        except EntryError as error:  # of what stands in Consul, so that its key may be named
            raise EntryError(f"{printable(place + user)}: {error}") from None
        return Found() if verified else NotFound()
