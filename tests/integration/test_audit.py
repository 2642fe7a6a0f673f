"""The audit log: written with the change, in one chain per product without a gap, and tamper-evident."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from orchestrator import audit
from tests.integration.steps import PASSTHROUGH, boots_fail, database, error, until

if TYPE_CHECKING:
    from tests.integration.conftest import Api, Served


@pytest.fixture
def variables(variables: dict[str, str]) -> dict[str, str]:
    return variables | PASSTHROUGH


async def sequenced(served: Served) -> None:
    async def all_placed() -> bool:
        return not (await served.plane.registry.audit.unsequenced())[0]

    await until(all_placed)


async def problems(served: Served) -> list[str]:
    return [report.problem for report in await audit.verify(served.plane.registry.audit) if report.problem is not None]


async def test_each_change_has_its_row(api: Api, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    await api.provision("ann")
    for call in ("stop", "start", "sleep", "start", "rotate-key"):
        await api.post(f"/engines/ann/{call}")
    await api.post("/engines/ann/sleep")
    await api.admit("ann")
    product_id = str(api.headers["product_id"])
    await served.deployment.admin(served.url, product_id).call("DELETE", "/engines/ann")
    async with boots_fail(monkeypatch):
        assert error(await api.post("/engines/provision", {"user_id": "bob"}))[0] == 502
    async with database(served.deployment) as connection:
        rows = await connection.fetch("SELECT * FROM audit_log WHERE engine_id IS NOT NULL ORDER BY id")
    assert [(row["action"], row["actor"], row["status"]) for row in rows] == [
        ("provision", "acme", "running"),
        ("stop", "acme", "stopped"),
        ("start", "acme", "running"),
        ("sleep", "acme", "sleeping"),
        ("start", "acme", "running"),
        ("rotate_key", "acme", "running"),
        ("sleep", "acme", "sleeping"),
        ("wake", "acme", "running"),
        ("destroy", "admin", "destroyed"),
        ("provision_failed", "acme", "failed"),
    ]
    assert all(row["duration_ms"] >= 0 for row in rows)
    assert {str(row["product_id"]) for row in rows} == {product_id}


async def test_the_row_comes_and_goes_with_the_change(api: Api, served: Served) -> None:
    """Where the audit row cannot be written, the change is not made either."""
    await api.provision("ann")
    async with database(served.deployment) as connection:
        await connection.execute("ALTER TABLE audit_log ADD CONSTRAINT no_stop CHECK (action <> 'stop') NOT VALID")
        await api.post("/engines/ann/stop")
        assert await connection.fetchval("SELECT count(*) FROM audit_log WHERE action = 'stop'") == 0
        assert await connection.fetchval("SELECT status FROM engines WHERE operation IS NULL") != "stopped"


async def test_no_gap_with_concurrent_writers_and_sequencers(served: Served) -> None:
    registry = served.plane.registry.audit
    writing = True

    async def write(writer: int) -> None:
        for number in range(40):
            await registry.insert(action="health_check", metadata={"writer": writer, "number": number})

    async def place() -> None:
        while writing:
            await audit.sequence(registry)

    sequencers = [asyncio.create_task(place()) for _ in range(2)]  # besides the loop of the process
    await asyncio.gather(*(write(writer) for writer in range(5)))
    writing = False
    await asyncio.gather(*sequencers)
    await sequenced(served)
    async with database(served.deployment) as connection:
        rows = await connection.fetch("SELECT seq FROM audit_log WHERE chain = 'system' ORDER BY seq")
    assert [row["seq"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= 200
    assert await problems(served) == []


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE audit_log SET actor = 'nobody' WHERE seq = 3",
        "UPDATE audit_log SET metadata = '{}' WHERE seq = 5",
        "DELETE FROM audit_log WHERE seq = 1",
        "DELETE FROM audit_log WHERE seq <= 3",
        "DELETE FROM audit_log WHERE seq = 4",
        "DELETE FROM audit_log WHERE seq = 6",
        "DELETE FROM audit_log",
        "DELETE FROM audit_heads",
        "INSERT INTO audit_log (action, seq, prev_hash, hash) VALUES ('stop', 7, repeat('a', 64), repeat('b', 64))",
        "INSERT INTO audit_log (product_id, action, seq, prev_hash, hash) "
        "VALUES (gen_random_uuid(), 'stop', 1, '', repeat('b', 64))",
        "UPDATE audit_log SET seq = CASE seq WHEN 5 THEN 16 WHEN 6 THEN 15 END WHERE seq IN (5, 6);"
        "UPDATE audit_log SET seq = seq - 10 WHERE seq > 10",
    ],
)
async def test_tampering_is_found(served: Served, tampering: str) -> None:
    registry = served.plane.registry.audit
    for number in range(6):
        await registry.insert(action="health_check", metadata={"number": number})
    await sequenced(served)
    assert await problems(served) == []
    async with database(served.deployment) as connection:
        assert await connection.fetchval("SELECT seq FROM audit_heads WHERE chain = 'system'") == 6
        await connection.execute(tampering)
    assert len(await problems(served)) == 1
