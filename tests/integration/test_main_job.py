"""The main job over HTTP: provision, admit, stop, start, sleep, wake, destroy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from tests.integration.conftest import Api


async def engine_get(engine: dict[str, str], path: str) -> int:
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.get(engine["url"] + path, headers={"X-Engine-Key": engine["api_key"]})
        return answer.status_code


async def test_life_of_an_engine(api: Api) -> None:
    provisioned = await api.provision("ann")
    assert provisioned["status"] == "running"
    assert provisioned["api_key"].startswith("sk-sept-")
    assert await engine_get(provisioned, "/read") in (200, 404)

    admitted = await api.admit("ann", auto_provision=False, auto_wake=False)
    assert admitted["admitted"] is True
    assert admitted["engine"]["api_key"] == provisioned["api_key"]
    assert admitted["engine"]["url"] == provisioned["url"]

    assert await api.post("/engines/ann/stop") == (
        200,
        {"status": "stopped", "engine_id": provisioned["engine_id"]},
    )
    refused = await api.admit("ann")
    assert refused == {"admitted": False, "engine": None, "reason": "engine_stopped"}

    assert await api.post("/engines/ann/start") == (200, {"status": "running", "url": provisioned["url"]})
    assert await engine_get(provisioned, "/read") in (200, 404)

    status, _ = await api.post("/engines/ann/sleep")
    assert status == 200
    refused = await api.admit("ann", auto_wake=False)
    assert refused["reason"] == "engine_sleeping"
    woken = await api.admit("ann")
    assert woken["engine"]["url"] == provisioned["url"]
    assert woken["engine"]["api_key"] == provisioned["api_key"]
    assert await engine_get(woken["engine"], "/read") in (200, 404)

    assert await api.call("DELETE", "/engines/ann") == (
        200,
        {"status": "destroyed", "engine_id": provisioned["engine_id"]},
    )
    status, body = await api.get("/engines/ann")
    assert (status, body["error"]["code"]) == (404, "ENGINE_NOT_FOUND")


async def test_a_wrong_method_is_told_what_is_allowed(api: Api) -> None:
    status, body = await api.call("PUT", "/engines/provision")
    assert (status, body["error"]["code"]) == (405, "METHOD_NOT_ALLOWED")
    assert api.last is not None
    assert {"POST"} <= set(api.last.headers["allow"].split(", "))
