"""`GET /engines/{user_id}/timeline`: what an operation is at, what it did, and where it failed; on any replica."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest

from orchestrator.api import create_app
from orchestrator.control_plane import ControlPlane
from orchestrator.server import Server, bind, server_config
from tests.integration.conftest import settings_of
from tests.integration.steps import DIES_BOOTING, PASSTHROUGH, appears, database, error, heal, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.integration.conftest import Api, Served

FIELDS = {"engine_id", "operation", "status", "started_at", "duration_ms", "phases", "stalled_on", "last_log"}


@pytest.fixture
def variables(variables: dict[str, str]) -> dict[str, str]:
    return variables | PASSTHROUGH


@pytest.fixture
async def other(served: Served, api: Api) -> AsyncIterator[Api]:
    """The same product at a second replica."""
    sock = bind("127.0.0.1", 0)
    plane = ControlPlane(settings_of(served.deployment.variables))
    await plane.open()
    server = Server(server_config(create_app(plane), plane.settings))
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        yield served.deployment.api(f"http://127.0.0.1:{sock.getsockname()[1]}", dict(api.headers))
    finally:
        server.should_exit = True
        await serving
        await plane.close()
        sock.close()


async def timeline(api: Api, user_id: str = "ann") -> dict[str, Any]:
    status, body = await api.get(f"/engines/{user_id}/timeline")
    assert status == 200, body
    assert set(body) == FIELDS
    return dict(body)


def names(told: dict[str, Any]) -> list[str]:
    return [phase["name"] for phase in told["phases"]]


async def test_the_phases_of_a_life(api: Api, other: Api) -> None:
    engine = await api.provision("ann")
    told = await timeline(api)
    assert (told["engine_id"], told["operation"], told["status"]) == (engine["engine_id"], "provision", "running")
    assert names(told) == ["look", "image", "queue", "create", "probe"]
    assert told["stalled_on"] is None
    assert all(phase["duration_ms"] is not None for phase in told["phases"])
    assert 0 <= sum(phase["duration_ms"] for phase in told["phases"]) <= told["duration_ms"] + len(told["phases"])
    times = [datetime.fromisoformat(phase["started_at"]) for phase in told["phases"]]
    assert times == sorted(times)
    assert datetime.fromisoformat(told["started_at"]) <= times[0]

    async def same_elsewhere() -> bool:
        """Within a second, and word for word."""
        return names(await timeline(other)) == names(told) and (await timeline(other)) == (await timeline(api))

    await until(same_elsewhere)
    for call, operation, phases in (
        ("sleep", "sleep", ["probe", "freeze"]),
        ("start", "start", ["thaw", "probe"]),
        ("stop", "stop", ["stop"]),
        ("start", "start", ["look", "queue", "start", "probe"]),
        ("rotate-key", "rotate_key", ["key"]),
    ):
        assert (await api.post(f"/engines/ann/{call}"))[0] == 200
        told = await timeline(api)
        assert (told["operation"], names(told)) == (operation, phases)
    assert error(await api.get("/engines/nobody/timeline")) == (404, "ENGINE_NOT_FOUND")


async def test_what_it_is_at_now(served: Served, api: Api, other: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMIC_FAIL_HEALTH", "1")
    provisioning = asyncio.create_task(api.provision("ann"))
    engine_id = await appears(api, "ann")

    async def both_tell() -> bool:
        return all([(await timeline(where))["stalled_on"] == "probe" for where in (api, other)])

    await until(both_tell)
    for where in (api, other):
        told = await timeline(where)
        assert (told["operation"], told["status"]) == ("provision", "provisioning")
        assert told["phases"][-1]["name"] == "probe"
        assert told["phases"][-1]["duration_ms"] is None
        assert told["duration_ms"] > 0
    await heal(served.deployment, engine_id)
    await provisioning
    assert (await timeline(api))["stalled_on"] is None


async def test_where_it_failed_and_what_the_engine_said(served: Served, api: Api) -> None:
    engine = await api.provision("ann")
    assert (await api.post("/engines/ann/stop"))[0] == 200
    served.deployment.mimic_flags(engine["engine_id"], **DIES_BOOTING)
    assert error(await api.post("/engines/ann/start")) == (502, "BACKEND_ERROR")
    told = await timeline(api)
    assert (told["operation"], told["stalled_on"]) == ("start", "probe")
    assert told["status"] in ("failed", "provisioning")  # a restart may have begun
    assert told["last_log"]


async def test_one_that_is_taken_over_is_told_as_a_whole(
    served: Served, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first owner is gone; what it told stays, and the next one goes on."""
    monkeypatch.setenv("MIMIC_FAIL_HEALTH", "1")
    provisioning = asyncio.create_task(api.post("/engines/provision", {"user_id": "ann"}))
    engine_id = await appears(api, "ann")

    async def written() -> bool:
        async with database(served.deployment) as connection:
            return bool(await connection.fetchval("SELECT phases::text LIKE '%probe%' FROM timelines"))

    await until(written)
    async with database(served.deployment) as connection:
        await connection.execute(
            "UPDATE engines SET lease_until = now() - interval '1 s', lease_generation = lease_generation + 1"
        )
    await heal(served.deployment, engine_id)

    async def taken_over() -> bool:
        told = await timeline(api)
        return bool(told["status"] == "running") and names(told).count("probe") == 2

    await until(taken_over, 60)
    assert names(await timeline(api))[:5] == ["look", "image", "queue", "create", "probe"]
    await provisioning


async def test_a_destroyed_engine_leaves_none(served: Served, api: Api) -> None:
    await api.provision("ann")
    assert (await api.call("DELETE", "/engines/ann"))[0] == 200
    await served.plane.means.timelines.flush(served.plane.registry)
    async with database(served.deployment) as connection:
        assert await connection.fetchval("SELECT count(*) FROM timelines") == 0
