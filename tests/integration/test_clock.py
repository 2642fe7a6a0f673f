"""The database's clock jumps an hour, forward or back: nobody is put to sleep, every probe goes on, nothing is lost.

The clock is that of the database alone: its functions are hidden by ones that add what the test says.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from orchestrator.control_plane import ControlPlane
from tests.integration.conftest import settings_of
from tests.integration.steps import PASSTHROUGH, appears, database, disagreements, heal, reaches, settled, until

if TYPE_CHECKING:
    from tests.integration.conftest import Api, Deployment, Served

WARP = """
CREATE SCHEMA warped;
CREATE TABLE warped.jump (by interval NOT NULL);
INSERT INTO warped.jump VALUES ('0 s');
CREATE FUNCTION warped.now() RETURNS timestamptz LANGUAGE sql STABLE
    AS 'SELECT pg_catalog.now() + by FROM warped.jump';
CREATE FUNCTION warped.statement_timestamp() RETURNS timestamptz LANGUAGE sql STABLE
    AS 'SELECT pg_catalog.statement_timestamp() + by FROM warped.jump';
CREATE FUNCTION warped.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE
    AS 'SELECT pg_catalog.clock_timestamp() + by FROM warped.jump';
"""
HOURS = [1, -1]


@pytest.fixture
async def variables(variables: dict[str, str]) -> dict[str, str]:
    url = variables["ORCH_DATABASE_URL"]
    connection = await asyncpg.connect(url)
    await connection.execute(WARP)
    name = urlsplit(url).path.removeprefix("/")
    await connection.execute(f'ALTER DATABASE "{name}" SET search_path = warped, pg_catalog, public')
    await connection.close()
    return (
        variables
        | PASSTHROUGH
        | {
            "ORCH_LEASE_S": "2",
            "ORCH_IDLE_SLEEP_THRESHOLD_S": "600",
            "ORCH_IDLE_STOP_THRESHOLD_S": "900",
            "ORCH_HEALTH_CHECK_INTERVAL_S": "1",
            "ORCH_RESTART_BACKOFF_BASE_S": "0.3",
        }
    )


async def jump(deployment: Deployment, hours: int) -> None:
    async with database(deployment) as connection:
        before = await connection.fetchval("SELECT now()")
        await connection.execute("UPDATE warped.jump SET by = by + make_interval(hours => $1)", hours)
        after = await connection.fetchval("SELECT now()")
    assert abs((after - before).total_seconds()) > 3500  # the clock is really that of the queries


async def all_probed_anew(deployment: Deployment, times: int) -> None:
    """Every running engine has been found well at as many different times, from now on."""
    seen: dict[str, set[Any]] = {}
    async with database(deployment) as connection:

        async def look() -> bool:
            for row in await connection.fetch("SELECT user_id, last_health_at FROM engines WHERE status = 'running'"):
                seen.setdefault(row["user_id"], set()).add(row["last_health_at"])
            return all(len(moments) > times for moments in seen.values())

        await until(look, 60)


@pytest.mark.parametrize("hours", HOURS)
async def test_nobody_falls_asleep_and_every_probe_goes_on(api: Api, served: Served, hours: int) -> None:
    deployment = served.deployment
    users = [f"user-{number}" for number in range(6)]
    engines = await asyncio.gather(*(api.provision(user_id) for user_id in [*users, "asleep", "stopped"]))
    for engine in engines[:3]:  # these tell nothing of their activity: only the database's times speak for them
        deployment.mimic_flags(engine["engine_id"], no_activity=True)
    await api.post("/engines/asleep/sleep")
    await api.post("/engines/stopped/stop")
    await asyncio.gather(*(api.admit(user_id) for user_id in users))
    await all_probed_anew(deployment, 1)
    for each in (hours, -hours):
        await jump(deployment, each)
        await all_probed_anew(deployment, 3)
        await settled(deployment)
        states = {user_id: await api.status_of(user_id) for user_id in [*users, "asleep", "stopped"]}
        assert states == {**dict.fromkeys(users, "running"), "asleep": "sleeping", "stopped": "stopped"}
        assert await disagreements(deployment) == []
        async with database(deployment) as connection:
            assert await connection.fetchval("SELECT count(*) FROM audit_log WHERE action = 'sleep'") == 1
            assert await connection.fetchval("SELECT count(*) FROM engines WHERE unloaded_at IS NOT NULL") == 0
    assert (await api.admit("asleep"))["admitted"]


@pytest.mark.parametrize("hours", HOURS)
async def test_what_is_under_way_ends_once(
    api: Api, served: Served, hours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two replicas; whichever of them holds the lease in the end."""
    deployment = served.deployment
    other = ControlPlane(settings_of(deployment.variables))
    await other.open()
    try:
        with monkeypatch.context() as patch:
            patch.setenv("MIMIC_FAIL_HEALTH", "1")
            boot = asyncio.create_task(api.post("/engines/provision", {"user_id": "ann"}))
            engine_id = await appears(api, "ann")
            record = deployment.tmp_path / "data" / "engines" / f"{engine_id}.process"

            async def spawned() -> bool:
                return record.exists()

            await until(spawned)
        await jump(deployment, hours)
        await heal(deployment, engine_id)
        assert (await boot)[0] == 200
        await settled(deployment)
        assert await api.status_of("ann") == "running"
        assert await disagreements(deployment) == []
        async with database(deployment) as connection:
            assert await connection.fetchval("SELECT count(*) FROM audit_log WHERE action = 'provision'") == 1
    finally:
        await other.close()


@pytest.mark.parametrize("hours", HOURS)
async def test_an_engine_that_died_is_restarted_whatever_the_clock_says(api: Api, served: Served, hours: int) -> None:
    engine = await api.provision("ann")
    await served.plane.loops.stop()
    served.deployment.mimic_flags(engine["engine_id"], crash_after=0.01)
    row = (await served.plane.registry.engines.here(served.plane.means.location_id))[0]
    assert await served.plane.healing.fail(row["id"], row["lease_generation"], "exited", "for this test")
    await settled(served.deployment)
    assert await api.status_of("ann") == "failed"
    served.deployment.mimic_flags(engine["engine_id"])
    async with database(served.deployment) as connection:  # its restart is due in five minutes
        await connection.execute("UPDATE engines SET next_restart_at = now() + interval '4 minutes'")
    await jump(served.deployment, hours)
    served.plane.loops.start()
    await reaches(api, "ann", "running")
    assert (await api.admit("ann"))["admitted"]
