"""A headless Chromium for the tests, driven over the DevTools protocol on a pipe: no port, no driver program.

    with browser.launch() as chromium:
        page = chromium.open("http://127.0.0.1:8080/dashboard")
        page.wait_for("document.body.innerText.includes('digits')")
        page.screenshot(Path("digits.png"))

The protocol: https://chromedevtools.github.io/devtools-protocol/.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Browser", "BrowserError", "Page", "executable", "launch"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--enable-unsafe-swiftshader",
    "--disable-background-networking",
    "--disable-quic",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-pipe",
    "--window-size=1400,1000",
)
# The browser reads commands from descriptor 3 and writes answers to 4. Not a shell's redirection: dash knows
# descriptors of one digit only.
_EXEC = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class BrowserError(Exception):
    """The browser went away, refused a command or did not get there in time."""


def executable() -> str | None:
    """The path of an installed Chromium or Chrome, or None."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


@contextmanager
def launch(*, timeout_s: float = 60) -> Iterator[Browser]:
    """Start a browser with an empty profile; close it and remove the profile at the end.

    Every command and every wait fails with BrowserError after `timeout_s`.
    """
    program = executable()
    if program is None:
        raise BrowserError(f"no browser is installed (looked for {', '.join(_NAMES)})")
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as profile:
        their_in, our_out = _pipe()
        our_in, their_out = _pipe()
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                _EXEC,
                str(their_in),
                str(their_out),
                program,
                *_FLAGS,
                f"--user-data-dir={profile}",
            ],
            pass_fds=(their_in, their_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_in)
        os.close(their_out)
        try:
            chromium = Browser(our_in, our_out, timeout_s)
            yield chromium
            chromium.command("Browser.close")
        finally:
            os.close(our_in)
            os.close(our_out)  # at which the browser ends, if it has not yet
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Browser:
    """A running browser. Not for use by several threads."""

    def __init__(self, read_fd: int, write_fd: int, timeout_s: float) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._timeout_s = timeout_s
        self._ids = count(1)
        self._received = b""
        self._pages: dict[str, Page] = {}

    def open(self, url: str) -> Page:
        """Open the URL in a new tab and return once its document has begun to load."""
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Network", "Runtime", "Log"):
            page.command(f"{domain}.enable")
        page.goto(url)
        return page

    def command(self, method: str, *, session: str | None = None, **params: Any) -> Any:
        """Send a command and return its result. Raises BrowserError."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write_fd, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + self._timeout_s
        while (answer := self._receive(method, deadline)).get("id") != number:
            if (page := self._pages.get(answer.get("sessionId", ""))) is not None:
                page.note(answer["method"], answer["params"])
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _receive(self, method: str, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._received:
            readable, _, _ = select.select([self._read_fd], [], [], max(0, deadline - time.monotonic()))
            if not readable:
                raise BrowserError(f"{method}: no answer within {self._timeout_s} s")
            chunk = os.read(self._read_fd, 1 << 16)
            if not chunk:
                raise BrowserError(f"{method}: the browser has closed")
            self._received += chunk
        message, _, self._received = self._received.partition(b"\0")
        decoded: dict[str, Any] = json.loads(message)
        return decoded


class Page:
    """A tab. `requests` are the URLs it has asked for, `errors` what it has thrown or logged as an error."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session
        self.requests: list[str] = []
        self.errors: list[str] = []

    def command(self, method: str, **params: Any) -> Any:
        """Send a command of the DevTools protocol to this tab."""
        return self._browser.command(method, session=self._session, **params)

    def goto(self, url: str) -> None:
        """Navigate. Raises BrowserError if nothing answers there; an error status is a page like another."""
        error = self.command("Page.navigate", url=url).get("errorText")
        if error:
            raise BrowserError(f"{url}: {error}")

    def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression; a promise is awaited."""
        answer = self.command("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise BrowserError(f"{expression}: {answer['exceptionDetails']['exception']['description']}")
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Return once the document has a body and the JavaScript expression is true."""
        try:
            self.evaluate(
                "new Promise(done => { const look = () =>"
                f" document.body && ({expression}) ? done() : setTimeout(look, 16); look() }})"
            )
        except BrowserError as error:
            raise BrowserError(f"{expression} did not become true; errors: {self.errors}") from error

    def text(self) -> str:
        """What a person can read on the page."""
        return str(self.evaluate("document.body.innerText"))

    def html(self) -> str:
        """The document as rendered."""
        return str(self.evaluate("document.documentElement.outerHTML"))

    def screenshot(self, path: Path) -> None:
        """Write what the window shows as PNG."""
        image = self.command("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(image))

    def note(self, event: str, params: dict[str, Any]) -> None:
        """Keep what the tests ask for of an event."""
        if event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif event == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])


def _pipe() -> tuple[int, int]:
    """A pipe away from descriptors 3 and 4, which the browser's own must not overwrite."""
    read_fd, write_fd = os.pipe()
    moved = fcntl.fcntl(read_fd, fcntl.F_DUPFD_CLOEXEC, 10), fcntl.fcntl(write_fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(read_fd)
    os.close(write_fd)
    return moved
