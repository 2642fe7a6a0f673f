"""Finding engines among ten thousand, looking at one, and doing something about it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import httpx
from playwright.async_api import expect

from tests.browser.fleet import put_fleet

if TYPE_CHECKING:
    from playwright.async_api import Locator, Page

    from tests.browser.conftest import Dashboard, Opener
    from tests.integration.conftest import Api, Served

BADGE = ".head .badge"


async def say(engine: dict[str, Any], line: str) -> int:
    """Let an engine write a line into its log."""
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        headers = {"X-Engine-Key": engine["api_key"]}
        response = await client.post(f"{engine['url']}/say", headers=headers, content=line)
        return response.status_code


def rows(page: Page) -> Locator:
    return page.locator("tr[data-row]")


async def test_ten_thousand_are_searched_filtered_sorted_and_paged(
    open_dashboard: Opener, served: Served, api: Api
) -> None:
    await put_fleet(served, str(api.headers["product_id"]), 10_000)
    dashboard = await open_dashboard()
    page = dashboard.page
    await dashboard.visit("#/engines")
    await expect(page.locator(".pager")).to_contain_text("1–50 of 10,000")
    await expect(rows(page)).to_have_count(50)

    await page.get_by_role("searchbox").fill("USER-0123")
    await expect(page.locator(".pager")).to_contain_text("1–10 of 10")
    await expect(rows(page)).to_have_count(10)
    await page.get_by_role("group", name="State").get_by_role("button", name="running").click()
    await expect(rows(page).first).to_contain_text("running")
    await expect(page.get_by_role("group", name="State").get_by_role("button", name="all")).to_contain_text("10")
    assert "search=USER-0123" in page.url, "the address can be shared"
    assert "status=running" in page.url

    await page.get_by_role("searchbox").fill("no such user")
    await expect(page.get_by_text("No engine matches.")).to_be_visible()
    await page.get_by_role("searchbox").fill("")
    await page.get_by_role("group", name="State").get_by_role("button", name="all").click()
    await page.get_by_role("button", name="User").click()
    await expect(rows(page).first).to_contain_text("user-00001")
    await expect(page.get_by_role("columnheader", name="User")).to_have_attribute("aria-sort", "ascending")
    await page.get_by_role("button", name="Next").click()
    await expect(rows(page).first).to_contain_text("user-00051")
    await page.get_by_role("button", name="User").click()
    await expect(rows(page).first).to_contain_text("user-10000")
    assert dashboard.complaints == []


async def test_everything_by_keyboard(open_dashboard: Opener, api: Api) -> None:
    for user in ("ann", "bob", "cid"):
        await api.provision(user)
    dashboard = await open_dashboard()
    page, keys = dashboard.page, dashboard.page.keyboard
    await keys.press("g")
    await keys.press("e")
    await expect(page.get_by_role("heading", name="Engines", level=1)).to_be_visible()
    await expect(rows(page)).to_have_count(3)
    await expect(page.get_by_role("searchbox")).to_be_focused()
    await keys.type("bo")
    await expect(rows(page)).to_have_count(1)
    await keys.press("Escape")
    await keys.press("/")
    await expect(page.get_by_role("searchbox")).to_be_focused()
    await page.get_by_role("searchbox").fill("")
    await expect(rows(page)).to_have_count(3)
    await keys.press("Escape")
    await keys.press("j")
    await keys.press("j")
    await expect(rows(page).nth(1)).to_be_focused()

    await api.post("/engines/ann/stop")  # a live change takes the focus from nobody
    await expect(page.get_by_role("row", name=re.compile("^ann stopped"))).to_be_visible()
    await api.post("/engines/bob/stop")
    await expect(page.get_by_role("row", name=re.compile("^bob stopped"))).to_be_visible()
    await expect(rows(page).nth(1)).to_be_focused()
    await keys.press("k")
    await keys.press("Enter")
    await expect(page.get_by_role("heading", name="cid")).to_be_visible()

    await keys.press("?")
    await expect(page.get_by_role("dialog")).to_contain_text("Keyboard")
    await keys.press("Escape")
    await expect(page.get_by_role("dialog")).to_have_count(0)
    await keys.press("t")
    await expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    await keys.press("t")
    await expect(page.locator("html")).to_have_attribute("data-theme", "light")
    await keys.press("g")
    await keys.press("o")
    await expect(page.get_by_role("heading", name="Fleet")).to_be_visible()
    assert dashboard.complaints == []


async def test_the_fleet_is_shown_as_it_changes(open_dashboard: Opener, api: Api) -> None:
    await api.provision("ann")
    dashboard = await open_dashboard()
    page = dashboard.page
    running = page.get_by_role("region", name="Now").get_by_role("listitem").filter(has_text="running")
    await expect(running).to_contain_text("1")
    await api.provision("bob")
    await expect(running).to_contain_text("2")
    await expect(page.locator("#live")).to_have_text("live")
    await api.post("/engines/bob/sleep")
    await expect(page.get_by_role("region", name="Events")).to_contain_text("bob")
    await expect(running).to_contain_text("1")
    await running.click()
    await expect(rows(page)).to_have_count(1)
    await expect(rows(page)).to_contain_text("ann")
    assert dashboard.complaints == []


async def test_the_stream_goes_on_where_it_was_cut(open_dashboard: Opener, api: Api) -> None:
    """What happens while the browser is away is shown afterwards: each event once, in its order."""
    await api.provision("ann")
    dashboard = await open_dashboard()
    page = dashboard.page
    events = page.get_by_role("region", name="Events").get_by_role("listitem")
    await api.post("/engines/ann/sleep")
    await expect(events.filter(has_text="sleep")).to_have_count(1)  # the stream has begun, and has a place
    await page.context.set_offline(True)
    await expect(page.locator("#live")).to_have_text("reconnecting")
    await api.post("/engines/ann/start")
    await api.post("/engines/ann/stop")
    await page.context.set_offline(False)
    await expect(page.locator("#live")).to_have_text("live")
    await expect(events.filter(has_text="stop")).to_have_count(1)
    actions = await events.locator("code").all_inner_texts()
    assert sorted(actions) == sorted(set(actions)), actions
    assert {"sleep", "start", "stop"} <= set(actions)
    assert actions.index("stop") < actions.index("start") < actions.index("sleep")


async def confirm(dashboard: Dashboard, verb: str) -> None:
    await dashboard.page.locator(".actions").get_by_role("button", name=verb, exact=True).click()
    await dashboard.page.get_by_role("dialog").get_by_role("button", name=verb, exact=True).click()
    await expect(dashboard.page.get_by_role("dialog")).to_have_count(0)


async def test_actions_ask_first(open_dashboard: Opener, api: Api) -> None:
    engine = await api.provision("ann/b".replace("/", "&"))
    user = "ann&b"
    dashboard = await open_dashboard()
    page = dashboard.page
    await dashboard.visit(f"#/engines/{engine['engine_id']}")
    badge = page.locator(BADGE)
    await expect(badge).to_have_text("running")
    actions = page.locator(".actions")

    await actions.get_by_role("button", name="Stop").click()
    await page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    await expect(page.get_by_role("dialog")).to_have_count(0)
    assert await api.status_of("ann%26b") == "running"

    await confirm(dashboard, "Sleep")
    await expect(badge).to_have_text("sleeping")
    await expect(actions.get_by_role("button", name="Sleep")).to_have_count(0)
    await confirm(dashboard, "Wake")
    await expect(badge).to_have_text("running")
    await confirm(dashboard, "Rotate key")
    await expect(page.get_by_role("region", name="Facts")).to_contain_text("generation 2")
    await confirm(dashboard, "Stop")
    await expect(badge).to_have_text("stopped")
    await confirm(dashboard, "Start")
    await expect(badge).to_have_text("running")
    audit = page.get_by_role("region", name="Audit")
    for action in ("provision", "sleep", "rotate_key", "stop", "start"):
        await expect(audit.get_by_role("cell", name=action, exact=True).first).to_be_visible()
    await audit.get_by_role("searchbox").fill("rotate")
    await expect(audit.locator("tbody tr")).to_have_count(1)

    await actions.get_by_role("button", name="Destroy").click()
    dialog = page.get_by_role("dialog")
    await expect(dialog.get_by_role("button", name="Destroy")).to_be_disabled()
    await dialog.get_by_label(f"Type {user}").fill("ann")
    await expect(dialog.get_by_role("button", name="Destroy")).to_be_disabled()
    await dialog.get_by_label(f"Type {user}").fill(user)
    await dialog.get_by_role("button", name="Destroy").click()
    await expect(badge).to_have_text("destroyed")
    await expect(actions.get_by_role("button")).to_have_count(0)
    assert (await api.get("/engines/ann%26b"))[0] == 404
    await expect(audit.get_by_role("cell", name="destroyed")).to_have_count(0)  # the filter is still there
    assert dashboard.complaints == []


async def test_a_refusal_is_told_in_the_dialog(open_dashboard: Opener, api: Api) -> None:
    engine = await api.provision("ann")
    dashboard = await open_dashboard()
    page = dashboard.page
    await dashboard.visit(f"#/engines/{engine['engine_id']}")
    await page.locator(".actions").get_by_role("button", name="Stop").click()
    await api.call("DELETE", "/engines/ann")
    await page.get_by_role("dialog").get_by_role("button", name="Stop").click()
    await expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("ann")
    await page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    await expect(page.locator(BADGE)).to_have_text("destroyed")


async def test_one_engine_with_timeline_and_live_log(open_dashboard: Opener, served: Served, api: Api) -> None:
    engine = await api.provision("ann")
    dashboard = await open_dashboard()
    page = dashboard.page
    await dashboard.visit(f"#/engines/{engine['engine_id']}")
    operation = page.get_by_role("region", name="Last operation")
    await expect(operation).to_contain_text("provision")
    await expect(operation.locator(".phase").first).to_be_visible()
    log = page.get_by_role("region", name="Log")
    await expect(log.get_by_role("status")).to_have_text("live")
    for line in ("the first line", "<b>another</b> line"):
        assert await say(engine, line) == 204
        await expect(log.locator(".log")).to_contain_text(line)
    await log.get_by_role("searchbox").fill("another")
    await expect(log.locator(".log > div:visible")).to_have_count(1)
    await expect(page.get_by_role("region", name="Health").locator(".strip [data-status=running]")).to_be_attached()
    assert dashboard.complaints == []
