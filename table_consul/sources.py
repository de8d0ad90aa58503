"""Which source answers for which table, as the configuration says; and what ``smtpctl update table`` sets in motion."""

from __future__ import annotations

from collections.abc import Callable

from table_consul.config import Config
from table_consul.errors import ConfigError
from table_consul.responder import Source
from table_consul.services import DEFAULT_SERVICES, Bucket, Service, Table

# Names come from smtpd.conf; in the dialects of 2020, with each request.
REMEMBERED = 256


class Sources:
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
        self._direct: Source | None = None

    def table(self, name: str) -> Table:
        """How this table is laid out; the configured default stands in for an empty name.

        Raises:
            ConfigError: there can be no table of that name.
        """
        known = self._tables.get(name)
        if known is None:
            if self.config is None:
                raise self.broken or ConfigError("no configuration")
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

    @property
    def procexec_reply(self) -> str:
        """The first word of replies in the dialect of 2020, as configured."""
        return "auto" if self.config is None else self.config.defaults.procexec_reply

    def bucket(self, table: Table, service: Service, key: bytes | None, deadline: float) -> Bucket:
        """See responder.Source."""
        return self._source(table).bucket(table, service, key, deadline)

    def update(self, deadline: float) -> None:
        """See responder.Source. A bad configuration changes nothing.

        Raises:
            TableConsulError: the configuration, the token or the file cannot be used.
        """
        config = self._load()
        if self.config is None or config.consul != self.config.consul:
            self._file = self._direct = None
        self.config = config
        self.broken = None
        self._tables.clear()
        for source in (self._file, self._direct):
            if source is not None:
                source.update(deadline)

    def prepare(self, name: str) -> None:
        """Make the source of this table now, so that the first answer need not wait for it."""
        if self.config is not None:
            self._source(self.table(name))

    def _source(self, table: Table) -> Source:  # noqa: ARG002 - the mirror will ask
        assert self.config is not None
        address = self.config.consul.addresses[0]
        if address.startswith("file://"):
            if self._file is None:
                from table_consul.file import File

                self._file = File(address.removeprefix("file://"))
            return self._file
        if self._direct is None:
            from table_consul import direct, kv

            self._direct = direct.Direct(kv.Client(self.config.consul))
        return self._direct
