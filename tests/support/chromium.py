"""A page in the Chromium or Chrome that this machine has: playwright drives it and downloads none of its own."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

from playwright.sync_api import expect, sync_playwright

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Page

__all__ = ["a_page", "executable"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--no-sandbox",  # which root cannot have
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
)
_TIMEOUT_MS = 60_000


def executable() -> str | None:
    """The path of an installed Chromium or Chrome, or None."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


@contextmanager
def a_page() -> Iterator[Page]:
    """An empty page of a headless browser with an empty profile; browser and profile go at the end.

    Meanwhile this thread counts as running an asyncio loop, playwright's: `asyncio.run` refuses to start another.
    """
    expect.set_options(timeout=_TIMEOUT_MS)
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=executable(), args=_FLAGS, timeout=_TIMEOUT_MS) as browser,
    ):
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(_TIMEOUT_MS)
        yield page
