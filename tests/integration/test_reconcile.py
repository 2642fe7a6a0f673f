"""The registry against what really runs: differences are repaired, orphans handled, nothing is guessed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest

from orchestrator.backends.base import ObjectState
from orchestrator.backends.subprocess_backend import SubprocessBackend
from orchestrator.errors import BackendError
from orchestrator.loops import reconcile
from tests.integration.conftest import settings_of
from tests.integration.steps import (
    accepts,
    data_of,
    database,
    disagreements,
    objects_of,
    pid_of,
    reaches,
    settled,
    until,
)

if TYPE_CHECKING:
    from orchestrator.backends.base import BackendObject
    from tests.integration.conftest import Api, Deployment, Served


@pytest.fixture
def variables(variables: dict[str, str]) -> dict[str, str]:
    return variables | {"ORCH_HEALTH_CHECK_INTERVAL_S": "3600"}  # nobody but the reconcile loop finds it


async def actions(deployment: Deployment, engine_id: str) -> list[str]:
    async with database(deployment) as connection:
        rows = await connection.fetch("SELECT action FROM audit_log WHERE engine_id = $1::uuid ORDER BY id", engine_id)
    return [row["action"] for row in rows]


async def killed(deployment: Deployment, engine: dict[str, Any]) -> None:
    """By somebody's hand, and gone."""
    os.kill(await pid_of(engine), signal.SIGKILL)

    async def gone() -> bool:
        found = (await objects_of(deployment)).get(UUID(engine["engine_id"]))
        return found is None or found.state is ObjectState.EXITED

    await until(gone)


async def reconciled(served: Served) -> None:
    """One pass, and all that it began is over."""
    await reconcile.reconcile(served.plane.means, served.plane.healing)
    await settled(served.deployment)


async def test_what_agrees_is_left_alone(api: Api, served: Served) -> None:
    engines = [await api.provision(name) for name in ("running", "sleeping", "stopped")]
    pid = await pid_of(engines[0])
    await api.post("/engines/sleeping/sleep")
    await api.post("/engines/stopped/stop")
    assert await reconcile.plan(served.plane.means) == []
    await reconciled(served)
    assert await pid_of(engines[0]) == pid
    assert await disagreements(served.deployment) == []


async def test_each_ends_as_the_registry_says(api: Api, served: Served) -> None:
    """By somebody's hand every object is in the wrong state; afterwards each is as its row says."""
    names = ("killed", "frozen", "thawed", "started")
    engines = {name: await api.provision(name) for name in names}
    for engine in engines.values():
        await api.post(f"/engines/{engine['user_id']}/keep-alive", {"seconds": 3600})
    await api.post("/engines/thawed/sleep")
    await api.post("/engines/started/stop")
    backend = served.plane.backend
    await killed(served.deployment, engines["killed"])
    await backend.freeze(UUID(engines["frozen"]["engine_id"]))
    await backend.thaw(UUID(engines["thawed"]["engine_id"]))
    await backend.start(UUID(engines["started"]["engine_id"]))
    steps = {step.user_id: step.action.value for step in await reconcile.plan(served.plane.means)}
    assert steps == {"killed": "restart", "frozen": "thaw", "thawed": "freeze", "started": "stop"}
    await reconciled(served)
    assert await disagreements(served.deployment) == []
    states = {name: await api.status_of(name) for name in names}
    assert states == {"killed": "running", "frozen": "running", "thawed": "sleeping", "started": "stopped"}
    for name in ("frozen", "thawed", "started"):
        assert "reconcile_adopt" in await actions(served.deployment, engines[name]["engine_id"])
    assert await accepts(engines["killed"], engines["killed"]["api_key"])


async def test_thawed_and_at_work_it_stays_awake(api: Api, served: Served) -> None:
    engine = await api.provision("ann")
    served.deployment.mimic_flags(engine["engine_id"], busy=1)
    async with database(served.deployment) as connection:
        await connection.execute("UPDATE engines SET status = 'sleeping'")
    await reconciled(served)
    assert await api.status_of("ann") == "running"
    assert await disagreements(served.deployment) == []


async def test_a_brain_that_is_missing_is_never_made_anew(api: Api, served: Served) -> None:
    engine = await api.provision("ann")
    await killed(served.deployment, engine)
    shutil.move(data_of(served.deployment, engine["engine_id"]), served.deployment.tmp_path / "moved")
    await reconciled(served)
    assert await api.status_of("ann") == "failed"
    async with database(served.deployment) as connection:
        error = json.loads(await connection.fetchval("SELECT last_error FROM engines"))
    assert error["details"]["reason"] == "data_missing"
    shutil.move(served.deployment.tmp_path / "moved", data_of(served.deployment, engine["engine_id"]))
    assert (await api.post("/engines/ann/recover"))[0] == 200


# --- orphans --------------------------------------------------------------------------------------------


@pytest.fixture
async def orphan(served: Served, api: Api) -> str:
    """A running engine whose row is gone: as after a restore of an older database."""
    engine = await api.provision("lost")
    async with database(served.deployment) as connection:
        await connection.execute("DELETE FROM engines")
    return str(engine["engine_id"])


async def test_an_orphan_is_reported_then_stopped_and_its_data_kept(served: Served, orphan: str) -> None:
    deployment = served.deployment
    for _ in range(3):
        await reconciled(served)
    assert await actions(deployment, orphan) == ["provision", "reconcile_orphan"], "reported once"
    assert (await objects_of(deployment))[UUID(orphan)].state is ObjectState.RUNNING
    async with database(deployment) as connection:
        await connection.execute("UPDATE orphans SET seen_at = now() - interval '11 minutes'")
    await reconciled(served)
    assert (await objects_of(deployment))[UUID(orphan)].state is ObjectState.EXITED
    await reconciled(served)
    assert (await actions(deployment, orphan)).count("reconcile_orphan") == 2, "reported, and stopped"
    assert data_of(deployment, orphan).is_dir()


async def test_orphans_do_not_wait_for_each_others_end(
    served: Served, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    for user_id in ("ann", "bob", "eve"):
        await api.provision(user_id)
    stop, all_at_once = served.plane.healing.stop_orphan, asyncio.Barrier(3)

    async def stop_orphan(orphan: BackendObject) -> None:
        await all_at_once.wait()
        await stop(orphan)

    monkeypatch.setattr(served.plane.healing, "stop_orphan", stop_orphan)
    async with database(served.deployment) as connection:
        await connection.execute("DELETE FROM engines")
        await reconciled(served)
        await connection.execute("UPDATE orphans SET seen_at = now() - interval '11 minutes'")
    async with asyncio.timeout(60):
        await reconciled(served)
    found = await objects_of(served.deployment)
    assert [one.state for one in found.values()] == [ObjectState.EXITED] * 3


async def test_an_orphan_with_a_tombstone_goes_with_its_data(served: Served, orphan: str) -> None:
    async with database(served.deployment) as connection:
        await connection.execute(
            "INSERT INTO tombstones (engine_id, product_id, user_id, location_id, incarnation)"
            " VALUES ($1::uuid, $2, 'lost', $3, 1)",
            orphan,
            uuid4(),
            served.plane.means.location_id,
        )
    await reconciled(served)
    assert await objects_of(served.deployment) == {}
    assert not data_of(served.deployment, orphan).exists()


async def test_objects_of_another_deployment_are_never_touched(api: Api, served: Served) -> None:
    """The same data root, a fresh database: what it does not own it does not even list."""
    settings = settings_of(served.deployment.variables)
    theirs = SubprocessBackend.from_settings(settings, uuid4())
    await theirs.open()
    engine_id = uuid4()
    environment = {"ENGINE_KEY_HASH": "0" * 64, "ENGINE_KEY_GENERATION": "1", "ENGINE_INCARNATION": "1"}
    port = settings.port_max
    await theirs.create(engine_id, port, environment, "mimic:1")
    try:
        assert engine_id not in await objects_of(served.deployment)
        assert await reconcile.plan(served.plane.means, purge=True) == []
        await reconciled(served)
        assert await theirs.is_running(engine_id)
    finally:
        await theirs.destroy(engine_id)
        await theirs.close()


async def test_nothing_is_touched_at_another_place(api: Api, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await api.provision("ann")

    async def elsewhere() -> UUID:
        return uuid4()

    monkeypatch.setattr(served.plane.backend, "location_id", elsewhere)
    with pytest.raises(BackendError, match="another"):
        await reconcile.reconcile(served.plane.means, served.plane.healing)
    assert await accepts(engine, engine["api_key"])


async def test_an_engine_provisioned_meanwhile_is_no_orphan(
    api: Api, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = served.plane.registry.engines
    rows = await registry.here(served.plane.means.location_id)
    await api.provision("ann")

    async def former(*_: Any) -> Any:
        return rows

    with monkeypatch.context() as patch:
        patch.setattr(registry, "here", former)
        assert await reconcile.plan(served.plane.means, purge=True) == []


# --- the command ----------------------------------------------------------------------------------------


def command(deployment: Deployment, *arguments: str, answer: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", "reconcile", *arguments],
        env={"PATH": os.environ["PATH"], **deployment.variables},
        cwd=deployment.tmp_path,
        input=answer,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


async def test_the_command_shows_the_plan_and_carries_it_out(deployment: Deployment) -> None:
    replica = await deployment.serve()
    api = await deployment.product(replica.url)
    engine = await api.provision("ann")
    replica.kill()
    await killed(deployment, engine)
    shown = await asyncio.to_thread(command, deployment, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "ann" in shown.stdout
    assert "restart" in shown.stdout
    found = await objects_of(deployment)
    assert found[UUID(engine["engine_id"])].state is ObjectState.EXITED, "a dry run changes nothing"
    plan = json.loads((await asyncio.to_thread(command, deployment, "--dry-run", "--json")).stdout)
    assert [(row["user_id"], row["action"]) for row in plan["differences"]] == [("ann", "restart")]
    done = await asyncio.to_thread(command, deployment)
    assert done.returncode == 0, done.stderr
    assert await disagreements(deployment) == []
    assert "agree" in (await asyncio.to_thread(command, deployment)).stdout


async def test_purge_asks_before_data_is_removed(served: Served, orphan: str) -> None:
    refused = await asyncio.to_thread(command, served.deployment, "--purge", answer="n\n")
    assert refused.returncode == 1
    assert data_of(served.deployment, orphan).is_dir()
    done = await asyncio.to_thread(command, served.deployment, "--purge", "--yes")
    assert done.returncode == 0, done.stderr
    assert not data_of(served.deployment, orphan).exists()
    assert await objects_of(served.deployment) == {}


async def test_found_by_the_loop_itself(deployment: Deployment) -> None:
    """At the start of a process the first pass comes at once."""
    replica = await deployment.serve()
    api = await deployment.product(replica.url)
    engine = await api.provision("ann")
    replica.kill()
    os.kill(await pid_of(engine), signal.SIGSTOP)
    api = deployment.api((await deployment.serve()).url, api.headers)

    async def thawed() -> bool:
        return "reconcile_adopt" in await actions(deployment, engine["engine_id"])

    await until(thawed)
    await reaches(api, "ann", "running")
    assert await accepts(engine, engine["api_key"])
