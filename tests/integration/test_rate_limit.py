"""`rate_limit_rpm`: never more than N counted admits in any 60 s, over all replicas, restarts and changes of policy."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest

from orchestrator.control_plane import ControlPlane
from orchestrator.errors import RateLimited
from tests.integration.checks import code_of, database, retry_after
from tests.integration.conftest import settings_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.integration.conftest import Served


@asynccontextmanager
async def replica(served: Served) -> AsyncIterator[ControlPlane]:
    """One more replica on the same database."""
    plane = ControlPlane(settings_of(served.deployment.variables))
    await plane.open()
    try:
        yield plane
    finally:
        await plane.close()


class Product:
    """A product whose admits are counted as they pass; they ask for a user without an engine."""

    def __init__(self, served: Served, key: str, product_id: str) -> None:
        self.served = served
        self.key = key
        self.id = UUID(product_id)

    async def admits(self, calls: int, *planes: ControlPlane) -> int:
        """How many of so many concurrent calls pass, over these replicas in turn."""
        planes = planes or (self.served.plane,)

        async def one(plane: ControlPlane) -> bool:
            try:
                admission = await plane.discovery.admit(self.key, "nobody", auto_provision=False, auto_wake=False)
            except RateLimited as refusal:
                return not 1 <= (refusal.retry_after_s or 0) <= 61  # a wrong time would show as one too many
            assert admission.reason == "engine_not_found"
            return True

        # The pool of each replica has ten connections: more calls at once would wait for those.
        batches = (range(start, min(start + 40, calls)) for start in range(0, calls, 40))
        return sum([sum(await asyncio.gather(*(one(planes[n % len(planes)]) for n in batch))) for batch in batches])

    async def set_policy(self, policy: dict[str, Any]) -> None:
        assert await self.served.plane.registry.products.replace_policy(self.id, policy)

    async def sql(self, statement: str) -> Any:
        async with database(self.served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
            return await connection.fetchval(statement)


async def limited(served: Served, limit: int | None, slug: str = "acme") -> Product:
    policy = {} if limit is None else {"rate_limit_rpm": limit}
    api = await served.deployment.product(served.url, slug, policy)
    return Product(served, api.client.headers["x-platform-key"], api.headers["product_id"])


@pytest.mark.parametrize("limit", [1, 50])
async def test_exactly_n_pass_over_two_replicas_and_a_restart(served: Served, limit: int) -> None:
    product = await limited(served, limit)
    async with replica(served) as other:
        assert await product.admits(limit - limit // 2, served.plane, other) == limit - limit // 2
        assert await product.admits(120, served.plane, other) == limit // 2
    async with replica(served) as restarted:
        assert await product.admits(5, restarted, served.plane) == 0
    await product.sql("UPDATE rate_slots SET free_at = now() WHERE slot <= 3")
    assert await product.admits(10) == min(limit, 3), "what is older than 60 s leaves, and nothing else"


async def test_refusal(served: Served) -> None:
    api = await served.deployment.product(served.url, policy={"rate_limit_rpm": 2})
    assert (await api.post("/engines/ann/admit"))[1]["admitted"] is False, "this one counts"
    assert code_of(await api.post("/engines/a%00b/admit")) == (400, "INVALID_REQUEST"), "this one does not"
    assert (await api.post("/engines/ann/admit"))[0] == 200
    await Product(served, "", api.headers["product_id"]).sql(
        "UPDATE rate_slots SET free_at = now() + interval '20 s' WHERE slot = 1"
    )
    for _ in range(3):
        answer = await api.post("/engines/ann/admit")
        assert code_of(answer) == (429, "RATE_LIMITED")
        assert 18 <= retry_after(api) <= 20, "until the oldest leaves"
        assert answer[1]["error"]["message"] == f"Rate limit exceeded. Retry in {retry_after(api)} seconds."
    assert (await api.get("/engines"))[0] == 200, "only admits are limited"
    admin = served.deployment.admin(served.url, api.headers["product_id"])
    assert code_of(await admin.post("/engines/ann/admit")) == (429, "RATE_LIMITED"), "an admin acts as the product"


async def test_products_do_not_share_a_limit(served: Served) -> None:
    one, other = await limited(served, 3, "one"), await limited(served, 3, "other")
    assert await one.admits(5) == 3
    assert await other.admits(5) == 3


@pytest.mark.parametrize("limit", [30, 700])
async def test_refusals_are_in_the_audit_with_their_count(served: Served, limit: int) -> None:
    product = await limited(served, limit)
    passed = await product.admits(limit + 20)
    await served.plane.activity.flush()
    refused = "SELECT sum(count) FROM admit_denials WHERE reason = 'RATE_LIMITED' AND user_id = 'nobody'"
    assert await product.sql(refused) == limit + 20 - passed


async def test_large_limit_over_two_replicas(served: Served) -> None:
    limit = 700
    product = await limited(served, limit)
    async with replica(served) as other:
        passed = await product.admits(limit + 200, served.plane, other)
        assert limit * 0.98 <= passed <= limit
        for plane in (served.plane, other):
            await plane.limiter.close()
        assert await product.sql("SELECT sum(calls) FROM rate_blocks") == passed, "what was not used is given back"
        passed += await product.admits(50, served.plane, other)
        assert passed <= limit
    async with replica(served) as restarted:
        assert passed + await product.admits(50, restarted) <= limit


async def test_large_limit_takes_small_blocks(served: Served) -> None:
    product = await limited(served, 10_000)
    assert await product.admits(1) == 1
    assert await product.sql("SELECT max(calls) FROM rate_blocks") <= 100
    await served.plane.limiter.close()
    assert await product.sql("SELECT sum(calls) FROM rate_blocks") == 1


async def test_change_of_policy_carries_over_what_was_counted(served: Served) -> None:
    product = await limited(served, 10)
    assert await product.admits(6) == 6
    await product.set_policy({"rate_limit_rpm": 8})
    assert await product.admits(5) == 2
    await product.set_policy({"rate_limit_rpm": 5})
    assert await product.admits(5) == 0
    await product.set_policy({"rate_limit_rpm": 20})
    assert await product.admits(30) == 12, "eight were counted; none is forgotten while it counts"


async def test_change_between_small_and_large_limits(served: Served) -> None:
    product = await limited(served, 30)
    assert await product.admits(20) == 20
    await product.set_policy({"rate_limit_rpm": 700})
    passed = await product.admits(750)
    assert 700 * 0.98 - 20 <= passed <= 680
    await served.plane.limiter.close()
    await product.set_policy({"rate_limit_rpm": 600})
    assert await product.admits(20) == 0
    await product.set_policy({"rate_limit_rpm": 1000})
    assert await product.admits(1000) <= 1000 - 20 - passed


async def test_a_while_without_limit(served: Served) -> None:
    product = await limited(served, 10)
    assert await product.admits(6) == 6
    await product.set_policy({})
    assert await product.admits(30) == 30, "no limit, and nothing is counted"
    await product.set_policy({"rate_limit_rpm": 10})
    assert await product.admits(10) == 4
    await product.set_policy({"max_engines": 3})
    await product.set_policy({"rate_limit_rpm": 10, "max_engines": 3})
    assert await product.admits(5) == 0


async def test_change_of_policy_under_load(served: Served) -> None:
    """No call that passes meanwhile is forgotten."""
    product = await limited(served, 40)

    async def change() -> None:
        for limit in (45, 40) * 6:
            await product.set_policy({"rate_limit_rpm": limit})

    async with replica(served) as other:
        changing = asyncio.create_task(change())
        passed = 0
        while not changing.done():
            passed += await product.admits(8, served.plane, other)
        passed += await product.admits(60, served.plane, other)
    assert 40 <= passed <= 45


async def test_a_call_that_is_counted_while_the_policy_changes(served: Served) -> None:
    """The change waits for it, and carries it over."""
    product = await limited(served, 10)
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("UPDATE rate_slots SET free_at = now() + interval '60 s' WHERE slot = 7")
        changing = asyncio.create_task(product.set_policy({"rate_limit_rpm": 12}))
        while not await product.sql(waiting):  # noqa: ASYNC110 - the database says when it waits
            await asyncio.sleep(0)
        await transaction.commit()
        await changing
    assert await product.admits(20) == 11
