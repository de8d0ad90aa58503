"""The manual pages agree with the programs: options, commands, services, examples."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys

import click
import pytest

from table_consul import cli, config, procexec
from table_consul.ctl import main
from table_consul.fallback import explain
from table_consul.protocol import Request
from table_consul.responder import Responder
from table_consul.services import SERVICES, Table
from table_consul.services.entries import NOT_UTF8
from table_consul.transport import refusal
from tests.documents.document import CONTROL, written
from tests.documents.manual import MAN, NAMES, flags, items, marked, parts, source, stated_default

# Pages of OpenSMTPD and of the system, which mandoc looks for although this system may lack them.
FOREIGN = {
    *("aliases 5", "passwd 5", "sh 1", "smtpctl 8", "smtpd 8", "smtpd-tables 7", "smtpd.conf 5", "syslog 3", "table 5"),
    *("crypt 3", "vi 1"),
}
CTL = "table-consulctl"
PROGRAMS = {"table-consul.8": cli._parser(), "table-procexec.8": procexec._parser()}


def synopsis(page):
    return parts(source(page), "Sh")["SYNOPSIS"]


def linted(page):
    """The findings of mandoc at its strictest level, except missing pages of other packages."""
    done = subprocess.run(["mandoc", "-T", "lint", MAN / page], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    return [line for line in lines if not any(f"not found: Xr {name}" in line for name in foreign_pages())]


def foreign_pages():
    return FOREIGN | {" ".join(page.rsplit(".", 1)) for page in NAMES}


mandoc = pytest.mark.skipif(not shutil.which("mandoc"), reason="no mandoc: apt-get install mandoc")


@mandoc
@pytest.mark.parametrize("page", NAMES)
def test_mandoc_finds_no_problem(page):
    assert linted(page) == []


@mandoc
def test_mandoc_finds_an_inserted_problem(monkeypatch, tmp_path):
    monkeypatch.setattr("tests.documents.test_man.MAN", tmp_path)
    head = ".Dd November 22, 2026\n.Dt PAGE 8\n.Os\n.Sh NAME\n.Nm page\n.Nd one\n"
    (tmp_path / "page.8").write_text(head)
    assert linted("page.8") == []
    for wrong in (".Nosuch macro\n", "one -- two\n", ".Xr nosuch 8\n", "One.  Two.\n"):
        (tmp_path / "page.8").write_text(head + wrong)
        assert linted("page.8") != []


@mandoc
@pytest.mark.parametrize("page", NAMES)
def test_page_fits_a_terminal(page):
    done = subprocess.run(["mandoc", "-T", "ascii", MAN / page], capture_output=True, text=True, check=True)
    assert [line for line in re.sub(".\b", "", done.stdout).splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("page", NAMES)
def test_title_is_the_name_of_the_page(page):
    name, _, section = page.rpartition(".")
    assert f".Dt {name.upper()} {section}\n.Os\n.Sh NAME\n.Nm {name}\n.Nd " in source(page)


@pytest.mark.parametrize("page", NAMES)
def test_referenced_pages_exist(page):
    assert set(re.findall(r"^\.Xr (\S+ \d)", source(page), re.MULTILINE)) <= foreign_pages()


@pytest.mark.parametrize("page", PROGRAMS)
def test_options_are_those_of_the_program(page):
    actions = PROGRAMS[page]._actions
    real = {name for action in actions for name in action.option_strings}
    listed = items(source(page))
    assert {name for head in listed for name in flags(head)} == real
    shown = flags(synopsis(page))
    assert all(shown & {*action.option_strings} for action in actions if action.option_strings)
    assert shown <= real


@pytest.mark.parametrize("page", PROGRAMS)
def test_argument_and_default_of_an_option_are_stated(page):
    listed = items(source(page))
    for action in PROGRAMS[page]._actions:
        if not action.option_strings or action.nargs == 0:
            continue
        (head,) = (head for head in listed if flags(head) & {*action.option_strings})
        assert " Ar " in head
        text = listed[head]
        assert [word for word in action.choices or () if f".Cm {word}" not in text] == []
        if action.default is not None:
            assert stated_default(text) == f"{action.default:g}"


@pytest.mark.parametrize("page", PROGRAMS)
def test_arguments_are_in_the_synopsis(page):
    names = [action.metavar.lower() for action in PROGRAMS[page]._actions if not action.option_strings]
    assert set(names) <= {*marked(synopsis(page), "Ar")}


def test_services_are_those_of_the_program():
    keys = parts(source("table-consul.8"), "Sh")["KEYS"].partition("\n.Ss")[0]
    assert list(items(keys)) == [f"Cm {name}" for name in order_of(keys)]
    assert set(order_of(keys)) == set(SERVICES)


def order_of(text):
    return re.findall(r"^\.It Cm (\w+)", text, re.MULTILINE)


def blocks(page, section):
    """The literal blocks of a section, as mandoc shows them."""
    text = parts(source(page), "Sh")[section]
    return [block.replace("\\e", "\\") for block in re.findall(r"\.Bd -literal.*?\n(.*?)\.Ed", text, re.DOTALL)]


def shell_lines(page):
    """The commands under EXAMPLES, each on one line."""
    text = parts(source(page), "Sh")["EXAMPLES"]
    lines = "".join(["\n".join(re.findall(r"^\.Dl (.*)", text, re.MULTILINE)), "\n", *blocks(page, "EXAMPLES")])
    joined = re.sub(r"\\\n +|(?<=\|)\n +", " ", lines)
    return [line[2:] for line in joined.splitlines() if line.startswith(("$ ", "# "))]


def logged_lines():
    """Lines of table-consul, from the code that logs or returns them."""
    yield explain(ImportError("No module named 'msgspec'"))
    request = Request("lookup", b"1", "users", "auth", b"vera:secret")
    yield Responder().answer(request, Table("users"), lambda *_: pytest.fail("nothing is read")).reason
    yield str(refusal("Consul at http://127.0.0.1:8500", 502, b"a page of a proxy", token=True))
    yield f"aliases/alias/x: {NOT_UTF8}"


def test_diagnostics_are_literal():
    text = parts(source("table-consul.8"), "Sh")["DIAGNOSTICS"]
    patterns = [head.strip('"').replace('""', '"') for head in items(text)]
    for line in logged_lines():
        found = [each for each in patterns if re.fullmatch(".*".join(map(re.escape, each.split("..."))), line)]
        assert len(found) == 1, line


@pytest.mark.parametrize("page", NAMES)
def test_quotes_of_displayed_lines_are_shown(page):
    """A word that begins with a quote loses it; \\(dq is shown."""
    assert re.findall(r"^\.Dl .* \".*", source(page), re.MULTILINE) == []


def test_lookup_of_the_page_is_answered(tmp_path):
    (tmp_path / "export.json").write_text('[{"key": "aliases/alias/root", "flags": 0, "value": "Z2lsbGVz"}]')
    path = tmp_path / "table-consul.toml"
    path.write_text(f'[consul]\naddress = "file://{tmp_path}/export.json"\n')
    (asked,) = (found[1] for line in shell_lines("table-consul.8") if (found := re.search(r"^printf '(.*)' \|", line)))
    done = subprocess.run(
        [sys.executable, "-m", "table_consul", str(path)],
        input=asked.replace("\\n", "\n"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.endswith("register|ready\nlookup-result|1|found|gilles\n")


def test_program_of_the_page_is_a_table(tmp_path):
    (program,) = (block for block in blocks("table-procexec.8", "EXAMPLES") if block.startswith("#!/usr/bin/python3"))
    table = tmp_path / "table-dummy"
    table.write_text(program)
    done = subprocess.run(
        [sys.executable, str(table)],
        input="config|tablename|t\nconfig|ready\ntable|0.1|0|t|check|mailaddr|1|gilles@poolp.org\n",
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(MAN.parent)},
    )
    assert done.stdout.endswith("check-result|1|found\n")


def test_examples_of_the_configuration_are_accepted(tmp_path):
    examples = blocks("table-consul.toml.5", "EXAMPLES")
    assert len(examples) >= 3
    for block in examples:
        path = tmp_path / "table-consul.toml"
        path.write_text(block)
        config.load(str(path), {})


# ---- table-consulctl ----


def commands():
    """The text about each command, by its name, and the text before them, about the options that they share."""
    text = parts(source("table-consulctl.8"), "Sh")["COMMANDS"]
    by_name = {head.partition(":")[0]: body for head, body in parts(text, "Ss").items()}
    return by_name, text.partition("\n.Ss ")[0]


def command(name):
    found = main.program.get_command(click.Context(main.program), name)
    assert found is not None
    return found


def options(of):
    return [each for each in of.params if isinstance(each, click.Option) and not each.hidden]


def names(option):
    """All names of an option."""
    return {*option.opts, *option.secondary_opts}


def test_commands_are_those_of_the_program():
    assert list(commands()[0]) == list(main.COMMANDS)


def test_options_before_the_command_are_those_of_the_program():
    real = {name for option in options(main.program) for name in names(option)} | {"-h", "--help"}
    described = parts(source("table-consulctl.8"), "Sh")["DESCRIPTION"]
    assert {name for head in items(described) for name in flags(head)} == real


@pytest.mark.parametrize("name", main.COMMANDS)
def test_options_of_a_command_are_those_of_the_program(name):
    by_name, common = commands()
    real = {spelling for option in options(command(name)) for spelling in names(option)}
    shared = {head: text for head, text in items(common).items() if flags(head) <= real}
    own = items(by_name[name])
    listed = {**shared, **own}
    assert {spelling for head in listed for spelling in flags(head)} == real
    for option in options(command(name)):
        (head,) = (head for head in listed if flags(head) & names(option))
        assert option.is_flag == (" Ar " not in head)
        text = listed[head]
        if isinstance(option.type, click.Choice):
            assert [word for word in option.type.choices if f".Cm {word}" not in text] == []
        if isinstance(option.default, str | int | float) and not option.is_flag:
            assert stated_default(text) == written(option.default)


def test_shared_options_name_their_commands():
    common = items(commands()[1])
    having = {head: {name for name in main.COMMANDS if flags(head) <= spellings(name)} for head in common}
    writing = {*marked_words(common["Fl -no-undo"])}
    assert writing == having["Fl -no-undo"] == having["Fl -token-file Ar path"] == having["Fl -undo-dir Ar path"]
    assert {*marked_words(common["Fl -live"])} == having["Fl -live"]
    without = {*marked_words(common["Fl -json"].partition("Not for")[2])}
    assert {*main.COMMANDS} - without == having["Fl -json"]


def spellings(name):
    return {spelling for option in options(command(name)) for spelling in names(option)}


def marked_words(text):
    return [word for line in re.findall(r"^\.Cm (.*)", text, re.MULTILINE) for word in re.findall(r"\w+", line)]


@pytest.mark.parametrize("name", main.COMMANDS)
def test_arguments_of_a_command_are_in_its_synopsis(name):
    by_name, common = commands()
    shown = by_name[name].partition("\n.Pp")[0]
    assert f".Cm {name}" in shown
    arguments = [each for each in command(name).params if isinstance(each, click.Argument)]
    words = [re.sub(r"[\[\].]", "", each.metavar or each.name).lower() for each in arguments]
    without_options = re.sub(r"^\.Op Fl .*\n", "", shown, flags=re.MULTILINE)
    assert [*marked(without_options, "Ar")] == words
    shared = {spelling for head in items(common) for spelling in flags(head)}
    assert flags(shown) | shared >= spellings(name) >= flags(shown)


def test_examples_of_commands_are_accepted():
    """Parsed as the program parses them, and not run."""
    lines = [line for page in ("table-consul.8", "table-consulctl.8") for line in shell_lines(page)]
    called = [part.partition(f"{CTL} ")[2] for line in lines for part in re.split(r"\||&&", line) if CTL in part]
    assert len(called) >= 10
    for line in called:
        words = shlex.split(line)
        assert words[0] in main.COMMANDS
        command(words[0]).make_context(words[0], words[1:])


@pytest.mark.parametrize(
    "words",
    [
        "-c",
        "query -c",
        "check --smtpd-conf",
        "import mail alias",
        "import --token-file",
        "set --undo-dir",
        "export mail alias",
    ],
)
def test_shell_completes_names_of_files(words):
    """Without its own completion the shell does so everywhere."""
    words = {"COMP_WORDS": f"table-consulctl {words} /et", "COMP_CWORD": str(len(words.split()) + 1)}
    asked = {**os.environ, **words, "_TABLE_CONSULCTL_COMPLETE": "bash_complete"}
    done = subprocess.run(CONTROL, env=asked, capture_output=True, text=True, check=False)
    assert done.stdout == "file,/et\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_works_as_documented(shell):
    assert f"_TABLE_CONSULCTL_COMPLETE={shell}_source table-consulctl" in source("table-consulctl.8")
    asked = {**os.environ, "_TABLE_CONSULCTL_COMPLETE": f"{shell}_source"}
    done = subprocess.run(CONTROL, env=asked, capture_output=True, text=True, check=False)
    if "not supported" in done.stderr or "older than" in done.stderr:
        pytest.skip(done.stderr)
    assert f"_TABLE_CONSULCTL_COMPLETE={shell}_complete" in done.stdout
    words = {"COMP_WORDS": "table-consulctl qu", "COMP_CWORD": "1" if shell != "fish" else "qu"}
    asked = {**os.environ, **words, "_TABLE_CONSULCTL_COMPLETE": f"{shell}_complete"}
    done = subprocess.run(CONTROL, env=asked, capture_output=True, text=True, check=False)
    assert "query" in done.stdout
    assert "lint" not in done.stdout
