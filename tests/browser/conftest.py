"""The dashboard in a real browser: Chromium of the distribution, driven by Playwright.

`tests/browser/setup.sh` installs it; without it these tests are skipped, in CI they fail.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.async_api import async_playwright, expect

from tests.integration.conftest import ADMIN_KEY, admin, api, deployment, served, variables

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Page, Request

    from tests.integration.conftest import Served

__all__ = ["Dashboard", "admin", "api", "deployment", "open_dashboard", "served", "variables"]

TIMEOUT_MS = 45_000  # for whatever is awaited: the machine may be busy
expect.set_options(timeout=TIMEOUT_MS)


@dataclass
class Dashboard:
    """An unlocked dashboard in a page of its own; `complaints` is what the browser had to say."""

    page: Page
    url: str
    complaints: list[str] = field(default_factory=list)

    def heard(self, message: ConsoleMessage) -> None:
        # An engine that is gone meanwhile is told by a 404, and so is what was just asked of it.
        if message.type == "error" and not re.search(r"/(logs|timeline)\b", message.location["url"]):
            self.complaints.append(message.text)

    def unloaded(self, request: Request) -> None:
        # What a page asked for when it was left is given up, and that is as it should be.
        if request.failure != "net::ERR_ABORTED":
            self.complaints.append(f"{request.url}: {request.failure}")

    async def visit(self, route: str) -> None:
        """Another page of the dashboard, without losing the key, once it has shown its data."""
        await self.page.evaluate("delete document.getElementById('main').dataset.ready")
        await self.page.evaluate("route => { location.hash = '#/none'; location.hash = route }", route)
        await self.ready()

    async def ready(self) -> None:
        await expect(self.page.locator("main[data-ready=true]")).to_be_attached()

    async def unlock(self, key: str = ADMIN_KEY) -> None:
        await self.page.get_by_label("Admin key").fill(key)
        await self.page.get_by_role("button", name="Open").click()


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    if shutil.which(os.environ.get("CHROMIUM", "chromium")) is None:
        if os.environ.get("CI"):
            pytest.fail("chromium is missing: run tests/browser/setup.sh")
        pytest.skip("chromium is missing: run tests/browser/setup.sh")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=Path(__file__).with_name("chromium.py"),
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
            timeout=TIMEOUT_MS,
        )
        try:
            yield browser
        finally:
            await browser.close()


class Opener:
    def __init__(self, browser: Browser, served: Served) -> None:
        self._browser = browser
        self._url = f"{served.url}/dashboard"
        self._contexts: list[BrowserContext] = []
        self._opened: list[Dashboard] = []

    async def __call__(
        self, *, dark: bool = False, width: int = 1280, height: int = 900, unlock: bool = True
    ) -> Dashboard:
        context = await self._browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",
            is_mobile=width < 700,
            has_touch=width < 700,
        )
        self._contexts.append(context)
        context.set_default_timeout(TIMEOUT_MS)
        page = await context.new_page()
        made = Dashboard(page, self._url)
        self._opened.append(made)
        page.on("console", made.heard)
        page.on("pageerror", lambda error: made.complaints.append(str(error)))
        page.on("requestfailed", lambda request: made.unloaded(request))
        await page.goto(self._url)
        if unlock:
            await made.unlock()
            await made.ready()
        return made

    async def close(self) -> None:
        for dashboard in self._opened:
            print("the browser's complaints:", dashboard.complaints)  # seen when the test has failed
        for context in self._contexts:
            await context.close()


@pytest.fixture
async def open_dashboard(browser: Browser, served: Served) -> AsyncIterator[Opener]:
    opener = Opener(browser, served)
    try:
        yield opener
    finally:
        await opener.close()
