"""Processes killed in the middle of operations: whoever is left finishes, and registry and backend agree."""

from __future__ import annotations

import asyncio
import os
import random
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest

from tests.integration.steps import (
    PASSTHROUGH,
    accepts,
    appears,
    ask,
    data_of,
    database,
    disagreements,
    heal,
    pid_of,
    reaches,
    settled,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from tests.integration.conftest import Api, Deployment, Replica

KILLS = int(os.environ.get("ORCH_TEST_KILLS", "16"))
SEED = int(os.environ.get("ORCH_TEST_SEED", "20241"))
LEASE_S = 2.0


@pytest.fixture
def variables(variables: dict[str, str]) -> dict[str, str]:
    return variables | PASSTHROUGH | {"ORCH_LEASE_S": f"{LEASE_S:g}", "ORCH_BOOT_TIMEOUT_S": "10"}


def begin(call: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """A call whose answer may never come."""
    task = asyncio.create_task(call)
    task.add_done_callback(lambda done: None if done.cancelled() else done.exception())
    return task


async def operation_of(deployment: Deployment, user_id: str) -> str | None:
    async with database(deployment) as connection:
        found: str | None = await connection.fetchval("SELECT operation FROM engines WHERE user_id = $1", user_id)
        return found


async def two_replicas(deployment: Deployment, **changes: str) -> tuple[Replica, Api, Api]:
    """The first one is to be killed."""
    doomed, other = await asyncio.gather(deployment.serve(**changes), deployment.serve(**changes))
    at_doomed = await deployment.product(doomed.url)
    return doomed, at_doomed, deployment.api(other.url, at_doomed.headers)


async def kill_during(deployment: Deployment, doomed: Replica, user_id: str, operation: str) -> None:
    async def under_way() -> bool:
        return await operation_of(deployment, user_id) == operation

    await until(under_way)
    doomed.kill()


async def test_provision_is_finished_by_another(deployment: Deployment) -> None:
    doomed, at_doomed, api = await two_replicas(deployment, MIMIC_FAIL_HEALTH="1")
    begin(at_doomed.post("/engines/provision", {"user_id": "ann"}))
    engine_id = await appears(api, "ann")
    record = data_of(deployment, engine_id).with_suffix(".process")

    async def spawned() -> bool:
        return record.exists()

    await until(spawned)
    joined = begin(api.post("/engines/ann/admit", {"auto_provision": True}))
    doomed.kill()
    pid = record.read_text().split()[1]
    await heal(deployment, engine_id)
    status, body = await joined
    assert (status, body["admitted"]) == (200, True)
    assert str(await pid_of(body["engine"])) == pid  # adopted, not made anew
    assert await disagreements(deployment) == []


@pytest.mark.parametrize("operation", ["start", "wake"])
async def test_a_boot_of_an_engine_with_data(deployment: Deployment, operation: str) -> None:
    doomed, at_doomed, api = await two_replicas(deployment)
    engine = await at_doomed.provision("ann")
    await at_doomed.post("/engines/ann/stop" if operation == "start" else "/engines/ann/sleep")
    if operation == "start":
        deployment.mimic_flags(engine["engine_id"], unready_for=2.0)
        begin(at_doomed.post("/engines/ann/start"))
    else:
        # Frozen engines wake in a millisecond: one that is not healthy keeps the wake under way.
        deployment.mimic_flags(engine["engine_id"], fail_health=True)
        begin(at_doomed.post("/engines/ann/admit", {"auto_wake": True}))
    await kill_during(deployment, doomed, "ann", operation)
    if operation == "wake":
        await heal(deployment, engine["engine_id"])
    await reaches(api, "ann", "running")
    assert (await api.get("/engines/ann"))[1]["url"] == engine["url"]
    assert await accepts(engine, engine["api_key"])
    assert await disagreements(deployment) == []


async def test_stop(deployment: Deployment) -> None:
    doomed, at_doomed, api = await two_replicas(deployment)
    engine = await at_doomed.provision("ann")
    deployment.mimic_flags(engine["engine_id"], drain=1.5)
    begin(at_doomed.post("/engines/ann/stop"))
    await kill_during(deployment, doomed, "ann", "stop")
    await settled(deployment)
    assert await api.status_of("ann") == "stopped"
    assert await disagreements(deployment) == []


async def test_sleep(deployment: Deployment) -> None:
    doomed, at_doomed, api = await two_replicas(deployment)
    engine = await at_doomed.provision("ann")
    deployment.mimic_flags(engine["engine_id"], health_delay=1.0)
    begin(at_doomed.post("/engines/ann/sleep"))
    await kill_during(deployment, doomed, "ann", "sleep")
    await settled(deployment)
    assert await api.status_of("ann") == "sleeping"
    assert await disagreements(deployment) == []
    assert (await api.admit("ann"))["admitted"]


async def test_destroy_is_never_undone(deployment: Deployment) -> None:
    doomed, at_doomed, api = await two_replicas(deployment)
    engine = await at_doomed.provision("ann")
    deployment.mimic_flags(engine["engine_id"], ignore_sigterm=True)
    begin(at_doomed.call("DELETE", "/engines/ann"))
    await kill_during(deployment, doomed, "ann", "destroy")
    await reaches(api, "ann", "destroyed")
    assert await disagreements(deployment) == []


async def test_a_wish_outlives_who_asked_and_who_was_asked(deployment: Deployment) -> None:
    doomed, at_doomed, api = await two_replicas(deployment, MIMIC_FAIL_HEALTH="1")
    begin(at_doomed.post("/engines/provision", {"user_id": "ann"}))
    await appears(api, "ann")
    doomed.process.send_signal(19)  # SIGSTOP: it holds the lease, and will not answer
    begin(at_doomed.call("DELETE", "/engines/ann"))
    asked = begin(api.call("DELETE", "/engines/ann"))
    await reaches(api, "ann", "destroying")
    doomed.kill()
    deployment.replicas[1].kill()
    await asyncio.wait([asked])
    third = await deployment.serve()
    after = deployment.api(third.url, api.headers)
    await settled(deployment)
    assert (await after.get("/engines/ann"))[0] == 404
    assert await disagreements(deployment) == []
    async with database(deployment) as connection:
        actor = await connection.fetchval("SELECT actor FROM audit_log WHERE action = 'destroy'")
    assert actor == "acme"


@pytest.mark.timeout(600 + KILLS * 20)  # many processes start and end: far longer on a busy machine
async def test_random_kills(deployment: Deployment) -> None:
    """Seeded: `ORCH_TEST_SEED`, `ORCH_TEST_KILLS`."""
    dice = random.Random(SEED)
    first, second = await asyncio.gather(deployment.serve(), deployment.serve())
    replicas = [first, second]
    api = await deployment.product(first.url)
    headers = api.headers
    users = [f"user-{number}" for number in range(6)]
    calls: set[asyncio.Task[Any]] = set()

    async def call(replica: Replica, user_id: str, what: str) -> None:
        path = f"/engines/{user_id}"
        async with httpx.AsyncClient(base_url=replica.url, headers=headers, timeout=60, trust_env=False) as client:
            with suppress(httpx.TransportError):
                if what == "destroy":
                    answer = await client.delete(path)
                elif what == "admit":
                    answer = await client.post(f"{path}/admit", json={"auto_provision": True, "auto_wake": True})
                    if answer.status_code == 200 and answer.json()["admitted"]:
                        await leave_a_note(answer.json()["engine"])
                else:
                    answer = await client.post(f"{path}/{what}")
                assert answer.status_code < 500 or answer.status_code == 503, (what, answer.text)

    weighted = ["admit"] * 5 + ["stop", "start", "sleep", "rotate-key", "destroy"]
    for _ in range(KILLS):
        for _ in range(dice.randint(3, 10)):
            task = asyncio.create_task(call(dice.choice(replicas), dice.choice(users), dice.choice(weighted)))
            calls.add(task)
            await asyncio.sleep(dice.random() * 0.05)  # moments of an operation, not a wait for its end
        victim = dice.randrange(2)
        replicas[victim].kill()
        replicas[victim] = await deployment.serve()
    await asyncio.gather(*calls)
    await settled(deployment, 90)
    await agrees(deployment)
    last = deployment.api(replicas[0].url, headers)
    for user_id in users:  # none is lost: each one can be used, has its data, and can be removed
        status, _ = await last.get(f"/engines/{user_id}")
        if status == 200:
            await last.post(f"/engines/{user_id}/start")
        engine = (await last.admit(user_id))["engine"]
        assert await accepts(engine, engine["api_key"])
        note = await ask(engine, "/read")
        assert note.status_code == 404 or note.text == engine["engine_id"]
        assert (await last.call("DELETE", f"/engines/{user_id}"))[0] == 200
    assert await disagreements(deployment) == []
    async with database(deployment) as connection:
        assert await connection.fetchval("SELECT count(*) FROM engines") == 0
    assert listening_engines(deployment) == set()


async def leave_a_note(engine: dict[str, Any]) -> None:
    """In its data: whose it is. Whatever answers there later has the same."""
    headers = {"X-Engine-Key": engine["api_key"]}
    async with httpx.AsyncClient(base_url=engine["url"], headers=headers, trust_env=False, timeout=1) as client:
        with suppress(httpx.TransportError):  # it may be stopped, frozen or gone by now
            found = await client.get("/read")
            # 401: its key was rotated, or the port has passed to another engine, which knows by the key.
            if found.status_code == 404:
                await client.post("/write", content=engine["engine_id"])
            else:
                assert found.status_code == 401 or found.text == engine["engine_id"]


async def agrees(deployment: Deployment) -> None:
    """Registry and backend agree; nothing is doubled, nothing is lost, and no port is held by nobody."""

    async def no_difference() -> bool:
        return await disagreements(deployment) == []

    with suppress(TimeoutError):  # what a call that died late has changed is put right by the next round
        await until(no_difference, 90)
    assert await disagreements(deployment) == []
    async with database(deployment) as connection:
        lost = await connection.fetch(
            "SELECT DISTINCT engine_id FROM audit_log WHERE engine_id IS NOT NULL "
            "EXCEPT SELECT id FROM engines EXCEPT SELECT engine_id FROM tombstones"
        )
        assert lost == []
        doubled = await connection.fetch(
            "SELECT engine_id, action FROM audit_log WHERE action IN ('provision', 'destroy') "
            "GROUP BY 1, 2 HAVING count(*) > 1"
        )
        assert doubled == []
        assert await connection.fetchval("SELECT count(*) FROM tombstones JOIN engines ON id = engine_id") == 0
        up = {
            row["port"]
            for row in await connection.fetch(
                "SELECT port FROM engines WHERE status = 'running' OR (status = 'sleeping' AND unloaded_at IS NULL)"
            )
        }
    assert listening_engines(deployment) == up


def listening_engines(deployment: Deployment) -> set[int]:
    """Ports of this deployment's range on which somebody listens."""
    low, high = int(deployment.variables["ORCH_PORT_MIN"]), int(deployment.variables["ORCH_PORT_MAX"])
    ports = {connection.laddr.port for connection in psutil.net_connections("tcp4") if connection.status == "LISTEN"}
    return {port for port in ports if low <= port <= high}
