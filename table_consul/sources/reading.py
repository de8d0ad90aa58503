"""From a list of Consul's to a snapshot: which missing keys are deleted, and which an ACL hides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from table_consul import kv
from table_consul.errors import BadName, BadResponse, Forbidden, SourceError, printable
from table_consul.services import SERVICES, Table, fold_key
from table_consul.sources import PROBE, mirror
from table_consul.sources.mirror import Hidden, Snapshot, SnapshotBuilder

Take = Callable[[list[tuple[bytes, bytes | None]]], None]


def hidden_services(
    client: kv.Client, table: Table, services: Iterable[str], former_hidden: Mapping[str, Hidden], *, filtered: bool
) -> dict[str, SourceError]:
    """The services in whose folder the token may not read everything, each with the reason."""
    hidden: dict[str, SourceError] = {}
    for name in services:
        reason = _why_hidden(client, table, name, filtered=filtered)
        missing = former_hidden[name].missing.values() if name in former_hidden and reason is None else ()
        reads = _read_each(client, table, name, missing)
        reason = next((found for _, found in reads if isinstance(found, Forbidden)), reason)
        if reason is not None:
            hidden[name] = reason
    return hidden


def _why_hidden(client: kv.Client, table: Table, service: str, *, filtered: bool) -> Forbidden | None:
    """Why a missing key in the folder of this service proves nothing, as far as the folder alone shows.

    ``filtered``: Consul reports that it hides keys, of this folder or another.
    """
    path = table.path(SERVICES[service])
    try:
        client.get(path + PROBE, timeout=table.deadline)
        hides = filtered and client.hides_keys(path, timeout=table.deadline)
    except Forbidden as error:
        return Forbidden(f"the token may not read everything under {printable(path)}: {error}")
    return Forbidden(f"Consul hides keys under {printable(path)} from the token") if hides else None


def _read_each(
    client: kv.Client, table: Table, service: str, stored: Iterable[bytes]
) -> Iterator[tuple[bytes, kv.Pair | Forbidden | None]]:
    """The result of a read of each of these keys, which are as stored; skips those that no URL can contain."""
    path = table.path(SERVICES[service])
    for key in stored:
        if not kv.is_url_safe(path + key):
            continue
        try:
            yield key, client.get(path + key, timeout=table.deadline, proven=True)
        except Forbidden as error:
            yield key, Forbidden(f"the token may not read everything under {printable(path)}: {error}")
        except BadName:
            pass  # Consul 1.21.5 refuses most mail addresses (hashicorp/consul#22835); a transaction writes any name.


def read_snapshot(
    client: kv.Client,
    response: kv.Response,
    builder: SnapshotBuilder,
    hidden: Mapping[str, SourceError],
    former_hidden: Mapping[str, Hidden],
    take: Take,
) -> Snapshot:
    """The `proven_snapshot` of this response, which is read into the builder; ``take`` gets the pairs."""
    for found in response.pairs():
        pairs = [(pair.name.encode(), pair.value) for pair in found]
        builder.take(pairs)
        take(pairs)
    return proven_snapshot(client, response, builder, hidden, former_hidden)


def read_changes(response: kv.Response, builder: SnapshotBuilder, since: int) -> list[int]:
    """Read the response into the builder; returns the indexes of the entries that were written after ``since``."""
    changes: list[int] = []
    for found in response.pairs():
        builder.take([(pair.name.encode(), pair.value) for pair in found])
        changes += [pair.modify_index for pair in found if pair.modify_index > since]
    return changes


def proven_snapshot(
    client: kv.Client,
    response: kv.Response,
    builder: SnapshotBuilder,
    hidden: Mapping[str, SourceError],
    former_hidden: Mapping[str, Hidden],
) -> Snapshot:
    """The snapshot of a response, which was read, and of the builder's former snapshot, with absence proven.

    ``hidden`` are the services that were hidden before the query. They are checked before and after it, because a
    blocking query uses the ACLs of its beginning, which may have changed by its end. ``former_hidden`` are those of the
    former snapshot. A missing key is read immediately, even in a hidden folder: later it would be one of many with
    unproven deletions.
    """
    reasons = dict(hidden)
    deleted: dict[str, dict[bytes, bytes]] = {}
    missing = builder.missing_keys()
    for name, keys in missing.items():
        suspects = former_hidden[name].missing if name in former_hidden else {}
        lost = {key: stored for key, stored in keys.items() if key not in suspects}
        gone = mirror.sample([*lost.values()])
        if name not in reasons and (keys or response.filtered):
            reason = _why_hidden(client, builder.table, name, filtered=response.filtered)
            if reason is not None:
                reasons[name] = reason
                continue
            gone = [*gone, *(stored for key, stored in keys.items() if key in suspects)]
        deleted[name] = lost
        for key, answer in _read_each(client, builder.table, name, gone):
            if isinstance(answer, Forbidden):
                reasons.setdefault(name, answer)
                deleted[name] = {}
            elif answer is None:
                del keys[fold_key(key)]
            else:
                path = printable(builder.table.path(SERVICES[name]) + key)
                raise BadResponse(f"{path} exists, but Consul does not list it")
    if builder.emptied and builder.emptied <= reasons.keys():
        raise Forbidden(f"the token may no longer read anything: {next(iter(reasons.values()))}")
    return builder.finish({name: Hidden(reason, missing[name]) for name, reason in reasons.items()}, deleted)
