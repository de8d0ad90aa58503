"""What operators see: a real OpenSMTPD in front, a real Consul behind, table-consul between."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.rig.opensmtpd import CONFIG
from tests.rig.root import File
from tests.rig.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.rig.consul import ConsulAgent


def table_files(consul: ConsulAgent, defaults: str = "", mode: str = "mirror") -> dict[str, File]:
    """The configuration of a table that asks ``consul``, readable by smtpd alone; more lines for its [defaults]."""
    text = f'[consul]\naddress = "http://{consul.address}"\n[defaults]\nmode = "{mode}"\n{defaults}\n'
    return {CONFIG: File(text, 0o640, "root", "opensmtpd")}


def until(attempt: Callable[[], object], wanted: object, seconds: float = 10.0) -> None:
    """Attempt again and again till it comes out as wanted, which it does soon after an edit in Consul.

    Raises:
        AssertionError: it did not within so many seconds; with what came out last.
    """
    came: list[object] = []

    def comes_out() -> bool:
        came[:] = [attempt()]
        return came == [wanted]

    wait_for(comes_out, seconds, lambda: f"after {seconds} s still {came[0]!r}, not {wanted!r}")
