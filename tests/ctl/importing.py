"""Runs `table-consulctl import` against a Consul agent, and reads the keys back."""

from __future__ import annotations

from tests.control import control
from tests.ctl import parsed

HASH = parsed.HASH.decode()


def importer(agent, *arguments, stdin=b"", token=None):
    more = {"CONSUL_HTTP_TOKEN": token} if token else {}
    return control("import", *arguments, stdin=stdin, CONSUL_HTTP_ADDR=agent.address, **more)


def entries(agent, path="aliases/alias/"):
    try:
        keys = agent.request("GET", f"/v1/kv/{path}?keys")
    except Exception:
        return {}
    return {key.removeprefix(path): agent.kv_get(key) for key in keys}


def file(folder, text, name="aliases"):
    path = folder / name
    path.write_bytes(text)
    return path


def alias_lines(count):
    return b"".join(b"user%05d: target%05d@example.org\n" % (number, number) for number in range(count))
