"""Every table by its name: its settings, the source of its entries, and ``smtpctl update table``."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import msgspec

from table_consul.config import Config
from table_consul.errors import ConfigError, SourceError, TableConsulError
from table_consul.fallback import explain
from table_consul.protocol import Failed, Reply, Request, Updated
from table_consul.responder import Counters, Responder, replies_from
from table_consul.services import DEFAULT_SERVICES, SERVICES, Service, Table
from table_consul.services.entries import Entries
from table_consul.sources import Source

if TYPE_CHECKING:
    from table_consul import kv
    from table_consul.sources.direct import DirectSource
    from table_consul.sources.mirror import Mirror, Snapshot
    from table_consul.sources.watch import MirrorSource, Watch

# Names come from smtpd.conf; in the dialects of 2020, with each request.
MAX_NAMES = 256
# In the dialects of 2020 one process may be asked about any number of tables; each mirror holds a connection to Consul,
# and an agent allows a client 200 (limits.http_max_conns_per_client). Further tables are read directly.
MAX_MIRRORED_TABLES = 16


@contextlib.contextmanager
def packages() -> Iterator[None]:
    """Turn whatever an import in this block raises, as from a broken package, into an error reply."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise TableConsulError(explain(error)) from error


class Route(msgspec.Struct, frozen=True, gc=False):
    """The function that replies to one operation on one service of one table, in one state of a mirror."""

    reply: Callable[[bytes], Reply]
    mirror: Mirror
    state: tuple[Snapshot, float]
    """The route is valid only in this state, until the next edit or confirmation."""
    good_until: float
    """On the clock of requests."""


class Tables:
    """Answers requests for every table. Sources are created at first use, because importing them takes longest.

    Only the thread that answers smtpd may use this, except `config`, `table` and `watches`, which any thread may.
    """

    def __init__(self, load: Callable[[], Config], on_change: Callable[[], None] = lambda: None) -> None:
        """``load`` reads the configuration, or raises ConfigError; it is called here and at each update.

        ``on_change`` is called when the name of the first table is known, and after each update.

        With an invalid configuration every reply is an error with the reason. Exiting would end the mail server; with
        errors, mail waits until the file is fixed and the table updated.
        """
        self._load = load
        self._on_change = on_change
        self._layouts: tuple[Config | None, dict[str, Table]] = (None, {})
        """The configuration and its tables, by name. One assignment replaces both: a table that another thread adds
        during an update belongs to the former configuration, and is dropped with it."""
        self.broken: ConfigError | None = None
        try:
            self._layouts = (load(), {})
        except ConfigError as error:
            self.broken = error
        self.counters = Counters(self.table)
        self.started = time.time()
        """Seconds since the epoch."""
        self.name: str | None = None
        """The table's name, from smtpd's handshake or its first request."""
        self._responder = Responder()
        self._routes: dict[tuple[str, str, str], Route] = {}
        self._file: Source | None = None
        self._direct: DirectSource | None = None
        self._mirrors: dict[str, MirrorSource] = {}
        self._former: dict[str, MirrorSource] = {}

    @property
    def config(self) -> Config | None:
        """The configuration; None until there is a valid one."""
        return self._layouts[0]

    def answer(self, request: Request, arrived: float) -> Reply:
        """The reply to this request, which arrived at this moment. Never raises TableConsulError."""
        try:
            route = self._routes[request.table, request.service, request.op]
            if route.mirror.state is route.state and arrived <= route.good_until:
                return route.reply(request.key)
        except KeyError:
            pass
        except TableConsulError as error:
            return Failed(str(error), error)
        return self._answer(request, arrived)

    def _answer(self, request: Request, arrived: float) -> Reply:
        """As `answer`, for requests without a route."""
        try:
            if request.op == "update":
                self.update()
                self.table(request.table)  # raises, if its name is invalid
                return Updated()
            table = self.table(request.table)
            deadline = arrived + table.deadline

            def read(service: Service, key: bytes | None) -> Entries:
                entries = self.entries(table, service, key, deadline)
                if key is not None and service.answers != "check" and service.name == request.service:
                    self._add_route(request, service, entries)
                return entries

            return self._responder.answer(request, table, read, lambda: deadline - time.monotonic())
        except TableConsulError as error:
            return Failed(str(error), error)

    def _add_route(self, request: Request, service: Service, entries: Entries) -> None:
        """Store a route, if these entries are a mirror's, are complete for every key, and need no clock."""
        source = self._mirrors.get(entries.table.name)
        if source is None or entries.timed:
            return
        mirror = source.by_service[service.name].mirror
        state = mirror.state
        if state is None or state[0].entries[service.name] is not entries or service.name in state[0].hidden:
            return
        # An invalid route would keep its snapshot in memory.
        self._routes = {kind: route for kind, route in self._routes.items() if route.mirror.state is route.state}
        if len(self._routes) >= MAX_NAMES:
            self._routes.clear()
        kind = (request.table, request.service, request.op)
        self._routes[kind] = Route(replies_from(entries, request.op), mirror, state, state[1] + mirror.max_age)

    def table(self, name: str) -> Table:
        """The settings of this table; an empty name is that of the configured default.

        Raises:
            ConfigError: there is no valid configuration, or the name is invalid.
        """
        config, tables = self._layouts
        table = tables.get(name)
        if table is None:
            if config is None:
                raise ConfigError(str(self.broken))
            table = config.table(name or config.defaults.name)
            if len(tables) < MAX_NAMES:
                tables[name] = table
        return table

    def services(self, name: str) -> list[str]:
        """The services to register for this table, even if it can only return errors."""
        try:
            return list(self.table(name).services)
        except ConfigError:
            return list(DEFAULT_SERVICES)

    def procexec_reply(self, name: str) -> str:
        """The first word of replies about this table in the dialect of 2020, as configured."""
        try:
            return self.table(name).procexec_reply
        except ConfigError:
            return "auto" if self.config is None else self.config.defaults.procexec_reply

    def entries(self, table: Table, service: Service, key: bytes | None, deadline: float) -> Entries:
        """The entries for this key (None: all), from the table's configured source.

        Raises:
            SourceError: the source has no answer by the deadline.
        """
        source = self.source(table, service)
        try:
            return source.entries(table, service, key, deadline)
        except SourceError:
            mirrored = self._mirrors.get(table.name)
            if source is not mirrored or not mirrored.by_service[service.name].too_large:
                raise
            # It turned out to be too large while this request waited for the first load.
            return self._read_directly().entries(table, service, key, deadline)

    def update(self) -> None:
        """Reread the configuration and the data of every source. An invalid configuration changes nothing.

        Raises:
            TableConsulError: the configuration, the token or the file cannot be used.
        """
        config = self._load()
        former, self._layouts, self.broken = self.config, (config, {}), None
        self._routes.clear()  # some may be for tables that the configuration now excludes
        if former is None or config != former:
            self.close()
        if self.name is not None:
            self.warm_up(self.name)
        for source in (self._file, self._direct, *self._mirrors.values()):
            if source is not None:
                source.update()

    def warm_up(self, name: str) -> None:
        """Create the source of this table now, so that the first reply need not wait for it."""
        self.name = name
        if self.config is not None:
            table = self.table(name)
            self.source(table, SERVICES[table.services[0]])
            self._on_change()

    def close(self) -> None:
        """Close every source. Later mirrors of the same tables adopt the data in memory."""
        for mirrored in self._mirrors.values():
            mirrored.close()
        self._former |= self._mirrors
        self._mirrors = {}
        self._routes.clear()
        if self._direct is not None:
            self._direct.close()
        self._file = self._direct = None

    def watches(self) -> list[tuple[str, Watch]]:
        """Every watch, with the name of its table."""
        return [(name, watch) for name, mirrored in self._mirrors.copy().items() for watch in mirrored.watches]

    def source(self, table: Table, service: Service) -> Source:
        """The source of this service of this table, created at first use; needs a configuration."""
        mirrored = self._mirrors.get(table.name)
        if mirrored is not None and not mirrored.by_service[service.name].too_large:
            return mirrored
        assert self.config is not None
        if self.config.consul.file is not None:
            self._former.clear()
            if self._file is None:
                with packages():
                    from table_consul.sources.export import FileSource
                self._file = FileSource(self.config.consul.file)
            return self._file
        if table.mode == "mirror" and mirrored is None and len(self._mirrors) < MAX_MIRRORED_TABLES:
            with packages():
                from table_consul.sources.watch import MirrorSource
            former = self._former.get(table.name)
            mirrored = self._mirrors[table.name] = MirrorSource(table, self._connect(), former)
            self._former.pop(table.name, None)
            if not mirrored.by_service[service.name].too_large:
                return mirrored
        self._former.pop(table.name, None)
        return self._read_directly()

    def _connect(self) -> Callable[[], kv.Client]:
        assert self.config is not None
        with packages():
            from table_consul import kv
        return functools.partial(kv.Client, self.config.consul)

    def _read_directly(self) -> Source:
        if self._direct is None:
            with packages():
                from table_consul.sources.direct import DirectSource
            self._direct = DirectSource(self._connect()())
        return self._direct
