"""``make install``, ``pip install``, and the two commands of README, each in the environment of an operator."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pip
import pytest

from table_consul import __version__
from tests.conftest import _or_skip
from tests.e2e import table_files, until
from tests.rig import bare, cache, package
from tests.rig.opensmtpd import LIBEXEC, Smtpd
from tests.rig.root import SUITES, Root

pytestmark = pytest.mark.real

DIALOGUE = "config|ready\ntable|0.1|0|aliases|lookup|alias|1|root\n"
EXPORT = '[{"key": "aliases/alias/root", "flags": 0, "value": "Z2lsbGVz"}]'
FILES = {
    "share/bash-completion/completions/table-consulctl",
    "share/zsh/site-functions/_table-consulctl",
    "share/fish/vendor_completions.d/table-consulctl.fish",
}
LIST = "contrib/install/requirements.txt"
PAGES = {"man5/table-consul.toml.5", "man8/table-consul.8", "man8/table-consulctl.8", "man8/table-procexec.8"}
PROGRAMS = {"libexec/table-consul", "libexec/table-procexec", "sbin/table-consulctl"}


def make(tree, *arguments, umask=0o022):
    """The output of a target, run in a copy of the project because the checkout may change."""
    done = subprocess.run(("make", *arguments), cwd=tree, capture_output=True, text=True, check=False, umask=umask)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the project, and beside it the wheels of its requirements for Pythons without them."""
    tree = package.copy(tmp_path_factory.mktemp("tree") / "table-consul")
    with _or_skip():
        options = ("--quiet", "--require-hashes", "--dest", tree.parent / "wheels", "--requirement", tree / LIST)
        cache.run(sys.executable, "-m", "pip", "download", *options)
    return tree


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A Python without packages, not even pip."""
    place = tmp_path_factory.mktemp("python")
    cache.run(sys.executable, "-m", "venv", "--without-pip", place)
    return place / "bin/python"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("an install") / "usr local"


def variables(place):
    return f"PREFIX={place}", f"LIBEXECDIR={place}/libexec"


@pytest.fixture(scope="module")
def installed(tree, place, python):
    """An install by an operator with umask 077, into folders with a space in their names."""
    for path in tree.rglob("*"):
        path.chmod(path.stat().st_mode & 0o700)
    said = make(tree, "install", f"PYTHON={python}", "WHEELS=../wheels", *variables(place), umask=0o077)
    assert "missing: msgspec>=0.19,<1: not installed\n" in said
    return place


def files_of(place):
    """The files except those of the package, and the examples."""
    apart = (place / "lib/table-consul", place / "share/doc/table-consul/examples")
    return {
        str(path.relative_to(place))
        for path in place.rglob("*")
        if not path.is_dir() and not any(map(path.is_relative_to, apart))
    }


def ask(program, folder):
    """The answer of the program for root, with an export of Consul as its source."""
    (folder / "export.json").write_text(EXPORT)
    (folder / "table-consul.toml").write_text(f'[consul]\naddress = "file://{folder}/export.json"\n')
    command = (program, folder / "table-consul.toml")
    return subprocess.run(command, input=DIALOGUE, capture_output=True, text=True, check=True).stdout.splitlines()[-1]


@pytest.mark.timeout(300)
def test_only_programs_and_pages_are_installed(installed):
    assert files_of(installed) == PROGRAMS | FILES | {f"share/man/{page}" for page in PAGES}
    examples = {path.name for path in (installed / "share/doc/table-consul/examples").iterdir()}
    assert {"table-consul.toml.example", "policies", "prometheus", "grafana"} <= examples
    assert not {"container", "install"} & examples
    assert {path.name for path in (installed / "lib").iterdir()} == {"table-consul"}
    inside = {path.name for path in (installed / "lib/table-consul").iterdir()}
    assert {"table_consul", "msgspec", "click", "prometheus_client"} <= inside
    assert not {"bin", "share"} & inside


@pytest.mark.timeout(300)
def test_unprivileged_user_of_smtpd_can_read_all_files(installed):
    closed = [
        path
        for path in installed.rglob("*")
        if not path.stat().st_mode & stat.S_IROTH or (path.is_dir() and not path.stat().st_mode & stat.S_IXOTH)
    ]
    assert closed == []
    assert [oct((installed / name).stat().st_mode & 0o777) for name in sorted(PROGRAMS)] == ["0o755"] * 3
    assert [path for path in installed.rglob("*") if path.stat().st_mode & 0o022 and not path.is_symlink()] == []


@pytest.mark.timeout(300)
def test_installed_programs_work(installed, tmp_path):
    for name in PROGRAMS:
        said = subprocess.run((installed / name, "--version"), capture_output=True, text=True, check=True, cwd="/")
        assert said.stdout == f"{Path(name).name} {__version__}\n"
    assert ask(installed / "libexec/table-consul", tmp_path) == "lookup-result|1|found|gilles"
    query = (
        installed / "sbin/table-consulctl",
        "-c",
        tmp_path / "table-consul.toml",
        "query",
        "aliases",
        "alias",
        "root",
    )
    assert subprocess.run(query, capture_output=True, text=True, check=True).stdout == "gilles\n"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["msgspec/__init__.py", "table_consul/cli.py", "table_consul/__init__.py"])
def test_program_whose_package_does_not_load_answers_smtpd_with_the_reason(installed, tmp_path, name):
    path = installed / "lib/table-consul" / name
    whole = path.read_bytes()
    path.write_text("def of another Python(:")
    try:
        answer = ask(installed / "libexec/table-consul", tmp_path)
    finally:
        path.write_bytes(whole)
    assert answer.startswith("lookup-result|1|error|table-consul cannot be loaded: SyntaxError: ")
    assert ask(installed / "libexec/table-consul", tmp_path) == "lookup-result|1|found|gilles"


@pytest.mark.timeout(300)
def test_failed_install_after_an_interrupted_one_restores_the_older_version(installed, tree, python, tmp_path):
    app = installed / "lib/table-consul"
    app.rename(app.with_name("table-consul.old"))
    app.with_name("table-consul.new").mkdir()
    failed = ("make", "install", f"PYTHON={python}", "WHEELS=/nowhere", *variables(installed))
    assert subprocess.run(failed, cwd=tree, capture_output=True, check=False).returncode != 0
    assert ask(installed / "libexec/table-consul", tmp_path) == "lookup-result|1|found|gilles"


@pytest.mark.timeout(300)
def test_upgrade_removes_the_older_version_and_keeps_other_files(installed, tree):
    app = installed / "lib/table-consul"
    for name in (
        "table_consul/gone.py",
        "table_consul-0.1.dist-info/METADATA",
        "bin/table-consul",
        "oldlib/__init__.py",
    ):
        (app / name).parent.mkdir(exist_ok=True)
        (app / name).write_text("of an older version\n")
    (app.with_name("table-consul.new")).mkdir(exist_ok=True)
    (app.with_name("table-consul.new") / "half").write_text("of an install that was broken off\n")
    (installed / "libexec/table-consul").write_text("of an older version\n")
    others = ("libexec/table-ldap", "sbin/consul", "share/man/man8/smtpd.8", "lib/other/x")
    for name in others:
        (installed / name).parent.mkdir(exist_ok=True)
        (installed / name).write_text("of others\n")
    before = files_of(installed)
    make(tree, "install", f"PYTHON={sys.executable}", *variables(installed))
    assert files_of(installed) == before - {"lib/table-consul.new/half"}
    assert {path.name for path in app.parent.iterdir()} == {"table-consul", "other"}
    assert not [
        path for path in app.rglob("*") if path.name in {"gone.py", "oldlib", "bin", "table_consul-0.1.dist-info"}
    ]
    said = subprocess.run((installed / "libexec/table-consul", "--version"), capture_output=True, text=True, check=True)
    assert said.stdout == f"table-consul {__version__}\n"
    # Interrupted before its last step, an upgrade leaves the older version working.
    broken = ("make", "install", "PYTHON=/bin/false", *variables(installed))
    assert subprocess.run(broken, cwd=tree, capture_output=True, check=False).returncode != 0
    assert files_of(installed) == before - {"lib/table-consul.new/half"}
    make(tree, "uninstall", *variables(installed))
    assert files_of(installed) == set(others)
    assert [path for path in installed.rglob("*") if "table-consul" in path.name] == []


SYNC = """\
#!/bin/sh
find {place} -path '*/table-consul.new/table_consul/cli.py' -o -name 'table-*.new' -type f >>{said}
"""


@pytest.mark.timeout(300)
def test_files_are_on_disk_before_they_replace_others(tree, tmp_path, monkeypatch):
    """After a power failure a renamed file may be empty, and smtpd exits if a table does not start."""
    said, sync = tmp_path / "said", tmp_path / "bin/sync"
    sync.parent.mkdir()
    sync.write_text(SYNC.format(place=tmp_path / "usr", said=said))
    sync.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sync.parent}:{os.environ['PATH']}")
    make(tree, "install", f"PYTHON={sys.executable}", *variables(tmp_path / "usr"))
    names = {f"{name}.new" for name in PROGRAMS} | {"lib/table-consul.new/table_consul/cli.py"}
    assert {str(Path(line).relative_to(tmp_path / "usr")) for line in said.read_text().splitlines()} == names


@pytest.mark.timeout(300)
def test_installed_packages_of_python_are_used(tree, tmp_path):
    # This Python has them all, as the tests need them.
    said = make(tree, "install", f"PYTHON={sys.executable}", "WHEELS=/nowhere", *variables(tmp_path))
    assert "missing" not in said
    assert {path.name for path in (tmp_path / "lib/table-consul").iterdir()} == {"table_consul"}
    assert ask(tmp_path / "libexec/table-consul", tmp_path) == "lookup-result|1|found|gilles"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("appdir", ["", "/", "/site", "/table-consul/"])
def test_folder_with_files_of_others_is_neither_replaced_nor_removed(tree, tmp_path, appdir):
    """An empty ``APPDIR``, as packagers set it, makes it the whole of ``DESTDIR``."""
    root = tmp_path / "root"
    others = {root / "etc/passwd", root / "site/consul/__init__.py", root / "table-consul/other"}
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    options = (f"PYTHON={sys.executable}", f"DESTDIR={root}", "PREFIX=/usr", f"APPDIR={appdir}")
    refused = subprocess.run(("make", "install", *options), cwd=tree, capture_output=True, text=True, check=False)
    assert (refused.returncode, "APPDIR: must end with /table-consul" in refused.stdout) == (2, True)
    make(tree, "install-files", *options)
    assert (root / "usr/sbin/table-consulctl").exists()
    make(tree, "uninstall", *options)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == others


OLD_PYTHON = """\
#!/bin/sh
exec {} -c 'import sys; sys.version_info = (3, 10, 12); exec(sys.argv[2])' "$@"
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("python", "extras", "reason"),
    [
        (OLD_PYTHON, "", "Python 3.11 or later is required: set PYTHON"),
        ("", "metrics regex", "EXTRAS: unknown extra 'metrics regex' (use a list of auth,metrics,regex)"),
    ],
    ids=["python", "extras"],
)
def test_install_that_cannot_work_ends_with_the_reason(tree, tmp_path, python, extras, reason):
    stand_in = tmp_path / "python"
    stand_in.write_text(python.format(sys.executable))
    stand_in.chmod(0o755)
    options = (f"PYTHON={stand_in if python else sys.executable}", f"EXTRAS={extras}", *variables(tmp_path / "usr"))
    done = subprocess.run(("make", "install", *options), cwd=tree, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, reason)
    assert files_of(tmp_path / "usr") == set()


@pytest.mark.timeout(300)
def test_python_that_no_program_can_start_with_is_refused(tree, tmp_path, monkeypatch):
    """The first line of a program cannot quote the path of its Python, and smtpd exits if a table does not start."""
    cache.run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "my python")
    monkeypatch.setenv("PATH", f"{tmp_path}/my python/bin:/usr/bin:/bin")
    command = ("make", "install", *variables(tmp_path / "usr"))
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    reason = f"PYTHON: {tmp_path}/my python/bin/python3 contains a space, so no program can start with it"
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, reason)
    assert files_of(tmp_path / "usr") == set()


@pytest.mark.timeout(300)
def test_wheels_with_other_hashes_are_refused(tree, python, tmp_path):
    (tmp_path / "wheels").mkdir()
    for path in (tree.parent / "wheels").iterdir():
        (tmp_path / "wheels" / path.name).write_bytes(path.read_bytes() + b"changed" * path.name.startswith("click"))
    command = ("make", "install", f"PYTHON={python}", f"WHEELS={tmp_path}/wheels", *variables(tmp_path / "usr"))
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert files_of(tmp_path / "usr") == set()


STORY = """
listen on 127.0.0.1 port $smtp_port
action "local" mbox alias <consul>
match from any for local action "local"
"""
LINES = {
    "consul:": "table consul consul:/etc/mail/table-consul.toml",
    "procexec:": f'table consul "procexec:/{LIBEXEC}/table-consul /etc/mail/table-consul.toml"',
}


class Installed(Smtpd):
    """An smtpd with the files of ``make install`` in its root, and none of the rig's."""

    def __init__(self, root, tree, line, files):
        super().__init__(root, line + STORY, files)
        (self._tree / LIBEXEC / "table-consul").unlink()
        make(tree, "install", f"DESTDIR={self._tree}", f"PYTHON=/usr/bin/python{root.python}")
        self._tables = 2 if "procexec:" in line and root.release in {"6.8", "7.4"} else 1

    @property
    def backends(self):
        return [pid for pid, line in self.pids.items() if f"/{LIBEXEC}/table-" in line]


@pytest.fixture(scope="module")
def root_of_our_python():
    """A root with the Python of this machine, because compiled modules fit one version only."""
    with _or_skip():
        for release in SUITES:
            root = Root(release)
            if Path(f"/usr/bin/python{root.python}").exists():
                return root
        raise cache.Unavailable("this machine's Python is that of no root: run it on Debian 12")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", LINES)
def test_smtpd_uses_the_installed_programs(consul, root_of_our_python, tree, name):
    server = Installed(root_of_our_python, tree, LINES[name], table_files(consul))
    traces = [path for path in server._tree.rglob("*") if path.is_file() and path.name.startswith("table-")]
    assert [path for path in traces if str(server._tree).encode() in path.read_bytes()] == []
    with server:
        assert server.send("root@localhost", subject="before")["root@localhost"][0] == 250
        server.wait_for_mail("root", "before")
        consul.kv_txn({"consul/alias/root": "gilles", "consul/alias/arrived": "eric"})
        until(lambda: server.send("arrived@localhost")["arrived@localhost"][0], 250)
        assert server.send("root@localhost", subject="after")["root@localhost"][0] == 250
        server.wait_for_mail("gilles", "after")
        assert server.run("/usr/local/sbin/table-consulctl", "query", "consul", "alias", "root") == "gilles\n"
        assert server.exists("/usr/local/share/man/man8/table-consul.8")


NEWCOMER = f"""
cd /root/table-consul
make .venv/.stamp
.venv/bin/table-consul --version
.venv/bin/python -m tests.rig.demo --socket
make install LIBEXECDIR=/{LIBEXEC}
cd /
/{LIBEXEC}/table-consul --version
table-consulctl --help
"""


@pytest.mark.timeout(600)
def test_commands_of_the_readme_work_on_a_fresh_debian_with_make_and_python(tree):
    with _or_skip():
        root = bare.debian()
    with bare.Layer(root, {"/root/table-consul": tree}, network=True) as layer:
        assert "No such file" in layer.run("make --version >/dev/null; python3 --version; ls /usr/bin/pip 2>&1 || true")
        said = layer.run(NEWCOMER, timeout=570)
    assert said.count(f"table-consul {__version__}\n") == 2
    assert "delivered" in said or "Mail went where Consul said" in said
    assert "Usage: table-consulctl" in said


WITH_PIP = f"""
cd /root
python3 -m venv --without-pip venv
export PYTHONPATH=/mnt/pip
venv/bin/python -m pip install --quiet --no-index --find-links /mnt/wheels '/mnt/wheel/WHEEL[metrics,regex]'
venv/bin/python -m pip check
unset PYTHONPATH
export PATH=/root/venv/bin:$PATH
table-consul --version
table-procexec --version
table-consulctl --help
echo '{EXPORT}' >export.json
printf '[consul]\\naddress = "file:///root/export.json"\\n' >table-consul.toml
printf '{DIALOGUE.replace(chr(10), chr(92) + "n")}' | table-consul /root/table-consul.toml
echo "answer: $(table-consulctl -c table-consul.toml query aliases alias root)"
find venv/share -type f
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("release", ["6.8", "7.6", "7.9"])
def test_wheel_works_under_each_python(release):
    with _or_skip():
        root = Root(release)
        wheels = package.wheels(root.python)
        wheel = package.wheel()
    bound = {"/mnt/pip/pip": Path(pip.__file__).parent, "/mnt/wheels": wheels, "/mnt/wheel": wheel.parent}
    with bare.Layer(root.path, bound) as layer:
        said = layer.run(WITH_PIP.replace("WHEEL", wheel.name)).splitlines()
    assert "No broken requirements found." in said
    assert said.count(f"table-consul {__version__}") == said.count(f"table-procexec {__version__}") == 1
    assert [line for line in said if "Usage: table-consulctl" in line]
    assert "lookup-result|1|found|gilles" in said
    assert "answer: gilles" in said
    assert {f"venv/share/man/{page}" for page in PAGES} == {line for line in said if line.startswith("venv/share/man")}


def test_package_settings_of_this_machine_are_passed_on(monkeypatch, tmp_path):
    (tmp_path / "ca.pem").touch()
    monkeypatch.setenv("PIP_CERT", str(tmp_path / "ca.pem"))
    (tmp_path / "simple").mkdir()
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"file://{tmp_path}/simple https://pypi.example.org/simple")
    settings = bare.pip_settings()
    assert settings["PIP_CERT"] == str(tmp_path / "ca.pem")
    assert {tmp_path, tmp_path / "ca.pem"} <= {*bare.named_paths(settings.values())}
