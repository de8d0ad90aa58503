"""README.md and docs/ are correct: links, examples and commands of every page, and output of the programs."""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
import shlex
import subprocess
from types import SimpleNamespace

import click
import pytest

from table_consul import cli, config
from table_consul.ctl import main
from table_consul.errors import EntryError
from table_consul.services import SERVICES
from table_consul.services.regex import regcomp
from tests.dialogue import Child, eventually, write_config
from tests.documents.document import CONTROL, PAGES, ROOT, Document, page, rows, smtpd_check
from tests.documents.manual import items, parts, source
from tests.fake_consul import FakeConsul

OPERATING, KEYS = page("docs/operating.md"), page("docs/keys.md")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.path.relative_to(ROOT)))


def every_block(*languages):
    found = [(page, block) for page in PAGES for block in page.fenced(*languages)]
    return pytest.mark.parametrize(
        ("page", "block"), found, ids=[f"{page.path.name}:{block.line}" for page, block in found]
    )


# ---- every page ----


@every_page
def test_links_have_targets(page):
    broken = []
    for link in page.links():
        name, _, anchor = link.partition("#")
        target = page.path if not name else (page.path.parent / name).resolve()
        if not target.exists() or (anchor and anchor not in Document(target).anchors()):
            broken.append(link)
    assert broken == []


@every_page
def test_files_of_the_project_exist(page):
    named = re.findall(r"`((?:contrib|docs|bench|tests|man|\.ci)/[\w./-]*)`", page.text)
    assert [name for name in named if not (ROOT / name).exists()] == []


@every_block("toml")
def test_configurations_are_accepted(page, block, tmp_path):
    path = tmp_path / "table-consul.toml"
    path.write_text(block.text)
    config.load(str(path), {})


@every_block("json")
def test_json_is_valid(page, block):
    json.loads(block.text)


@every_page
def test_commands_of_table_consulctl_are_valid(page):
    for command in page.commands():
        for part in re.split(r"\s[|;&]+\s", command.text):
            words = shlex.split(re.sub(r"[<>]\S+", "", part.replace("$(", "( ")))
            if words[:1] != ["table-consulctl"]:
                continue
            context = click.Context(main.program, info_name="table-consulctl")
            _, rest, _ = main.program.make_parser(context).parse_args(words[1:])
            if rest:
                command_of = main.program.get_command(context, rest[0])
                assert command_of is not None, f"{page.path.name}:{command.line}: no command {rest[0]}"
                command_of.make_context(rest[0], rest[1:])


@every_page
def test_commands_and_options_in_the_text_exist(page):
    controls = set(re.findall(r"`table-consulctl ([a-z]+)", page.text))
    assert sorted(controls - set(main.COMMANDS)) == []
    options = set(re.findall(r"table-consul (--[a-z]+)", page.text))
    assert sorted(options - set(re.findall(r"--[a-z]+", cli._parser().format_help()))) == []


@every_page
def test_targets_of_make_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = [
        word
        for command in page.commands()
        for line in re.findall(r"^make ([^\n]*)", command.text)
        for word in shlex.split(line)
        if "=" not in word
    ]
    named += re.findall(r"`make ([a-z-]+)[` ]", page.text)
    assert sorted(set(named) - targets) == []


def test_installs_with_an_extra_keep_those_of_the_default():
    """An install replaces the last one with all of its packages."""
    default = re.search(r"^EXTRAS = (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split(",")
    named = [extras.split(",") for page in PAGES for extras in re.findall(r"EXTRAS=([\w,]+)", page.text)]
    assert named
    assert [extras for extras in named if not {*default} < {*extras}] == []


@pytest.mark.real
@pytest.mark.parametrize("release", ["6.8", "7.9"])
@every_block("smtpd")
def test_smtpd_accepts_every_example(page, block, release):
    assert smtpd_check(release, block.text) == "configuration OK\n"


# ---- keys.md ----


def test_every_service_is_in_the_table():
    assert sorted(row[0].strip("`") for row in rows(KEYS.section("## Services"))) == sorted(SERVICES)


def smtpd_accepts(pattern):
    """Whether regcomp(3) of this system takes the expression, called as smtpd calls it."""
    extended, no_sub = 1, 8
    room = ctypes.create_string_buffer(1024)
    return ctypes.CDLL(None).regcomp(room, pattern, extended | no_sub) == 0


def table_consul_accepts(pattern):
    with contextlib.suppress(EntryError):
        return regcomp(pattern) is not None
    return False


def test_refused_expressions_are_those_of_the_table():
    pytest.importorskip("re2", reason="expressions need google-re2 (pip install google-re2)")
    table = rows(KEYS.section("## Expressions"))
    assert len(table) >= 5
    for expression, file_table, here, instead in table:
        pattern = expression.strip("`").encode()
        assert smtpd_accepts(pattern) is file_table.startswith("accepted"), expression
        assert table_consul_accepts(pattern) is not here.startswith("refused"), expression
        if instead.startswith("`"):
            assert table_consul_accepts(instead.strip("`").encode())


# ---- operating.md: what the programs write ----


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table with one bad entry: output of ``status``, text file, and log through an outage and a restart."""
    folder = tmp_path_factory.mktemp("operating")
    metrics = f'[metrics]\ntextfile = "{folder}/table-consul-{{table}}.prom"'
    settings = (f'snapshot = "{folder}/{{table}}.json"', "deadline = 0.5")

    def status():
        command = (*CONTROL, "-c", str(path), "status")
        return subprocess.run(command, capture_output=True, text=True, check=False, env={"COLUMNS": "80"}).stdout

    def logged(child, words):
        for line in iter(child.process.stderr.readline, b""):
            log.append(line.decode())
            if words in log[-1]:
                return

    log = []
    with FakeConsul() as fake:
        fake.put(b"mail/alias/backup", b"|/usr/local/bin/backup")
        fake.put(b"mail/alias/root", b"gilles")
        path = write_config(folder, *settings, more=metrics, address=fake.address)
        with Child(str(path)) as child:
            child.handshake(b"mail")
            for _ in eventually("the table follows Consul, and the text file is some seconds old"):
                if "following" in (shown := status()) and "s old" in shown:
                    break
            textfile = (folder / "table-consul-mail.prom").read_text()
            fake.stop()
            logged(child, "mail/ from Consul")
            fake.start()
            logged(child, "mail/ from Consul")
            child.end()
        fake.stop()
        with Child(str(path)) as child:
            child.handshake(b"mail")
            logged(child, " s old)")
            child.end()
    return SimpleNamespace(status=shown, textfile=textfile, log="".join(log))


def without_variable_parts(text):
    """The text on one line, without numbers, versions and local folders."""
    return re.sub(r"\d+(?:\.(?:dev)?\d+)*", "N", re.sub(r"(?<= )/\S*/", "/", " ".join(text.split())))


def test_status_output_is_that_of_the_page(table):
    (shown,) = [each for each in OPERATING.commands() if each.text == "table-consulctl status" and each.output]
    assert without_variable_parts(table.status) == without_variable_parts(shown.output)


def test_metrics_are_those_of_the_table(table):
    published = re.findall(r"^# TYPE (\w+) ", table.textfile, re.MULTILINE)
    assert sorted(row[0].strip("`") for row in rows(OPERATING.section("### Metrics"))) == sorted(published)


# Addresses, paths, versions, and numbers with their nouns, which may be singular.
VARIABLE = r"/var/\S+|https?://\S+|mail/\S*|(?:\.\.\.|\d[\d.]*)(?:-portable| [a-z ]+?s\b)?"


def test_log_lines_are_those_of_the_pages(table):
    """The lines of the table here except those that need an ACL or a bug, and those of an outage in table-consul(8)."""
    described = [row[0].strip("`") for row in rows(OPERATING.section("## Logs"))]
    here = [line for line in described if re.search(r"speaks|entries from", line)]
    diagnostics = items(parts(source("table-consul.8"), "Sh")["DIAGNOSTICS"])
    outage = [head.strip('"') for head in diagnostics if " from Consul: " in head]
    assert (len(here), len(outage)) == (3, 2)
    for line in here + outage:
        pattern = ".*".join(re.escape(part) for part in re.split(VARIABLE, line))
        assert re.search(pattern, table.log), f"{line}\n{table.log}"


def test_alerts_are_those_of_the_rules():
    rules = (ROOT / "contrib/prometheus/table-consul.rules.yml").read_text()
    described = [row[0].strip("`") for row in rows(OPERATING.section("### Alerts and a dashboard"))]
    assert described == re.findall(r"^ *- alert: (\w+)$", rules, re.MULTILINE)


def test_policies_of_the_page_are_those_of_the_project():
    there = {path.name for path in (ROOT / "contrib/policies").glob("*.hcl")}
    assert there == set(re.findall(r"\(\.\./contrib/policies/([\w-]+\.hcl)\)", OPERATING.text))
