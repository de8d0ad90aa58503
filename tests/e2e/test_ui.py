"""Edits in the Consul UI with a real browser: the next message uses them."""

from __future__ import annotations

import contextlib
import re
import smtplib
import subprocess
import time

import pytest

from tests.conftest import _or_skip
from tests.e2e import table_files
from tests.e2e.programs import Programs
from tests.e2e.test_matrix import LINES, LOCAL, processes
from tests.rig.browser import Browser, ConsulUI, Refused, agent_with_ui, programs
from tests.rig.consul import consul_binary
from tests.rig.opensmtpd import CONFIG
from tests.rig.root import USERS, File
from tests.rig.waiting import wait_for

pytestmark = pytest.mark.real

ALIAS = "consul/alias/root"
EDIT_SECONDS = 5.0
TOKEN = "/etc/mail/table-consul.token"

through_both_lines = pytest.mark.parametrize("line", LINES.values(), ids=LINES)
on_old_and_new = pytest.mark.parametrize("root", ["6.8", "7.9"], indirect=True)
on_new = pytest.mark.parametrize("root", ["7.9"], indirect=True)


@pytest.fixture(scope="module")
def running():
    """Starts an agent at first use, and ends it after the last test."""
    agents = {}
    with contextlib.ExitStack() as stack:

        def start(*, acl):
            if acl not in agents:
                agents[acl] = stack.enter_context(agent_with_ui(acl=acl))
            agents[acl].kv_delete("", recurse=True)
            return agents[acl]

        yield start


@pytest.fixture
def agent(running):
    """A Consul with its UI, without keys."""
    with _or_skip():
        return running(acl=False)


@pytest.fixture
def agent_with_acl(running):
    """A Consul with its UI whose ACLs deny by default."""
    with _or_skip():
        return running(acl=True)


@pytest.fixture
def browse(tmp_path):
    """Opens the UI of an agent in a new browser."""
    with _or_skip():
        programs()

    @contextlib.contextmanager
    def opened(agent):
        with Browser(tmp_path) as browser:
            yield ConsulUI(browser, agent)

    return opened


@pytest.fixture
def smtpd(root):
    """Starts an smtpd whose table is in one of ``LINES``, and ends it after the test."""
    with contextlib.ExitStack() as stack, _or_skip():
        yield lambda line, files: stack.enter_context(
            Programs(root, line + LOCAL, files, processes=processes(root, line))
        )


@pytest.fixture(scope="module")
def measured(request):
    """Rows of events with their delay after the click, printed at the end."""
    rows = []
    yield rows
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        print("\n\nMilliseconds after the click on Save, or on Confirm Delete, in the Consul UI:")
        print(f"{'OpenSMTPD':18}{'table consul':14}{'the key':9}{'UI says so':>13}{'smtpd hears':>13}", end="")
        print(f"{'mail taken':>13}{'delivered':>13}{'asked':>7}", *rows, sep="\n")


def users_of_root(server):
    """The users that smtpd finds for recipient root, in a session that sends no mail."""
    read = len(server.log)
    with smtplib.SMTP("127.0.0.1", server.port, "remote.example", 60) as session:
        session.ehlo()
        session.mail("alice@remote.example")
        assert session.rcpt("root@localhost")[0] == 250, server.log
    answer = re.search(r'lookup "root" as \w+ in table proc:consul -> (.*)', server.log[read:])
    assert answer, server.log
    return set(re.findall(r"\w+", answer[1].replace("none", "root")))


def mail_goes_to(server, *people, subject):
    """Send one mail to root, which only these people receive.

    A mail within milliseconds of the click may be faster than the mirror. Therefore RCPT is repeated, without a mail,
    until smtpd finds these people; the tests print how often.

    Returns: the number of RCPT commands; the times when the edit arrived, the mail was accepted, and delivered.
    """
    heard = []

    def has_arrived():
        heard.append(users_of_root(server))
        return heard[-1] == set(people)

    wait_for(has_arrived, EDIT_SECONDS, lambda: f"{heard[-1]}, asked {len(heard)} times:\n{server.log}")
    arrived = time.monotonic()
    reply = server.send("root@localhost", subject=subject)["root@localhost"]
    assert reply[0] == 250, f"{reply}\n{server.log}"
    taken = time.monotonic()
    for name in people:
        server.wait_for_mail(name, subject)
    delivered = time.monotonic()
    assert {name for name in ("root", *USERS) if subject in server.subjects(name)} == set(people), server.log
    return len(heard), arrived, taken, delivered


@pytest.mark.parametrize(
    ("root", "name"), [("6.8", "procexec:"), ("7.9", "procexec:"), ("7.9", "consul:")], indirect=["root"]
)
def test_next_mail_uses_the_value_saved_in_the_ui(agent, browse, smtpd, root, name, measured):
    server = smtpd(LINES[name], table_files(agent))
    mail_goes_to(server, "root", subject="nothing in Consul")
    before = [*server.pids], server.backends
    with browse(agent) as ui:
        story = (
            ("created", lambda: ui.create(ALIAS, "gilles"), "gilles"),
            ("edited", lambda: ui.edit(ALIAS, "eric"), "eric"),
            ("deleted", lambda: ui.delete(ALIAS), "root"),
        )
        for what, act, wanted in story:
            clicked = act()
            said = time.monotonic()
            asked, *moments = mail_goes_to(server, wanted, subject=what)
            columns = "".join(f"{(moment - clicked) * 1000:13.0f}" for moment in (said, *moments))
            measured.append(f"{root.version:18}{name:14}{what:9}{columns}{asked:7}")
            assert agent.kv_get(ALIAS) == {"gilles": b"gilles", "eric": b"eric", "root": None}[wanted]
    assert ([*server.pids], server.backends) == before


@on_new
def test_json_from_the_editor_of_the_ui_is_decoded(agent, browse, smtpd):
    server = smtpd(LINES["consul:"], table_files(agent))
    with browse(agent) as ui:
        ui.create(ALIAS, '"gilles"', code=True)
        mail_goes_to(server, "gilles", subject="string")
        assert agent.kv_get(ALIAS) == b'"gilles"'
        ui.edit(ALIAS, '["gilles", "eric"]', code=True)
        mail_goes_to(server, "gilles", "eric", subject="array")
        assert agent.kv_get(ALIAS) == b'["gilles", "eric"]'


@on_new
def test_lines_from_the_plain_field_of_the_ui_are_several_recipients(agent, browse, smtpd):
    server = smtpd(LINES["consul:"], table_files(agent))
    with browse(agent) as ui:
        ui.create(ALIAS, "# until the first of May\ngilles\neric\n")
        mail_goes_to(server, "gilles", "eric", subject="created")
    assert agent.kv_get(ALIAS) == b"# until the first of May\ngilles\neric\n"


@on_new
def test_folders_created_in_the_ui_are_not_entries(agent, browse, smtpd):
    server = smtpd(LINES["consul:"], table_files(agent))
    with browse(agent) as ui:
        ui.create("consul/")
        ui.create("alias/", folder="consul/")
        mail_goes_to(server, "root", subject="folders alone")
        ui.create("root", "gilles", folder="consul/alias/")
        mail_goes_to(server, "gilles", subject="created")
    assert agent.kv_get("consul/alias/") == b""


@on_new
def test_operator_needs_a_token_to_edit_in_the_ui(agent_with_acl, browse, smtpd):
    agent = agent_with_acl
    operator = agent.token('key_prefix "consul/" { policy = "write" }')
    reader = agent.token('key_prefix "consul/" { policy = "read" }')
    config = f'[consul]\naddress = "http://{agent.address}"\ntoken_file = "{TOKEN}"\n'
    server = smtpd(
        LINES["consul:"],
        {
            CONFIG: File(config, 0o640, "root", "opensmtpd"),
            TOKEN: File(reader + "\n", 0o640, "root", "opensmtpd"),
        },
    )
    with browse(agent) as ui:
        with pytest.raises(Refused, match="403: Permission denied"):
            ui.create(ALIAS, "gilles")
        mail_goes_to(server, "root", subject="refused")
        ui.log_in(reader)
        with pytest.raises(Refused, match="403: Permission denied"):
            ui.create(ALIAS, "gilles")
        mail_goes_to(server, "root", subject="refused to readers")
        ui.log_out()
        ui.log_in(operator)
        ui.create(ALIAS, "gilles")
        mail_goes_to(server, "gilles", subject="created")
        ui.delete(ALIAS)
        mail_goes_to(server, "root", subject="deleted")


@on_old_and_new
@through_both_lines
def test_trailing_newline_from_echo_is_ignored(agent, smtpd, root, line):
    server = smtpd(line, table_files(agent))
    for name in ("gilles", "eric"):
        command = f'echo {name} | "$0" kv put -http-addr="$1" "$2" -'
        done = subprocess.run(
            ("sh", "-c", command, consul_binary(), f"http://{agent.address}", ALIAS),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert agent.kv_get(ALIAS) == f"{name}\n".encode()
        mail_goes_to(server, name, subject=f"to {name}")
