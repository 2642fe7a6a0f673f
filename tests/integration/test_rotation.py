"""Key rotation: live with an overlap, while down, and across restarts and kills."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import pytest

from orchestrator.engine_http import EngineHttp
from orchestrator.lifecycle.leases import Interruption
from tests.integration.steps import PASSTHROUGH, accepts, database, disagreements, pid_of, settled, until

if TYPE_CHECKING:
    from tests.integration.conftest import Api, Deployment, Served


@pytest.fixture
def variables(variables: dict[str, str]) -> dict[str, str]:
    return variables | PASSTHROUGH | {"ORCH_LEASE_S": "1.5"}


async def rotate(api: Api, user_id: str = "ann", *, overlap: int = 300) -> dict[str, Any]:
    status, body = await api.post(f"/engines/{user_id}/rotate-key", {"overlap_seconds": overlap})
    assert status == 200, body
    return dict(body)


async def only_newest(engine: dict[str, Any], older: list[str], newest: str) -> None:
    assert await accepts(engine, newest)
    for key in older:
        assert not await accepts(engine, key)


async def test_no_request_fails_during_the_overlap(api: Api) -> None:
    engine = await api.provision("ann")
    pid = await pid_of(engine)
    calls = 0
    ended = asyncio.Event()

    async def traffic(key: str) -> None:
        nonlocal calls
        while not ended.is_set():
            assert await accepts(engine, key)
            calls += 1

    old = asyncio.create_task(traffic(engine["api_key"]))
    rotated = await rotate(api, overlap=300)
    assert (rotated["overlap_seconds"], rotated["restarted"]) == (300, False)
    new = asyncio.create_task(traffic(rotated["api_key"]))
    before = calls

    async def many_more() -> bool:
        return calls > before + 60 or old.done() or new.done()

    await until(many_more, timeout_s=60)
    ended.set()
    await asyncio.gather(old, new)
    assert (await api.get("/engines/ann"))[1]["api_key"] == rotated["api_key"] != engine["api_key"]

    newest = await rotate(api, overlap=1)

    async def refused() -> bool:
        assert await accepts(engine, newest["api_key"])
        return not await accepts(engine, rotated["api_key"])

    await until(refused)
    assert await accepts(engine, engine["api_key"])  # its own overlap goes on
    assert await pid_of(newest | {"url": engine["url"]}) == pid


async def test_without_overlap_the_old_key_is_dead_at_once(api: Api) -> None:
    engine = await api.provision("ann")
    rotated = await rotate(api, overlap=0)
    await only_newest(engine, [engine["api_key"]], rotated["api_key"])


async def test_while_stopped_twice(api: Api) -> None:
    engine = await api.provision("ann")
    await api.post("/engines/ann/stop")
    keys = [engine["api_key"], (await rotate(api))["api_key"]]
    last = await rotate(api)
    assert (last["overlap_seconds"], last["restarted"]) == (0, False)
    await api.post("/engines/ann/start")
    await only_newest(engine, keys, last["api_key"])


async def test_while_sleeping_twice(api: Api) -> None:
    engine = await api.provision("ann")
    pid = await pid_of(engine)
    await api.post("/engines/ann/sleep")
    first = await rotate(api, overlap=0)
    last = await rotate(api, overlap=300)
    assert await api.status_of("ann") == "sleeping"
    woken = (await api.admit("ann"))["engine"]
    assert woken["api_key"] == last["api_key"]
    assert await pid_of(woken) == pid
    assert await accepts(engine, first["api_key"])  # its overlap has not ended
    assert not await accepts(engine, engine["api_key"])


async def test_live_and_then_down_and_up(api: Api) -> None:
    engine = await api.provision("ann")
    live = await rotate(api, overlap=0)
    await api.post("/engines/ann/stop")
    down = await rotate(api)
    await api.post("/engines/ann/start")
    last = await rotate(api, overlap=0)
    await api.post("/engines/ann/stop")
    await api.post("/engines/ann/start")
    await only_newest(engine, [engine["api_key"], live["api_key"], down["api_key"]], last["api_key"])


async def test_an_engine_without_the_endpoint_is_made_again(api: Api, served: Served) -> None:
    engine = await api.provision("ann")
    pid = await pid_of(engine)
    served.deployment.mimic_flags(engine["engine_id"], no_admin=True)
    rotated = await rotate(api)
    assert (rotated["overlap_seconds"], rotated["restarted"]) == (0, True)
    await only_newest(engine, [engine["api_key"]], rotated["api_key"])
    assert await pid_of(rotated | {"url": engine["url"]}) != pid


async def test_a_crashed_engine_comes_up_with_the_new_key(api: Api, served: Served) -> None:
    engine = await api.provision("ann")
    os.kill(await pid_of(engine), 9)
    rotated = await rotate(api)
    await only_newest(engine, [engine["api_key"]], rotated["api_key"])
    assert await disagreements(served.deployment) == []


async def test_concurrent_rotations(api: Api) -> None:
    engine = await api.provision("ann")
    answers = await asyncio.gather(*(rotate(api, overlap=0) for _ in range(5)))
    newest = (await api.get("/engines/ann"))[1]["api_key"]
    older = {answer["api_key"] for answer in answers} - {newest}
    await only_newest(engine, [engine["api_key"], *older], newest)


async def test_a_take_over_keeps_key_and_overlap(api: Api, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner is lost after the next key was recorded, and before or after the engine heard of it."""
    engine = await api.provision("ann")
    previous = engine["api_key"]
    push = EngineHttp.push_key
    for heard in (False, True):
        pushing = asyncio.Event()

        async def hang(*args: Any, heard: bool = heard, pushing: asyncio.Event = pushing, **options: Any) -> str:
            if heard:
                await push(*args, **options)
            pushing.set()
            await asyncio.Event().wait()
            raise AssertionError

        with monkeypatch.context() as patch:
            patch.setattr(EngineHttp, "push_key", hang)
            rotating = asyncio.create_task(rotate(api, overlap=300))
            await pushing.wait()
        async with database(served.deployment) as connection:
            recorded = await connection.fetchval("SELECT max(generation) FROM engine_keys")
            served.plane.keeper.interrupt_all(Interruption.LOST)
            rotated = await rotating
            assert await connection.fetchval("SELECT key_generation FROM engines") == recorded
        assert rotated["overlap_seconds"] == 300
        assert rotated["restarted"] is False
        assert await accepts(engine, rotated["api_key"])
        assert await accepts(engine, previous)
        previous = rotated["api_key"]


async def test_killed_while_it_makes_the_engine_again(deployment: Deployment) -> None:
    doomed, other = await asyncio.gather(deployment.serve(), deployment.serve())
    at_doomed = await deployment.product(doomed.url)
    api = deployment.api(other.url, at_doomed.headers)
    engine = await api.provision("ann")
    deployment.mimic_flags(engine["engine_id"], no_admin=True, unready_for=1.5)
    rotating = asyncio.create_task(at_doomed.post("/engines/ann/rotate-key"))

    async with database(deployment) as connection:

        async def created_again() -> bool:
            return bool(await connection.fetchval("SELECT incarnation = 2 FROM engines"))

        await until(created_again)
    doomed.kill()
    await asyncio.wait([rotating])
    rotating.exception()
    await settled(deployment)
    newest = (await api.get("/engines/ann"))[1]["api_key"]
    assert newest != engine["api_key"]
    await only_newest(engine, [engine["api_key"]], newest)
    assert await disagreements(deployment) == []
