"""`table-consulctl status`: each table's state, from its published metrics and from Consul."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import socket
import string
import subprocess
import sys
import threading
import time
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from table_consul import __version__, config
from table_consul.config import Config, MetricsConfig
from table_consul.ctl import main, status
from tests.dialogue import Child, eventually, write_config
from tests.fake_consul import FakeConsul

FOLLOWING = {
    "up": 1,
    "too_large": 0,
    "snapshot_index": 12,
    "snapshot_age_seconds": 3,
    "snapshot_max_age_seconds": 86400,
}
FOLLOWING |= {"snapshot_keys": 2, "entries_refused": 0, "reloads_total": 1, "failures_total": 0}
LOST = {**FOLLOWING, "up": 0, "failures_total": 4}
READ_DIRECTLY = {"up": 1, "failures_total": 0}


def sample(name, value, **labels):
    return f"table_consul_{name}{{{','.join(f'{key}={json.dumps(text)}' for key, text in labels.items())}}} {value}\n"


def numbers(table="aliases", more="", **metrics):
    """What a daemon publishes about a table of one prefix."""
    text = sample("build_info", 1, table=table, version=__version__)
    text += sample("start_time_seconds", time.time() - 7200, table=table)
    return text + "".join(sample(n, v, table=table, prefix=f"{table}/") for n, v in metrics.items()) + more


def publish(folder, table="aliases", more="", **metrics):
    path = folder / f"{table}.prom"
    path.with_suffix(".tmp").write_text(numbers(table, more, **metrics))
    path.with_suffix(".tmp").rename(path)
    return path


def configured(folder, *defaults, address="http://127.0.0.1:9", metrics=None, more=""):
    lines = metrics if metrics is not None else f'textfile = "{folder}/{{table}}.prom"'
    return str(write_config(folder, *defaults, address=address, more=f"[metrics]\n{lines}\n{more}"))


@pytest.fixture
def ctl(capsys, monkeypatch):
    """Runs `table-consulctl -c CONFIG status ...`; the exit status, standard output and standard error."""
    for name in os.environ:
        if name.startswith("CONSUL_"):
            monkeypatch.delenv(name)

    def run(path, *arguments):
        code = main.main(["-c", path, "status", *arguments])
        return (code, *capsys.readouterr())

    return run


def told(outcome):
    """The only table in the JSON of an outcome."""
    (table,) = json.loads(outcome[1])["tables"]
    return table


# ---- states ----


@pytest.mark.parametrize(
    ("metrics", "state", "code"),
    [
        (FOLLOWING, "following", 0),
        (LOST, "outage", 1),
        ({**LOST, "snapshot_index": 0}, "outage", 1),
        ({**LOST, "snapshot_age_seconds": 86401}, "expired", 1),
        ({"up": 0, "too_large": 0, "reloads_total": 0, "failures_total": 3}, "no data", 1),
        ({"up": 0, "too_large": 0, "reloads_total": 0, "failures_total": 0}, "loading", 1),
        ({**FOLLOWING, "up": 0, "snapshot_index": 0}, "loading", 1),
        ({"too_large": 1, "up": 1, "failures_total": 0}, "too large", 1),
        (READ_DIRECTLY, "direct", 0),
        ({**READ_DIRECTLY, "up": 0, "failures_total": 1}, "outage", 1),
        ({}, "direct", 0),
    ],
)
def test_what_is_published_makes_a_state_and_an_exit_status(tmp_path, ctl, metrics, state, code):
    publish(tmp_path, **metrics)
    path = configured(tmp_path)
    outcome = ctl(path, "--offline", "--json")
    assert (told(outcome)["state"], outcome[0], outcome[2]) == (state, code, "")
    assert ctl(path, "--offline")[1].startswith(f"aliases: {state}\n")


def test_folder_that_the_token_may_not_read_is_named_and_not_healthy(tmp_path, ctl):
    hidden = [
        sample("service_hidden", int(s == "domain"), table="aliases", prefix="aliases/", service=s)
        for s in ("alias", "domain")
    ]
    publish(tmp_path, more="".join(hidden), **FOLLOWING)
    code, out, _ = ctl(configured(tmp_path), "--offline")
    assert (code, "the token may not read domain: answers" in " ".join(out.split())) == (1, True)


def test_the_worst_folder_of_a_table_is_the_state_of_the_table(tmp_path, ctl):
    other = "".join(sample(n, v, table="aliases", prefix="people/") for n, v in LOST.items())
    publish(tmp_path, more=other, **FOLLOWING)
    table = told(ctl(configured(tmp_path), "--offline", "--json"))
    assert (table["state"], [p["state"] for p in table["prefixes"]]) == ("outage", ["following", "outage"])


def test_all_that_is_published_is_shown(tmp_path, ctl):
    error = sample(
        "last_error_timestamp_seconds", time.time() - 300, table="aliases", prefix="aliases/", error="no leader"
    )
    publish(tmp_path, more=error, **{**FOLLOWING, "entries_refused": 1, "snapshot_age_seconds": 130})
    _, out, _ = ctl(configured(tmp_path), "--offline")
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() - 7200))
    for line in (
        "aliases: following",
        "  prefix     aliases/",
        "  keys       2, 1 refused (see lint)",
        "  index      12",
        "  age        2 min",
        "  last error 5 min ago: no leader",
        f"  runs since {since[:-1]}",
    ):
        assert f"\n{line}" in "\n" + out
    assert __version__ in out


def test_table_from_a_file_is_healthy_when_its_process_runs(tmp_path, ctl):
    publish(tmp_path)
    outcome = ctl(configured(tmp_path, address=f"file://{tmp_path}/export.json"), "--json")
    assert (outcome[0], told(outcome)["state"]) == (0, "file")


def test_table_from_a_file_has_the_state_file_after_an_error_too(tmp_path, ctl):
    error = sample("last_error_timestamp_seconds", 1, table="aliases", prefix="aliases/", error="not found")
    publish(tmp_path, more=error)
    outcome = ctl(configured(tmp_path, address=f"file://{tmp_path}/export.json"), "--json")
    assert (outcome[0], told(outcome)["state"], told(outcome)["prefixes"][0]["state"]) == (0, "file", "file")


# ---- who publishes ----


def test_where_nothing_is_configured_it_says_which_lines_to_add_and_they_work(tmp_path, ctl):
    path = write_config(tmp_path, address="http://127.0.0.1:9")
    code, out, err = ctl(str(path))
    assert (code, out) == (2, "")
    added = [re.search(rf"^ *({start}.*)$", err, re.MULTILINE)[1] for start in (r"\[metrics\]", "textfile", "listen")]
    path.write_text(path.read_text() + "\n".join(added))
    metrics = config.load(str(path), {}).metrics
    assert tomllib.loads("\n".join(added))["metrics"] == {"textfile": metrics.textfile, "listen": metrics.listen}


def test_a_table_that_nobody_publishes_is_not_running(tmp_path, ctl):
    outcome = ctl(configured(tmp_path), "--json")
    assert (outcome[0], told(outcome)["table"], told(outcome)["state"]) == (1, "consul", "not running")


def test_a_file_that_is_no_longer_written_is_that_of_a_process_that_is_gone(tmp_path, ctl):
    path = publish(tmp_path, **FOLLOWING)
    fresh = ctl(configured(tmp_path), "--offline", "--json")
    os.utime(path, (time.time() - 100,) * 2)
    stale = ctl(configured(tmp_path), "--offline", "--json")
    assert [(told(each)["state"], each[0]) for each in (fresh, stale)] == [("following", 0), ("not running", 1)]
    assert "last written 100 s ago" in told(stale)["remarks"][0]


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"hello\n", b"\xff\n", b"a{b=\n", b"node_load1 1\n", b'table_consul_up{table="x"} 1\n'),
        sample("up", 1, table="aliases", prefix="aliases/").encode(),
        *(
            numbers(up=1, snapshot_index=number, snapshot_keys=1, reloads_total=1).encode()
            for number in ("NaN", "+Inf", "-Inf")
        ),
        sample("build_info", 1, table="aliases").encode()
        + sample("start_time_seconds", 1e300, table="aliases").encode(),
    ],
)
def test_file_without_metrics_of_the_table_is_unknown(tmp_path, ctl, content):
    (tmp_path / "aliases.prom").write_bytes(content)
    outcome = ctl(configured(tmp_path), "aliases", "--json")
    assert (outcome[0], told(outcome)["state"], told(outcome)["healthy"]) == (2, "unknown", None)


def test_a_pipe_or_a_folder_in_place_of_the_file_is_unknown_and_keeps_nobody_waiting(tmp_path, ctl):
    os.mkfifo(tmp_path / "pipe.prom")
    (tmp_path / "folder.prom").mkdir()
    code, out, _ = ctl(configured(tmp_path), "--json")
    assert (code, [each["state"] for each in json.loads(out)["tables"]]) == (2, ["unknown", "unknown"])


def test_unhealthy_table_outweighs_unknown_ones(tmp_path, ctl):
    publish(tmp_path, **LOST)
    (tmp_path / "broken.prom").write_text("x")
    assert ctl(configured(tmp_path), "--offline")[0] == 1


def test_without_a_name_all_tables_that_are_configured_or_published_are_told(tmp_path, ctl):
    publish(tmp_path, "aliases", **FOLLOWING)
    publish(tmp_path, "domains", **FOLLOWING)
    path = configured(tmp_path, more="[tables.senders]\ndeadline = 1")
    _, out, _ = ctl(path, "--offline", "--json")
    assert [each["table"] for each in json.loads(out)["tables"]] == ["aliases", "domains", "senders"]
    _, out, _ = ctl(path, "--offline", "--json", "domains", "aliases", "domains")
    assert [each["table"] for each in json.loads(out)["tables"]] == ["domains", "aliases"]


def test_a_file_whose_name_no_table_can_have_is_somebody_else_s(tmp_path, ctl):
    publish(tmp_path, "aliases", **FOLLOWING)
    for name in ("a\nb", "\x1b[2J", "a\udcffb"):
        (tmp_path / f"{name}.prom").touch()
    code, out, _ = ctl(configured(tmp_path), "--offline", "--json")
    assert (code, [each["table"] for each in json.loads(out)["tables"]]) == (0, ["aliases"])


def test_a_name_that_no_table_can_have_is_a_mistake(tmp_path, ctl):
    code, out, err = ctl(configured(tmp_path), "a/b")
    assert (code, out, "invalid table name" in err) == (2, "", True)


@given(st.binary(max_size=300))
def test_any_bytes_in_a_file_are_unknown(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.prom"
    path.write_bytes(data)
    found = status.status_of(Config(None, metrics=MetricsConfig(textfile=str(path))), "aliases")
    assert (found.state, found.healthy, found.prefixes) == ("unknown", None, [])


@given(
    st.text(string.ascii_letters + "-_.*?[]{} ä", min_size=1, max_size=20).filter(lambda name: name not in {".", ".."}),
    st.sampled_from(["{table}.prom", "table-consul-{table}.prom", "{table}/{table}.prom", "[a]*?{table}"]),
)
def test_the_name_of_every_table_is_found_in_the_name_of_its_file(tmp_path_factory, name, pattern):
    folder = tmp_path_factory.mktemp("names")
    path = folder / pattern.replace("{table}", name)
    path.parent.mkdir(exist_ok=True)
    path.touch()
    # As a shell does, what begins with a dot is passed over, if nothing stands before it.
    expected = set() if name.startswith(".") and pattern.startswith("{") else {name}
    assert status.published_tables(Config(None, metrics=MetricsConfig(textfile=f"{folder}/{pattern}"))) == expected


# ---- sockets ----


class Stranger(http.server.BaseHTTPRequestHandler):
    answer = b"<html>hello</html>"
    status = 200

    def do_GET(self):
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def stranger():
    with http.server.HTTPServer(("127.0.0.1", 0), Stranger) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("code", "body", "remark"),
    [
        (200, b"<html>hello</html>", "no Prometheus metrics"),
        (404, b"", "answers with status 404"),
        (200, numbers("domains").encode(), "metrics of domains only (put {table} into its name)"),
    ],
)
def test_other_server_at_the_port_is_unknown(tmp_path, ctl, stranger, monkeypatch, code, body, remark):
    monkeypatch.setattr(Stranger, "answer", body)
    monkeypatch.setattr(Stranger, "status", code)
    outcome = ctl(configured(tmp_path, metrics=f'listen = "{stranger}"'), "aliases", "--json")
    assert (outcome[0], told(outcome)["state"], remark in told(outcome)["remarks"][0]) == (2, "unknown", True)


def test_a_port_where_nobody_listens_is_that_of_a_process_that_is_gone(tmp_path, ctl):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{unused.getsockname()[1]}"
        outcome = ctl(configured(tmp_path, metrics=f'listen = "{listen}"'), "--json")
    assert (outcome[0], told(outcome)["state"]) == (1, "not running")


def test_silent_listener_is_unknown_within_the_timeout():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        listen = f"127.0.0.1:{silent.getsockname()[1]}"
        found = status.status_of(Config(None, metrics=MetricsConfig(listen=listen)), "aliases", timeout=0.2)
    assert (found.state, found.remarks) == ("unknown", [f"{listen}: timed out"])


@pytest.mark.parametrize("beginning", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\n"])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_trickling_listener_is_unknown_within_the_timeout(tmp_path, beginning, family):
    address = ("127.0.0.1", 0) if family == socket.AF_INET else f"{tmp_path}/socket"
    ended = threading.Event()

    def trickle():
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(1000)
            connection.sendall(beginning)
            for _ in range(100):
                if ended.wait(0.05):
                    return
                connection.sendall(b"#: \n")

    with (
        socket.create_server(address, family=family) if family == socket.AF_INET else socket.socket(family) as listener
    ):
        if family == socket.AF_UNIX:
            listener.bind(address)
            listener.listen()
        name = listener.getsockname()
        listen = f"unix://{name}" if family == socket.AF_UNIX else f"127.0.0.1:{name[1]}"
        thread = threading.Thread(target=trickle)
        thread.start()
        start = time.monotonic()
        try:
            found = status.status_of(Config(None, metrics=MetricsConfig(listen=listen)), "aliases", timeout=0.3)
        finally:
            ended.set()
            thread.join()
    assert (found.state, found.remarks) == ("unknown", [f"{listen}: timed out"])
    assert time.monotonic() - start < 3


def test_answer_without_end_is_unknown(tmp_path, ctl, stranger, monkeypatch):
    monkeypatch.setattr(Stranger, "answer", b"\n" * (status.SIZE_MAX + 1))
    outcome = ctl(configured(tmp_path, metrics=f'listen = "{stranger}"'), "--json")
    assert (outcome[0], "larger than 16 MiB" in told(outcome)["remarks"][0]) == (2, True)


# ---- Consul ----


@pytest.fixture
def fake():
    with FakeConsul() as consul:
        consul.put(b"aliases/alias/root", b"gilles")
        yield consul


@pytest.fixture
def impatient(monkeypatch):
    """The lag that a daemon is granted, cut short."""
    monkeypatch.setattr(status, "LAG_SECONDS", 0.3)
    monkeypatch.setattr(status, "WRITE_INTERVAL_SECONDS", 0.3)
    monkeypatch.setattr(status, "POLL_SECONDS", 0.02)


def test_table_that_stays_behind_consul_is_not_healthy(tmp_path, ctl, fake, impatient):
    publish(tmp_path, **{**FOLLOWING, "snapshot_index": fake.index - 1})
    outcome = ctl(configured(tmp_path, address=fake.address), "--json")
    (prefix,) = told(outcome)["prefixes"]
    assert (outcome[0], prefix["ahead"], prefix["consul_index"]) == (1, True, fake.index)
    _, out, _ = ctl(configured(tmp_path, address=fake.address))
    assert f"{fake.index - 1} (Consul has {fake.index})" in out
    assert "Consul is ahead of this table" in out


def test_table_that_has_what_consul_has_is_healthy(tmp_path, ctl, fake):
    publish(tmp_path, **{**FOLLOWING, "snapshot_index": fake.index})
    outcome = ctl(configured(tmp_path, address=fake.address), "--json")
    assert (outcome[0], told(outcome)["prefixes"][0]["ahead"]) == (0, False)


def test_numbers_from_before_an_edit_are_waited_for(tmp_path, ctl, fake):
    publish(tmp_path, **{**FOLLOWING, "snapshot_index": fake.index - 1})
    edit = threading.Timer(0.5, lambda: publish(tmp_path, **{**FOLLOWING, "snapshot_index": fake.index}))
    edit.start()
    outcome = ctl(configured(tmp_path, address=fake.address), "--json")
    edit.join()
    assert (outcome[0], told(outcome)["prefixes"][0]["ahead"]) == (0, False)


def test_process_that_ends_while_status_waits_is_not_running(tmp_path, ctl, fake, impatient):
    path = publish(tmp_path, **{**FOLLOWING, "snapshot_index": fake.index - 1})
    end = threading.Timer(0.2, path.unlink)
    end.start()
    outcome = ctl(configured(tmp_path, address=fake.address), "aliases", "--json")
    end.join()
    assert (outcome[0], told(outcome)["state"]) == (1, "not running")


def test_offline_asks_consul_nothing(tmp_path, ctl, fake):
    publish(tmp_path, **FOLLOWING)
    outcome = ctl(configured(tmp_path, address=fake.address), "--offline", "--json")
    assert (outcome[0], told(outcome)["prefixes"][0]["ahead"], fake.requests) == (0, None, [])


def test_following_table_is_unknown_when_consul_is_unreachable(tmp_path, ctl, fake):
    publish(tmp_path, "aliases", **FOLLOWING)
    publish(tmp_path, "domains", **FOLLOWING)
    fake.stop()
    code, out, _ = ctl(configured(tmp_path, address=fake.address), "--json")
    tables = json.loads(out)["tables"]
    assert (code, [table["healthy"] for table in tables]) == (2, [None, None])
    assert [table["prefixes"][0]["healthy"] for table in tables] == [None, None]
    assert all("cannot compare with Consul" in table["prefixes"][0]["remarks"][-1] for table in tables)


def test_no_token_is_shown(tmp_path, ctl, fake, monkeypatch):
    publish(tmp_path, **FOLLOWING)
    fake.token = "another"
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "hunter2")
    code, out, err = ctl(configured(tmp_path, address=fake.address))
    assert (code, "refuses the token" in out, "hunter2" in out + err) == (2, True, False)


def test_a_folder_that_the_configuration_no_longer_names_is_said_to_be_one(tmp_path, ctl, fake):
    publish(tmp_path, **{**FOLLOWING, "snapshot_index": fake.index})
    _, out, _ = ctl(configured(tmp_path, 'prefix = "elsewhere"', address=fake.address))
    assert "update the table" in " ".join(out.split())


# ---- for people ----


def test_a_terminal_of_40_columns_stays_readable(tmp_path, ctl, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    error = sample(
        "last_error_timestamp_seconds", time.time(), table="aliases", prefix="aliases/", error="no " * 60 + "leader"
    )
    publish(tmp_path, more=error, **{**LOST, "entries_refused": 2, "snapshot_index": 10**12})
    _, out, _ = ctl(configured(tmp_path), "aliases", "consul", "--offline")
    assert [line for line in out.splitlines() if len(line) > 40 and str(tmp_path) not in line] == []
    monkeypatch.setenv("COLUMNS", "100")
    assert len(ctl(configured(tmp_path), "aliases", "consul", "--offline")[1]) < len(out)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (119.4, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h"), (172800, "2 d"), (10**7, "116 d")],
)
def test_a_time_span_is_told_in_the_largest_unit_of_which_there_are_two(seconds, shown):
    assert main.duration(seconds) == shown


def test_what_strangers_put_into_a_label_does_not_draw_on_the_terminal(tmp_path, ctl):
    error = sample("last_error_timestamp_seconds", 1, table="aliases", prefix="aliases/", error="\x1b[2J\nforged")
    publish(tmp_path, more=error.replace("\\u001b", "\x1b"), **FOLLOWING)
    _, out, _ = ctl(configured(tmp_path), "--offline")
    assert ("\x1b" in out, "\nforged" in out, "forged" in out) == (False, False, True)


def test_without_the_library_one_line_says_what_to_install(tmp_path):
    library = tmp_path / "without" / "prometheus_client"
    library.mkdir(parents=True)
    (library / "__init__.py").write_text("raise ModuleNotFoundError('blocked', name='prometheus_client')")
    code = "from table_consul.ctl.main import main; raise SystemExit(main())"
    run = subprocess.run(
        [sys.executable, "-c", code, "-c", configured(tmp_path), "status"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(library.parent)},
    )
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert "install table-consul[metrics]" in run.stderr


# ---- with the daemon ----


def test_a_daemon_is_seen_following_losing_and_following_consul_and_ending(tmp_path, ctl, fake):
    path = configured(tmp_path, address=fake.address, metrics=f'listen = "unix://{tmp_path}/{{table}}.sock"')

    def state():
        outcome = ctl(path, "--json")
        return told(outcome)["state"], outcome[0]

    def becomes(*wanted):
        for _ in eventually(wanted):
            if state() == wanted:
                return

    with Child(path) as child:
        child.handshake()
        becomes("following", 0)
        fake.stop()
        becomes("outage", 1)
        assert "connection refused" in told(ctl(path, "--json", "--offline"))["prefixes"][0]["last_error"]
        fake.start()
        becomes("following", 0)
        assert child.end() == 0
    assert state() == ("not running", 1)


def test_an_edit_just_before_is_not_taken_for_a_table_that_stays_behind(tmp_path, ctl, fake):
    path = configured(tmp_path, address=fake.address, metrics=f'listen = "unix://{tmp_path}/{{table}}.sock"')
    with Child(path) as child:
        child.handshake()
        for _ in eventually("it follows"):
            if ctl(path)[0] == 0:
                break
        for number in range(10):
            fake.put(b"aliases/alias/root", b"%d" % number)
            outcome = ctl(path, "--json")
            assert (outcome[0], told(outcome)["prefixes"][0]["consul_index"]) == (0, fake.index)


def test_a_daemon_s_text_file_tells_within_seconds_of_its_start_that_it_follows(tmp_path, ctl, fake):
    path = configured(tmp_path, address=fake.address)
    with Child(path) as child:
        child.handshake()
        for _ in eventually("it follows", 5):
            if ctl(path, "aliases")[0] == 0:
                break
        assert child.end() == 0
