"""The fake answers every recorded request as the real Consuls did."""

from __future__ import annotations

import re

import pytest

from tests.consul.recorded import HASTE, VERSIONS, Exchange, exchanges, rows

# Requests that the fake does not support, with the reason.
NOT_IMITATED = {
    "path/root": "the web pages, which are no part of the API",
}


RECORDED = [
    pytest.param(version, at, id=f"{version}-{row['name']}")
    for version in VERSIONS
    for at, row in enumerate(rows(version))
    if row["name"] not in NOT_IMITATED
]


def difference(exchange: Exchange) -> list[tuple[object, object]]:
    """The differences from the recording."""
    row = exchange.row
    pairs = [
        (exchange.status, row["status"]),
        (headers(exchange.headers), headers(row["headers"])),
        (body(exchange.body, row.get("answer", "")), body(row.get("answer", ""), row.get("answer", ""))),
    ]
    if "seconds" in row:
        wait = int(re.search(r"wait=(\d+)s", row["path"])[1])
        pairs.append((exchange.seconds >= wait / HASTE, row["seconds"] >= wait))
    return [(here, there) for here, there in pairs if here != there]


def headers(given: dict[str, str]) -> dict[str, str]:
    """All headers, without the values that differ from run to run."""
    return {name: "any" if name in {"X-Consul-Index", "Content-Length"} else value for name, value in given.items()}


def body(given: str, answer: str) -> str:
    """The body without identifiers and indexes, as far as the recording holds it."""
    if answer.endswith(" bytes)"):
        given = given[:300]
    given = re.sub(r'"(CreateIndex|ModifyIndex)":\d+', r'"\1":0', given)
    given = re.sub(r'"(CreateTime|Hash)":"[^"]*"', r'"\1":""', given)
    given = re.sub(r"<accessor of management>|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "id", given)
    return re.sub(r"127\.0\.0\.1:\d+", "address", given)


@pytest.mark.parametrize(("version", "at"), RECORDED)
def test_fake_answers_as_recorded(version, at):
    assert difference(exchanges(version)[at]) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_unsupported_requests_get_another_answer(version):
    differing = {each.row["name"] for each in exchanges(version) if difference(each)}
    assert differing == set(NOT_IMITATED)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("agent", ["plain", "acl"])
def test_indexes_rise_where_the_recorded_ones_rise(version, agent):
    pairs = set()
    for exchange in exchanges(version):
        if exchange.agent != agent or "/v1/acl/" in exchange.row["path"] or exchange.row["name"] in NOT_IMITATED:
            continue
        pairs.add(
            (indexes(exchange.row["headers"], exchange.row.get("answer", "")), indexes(exchange.headers, exchange.body))
        )
    flat = {pair for there, here in pairs for pair in zip(there, here, strict=False)}
    assert len(flat) >= 3
    assert len({there for there, _ in flat}) == len({here for _, here in flat}) == len(flat)
    assert sorted(flat) == sorted(flat, key=lambda pair: pair[1])


def indexes(headers: dict[str, str], body: str) -> tuple[int, ...]:
    """The indexes of the header and of the entries at the beginning of the body."""
    found = [headers["X-Consul-Index"]] if "X-Consul-Index" in headers else []
    found += re.findall(r'"(?:Create|Modify)Index":(\d+)[,}]', body[:390])
    return tuple(map(int, found))
