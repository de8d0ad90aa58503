"""Consul alone: the time until an edit reaches a client that ignores it."""

from __future__ import annotations

import http.client
import threading
import time

from tests.rig.consul import ConsulAgent


def edits(consul: ConsulAgent, table: str, path: str, count: int) -> dict[str, float]:
    """Milliseconds from the return of a PUT to ``path`` until Consul has sent the whole table: p50 and p99."""
    host, _, port = consul.address.partition(":")
    watcher, editor = (http.client.HTTPConnection(host, int(port), timeout=30) for _ in range(2))
    times = []
    try:
        index = "0"
        for number in range(count + 1):
            arrived: list[float] = []
            watcher.request("GET", f"/v1/kv/{table}/?recurse&wait=20s&index={index}")

            def receive(arrived: list[float] = arrived) -> None:
                response = watcher.getresponse()
                arrived.append(int(response.headers["X-Consul-Index"]))
                response.read()
                arrived.append(time.monotonic())

            if number == 0:
                receive()
            else:
                reader = threading.Thread(target=receive)
                reader.start()
                time.sleep(0.02)
                editor.request("PUT", f"/v1/kv/{path}", f"edited-{number}")
                editor.getresponse().read()
                returned = time.monotonic()
                reader.join()
                times.append(max(0.0, arrived[1] - returned) * 1e3)
            index = str(int(arrived[0]))
    finally:
        watcher.close()
        editor.close()
        consul.kv_delete(path)
    times.sort()
    return {"p50": times[len(times) // 2], "p99": times[len(times) * 99 // 100]}
