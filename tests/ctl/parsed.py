"""Reading files as import does."""

from __future__ import annotations

from table_consul.ctl import import_
from table_consul.services import SERVICES, Table

ALIAS, DOMAIN, STRING = SERVICES["alias"], SERVICES["domain"], SERVICES["string"]
CREDENTIALS, USERINFO = SERVICES["credentials"], SERVICES["userinfo"]
PATH = b"aliases/alias/"
TABLE = Table("aliases")
HASH = b"$2b$10$hIJ4QfMcp.90nJwKqGbKM.MybArjHOTpEtoTV.DgLYAiThuoYmTSe"


def pairs(parsed):
    assert parsed.problems == []
    return [(entry.key, entry.value) for entry in parsed.entries]


def read(data, service, wanted, *, table=TABLE, below=None):
    return import_.parse(data, table, service, wanted, below)


def problems(parsed):
    return {problem.line: problem.text for problem in parsed.problems}
