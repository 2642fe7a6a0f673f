"""`GET …/logs`: the last lines, and new ones as they come, in bounded memory."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

import httpx

from orchestrator.api.routes import logs
from orchestrator.backends.base import Capabilities
from tests.integration.checks import code_of, put_engine
from tests.integration.steps import data_of, until

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from tests.integration.conftest import Api, Served

DEADLINE_S = 60


def log_of(served: Served, engine_id: str) -> Path:
    """The file that the engine's output goes to."""
    folder = data_of(served.deployment, engine_id)
    (found,) = [path for path in folder.parent.glob("*.log*") if engine_id in path.name] or list(folder.glob("*.log"))
    return found


def write(path: Path, *lines: str) -> None:
    with path.open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


async def test_the_last_lines(served: Served, api: Api) -> None:
    engine = await api.provision("ann")
    path = log_of(served, engine["engine_id"])
    write(path, *(f"line {number}" for number in range(150)), "2030-01-02T03:04:05Z ready", "x" * 20_000)
    status, body = await api.get("/engines/ann/logs?tail=3")
    assert status == 200
    first, ready, long = body["lines"]
    assert first == {"timestamp": None, "stream": "stdout", "line": "line 149"}
    assert datetime.fromisoformat(ready["timestamp"]) == datetime.fromisoformat("2030-01-02T03:04:05Z")
    assert long["line"] == "x" * logs.LONGEST_LINE
    assert len((await api.get("/engines/ann/logs"))[1]["lines"]) == 100
    assert (await api.get("/engines/ann/logs?tail=0"))[1] == {"lines": []}
    await api.post("/engines/ann/stop")
    assert len((await api.get("/engines/ann/logs?tail=3"))[1]["lines"]) == 3  # of a stopped engine, too


async def test_an_answer_is_bounded(served: Served, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MOST_CHARACTERS", 100)
    engine = await api.provision("ann")
    write(log_of(served, engine["engine_id"]), *(f"{number:09}" for number in range(1000)))
    _, body = await api.get("/engines/ann/logs?tail=1000")
    assert [line["line"] for line in body["lines"]] == [f"{number:09}" for number in range(989, 1000)]


async def follow(api: Api, count: int, tail: int = 0) -> list[dict[str, Any]]:
    found = []
    async with asyncio.timeout(DEADLINE_S):
        async with api.client.stream("GET", f"/engines/ann/logs?follow=true&tail={tail}") as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("application/x-ndjson")
            async for line in answer.aiter_lines():
                found.append(json.loads(line))
                if len(found) == count:
                    break
    return found


async def followers(served: Served, count: int) -> None:
    async def connected() -> bool:
        return served.plane.followers == count

    await until(connected, DEADLINE_S)


async def test_new_lines_are_followed_to_the_end_of_the_engine(served: Served, api: Api) -> None:
    engine = await api.provision("ann")
    path = log_of(served, engine["engine_id"])
    write(path, "before")
    reading = asyncio.create_task(follow(api, 10**6, tail=1000))
    await followers(served, 1)
    write(path, "one", "two")
    await api.post("/engines/ann/stop")
    await api.post("/engines/ann/start")
    write(path, "after a restart")

    async def all_read() -> bool:
        return len((await api.get("/engines/ann/logs?tail=1"))[1]["lines"]) == 1

    await until(all_read, DEADLINE_S)
    taken = asyncio.create_task(follow(api, 1, tail=1))
    assert (await taken)[0]["line"] == "after a restart"
    await api.call("DELETE", "/engines/ann")
    lines = [line["line"] for line in await reading]
    assert [line for line in lines if line in ("before", "one", "two")] == ["before", "one", "two"]
    await followers(served, 0)


async def test_a_reader_who_goes_ends_the_following(served: Served, api: Api) -> None:
    engine = await api.provision("ann")
    write(log_of(served, engine["engine_id"]), "line")
    assert [line["line"] for line in await follow(api, 1, tail=1)] == ["line"]
    await followers(served, 0)


async def test_the_number_of_followers_is_bounded(served: Served, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_FOLLOWERS", 1)
    await api.provision("ann")
    reading = asyncio.create_task(follow(api, 10**6))
    await followers(served, 1)
    assert code_of(await api.get("/engines/ann/logs?follow=true")) == (429, "RATE_LIMITED")
    reading.cancel()
    await asyncio.wait({reading})
    await followers(served, 0)


async def test_refusals(served: Served, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_of(await api.get("/engines/nobody/logs")) == (404, "ENGINE_NOT_FOUND")
    await api.provision("ann")
    other = await served.deployment.product(served.url, "other")
    assert code_of(await other.get("/engines/ann/logs")) == (404, "ENGINE_NOT_FOUND")
    for query in ("tail=-1", "tail=10001", "tail=x", "follow=perhaps"):
        answer = await api.get(f"/engines/ann/logs?{query}")
        assert code_of(answer) == (400, "INVALID_REQUEST")
        assert answer[1]["error"]["details"]["field"] == query.partition("=")[0]
    await put_engine(served, str(api.headers["product_id"]), "elsewhere", "running")
    assert code_of(await api.get("/engines/elsewhere/logs")) == (503, "BACKEND_UNAVAILABLE")
    monkeypatch.setattr(type(served.plane.backend), "capabilities", Capabilities())
    assert code_of(await api.get("/engines/ann/logs")) == (409, "NOT_SUPPORTED")


async def test_the_admin_key_reads_it_as_a_product(served: Served, api: Api) -> None:
    await api.provision("ann")
    admin = served.deployment.admin(served.url, str(api.headers["product_id"]))
    assert (await admin.get("/engines/ann/logs?follow=false"))[0] == 200
    async with httpx.AsyncClient(trust_env=False) as nobody:
        assert (await nobody.get(f"{served.url}/engines/ann/logs")).status_code == 401
