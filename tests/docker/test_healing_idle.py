"""Idle engines are paused, those asleep for long stopped; each wakes with its brain, URL and key."""

from __future__ import annotations

import asyncio

import pytest

from tests.docker.fleet import Engine, Fleet

pytestmark = pytest.mark.timeout(240)


async def run_of(fleet: Fleet, engine: Engine) -> str:
    return str((await fleet.ask(engine, "GET", "/me")).json()["run"])


async def thresholds(fleet: Fleet, sleep_s: float, stop_s: float) -> None:
    """From now on; 0: never."""
    async with fleet.database() as connection:
        policy = {"idle_sleep_threshold_s": sleep_s, "idle_stop_threshold_s": stop_s}
        await connection.execute("UPDATE products SET policy = $1", policy)


async def test_idle_asleep_unloaded_and_woken(fleet: Fleet) -> None:
    """Two replicas look after it; whatever is due is done once."""
    api = await fleet.open()
    other = await fleet.open()
    idle, busy = await fleet.provision(api, "idle", "busy")
    for engine in (idle, busy):
        await fleet.remember(engine)
    run = await run_of(fleet, idle)
    found = await fleet.inspect(idle)
    await fleet.flags(busy, busy=1)  # a turn in flight, for as long as this test says
    await thresholds(fleet, 2, 3600)
    await fleet.becomes(idle, "sleeping", "paused")
    await thresholds(fleet, 0, 0)
    # A wake is a thaw: the same process.
    await fleet.remembers(other, idle)
    assert await run_of(fleet, idle) == run
    await thresholds(fleet, 2, 3600)
    await fleet.becomes(idle, "sleeping", "paused")
    # Long asleep it gives its memory back, and is still asleep.
    await thresholds(fleet, 0, 1)
    await fleet.becomes(idle, "sleeping", "exited")
    assert [row["metadata"] for row in await fleet.audit(idle, "sleep")] == [
        {"frozen": True},
        {"frozen": True},
        {"unloaded": True},
    ]
    assert (await fleet.inspect(idle))["Id"] == found["Id"]
    # A wake is a start now; by many callers at both replicas, once.
    woken = await asyncio.gather(*(one.admit("idle") for one in (api, other) for _ in range(10)))
    assert {answer["engine"]["url"] for answer in woken} == {idle.url}
    assert await run_of(fleet, idle) != run
    await fleet.remembers(api, idle)
    assert len(await fleet.audit(idle, "wake")) == 2
    assert (await fleet.inspect(idle))["Id"] == found["Id"]
    assert not await fleet.audit(busy, "sleep")
    await fleet.flags(busy)
    await thresholds(fleet, 2, 0)
    await fleet.becomes(busy, "sleeping", "paused")
    await thresholds(fleet, 0, 0)
    await fleet.remembers(other, busy)
    assert not {"health_failed", "reconcile_adopt"} & {*await fleet.actions(idle), *await fleet.actions(busy)}


async def test_a_key_rotated_in_its_sleep_is_in_force_when_it_wakes(fleet: Fleet) -> None:
    api = await fleet.open()
    frozen, unloaded = await fleet.provision(api, "frozen", "unloaded")
    for engine in (frozen, unloaded):
        await fleet.remember(engine)
        assert (await api.post(f"/engines/{engine.user_id}/sleep"))[0] == 200
    plane = fleet.planes[0]
    assert await plane.healing.unload(unloaded.id, (await fleet.row(unloaded))["lease_generation"])
    await fleet.becomes(unloaded, "sleeping", "exited")
    for engine in (frozen, unloaded):
        status, rotated = await api.post(f"/engines/{engine.user_id}/rotate-key", {"overlap_seconds": 0})
        assert status == 200
        awake = (await api.admit(engine.user_id))["engine"]
        assert awake["url"] == engine.url
        assert awake["api_key"] == rotated["api_key"] != engine.api_key
        assert (await fleet.ask(engine, "GET", "/read")).status_code == 401
        renewed = Engine(engine.id, engine.user_id, engine.url, rotated["api_key"])
        assert (await fleet.ask(renewed, "GET", "/read")).text == f"the brain of {engine.user_id}"
