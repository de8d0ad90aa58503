"""Imports point one way, and what is pure stays so. A new module is put into ORDER where it belongs."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

import table_consul

PACKAGE = Path(table_consul.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
)

# Each may import from those before it, and from nothing after it.
ORDER = [
    "errors",
    "outage",
    "matchers",
    "expressions",
    "patterns",
    "auth",
    "values",
    "doubts",
    "services",
    "protocol",
    "imsg",
    "mirror",
    "responder",
    "rules",
    "shape",
    "access",
    "config",
    "connection",
    "transport",
    "kv",
    "file",
    "direct",
    "tally",
    "shortcut",
    "disk",
    "watch",
    "metrics",
    "sources",
    "daemon",
    "log",
    "child",
    "bridge",
    "callbacks",
    "procexec",
    "cli",
    "__main__",
    "ctl.program",
    "ctl.entries",
    "ctl.aliases",
    "ctl.passwd",
    "ctl.formats",
    "ctl.changes",
    "ctl.writing",
    "ctl.exporting",
    "ctl.importing",
    "ctl.reading",
    "ctl.tracing",
    "ctl.query",
    "ctl.lint",
    "ctl.policy",
    "ctl.published",
    "ctl.states",
    "ctl.status",
]
# Bytes, numbers and values in, bytes and values out: no clock, no thread, no file, no log.
PURE = [
    "errors",
    "matchers",
    "expressions",
    "patterns",
    "auth",
    "values",
    "doubts",
    "services",
    "protocol",
    "imsg",
    "mirror",
    "responder",
    "rules",
    "shape",
    "tally",
    "shortcut",
    "ctl.entries",
    "ctl.aliases",
    "ctl.passwd",
    "ctl.formats",
]
WORLD = {"socket", "http", "ssl", "os", "sys", "threading", "time", "logging", "pathlib", "io", "subprocess", "random"}
# What a person or smtpd starts.
PROGRAMS = {"cli", "procexec", "ctl.program"}


@functools.cache
def tree(module):
    return ast.parse(PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text())


def imported(module):
    """Whole names of what the module imports when it runs; what a type checker alone reads does not count."""

    def walk(node):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    return {*walk(tree(module))}


def from_the_package(module):
    parts = [name.split(".")[1:] for name in imported(module) if name.startswith("table_consul.")]
    found = {".".join(each[:2]) if each[0] == "ctl" else each[0] for each in parts}
    return found - {"__version__", "ctl"}


def names(module, *wanted):
    """Where the module reads one of these names, such as `os.environ`, or a bare name."""
    return [
        f"{module}.py:{node.lineno}"
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node) in wanted
    ]


def test_every_module_has_its_place():
    assert sorted({*MODULES} ^ {*ORDER}) == []


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    before = ORDER[: ORDER.index(module)]
    assert sorted(from_the_package(module) - {*before}) == []


@pytest.mark.parametrize("module", [module for module in PURE if module in MODULES])
def test_what_is_pure_touches_no_world(module):
    assert sorted({name.split(".")[0] for name in imported(module)} & WORLD) == []


@pytest.mark.parametrize("module", [module for module in PURE if module in MODULES])
def test_what_is_pure_builds_on_what_is_pure_alone(module):
    assert sorted(from_the_package(module) - {*PURE}) == []


@pytest.mark.parametrize("module", sorted({*MODULES} - PROGRAMS))
def test_only_programs_read_their_environment_and_arguments(module):
    assert names(module, "os.environ", "os.getenv", "sys.argv") == []
    assert not {"os.environ", "os.getenv", "sys.argv"} & imported(module)


@pytest.mark.parametrize("module", MODULES)
def test_nothing_prints(module):
    assert names(module, "print") == []


@pytest.mark.parametrize("module", MODULES)
def test_annotations_cost_nothing_at_start(module):
    assert "__future__.annotations" in imported(module)


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_called_after_nothing(module):
    assert not {"utils", "helpers", "manager", "common", "misc", "constants"} & {*module.replace(".", "_").split("_")}
