"""The Docker backend beside the raw Docker API, in one run and with the same image."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import aiodocker
import httpx
from cryptography.fernet import Fernet

from bench.load import once, request_bytes
from bench.world import free_port
from orchestrator.backends.docker_names import volume_name
from orchestrator.backends.docker_spec import ContainerSpec
from orchestrator.settings import load_settings

if TYPE_CHECKING:
    from bench.world import World

__all__ = ["Figures", "measure", "paired"]

IMAGE = os.environ.get("BENCH_IMAGE", "september-engine:dev")
NETWORK = "orchestrator-bench"
ROUNDS = 14
WAKES = 4  # in each round
BURST = 30
BURST_ROUNDS = 2


class Figures:
    """Seconds, but for the rates (starts a second)."""

    def __init__(self) -> None:
        self.cold_floor: list[float] = []
        self.cold_ours: list[float] = []
        self.wake_floor: list[float] = []
        self.wake_health: list[float] = []  # the unpause and one GET /health after it
        self.wake_ours: list[float] = []
        self.burst_floor = 0.0
        self.burst_ours = 0.0


class _Raw:
    """What the backend asks of the daemon for one engine, and nothing else."""

    def __init__(self, docker: aiodocker.Docker, client: httpx.AsyncClient) -> None:
        self.docker: Any = docker  # its volumes are not typed
        self.client = client
        self.made: list[Any] = []
        self.volumes: list[str] = []
        settings = load_settings(
            _env_file=None,
            database_url="postgresql://localhost/unused",
            master_key=Fernet.generate_key().decode(),
            admin_key="an-admin-key-of-the-bench",
        )
        self.spec = ContainerSpec.from_settings(settings, uuid4())

    async def start(self) -> Any:
        """The same container as ours, down to its limits and its volume."""
        port, engine_id = free_port(), uuid4()
        environment = {"ENGINE_KEY_HASH": "0" * 64, "ENGINE_KEY_GENERATION": "1", "ENGINE_INCARNATION": "1"}
        await self.docker.volumes.create({"Name": volume_name(engine_id)})
        self.volumes.append(volume_name(engine_id))
        container = await self.docker.containers.create(
            self.spec.container(engine_id, port, environment, IMAGE, NETWORK)
        )
        self.made.append(container)
        await container.start()
        return container, port

    async def until_healthy(self, port: int, pause_s: float = 0.005) -> None:
        while True:
            try:
                if (await self.client.get(f"http://127.0.0.1:{port}/health")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(pause_s)

    async def clear(self) -> None:
        for container in self.made:
            await container.delete(force=True, v=True)
        for volume in self.volumes:
            await (await self.docker.volumes.get(volume)).delete()
        self.made, self.volumes = [], []


async def measure(here: World) -> Figures:
    """Raises `RuntimeError` when no Docker Engine answers or the image is missing."""
    figures = Figures()
    try:
        docker = aiodocker.Docker()
        await docker.images.inspect(IMAGE)
    except (aiodocker.DockerError, ValueError, OSError) as error:
        raise RuntimeError(f"needs a Docker Engine with the image {IMAGE} (make images): {error}") from None
    network = await docker.networks.create(
        {"Name": NETWORK, "Options": {"com.docker.network.bridge.enable_icc": "false"}}
    )
    url = await here.serve(
        ORCH_ENGINE_BACKEND="docker",
        ORCH_ENGINE_IMAGE=IMAGE,
        ORCH_ENGINE_NETWORK=f"{NETWORK}-ours",
        ORCH_CATALOG_MOUNT_PATH="",
    )
    key = await here.register(url, "docker", {})
    ours = httpx.AsyncClient(base_url=url, headers={"X-Platform-Key": key}, trust_env=False, timeout=120)
    async with httpx.AsyncClient(trust_env=False, timeout=5) as client, ours:
        raw = _Raw(docker, client)
        try:
            await _cold_and_wake(raw, ours, figures)
            await _burst(raw, ours, figures)
        finally:
            await raw.clear()
            for engine in (await ours.get("/engines?limit=1000")).json()["engines"]:
                await ours.delete(f"/engines/{engine['user_id']}")
            for made in (network, await docker.networks.get(f"{NETWORK}-ours")):
                await made.delete()
            await docker.close()
    return figures


async def _cold_and_wake(raw: _Raw, ours: httpx.AsyncClient, figures: Figures) -> None:
    """In pairs, the one or the other first: a daemon has moods that last longer than one call."""
    url = str(ours.base_url)
    headers = {"X-Platform-Key": ours.headers["X-Platform-Key"]}

    async def raw_cold() -> tuple[Any, str]:
        began = time.perf_counter()
        container, port = await raw.start()
        await raw.until_healthy(port)
        figures.cold_floor.append(time.perf_counter() - began)
        return container, f"http://127.0.0.1:{port}"

    async def our_cold(user: str) -> None:
        began = time.perf_counter()
        (await ours.post("/engines/provision", json={"user_id": user})).raise_for_status()
        figures.cold_ours.append(time.perf_counter() - began)

    for number in range(ROUNDS):
        user = f"d-{number}"
        if number % 2:
            await our_cold(user)
        container, engine_url = await raw_cold()
        if not number % 2:
            await our_cold(user)
        wake = request_bytes("POST", f"{url}/engines/{user}/admit", headers, b'{"auto_wake":true}')
        health = request_bytes("GET", f"{engine_url}/health", {})
        for _ in range(WAKES):
            await container.pause()
            began = time.perf_counter()
            await container.unpause()
            unpaused = time.perf_counter() - began
            figures.wake_floor.append(unpaused)
            figures.wake_health.append(unpaused + await once(health, engine_url))
            (await ours.post(f"/engines/{user}/sleep")).raise_for_status()
            figures.wake_ours.append(await once(wake, url))


async def _burst(raw: _Raw, ours: httpx.AsyncClient, figures: Figures) -> None:
    slots = asyncio.Semaphore(os.cpu_count() or 1)

    async def one() -> None:
        async with slots:
            _, port = await raw.start()
        await raw.until_healthy(port, pause_s=0.1)

    floors, rates = [], []
    for round_number in range(BURST_ROUNDS):  # in turn: what else the machine does hits both
        began = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(BURST)))
        floors.append(BURST / (time.perf_counter() - began))
        await raw.clear()
        users = [f"b-{round_number}-{number}" for number in range(BURST)]
        began = time.perf_counter()
        answers = await asyncio.gather(*(ours.post("/engines/provision", json={"user_id": user}) for user in users))
        rates.append(BURST / (time.perf_counter() - began))
        for answer in answers:
            answer.raise_for_status()
        for user in users:
            (await ours.delete(f"/engines/{user}")).raise_for_status()
    figures.burst_floor, figures.burst_ours = median(floors), median(rates)


def paired(ours: list[float], floor: list[float]) -> float:
    """The median of what ours took longer than the floor measured beside it."""
    return statistics.median(a - b for a, b in zip(ours, floor, strict=True))


def median(values: list[float]) -> float:
    return statistics.median(values)
