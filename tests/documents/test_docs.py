"""What the documents say is so: examples are taken by what they are for, names and numbers are the program's."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import msgspec
import pytest

from table_consul import cli, config
from table_consul.ctl import main
from table_consul.errors import EntryError
from table_consul.metrics import METRICS
from table_consul.services import SERVICES, Table
from table_consul.services.regex import regcomp
from tests.dialogue import Child
from tests.documents.document import Document
from tests.rig.waiting import wait_for

ROOT = Path(__file__).parents[2]
PAGES = [
    Document(path)
    for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "bench/README.md")
    if path.exists()
]
BY_NAME = {page.path.name: page for page in PAGES if page.path.parent != ROOT / "bench"}
OPERATING, KEYS, CONFIGURATION = (BY_NAME[f"{name}.md"] for name in ("operating", "keys", "configuration"))
SOURCE = "".join(path.read_text() for path in sorted(Path(config.__file__).parent.glob("*.py")))


EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.path.relative_to(ROOT)))


def blocks(*languages):
    found = [(page, block) for page in PAGES for block in page.fenced(*languages)]
    return pytest.mark.parametrize(
        ("page", "block"), found, ids=[f"{page.path.name}:{block.line}" for page, block in found]
    )


def cells(line):
    """The cells of a row of a Markdown table; `\\|` is no border."""
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def rows(text):
    """The rows of the Markdown tables in a text, without heads and rules."""
    lines = text.splitlines()
    return [
        cells(line)
        for line, after in itertools.pairwise([*lines, ""])
        if line.startswith("|") and not line.startswith("|---") and not after.startswith("|---")
    ]


def section(page, heading):
    """The text between a heading and the next of its own level or above."""
    level, _, _ = heading.partition(" ")
    begins = page.text.index(f"\n{heading}\n") + len(heading) + 2
    ends = re.search(rf"^#{{1,{len(level)}}} ", page.text[begins:], re.MULTILINE)
    return page.text[begins : begins + ends.start() if ends else len(page.text)]


# ---- every document ----


@EVERY_PAGE
def test_links_lead_somewhere(page):
    broken = []
    for link in page.links():
        name, _, anchor = link.partition("#")
        target = page.path if not name else (page.path.parent / name).resolve()
        if not target.exists() or (anchor and anchor not in Document(target).anchors()):
            broken.append(link)
    assert broken == []


@EVERY_PAGE
def test_files_of_the_project_that_are_named_are_there(page):
    named = re.findall(r"`((?:contrib|docs|bench|tests|man|\.ci)/[\w./-]*)`", page.text)
    assert [name for name in named if not (ROOT / name).exists()] == []


@EVERY_PAGE
def test_lines_can_be_read_in_a_terminal(page):
    long = [line for line in page.prose.splitlines() if len(line) > 130 and not line.startswith("|")]
    assert long == []


@blocks("toml")
def test_configurations_are_accepted(page, block, tmp_path):
    path = tmp_path / "table-consul.toml"
    path.write_text(block.text)
    config.load(str(path), {})


@blocks("json")
def test_json_is_json(page, block):
    json.loads(block.text)


def test_there_are_commands_to_check():
    assert len([command for page in PAGES for command in page.commands()]) > 20


@EVERY_PAGE
def test_commands_of_table_consulctl_are_understood(page):
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


@EVERY_PAGE
def test_commands_and_options_that_the_text_names_are_there(page):
    controls = set(re.findall(r"`table-consulctl ([a-z]+)", page.text))
    assert sorted(controls - set(main.COMMANDS)) == []
    options = set(re.findall(r"table-consul (--[a-z]+)", page.text))
    assert sorted(options - set(re.findall(r"--[a-z]+", cli._parser().format_help()))) == []


@EVERY_PAGE
def test_targets_of_make_are_there(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = [
        word
        for command in page.commands()
        for line in re.findall(r"^make ([^\n]*)", command.text)
        for word in shlex.split(line)
        if "=" not in word
    ]
    named += re.findall(r"`make ([a-z]+)[` ]", page.text)
    assert sorted(set(named) - targets) == []


# ---- smtpd.conf ----

CHECK = """\
set -e
mount -t tmpfs tmpfs /tmp
cat > /tmp/smtpd.conf
mount -t tmpfs -o mode=755 tmpfs /usr/libexec/opensmtpd
for backend in table-consul table-procexec; do install -m 0755 /bin/true /usr/libexec/opensmtpd/$backend; done
smtpd -n -f /tmp/smtpd.conf 2>&1
"""


@pytest.mark.real
@pytest.mark.parametrize("release", ["6.8", "7.9"])
def test_smtpd_takes_every_example(release):
    if os.geteuid() != 0:
        pytest.skip("a real OpenSMTPD needs root (run it as root: sudo make test)")
    from tests.rig import cache, opensmtpd

    try:
        root = opensmtpd.Root(release)
    except cache.Unavailable as error:
        pytest.skip(str(error))
    mounts = 'mount --rbind /dev "$0/dev" && mount -t proc proc "$0/proc" && exec chroot "$0" "$@"'
    examples = [(page, block) for page in PAGES for block in page.fenced("smtpd")]
    assert examples
    for page, block in examples:
        command = ("unshare", "--mount", "sh", "-c", mounts, root.path, "sh", "-c", CHECK)
        text = block.text.replace("file:/etc/mail/aliases", "file:/etc/aliases")
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        said = (done.returncode, done.stdout, done.stderr)
        assert said == (0, "configuration OK\n", ""), f"{page.path.name}:{block.line}"


# ---- keys.md ----


def test_every_service_is_told():
    told = [row[0].strip("`") for row in rows(section(KEYS, "## Services"))]
    assert sorted(told) == sorted(SERVICES)


def posix(pattern):
    """Whether regcomp(3) of this system takes the expression, as smtpd calls it."""
    extended, no_sub = 1, 8
    room = ctypes.create_string_buffer(1024)
    return ctypes.CDLL(None).regcomp(room, pattern, extended | no_sub) == 0


def ours(pattern):
    try:
        regcomp(pattern)
    except EntryError:
        return False
    return True


def test_the_expressions_that_are_refused_are_those_that_are_told():
    pytest.importorskip("re2", reason="expressions need google-re2 (pip install google-re2)")
    table = rows(section(KEYS, "## Expressions"))
    assert len(table) >= 5
    for expression, file_table, here, instead in table:
        pattern = expression.strip("`").encode()
        assert posix(pattern) is file_table.startswith("takes"), expression
        assert ours(pattern) is not here.startswith("refused"), expression
        if instead.startswith("`"):
            assert ours(instead.strip("`").encode())


# ---- configuration.md ----


def told_defaults():
    """The keys of each section with the default that the page gives them."""
    name = ""
    for row in rows(CONFIGURATION.text):
        name = row[0] or name
        for key in re.findall(r"`(\w+)`", row[1]):
            yield re.search(r"\[(\w+)\]", name)[1], key, row[2]


def test_every_key_of_the_configuration_is_told_once():
    told = sorted((name, key) for name, key, _ in told_defaults())
    keys = sorted((section, key) for section, keys in config.KEYS.items() if section != "tables" for key in keys)
    assert told == keys


def test_defaults_are_those_of_the_program(tmp_path):
    (tmp_path / "empty.toml").write_text("")
    silent = config.load(str(tmp_path / "empty.toml"), {})
    real = {
        "consul": {**msgspec.structs.asdict(silent.consul), "address": silent.consul.addresses[0]},
        "defaults": {**msgspec.structs.asdict(Table("consul")), "table": silent.default_table},
        "log": msgspec.structs.asdict(silent.log),
        "metrics": msgspec.structs.asdict(silent.metrics),
    }
    checked = 0
    for name, key, told in told_defaults():
        value = real[name][key]
        if told.startswith("`"):
            assert json.loads(told.strip("`")) == value if not isinstance(value, str) else told.strip("`") == value
            checked += 1
        else:
            assert value in (None, "", {}, silent.defaults.services) or key == "paths", f"{name}.{key}"
    assert checked >= 12


def test_every_variable_of_the_environment_is_told():
    names = set(re.findall(r'"(CONSUL_[A-Z_]+)"', SOURCE))
    assert sorted(name for name in names if f"`{name}`" not in CONFIGURATION.text) == []


# ---- operating.md ----


VARIES = (
    r"\.\.\.|https?://\S+|/var/lib/\S+|\S*aliases\S*(?: from Consul)?(?=:| )|smtpd-tables|[\d.]+-portable"
    r"|[\d.]+ ?|alias\b|connection refused|No space left on device|(?=: )"
)


def test_log_lines_are_those_of_the_program():
    """What stands between the parts that vary is to be found in the source as it is."""
    literals = re.sub(r'"\s*\n\s*f?"', "", SOURCE)
    parts = [
        part.strip(" ;")
        for line, *_ in rows(section(OPERATING, "## Logs"))
        for part in re.split(VARIES, line.strip("`"))
    ]
    assert len(parts) > 30
    assert [part for part in parts if part not in literals] == []


def masked(text):
    """The text without numbers and versions, without the folders of this machine, and on one line."""
    return re.sub(r"\d+(?:\.(?:dev)?\d+)*", "N", re.sub(r"(?<= )/\S*/", "/", " ".join(text.split())))


def test_status_says_what_the_page_shows(consul, tmp_path):
    (shown,) = [command for command in OPERATING.commands() if command.text == "table-consulctl status"]
    consul.kv_put("mail/aliases/alias/root", "gilles")
    consul.kv_put("mail/aliases/alias/backup", "|/usr/local/bin/backup")
    (tmp_path / "table-consul.toml").write_text(
        f'[consul]\naddress = "http://{consul.address}"\n[defaults]\nprefix = "mail"\n[tables.aliases]\n'
        f'[metrics]\ntextfile = "{tmp_path}/table-consul-{{table}}.prom"\n'
    )
    control = [sys.executable, "-c", "import sys; from table_consul.ctl.main import main; sys.exit(main())"]
    with Child(str(tmp_path / "table-consul.toml")) as child:
        child.handshake()
        said: list[str] = []

        def is_said():
            command = [*control, "-c", str(tmp_path / "table-consul.toml"), "status"]
            said[:] = [masked(subprocess.run(command, capture_output=True, text=True, check=False).stdout)]
            return said == [masked(shown.output)]

        wait_for(is_said, 10, lambda: f"{said[0]}\nis not\n{masked(shown.output)}")


def test_metrics_are_those_of_the_program():
    told = [row[0].strip("`") for row in rows(section(OPERATING, "### Metrics"))]
    names = sorted(name for name, *_ in METRICS)
    assert sorted(name.removeprefix("table_consul_").removesuffix("_total") for name in told) == names


def test_alerts_are_those_of_the_rules():
    rules = (ROOT / "contrib/prometheus/table-consul.rules.yml").read_text()
    told = [row[0].strip("`") for row in rows(section(OPERATING, "### Alerts and a dashboard"))]
    assert told == re.findall(r"^ *- alert: (\w+)$", rules, re.MULTILINE)


def test_policies_of_the_page_are_those_of_the_project():
    there = {path.name for path in (ROOT / "contrib/policies").glob("*.hcl")}
    assert there == set(re.findall(r"\(\.\./contrib/policies/([\w-]+\.hcl)\)", OPERATING.text))
