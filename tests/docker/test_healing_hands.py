"""A person's hands on the containers, in each state of the registry: everything ends as the registry says."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.docker.fleet import Engine, Fleet, until

if TYPE_CHECKING:
    from tests.integration.conftest import Api

pytestmark = pytest.mark.timeout(240)


async def bring_into(fleet: Fleet, api: Api, engine: Engine, status: str) -> None:
    """A settled row, with the container that belongs to it."""
    await fleet.remember(engine)
    if status == "sleeping":
        assert (await api.post(f"/engines/{engine.user_id}/sleep"))[0] == 200
    elif status == "stopped":
        assert (await api.post(f"/engines/{engine.user_id}/stop"))[0] == 200
    elif status == "failed":
        await fleet.flags(engine, crash_after=0.1, unready_for=300)
        await fleet.crash(engine)
    await fleet.becomes(engine, status, STATES[status])


STATES = {"running": "running", "sleeping": "paused", "stopped": "exited", "failed": "exited"}

# What is done, and what becomes of it: the row, the container, and whether that was the work of the loops.
HANDS = {
    "running": {
        "stop": ("running", "running", True),
        "kill": ("running", "running", True),
        "pause": ("running", "running", True),
        "rm --force": ("running", "running", True),
        "restart": ("running", "running", False),
        "rename": ("running", "running", False),
    },
    "sleeping": {
        "unpause": ("sleeping", "paused", True),
        "stop": ("sleeping", "exited", False),
        "kill": ("sleeping", "exited", False),
        "rm --force": ("sleeping", "gone", False),
        "restart": ("sleeping", "paused", True),
    },
    "stopped": {
        "start": ("stopped", "exited", True),
        "rm --force": ("stopped", "gone", False),
    },
    "failed": {
        "start": ("failed", "exited", True),
        "rm --force": ("failed", "gone", False),
    },
}


@pytest.fixture
def variables(variables: dict[str, str]) -> dict[str, str]:
    return variables | {"ORCH_RESTART_BACKOFF_BASE_S": "300", "ORCH_RESTART_BACKOFF_MAX_S": "300"}


@pytest.mark.parametrize("status", HANDS)
async def test_hands(fleet: Fleet, status: str) -> None:
    """All of a state at once: as many engines as there are verbs."""
    verbs = HANDS[status]
    api = await fleet.open()
    engines = await fleet.provision(api, *(verb.split()[0] for verb in verbs))
    await asyncio.gather(*(bring_into(fleet, api, engine, status) for engine in engines))
    before = {engine.id: await fleet.actions(engine) for engine in engines}
    for engine, verb in zip(engines, verbs, strict=True):
        if verb == "rename":
            await fleet.docker("rename", engine.container, f"{engine.container}-renamed")
        else:
            await fleet.docker(*verb.split(), engine.container)
    for engine, (verb, (row, state, healed)) in zip(engines, verbs.items(), strict=True):
        if healed:
            await fleet.does(engine, "reconcile_adopt")
        if verb == "rename":
            await fleet.docker("rename", f"{engine.container}-renamed", engine.container)
        await fleet.becomes(engine, row, state)
        told = (await fleet.actions(engine))[len(before[engine.id]) :]
        if verb == "restart" and status == "running" and not told:
            pass  # it was up again before anybody looked
        elif verb in ("rm --force", "stop", "kill", "restart") and status == "running":
            assert told == ["reconcile_adopt", "auto_restart_success"], (verb, told)
        else:
            assert told == ["reconcile_adopt"] * healed, (verb, told)
    # What no event told is found by a look: there is nothing left to do.
    assert await fleet.reconcile() == []
    if status == "stopped":
        for engine in engines:
            assert (await api.post(f"/engines/{engine.user_id}/start"))[0] == 200
    if status == "failed":
        # The brain is in the volume, with the flags in it: these go first.
        for engine in engines:
            await fleet.docker(
                *("run", "--rm", "--volume", f"{engine.volume}:/data", "--user", "0", "--entrypoint", "rm"),
                *(fleet.variables["ORCH_ENGINE_IMAGE"], "/data/mimic.json"),
            )
            assert (await api.post(f"/engines/{engine.user_id}/recover"))[0] == 200
    for engine in engines:
        await fleet.remembers(api, engine)
        assert engine.container in await fleet.docker("ps", "--format", "{{.Names}}")


async def test_hands_while_no_orchestrator_is_there(fleet: Fleet) -> None:
    api = await fleet.open()
    engines = await fleet.provision(api, "stop", "pause", "rm", "thaw", "start")
    for engine in engines:
        await fleet.remember(engine)
    stopped, paused, removed, thawed, started = engines
    await api.post("/engines/thaw/sleep")
    await api.post("/engines/start/stop")
    await fleet.close_planes()
    await fleet.docker("stop", stopped.container)
    await fleet.docker("pause", paused.container)
    await fleet.docker("rm", "--force", removed.container)
    await fleet.docker("unpause", thawed.container)
    await fleet.docker("start", started.container)
    api = await fleet.open()
    for engine in engines:
        await fleet.does(engine, "reconcile_adopt")
    for engine in (stopped, paused, removed):
        await fleet.becomes(engine, "running", "running")
    await fleet.becomes(thawed, "sleeping", "paused")
    await fleet.becomes(started, "stopped", "exited")
    assert (await api.post("/engines/start/start"))[0] == 200
    for engine in engines:
        await fleet.remembers(api, engine)


async def test_a_thawed_engine_that_works_stays_awake(fleet: Fleet) -> None:
    api = await fleet.open()
    (engine,) = await fleet.provision(api, "ann")
    await bring_into(fleet, api, engine, "sleeping")
    # A caller who did not ask first: the request waits in the socket of the frozen engine.
    turn = asyncio.create_task(fleet.ask(engine, "POST", "/work", {"seconds": 8}))
    await until(lambda: _connected(engine))
    await fleet.docker("unpause", engine.container)
    await fleet.becomes(engine, "running", "running")
    assert (await turn).status_code == 200
    assert (await fleet.actions(engine))[-1] == "reconcile_adopt"
    await fleet.remembers(api, engine)


async def _connected(engine: Engine) -> bool:
    """Another connection would be accepted as well: the kernel does that for a frozen engine."""
    reader, writer = await asyncio.open_connection(*engine.url.removeprefix("http://").split(":"))
    writer.close()
    return reader is not None


async def test_hands_on_a_stopped_engine_under_three_replicas(fleet: Fleet) -> None:
    """Every replica hears of everything; one of them acts."""
    api = await fleet.open()
    await fleet.open()
    await fleet.open()
    engines = await fleet.provision(api, "run", "sleep", "stop")
    for engine in engines:
        await fleet.remember(engine)
    running, sleeping, stopped = engines
    await api.post("/engines/sleep/sleep")
    await api.post("/engines/stop/stop")
    for times in (1, 2, 3):
        await asyncio.gather(
            fleet.docker("stop", running.container),
            fleet.docker("unpause", sleeping.container),
            fleet.docker("start", stopped.container),
        )
        for engine in engines:
            await fleet.does(engine, "reconcile_adopt", times)
        await fleet.becomes(running, "running", "running")
        await fleet.becomes(sleeping, "sleeping", "paused")
        await fleet.becomes(stopped, "stopped", "exited")
    for engine in engines:
        assert len(await fleet.audit(engine, "reconcile_adopt")) == 3, await fleet.actions(engine)
    assert (await api.post("/engines/stop/start"))[0] == 200
    for engine in engines:
        await fleet.remembers(api, engine)


async def test_a_volume_that_was_removed_is_never_replaced_by_an_empty_one(fleet: Fleet) -> None:
    api = await fleet.open()
    engines = await fleet.provision(api, "run", "sleep", "stop")
    running = engines[0]
    for engine in engines:
        await fleet.remember(engine)
    await api.post("/engines/sleep/sleep")
    await api.post("/engines/stop/stop")

    async def lose(engine: Engine) -> None:
        # As fast as a command can: the loops may bring the container back in between.
        removed = httpx.AsyncHTTPTransport(uds="/var/run/docker.sock")
        async with httpx.AsyncClient(transport=removed, base_url="http://docker", timeout=60) as client:

            async def gone() -> bool:
                await client.delete(f"/containers/{engine.container}", params={"force": "1"})
                return (await client.delete(f"/volumes/{engine.volume}")).status_code in (204, 404)

            await until(gone)

    for engine in engines:
        await lose(engine)

    async def known() -> bool:
        # Not always by the first restart: the container that it made with the data may have been the one removed last.
        failures = await fleet.audit(running, "auto_restart_failed")
        return any("data is missing" in failure["metadata"]["message"] for failure in failures)

    await until(known, lambda: fleet.story(running))
    await fleet.becomes(running, "failed", "gone")
    for user_id, call, body in (
        ("sleep", "admit", {"auto_wake": True}),
        ("stop", "start", None),
        ("run", "recover", None),
    ):
        status, answer = await api.post(f"/engines/{user_id}/{call}", body)
        assert status == 502, (user_id, answer)
        assert answer["error"]["details"]["reason"] == "data_missing", answer
    for engine in engines:
        await fleet.becomes(engine, "failed", "gone")
        assert not await fleet.has_volume(engine)
        assert json.loads(json.dumps((await fleet.row(engine))["last_error"]))["details"]["reason"] == "data_missing"
    # It can be destroyed all the same.
    for engine in engines:
        assert (await api.call("DELETE", f"/engines/{engine.user_id}"))[0] == 200
