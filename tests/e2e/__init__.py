"""End-to-end tests with a real OpenSMTPD and a real Consul."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.rig.opensmtpd import CONFIG
from tests.rig.root import File
from tests.rig.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.rig.consul import ConsulAgent


def table_files(consul: ConsulAgent, defaults: str = "", mode: str = "mirror") -> dict[str, File]:
    """The configuration of a table that reads ``consul``, readable only by smtpd, with more lines in [defaults]."""
    text = f'[consul]\naddress = "http://{consul.address}"\n[defaults]\nmode = "{mode}"\n{defaults}\n'
    return {CONFIG: File(text, 0o640, "root", "opensmtpd")}


def until(attempt: Callable[[], object], wanted: object, seconds: float = 10.0) -> None:
    """Repeat the attempt until its result is the wanted one, as after an edit in Consul.

    Raises:
        AssertionError: the result was another for all these seconds; with the last one.
    """
    came: list[object] = []

    def comes_out() -> bool:
        came[:] = [attempt()]
        return came == [wanted]

    wait_for(comes_out, seconds, lambda: f"after {seconds} s still {came[0]!r}, not {wanted!r}")
