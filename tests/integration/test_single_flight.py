"""Many callers, one operation: within a process, across processes, and when callers go away."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.integration.steps import (
    PASSTHROUGH,
    appears,
    data_of,
    database,
    disagreements,
    error,
    heal,
    objects_of,
    pid_of,
    reaches,
    settled,
)

if TYPE_CHECKING:
    from tests.integration.conftest import Api, Deployment, Served


@pytest.fixture
def variables(variables: dict[str, str]) -> dict[str, str]:
    return variables | PASSTHROUGH | {"ORCH_QUEUE_TIMEOUT_S": "2"}


async def actions(deployment: Deployment, action: str) -> int:
    async with database(deployment) as connection:
        return int(await connection.fetchval("SELECT count(*) FROM audit_log WHERE action = $1", action))


async def test_concurrent_provisions_give_one_200(api: Api, served: Served) -> None:
    answers = await asyncio.gather(*(api.post("/engines/provision", {"user_id": "ann"}) for _ in range(20)))
    assert sorted(status for status, _ in answers) == [200] + [409] * 19
    assert {error(answer) for answer in answers if answer[0] != 200} == {(409, "ENGINE_ALREADY_EXISTS")}
    assert await actions(served.deployment, "provision") == 1


async def test_admits_of_an_absent_user_at_two_replicas(deployment: Deployment) -> None:
    one, other = await asyncio.gather(deployment.serve(), deployment.serve())
    at_one = await deployment.product(one.url)
    at_other = deployment.api(other.url, at_one.headers)
    admitted = await asyncio.gather(*(api.admit("ann") for api in (at_one, at_other) for _ in range(100)))
    assert len(admitted) == 200
    assert len({answer["engine"]["engine_id"] for answer in admitted}) == 1
    assert {(answer["admitted"], answer["engine"]["api_key"]) for answer in admitted} == {
        (True, admitted[0]["engine"]["api_key"])
    }
    assert len(await objects_of(deployment)) == 1
    assert await actions(deployment, "provision") == 1
    assert await disagreements(deployment) == []


async def test_admits_of_a_sleeping_engine_wake_it_once(api: Api, served: Served) -> None:
    engine = await api.provision("ann")
    pid = await pid_of(engine)
    await api.post("/engines/ann/sleep")
    admitted = await asyncio.gather(*(api.admit("ann") for _ in range(100)))
    assert all(answer["admitted"] for answer in admitted)
    assert await actions(served.deployment, "wake") == 1
    assert await pid_of(engine) == pid


async def test_a_caller_who_goes_away_does_not_cancel(
    api: Api, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIMIC_FAIL_HEALTH", "1")
    async with httpx.AsyncClient(base_url=served.url, headers=api.client.headers, trust_env=False) as client:
        calls = [
            asyncio.create_task(client.post("/engines/provision", json={"user_id": "ann"})),
            asyncio.create_task(client.post("/engines/bob/admit", json={"auto_provision": True})),
        ]
        ids = [await appears(api, user_id) for user_id in ("ann", "bob")]
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
    for engine_id in ids:
        await heal(served.deployment, engine_id)
    for user_id in ("ann", "bob"):
        await reaches(api, user_id, "running")


async def test_the_boot_deadline_is_504_for_all_who_joined(deployment: Deployment) -> None:
    deployment.variables |= {"ORCH_BOOT_TIMEOUT_S": "4"}
    one, other = await asyncio.gather(deployment.serve(MIMIC_FAIL_HEALTH="1"), deployment.serve())
    at_one = await deployment.product(one.url)
    at_other = deployment.api(other.url, at_one.headers)
    first = asyncio.create_task(at_one.post("/engines/provision", {"user_id": "ann"}))
    await appears(at_other, "ann")
    joined: list[asyncio.Task[tuple[int, Any]]] = [
        asyncio.create_task(call)
        for api in (at_one, at_other)
        for call in (api.post("/engines/ann/admit", {"auto_wake": True}), api.post("/engines/ann/start"))
    ]
    for call in (first, *joined):
        assert error(await call) == (504, "BOOT_TIMEOUT")
    assert await at_other.status_of("ann") == "failed"
    assert await disagreements(deployment) == []


async def test_a_full_queue_is_503_and_the_operation_stays(api: Api, served: Served) -> None:
    slots = served.plane.means.start_slots
    taken = 0
    while not slots.locked():
        await slots.acquire()
        taken += 1
    answer = await api.post("/engines/provision", {"user_id": "ann"})
    assert error(answer)[0] == 503
    assert api.last is not None
    assert int(api.last.headers["Retry-After"]) >= 1
    assert await api.status_of("ann") == "provisioning"
    for _ in range(taken):
        slots.release()
    await reaches(api, "ann", "running")


async def test_two_destroys_and_a_boot(api: Api, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("MIMIC_FAIL_HEALTH", "1")
        boot = asyncio.create_task(api.post("/engines/provision", {"user_id": "ann"}))
        engine_id = await appears(api, "ann")
        answers = await asyncio.gather(*(api.call("DELETE", "/engines/ann") for _ in range(10)))
    seen = {(answer[0], answer[1]["engine_id"]) if answer[0] == 200 else error(answer) for answer in answers}
    # A call that arrives when all is over finds nothing.
    assert {(200, engine_id)} <= seen <= {(200, engine_id), (404, "ENGINE_NOT_FOUND")}
    assert (await boot)[0] in (404, 409)
    assert not data_of(served.deployment, engine_id).exists()
    assert await actions(served.deployment, "destroy") == 1


async def test_stops_and_starts_at_once_leave_a_state_that_is_true(api: Api, served: Served) -> None:
    await api.provision("ann")
    for _ in range(5):
        await asyncio.gather(*(api.post(f"/engines/ann/{call}") for call in ("stop", "start") * 4))
        await settled(served.deployment)
        assert await disagreements(served.deployment) == []


async def test_wakes_win_against_going_to_sleep(api: Api, served: Served) -> None:
    await api.provision("ann")
    for turn in range(15):
        sleep = asyncio.create_task(api.post("/engines/ann/sleep"))
        for _ in range(turn * 2):
            await asyncio.sleep(0)
        assert (await api.admit("ann"))["admitted"]
        await sleep
        assert (await api.admit("ann"))["admitted"]
        await settled(served.deployment)
        assert await disagreements(served.deployment) == []
