"""Going to sleep against everything that may come in between: work, wakes at any moment, many callers at once."""

from __future__ import annotations

import asyncio
import os
import random
from typing import TYPE_CHECKING, Any
from uuid import UUID

import httpx
import pytest

from orchestrator.backends.base import ObjectState
from orchestrator.lifecycle import operations
from tests.integration.steps import PASSTHROUGH, database, disagreements, objects_of, pid_of, reaches, settled, until

if TYPE_CHECKING:
    from tests.integration.conftest import Api, Deployment, Served

TURN_S = float(os.environ.get("ORCH_TEST_TURN_S", "9"))
THRESHOLD_S = float(os.environ.get("ORCH_TEST_IDLE_S", "2"))
SEED = int(os.environ.get("ORCH_TEST_SEED", "20241"))
POINTS = 50


@pytest.fixture
def variables(variables: dict[str, str]) -> dict[str, str]:
    return variables | PASSTHROUGH | {"ORCH_IDLE_SLEEP_THRESHOLD_S": "0"}


async def audited(deployment: Deployment, action: str) -> int:
    async with database(deployment) as connection:
        return int(await connection.fetchval("SELECT count(*) FROM audit_log WHERE action = $1", action))


@pytest.mark.timeout(300)
async def test_500_admits_of_a_sleeping_engine_at_two_replicas_wake_it_once(deployment: Deployment) -> None:
    one, other = await asyncio.gather(deployment.serve(), deployment.serve())
    at_one = await deployment.product(one.url)
    engine = await at_one.provision("ann")
    pid = await pid_of(engine)
    assert (await at_one.post("/engines/ann/sleep"))[0] == 200
    limits = httpx.Limits(max_connections=100)
    answers: list[httpx.Response] = []
    async with (
        httpx.AsyncClient(base_url=one.url, headers=at_one.headers, limits=limits, timeout=90, trust_env=False) as a,
        httpx.AsyncClient(base_url=other.url, headers=at_one.headers, limits=limits, timeout=90, trust_env=False) as b,
    ):
        calls = [
            client.post("/engines/ann/admit", json={"auto_wake": True, "auto_provision": False})
            for _ in range(250)
            for client in (a, b)
        ]
        answers = await asyncio.gather(*calls)
    assert len(answers) == 500
    assert {(answer.status_code, answer.json().get("admitted")) for answer in answers} == {(200, True)}
    assert {answer.json()["engine"]["api_key"] for answer in answers} == {engine["api_key"]}
    assert await audited(deployment, "wake") == 1
    assert await pid_of(engine) == pid
    assert len(await objects_of(deployment)) == 1


@pytest.mark.timeout(300)
async def test_a_wake_at_any_point_of_going_to_sleep_ends_running(
    api: Api, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the idle loop's own way: with the flush that it waits for, shortened so that every point is hit."""
    monkeypatch.setattr(operations, "ACTIVITY_FLUSH_S", 0.02)
    engine = await api.provision("ann")
    pid = await pid_of(engine)
    dice = random.Random(SEED)
    for point in range(POINTS):
        async with served.plane.database.transaction() as connection:
            await connection.execute("UPDATE engines SET running_since = now() - interval '1 hour'")
            await connection.execute("UPDATE activity SET last_admit_at = now() - interval '1 hour'")
            row = await connection.fetchrow("SELECT id, lease_generation FROM engines")
        assert row is not None
        assert await served.plane.healing.sleep_idle(row["id"], row["lease_generation"], 0.001)
        await asyncio.sleep(dice.random() * 0.06)  # a moment of the operation, not a wait for its end
        answer = await api.admit("ann", auto_provision=False)
        assert answer["admitted"], (point, answer)
        await settled(served.deployment)
        assert await api.status_of("ann") == "running", point
        assert await disagreements(served.deployment) == [], point
        assert await pid_of(engine) == pid  # it answers, and is the same one
    # Each one that did fall asleep was woken once; all the others never slept.
    assert await audited(served.deployment, "wake") == await audited(served.deployment, "sleep") <= POINTS


async def test_a_thaw_that_nobody_waited_for_lands_before_the_next_freeze(api: Api, served: Served) -> None:
    """A wake is answered when the engine answers; what is left of its backend call is not in the way of a sleep."""
    engine = await api.provision("ann")
    await api.post("/engines/ann/sleep")
    backend: Any = served.plane.backend
    thaw, land = backend.thaw, asyncio.Event()

    async def slow(engine_id: Any) -> None:
        await thaw(engine_id)
        await land.wait()
        await thaw(engine_id)

    backend.thaw = slow
    assert (await api.admit("ann", auto_provision=False))["admitted"]
    sleep = asyncio.create_task(api.post("/engines/ann/sleep"))

    async def begun() -> bool:
        async with database(served.deployment) as connection:
            return await connection.fetchval("SELECT operation = 'sleep' OR status = 'sleeping' FROM engines") is True

    await until(begun)
    land.set()
    assert (await sleep)[0] == 200
    assert not served.plane.means.unfinished
    found = (await objects_of(served.deployment))[UUID(engine["engine_id"])]
    assert found.state is ObjectState.FROZEN


async def test_a_wake_between_the_freeze_and_its_record_wins(api: Api, served: Served) -> None:
    engine = await api.provision("ann")
    backend: Any = served.plane.backend
    freeze = backend.freeze
    frozen, go_on = asyncio.Event(), asyncio.Event()

    async def held(engine_id: Any) -> None:
        await freeze(engine_id)
        frozen.set()
        await go_on.wait()

    backend.freeze = held
    sleep = asyncio.create_task(api.post("/engines/ann/sleep"))
    await frozen.wait()
    wake = asyncio.create_task(api.admit("ann"))

    async def wished() -> bool:
        async with database(served.deployment) as connection:
            return bool(await connection.fetchval("SELECT wish = 'wake' FROM engines"))

    await until(wished)
    go_on.set()
    assert (await wake)["admitted"]
    await sleep
    await settled(served.deployment)
    assert await api.status_of("ann") == "running"
    assert await pid_of(engine)
    assert await audited(served.deployment, "sleep") == 0


@pytest.mark.parametrize("found", ["frozen", "running"])
async def test_a_wake_during_a_repair_of_a_sleeping_engine_wins(api: Api, served: Served, found: str) -> None:
    """Whatever the repair finds and does at that moment, the wish is never left to nobody."""
    engine = await api.provision("ann")
    await api.post("/engines/ann/sleep")
    backend: Any = served.plane.backend
    if found == "running":
        await backend.thaw((await served.plane.registry.engines.here(served.plane.means.location_id))[0]["id"])
    method = "find" if found == "frozen" else "freeze"
    real = getattr(backend, method)
    at_it, go_on = asyncio.Event(), asyncio.Event()

    async def held(engine_id: Any) -> Any:
        result = await real(engine_id)
        at_it.set()
        await go_on.wait()
        return result

    setattr(backend, method, held)
    row = (await served.plane.registry.engines.here(served.plane.means.location_id))[0]
    assert await served.plane.healing.repair(row["id"], row["lease_generation"], "test")
    await at_it.wait()
    wake = asyncio.create_task(api.admit("ann"))

    async def wished() -> bool:
        async with database(served.deployment) as connection:
            return bool(await connection.fetchval("SELECT wish = 'wake' FROM engines"))

    await until(wished)
    setattr(backend, method, real)
    go_on.set()
    assert (await wake)["admitted"]
    await settled(served.deployment)
    assert await api.status_of("ann") == "running"
    assert await pid_of(engine)
    assert await disagreements(served.deployment) == []


@pytest.mark.timeout(TURN_S + 300)
async def test_a_long_turn_survives_the_idle_threshold_and_a_silent_engine_sleeps(
    deployment: Deployment,
) -> None:
    """`ORCH_TEST_TURN_S`, `ORCH_TEST_IDLE_S`: 60 and 5 in the long version."""
    replica = await deployment.serve(
        ORCH_IDLE_SLEEP_THRESHOLD_S=f"{THRESHOLD_S:g}", ORCH_HEALTH_CHECK_INTERVAL_S=f"{THRESHOLD_S / 2:g}"
    )
    api = await deployment.product(replica.url)
    worker, _ = await api.provision("worker"), await api.provision("silent")

    async def turn() -> int:
        async with httpx.AsyncClient(trust_env=False, timeout=TURN_S + 60) as client:
            answer = await client.post(
                f"{worker['url']}/work", headers={"X-Engine-Key": worker["api_key"]}, json={"seconds": TURN_S}
            )
            return answer.status_code

    working = asyncio.create_task(turn())
    await reaches(api, "silent", "sleeping", 120)
    assert await working == 200
    async with database(deployment) as connection:
        ended = await connection.fetchval("SELECT now()")
        slept_before = await connection.fetchval(
            "SELECT count(*) FROM audit_log WHERE user_id = 'worker' AND action = 'sleep' AND timestamp < $1", ended
        )
    assert slept_before == 0
    await reaches(api, "worker", "sleeping", 120)  # silent, too, since
    assert await disagreements(deployment) == []


async def test_what_was_admitted_just_before_is_seen(api: Api, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """An admit of another replica that is not written yet when the engine is claimed: the flush tells of it."""
    engine = await api.provision("ann")
    served.deployment.mimic_flags(engine["engine_id"], no_activity=True)

    async def long_idle(*, admitted: bool) -> None:
        async with served.plane.database.transaction() as connection:
            await connection.execute("UPDATE engines SET running_since = now() - interval '1 hour'")
            await connection.execute("UPDATE activity SET last_admit_at = now() - interval '1 hour'")
            row = await connection.fetchrow("SELECT id, lease_generation FROM engines")
        assert row is not None

        async def flush(*_: Any) -> bool:
            if admitted:
                await served.plane.registry.admissions.record_activity({row["id"]: 0.5})
            return False

        with monkeypatch.context() as patch:
            patch.setattr(operations, "happens_within", flush)
            assert await served.plane.healing.sleep_idle(row["id"], row["lease_generation"], 60)
            await settled(served.deployment)

    await long_idle(admitted=True)
    assert await api.status_of("ann") == "running"
    await long_idle(admitted=False)
    assert await api.status_of("ann") == "sleeping"
