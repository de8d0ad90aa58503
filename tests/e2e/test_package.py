"""The Debian package on Debian 13 and 14: installed, used, upgraded, broken, removed and purged.

The tests of a host run in order on the same host.
"""

from __future__ import annotations

import contextlib
import os
import signal
import smtplib

import pytest

from table_consul import __version__
from tests.conftest import _or_skip
from tests.e2e import until
from tests.rig import bare, deb
from tests.rig.opensmtpd import LIBEXEC
from tests.rig.package import CHECKOUT, copy

pytestmark = [pytest.mark.real, pytest.mark.slow]

CONF = """
table aliases consul
listen on 127.0.0.1 port $smtp_port
action "local" mbox alias <aliases>
match from any for local action "local"
"""
APT = "DEBIAN_FRONTEND=noninteractive apt-get -q -y -o Dpkg::Options::=--force-unsafe-io"
PARTS = "cp -r /mnt/parts/lists /mnt/parts/archives /tmp; rm -rf /var/lib/apt/lists; mv /tmp/lists /var/lib/apt;"
OURS = r"""
find / -xdev \( -path /mnt -o -path /opt -o -path /var/log -o -path /var/cache/apt \) -prune -o \
    \( -name '*table?consul*' -o -name '*procexec*' -o -path '/etc/mail*' \) -print
"""
OWNERS = "stat -c '%U:%G %a' /etc/mail/table-consul.toml /var/lib/table-consul/snapshots"
LOOPBACK = "import fcntl, socket, struct; fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sh14x', b'lo', 1))"


@pytest.fixture(scope="module")
def package():
    with _or_skip():
        return deb.built()


@pytest.fixture(scope="module", params=["7.6", "7.9"])
def host(request, package, _consul_agent):
    """A host with OpenSMTPD and the lower version of the package; it reads the Consul of the tests, not port 8500."""
    with _or_skip():
        made = deb.Host(request.param, CONF, {"CONSUL_HTTP_ADDR": _consul_agent.address})
    try:
        made.sh(f"{PARTS} mv /tmp/archives/*.deb /var/cache/apt/archives; {APT} install /mnt/lower.deb")
        yield made
    finally:
        made.close()


def version(host):
    return host.sh(f"/{LIBEXEC}/table-consul --version").split()[-1]


def deliver(host, consul, user, subject):
    """Deliver a message to root after an edit of its alias; a second key shows when the edit has arrived."""
    consul.kv_txn({"aliases/alias/root": user, f"aliases/alias/{subject}": "root"})
    until(lambda: host.send(f"{subject}@localhost")[f"{subject}@localhost"][0], 250)
    assert host.send("root@localhost", subject=subject)["root@localhost"][0] == 250
    host.wait_for_mail(user, subject)
    assert host.sh("table-consulctl query --live aliases alias root").strip() == user


@pytest.mark.timeout(300)
def test_apt_installs_the_package_with_packages_of_debian_only(host, consul):
    assert version(host) == "0.9"
    assert host.sh("dpkg-query -W -f '${Status}' table-consul python3-consul python3-re2").count("install ok") == 3
    checked = host.sh(f"su -s /bin/sh opensmtpd -c '/{LIBEXEC}/table-consul --check'")
    assert checked.endswith("/etc/mail/table-consul.toml: ok\n")
    assert host.sh(OWNERS) == "root:opensmtpd 640\nroot:opensmtpd 770\n"


@pytest.mark.timeout(120)
def test_next_message_follows_the_key(host, consul):
    host.start()
    deliver(host, consul, "gilles", "before")
    deliver(host, consul, "eric", "after")
    assert host.exists("/var/lib/table-consul/snapshots/aliases.json")


@pytest.mark.timeout(120)
def test_upgrade_does_not_disturb_the_running_smtpd(host, consul):
    before = host.pids
    host.sh("dpkg --install /mnt/new.deb")
    assert version(host) == __version__
    assert not host.exists("/usr/lib/python3/dist-packages/table_consul/gone.py")
    deliver(host, consul, "joerg", "upgraded")
    assert host.pids == before
    host.stop()
    host.start()
    deliver(host, consul, "gilles", "restarted")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("command", ["ln -s /etc/mail", "touch", "mkfifo", "mkdir -m 0777"])
def test_upgrade_replaces_what_smtpd_s_user_left_for_the_folder_of_snapshots(host, command):
    """Before the package, an administrator may have given /var/lib/table-consul to that user."""
    host.stop()
    host.sh(f"""
        rm -r /var/lib/table-consul/snapshots
        chown opensmtpd:opensmtpd /var/lib/table-consul
        su -s /bin/sh opensmtpd -c '{command} /var/lib/table-consul/snapshots'
        dpkg --install /mnt/new.deb
    """)
    assert host.sh("stat -c '%U:%G %a' /etc/mail /var/lib/table-consul") == "root:root 755\n" * 2
    assert host.sh(OWNERS) == "root:opensmtpd 640\nroot:opensmtpd 770\n"


@pytest.mark.timeout(120)
def test_removed_dependency_defers_mail_and_smtpd_keeps_running(host, consul):
    host.stop()
    host.sh("dpkg --remove --force-depends python3-msgspec")
    host.start()
    code, _ = host.send("root@localhost")["root@localhost"]
    assert 400 <= code < 500
    assert "table-consul cannot be loaded: ModuleNotFoundError: No module named 'msgspec'" in host.log
    assert host.alive
    host.stop()
    host.sh("dpkg --install /var/cache/apt/archives/python3-msgspec_*.deb")
    host.start()
    deliver(host, consul, "eric", "repaired")


@pytest.mark.timeout(120)
def test_smtpd_whose_table_is_killed_exits_with_a_failure_as_the_drop_in_expects(host):
    (table,) = host.backends
    os.kill(table, signal.SIGKILL)
    with pytest.raises(smtplib.SMTPServerDisconnected):
        host.send("root@localhost")
    assert host.exit_status() != 0
    host.stop()
    drop_in = host.sh("cat /usr/lib/systemd/system/opensmtpd.service.d/table-consul.conf")
    assert "\nRestart=on-failure\n" in drop_in


@pytest.mark.timeout(120)
def test_autopkgtest_passes(host):
    host.write("/etc/smtpd.conf", (host.root.path / "etc/smtpd.conf").read_bytes())
    host.write("/mnt/story", (CHECKOUT / "debian/tests/story").read_bytes())
    config, restored = "/etc/mail/table-consul.toml", "dpkg --install --force-confnew,confask /mnt/new.deb"
    said = host.sh(f'unshare --net sh -ec "python3 -c \\"{LOOPBACK}\\"; sh /mnt/story"; cat {config}; {restored}')
    assert "the messages went where the table said" in said


@pytest.mark.timeout(120)
def test_purge_leaves_nothing(host):
    host.sh(f"{APT} remove table-consul")
    left = host.sh(OURS).split()
    assert "/etc/mail/table-consul.toml" in left
    assert not [path for path in left if path.startswith("/usr/")]
    host.sh(f"{APT} purge table-consul")
    assert host.sh(OURS) == ""


# smtpd reads the table only for a message over the socket.
SERVICE = """
wait_for() { for _ in $(seq 100); do "$@" >/dev/null && return; sleep 0.1; done; }
table() { pgrep -f libexec/opensmtpd/table-consul; }
wait_for smtpctl show status
wait_for table
systemctl show --property After,Restart,RuntimeDirectory,StateDirectory opensmtpd.service
su -s /bin/sh opensmtpd -c 'touch /var/lib/table-consul/snapshots/kept'
first=$(table)
kill -KILL $first
echo 'Subject: hello' | sendmail root
restarted() { table && [ "$(table)" != $first ]; }
wait_for restarted
systemctl show --property NRestarts,ActiveState opensmtpd.service
stat -c '%n %U:%G %a' /run/table-consul /run/table-consul/* /var/lib/table-consul /var/lib/table-consul/*
stat -c '%n %U' /var/lib/table-consul/snapshots/kept
second=$(table)
dpkg --install /mnt/new.deb
[ "$(table)" != $second ] && echo "upgraded: restarted"
"""


@pytest.mark.timeout(300)
def test_systemd_starts_smtpd_after_consul_and_again_when_it_fails(package):
    """opensmtpd is installed after the package here."""
    with _or_skip():
        host = deb.Host("7.6", CONF, {})
    with contextlib.closing(host):
        host.sh(f"""
            {PARTS} mv /tmp/archives/*.deb /var/cache/apt/archives
            {APT} purge opensmtpd
            {APT} --no-install-recommends install systemd procps
        """)
        said = host.sh(f"{APT} --no-install-recommends install /mnt/new.deb 2>&1")
        assert said.endswith(f"\nSetting up table-consul ({__version__}) ...\n")
        assert host.sh("stat -c '%U:%G %a' /etc/mail/table-consul.toml") == "root:root 640\n"
        host.sh(f"{APT} --no-install-recommends install opensmtpd")
        assert host.sh(OWNERS) == "root:opensmtpd 640\nroot:opensmtpd 770\n"
        host.sh("sed -i 's/^table aliases .*/table aliases consul/; s/^listen on .*/listen on socket/' /etc/smtpd.conf")
        said = host.boot(SERVICE).splitlines()
    assert any(line.startswith("After=") and "consul.service" in line for line in said), said
    assert {"Restart=on-failure", "NRestarts=1", "ActiveState=active", "upgraded: restarted"} <= {*said}, said
    assert {"RuntimeDirectory=table-consul", "StateDirectory=table-consul"} <= {*said}, said
    assert {
        "/run/table-consul root:root 755",
        "/run/table-consul/metrics root:opensmtpd 775",
        "/var/lib/table-consul root:root 755",
        "/var/lib/table-consul/snapshots root:opensmtpd 770",
        "/var/lib/table-consul/snapshots/kept opensmtpd",
    } <= {*said}, said


@pytest.mark.timeout(300)
@pytest.mark.parametrize("purge", ["apt-get -q -y purge", "dpkg --purge"])
def test_next_group_with_the_number_of_smtpd_s_may_read_nothing(package, purge):
    """The purge of opensmtpd deletes its group, and the next group gets its number."""
    with _or_skip():
        host = deb.Host("7.6", CONF, {})
    with contextlib.closing(host):
        host.sh(f"""
            {PARTS} mv /tmp/archives/*.deb /var/cache/apt/archives
            {APT} --no-install-recommends install /mnt/new.deb
            {purge} opensmtpd
            groupadd --gid 101 another
        """)
        assert host.sh(OWNERS) == "root:root 640\nroot:root 770\n"
        host.sh(f"{APT} --no-install-recommends install opensmtpd")
        assert host.sh(OWNERS) == "root:opensmtpd 640\nroot:opensmtpd 770\n"


@pytest.mark.timeout(300)
def test_upgrade_leaves_the_folder_of_another_smtpd_alone(package):
    """An OpenSMTPD that is not Debian's runs tables as _smtpd."""
    with _or_skip():
        host = deb.Host("7.6", CONF, {})
    with contextlib.closing(host):
        host.sh(f"""
            {PARTS} mv /tmp/archives/*.deb /var/cache/apt/archives
            {APT} purge opensmtpd
            {APT} --no-install-recommends install /mnt/new.deb
            groupadd --system _smtpd
            chgrp _smtpd /etc/mail/table-consul.toml
            install -d -g _smtpd -m 0770 /var/lib/table-consul/snapshots
            dpkg --install /mnt/new.deb
        """)
        assert host.sh(OWNERS) == "root:_smtpd 640\nroot:_smtpd 770\n"


@pytest.mark.timeout(300)
def test_lintian_finds_no_problem(package):
    with bare.Layer(deb.build_root(), {"/mnt/deb": package.parent}) as layer:
        said = layer.run(f"lintian --allow-root --fail-on=error,warning /mnt/deb/{package.name}")
    assert [line for line in said.splitlines() if line.startswith(("E:", "W:"))] == []


@pytest.mark.timeout(300)
def test_package_built_again_has_the_same_bytes(package, tmp_path):
    tree = tmp_path / "elsewhere"
    copy(tree)
    for path in tree.rglob("*"):
        os.utime(path, (981173106, 981173106), follow_symlinks=False)
    assert deb.build(tree, tmp_path).read_bytes() == package.read_bytes()
