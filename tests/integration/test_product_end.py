"""Products listed and deleted: never with engines left over, and a deletion that was begun is finished."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.integration.checks import code_of, database
from tests.integration.steps import until

if TYPE_CHECKING:
    from tests.integration.conftest import Api, Deployment, Served


async def test_products_are_listed(served: Served, api: Api, admin: Api) -> None:
    await served.deployment.product(served.url, "other", {"max_engines": 3})
    await api.provision("ann")
    status, body = await admin.get("/products")
    assert status == 200
    mine, other = body["products"]
    assert mine == {
        "product_id": api.headers["product_id"],
        "slug": "acme",
        "display_name": "Acme",
        "policy": {},
        "engines": 1,
    }
    assert (other["slug"], other["policy"], other["engines"]) == ("other", {"max_engines": 3}, 0)
    assert code_of(await api.get("/products")) == (401, "INVALID_ADMIN_KEY")


async def test_an_empty_product_is_deleted(served: Served, api: Api, admin: Api) -> None:
    path = f"/products/{api.headers['product_id']}"
    assert await admin.call("DELETE", path) == (200, {"product_id": api.headers["product_id"], "status": "deleted"})
    assert code_of(await admin.call("DELETE", path)) == (404, "PRODUCT_NOT_FOUND")
    assert code_of(await api.get("/engines")) == (401, "INVALID_PLATFORM_KEY")
    assert code_of(await admin.get("/engines", headers={"X-Product-Id": str(api.headers["product_id"])}))[0] == 404
    assert (await admin.get("/products"))[1] == {"products": []}
    await served.deployment.product(served.url)  # the slug is free again
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        row = await connection.fetchrow("SELECT * FROM audit_log WHERE action = 'product_delete'")
    assert row is not None
    assert (row["actor"], row["metadata"]) == ("admin", {"slug": "acme"})


async def test_one_with_engines_only_by_force(served: Served, api: Api, admin: Api) -> None:
    path = f"/products/{api.headers['product_id']}"
    await asyncio.gather(*(api.provision(user) for user in ("ann", "bob")))
    answer = await admin.call("DELETE", path)
    assert code_of(answer) == (409, "PRODUCT_NOT_EMPTY")
    assert answer[1]["error"]["details"] == {"engines": 2}
    assert code_of(await admin.call("DELETE", f"{path}?force=false")) == (409, "PRODUCT_NOT_EMPTY")
    assert code_of(await admin.call("DELETE", f"{path}?force=maybe")) == (400, "INVALID_REQUEST")
    assert (await api.get("/engines"))[1]["total"] == 2
    status, body = await admin.call("DELETE", f"{path}?force=true")
    assert (status, body["status"]) == (200, "deleted")
    assert await served.plane.backend.list() == []
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        assert await connection.fetchval("SELECT count(*) FROM engines") == 0
        assert await connection.fetchval("SELECT count(*) FROM tombstones") == 2


async def test_no_engine_is_made_while_a_product_is_deleted(served: Served, api: Api, admin: Api) -> None:
    path = f"/products/{api.headers['product_id']}"
    await api.provision("ann")
    answers = await asyncio.gather(
        admin.call("DELETE", f"{path}?force=true"),
        *(api.post("/engines/provision", {"user_id": f"user-{number}"}) for number in range(6)),
    )
    assert answers[0][0] == 200
    for status, body in answers[1:]:
        assert status == 200 or body["error"]["code"] in (
            "INVALID_PLATFORM_KEY",
            "PRODUCT_NOT_FOUND",
            "ENGINE_NOT_FOUND",
            "ENGINE_BUSY",
        ), body
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:

        async def nothing_is_left() -> bool:
            return not await connection.fetchval("SELECT count(*) FROM products")

        await until(nothing_is_left, 60)
        assert await connection.fetchval("SELECT count(*) FROM engines") == 0
    assert await served.plane.backend.list() == []


async def test_a_deletion_whose_process_died_is_finished_by_another(deployment: Deployment) -> None:
    replica = await deployment.serve()
    product = await deployment.product(replica.url)
    await product.provision("ann")
    replica.kill()
    async with database(deployment.variables["ORCH_DATABASE_URL"]) as connection:
        # What the call had recorded before its process died.
        await connection.execute("UPDATE products SET deleting_at = now()")
        await deployment.serve()

        async def gone() -> bool:
            return not await connection.fetchval("SELECT count(*) FROM products")

        await until(gone, 60)
        assert await connection.fetchval("SELECT count(*) FROM tombstones") == 1
