"""The daemon goes away and returns, with everything in it: each engine ends as the registry says, with its brain."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

import pytest

from tests.docker.daemon import require_docker
from tests.docker.fleet import Engine, Fleet, until
from tests.docker.second_daemon import SecondDaemon, second_daemon

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.integration.conftest import Api

pytestmark = pytest.mark.timeout(300)

# What says that an engine itself was taken for broken.
BLAMED = {"health_failed", "auto_restart_failed", "auto_restart_gave_up", "auto_restart_parked", "port_changed"}


@pytest.fixture(scope="module")
def second() -> Iterator[SecondDaemon]:
    require_docker()
    with second_daemon() as made:
        yield made


@pytest.fixture
async def fleet(
    variables: dict[str, str], second: SecondDaemon, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Fleet]:
    for name in ("DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DOCKER_HOST", second.cli_host)
    variables |= {
        "ORCH_ENGINE_HOST": second.address,
        "ORCH_ENGINE_PUBLISH_ADDRESS": second.address,
        # Three probes fail long before a daemon is back.
        "ORCH_HEALTH_CHECK_INTERVAL_S": "0.3",
        "ORCH_HEALTH_CHECK_TIMEOUT_S": "5",
        "ORCH_RESTART_BACKOFF_BASE_S": "300",
        "ORCH_RESTART_BACKOFF_MAX_S": "300",
    }
    made = Fleet(variables, cli_host=second.cli_host)
    try:
        yield made
    finally:
        await made.close()


async def one_of_each(fleet: Fleet, api: Api) -> dict[str, Engine]:
    """An engine in each state to stay in, all with a brain; `unloaded` sleeps without a process."""
    names = ("running", "sleeping", "unloaded", "stopped", "failed")
    engines = dict(zip(names, await fleet.provision(api, *names), strict=True))
    for engine in engines.values():
        await fleet.remember(engine)
    assert (await api.post("/engines/sleeping/sleep"))[0] == 200
    assert (await api.post("/engines/unloaded/sleep"))[0] == 200
    await fleet.becomes(engines["unloaded"], "sleeping", "paused")
    plane = fleet.planes[0]
    assert await plane.healing.unload(
        engines["unloaded"].id, (await fleet.row(engines["unloaded"]))["lease_generation"]
    )
    assert (await api.post("/engines/stopped/stop"))[0] == 200
    await fleet.flags(engines["failed"], crash_after=0.1, unready_for=300)
    await fleet.crash(engines["failed"])
    await all_as_they_were(fleet, engines)
    await fleet.flags(engines["failed"])
    return engines


async def all_as_they_were(fleet: Fleet, engines: dict[str, Engine], asleep: tuple[str, ...] = ("paused",)) -> None:
    for name, (status, states) in {
        "running": ("running", ("running",)),
        "sleeping": ("sleeping", asleep),
        "unloaded": ("sleeping", ("exited",)),
        "stopped": ("stopped", ("exited",)),
        "failed": ("failed", ("exited",)),
    }.items():
        await fleet.becomes(engines[name], status, *states)


async def probed(fleet: Fleet, engine: Engine, times: int) -> None:
    """So many further probes of it were due."""
    seen = set()

    async def holds() -> bool:
        seen.add((await fleet.row(engine))["next_probe_at"])
        return len(seen) > times

    await until(holds, lambda: fleet.story(engine))


async def all_remember(fleet: Fleet, api: Api, engines: dict[str, Engine]) -> None:
    assert (await api.post("/engines/stopped/start"))[0] == 200
    assert (await api.post("/engines/failed/recover"))[0] == 200
    for engine in engines.values():
        await fleet.remembers(api, engine)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
async def test_restarted(fleet: Fleet, second: SecondDaemon, end: signal.Signals) -> None:
    """Its containers go down with it. It brings up what ran, frozen or not; what it does not, we do."""
    await asyncio.to_thread(second.restart, live_restore=False)
    api = await fleet.open()
    await fleet.open()
    engines = await one_of_each(fleet, api)
    before = {name: await fleet.actions(engine) for name, engine in engines.items()}
    await asyncio.to_thread(second.stop, end)
    # Away for longer than it takes an engine to fail, twice over.
    await probed(fleet, engines["running"], 8)
    assert (await fleet.row(engines["running"]))["status"] == "running"
    assert (await api.admit("running"))["admitted"]
    status, answer = await api.post("/engines/stopped/start")
    assert (status, answer["error"]["code"]) == (503, "BACKEND_UNAVAILABLE")
    assert (await api.get("/engines/stopped"))[1]["status"] == "stopped"
    await asyncio.to_thread(second.start)
    # A daemon that was killed forgets to start again what was frozen: it sleeps on, and wakes by a start.
    asleep = ("paused",) if end == signal.SIGTERM else ("paused", "exited")
    await all_as_they_were(fleet, engines, asleep)
    await probed(fleet, engines["running"], 4)
    await all_as_they_were(fleet, engines, asleep)
    for name, engine in engines.items():
        told = (await fleet.actions(engine))[len(before[name]) :]
        assert not BLAMED & set(told), (name, told)
        assert (await fleet.row(engine))["restart_parked_until"] is None
    await all_remember(fleet, api, engines)


async def test_engines_that_outlive_the_daemon_are_left_alone(fleet: Fleet, second: SecondDaemon) -> None:
    """`live-restore`: only what dies meanwhile is to be mended."""
    await asyncio.to_thread(second.restart, live_restore=True)
    api = await fleet.open()
    engines = await one_of_each(fleet, api)
    (victim,) = await fleet.provision(api, "victim")
    await fleet.remember(victim)
    before = {name: await fleet.actions(engine) for name, engine in engines.items()}
    run = (await fleet.ask(engines["running"], "GET", "/me")).json()["run"]
    await asyncio.to_thread(second.stop)
    await fleet.crash(victim)
    await probed(fleet, victim, 8)
    assert (await fleet.row(victim))["status"] == "running"
    await asyncio.to_thread(second.start)
    await fleet.becomes(victim, "running", "running")
    await all_as_they_were(fleet, engines)
    await fleet.remembers(api, victim)
    assert not BLAMED & set(await fleet.actions(victim)), await fleet.actions(victim)
    assert (await fleet.ask(engines["running"], "GET", "/me")).json()["run"] == run
    for name, engine in engines.items():
        assert await fleet.actions(engine) == before[name]
    await all_remember(fleet, api, engines)


async def test_a_daemon_that_hangs_blames_no_engine(fleet: Fleet, second: SecondDaemon) -> None:
    await asyncio.to_thread(second.restart, live_restore=True)
    api = await fleet.open()
    well, ill = await fleet.provision(api, "well", "ill")
    for engine in (well, ill):
        await fleet.remember(engine)
    await fleet.flags(ill, fail_health=True)
    second.signal(signal.SIGSTOP)
    try:
        started = (await fleet.row(ill))["consecutive_failures"]
        await probed(fleet, ill, 4)
        assert (await fleet.row(ill))["status"] == "running"
        assert (await fleet.row(ill))["consecutive_failures"] <= started + 2  # looks under way as it stopped
    finally:
        second.signal(signal.SIGCONT)
    await fleet.flags(ill)
    for engine in (well, ill):
        await fleet.becomes(engine, "running", "running")
        await fleet.remembers(api, engine)
    # The stream of events is there again, or was never lost: a hand is seen without waiting for the next look.
    await fleet.docker("stop", well.container)
    await fleet.does(well, "reconcile_adopt")
    await fleet.becomes(well, "running", "running")
    await fleet.remembers(api, well)


async def test_a_container_that_its_last_run_spoilt_is_made_anew(fleet: Fleet, second: SecondDaemon) -> None:
    """A daemon that ends in the middle of a start leaves a folder, and no later start gets past it."""
    await asyncio.to_thread(second.restart, live_restore=True)
    api = await fleet.open()
    (engine,) = await fleet.provision(api, "spoilt")
    await fleet.remember(engine)
    assert (await api.post("/engines/spoilt/stop"))[0] == 200
    container = await fleet.docker("inspect", "--format", "{{.Id}}", engine.container)
    (second.runs / container.strip()).mkdir()
    status, answer = await api.post("/engines/spoilt/start")
    assert status == 200, answer
    await fleet.remembers(api, engine)
    assert await fleet.docker("inspect", "--format", "{{.Id}}", engine.container) != container
