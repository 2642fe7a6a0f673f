"""`GET /audit`: every entry once, in order, whatever is written meanwhile; filters; each product its own."""

from __future__ import annotations

import asyncio
import itertools
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest

from tests.integration.checks import code_of
from tests.integration.steps import until

if TYPE_CHECKING:
    from tests.integration.conftest import Api, Served


async def insert(served: Served, count: int, product_id: str | None = None, **fields: Any) -> None:
    for number in range(count):
        await served.plane.registry.audit.insert(
            **{
                "action": "health_check",
                "product_id": None if product_id is None else UUID(product_id),
                "metadata": {"number": number},
                **fields,
            }
        )


async def sequenced(served: Served) -> None:
    async def all_placed() -> bool:
        return not (await served.plane.registry.audit.unsequenced())[0]

    await until(all_placed, 30)


async def pages(api: Api, limit: int, **query: str) -> list[dict[str, Any]]:
    """All entries, page by page."""
    entries: list[dict[str, Any]] = []
    cursor: dict[str, str] = {}
    while True:
        status, body = await api.get("/audit", params={"limit": str(limit), **query, **cursor})
        assert status == 200, body
        assert len(body["entries"]) <= limit
        entries += body["entries"]
        if body["next_cursor"] is None:
            return entries
        assert len(body["entries"]) == limit
        cursor = {"cursor": body["next_cursor"]}


async def test_pages_give_every_entry_once_in_both_orders(served: Served, api: Api) -> None:
    await insert(served, 20, str(api.headers["product_id"]))
    await sequenced(served)
    entries = await pages(api, 6)
    assert [entry["seq"] for entry in entries] == list(range(1, 22))  # the registration, too
    for former, entry in itertools.pairwise(entries):
        assert entry["prev_hash"] == former["hash"]
    assert await pages(api, 6, order="desc") == entries[::-1]
    assert await pages(api, 21) == entries


async def test_entries_added_between_pages_move_none(served: Served, api: Api) -> None:
    product_id = str(api.headers["product_id"])
    await insert(served, 5, product_id)
    await sequenced(served)
    _, first = await api.get("/audit?limit=3")
    _, newest = await api.get("/audit?limit=3&order=desc")
    await insert(served, 4, product_id)
    await sequenced(served)
    _, second = await api.get(f"/audit?limit=100&cursor={first['next_cursor']}")
    assert [entry["seq"] for entry in first["entries"] + second["entries"]] == list(range(1, 11))
    _, older = await api.get(f"/audit?limit=100&order=desc&cursor={newest['next_cursor']}")
    assert [entry["seq"] for entry in newest["entries"] + older["entries"]] == list(range(6, 0, -1))


async def test_each_product_sees_its_own_and_the_admin_all(served: Served, api: Api, admin: Api) -> None:
    other = await served.deployment.product(served.url, "other")
    mine, theirs = str(api.headers["product_id"]), str(other.headers["product_id"])
    for _ in range(3):
        await asyncio.gather(insert(served, 4, mine), insert(served, 4, theirs), insert(served, 4))
    await sequenced(served)
    assert {entry["seq"] for entry in await pages(other, 5)} == set(range(1, 14))
    assert "product_id" not in (await pages(api, 5))[0]
    everything = await pages(admin, 7)
    assert await pages(admin, 7, order="desc") == everything[::-1]
    by_product: dict[str | None, list[int]] = {}
    for entry in everything:
        by_product.setdefault(entry["product_id"], []).append(entry["seq"])
    assert by_product == {mine: list(range(1, 14)), theirs: list(range(1, 14)), None: list(range(1, 13))}
    as_mine = served.deployment.admin(served.url, mine)
    assert await pages(as_mine, 5) == await pages(api, 5)


async def test_filters(served: Served, api: Api) -> None:
    product_id = str(api.headers["product_id"])
    await insert(served, 2, product_id, user_id="ann")
    await insert(served, 3, product_id, user_id="bob", action="wake")
    await insert(served, 1, product_id, user_id="ann", action="wake")
    await sequenced(served)
    assert len(await pages(api, 2, user_id="ann")) == 3
    assert len(await pages(api, 2, action="wake")) == 4
    assert len(await pages(api, 2, action="wake", user_id="ann", order="desc")) == 1
    assert await pages(api, 2, user_id="nobody") == []
    now = datetime.now(UTC)
    hour = timedelta(hours=1)
    assert await pages(api, 2, since=(now + hour).isoformat()) == []
    assert await pages(api, 2, until=(now - hour).isoformat()) == []
    in_this_hour = {"since": (now - hour).isoformat(), "until": (now + hour).isoformat()}
    assert len(await pages(api, 2, **in_this_hour)) == 7
    unescaped = (now - hour).isoformat(timespec="seconds")  # its plus arrives as a space
    status, body = await api.get(f"/audit?since={unescaped}")
    assert status == 200
    assert len(body["entries"]) == 7
    entry = (await pages(api, 10))[-1]
    moment = datetime.fromisoformat(entry["timestamp"]) + timedelta(milliseconds=1)
    assert entry in await pages(api, 10, until=moment.isoformat())


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=1001", "cursor=x", "cursor=-1", "order=up", "since=yesterday", "until=2030-01-01T00:00:00"],
)
async def test_bad_input_names_the_field(api: Api, query: str) -> None:
    answer = await api.get(f"/audit?{query}")
    assert code_of(answer) == (400, "INVALID_REQUEST")
    assert answer[1]["error"]["details"]["field"] == query.partition("=")[0]
