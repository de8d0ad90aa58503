"""smtpd's part, in a process of its own so that it waits for nobody's lock: asks without pause until its input ends.

    python -m tests.chaos.asker DESCRIPTOR

Standard input: the questions, pickled. Standard output: from time to time what was answered since, pickled: a list of
(moment, seconds, number of the question, reply), a list of seconds that an echo took, and what went wrong, if anything.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import select
import socket
import subprocess
import sys
import time

PATIENCE_SECONDS = 30.0
TELL_SECONDS = 0.02
# The floor of what this machine can do while it is as busy: answers by a process that only answers.
ECHO = "import os\nwhile data := os.read(0, 4096): os.write(0, data)"
ECHO_EVERY = 4
# Three Consul servers that start or elect want more than two processors; what is measured here is not who gets them.
# Only root may go first: to others the table shows, in the column beside, what the machine made of an echo.
NICE = -15


def go_first(process: int) -> None:
    """Have this process, and what it starts from now on, run before what else is ready to."""
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, process, NICE)


def main() -> None:
    questions = pickle.load(sys.stdin.buffer)
    wire = socket.socket(fileno=int(sys.argv[1]))
    go_first(0)
    gc.disable()
    echo, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen([sys.executable, "-S", "-c", ECHO], stdin=theirs)
    for each in (wire, echo):
        each.settimeout(PATIENCE_SECONDS)
    wrong = None
    number = 0
    while wrong is None and not select.select([sys.stdin], [], [], 0)[0]:
        answers, echoes = [], []
        until = time.monotonic() + TELL_SECONDS
        while wrong is None and (now := time.monotonic()) < until:
            number = (number + 1) % len(questions)
            asked = now
            try:
                wire.sendall(questions[number])
                reply = wire.recv(65536)
                while reply and not reply.endswith(b"\n"):
                    reply += wire.recv(65536)
            except OSError as error:
                wrong = repr(error)
                break
            now = time.monotonic()
            if not reply:
                wrong = "end of file"
                break
            answers.append((now, now - asked, number, reply[:-1]))
            if number % ECHO_EVERY == 0:
                asked = time.monotonic()
                echo.sendall(questions[number])
                echo.recv(4096)
                echoes.append(time.monotonic() - asked)
        pickle.dump((answers, echoes, wrong), sys.stdout.buffer)
        sys.stdout.flush()
    echo.close()
    process.wait()


if __name__ == "__main__":
    main()
