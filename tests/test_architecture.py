"""The imports of the package point one way, pure modules import only pure ones, and ARCHITECTURE.md lists them all."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

import table_consul

PACKAGE = Path(table_consul.__file__).parent
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# Bytes, numbers and values in, bytes and values out: no clock, no thread, no file, no log.
PURE = sorted(
    name
    for name in FILES
    if name.startswith("table_consul.services")
    or name.removeprefix("table_consul.")
    in {
        "errors",
        "protocol",
        "imsg",
        "responder",
        "sources",
        "sources.hold",
        "sources.mirror",
        "sources.cut",
        "ctl.formats",
        "ctl.recipients",
    }
)
WORLD = {"socket", "http", "ssl", "os", "sys", "threading", "time", "logging", "pathlib", "io", "subprocess", "random"}
# The imports forbidden to each part of the package. A name covers the module and everything below it.
NOT_FOR = {
    "table_consul.services": {"protocol", "imsg", "server", "responder", "tables", "sources", "kv", "transport", "ctl"},
    "table_consul.sources": {"protocol", "imsg", "server", "responder", "tables", "ctl", "child", "procexec"},
    "table_consul.kv": {"services", "sources", "protocol", "tables", "ctl"},
    "table_consul.protocol": {"services", "sources", "kv", "tables"},
    "table_consul.server": {"sources", "kv", "transport", "ctl"},
}


@functools.cache
def imported(module, *, typed=False):
    """Full names of the imports at run time; with ``typed``, also those for type checkers."""

    def walk(node):
        if not typed and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    return {*walk(ast.parse(FILES[module].read_text()))}


def modules_imported(module, *, typed=False):
    """The imports that are modules of this package."""
    found = {name if name in FILES else name.rpartition(".")[0] for name in imported(module, typed=typed)}
    return {name for name in found if name in FILES} - {module, "table_consul"}


def test_imports_have_no_circle():
    done, path = set(), []

    def visit(module):
        assert module not in path, " > ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for other in sorted(modules_imported(module, typed=True)):
            visit(other)
        path.pop()
        done.add(module)

    for module in FILES:
        visit(module)


@pytest.mark.parametrize("module", PURE)
def test_pure_module_has_no_side_effects(module):
    assert sorted({name.split(".")[0] for name in imported(module)} & WORLD) == []
    assert sorted(modules_imported(module) - {*PURE}) == []


@pytest.mark.parametrize("part", NOT_FOR)
def test_part_imports_no_forbidden_module(part):
    forbidden = {f"table_consul.{name}" for name in NOT_FOR[part]}
    found = {
        (module, other)
        for module in FILES
        if module == part or module.startswith(f"{part}.")
        for other in modules_imported(module)
        if any(other == name or other.startswith(f"{name}.") for name in forbidden)
    }
    assert sorted(found) == []


def test_nothing_outside_ctl_imports_ctl():
    outside = [module for module in FILES if not module.startswith("table_consul.ctl")]
    assert sorted(m for m in outside if any(o.startswith("table_consul.ctl") for o in modules_imported(m))) == []


def test_architecture_lists_every_module():
    text = (Path(__file__).parent.parent / "ARCHITECTURE.md").read_text()
    listed = set(re.findall(r"`(?:\w+/)?(\w+)`", text))
    names = {path.parent.name if path.stem == "__init__" else path.stem for path in FILES.values()}
    assert sorted(names - listed - {"__main__", "table_consul", "ctl", "services", "sources"}) == []
