"""Products and platform keys in the dashboard."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from playwright.async_api import expect

if TYPE_CHECKING:
    from playwright.async_api import Locator, Page

    from tests.browser.conftest import Dashboard, Opener
    from tests.integration.conftest import Api, Served


async def answer(page: Page, verb: str, **fields: str) -> None:
    """Fill the open dialog and send it."""
    dialog = page.get_by_role("dialog")
    for label, value in fields.items():
        field = dialog.get_by_label(re.compile(f"^{label}"))
        if await field.evaluate("element => element.tagName") == "SELECT":
            await field.select_option(value)
        else:
            await field.fill(value)
    await dialog.get_by_role("button", name=verb).click()
    await expect(dialog).to_have_count(0)


async def shown_key(page: Page) -> str:
    panel = page.get_by_role("region", name="New platform key")
    await expect(panel).to_have_count(1)
    return await panel.locator("code").inner_text()


def keys_of(card: Locator) -> Locator:
    return card.locator("tbody tr")


async def status_with(served: Served, key: str) -> int:
    status, _ = await served.deployment.api(served.url, {"X-Platform-Key": key}).get("/engines")
    return status


async def open_products(open_dashboard: Opener) -> Dashboard:
    dashboard = await open_dashboard()
    await dashboard.visit("#/products")
    return dashboard


async def test_a_product_from_its_registration_to_its_end(open_dashboard: Opener, served: Served) -> None:
    dashboard = await open_products(open_dashboard)
    page = dashboard.page
    await expect(page.get_by_text("No product is registered.")).to_be_visible()
    await page.get_by_role("button", name="Register a product").click()
    await answer(page, "Register", Slug="shop", Name="The Shop", Policy='{"max_engines": 5}')
    card = page.get_by_role("region", name="The Shop")
    await expect(card).to_contain_text("max_engines 5")
    first = await shown_key(page)
    assert await status_with(served, first) == 200
    await page.get_by_role("button", name="I have stored it").click()
    await expect(page.get_by_role("region", name="New platform key")).to_have_count(0)

    await card.get_by_role("button", name="Policy").click()
    await page.get_by_role("dialog").get_by_label("Policy").last.fill("{")
    await page.get_by_role("dialog").get_by_role("button", name="Replace").click()
    await expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("not JSON")
    await answer(page, "Replace", Policy=json.dumps({"rate_limit_rpm": 60}))
    await expect(card).to_contain_text("rate_limit_rpm 60")

    await card.get_by_role("button", name="New key").click()
    await answer(page, "Issue", May="read", Valid="7")
    second = await shown_key(page)
    await expect(keys_of(card)).to_have_count(2)
    assert await status_with(served, second) == 200
    row = keys_of(card).filter(has_text="read")
    await row.get_by_role("button", name="Revoke").click()
    await answer(page, "Revoke")
    await expect(keys_of(card)).to_have_count(1)
    assert await status_with(served, second) == 401
    await page.get_by_role("button", name="I have stored it").click()

    await card.get_by_role("button", name="Rotate").click()
    await answer(page, "Rotate", Overlap="0")
    third = await shown_key(page)
    assert await status_with(served, third) == 200
    assert await status_with(served, first) == 401

    await card.get_by_role("button", name="Delete").click()
    dialog = page.get_by_role("dialog")
    await expect(dialog.get_by_role("button", name="Delete")).to_be_disabled()
    await dialog.get_by_label("Type shop").fill("shop")
    await answer(page, "Delete")
    await expect(page.get_by_text("No product is registered.")).to_be_visible()
    assert await status_with(served, third) == 401


async def test_a_key_shown_once_stays_until_it_is_put_away(open_dashboard: Opener, api: Api) -> None:
    dashboard = await open_products(open_dashboard)
    page = dashboard.page
    card = page.get_by_role("region", name="Acme")
    await card.get_by_role("button", name="New key").click()
    await answer(page, "Issue", May="admit")
    key = await shown_key(page)
    # The event of the key itself, and others, make the list anew.
    await api.provision("ann")
    await expect(card).to_contain_text("1 engine")
    await api.provision("bob")
    await expect(card).to_contain_text("2 engines")
    await expect(keys_of(card)).to_have_count(2)
    assert await shown_key(page) == key
    await page.get_by_role("link", name="Engines", exact=True).click()
    await expect(page.get_by_role("heading", name="Engines", level=1)).to_be_visible()
    await page.get_by_role("link", name="Products").click()
    assert await shown_key(page) == key
    await page.get_by_role("button", name="Lock").click()
    assert key not in await page.content(), "a locked page shows no secret"
    await dashboard.unlock()
    await expect(card).to_be_visible()
    await expect(page.get_by_role("region", name="New platform key")).to_have_count(0)


async def test_a_slug_that_is_taken_is_told(open_dashboard: Opener, api: Api) -> None:
    dashboard = await open_products(open_dashboard)
    page = dashboard.page
    await page.get_by_role("button", name="Register a product").click()
    dialog = page.get_by_role("dialog")
    await dialog.get_by_label("Slug").fill("acme")
    await dialog.get_by_label("Name").fill("Another")
    await dialog.get_by_role("button", name="Register").click()
    await expect(dialog.get_by_role("alert")).to_contain_text("acme")
    await page.keyboard.press("Escape")
    await expect(dialog).to_have_count(0)
    await expect(page.get_by_role("region", name="Acme")).to_be_visible()
    assert api.headers["product_id"]
