"""Steps that tests of the lifecycle share: bring an engine into a state, hold it there, hold rows against reality."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import httpx

from orchestrator.backends.base import BackendObject, ObjectState
from orchestrator.backends.subprocess_backend import SubprocessBackend
from tests.integration.conftest import Api, Deployment, settings_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from uuid import UUID

    import pytest

# Handed to engines, so that a test can set them for engines that have no data directory yet.
MIMIC_FLAGS = ("MIMIC_FAIL_HEALTH", "MIMIC_UNREADY_FOR", "MIMIC_CRASH_AFTER", "MIMIC_NO_ADMIN", "MIMIC_IGNORE_SIGTERM")
PASSTHROUGH = {"ORCH_ENGINE_ENV_PASSTHROUGH": ",".join(MIMIC_FLAGS)}
DIES_BOOTING = {"unready_for": 60.0, "crash_after": 0.02}


def error(answer: tuple[int, Any]) -> tuple[int, str]:
    """Status and code of a refusal."""
    status, body = answer
    return status, body["error"]["code"]


async def until(holds: Callable[[], Awaitable[object]], timeout_s: float = 20) -> None:
    """Look until it holds."""
    async with asyncio.timeout(timeout_s):
        while not await holds():  # noqa: ASYNC110 - it is in another process
            await asyncio.sleep(0.02)


async def accepted(call: Callable[[], Awaitable[tuple[int, Any]]], timeout_s: float = 60) -> tuple[int, Any]:
    """The answer to a call, made again while the database is too busy (503)."""
    async with asyncio.timeout(timeout_s):
        while True:
            answer = await call()
            if answer[0] != 503:
                return answer
            await asyncio.sleep(0.1)


async def reaches(api: Api, user_id: str, state: str, timeout_s: float = 30) -> None:
    """The user's engine comes into the state, without an operation where the state is one to stay in."""
    answer = await api.get(f"/engines/{user_id}/wait", params={"status": state, "timeout_s": timeout_s})
    assert answer[0] == 200, (user_id, answer)


async def appears(api: Api, user_id: str) -> str:
    """The id of an engine that is being provisioned."""
    found: dict[str, Any] = {}

    async def look() -> bool:
        status, body = await api.get(f"/engines/{user_id}")
        found.update(body)
        return status == 200

    await until(look)
    return str(found["engine_id"])


def data_of(deployment: Deployment, engine_id: str) -> Path:
    return Path(deployment.variables["ORCH_DATA_ROOT"]) / "engines" / engine_id


async def heal(deployment: Deployment, engine_id: str) -> None:
    """From now on this engine's health is good, whatever its environment says."""
    folder = data_of(deployment, engine_id)

    async def made() -> bool:
        return folder.is_dir()

    await until(made)
    draft = folder / "mimic.json.new"
    draft.write_text(json.dumps({"fail_health": False}))
    draft.replace(folder / "mimic.json")


async def fail(deployment: Deployment, api: Api, user_id: str) -> None:
    """A running engine that was healthy is `failed` now, and would come up again."""
    _, engine = await api.get(f"/engines/{user_id}")
    assert (await api.post(f"/engines/{user_id}/stop"))[0] == 200
    deployment.mimic_flags(engine["engine_id"], **DIES_BOOTING)
    assert error(await api.post(f"/engines/{user_id}/start")) == (502, "BACKEND_ERROR")
    (data_of(deployment, engine["engine_id"]) / "mimic.json").unlink()


@asynccontextmanager
async def boots_fail(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Engines of the in-process replica that start now die before they are healthy."""
    with monkeypatch.context() as patch:
        patch.setenv("MIMIC_UNREADY_FOR", "60")
        patch.setenv("MIMIC_CRASH_AFTER", "0.02")
        yield


async def ask(engine: dict[str, Any], path: str = "/me", *, key: str | None = None) -> httpx.Response:
    """A call to the engine itself."""
    async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
        return await client.get(engine["url"] + path, headers={"X-Engine-Key": key or engine["api_key"]})


async def accepts(engine: dict[str, Any], key: str) -> bool:
    answer = await ask(engine, key=key)
    assert answer.status_code in (200, 401), answer.text
    return answer.status_code == 200


async def pid_of(engine: dict[str, Any]) -> int:
    return int((await ask(engine)).json()["pid"])


@asynccontextmanager
async def database(deployment: Deployment) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    connection = await asyncpg.connect(deployment.variables["ORCH_DATABASE_URL"])
    try:
        yield connection
    finally:
        await connection.close()


async def objects_of(deployment: Deployment) -> dict[UUID, BackendObject]:
    """What really runs, seen by a backend of our own."""
    async with database(deployment) as connection:
        deployment_id = await connection.fetchval("SELECT id FROM deployment")
    backend = SubprocessBackend.from_settings(settings_of(deployment.variables), deployment_id)
    await backend.open()
    try:
        return {found.engine_id: found for found in await backend.list()}
    finally:
        await backend.close()


async def settled(deployment: Deployment, timeout_s: float = 40) -> None:
    """No operation is under way, and no wish waits."""
    async with database(deployment) as connection:

        async def nothing_left() -> bool:
            return not await connection.fetchval(
                "SELECT count(*) FROM engines WHERE operation IS NOT NULL OR wish IS NOT NULL"
            )

        await until(nothing_left, timeout_s)


async def disagreements(deployment: Deployment) -> list[str]:
    """Everything in which registry, backend and engines differ; all operations are over."""
    found = await objects_of(deployment)
    async with database(deployment) as connection:
        rows = await connection.fetch("SELECT * FROM engines")
        tombstones = {row["engine_id"] for row in await connection.fetch("SELECT engine_id FROM tombstones")}
    expected = {
        "running": ObjectState.RUNNING,
        "sleeping": ObjectState.FROZEN,
        "stopped": ObjectState.EXITED,
        "failed": ObjectState.EXITED,
    }
    problems = []
    for row in rows:
        name = f"{row['user_id']} ({row['status']})"
        one = found.pop(row["id"], None)
        state = ObjectState.EXITED if one is None else one.state
        if row["status"] not in expected:
            problems.append(f"{name} is not in a state to stay in")
        elif row["unloaded_at"] is not None and state is ObjectState.EXITED:
            pass  # asleep for so long that its process was ended
        elif state is not expected[row["status"]]:
            problems.append(f"{name} is {state}")
        if one is None:
            continue
        if state is not ObjectState.EXITED and one.incarnation != row["incarnation"]:
            problems.append(f"{name} runs as incarnation {one.incarnation}, not {row['incarnation']}")
        if state is not ObjectState.EXITED and (one.endpoint.port, row["endpoint_port"]) != (row["port"], row["port"]):
            problems.append(f"{name} runs on {one.endpoint.port}, recorded {row['port']} and {row['endpoint_port']}")
    problems += [f"{engine_id} is {one.state} without a row" for engine_id, one in found.items()]
    folder = Path(deployment.variables["ORCH_DATA_ROOT"]) / "engines"
    left = [path.name for path in folder.iterdir() if path.name.partition(".")[0] in {str(one) for one in tombstones}]
    problems += [f"{name} is left of a destroyed engine" for name in left]
    return problems
