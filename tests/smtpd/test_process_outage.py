"""The running program while Consul is unreachable or silent."""

from __future__ import annotations

import socket

import pytest

from tests.dialogue import Child, eventually, write_config
from tests.smtpd.process import ROOT


@pytest.mark.parametrize("mode", ["direct", "mirror"])
def test_unreachable_consul_is_an_error_reply_in_time_without_the_token(tmp_path, mode):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        log = '[log]\nlevel="debug"\ntarget="stderr"'
        path = write_config(tmp_path, f'mode = "{mode}"', "deadline = 0.5", address=address, more=log)
        with Child(str(path), environ={"CONSUL_HTTP_TOKEN": "hunter2"}) as child:
            child.handshake()
            answers = [child.ask(ROOT % number) for number in range(6)]
            assert [b"lookup-result|%08x|error" % number for number in range(6)] == [
                b"|".join(answer.split(b"|")[:3]) for answer in answers
            ]
            assert child.end() == 0
            assert ("hunter2" in child.log(), "returning errors" in child.log()) == (False, True)


def test_silent_consul_does_not_delay_the_handshake(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        path = write_config(tmp_path, "deadline = 30", address=f"http://127.0.0.1:{silent.getsockname()[1]}")
        with Child(str(path)) as child:
            child.wire.settimeout(10)
            assert b"alias" in child.handshake()


def test_end_of_file_is_noticed_while_a_mirror_waits_for_consul(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        path = write_config(tmp_path, "deadline = 0.2", address=f"http://127.0.0.1:{silent.getsockname()[1]}")
        with Child(str(path)) as child:
            child.handshake()
            child.ask(ROOT % 1)
            child.wire.close()
            for _ in eventually("the child has ended", 10):
                if child.process.poll() is not None:
                    break
            assert child.process.returncode == 0
