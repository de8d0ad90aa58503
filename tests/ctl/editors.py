"""An editor that runs the next step of a script each time it is opened."""

from __future__ import annotations

import json
import shlex
import sys

SOURCE = """
import json, os, pathlib, signal, sys
folder = pathlib.Path(__file__).parent
steps = json.loads((folder / "steps.json").read_text())
(folder / "steps.json").write_text(json.dumps(steps[1:]))
path = pathlib.Path(sys.argv[-1])
text = path.read_text()
with open(folder / "opened.jsonl", "a") as log:
    mode, above = (oct(each.stat().st_mode & 0o7777) for each in (path, path.parent))
    print(json.dumps({"arguments": sys.argv[1:-1], "path": str(path), "text": text, "modes": [mode, above]}), file=log)
exec(steps[0])
path.write_text(text)
"""


class Editor:
    """``steps`` are statements of Python that change ``text``."""

    def __init__(self, folder, *steps):
        self._folder = folder
        (folder / "editor.py").write_text(SOURCE)
        (folder / "steps.json").write_text(json.dumps(steps))
        self.command = shlex.join([sys.executable, str(folder / "editor.py")])

    @property
    def opened(self):
        """The text of the file at each opening."""
        return [json.loads(line) for line in (self._folder / "opened.jsonl").read_text().splitlines()]
