"""The proof of concept of 2020: one GET for each query, without session, timeout, or escaping of the key."""

from __future__ import annotations

import base64
import json
import sys

import requests

for line in sys.stdin:
    if line == "config|ready\n":
        sys.stdout.write("register|alias\nregister|ready\n")
        sys.stdout.flush()
    if line.startswith("table|"):
        _, _, _, _, op, _service, ident, key = line.rstrip("\n").split("|", 7)
        response = requests.get(f"{sys.argv[1]}/{key}")
        if response.status_code == 200:
            value = base64.b64decode(json.loads(response.text)[0]["Value"]).decode()
            sys.stdout.write(f"{op}-result|{ident}|found|{value}\n")
        else:
            sys.stdout.write(f"{op}-result|{ident}|not-found\n")
        sys.stdout.flush()
