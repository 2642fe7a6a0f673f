"""Retention: old rows go from the beginning of a chain, which stays verifiable; totals stay as they were."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from uuid import UUID

from orchestrator import audit
from tests.integration.checks import database
from tests.integration.steps import until

if TYPE_CHECKING:
    from tests.integration.conftest import Api, Served

DEADLINE_S = 60


async def fill(served: Served, product_id: str, *actions: str) -> None:
    for action in actions:
        await served.plane.registry.audit.insert(action=action, product_id=UUID(product_id))

    async def all_placed() -> bool:
        return not (await served.plane.registry.audit.unsequenced())[0]

    await until(all_placed, DEADLINE_S)


async def age(served: Served, chain: str, last_seq: int, days: int) -> None:
    """As if the rows up to `last_seq` had been written so long ago, hashes included."""
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        await connection.execute(
            "UPDATE audit_log SET timestamp = timestamp - make_interval(days => $3) WHERE chain = $1 AND seq <= $2",
            chain,
            last_seq,
            days,
        )
        await connection.execute(
            "WITH head AS (DELETE FROM audit_heads WHERE chain = $1) "
            "UPDATE audit_log SET seq = NULL, prev_hash = NULL, hash = NULL, position = NULL WHERE chain = $1",
            chain,
        )
    await fill(served, chain)


async def retired(served: Served, days: int) -> int:
    """All that there is to remove: a sequencer may hold a chain just now."""
    removed = 0
    for _ in range(20):
        removed += await audit.retire(served.plane.registry.audit, days)
        await asyncio.sleep(0.05)
    return removed


async def problems(served: Served) -> list[str]:
    return [report.problem for report in await audit.verify(served.plane.registry.audit) if report.problem is not None]


async def test_old_rows_go_and_the_chain_and_the_totals_stay(served: Served, api: Api) -> None:
    product_id = str(api.headers["product_id"])
    await fill(served, product_id, *["provision", "wake", "destroy"] * 4)
    await age(served, product_id, 9, 31)  # the registration, and of each action at least two
    before = (await api.get("/metrics"))[1]
    assert (before["total_provisions"], before["total_destroys"]) == (4, 4)
    assert await retired(served, 40) == 0
    assert await retired(served, 30) == 9
    assert await retired(served, 30) == 0
    entries = (await api.get("/audit"))[1]["entries"]
    assert [entry["seq"] for entry in entries] == [10, 11, 12, 13]
    assert await problems(served) == []
    after = (await api.get("/metrics"))[1]
    assert (after["total_provisions"], after["total_destroys"]) == (4, 4)
    await fill(served, product_id, "stop")
    assert await problems(served) == []
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        await connection.execute("DELETE FROM audit_log WHERE chain = $1 AND seq = 10", product_id)
    assert await problems(served) == ["row 10 is missing"]


async def test_everything_may_be_old(served: Served, api: Api) -> None:
    product_id = str(api.headers["product_id"])
    await fill(served, product_id, "provision", "destroy")
    await age(served, product_id, 3, 31)
    assert await retired(served, 30) == 3
    assert await problems(served) == []
    await fill(served, product_id, "provision")
    assert [entry["seq"] for entry in (await api.get("/audit"))[1]["entries"]] == [4]
    assert (await api.get("/metrics"))[1]["total_provisions"] == 2
    assert await problems(served) == []


async def test_what_a_webhook_has_still_to_deliver_stays(served: Served, api: Api) -> None:
    product_id = str(api.headers["product_id"])
    await fill(served, product_id, "provision", "destroy")
    await age(served, product_id, 3, 31)
    async with database(served.deployment.variables["ORCH_DATABASE_URL"]) as connection:
        await connection.execute(
            "INSERT INTO webhooks (product_id, url, events, secret_enc, master_key_id, seq, next_attempt_at) "
            "VALUES ($1, 'http://192.0.32.8/', '{}', '', $2, 1, now() + interval '10 minutes')",
            UUID(product_id),
            served.plane.keyring.current_id,
        )
        assert await retired(served, 30) == 1
        await connection.execute("UPDATE webhooks SET seq = 3")
        assert await retired(served, 30) == 2
    assert await problems(served) == []


async def test_verify_is_right_while_rows_come_and_go(served: Served, api: Api) -> None:
    product_id = str(api.headers["product_id"])
    await fill(served, product_id, *["wake"] * 50)
    await age(served, product_id, 40, 31)

    async def work() -> None:
        for _ in range(40):
            await served.plane.registry.audit.insert(action="stop", product_id=UUID(product_id))
            await audit.sequence(served.plane.registry.audit)
            await served.plane.registry.audit.retire(product_id, 30)

    working = asyncio.create_task(work())
    while not working.done():
        assert await problems(served) == []
    await working
    assert await problems(served) == []
