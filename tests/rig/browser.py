"""A headless Chromium, and the Consul UI in it, operated by clicks and typing."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
    TimeoutException,
    WebDriverException,
)
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from tests.rig import cache
from tests.rig.consul import ConsulAgent, consul_version
from tests.rig.root import require_root

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any, Self

    from selenium.webdriver.remote.webelement import WebElement

TIMEOUT_SECONDS = 20.0
# Load only the page: no updates, no proxies, no default browser prompt.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--no-proxy-server",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1000",
)
# A process namespace ends with its first process, so no browser outlives the test run.
CONTAINED = (*cache.DIES_WITH_US, "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
# The field for a value, one of two, and its text.
AUTH_MENU, AUTH_ENTRY = "button[aria-label='Auth menu']", ".hds-dropdown-list-item button"
EDITOR, PLAIN = ".CodeMirror", "textarea[name=value]"
CONTENT = """
const [editor, plain] = [...arguments].map(css => document.querySelector(css));
return editor ? editor.CodeMirror.getValue() : plain.value;
"""
# An element that covers another may disappear shortly.
PASSING = (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
)


def programs() -> tuple[str, str]:
    """The paths of a Chromium and of its driver.

    Raises:
        Unavailable: one of them is not installed, or we may not give it a namespace.
    """
    require_root()
    found = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in found:
        raise cache.Unavailable("no browser: apt-get install chromium chromium-driver")
    return str(found[0]), str(found[1])


class _Contained(Service):
    """The driver, started through ``CONTAINED``."""

    def __init__(self, driver: str, home: Path, log: Path) -> None:
        self._driver = driver
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            "HOME": str(home),
            "TMPDIR": str(home),
        }
        super().__init__(executable_path=shutil.which(CONTAINED[0]), env=environment, log_output=str(log))

    def command_line_args(self) -> list[str]:
        return [*CONTAINED[1:], self._driver, *super().command_line_args()]


class Browser:
    """A Chromium with an empty profile, as a context manager.

    An exception that leaves the block has a note with the names of files that show the page: a screenshot, its source,
    and the console messages. The log of the driver is beside them.

    Args:
        evidence: the folder for these files.
    """

    def __init__(self, evidence: Path) -> None:
        self._evidence = evidence
        self._chromium, self._chromedriver = programs()
        self._place = Path(tempfile.mkdtemp(prefix="table-consul-browser-"))
        self._service = _Contained(self._chromedriver, self._place, evidence / "chromedriver.log")

    def __enter__(self) -> Self:
        options = webdriver.ChromeOptions()
        options.binary_location = self._chromium
        for flag in (*FLAGS, f"--user-data-dir={self._place / 'profile'}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        try:
            self.driver = webdriver.Chrome(options, self._service)
            self.driver.set_page_load_timeout(TIMEOUT_SECONDS)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                error.add_note(f"The page as it was: {', '.join(map(str, self.keep_evidence())) or 'lost'}")
        finally:
            try:
                self.driver.quit()
            finally:
                self._end()

    def _end(self) -> None:
        self._service.stop()
        shutil.rmtree(self._place, ignore_errors=True)

    def keep_evidence(self) -> list[Path]:
        """Write files that show the current page, as far as the browser still can; their paths."""

        def source() -> bytes:
            return f"<!-- {self.driver.current_url} -->\n{self.driver.page_source}".encode()

        def console() -> bytes:
            return "".join(f"{row['message']}\n" for row in self.driver.get_log("browser")).encode()

        picture = self.driver.get_screenshot_as_png
        kept = []
        for name, shown in {"page.png": picture, "page.html": source, "console.txt": console}.items():
            try:
                content = shown()
            except WebDriverException:
                traceback.print_exc()
                continue
            (self._evidence / name).write_bytes(content)
            kept.append(self._evidence / name)
        return kept

    def open(self, address: str) -> None:
        self.driver.get(address)

    def wait(self, attempt: Callable[[], Any], missing: str) -> Any:
        """The result of the attempt as soon as it is true.

        Raises:
            AssertionError: the result is false for ``TIMEOUT_SECONDS``; with the text ``missing``.
        """
        waiting = WebDriverWait(self.driver, TIMEOUT_SECONDS, poll_frequency=0.02, ignored_exceptions=PASSING)
        try:
            return waiting.until(lambda _: attempt())
        except TimeoutException as error:
            raise AssertionError(f"{missing}: not within {TIMEOUT_SECONDS:g} s at {self.driver.current_url}") from error

    def see(self, css: str, text: str = "") -> WebElement:
        """The only visible element with this text, as soon as it appears.

        Args:
            text: its whole text, in any case; empty for any text.

        Raises:
            AssertionError: none appears in time, or several do.
        """
        found: WebElement = self.wait(lambda: self.find(css, text), f"{css} {text}".strip())
        return found

    def click(self, css: str, text: str = "") -> float:
        """Click the element of ``see`` as soon as it accepts clicks; the time of the click by time.monotonic()."""

        def clicked() -> float | None:
            element = self.find(css, text)
            if element is None or not element.is_enabled():
                return None
            moment = time.monotonic()
            element.click()
            return moment

        moment: float = self.wait(clicked, f"a click on {css} {text}".strip())
        return moment

    def find(self, css: str, text: str = "") -> WebElement | None:
        """The element of ``see``, or None if it is not visible now."""
        shown = [each for each in self.driver.find_elements(By.CSS_SELECTOR, css) if each.is_displayed()]
        found = [each for each in shown if not text or each.text.strip().casefold() == text.casefold()]
        assert len(found) < 2, f"{len(found)} times {css} {text}".strip()
        return found[0] if found else None


def agent_with_ui(*, acl: bool = False) -> ConsulAgent:
    """An agent with the Consul UI, not yet started.

    Raises:
        Unavailable: there is no Consul.
    """
    setting = "ui_config { enabled = true }\n" if consul_version() >= (1, 9) else "ui = true\n"
    return ConsulAgent(acl=acl, hcl=setting)


class Refused(Exception):
    """The UI reported an error; with its text."""


class ConsulUI:
    """The pages of the UI for keys and for logging in, of Consul 1.8 and of 1.19 and later."""

    def __init__(self, browser: Browser, agent: ConsulAgent) -> None:
        self._browser = browser
        self._modern = consul_version() >= (1, 19)
        self._keys = f"http://{agent.address}/ui/dc1/kv"

    def create(self, key: str, value: str = "", *, folder: str = "", code: bool = False) -> float:
        """Create a key with the form behind "Create"; the time of the click on "Save" by time.monotonic().

        Args:
            key: ends in a slash to make a folder.
            folder: the folder whose page is open when "Create" is clicked; ends in a slash.
            code: type the value into the editor for JSON, not into the plain field.

        Raises:
            Refused: the UI reported an error.
        """
        self._browser.open(f"{self._keys}/{folder}")
        self._browser.click("a.hds-button" if self._modern else "a.type-create", "Create")
        self._browser.see("input[name=additional]").send_keys(key)
        if not key.endswith("/"):
            self._type(value, code=code)
        return self._act("Save")

    def edit(self, key: str, value: str, *, code: bool = False) -> float:
        """Replace the value of an existing key; returns and raises the same as ``create``."""
        self._browser.open(f"{self._keys}/{quote(key)}/edit")
        self._type(value, code=code)
        return self._act("Save")

    def delete(self, key: str) -> float:
        """Delete a key; the time of the confirmation. Raises the same as ``create``."""
        self._browser.open(f"{self._keys}/{quote(key)}/edit")
        self._browser.click("button", "Delete")
        return self._act("Confirm Delete")

    def log_in(self, secret: str) -> None:
        """Log in with the secret of a token; no token may be logged in."""
        self._browser.open(self._keys)
        if self._modern:
            self._browser.click(AUTH_MENU)
        self._browser.click(AUTH_ENTRY if self._modern else "header label", "Log in")
        self._browser.see("input[name='auth[SecretID]']").send_keys(secret)
        self._browser.click("button[type=submit]", "Log in")
        self._browser.wait(self._has_token, "a login")

    def log_out(self) -> None:
        """Log out."""
        self._browser.open(self._keys)
        if self._modern:
            self._browser.click(AUTH_MENU)
            self._browser.click(AUTH_ENTRY, "Log out")
        else:
            self._browser.click("header label", "Logout")
            self._browser.click("button[role=menuitem]", "Logout")
        self._browser.wait(lambda: not self._has_token(), "a logout")

    def _has_token(self) -> bool:
        """Whether a token is logged in; the page may lose the notification of a change when it loads itself again."""
        stored = self._browser.driver.execute_script("return localStorage.getItem('consul:token')")
        return bool(stored and json.loads(stored).get("AccessorID"))

    def _type(self, value: str, *, code: bool) -> None:
        field = self._browser.see(f"{EDITOR}, {PLAIN}")
        if (field.tag_name == "textarea") == code:
            self._browser.click("label", "Code")
        if code and consul_version() < (1, 20):  # from there on the editor does not check JSON
            self._browser.see(".ember-power-select-selected-item", "JSON")
        self._browser.click(f"{EDITOR} .CodeMirror-lines" if code else PLAIN)
        # The editor reads keys from a field without a size.
        focused = self._browser.driver.switch_to.active_element
        focused.send_keys(Keys.CONTROL, "a")
        focused.send_keys(Keys.DELETE)
        focused.send_keys(value)
        # The editor reads the typed text from there with a delay.
        self._browser.wait(lambda: self._content() == value, f"{value!r} in the form")

    def _content(self) -> str:
        return str(self._browser.driver.execute_script(CONTENT, EDITOR, PLAIN))

    def _act(self, button: str, css: str = "button") -> float:
        def outcome() -> tuple[str, str] | None:
            # The page replaces it at every change: read all of it in one step, or again.
            element = self._browser.find("[data-notification]")
            return element and (str(element.get_attribute("class")), " ".join(element.text.split()))

        clicked = self._browser.click(css, button)
        kind, text = self._browser.wait(outcome, f"the result of {button}")
        if not {"success", "hds-alert--color-success"}.intersection(kind.split()):
            raise Refused(text)
        return clicked
