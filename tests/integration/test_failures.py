"""What can go wrong with an engine, its data, the backend and the database, and the state that follows."""

from __future__ import annotations

import asyncio
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from orchestrator.errors import BackendUnavailable, DatabaseUnavailable
from orchestrator.lifecycle import operations
from tests.integration.steps import (
    PASSTHROUGH,
    accepts,
    appears,
    boots_fail,
    data_of,
    disagreements,
    error,
    pid_of,
    reaches,
    settled,
)

if TYPE_CHECKING:
    from tests.integration.conftest import Api, Served

AWAY = (503, "BACKEND_UNAVAILABLE")


@pytest.fixture
def variables(variables: dict[str, str]) -> dict[str, str]:
    return variables | PASSTHROUGH | {"ORCH_LEASE_S": "1.5", "ORCH_BOOT_TIMEOUT_S": "3"}


def away_once(served: Served, method: str, *, after: bool = False) -> None:
    """The next call of the backend's method gets no answer; `after`: though it has its effect."""
    backend: Any = served.plane.backend
    real = getattr(backend, method)

    async def away(*args: Any, **options: Any) -> Any:
        setattr(backend, method, real)
        if after:
            await real(*args, **options)
        raise BackendUnavailable("The backend does not answer.")

    setattr(backend, method, away)


async def test_a_boot_that_exits(api: Api, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async with boots_fail(monkeypatch):
        status, body = await api.post("/engines/provision", {"user_id": "ann"})
    assert (status, body["error"]["code"], body["error"]["details"]["reason"]) == (502, "BACKEND_ERROR", "exited")
    _, failed = await api.get("/engines/ann")
    assert failed["status"] == "failed"
    assert await disagreements(served.deployment) == []
    status, again = await api.post("/engines/provision", {"user_id": "ann", "engine_version": "mimic:2"})
    assert status == 200
    assert [again[name] for name in ("engine_id", "url", "api_key")] == [
        failed[name] for name in ("engine_id", "url", "api_key")
    ]
    assert (await api.get("/engines/ann"))[1]["engine_version"] == "mimic:2"
    assert await accepts(again, again["api_key"])


@pytest.mark.parametrize("flag", ["MIMIC_FAIL_HEALTH", "MIMIC_UNREADY_FOR"])
async def test_a_boot_that_is_never_healthy(
    api: Api, served: Served, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.setenv(flag, "60")
    assert error(await api.post("/engines/provision", {"user_id": "ann"})) == (504, "BOOT_TIMEOUT")
    assert await api.status_of("ann") == "failed"
    assert await disagreements(served.deployment) == []


async def test_a_backend_that_is_away_fails_no_engine(api: Api, served: Served) -> None:
    engine = await api.provision("ann")
    away_once(served, "stop")
    assert error(await api.post("/engines/ann/stop")) == AWAY
    assert await api.status_of("ann") == "running"
    away_once(served, "freeze")
    assert error(await api.post("/engines/ann/sleep")) == AWAY
    assert await api.status_of("ann") == "running"
    await api.post("/engines/ann/sleep")
    away_once(served, "thaw")
    assert error(await api.post("/engines/ann/admit", {"auto_wake": True})) == AWAY
    assert await api.status_of("ann") == "sleeping"
    assert (await api.admit("ann"))["admitted"]
    assert await disagreements(served.deployment) == []
    assert await accepts(engine, engine["api_key"])


async def test_a_start_without_an_answer_leaves_nothing_running(api: Api, served: Served) -> None:
    await api.provision("ann")
    await api.post("/engines/ann/stop")
    away_once(served, "start", after=True)
    assert error(await api.post("/engines/ann/start")) == AWAY
    assert await api.status_of("ann") == "stopped"
    assert await disagreements(served.deployment) == []


async def test_a_destroy_is_tried_again_until_it_is_done(api: Api, served: Served) -> None:
    await api.provision("ann")
    away_once(served, "destroy")
    assert error(await api.call("DELETE", "/engines/ann")) == AWAY
    await reaches(api, "ann", "destroyed")
    assert await disagreements(served.deployment) == []


async def test_a_rotation_is_tried_again_until_it_is_done(api: Api, served: Served) -> None:
    engine = await api.provision("ann")
    served.deployment.mimic_flags(engine["engine_id"], no_admin=True)
    away_once(served, "stop")
    assert error(await api.post("/engines/ann/rotate-key")) == AWAY
    await settled(served.deployment)
    newest = (await api.get("/engines/ann"))[1]["api_key"]
    assert newest != engine["api_key"]
    assert await accepts(engine, newest)
    assert not await accepts(engine, engine["api_key"])


async def test_missing_data_is_never_replaced_by_an_empty_brain(api: Api, served: Served) -> None:
    engine = await api.provision("ann")
    await api.post("/engines/ann/stop")
    folder = data_of(served.deployment, engine["engine_id"])
    shutil.rmtree(folder)
    for _ in range(2):
        status, body = await api.post("/engines/ann/start")
        assert (status, body["error"]["details"]["reason"]) == (502, "data_missing")
        assert await api.status_of("ann") == "failed"
        assert not folder.exists()


async def test_an_engine_that_ignores_sigterm_is_killed(
    api: Api, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "STOP_GRACE_S", 1)
    engine = await api.provision("ann")
    served.deployment.mimic_flags(engine["engine_id"], ignore_sigterm=True)
    await pid_of(engine)  # it has read its flags
    assert (await api.post("/engines/ann/stop"))[0] == 200
    assert await disagreements(served.deployment) == []


async def test_the_database_goes_away_in_the_middle_of_a_boot(
    api: Api, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIMIC_UNREADY_FOR", "1")
    boot = asyncio.create_task(api.post("/engines/provision", {"user_id": "ann"}))
    await appears(api, "ann")

    async def away(*_: Any) -> Any:
        raise DatabaseUnavailable

    with monkeypatch.context() as patch:
        patch.setattr(served.plane.database, "_run", away)
        assert error(await api.get("/engines/ann")) == (503, "DATABASE_UNAVAILABLE")
        await asyncio.wait([boot])  # the lease runs out without a word from the database
    await settled(served.deployment)
    assert await api.status_of("ann") == "running"
    assert await disagreements(served.deployment) == []
