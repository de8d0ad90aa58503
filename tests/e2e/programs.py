"""An smtpd whose tables are programs chosen by the test."""

from __future__ import annotations

import re
import ssl
from typing import TYPE_CHECKING
from unittest import mock

from tests.rig import opensmtpd, package
from tests.rig.opensmtpd import LAUNCHER, LIBEXEC, Smtpd, _command_line, _descendants
from tests.rig.root import File

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from tests.rig.root import Root

PROCEXEC = LAUNCHER.replace("table_consul.cli", "table_consul.procexec")
DUMMY = LAUNCHER.partition("from table_consul")[0] + (package.CHECKOUT / "contrib/table-dummy.py").read_text().replace(
    "from __future__ import annotations\n", ""
)

# With OpenSSL 3, 6.8.0p2 cannot sign (OpenSMTPD issues 1171, 1239), which rules out certificates. Encryption without
# certificates works, and suffices for AUTH.
ANONYMOUS = "AECDH-AES256-SHA:@SECLEVEL=0"

# A table in the style of the article of 2020 and in its dialect: it exits on unknown input.
OF_2020 = """\
#!/usr/bin/python3 -I
import sys
for line in sys.stdin:
    atoms = line.strip().split("|")
    if len(atoms) < 6 or atoms[0] != "table" or atoms[1] != "0.1":
        sys.exit(1)
    operation, token, key = atoms[4], atoms[5], "|".join(atoms[7:])
    if operation == "update":
        answer = "updated"
    elif operation == "check":
        answer = "found" if key == "gilles@poolp.org" else "not-found"
    elif operation == "lookup":
        answer = "found|gilles@poolp.org" if (atoms[6], key) == ("alias", "root") else "not-found"
    elif operation == "fetch":
        answer = "found|gilles@poolp.org"
    else:
        sys.exit(1)
    print(f"table-response|{token}|{answer}", flush=True)
"""

# The example of that article with its callbacks, over a library that reads and writes like py-opensmtpd.
ARTICLE = """\
#!/usr/bin/python3 -I
import sys

class table:
    callbacks = {"update": lambda token, _: table.reply(token, "updated")}
    def on_check(callback): table.callbacks["check"] = callback
    def on_lookup(callback): table.callbacks["lookup"] = callback
    def on_fetch(callback): table.callbacks["fetch"] = callback
    def reply(token, *words): print("table-result", token, *words, sep="|", flush=True)
    def boolean(token, found): table.reply(token, "found" if found else "not-found")
    def result(token, value=None): table.reply(token, *(["not-found"] if value is None else ["found", value]))
    def dispatch():
        for line in sys.stdin:
            atoms = line.strip().split("|")
            if len(atoms) < 6: sys.exit("missing atoms: " + line)
            if atoms[0] != "table" or atoms[1] != "0.1": sys.exit("invalid stream: " + line)
            _, _, _, name, operation, token, *rest = atoms
            table.callbacks[operation](token, name, *rest[:1], *(["|".join(rest[1:])] if len(rest) > 1 else []))

def check(token, tableName, service, key):
    if key == "gilles@poolp.org":
        return table.boolean(token, True)
    return table.boolean(token, False)

def lookup(token, tableName, service, key):
    if service == "alias" and key == "root":
        return table.result(token, "gilles@poolp.org")
    return table.result(token)

def fetch(token, tableName, service):
    table.result(token, "gilles@poolp.org")

def main():
    table.on_check(check)
    table.on_lookup(lookup)
    table.on_fetch(fetch)
    table.dispatch()

if __name__ == "__main__":
    main()
"""


class Programs(Smtpd):
    """An smtpd with these programs beside its own, by name, and with table-consul and table-procexec.

    Args:
        processes: the number of processes of each table of ``conf``.
    """

    def __init__(
        self,
        root: Root,
        conf: str,
        files: Mapping[str, File | str | bytes] | None = None,
        programs: Mapping[str, str] | None = None,
        processes: int = 1,
        **options: Any,
    ) -> None:
        conf = f'smtp ciphers "{ANONYMOUS}"\n{conf}' if root.release == "6.8" else conf
        super().__init__(root, conf, files, **options)
        for name, text in {"table-procexec": PROCEXEC, **(programs or {})}.items():
            self.write(f"/{LIBEXEC}/{name}", File(text, 0o755))
        self._tables = processes * len(re.findall(r"^\s*table\s", conf, re.MULTILINE))

    def send(self, *recipients: str, **options: Any) -> dict[str, tuple[int, str]]:
        """See Smtpd.send."""
        trusting = _anonymous if self.root.release == "6.8" else opensmtpd._trusting
        with mock.patch.object(opensmtpd, "_trusting", trusting):
            return super().send(*recipients, **options)

    @property
    def backends(self) -> list[int]:
        """The process ids of its tables and of their children."""
        main = self._main_pid()
        lines = {pid: _command_line(pid) for pid in _descendants(main)} if main else {}
        return [pid for pid, line in lines.items() if f"/{LIBEXEC}/table-" in line]

    @staticmethod
    def command_line(pid: int) -> str:
        """The command line of the process; empty when it has ended."""
        return _command_line(pid)

    def read(self, path: str) -> str:
        """The current text of a file in its tree."""
        return (self._running_tree / path.lstrip("/")).read_text()


def _anonymous() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(ANONYMOUS)
    return context
