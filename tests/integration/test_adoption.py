"""The end of an orchestrator, however it comes, stops no engine; the next one adopts what runs."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.integration.steps import accepts, appears, database, disagreements, pid_of, reaches, until

if TYPE_CHECKING:
    from tests.integration.conftest import Deployment, Replica


def hang_up(replica: Replica) -> None:
    """The terminal is closed: SIGHUP to everything in it."""
    os.killpg(replica.process.pid, signal.SIGHUP)
    replica.process.wait(30)


def interrupt(replica: Replica) -> None:
    os.killpg(replica.process.pid, signal.SIGINT)
    assert replica.process.wait(30) == 0


def terminate(replica: Replica) -> None:
    assert replica.stop() == 0


@pytest.mark.parametrize("end", ["kill", "hang_up", "interrupt", "terminate"])
async def test_engines_run_on_and_are_adopted(deployment: Deployment, end: str) -> None:
    first = await deployment.serve()
    api = await deployment.product(first.url)
    running, sleeping, stopped = [await api.provision(name) for name in ("running", "sleeping", "stopped")]
    pids = {engine["user_id"]: await pid_of(engine) for engine in (running, sleeping)}
    await api.post("/engines/sleeping/sleep")
    await api.post("/engines/stopped/stop")
    {"kill": lambda one: one.kill(), "hang_up": hang_up, "interrupt": interrupt, "terminate": terminate}[end](first)
    assert await pid_of(running) == pids["running"]
    second = await deployment.serve()
    api = deployment.api(second.url, api.headers)
    assert await disagreements(deployment) == []
    for engine in (running, sleeping):
        admitted = (await api.admit(engine["user_id"]))["engine"]
        assert [admitted[name] for name in ("engine_id", "url", "api_key")] == [
            engine[name] for name in ("engine_id", "url", "api_key")
        ]
        assert await pid_of(admitted) == pids[engine["user_id"]]
    assert await api.status_of("stopped") == "stopped"
    assert (await api.post("/engines/stopped/start"))[1]["url"] == stopped["url"]
    assert await accepts(stopped, stopped["api_key"])


async def test_an_engine_that_died_meanwhile_is_brought_up_again(deployment: Deployment) -> None:
    first = await deployment.serve()
    api = await deployment.product(first.url)
    engine = await api.provision("ann")
    pid = await pid_of(engine)
    first.kill()
    os.kill(pid, signal.SIGKILL)
    second = await deployment.serve()
    api = deployment.api(second.url, api.headers)

    async def another() -> bool:
        status, _ = await api.get("/engines/ann/wait", params={"status": "running"})
        return status == 200 and "auto_restart_start" in await actions(deployment)

    await until(another)
    await reaches(api, "ann", "running")
    assert await pid_of(engine) != pid
    assert await disagreements(deployment) == []


async def actions(deployment: Deployment) -> list[str]:
    async with database(deployment) as connection:
        return [row["action"] for row in await connection.fetch("SELECT action FROM audit_log ORDER BY id")]


async def test_a_boot_under_way_is_handed_over_at_sigterm(deployment: Deployment) -> None:
    deployment.variables |= {"ORCH_ENGINE_ENV_PASSTHROUGH": "MIMIC_UNREADY_FOR", "ORCH_BOOT_TIMEOUT_S": "60"}
    first = await deployment.serve(MIMIC_UNREADY_FOR="2")
    api = await deployment.product(first.url)
    boot = asyncio.create_task(api.post("/engines/provision", {"user_id": "ann"}))
    await appears(api, "ann")
    first.process.send_signal(signal.SIGTERM)
    assert (await boot)[0] == 200  # what is under way may finish
    assert await asyncio.to_thread(first.process.wait, 40) == 0


async def test_another_data_root_is_refused(deployment: Deployment) -> None:
    first = await deployment.serve()
    api = await deployment.product(first.url)
    await api.provision("ann")
    first.kill()
    environment = {
        "PATH": os.environ["PATH"],
        **deployment.variables,
        "ORCH_DATA_ROOT": str(deployment.tmp_path / "elsewhere"),
        "ORCH_PORT": "0",
    }
    refused = subprocess.run(
        [sys.executable, "-m", "orchestrator", "serve"],
        env=environment,
        cwd=deployment.tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert refused.returncode != 0
    assert "ORCH_DATA_ROOT" in refused.stderr
    assert "Traceback" not in refused.stdout + refused.stderr


async def test_an_engine_of_another_location_is_left_to_a_process_there(deployment: Deployment) -> None:
    here = await deployment.serve()
    elsewhere = await deployment.serve(ORCH_DATA_ROOT=str(deployment.tmp_path / "elsewhere"))
    api = await deployment.product(here.url)
    away = deployment.api(elsewhere.url, api.headers)
    engine = await api.provision("ann")
    for call in ("stop", "start", "sleep", "start", "rotate-key"):
        status, body = await away.post(f"/engines/ann/{call}")
        assert status == 200, (call, body)
    assert await away.status_of("ann") == "running"
    assert await disagreements(deployment) == []
    assert (await away.call("DELETE", "/engines/ann")) == (
        200,
        {"status": "destroyed", "engine_id": engine["engine_id"]},
    )
    assert await disagreements(deployment) == []
