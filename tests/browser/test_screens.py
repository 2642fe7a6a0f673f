"""Every page in light, dark and at phone width: it fits, the browser has no complaint, and a picture is taken.

`ORCH_SCREENSHOTS=docs/images` keeps the pictures there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.async_api import expect

from tests.browser.fleet import put_fleet

if TYPE_CHECKING:
    from tests.browser.conftest import Opener
    from tests.integration.conftest import Api, Served

LOOKS = {"light": (False, 1280), "dark": (True, 1280), "phone": (False, 390), "phone-dark": (True, 390)}
# What a page has when it is drawn in full.
WHOLE = {
    "overview": ".feed li",
    "engines": "tr[data-row]",
    "products": "section.product",
    "engine": ".timeline > *",
}
PAGES = {"overview": "#/", "engines": "#/engines", "products": "#/products"}


@pytest.mark.timeout(300)
async def test_every_page_in_every_look(open_dashboard: Opener, served: Served, api: Api, tmp_path: Path) -> None:
    directory = Path(os.environ.get("ORCH_SCREENSHOTS") or tmp_path)
    directory.mkdir(parents=True, exist_ok=True)
    await put_fleet(served, str(api.headers["product_id"]), 10_000)
    await served.deployment.product(served.url, "notebooks", {"max_engines": 500, "rate_limit_rpm": 600})
    engine = await api.provision("ann")
    await api.post("/engines/ann/sleep")
    await api.admit("ann")
    for look, (dark, width) in LOOKS.items():
        dashboard = await open_dashboard(dark=dark, width=width, height=900 if width > 700 else 844)
        for name, route in {**PAGES, "engine": f"#/engines/{engine['engine_id']}"}.items():
            await dashboard.visit(route)
            if name == "overview":
                await api.post("/engines/ann/sleep")
                await api.admit("ann")
            await expect(dashboard.page.locator(WHOLE[name]).first).to_be_visible()
            overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert await dashboard.page.evaluate(overflow) <= 0, (look, name)
            if name == "overview":
                await expect(dashboard.page.locator(".chart canvas")).to_have_count(5)
            await dashboard.page.screenshot(
                path=directory / f"dashboard-{name}-{look}.png", full_page=name != "engines"
            )
        assert dashboard.complaints == []
