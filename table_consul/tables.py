"""Which source answers for which table, as the configuration says; and what ``smtpctl update table`` sets in motion."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from table_consul.config import Config, MetricsConfig
from table_consul.counters import Counters
from table_consul.errors import ConfigError, SourceError
from table_consul.services import DEFAULT_SERVICES, SERVICES, Service, Table
from table_consul.services.entries import Entries
from table_consul.services.values import DEFAULT_KEY
from table_consul.sources import Source

if TYPE_CHECKING:
    from table_consul.metrics import Exporter
    from table_consul.shortcut import Known
    from table_consul.sources.direct import DirectSource
    from table_consul.sources.watch import MirrorSource, Watch

# Names come from smtpd.conf; in the dialects of 2020, with each request.
REMEMBERED = 256
# In the dialects of 2020 one process may be asked about any number of tables; each mirror holds a connection to Consul,
# of which an agent grants a client 200 (its http_max_conns_per_client). Further tables are read directly.
MIRRORED_TABLES = 16


class Tables:
    """The source of every table, made when it is first asked: what a source imports costs more than the rest."""

    def __init__(self, load: Callable[[], Config]) -> None:
        """``load`` reads the configuration, or raises ConfigError; it is called here and at each update.

        Without a configuration that can be used every answer is an error that says why: ending the process would end
        the mail server with it, and the mail waits until the file is mended and the table updated.
        """
        self._load = load
        self.config: Config | None = None
        self.broken: ConfigError | None = None
        try:
            self.config = load()
        except ConfigError as error:
            self.broken = error
        self._tables: dict[str, Table] = {}
        self._file: Source | None = None
        self._direct: DirectSource | None = None
        self._mirrors: dict[str, MirrorSource] = {}
        self._former: dict[str, MirrorSource] = {}
        self.tally = Counters(self.table)
        self.started = time.time()
        self._exporter: Exporter | None = None
        self._named: str | None = None

    def table(self, name: str) -> Table:
        """How this table is laid out; the configured default stands in for an empty name.

        Raises:
            ConfigError: there can be no table of that name.
        """
        known = self._tables.get(name)
        if known is None:
            if self.config is None:
                raise (self.broken or ConfigError("no configuration")).with_traceback(
                    None
                )  # else it grows with each raise
            known = self.config.table(name or self.config.default_table)
            if len(self._tables) < REMEMBERED:
                self._tables[name] = known
        return known

    def services(self, name: str) -> list[str]:
        """The services to register for this table: those that answer with errors, too, if that is all they can."""
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
        """See responder.Source."""
        source = self._source(table, service)
        try:
            return source.entries(table, service, key, deadline)
        except SourceError:
            mirrored = self._mirrors.get(table.name)
            if mirrored is None or source is not mirrored or not mirrored.too_large(service):
                raise
            # It turned out to be too large while this request waited for the first load.
            return self._read_directly().entries(table, service, key, deadline)

    def known(self, table: str, service: str) -> Known | None:
        """The values of a service of exact keys, if the table has it and they are in memory; see shortcut.py."""
        layout = self._tables.get(table)
        mirrored = self._mirrors.get(table)
        if layout is None or mirrored is None or service not in layout.services:
            return None
        if SERVICES[service].patterns or SERVICES[service].answers != "value":
            return None
        from table_consul.shortcut import Known

        mirror = mirrored.mirror(SERVICES[service])
        state = mirror.state
        if state is None or service in state[0].forbidden or state[0].restored:
            return None
        known = Known(mirror, state, state[0].entries[service].values, state[1] + mirror.max_age)
        if SERVICES[service].default and b"%" in known.values.get(DEFAULT_KEY, b""):
            return None  # that entry is no answer as it stands, not even for its own key
        return known

    def update(self) -> None:
        """See responder.Source. A bad configuration changes nothing.

        Raises:
            TableConsulError: the configuration, the token or the file cannot be used.
        """
        config = self._load()
        former, self.config, self.broken = self.config, config, None
        self._tables.clear()
        if former is None or config != former:
            self._forget()
        if self._named is not None:
            self.prepare(self._named)
        for source in (self._file, self._direct, *self._mirrors.values()):
            if source is not None:
                source.update()

    def prepare(self, name: str) -> None:
        """Make the source of this table now, so that the first answer need not wait for it."""
        self._named = name
        if self.config is not None:
            table = self.table(name)
            self._source(table, SERVICES[table.services[0]])
            self._export()

    def watches(self) -> list[tuple[str, Watch]]:
        """Every watch there is, with the name of its table."""
        return [(name, watch) for name, mirrored in self._mirrors.copy().items() for watch in mirrored.watches]

    def _export(self) -> None:
        """See to it that metrics go where the configuration says, once smtpd has named the table."""
        if self._exporter is not None and self._exporter.is_alive():
            self._exporter.wake()
        elif self._named is not None and self.config is not None and self.config.metrics != MetricsConfig():
            from table_consul.metrics import Exporter

            self._exporter = Exporter(self.table(self._named).name, self)
            self._exporter.start()

    def _forget(self) -> None:
        """Part with what another configuration made, but for the copies in memory: Consul may be away just now."""
        self._former, self._mirrors = self._mirrors, {}
        for mirrored in self._former.values():
            mirrored.close()
        if self._direct is not None:
            self._direct.close()
        self._file = self._direct = None

    def _source(self, table: Table, service: Service) -> Source:
        mirrored = self._mirrors.get(table.name)
        if mirrored is not None and not mirrored.too_large(service):
            return mirrored
        assert self.config is not None
        address = self.config.consul.addresses[0]
        if address.startswith("file://"):
            if self._file is None:
                from table_consul.sources.export import FileSource

                self._file = FileSource(address.removeprefix("file://"))
            return self._file
        if table.mode == "mirror" and mirrored is None and len(self._mirrors) < MIRRORED_TABLES:
            return self._mirror(table)
        return self._read_directly()

    def _read_directly(self) -> Source:
        if self._direct is None:
            from table_consul import kv
            from table_consul.sources import direct

            assert self.config is not None
            self._direct = direct.DirectSource(kv.Client(self.config.consul))
        return self._direct

    def _mirror(self, table: Table) -> MirrorSource:
        from table_consul import kv
        from table_consul.sources import watch

        assert self.config is not None
        settings = self.config.consul
        former = self._former.pop(table.name, None)
        mirrored = self._mirrors[table.name] = watch.MirrorSource(table, lambda: kv.Client(settings), former)
        return mirrored
