"""The part of smtpd in a separate process, free of the locks of the test: sends requests until its input ends.

    python -m tests.chaos.asker DESCRIPTOR

Standard input: the questions, pickled. Standard output: from time to time the new answers, pickled: a list of
(time, seconds, number of the question, reply), and an error, if any.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import select
import socket
import sys
import time

TIMEOUT_SECONDS = 30.0
TELL_SECONDS = 0.02
# Three Consul servers that start or elect need more than two processors, and this does not measure scheduling. Only
# root may raise its priority; for other users the witnesses (witness.py) record more stalls.
NICE = -15


def raise_priority(process: int) -> None:
    """Give this process and its future children a higher priority."""
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, process, NICE)


def main() -> None:
    questions = pickle.load(sys.stdin.buffer)
    wire = socket.socket(fileno=int(sys.argv[1]))
    raise_priority(0)
    gc.disable()
    wire.settimeout(TIMEOUT_SECONDS)
    wrong = None
    number = 0
    while wrong is None and not select.select([sys.stdin], [], [], 0)[0]:
        answers = []
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
        pickle.dump((answers, wrong), sys.stdout.buffer)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
