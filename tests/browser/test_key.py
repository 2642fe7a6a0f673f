"""The admin key: asked for, kept in the page's memory only, and forgotten."""

from __future__ import annotations

from typing import TYPE_CHECKING

from playwright.async_api import expect

from tests.integration.conftest import ADMIN_KEY

if TYPE_CHECKING:
    from tests.browser.conftest import Opener
    from tests.integration.conftest import Api, Served

STORED = """() => JSON.stringify([
    {...localStorage}, {...sessionStorage}, document.cookie, location.href, document.documentElement.outerHTML,
    [...document.querySelectorAll('input')].map(input => input.value), history.state,
])"""


async def test_a_wrong_key_opens_nothing(open_dashboard: Opener) -> None:
    dashboard = await open_dashboard(unlock=False)
    page = dashboard.page
    await dashboard.unlock("not-the-admin-key")
    await expect(page.get_by_role("alert")).to_contain_text("not an admin key")
    await expect(page.get_by_role("navigation")).to_be_hidden()
    await dashboard.unlock("schlüssel-ohne-zukunft")
    await expect(page.get_by_role("alert")).to_contain_text("cannot be an admin key")
    await dashboard.unlock()
    await dashboard.ready()
    await expect(page.get_by_role("heading", name="Fleet")).to_be_visible()


async def test_the_key_is_in_memory_only(open_dashboard: Opener) -> None:
    dashboard = await open_dashboard()
    page = dashboard.page
    await dashboard.visit("#/engines")
    assert ADMIN_KEY not in await page.evaluate(STORED)
    assert await page.evaluate("async () => (await indexedDB.databases()).length + (await caches.keys()).length") == 0

    await page.get_by_role("button", name="Lock").click()
    await expect(page.get_by_label("Admin key")).to_be_focused()
    await expect(page.get_by_role("navigation")).to_be_hidden()
    await dashboard.unlock()
    await dashboard.ready()
    await page.reload()
    await expect(page.get_by_label("Admin key")).to_be_visible()
    assert dashboard.complaints == []


async def test_a_key_that_is_refused_later_locks_the_page(open_dashboard: Opener, served: Served) -> None:
    dashboard = await open_dashboard()
    settings = served.plane.settings
    served.plane.settings = settings.model_copy(update={"admin_key": settings.admin_key[:0]})
    await dashboard.page.get_by_role("link", name="Engines", exact=True).click()
    await expect(dashboard.page.get_by_role("alert")).to_contain_text("not valid any more")
    await expect(dashboard.page.get_by_role("heading", name="Engines", level=1)).to_have_count(0)


async def test_names_are_text_and_the_policy_holds(open_dashboard: Opener, api: Api) -> None:
    user = "<img src=x onerror=alert(1)><script>document.title='owned'<\x5cscript>"
    await api.provision(user)
    dashboard = await open_dashboard()
    page = dashboard.page
    await dashboard.visit("#/engines")
    await expect(page.get_by_role("link", name=user)).to_be_visible()
    await page.get_by_role("link", name=user).click()
    await expect(page.get_by_role("heading", name=user)).to_be_visible()
    assert await page.locator("main img, main script").count() == 0
    assert dashboard.complaints == []
    refused = await page.evaluate(
        """() => new Promise(resolve => {
            document.addEventListener('securitypolicyviolation', event => resolve(event.violatedDirective));
            document.body.append(Object.assign(document.createElement('img'), {src: 'http://127.0.0.2:1/x.png'}));
        })"""
    )
    assert refused == "img-src"
    assert "TrustedHTML" in await page.evaluate(
        "() => { try { document.body.innerHTML = '<b>x</b>'; return '' } catch (error) { return String(error) } }"
    )
