"""Tables of your own in Python, for any version of OpenSMTPD: functions that check, look up and fetch.

    from table_consul import callbacks

    def lookup(table, service, key):
        return "gilles" if (service, key) == ("alias", "root") else None

    callbacks.serve(lookup=lookup)

smtpd runs the program if it is installed in OpenSMTPD's libexec folder as ``table-NAME`` and smtpd.conf contains
``table users NAME:/etc/mail/users.conf``; the path becomes the program's first argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, ParamSpec, TypeVar

from table_consul import log
from table_consul.errors import FunctionError, ReplyError
from table_consul.protocol import Failed, Found, NotFound, Reply, Request, Updated
from table_consul.server import Server, claim_stdio, has_secrets
from table_consul.services import DEFAULT_SERVICES, SERVICES

P = ParamSpec("P")
T = TypeVar("T")

Check = Callable[[str, str, str], bool]
Lookup = Callable[[str, str, str], str | None]
Fetch = Callable[[str, str], str | None]
Update = Callable[[str], None]


class Callbacks(NamedTuple):
    """Answers by calling the functions passed to ``serve``."""

    check: Check | None
    lookup: Lookup | None
    fetch: Fetch | None
    update: Update | None
    registered: Sequence[str]

    def services(self, _name: str) -> list[str]:
        """The services given to ``serve``; every table has the same."""
        return list(self.registered)

    def warm_up(self, _name: str) -> None:
        """Do nothing: functions need no preparation."""

    def answer(self, request: Request, _arrived: float) -> Reply:
        """The reply of the function for this operation; the caller turns exceptions into error replies.

        Raises:
            FunctionError: the function raised an exception.
            ReplyError: smtpd cannot be given what the function returned.
        """
        table, service = request.table, request.service
        key = request.key.decode("utf-8", "surrogateescape")
        if request.op == "update":
            if self.update is not None:
                _call(request, self.update, table)
            return Updated()
        if service not in self.registered:
            return Failed(f"service {service} is not among the services of this table")
        if request.op == "check" and self.check is not None:
            return Found() if _call(request, self.check, table, service, key) else NotFound()
        if request.op in ("check", "lookup") and self.lookup is not None:
            value = _call(request, self.lookup, table, service, key)
        elif request.op == "fetch" and self.fetch is not None:
            value = _call(request, self.fetch, table, service)
        else:
            return Failed(f"this table does not implement {request.op}")
        if value is None:
            return NotFound()
        if request.op == "check":
            return Found()
        try:
            data = value.encode("utf-8", "surrogateescape")
        except (AttributeError, UnicodeEncodeError) as error:
            raise ReplyError(f"a value must be a string or None: {error}") from error
        return Found(data)


def _call(request: Request, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of a function. A coroutine counts as true, so every key would be in the table.

    Raises:
        FunctionError: it raised an exception.
        ReplyError: the result is a coroutine.
    """
    try:
        result = function(*args, **kwargs)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        text = "" if has_secrets(request.service) else str(error)
        raised = type(error).__name__ + (f": {text}" if text else "")
        raise FunctionError(f"the function for {request.op} raised {raised}") from error
    if hasattr(result, "__await__"):
        raise ReplyError("the function returns a coroutine (write def instead of async def)")
    return result


def serve(
    *,
    check: Check | None = None,
    lookup: Lookup | None = None,
    fetch: Fetch | None = None,
    update: Update | None = None,
    services: Sequence[str] = DEFAULT_SERVICES,
    program: str = "table",
) -> None:
    """Answer smtpd, in whichever dialect it speaks, until it closes the conversation.

    An exception or an invalid value becomes an error reply: smtpd keeps the message, and the reason is logged to syslog
    or a terminal, as are warnings of `logging`. Only None, or for check a false value, means "not found", and smtpd
    rejects the message. smtpd waits for every reply.

    Until this is called, standard output is the socket to smtpd, which exits if anything is printed; afterwards it is
    standard error. It returns at the end of the conversation; threads that then remain must be daemons, or the process
    does not exit. A key is in lower case; bytes that are not UTF-8 are surrogates, as in `os.fsdecode`.

    Args:
        check: whether ``(table, service, key)`` is in the table. Without it, whether ``lookup`` finds something.
        lookup: the value of ``(table, service, key)``, one line of text, or None.
        fetch: the next element of ``(table, service)``, or None when the table is empty.
        update: called with the table's name after ``smtpctl update table``.
        services: the services to register, by their names in smtpd-tables(7).
        program: the name at the start of each log line.

    Raises:
        ValueError: a service that smtpd does not know; smtpd would exit when it is registered.
    """
    if isinstance(services, str) or not SERVICES.keys() >= {*services}:
        raise ValueError(f"services must be a list of {', '.join(SERVICES)}: {services!r}")
    log.start("info", "auto", "", program)
    answerer = Callbacks(check, lookup, fetch, update, services)
    Server(answerer, lambda table: log.start("info", "auto", table, program)).serve(*claim_stdio())
