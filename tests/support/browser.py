"""A page as a person's browser shows it: headless Chromium, and everything it complained of."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

__all__ = ["Opened", "chromium", "opened"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# It would look for updates and sync at its start.
_QUIET = ["--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]


class Opened:
    """A page that was opened, its complaints and what it asked for."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def _on_console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Start the Chromium of LOGSYNC_CHROMIUM, of the system, or of playwright; without one the test fails.

    LOGSYNC_CHROMIUM=none says that none can be had, and skips the test.
    """
    if os.environ.get("LOGSYNC_CHROMIUM") == "none":
        pytest.skip("LOGSYNC_CHROMIUM=none: no browser can be installed here")
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = os.environ.get("LOGSYNC_CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
        if found is None and not Path(own).exists():
            pytest.fail(
                "no Chromium was found: install one (on Debian: apt install chromium), let playwright fetch its own "
                "(python -m playwright install chromium), or give its path in LOGSYNC_CHROMIUM"
            )
        browser = playwright.chromium.launch(executable_path=found or own, args=_QUIET)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def opened(browser: Browser, path: Path, scheme: Literal["light", "dark"] = "light") -> Iterator[Opened]:
    """Open the file and wait until it says that it is ready, and that its first picture is there."""
    context = browser.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 900}, offline=True)
    try:
        found = Opened(context.new_page())
        found.page.goto(path.as_uri())
        found.page.wait_for_selector("body[data-ready]", timeout=60_000)
        yield found
    finally:
        context.close()
