"""Idle means no real work; then an engine sleeps, and after long sleep gives its memory back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from uuid import UUID

import httpx
import pytest

from orchestrator.backends.base import ObjectState
from orchestrator.lifecycle.transitions import Operation
from tests.integration.steps import database, disagreements, objects_of, pid_of, reaches, settled, until

if TYPE_CHECKING:
    from tests.integration.conftest import Api, Deployment, Served

THRESHOLD_S = 1.0


@pytest.fixture
def variables(variables: dict[str, str]) -> dict[str, str]:
    return variables | {
        "ORCH_HEALTH_CHECK_INTERVAL_S": "0.3",
        "ORCH_IDLE_SLEEP_THRESHOLD_S": str(THRESHOLD_S),
    }


async def actions(deployment: Deployment) -> list[str]:
    async with database(deployment) as connection:
        return [row["action"] for row in await connection.fetch("SELECT action FROM audit_log ORDER BY id")]


async def rounds(served: Served, count: int = 3) -> None:
    """So many further rounds of the idle loop, and what they began is over."""
    loop = next(loop for loop in served.plane.loops.loops if loop.name == "idle")
    for _ in range(count):
        before = loop.last_success
        loop.run_now()

        async def run(before: float = before) -> bool:
            return loop.last_success > before

        await until(run)
        await settled(served.deployment)


async def test_a_silent_engine_sleeps_and_wakes_by_an_admit(api: Api, served: Served) -> None:
    engine = await api.provision("ann")
    pid = await pid_of(engine)
    await reaches(api, "ann", "sleeping")
    await settled(served.deployment)
    assert await disagreements(served.deployment) == []
    assert (await api.post("/engines/ann/admit", {}))[1]["reason"] == "engine_sleeping"
    admitted = (await api.admit("ann"))["engine"]
    assert [admitted[name] for name in ("engine_id", "url", "api_key")] == [
        engine[name] for name in ("engine_id", "url", "api_key")
    ]
    assert await pid_of(admitted) == pid, "woken, not started again"
    assert {"sleep", "wake"} <= set(await actions(served.deployment))


async def test_a_turn_in_flight_is_never_put_to_sleep(api: Api, served: Served) -> None:
    engine = await api.provision("ann")
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        turn = asyncio.create_task(
            client.post(f"{engine['url']}/work", json={"seconds": 5}, headers={"X-Engine-Key": engine["api_key"]})
        )
        idle = next(loop for loop in served.plane.loops.loops if loop.name == "idle")
        while not turn.done():
            idle.run_now()
            slept = "sleep" in await actions(served.deployment)
            assert not slept or turn.done()
            await asyncio.wait({turn}, timeout=0.1)
        assert (await turn).status_code == 200
    await reaches(api, "ann", "sleeping")


async def test_admits_and_keep_alive_keep_it_awake(api: Api, served: Served) -> None:
    await api.provision("ann")
    await api.post("/engines/ann/keep-alive", {"seconds": 3600})
    async with database(served.deployment) as connection:
        await connection.execute(
            "UPDATE engines SET running_since = now() - interval '1 hour', last_active_at = now() - interval '1 hour'"
        )
    await rounds(served)
    assert await api.status_of("ann") == "running"
    await api.post("/engines/ann/keep-alive", {"seconds": 0})
    await reaches(api, "ann", "sleeping")


async def test_a_read_is_no_activity(api: Api) -> None:
    await api.provision("ann")
    async with asyncio.timeout(30):
        while await api.status_of("ann") != "sleeping":
            await api.get("/engines/ann")
            await asyncio.sleep(0.05)


async def test_an_engine_without_activity_sleeps_by_admits_alone(
    api: Api, served: Served, variables: dict[str, str]
) -> None:
    engine = await api.provision("ann")
    served.deployment.mimic_flags(engine["engine_id"], no_activity=True)
    await reaches(api, "ann", "sleeping")


async def test_impossible_values_and_failed_probes_count_as_busy(api: Api, served: Served) -> None:
    for name, flags in (("impossible", {"busy": -1}), ("failing", {"fail_health": True})):
        engine = await api.provision(name)
        served.deployment.mimic_flags(engine["engine_id"], **flags)
    async with database(served.deployment) as connection:
        await connection.execute(
            "UPDATE engines SET running_since = now() - interval '1 hour', consecutive_failures = 0"
        )
    before = await actions(served.deployment)
    await rounds(served)
    assert "sleep" not in (await actions(served.deployment))[len(before) :]
    assert await api.status_of("impossible") == "running"


async def test_the_engine_itself_says_how_long_it_rests(api: Api, served: Served) -> None:
    """As after a jump of the clock: the registry believes in an hour without work, the engine knows better."""
    await api.provision("ann")
    async with database(served.deployment) as connection:
        await connection.execute("UPDATE products SET policy = '{\"idle_sleep_threshold_s\": 1800}'")
        await connection.execute(
            "UPDATE engines SET running_since = now() - interval '1 hour', last_active_at = now() - interval '1 hour'"
        )
        row = await connection.fetchrow("SELECT id, lease_generation FROM engines")
    assert row is not None
    await served.plane.healing.sleep_idle(row["id"], row["lease_generation"], 1800)
    await settled(served.deployment)
    assert await api.status_of("ann") == "running"
    assert "sleep" not in await actions(served.deployment)


async def test_a_product_has_its_own_threshold(served: Served) -> None:
    never = await served.deployment.product(served.url, "never", {"idle_sleep_threshold_s": 0})
    soon = await served.deployment.product(served.url, "soon", {"idle_sleep_threshold_s": 1})
    await asyncio.gather(never.provision("ann"), soon.provision("ann"))
    await reaches(soon, "ann", "sleeping")
    await rounds(served)
    assert await never.status_of("ann") == "running"


async def test_long_asleep_it_gives_its_memory_back_and_wakes_by_a_start(served: Served) -> None:
    api = await served.deployment.product(served.url, "acme", {"idle_stop_threshold_s": 1})
    engine = await api.provision("ann")
    pid = await pid_of(engine)

    async def unloaded() -> bool:
        found = await objects_of(served.deployment)
        return all(one.state is ObjectState.EXITED for one in found.values())

    await until(unloaded, 40)
    await settled(served.deployment)
    assert await api.status_of("ann") == "sleeping"
    await rounds(served)
    assert (await actions(served.deployment)).count("sleep") == 2, "asleep, then unloaded, once each"
    admitted = (await api.admit("ann"))["engine"]
    assert admitted["url"] == engine["url"]
    assert await pid_of(engine) != pid


async def test_nobody_is_asked_twice_at_once(api: Api, served: Served) -> None:
    """A claim is for one row as it was seen: a second replica that decides on the same row is too late."""
    await api.provision("ann")
    async with database(served.deployment) as connection:
        row = await connection.fetchrow("SELECT id, lease_generation FROM engines")
    assert row is not None
    healing = served.plane.healing
    begun = await asyncio.gather(
        *(healing.sleep_idle(row["id"], row["lease_generation"], THRESHOLD_S) for _ in range(5))
    )
    assert sum(begun) <= 1
    assert healing.under_way(Operation.SLEEP) <= 1


async def test_frozen_by_a_late_hand_it_is_thawed(api: Api, served: Served) -> None:
    engine = await api.provision("ann")
    await api.post("/engines/ann/keep-alive", {"seconds": 3600})
    await served.plane.backend.freeze(UUID(engine["engine_id"]))
    await until(lambda: answers(engine), 40)
    await settled(served.deployment)
    assert await api.status_of("ann") == "running"
    assert "reconcile_adopt" in await actions(served.deployment)


async def answers(engine: dict[str, str]) -> bool:
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=0.5) as client:
            return (await client.get(f"{engine['url']}/health")).status_code == 200
    except httpx.TransportError:
        return False
