"""Engines that crash: once, again and again, out of memory, and for good. Docker mends; what it does not, we do."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from tests.docker.daemon import docker
from tests.docker.fleet import Engine, Fleet, until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(240)

TROUBLE = {
    "health_failed",
    "auto_restart_start",
    "auto_restart_parked",
    "auto_restart_failed",
    "auto_restart_gave_up",
    "reconcile_adopt",
}


async def mended(fleet: Fleet, engine: Engine, times: int) -> None:
    """Docker has started it again so often, the registry knows that, and a probe since was good."""

    async def holds() -> bool:
        row = await fleet.row(engine)
        return len(row["restarted_at"]) == times and bool(row["last_health_at"] > max(row["restarted_at"]))

    await until(holds, lambda: fleet.story(engine))


async def test_a_single_crash_is_mended_by_docker_alone(fleet: Fleet) -> None:
    api = await fleet.open()
    (engine,) = await fleet.provision(api, "ann")
    await fleet.remember(engine)
    before = await fleet.inspect(engine)
    await fleet.crash(engine)
    await mended(fleet, engine, 1)
    after = await fleet.inspect(engine)
    assert (after["Id"], after["RestartCount"]) == (before["Id"], 1)
    await fleet.becomes(engine, "running", "running")
    assert not TROUBLE & set(await fleet.actions(engine))
    assert (await fleet.row(engine))["restart_parked_until"] is None
    await fleet.remembers(api, engine)


async def test_two_replicas_count_a_crash_once(fleet: Fleet) -> None:
    api = await fleet.open()
    await fleet.open()
    await fleet.open()
    (engine,) = await fleet.provision(api, "ann")
    await fleet.remember(engine)
    for times in (1, 2):
        await fleet.crash(engine)
        await mended(fleet, engine, times)
    await fleet.becomes(engine, "running", "running")
    row = await fleet.row(engine)
    assert (row["restarts_seen"], len(row["restarted_at"])) == (2, 2)
    # A look that was made before, and comes in late, is no news.
    health = fleet.planes[1].registry.health
    for count, ago_s in ((2, 0), (1, 0), (0, 60), (5, 60)):
        at = row["process_started_at"] - timedelta(seconds=ago_s)
        assert await health.note_restart_count(engine.id, row["lease_generation"], count, at) == 2
    assert (await fleet.row(engine))["restarts_seen"] == 2
    assert not TROUBLE & set(await fleet.actions(engine))
    await fleet.remembers(api, engine)
    # The third one within ten minutes is a crash loop, whoever has seen the first ones.
    await fleet.crash(engine)
    await fleet.does(engine, "health_failed")
    await fleet.does(engine, "auto_restart_success")
    await fleet.becomes(engine, "running", "running")
    assert len(await fleet.audit(engine, "health_failed")) == 1
    await fleet.remembers(api, engine)


async def test_crashes_while_booting_are_not_held_against_a_running_engine(fleet: Fleet) -> None:
    fleet.variables["ORCH_HEALTH_MAX_FAILURES"] = "6"
    api = await fleet.open()
    (engine,) = await fleet.provision(api, "ann")
    await fleet.remember(engine)
    assert (await api.post("/engines/ann/stop"))[0] == 200
    await fleet.flags(engine, unready_for=300, crash_after=0.1)
    starting = asyncio.create_task(api.post("/engines/ann/start"))

    async def crashed_twice() -> bool:
        return int((await fleet.inspect(engine))["RestartCount"]) >= 2

    await until(crashed_twice)
    await fleet.flags(engine)
    assert (await starting)[0] == 200
    row, found = await fleet.row(engine), await fleet.inspect(engine)
    assert (row["restarts_seen"], row["restarted_at"]) == (found["RestartCount"], [])
    await fleet.crash(engine)
    await mended(fleet, engine, 1)
    await fleet.remembers(api, engine)


@pytest.mark.parametrize("replicas", [1, 2])
async def test_a_crash_loop_ends_in_failed_with_its_last_words(fleet: Fleet, replicas: int) -> None:
    fleet.variables["ORCH_RESTART_BACKOFF_BASE_S"] = "300"
    api = await fleet.open()
    for _ in range(replicas - 1):
        await fleet.open()
    (engine,) = await fleet.provision(api, "ann")
    await fleet.remember(engine)
    await fleet.flags(engine, say="the last words", crash_after=0.2)
    await fleet.crash(engine)
    await fleet.becomes(engine, "failed", "exited")
    (failed,) = await fleet.audit(engine, "health_failed")
    assert failed["metadata"]["reason"] == "exited"
    assert "the last words" in failed["metadata"]["log"]
    assert "the last words" in (await fleet.row(engine))["last_log"]
    assert "ten minutes" in failed["metadata"]["message"]
    # Docker's policy is out of it: it would have started the engine again by now, and Docker would not know the stop.
    found = await fleet.inspect(engine)
    assert (found["State"]["Restarting"], found["State"]["Running"]) == (False, False)
    assert (await fleet.row(engine))["next_restart_at"] is not None
    # A person who has mended the engine asks for it.
    await fleet.flags(engine)
    assert (await api.post("/engines/ann/recover"))[0] == 200
    await fleet.becomes(engine, "running", "running")
    await fleet.remembers(api, engine)
    assert len(await fleet.audit(engine, "health_failed")) == 1


async def test_after_a_crash_loop_only_the_orchestrator_restarts(fleet: Fleet) -> None:
    fleet.variables |= {"ORCH_RESTART_MAX_ATTEMPTS": "2"}
    api = await fleet.open()
    (engine,) = await fleet.provision(api, "ann")
    await fleet.remember(engine)
    await fleet.flags(engine, unready_for=300, crash_after=0.1)
    await fleet.crash(engine)
    await fleet.does(engine, "auto_restart_gave_up")
    await fleet.becomes(engine, "failed", "exited")
    actions = await fleet.actions(engine)
    assert actions.count("auto_restart_failed") == 2, actions
    assert actions[-1] == "auto_restart_gave_up"
    assert "mimic crashes" in (await fleet.audit(engine, "auto_restart_failed"))[-1]["metadata"]["log"]
    await fleet.flags(engine)
    assert (await api.post("/engines/ann/start"))[0] == 200
    await fleet.remembers(api, engine)


async def test_out_of_memory_once(fleet: Fleet) -> None:
    # The leak may end a second process before it is mended.
    fleet.variables |= {"ORCH_ENGINE_MEMORY": "16m", "ORCH_HEALTH_MAX_FAILURES": "20"}
    api = await fleet.open()
    (engine,) = await fleet.provision(api, "ann")
    await fleet.remember(engine)
    await fleet.flags(engine, leak=100)
    await fleet.crash(engine)

    async def killed() -> bool:
        return len((await fleet.row(engine))["restarted_at"]) >= 2

    await until(killed, lambda: fleet.story(engine))
    await fleet.flags(engine)

    async def well() -> bool:
        row = await fleet.row(engine)
        return bool(row["consecutive_failures"] == 0 and row["last_health_at"] > max(row["restarted_at"]))

    await until(well, lambda: fleet.story(engine))
    await fleet.becomes(engine, "running", "running")
    assert not TROUBLE & set(await fleet.actions(engine))


async def test_out_of_memory_again_and_again(fleet: Fleet) -> None:
    fleet.variables |= {"ORCH_ENGINE_MEMORY": "16m", "ORCH_RESTART_BACKOFF_BASE_S": "300"}
    api = await fleet.open()
    (engine,) = await fleet.provision(api, "ann")
    await fleet.remember(engine)
    await fleet.flags(engine, leak=200)
    await fleet.crash(engine)
    await fleet.becomes(engine, "failed", "exited")
    (failed,) = await fleet.audit(engine, "health_failed")
    assert failed["metadata"]["reason"] == "exited"
    await fleet.flags(engine)
    assert (await api.post("/engines/ann/recover"))[0] == 200
    await fleet.remembers(api, engine)


async def test_an_exit_that_docker_does_not_mend_in_the_time_of_a_boot(fleet: Fleet) -> None:
    fleet.variables |= {
        "ORCH_HEALTH_MAX_FAILURES": "100",
        "ORCH_BOOT_TIMEOUT_S": "2",
        "ORCH_HEALTH_CHECK_INTERVAL_S": "0.3",
        "ORCH_RESTART_BACKOFF_BASE_S": "300",
    }
    api = await fleet.open()
    (engine,) = await fleet.provision(api, "ann")
    await fleet.remember(engine)
    # Docker waits twice as long before each further restart of what dies at once.
    await fleet.flags(engine, unready_for=300, crash_after=0.05)
    await fleet.crash(engine)
    await fleet.becomes(engine, "failed", "exited")
    (failed,) = await fleet.audit(engine, "health_failed")
    assert failed["metadata"]["reason"] == "exited"
    assert "down for" in failed["metadata"]["message"]
    await fleet.flags(engine)
    fleet.variables["ORCH_BOOT_TIMEOUT_S"] = "40"
    await fleet.close_planes()
    api = await fleet.open()
    assert (await api.post("/engines/ann/recover"))[0] == 200
    await fleet.remembers(api, engine)


@pytest.fixture
def stillborn() -> Iterator[str]:
    """An image whose command exits at once."""
    image = "engine-orchestrator-mimic:stillborn"
    recipe = 'FROM engine-orchestrator-mimic:1\nCMD ["sh", "-c", "echo this image is broken; exit 7"]\n'
    docker("build", "--quiet", "--tag", image, "-", given=recipe.encode())
    yield image
    docker("image", "rm", "--no-prune", image, check=False)


async def test_an_image_whose_command_exits_at_once(fleet: Fleet, stillborn: str) -> None:
    api = await fleet.open(policy={"allowed_images": ["*"]})
    body = {"user_id": "ann", "engine_version": stillborn}
    status, answer = await api.post("/engines/provision", body)
    assert (status, answer["error"]["code"]) == (502, "BACKEND_ERROR"), answer
    assert answer["error"]["details"]["reason"] == "exited"
    (_, found) = await api.get("/engines/ann")
    assert found["status"] == "failed"
    (again,) = await fleet.provision(api, "ann")
    assert str(again.id) == found["engine_id"]
    rows = await fleet.audit(again, "provision_failed")
    assert len(rows) == 1
    assert "this image is broken" in rows[0]["metadata"]["log"]
    assert not {"auto_restart_start", "reconcile_adopt"} & set(await fleet.actions(again))
    await fleet.remember(again)
    await fleet.remembers(api, again)
