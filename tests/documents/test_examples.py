"""The example files say what the program does: each key of the configuration, each line of smtpd.conf."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from msgspec.structs import asdict, fields

from table_consul import config
from table_consul.services import Table

CONTRIB = Path(__file__).parents[2] / "contrib"
TOML = CONTRIB / "table-consul.toml.example"
SMTPD_CONF = CONTRIB / "smtpd.conf.example"
UNCOMMENTED = re.sub(r"^#(?=[^ \n])", "", TOML.read_text(), flags=re.MULTILINE)
SECTIONS = [section for section in config.KEYS if section != "tables"]


def load(tmp_path: Path, text: str) -> config.Config:
    path = tmp_path / "table-consul.toml"
    path.write_text(text)
    return config.load(str(path), {})


def test_toml_example_as_it_is_changes_nothing(tmp_path):
    assert load(tmp_path, TOML.read_text()) == load(tmp_path, "")


def test_toml_example_is_accepted_with_every_key_uncommented(tmp_path):
    loaded = load(tmp_path, UNCOMMENTED)
    assert loaded.table("outbound").deadline == 0.5
    assert dict(loaded.table("outbound").paths) == {"alias": "mail/aliases", "source": "mail/addresses"}


@pytest.mark.parametrize("section", SECTIONS)
def test_toml_example_holds_every_key_and_no_other(section):
    assert set(tomllib.loads(UNCOMMENTED)[section]) == {*config.KEYS[section]}


def test_toml_example_shows_the_real_defaults(tmp_path):
    shown = tomllib.loads(UNCOMMENTED)
    silent = load(tmp_path, "")
    real = {
        "consul": {**asdict(silent.consul), "address": silent.consul.addresses[0]},
        "defaults": {each.name: getattr(silent.defaults, each.name) for each in fields(Table)},
        "log": asdict(silent.log),
        "metrics": asdict(silent.metrics),
    }
    real["defaults"].update(table=silent.default_table, services=list(silent.defaults.services), paths=None)
    wrong = {
        f"{section}.{key}": (value, real[section][key])
        for section in real
        for key, value in shown[section].items()
        if real[section][key] is not None and (value, type(value)) != (real[section][key], type(real[section][key]))
    }
    assert wrong == {}


@pytest.mark.parametrize("section", SECTIONS)
def test_toml_example_says_where_a_key_is_only_an_example(section):
    told = {
        key
        for block in TOML.read_text().split("\n\n")
        if re.search(r"\(examples?\)", block)
        for key in re.findall(r"^#(?:\[defaults\.)?(\w+)(?: =|\])", block, re.MULTILINE)
    }
    values = {each.name for each in (*fields(Table), *fields(config.ConsulConfig), *fields(config.MetricsConfig))}
    without_default = {
        key
        for key in tomllib.loads(UNCOMMENTED)[section]
        if key in values and getattr(_blank(section), key) in (None, {})
    }
    assert without_default <= told


def _blank(section):
    silent = config.Config(path=None)
    return getattr(silent, section)


def test_toml_example_names_the_variable_of_every_key_that_has_one():
    variables = [name for group in config.VARIABLES for name in group.values()]
    assert [name for name in variables if name not in TOML.read_text()] == []


def test_example_lines_can_be_read_in_a_terminal():
    for path in (TOML, SMTPD_CONF):
        assert [line for line in path.read_text().splitlines() if len(line) > 120] == []


CHECK = """\
set -e
mount -t tmpfs tmpfs /tmp
cat > /tmp/smtpd.conf
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=mail.example.org -keyout /tmp/key -out /tmp/pem 2>/tmp/log
mount -t tmpfs tmpfs /etc/ssl
mkdir /etc/ssl/certs /etc/ssl/private
install -m 0600 /tmp/key /etc/ssl/private/mail.example.org.key
install -m 0644 /tmp/pem /etc/ssl/certs/mail.example.org.pem
mount -t tmpfs -o mode=755 tmpfs /usr/libexec/opensmtpd
for backend in table-consul table-procexec; do install -m 0755 /bin/true /usr/libexec/opensmtpd/$backend; done
smtpd -n -f /tmp/smtpd.conf 2>&1
"""


@pytest.mark.real
@pytest.mark.parametrize("through", ["consul", "procexec"])
@pytest.mark.parametrize("release", ["6.8", "7.4", "7.6", "7.9"])
def test_smtpd_accepts_the_example(release, through):
    if os.geteuid() != 0:
        pytest.skip("a real OpenSMTPD needs root (run it as root: sudo make test)")
    from tests.rig import cache, opensmtpd

    try:
        root = opensmtpd.Root(release)
    except cache.Unavailable as error:
        pytest.skip(str(error))
    text = SMTPD_CONF.read_text()
    if through == "procexec":
        text = text.replace("table aliases  consul:", "#", 1).replace(
            "#table aliases procexec:", "table aliases procexec:"
        )
        assert "\ntable aliases procexec:/" in text
    mounts = 'mount --rbind /dev "$0/dev" && mount -t proc proc "$0/proc" && exec chroot "$0" "$@"'
    command = ("unshare", "--mount", "sh", "-c", mounts, root.path, "sh", "-c", CHECK)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "configuration OK\n", "")
