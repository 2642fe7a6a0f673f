"""The whole orchestrator on a real Docker Engine: what an image, a policy or a lost answer of the daemon leads to."""

from __future__ import annotations

import asyncio
import json
import tempfile
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import httpx
import pytest

from orchestrator.backends.base import ObjectState
from orchestrator.backends.docker_host import find_docker_host
from tests.docker.daemon import IMAGE, docker, inspect, missing
from tests.docker.plane import docker_plane
from tests.docker.test_pull import OPEN, pushed, registries_answer
from tests.integration.steps import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.docker.harness import DockerHarness
    from tests.docker.plane import Place

pytestmark = pytest.mark.timeout(300)


async def timeline(place: Place, user_id: str = "ann") -> dict[str, Any]:
    status, body = await place.api.get(f"/engines/{user_id}/timeline")
    assert status == 200, body
    return dict(body)


def names(told: dict[str, Any]) -> list[str]:
    return [phase["name"] for phase in told["phases"]]


async def container_of(place: Place, engine: dict[str, Any]) -> dict[str, Any]:
    found = await place.plane.backend.find(UUID(engine["engine_id"]))
    assert found is not None
    return inspect(found.endpoint.container_id or "")


async def test_the_phases_of_a_life(harness: DockerHarness, database_url: str, tmp_path: Path) -> None:
    async with docker_plane(harness, database_url, tmp_path) as place:
        await place.api.provision("ann")
        assert names(await timeline(place)) == ["look", "image", "queue", "create", "start", "probe"]
        for call, phases in (
            ("sleep", ["probe", "freeze"]),
            ("start", ["thaw", "probe"]),
            ("stop", ["stop"]),
            ("start", ["look", "queue", "start", "probe"]),
        ):
            assert (await place.api.post(f"/engines/ann/{call}"))[0] == 200
            assert names(await timeline(place)) == phases


async def test_a_pull_is_told_and_its_digest_is_kept(
    harness: DockerHarness, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not registries_answer():
        missing("no registries on loopback")
    config = tmp_path / "docker-config"
    config.mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(config))
    image = pushed(config, OPEN)
    repository = image.rpartition(":")[0]
    try:
        async with docker_plane(
            harness, database_url, tmp_path, policy={"allowed_images": ["*"]}, ORCH_ENGINE_IMAGE=image
        ) as place:
            heard: list[tuple[str | None, str | None]] = []
            provisioning = asyncio.create_task(place.api.provision("ann"))
            while not provisioning.done():
                status, told = await place.api.get("/engines/ann/timeline")
                if status == 200:
                    heard.append((told["stalled_on"], told["last_log"]))
            engine = await provisioning
            assert "pull" in names(await timeline(place))
            assert any(phase == "pull" and (line or "").startswith("pulling ") for phase, line in heard) or any(
                phase == "pull" and line for phase, line in heard
            )
            first = await container_of(place, engine)
            assert first["Config"]["Image"].startswith(f"{repository}@sha256:")
            # The tag moves on; the engine stays with what it was made from.
            docker("tag", "engine-orchestrator-mimic:2", image)
            assert (await place.api.post("/engines/ann/stop"))[0] == 200
            docker("rm", first["Id"])
            assert (await place.api.post("/engines/ann/start"))[0] == 200
            second = await container_of(place, engine)
            assert (second["Image"], second["Config"]["Image"]) == (first["Image"], first["Config"]["Image"])
            # A new engine gets what the tag is now.
            assert (await container_of(place, await place.api.provision("bob")))["Image"] != first["Image"]
    finally:
        docker("rmi", "--force", image, check=False)
        for reference in docker("image", "ls", "--digests", "--format", "{{.Repository}}@{{.Digest}}").split():
            if reference.startswith(f"{repository}@sha256:"):
                docker("rmi", "--force", reference, check=False)


async def test_an_image_that_nobody_has(harness: DockerHarness, database_url: str, tmp_path: Path) -> None:
    async with docker_plane(harness, database_url, tmp_path) as place:
        version = f"{IMAGE.rpartition(':')[0]}:none"
        status, body = await place.api.post("/engines/provision", {"user_id": "ann", "engine_version": version})
        assert (status, body["error"]["code"]) == (502, "IMAGE_NOT_FOUND")
        told = await timeline(place)
        assert (told["status"], told["stalled_on"]) == ("failed", "pull")
        # Once it is there, the same engine is tried again.
        docker("tag", IMAGE, version)
        try:
            status, engine = await place.api.post("/engines/provision", {"user_id": "ann", "engine_version": version})
            assert status == 200, engine
            assert engine["engine_id"] == told["engine_id"]
        finally:
            docker("rmi", version)


async def test_ceilings_of_the_policy(harness: DockerHarness, database_url: str, tmp_path: Path) -> None:
    policy = {"engine_memory": "200m", "engine_cpus": 0.5}
    async with docker_plane(harness, database_url, tmp_path, policy=policy) as place:
        engine = await place.api.provision("ann")

        async def ceilings() -> tuple[int, int]:
            host = (await container_of(place, engine))["HostConfig"]
            return host["Memory"], host["NanoCpus"]

        assert await ceilings() == (200 << 20, 500_000_000)
        before = (await container_of(place, engine))["Id"]
        path = f"/products/{place.api.headers['product_id']}/policy"
        assert (await place.admin.call("PUT", path, {"policy": {"engine_memory": "300m"}}))[0] == 200

        async def applied() -> bool:
            return await ceilings() == (300 << 20, 1_000_000_000)

        await until(applied, 60)
        assert (await container_of(place, engine))["Id"] == before
        assert (await place.api.post("/engines/ann/stop"))[0] == 200
        assert (await place.admin.call("PUT", path, {"policy": {"engine_memory": "250m"}}))[0] == 200
        assert (await place.api.post("/engines/ann/start"))[0] == 200
        assert await ceilings() == (250 << 20, 1_000_000_000)
        status, body = await place.admin.call("PUT", path, {"policy": {"engine_memory": "1m"}})
        assert (status, body["error"]["code"]) == (400, "INVALID_REQUEST")


# --- a daemon whose answers are lost ------------------------------------------------------------------------------


class LostAnswers:
    """Stands between the orchestrator and the daemon: requests arrive, chosen answers do not."""

    def __init__(self, folder: Path, daemon: str) -> None:
        self.socket = str(folder / "lossy.sock")
        self._daemon = daemon
        self.lose: bytes | None = None
        self.lost = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, to = await asyncio.open_unix_connection(self._daemon)
        losing = False

        async def requests() -> None:
            nonlocal losing
            while data := await reader.read(65536):
                line = data.split(b"\r\n", 1)[0]
                losing = self.lose is not None and self.lose in line
                to.write(data)
                await to.drain()

        async def answers() -> None:
            while data := await there.read(65536):
                if losing:
                    self.lose = None
                    self.lost.set()
                    return
                writer.write(data)
                await writer.drain()

        tasks = {asyncio.create_task(requests()), asyncio.create_task(answers())}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            writer.close()
            to.close()


@pytest.fixture
async def lossy(harness: DockerHarness, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LostAnswers]:
    daemon = find_docker_host().socket
    if daemon is None:
        pytest.skip("needs a Docker Engine on a local socket")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        made = LostAnswers(Path(folder), daemon)
        server = await asyncio.start_unix_server(made.serve, made.socket)
        monkeypatch.setenv("DOCKER_HOST", f"unix://{made.socket}")
        try:
            yield made
        finally:
            monkeypatch.delenv("DOCKER_HOST")
            server.close()


@pytest.mark.parametrize("call", [b"/start", b"/containers/create"])
async def test_a_start_without_an_answer_leaves_nothing_unnoticed(
    harness: DockerHarness, database_url: str, tmp_path: Path, lossy: LostAnswers, call: bytes
) -> None:
    """The container runs, though nobody was told: found by its name, it is stopped, or taken by the next try."""
    async with docker_plane(harness, database_url, tmp_path) as place:
        lossy.lose = call
        status, body = await place.api.post("/engines/provision", {"user_id": "ann"})
        assert lossy.lost.is_set()
        assert (status, body["error"]["code"]) == (503, "BACKEND_UNAVAILABLE")
        _, engine = await place.api.get("/engines/ann")
        assert engine["status"] == "failed"
        engine_id = UUID(engine["engine_id"])

        async def nothing_runs() -> bool:
            found = await place.plane.backend.find(engine_id)
            return found is None or found.state is ObjectState.EXITED

        await until(nothing_runs, 120)
        again = await place.api.provision("ann")
        assert UUID(again["engine_id"]) == engine_id
        assert len(await place.plane.backend.list()) == 1


async def test_a_running_engine_whose_start_got_no_answer_is_adopted(
    harness: DockerHarness, database_url: str, tmp_path: Path, lossy: LostAnswers
) -> None:
    async with docker_plane(harness, database_url, tmp_path) as place:
        await place.api.provision("ann")
        assert (await place.api.post("/engines/ann/stop"))[0] == 200
        lossy.lose = b"/start"
        status, body = await place.api.post("/engines/ann/start")
        assert (status, body["error"]["code"]) == (503, "BACKEND_UNAVAILABLE")

        async def agrees() -> bool:
            """What the row says and what is there are the same again."""
            _, engine = await place.api.get("/engines/ann")
            found = await place.plane.backend.find(UUID(engine["engine_id"]))
            running = found is not None and found.state is ObjectState.RUNNING
            return (engine["status"] == "running") == running and engine["status"] in ("running", "stopped")

        await until(agrees, 120)
        if (await place.api.get("/engines/ann"))[1]["status"] == "stopped":
            assert (await place.api.post("/engines/ann/start"))[0] == 200
        assert (await place.api.admit("ann"))["admitted"]


async def test_the_log_is_read_and_followed_over_a_restart(
    harness: DockerHarness, database_url: str, tmp_path: Path
) -> None:
    async with docker_plane(harness, database_url, tmp_path) as place:
        engine = await place.api.provision("ann")

        async def say(line: str) -> None:
            async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
                headers = {"X-Engine-Key": engine["api_key"]}
                (await client.post(f"{engine['url']}/say", headers=headers, content=line)).raise_for_status()

        async def written(line: str) -> None:
            async def is_there() -> bool:
                _, body = await place.api.get("/engines/ann/logs?tail=50")
                return line in [entry["line"] for entry in body["lines"]]

            await until(is_there, 60)

        await say("before")
        await written("before")
        followed: asyncio.Queue[str] = asyncio.Queue()

        async def follow() -> None:
            async with place.api.client.stream("GET", "/engines/ann/logs?follow=true&tail=50") as answer:
                assert answer.headers["content-type"].startswith("application/x-ndjson")
                async for line in answer.aiter_lines():
                    followed.put_nowait(json.loads(line)["line"])

        async def comes(line: str) -> None:
            async with asyncio.timeout(60):
                while await followed.get() != line:
                    pass

        following = asyncio.create_task(follow())
        await comes("before")
        await say("while it runs")
        await comes("while it runs")
        assert (await place.api.post("/engines/ann/stop"))[0] == 200
        status, body = await place.api.get("/engines/ann/logs?tail=1")
        assert (status, len(body["lines"])) == (200, 1)  # of a stopped engine, too
        assert datetime.fromisoformat(body["lines"][0]["timestamp"])
        assert (await place.api.post("/engines/ann/start"))[0] == 200
        await say("after a restart")
        await comes("after a restart")
        following.cancel()
        await asyncio.wait({following})
        await until(lambda: _nobody_follows(place), 60)


async def _nobody_follows(place: Place) -> bool:
    return place.plane.followers == 0
