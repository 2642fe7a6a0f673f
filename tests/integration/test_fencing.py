"""An owner that was paused beyond its lease: whatever it does late is refused, and the state is right."""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.integration.steps import (
    PASSTHROUGH,
    appears,
    database,
    disagreements,
    error,
    heal,
    pid_of,
    reaches,
    settled,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from tests.integration.conftest import Api, Deployment, Replica

# Also claimed by a process of this location, so that it is somebody's to lose; and its object has an address, so
# that the owner is past what it does in a millisecond.
UNDER_WAY = "SELECT operation = $1 AND host IS NOT NULL FROM engines"


@pytest.fixture
def variables(variables: dict[str, str]) -> dict[str, str]:
    return variables | PASSTHROUGH | {"ORCH_LEASE_S": "1.5"}


async def pair(deployment: Deployment) -> tuple[Replica, Api, Api]:
    paused, other = await asyncio.gather(deployment.serve(MIMIC_FAIL_HEALTH="1"), deployment.serve())
    at_paused = await deployment.product(paused.url)
    return paused, at_paused, deployment.api(other.url, at_paused.headers)


async def pause_during(deployment: Deployment, replica: Replica, operation: str) -> None:
    async with database(deployment) as connection:

        async def under_way() -> bool:
            return bool(await connection.fetchval(UNDER_WAY, operation))

        await until(under_way)
    replica.process.send_signal(signal.SIGSTOP)


async def resume(deployment: Deployment, replica: Replica, late: Awaitable[Any]) -> None:
    """It goes on, answers its caller, and is well."""
    replica.process.send_signal(signal.SIGCONT)
    with suppress(httpx.TransportError):
        await late
    async with httpx.AsyncClient(trust_env=False, timeout=20) as client:
        assert (await client.get(f"{replica.url}/health")).status_code == 200

    async def noticed() -> bool:
        return '"operation_left"' in replica.log.read_text()

    await until(noticed)
    await settled(deployment)


async def test_boot(deployment: Deployment) -> None:
    paused, at_paused, api = await pair(deployment)
    late = asyncio.create_task(at_paused.post("/engines/provision", {"user_id": "ann"}))
    engine_id = await appears(api, "ann")
    await pause_during(deployment, paused, "provision")
    await heal(deployment, engine_id)
    await reaches(api, "ann", "running")
    engine = (await api.admit("ann"))["engine"]
    pid = await pid_of(engine)
    await api.post("/engines/ann/sleep")
    await resume(deployment, paused, late)
    assert error(await late) == (409, "ENGINE_NOT_RUNNING")  # its caller hears what is, not what was meant to be
    assert await api.status_of("ann") == "sleeping"
    assert await disagreements(deployment) == []
    assert (await api.admit("ann"))["admitted"]
    assert await pid_of(engine) == pid
    async with database(deployment) as connection:
        assert await connection.fetchval("SELECT count(*) FROM audit_log WHERE action = 'provision'") == 1


async def test_stop_then_started_again(deployment: Deployment) -> None:
    paused, at_paused, api = await pair(deployment)
    engine = await api.provision("ann")
    deployment.mimic_flags(engine["engine_id"], drain=1.0)
    late = asyncio.create_task(at_paused.post("/engines/ann/stop"))
    await pause_during(deployment, paused, "stop")
    await settled(deployment)
    assert await api.status_of("ann") == "stopped"
    assert (await api.post("/engines/ann/start"))[0] == 200
    pid = await pid_of(engine)
    await resume(deployment, paused, late)
    assert await api.status_of("ann") == "running"
    assert await pid_of(engine) == pid
    assert await disagreements(deployment) == []


async def test_sleep_then_woken(deployment: Deployment) -> None:
    paused, at_paused, api = await pair(deployment)
    engine = await api.provision("ann")
    deployment.mimic_flags(engine["engine_id"], health_delay=0.7)
    late = asyncio.create_task(at_paused.post("/engines/ann/sleep"))
    await pause_during(deployment, paused, "sleep")
    assert (await api.admit("ann"))["admitted"]
    await resume(deployment, paused, late)
    assert await api.status_of("ann") == "running"
    assert await disagreements(deployment) == []


async def test_destroyed_meanwhile(deployment: Deployment) -> None:
    paused, at_paused, api = await pair(deployment)
    late = asyncio.create_task(at_paused.post("/engines/provision", {"user_id": "ann"}))
    await appears(api, "ann")
    await pause_during(deployment, paused, "provision")
    assert (await api.call("DELETE", "/engines/ann"))[0] == 200
    again = await api.provision("ann")
    await resume(deployment, paused, late)
    assert (await api.get("/engines/ann"))[1]["engine_id"] == again["engine_id"]
    assert await disagreements(deployment) == []
