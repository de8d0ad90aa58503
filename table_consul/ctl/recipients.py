"""How smtpd expands aliases: the recipients of one address with its lookups, and all aliases that smtpd rejects.

Pure. This follows smtpd's lka_session.c, aliases.c, forward.c, expand.c and to.c; docstrings name the functions. Other
domains are not followed, because tables do not decide about them.

smtpd expands breadth first. It rejects the recipient if any alias is nested too deeply, or if no recipient is left. It
skips a user that it has already expanded below the same address: a loop of users that also deliver elsewhere is
harmless. It expands an address each time it occurs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from table_consul.errors import EntryError, printable
from table_consul.protocol import Failed, Found, Reply
from table_consul.services import compiled
from table_consul.services.addresses import COMMAND_BYTES, DELIMITER, Element, Kind, parse_element, split_list
from table_consul.services.judge import element_problem
from table_consul.services.values import LINE_MAX

# smtpd keeps the elements of a value in this order (smtpd.h, enum expand_type).
_ORDER: tuple[Kind, ...] = ("user", "file", "command", "include", "address", "error")
EXPAND_DEPTH = 10
# An address is expanded again below each other address, so the depth alone does not limit the work.
ELEMENTS_MAX = 200_000
# smtpd: forward.c, MAX_EXPAND_NODES, which counts every element of the expansion so far.
FORWARD_NODES = 100
PERMANENT = "524 5.2.4 Mailing list expansion problem"
TEMPORARY = "424 4.2.4 Mailing list expansion problem"
# For all aliases together: the elements to follow, and how many more for each alias of the table.
STEPS, STEPS_PER_ALIAS = 300_000, 20
TOO_NESTED = "too many nested aliases to follow, so smtpd may reject mail to this alias (nest fewer aliases)"
# Of an element that is looked up again; / and | start a file and a command.
_LOCAL_PART = rb"[A-Za-z0-9!#$%*?^{}`~&'+=_.-][A-Za-z0-9!#$%*/?|^{}`~&'+=_.-]*"


class Lookup(NamedTuple):
    """A lookup and its reply; ``nested`` is the number of aliases that lead to it."""

    table: str
    """``alias``, ``virtual`` or ``userinfo``; ``include`` or ``forward`` for a file, whose path is the key."""
    key: bytes
    reply: Reply
    nested: int


class Outcome(NamedTuple):
    """The result of expanding an address."""

    lookups: list[Lookup]
    recipients: list[Element]
    """In smtpd's order; none if it rejects the address."""
    rejection: str | None = None
    """The reply to RCPT."""
    cause: str = ""


class File(NamedTuple):
    """A file that smtpd reads to expand an alias or a user."""

    path: bytes
    data: bytes | None = None
    """None if it cannot be read."""
    problem: str = ""
    ignored: bool = False
    """smtpd ignores this file because of the problem."""
    reply: str = ""
    """smtpd's reply to RCPT because of the problem."""


class Tables(NamedTuple):
    """The tables of the actions in smtpd.conf, their domains, and the files besides them."""

    lookup: Callable[[str, bytes], Reply]
    """Takes ``alias``, ``virtual`` or ``userinfo``, and a key."""
    local: Callable[[bytes], bool]
    """Whether users of this domain are looked up as ``alias``; b"" means no domain."""
    virtual: Callable[[bytes], bool] = lambda _domain: False
    """Whether addresses of this domain are looked up as ``virtual``."""
    delimiter: bytes = b"+"
    include: Callable[[bytes], File] = File
    """Takes the path of an included file."""
    forward: Callable[[bytes], File | None] = lambda _userinfo: None
    """Takes the answer of ``userinfo``; None if there is no ~/.forward."""


class _Node(NamedTuple):
    element: Element
    number: int
    parent: _Node | None = None
    depth: int = 0
    virtual: bool = False
    """The next lookup is in ``virtual``, not in ``alias``."""

    @property
    def same_user(self) -> bool:
        """Whether this is a user in its own alias, which smtpd delivers to (smtpd: expand.c, sameuser)."""
        return self.parent is not None and self.element.kind == "user" and self.element == self.parent.element

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for nodes that smtpd treats as duplicates (smtpd: expand.c, expand_cmp)."""
        by_user = self._ancestor("user") if self.element.kind in ("file", "command") else None
        return (self.element, self.same_user, self._ancestor("address"), by_user)

    def _ancestor(self, kind: Kind) -> int | None:
        node = self.parent
        while node is not None and node.element.kind != kind:
            node = node.parent
        return None if node is None else node.number


class _RejectedError(Exception):
    """smtpd rejects the recipient: the reply to RCPT, and its cause."""


def parse_line(line: bytes) -> tuple[list[Element], str]:
    """The elements of a line of a file until the first invalid one, and its problem (smtpd: expand.c, expand_line)."""
    if len(line) >= LINE_MAX:
        return [], f"a line has more than {LINE_MAX - 1} bytes"
    found: list[Element] = []
    problem = ""
    while True:
        try:
            texts = split_list(line)
            break
        except EntryError:
            problem, line = "a line ends inside a quote or an escape", line.rpartition(b",")[0]
    for text in texts:
        element = parse_element(text)
        if element is None:
            return found, f"an element {element_problem(text) or 'is invalid'}"
        if element.kind != "include":  # smtpd does not nest them
            found.append(element)
    return found, problem


def join_lines(data: bytes, continuation: bytes, comment: bytes) -> Iterator[bytes]:
    """Yield the lines of a file without comments, continued ones joined (fparseln(3))."""
    begun = b""
    for line in data.split(b"\n"):
        line = line.partition(b"\0")[0]  # noqa: PLW2901 - the end of a string in C
        if comment and (found := compiled(rb"(?s)((?:[^\\#]|\\.)*)#").match(line)):
            line = found[1]  # noqa: PLW2901 - the part before the comment
        before = line[:-1]
        if line.endswith(continuation) and (len(before) - len(before.rstrip(b"\\"))) % 2 == 0:  # not escaped
            begun += before
            continue
        yield begun + line
        begun = b""
    yield begun


def parse_address(address: bytes) -> Element:
    """The local part and the domain of a recipient (smtpd: to.c, text_to_mailaddr)."""
    local, at, domain = address.rpartition(b"@")
    return Element("address", local, domain) if at else Element("address", address)


def expand(address: bytes, tables: Tables) -> Outcome:
    """The outcome for a recipient, in time linear in the elements that smtpd expands."""
    expansion = _Expansion(tables)
    try:
        expansion.run(parse_address(address))
    except _RejectedError as rejected:
        return Outcome(expansion.lookups, [], *rejected.args)
    return Outcome(expansion.lookups, expansion.recipients)


class _Expansion:
    """A session of smtpd's lka_session.c, without the rules of smtpd.conf."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self.lookups: list[Lookup] = []
        self.recipients: list[Element] = []
        self._queue: deque[_Node] = deque()
        self._seen: set[tuple[object, ...]] = set()
        self._count = 0
        self._nodes = 1
        """As ``_count``, without duplicates, and with the address."""
        self._forwarded: dict[int, bool] = {}
        """The numbers of the users whose ~/.forward was looked for, and whether their uid is 0."""

    def run(self, address: Element) -> None:
        """Expand breadth first, until nothing is left or something rejects the recipient."""
        self._queue.append(_Node(address, 0))
        while self._queue:
            self._expand(self._queue.popleft())
        if not self.recipients:
            cause = "no recipient is left, because the aliases form a loop (break the loop)"
            raise _RejectedError(PERMANENT, cause)

    def _expand(self, node: _Node) -> None:
        element = node.element
        if node.depth >= EXPAND_DEPTH:
            where = printable(bytes(element))
            cause = f"aliases are nested {EXPAND_DEPTH} deep at {where} (break the loop, or shorten the chain)"
            raise _RejectedError(PERMANENT, cause)
        if element.kind == "error":
            raise _RejectedError(printable(element.text, COMMAND_BYTES), "an alias has this error as its value")
        if element.kind == "address":
            self._expand_address(node)
        elif element.kind == "user":
            self._expand_user(node)
        elif node.parent and self._forwarded.get(node.parent.number):
            where = printable(bytes(element))
            raise _RejectedError("451 Temporary failure", f"{where}: no command or file in a .forward of uid 0")
        else:
            self.recipients.append(element)

    def _expand_address(self, node: _Node) -> None:
        local, domain = node.element.text.lower(), node.element.domain.lower()
        if self._tables.virtual(domain):
            found = self._virtual(node, local, domain)
            if found is None:
                raise _RejectedError(PERMANENT, "no entry for this address")
            self._insert_all(found, node._replace(virtual=True))
        elif self._tables.local(domain):
            self._insert(Element("user", local), node._replace(virtual=False))
        else:
            self.recipients.append(node.element)

    def _expand_user(self, node: _Node) -> None:
        name = node.element.text
        if not node.same_user:
            found = self._virtual(node, name.lower(), b"") if node.virtual else self._alias(node, name.lower())
            if found is not None:
                self._insert_all(found, node)
                return
        user = name.partition(self._tables.delimiter)[0]
        reply = self._ask("userinfo", user.lower(), node.depth)
        if not isinstance(reply, Found):
            raise _RejectedError("550 Invalid recipient", f"no alias and no user {printable(user)}")
        # From here on smtpd does not treat the same name as a duplicate, and delivers to it again.
        self._seen.discard(node.identity)
        forwarded = node.same_user and node.parent and node.parent.number in self._forwarded
        node = node._replace(element=Element("user", user))
        if not forwarded:
            userinfo = reply.value or b""
            self._forwarded[node.number] = userinfo.lstrip(b"0").startswith(b":")
            if self._forward(node, userinfo):
                return
        self.recipients.append(node.element)

    def _forward(self, node: _Node, userinfo: bytes) -> bool:
        """Whether a ~/.forward replaces the user (smtpd: lka_session_forward_reply, forwards_get)."""
        file = self._tables.forward(userinfo)
        if file is None:
            return False
        lines = [parse_line(line) for line in join_lines(file.data, b"\\", b"#")] if file.data else []
        self._record(file, "forward", [element for found, _ in lines for element in found], node.depth)
        before = self._nodes
        for found, problem in lines:
            self._insert_all(found, node)
            if problem or self._nodes > FORWARD_NODES:
                cause = problem or f"more than {FORWARD_NODES} elements, smtpd's limit for an expansion with a .forward"
                raise _RejectedError(TEMPORARY, f"{printable(file.path)}: {cause}")
        if file.reply:
            raise _RejectedError(file.reply, f"{printable(file.path)}: {file.problem}")
        return self._nodes > before

    def _include(self, path: bytes, nested: int) -> list[Element] | None:
        """The elements of an included file, None if smtpd ignores it (smtpd: aliases.c, aliases_expand_include)."""
        file = self._tables.include(path)
        # smtpd means to accept comments here, but passes # as the sign of a continued line.
        found = [each for line in join_lines(file.data or b"", b"#", b"") for each in parse_line(line)[0]]
        self._record(file, "include", found, nested)
        if file.data is None:
            return None if file.ignored else [Element("include", path)]
        return found

    def _record(self, file: File, table: str, found: Iterable[Element], nested: int) -> None:
        signs = {"command": b"|", "error": b"error:"}
        text = b", ".join(signs.get(each.kind, b"") + bytes(each) for each in found)
        reply = Failed(file.problem) if file.problem else Found(text or None)
        self.lookups.append(Lookup(table, file.path, reply, nested))

    def _alias(self, node: _Node, name: bytes) -> list[Element] | None:
        """The elements for a user, None without an alias (smtpd: aliases.c, aliases_get)."""
        return self._first(node, "alias", dict.fromkeys((name, name.partition(self._tables.delimiter)[0])))

    def _virtual(self, node: _Node, local: bytes, domain: bytes) -> list[Element] | None:
        """The elements for an address, or for a user without a domain (smtpd: aliases.c, aliases_virtual_get)."""
        user, _, tag = local.partition(self._tables.delimiter)
        tagged = [local] if tag else []
        keys = [name + b"@" + domain for name in (*tagged, user)] + [*tagged, user]
        return self._first(node, "virtual", keys + ([b"@" + domain, b"@"] if domain else []))

    def _first(self, node: _Node, table: str, keys: Collection[bytes]) -> list[Element] | None:
        for key in keys:
            reply = self._ask(table, key, node.depth)
            if isinstance(reply, Found):
                parts = [
                    self._include(each.text, node.depth + 1) if each.kind == "include" else [each]
                    for each in self._elements(key, reply.value or b"")
                ]
                followed = [part for part in parts if part is not None]
                return [each for part in followed for each in part] if followed else None
        return None

    def _elements(self, key: bytes, value: bytes) -> list[Element]:
        """The elements in the order in which smtpd keeps them, each once (smtpd: expand.c, expand_line)."""
        try:
            texts = split_list(value)
        except EntryError as error:
            raise self._unusable(key, str(error)) from None
        found = [parse_element(text) for text in texts]
        if None in found:
            raise self._unusable(key, element_problem(texts[found.index(None)]) or "an element is invalid")
        elements = {element for element in found if element is not None}
        return sorted(elements, key=lambda element: (_ORDER.index(element.kind), element.text, element.domain))

    def _ask(self, table: str, key: bytes, nested: int) -> Reply:
        reply = self._tables.lookup(table, key)
        self.lookups.append(Lookup(table, key, reply, nested))
        if isinstance(reply, Failed):
            raise _RejectedError("451 Temporary failure" if table == "userinfo" else TEMPORARY, reply.reason)
        return reply

    def _unusable(self, key: bytes, problem: str) -> _RejectedError:
        return _RejectedError(TEMPORARY, f"{printable(key)}: {problem}")

    def _insert_all(self, elements: Collection[Element], parent: _Node) -> None:
        for element in elements:
            self._insert(element, parent)

    def _insert(self, element: Element, parent: _Node) -> None:
        """Queue an element, unless smtpd treats it as a duplicate (smtpd: expand.c, expand_insert)."""
        self._count += 1
        if self._count > ELEMENTS_MAX:
            raise _RejectedError("", f"more than {ELEMENTS_MAX} recipients; smtpd may run out of memory")
        node = _Node(element, self._count, parent, parent.depth + 1, parent.virtual)
        if node.identity not in self._seen:
            self._seen.add(node.identity)
            self._nodes += 1
            self._queue.append(node)


def rejected_aliases(aliases: Mapping[bytes, bytes], delimiter: bytes = DELIMITER) -> Iterator[tuple[bytes, str]]:
    """Yield the keys that smtpd rejects, with the cause, in time linear in the size of the aliases.

    ``aliases`` maps folded keys to values; an empty value is a lookup that returns an error. Addresses are followed
    only within the domains of the keys: smtpd.conf routes other domains. ``delimiter`` starts the tag of a user.
    """
    graph = _Graph(aliases, delimiter)
    inner = {key: {name for name, _ in found} - {None} for key, found in graph.elements.items()}
    # The aliases that start a chain of this length; a loop is an endless chain.
    deep = set(inner)
    for _ in range(graph.depth, EXPAND_DEPTH - 2):
        deep = {key for key in deep if not inner[key].isdisjoint(deep)}
    steps = STEPS + STEPS_PER_ALIAS * len(aliases)
    for key in aliases:
        if key in deep:
            path, steps = graph.failure(key, steps) if steps >= 0 else ([], steps)
            if path or steps < 0:
                yield key, TOO_NESTED if steps < 0 else _chain(path)


def _chain(path: Sequence[bytes]) -> str:
    end = next((number for number, key in enumerate(path) if key in path[:number]), 0)
    chain = path[path.index(path[end]) : end + 1] if end else path
    what = "an alias loop" if end else "a chain of too many aliases"
    advice = "break the loop" if end else "shorten the chain"
    return f"{what} ({' -> '.join(printable(key) for key in chain)}), so smtpd rejects mail to this alias; {advice}"


class _Graph:
    """The aliases that contain others, as smtpd expands them."""

    def __init__(self, aliases: Mapping[bytes, bytes], delimiter: bytes) -> None:
        self._aliases, self._delimiter = aliases, delimiter
        self._domains = {key.partition(b"@")[2] for key in aliases} - {b""}
        self.depth = 0 if any(b"@" in key for key in aliases) else 1
        """The depth of a first alias: ``virtual`` finds it for the address, ``alias`` for the user of the address."""
        self.elements: dict[bytes, list[tuple[bytes | None, bool]]] = {}
        """For each element: the alias that smtpd finds, None if smtpd delivers; and whether it is an address."""
        for key, value in aliases.items():
            quoted = compiled(rb"[\\\"']").search(value)
            elements = split_list(value) if quoted else value.split(b",")
            found = [self._resolve(key, element.strip().lower()) for element in elements]
            if any(name is not None for name, _ in found):
                self.elements[key] = found

    def _resolve(self, key: bytes, element: bytes) -> tuple[bytes | None, bool]:
        local, at, domain = element.partition(b"@")
        names = [local, local.partition(self._delimiter)[0]]
        if at:
            here = [*(name + at + domain for name in names), *names, at + domain, at]
            names = here if domain in self._domains else []
        name = next((name for name in names if name in self._aliases), b"")
        # An alias of a user for itself is that user (smtpd: expand.c, sameuser).
        itself = name == key and not at
        delivered = itself or not self._aliases.get(name) or not compiled(_LOCAL_PART).fullmatch(local)
        return (None if delivered else name), bool(at)

    def failure(self, start: bytes, steps: int) -> tuple[list[bytes], int]:
        """The chain of aliases at which smtpd gives up, empty if it does not; and the steps that are left."""
        queue: deque[tuple[list[bytes], int]] = deque([([start], 0)])
        seen = {(start, False, 0)} if self.depth else set()
        delivers = False
        while queue:
            path, context = queue.popleft()
            for name, is_address in self.elements.get(path[-1], [(None, False)]):
                steps -= 1
                if name is not None and (name, is_address, context) in seen:
                    continue
                longer = path if name is None else [*path, name]
                if self.depth + len(path) == EXPAND_DEPTH or steps < 0:
                    return longer, steps
                delivers = delivers or name is None
                if name is not None:
                    seen.add((name, is_address, context))
                    queue.append((longer, len(seen) if is_address else context))
        path = [start]
        while not delivers and path[-1] not in path[:-1]:
            path.append(next(name for name, _ in self.elements[path[-1]] if name is not None))
        return [] if delivers else path, steps
