"""The container image: built, and run as in compose.yaml."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
from pathlib import Path

import pytest

import table_consul
from tests.documents.document import page
from tests.rig import cache, image
from tests.rig.consul import consul_binary, consul_version
from tests.rig.container import Container
from tests.rig.root import require_root
from tests.rig.waiting import wait_for

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

LARGEST_MB = 132
TOKEN = "2d1c5b8e-0000-4000-8000-000000000001"
READ_ONLY = 'key_prefix "consul/" { policy = "read" }'


@pytest.fixture(scope="module")
def built():
    try:
        require_root()
        consul_binary()
        found = image.built()
    except cache.Unavailable as error:
        pytest.skip(str(error))
    megabytes = sum(path.lstat().st_size for path in found.files.rglob("*") if not path.is_symlink()) / 1e6
    print(f"\nthe image: {megabytes:.0f} MB in {sum(1 for _ in found.files.rglob('*'))} files")
    return found


@pytest.fixture
def service():
    try:
        return image.compose("mail")
    except cache.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def container(built):
    """Makes containers of the image with a network, not yet started, and ends them after the test."""
    made = []

    def make(*arguments, **options):
        made.append(Container(built, *arguments, **options))
        made[-1].create()
        return made[-1]

    yield make
    for each in reversed(made):
        each.close()


class Consul:
    """The service consul of compose.yaml beside a container; calls run commands as `docker compose exec` does."""

    def __init__(self, container: Container, folder: Path, hcl: str = "") -> None:
        self._container = container
        service = image.compose("consul")
        folder.mkdir(exist_ok=True)
        (folder / "more.hcl").write_text("performance { raft_multiplier = 1 }\n" + hcl)
        # The entrypoint of Consul's image adds the first two words.
        options = (f"-data-dir={folder / 'data'}", f"-config-file={folder / 'more.hcl'}")
        self.process = container.neighbour(consul_binary(), *service["command"], *options)
        self._health = image.health_command(service["healthcheck"])
        self.token = ""

    def __call__(self, *words: str) -> str:
        done = self._container.beside("env", f"CONSUL_HTTP_TOKEN={self.token}", consul_binary(), *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def healthy(self) -> bool:
        name, *words = self._health
        assert name == "consul"
        return self._container.beside(consul_binary(), *words).returncode == 0

    def wait_for_health(self) -> None:
        wait_for(lambda: self.healthy, 30, lambda: "Consul has no leader")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def delivered(container, mailbox, subject):
    wait_for(lambda: subject in container.subjects(mailbox), 20, lambda: f"no {subject!r}:\n{container.log}")


def refused_until_known(container, recipient):
    """Check that mail to a recipient is refused, and wait until it is accepted."""
    wait_for(lambda: container.send(recipient, "arrived") == 250, 20, lambda: f"refused:\n{container.log}")


def test_compose_yaml_works_from_start_to_mail(container, service, tmp_path):
    mail = container(service=service)
    consul = Consul(mail, tmp_path / "consul")
    assert service["depends_on"]["consul"]["condition"] == "service_healthy"
    consul.wait_for_health()
    mail.start()
    assert mail.wait_for_health() == "mail for postmaster: 550"
    assert mail.send("root@mail.example.org", "too early") == 550
    before = mail.processes()

    consul("kv", "put", "consul/userinfo/gilles", "5000:5000:/var/vmail/gilles")
    consul("kv", "put", "consul/alias/root", "gilles")
    refused_until_known(mail, "root@mail.example.org")
    assert mail.send("root@mail.example.org", "to root") == 250
    delivered(mail, "gilles", "to root")
    delivered(mail, "gilles", "arrived")
    sent = mail.exec("sendmail", "root", stdin="Subject: by hand\n\nhello\n")
    assert (sent.returncode, sent.stderr) == (0, "")
    delivered(mail, "gilles", "by hand")
    assert "too early" not in mail.subjects("gilles")

    consul("kv", "put", "consul/domain/example.org")
    consul("kv", "put", "consul/alias/info@example.org", "gilles")
    refused_until_known(mail, "info@example.org")
    assert mail.send("someone@elsewhere.example", "a stranger's", source="127.0.0.9") == 550

    lasting = {pid: command for pid, command in before.items() if pid in mail.processes()}
    assert {pid: command for pid, command in lasting.items() if "smtpd" in command or "table-consul" in command} == {
        pid: command for pid, command in before.items() if "smtpd" in command or "table-consul" in command
    }
    assert "smtpd" in lasting[1]
    owner = (mail.volume("/var/vmail") / "gilles").stat()
    assert (owner.st_uid, owner.st_gid) == (5000, 5000)
    assert "info: OpenSMTPD 7." in mail.log
    assert re.search(r"^table-consul\[consul\]: INFO: ", mail.log, re.MULTILINE), mail.log
    refused = mail.exec("touch", "/etc/mail/anything")
    assert "Read-only file system" in refused.stderr
    status, seconds = mail.stop()
    assert (status, seconds < 5) == (0, True), mail.log


# First in PATH, this replaces docker for the commands of the page: $1 is compose, $2 its command.
DOCKER = """\
#!/bin/sh
shift; [ "$1" = exec ] || exit 0; shift
[ "$1" = -T ] && shift
case "$1" in
    consul) shift 2; exec {consul} "$@" ;;
    mail) shift; exec {mail} "$@" ;;
esac
exit 1
"""


def test_commands_for_compose_deliver_mail(container, service, tmp_path):
    commands = [line[2:] for line in block_of_the_page("docker compose up") if line.startswith("$ ")]
    assert [bool(re.search(r"exec (consul|-T mail|mail) ", each)) for each in commands] == [False, *[True] * 4]
    mail = container(service=service)
    consul = Consul(mail, tmp_path / "consul")
    consul.wait_for_health()
    mail.start()
    mail.wait_for_health()
    variables = ("env", "-i", *(f"{name}={value}" for name, value in mail.environment.items()))
    parts = {"consul": mail.beside_command(consul_binary()), "mail": (*variables, *mail.exec_command())}
    stand_in = tmp_path / "bin" / "docker"
    stand_in.parent.mkdir()
    stand_in.write_text(DOCKER.format(**{name: shlex.join(command) for name, command in parts.items()}))
    stand_in.chmod(0o755)

    def play(command):
        path = {"PATH": f"{stand_in.parent}:{os.environ['PATH']}"}
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=30, check=False, env=path)
        assert (done.returncode, done.stderr) == (0, ""), command
        return done.stdout

    *before, sends, reads = commands
    for command in before:
        play(command)
    refused_until_known(mail, "root@mail.example.org")
    play(sends)
    delivered(mail, "gilles", "hello")
    assert "It works." in play(reads)


def block_of_the_page(containing):
    (block,) = [each for each in page("docs/operating.md").fenced("console") if containing in each.text]
    return block.text.splitlines()


def test_health_check_fails_while_mail_waits(container, service, tmp_path):
    volumes = tmp_path / "volumes"
    first = container(service=service, volumes=volumes)
    first.start()
    # A table that never read Consul has no data.
    first.wait_for_health(wanted=False, said="mail for postmaster: 4")
    assert 400 <= first.send("root@mail.example.org", "wait") < 500

    consul = Consul(first, tmp_path / "consul")
    consul.wait_for_health()
    consul("kv", "put", "consul/userinfo/*", "5000:5000:/var/vmail/%n")
    first.wait_for_health(said="mail for postmaster: 250")
    copy = volumes / "var-lib-table-consul" / "snapshots" / "consul.json"
    wait_for(lambda: copy.exists() and "consul/userinfo/*" in copy.read_text(), 20, lambda: "no copy on disk")
    consul.stop()
    assert not consul.healthy
    assert first.health() == (True, "mail for postmaster: 250"), "the last good copy is served"
    first.stop()

    second = container(service=service, volumes=volumes)
    second.start()
    assert second.wait_for_health() == "mail for postmaster: 250"
    assert second.send("root@mail.example.org", "during an outage") == 250
    delivered(second, "root", "during an outage")
    # The port of an smtpd with hanging processes stays open.
    pids = " ".join(str(pid) for pid, line in second.processes().items() if "smtpd" in line and pid != 1)
    assert second.exec("sh", "-c", f"kill -STOP {pids}").returncode == 0
    healthy, said = second.health()
    assert (healthy, "timed out" in said) == (False, True), said
    second.exec("sh", "-c", f"kill -CONT {pids}")
    second.wait_for_health()


def test_mounted_files_take_precedence_over_the_environment(container, tmp_path):
    (tmp_path / "smtpd.conf").write_text(
        "table people consul:/etc/mail/own.toml\n"
        "listen on 127.0.0.1 port 2525\n"
        'action "local" maildir "/var/vmail/%{dest.user}" userbase <people> alias <people>\n'
        'match from any for local action "local"\n'
    )
    (tmp_path / "own.toml").write_text('[defaults]\nprefix = "mail"\n[log]\ntarget = "stderr"\nlevel = "debug"\n')
    files = {f"/etc/mail/{name}": tmp_path / name for name in ("smtpd.conf", "own.toml")}
    environment = {
        "CONSUL_HTTP_ADDR": "consul:8500",
        "MAIL_HOSTNAME": "mx1.example.net",
        "HEALTH_PORT": "2525",
        "HEALTH_RECIPIENT": "info@mx1.example.net",
    }
    # Empty folders of the host, owned by root, in place of volumes.
    volumes = tmp_path / "volumes"
    for name in ("var-spool-smtpd", "var-vmail", "var-lib-table-consul"):
        (volumes / name).mkdir(parents=True)
    mail = container(files=files, environment=environment, volumes=volumes)
    consul = Consul(mail, tmp_path / "consul")
    consul.wait_for_health()
    consul("kv", "put", "mail/people/userinfo/gilles", "5000:5000:/var/vmail/gilles")
    consul("kv", "put", "mail/people/alias/info", "gilles")
    mail.start()
    assert mail.wait_for_health(said="250") == "mail for info@mx1.example.net: 250"
    assert "/etc/mail/own.toml: ok" in mail.log
    with mail.network():
        session = socket.create_connection(("127.0.0.1", 2525), 10)
    with session:
        assert session.recv(100).startswith(b"220 mx1.example.net ")
    sent = mail.exec("sendmail", "info", stdin="Subject: by hand\n\nhello\n")
    assert (sent.returncode, sent.stderr) == (0, "")
    wait_for(lambda: list((mail.volume("/var/vmail") / "info/new").glob("*")), 20, lambda: mail.log)


def test_token_file_readable_only_by_root_works(container, service, tmp_path):
    secret = tmp_path / "token"
    files = {"/run/secrets/consul": secret}
    secret.touch(mode=0o600)
    environment = {"CONSUL_HTTP_TOKEN_FILE": "/run/secrets/consul"}
    # Secrets are mounted below /run, then a tmpfs of the container.
    mail = container(service={**service, "tmpfs": ["/tmp"], "read_only": False}, files=files, environment=environment)
    consul = Consul(mail, tmp_path / "consul", 'acl { enabled = true\n default_policy = "deny" }')
    wait_for(lambda: bootstrapped(consul), 30, lambda: "no leader")
    consul("acl", "policy", "create", "-name=mail", f"-rules={READ_ONLY}")
    consul("acl", "token", "create", "-policy-name=mail", f"-secret={TOKEN}")
    consul("kv", "put", "consul/userinfo/*", "5000:5000:/var/vmail/%n")
    secret.write_text(TOKEN + "\n")
    mail.start()
    assert mail.wait_for_health(said="250") == "mail for postmaster: 250"
    assert TOKEN not in mail.log
    assert mail.exec("stat", "-c", "%a %U %G", "/run/table-consul/token").stdout == "440 root opensmtpd\n"


def test_missing_token_file_does_not_stop_smtpd(container, service, tmp_path):
    first = container(service=service, volumes=tmp_path / "volumes")
    consul = Consul(first, tmp_path / "consul")
    consul.wait_for_health()
    consul("kv", "put", "consul/userinfo/*", "5000:5000:/var/vmail/%n")
    first.start()
    first.wait_for_health(said="250")
    copy = tmp_path / "volumes/var-lib-table-consul/snapshots/consul.json"
    wait_for(lambda: copy.exists() and "consul/userinfo/*" in copy.read_text(), 20, lambda: "no copy on disk")
    first.stop()
    # For a bind mount without a source Docker makes a folder.
    for missing in ("/run/secrets/consul", "/tmp"):
        environment = {"CONSUL_HTTP_TOKEN_FILE": missing}
        mail = container(service=service, environment=environment, volumes=tmp_path / "volumes")
        mail.start()
        assert mail.wait_for_health(said="250") == "mail for postmaster: 250"
        assert f"CONSUL_HTTP_TOKEN_FILE: {missing}" in mail.log
        mail.stop()


@pytest.fixture
def read_only(tmp_path):
    """A folder of volumes, in which those for mail and on-disk snapshots belong to root and are read-only."""
    folders = [tmp_path / "volumes" / name for name in ("var-vmail", "var-lib-table-consul")]
    for path in folders:
        (path / "snapshots").mkdir(parents=True)
        cache.run("mount", "--bind", path, path)
        cache.run("mount", "-o", "remount,bind,ro", path)
    yield tmp_path / "volumes"
    for path in folders:
        cache.run("umount", path)


def test_read_only_volumes_do_not_stop_smtpd(container, service, read_only, tmp_path):
    mail = container(service=service, volumes=read_only)
    consul = Consul(mail, tmp_path / "consul")
    consul.wait_for_health()
    consul("kv", "put", "consul/userinfo/*", "5000:5000:/var/vmail/%n")
    mail.start()
    mail.wait_for_health(said="250")
    assert "chown: changing ownership of '/var/lib/table-consul/snapshots': Read-only file system" in mail.log
    assert mail.send("root@mail.example.org", "later") == 250
    wait_for(lambda: "result=TempFail" in mail.log, 20, lambda: mail.log)


def bootstrapped(consul):
    try:
        consul.token = json.loads(consul("acl", "bootstrap", "-format=json"))["SecretID"]
    except (AssertionError, subprocess.TimeoutExpired):
        return False
    return True


def test_bad_configuration_is_in_the_log_and_in_the_health_check(container, tmp_path):
    broken = tmp_path / "table-consul.toml"
    broken.write_text('[defaults]\nprefixx = "mail"\n[log]\ntarget = "stderr"\n')
    mail = container(files={"/etc/mail/table-consul.toml": broken})
    mail.start()
    mail.wait_for_health(wanted=False, said="mail for postmaster: 4")
    assert "/etc/mail/table-consul.toml: defaults.prefixx: " in mail.log
    assert mail.running


def test_container_refuses_to_start_without_root(container):
    mail = container(user="vmail")
    mail.start()
    assert mail.wait() == 1
    assert "smtpd must start as root" in mail.log


def test_arguments_are_a_command_or_options_of_smtpd(container):
    for command, said in {
        ("smtpd", "-n"): "configuration OK",
        ("table-consulctl", "--version"): f"table-consulctl {table_consul.__version__}",
        ("/usr/libexec/opensmtpd/table-consul", "--version"): f"table-consul {table_consul.__version__}",
        ("/usr/libexec/opensmtpd/table-procexec", "--version"): f"table-procexec {table_consul.__version__}",
        ("-h",): "version: OpenSMTPD 7.",
    }.items():
        one = container(*command)
        one.start()
        one.wait()
        assert said in one.log


def test_image_is_small_without_build_tools(built):
    found = [path for path in built.files.rglob("*") if not path.is_symlink()]
    megabytes = sum(path.lstat().st_size for path in found) / 1e6
    assert megabytes < LARGEST_MB, f"{megabytes:.0f} MB"
    builders = re.compile(r"(gcc|g\+\+|cc|ld|as|make|pip|pip3|git|curl|wget)(-?[\d.]+)?|.*-gcc|.*-ld")
    programs = [
        path for folder in ("usr/bin", "usr/sbin", "usr/local/bin") for path in (built.files / folder).glob("*")
    ]
    assert [path.name for path in programs if builders.fullmatch(path.name)] == []
    modules = {path.name for path in found if path.is_dir()}
    assert modules & {"pip", "ensurepip", "hatchling", "setuptools", "wheels"} <= {"ensurepip"}
    assert not list((built.files / "usr/lib").glob("python3*/ensurepip/_bundled"))
    for name in ("re2", "prometheus_client"):
        assert (built.files / "usr/lib/python3/dist-packages" / name).is_dir()


def test_image_has_no_traces_of_the_build_machine(built):
    assert not (built.files / "etc/pip.conf").exists()
    assert not (built.files / "etc/apt/apt.conf.d/99build").exists()
    for folder in ("run/secrets", "run/package", "var/lib/apt/lists", "var/cache/apt", "build", "tmp"):
        assert list((built.files / folder).glob("*")) == [], folder
    assert not (built.files / "etc/mailname").exists(), "every container would have the mail name of the build"


def test_image_has_labels_and_run_settings(built):
    config = built.config
    assert config["Labels"]["org.opencontainers.image.title"] == "table-consul"
    assert config["Labels"]["org.opencontainers.image.licenses"] == "ISC"
    assert config["Labels"]["org.opencontainers.image.base.name"] == image.base_name()
    assert config["ExposedPorts"] == {"25/tcp": {}}
    assert config["Healthcheck"]["Timeout"] / 1e9 > 5, "the timeout of the health check itself must be shorter"
    accounts = {
        line.split(":")[0]: line.split(":")[2:4] for line in (built.files / "etc/passwd").read_text().split("\n")
    }
    assert accounts["opensmtpd"] == ["525", "525"]
    assert accounts["opensmtpq"] == ["526", "526"]
    assert accounts["vmail"] == ["5000", "5000"]
    kept = {entry["target"] for entry in image.compose("mail")["volumes"]}
    assert kept == set(config["Volumes"]), "a volume missing from compose.yaml would be lost with the container"


def test_compose_yaml_is_valid(service):
    consul = image.compose("consul")
    assert re.fullmatch(r"docker\.io/hashicorp/consul:\d+\.\d+\.\d+", consul["image"])
    assert {port["host_ip"] for each in (service, consul) for port in each["ports"]} == {"127.0.0.1"}
    assert consul_version() < (1, 14) or "-bind=127.0.0.1" in consul["command"]
