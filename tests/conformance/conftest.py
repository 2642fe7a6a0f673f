"""What the conformance suite needs beside a backend, once for each backend.

A harness says how to reach what a backend made: the suite itself has no branch but on `Capabilities`. To add a
backend, write a harness and name it in `HARNESSES`.
"""

from __future__ import annotations

import abc
import contextlib
import hashlib
import json
import random
import shlex
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import pytest
from cryptography.fernet import Fernet

from orchestrator.backends.memory_backend import MemoryBackend, MemoryHost
from orchestrator.backends.subprocess_backend import SubprocessBackend
from orchestrator.settings import load_settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from uuid import UUID

    from orchestrator.backends.base import BackendObject, EngineBackend, EngineEndpoint
    from orchestrator.settings import Settings

MIMIC = Path(__file__).resolve().parents[1] / "mimic.py"
KEY = "key-of-a-mimic"


class Harness(abc.ABC):
    """One place for objects, empty at first, and a way to look into the engines there."""

    image = "mimic:1"
    other_image = "mimic:2"

    def __init__(self) -> None:
        self.deployment_id = uuid4()
        self._backends: list[EngineBackend] = []

    async def backend(self, deployment_id: UUID | None = None) -> EngineBackend:
        """A backend of its own at this place, as another orchestrator process would have it."""
        made = self.make(deployment_id or self.deployment_id)
        await made.open()
        self._backends.append(made)
        return made

    def env(self, engine_id: UUID, incarnation: int = 1, **flags: Any) -> dict[str, str]:
        """The environment of an engine whose mimic has these flags."""
        return {
            "ENGINE_KEY_HASH": hashlib.sha256(KEY.encode()).hexdigest(),
            "ENGINE_KEY_GENERATION": "1",
            "ENGINE_INCARNATION": str(incarnation),
            **{f"MIMIC_{name.upper()}": str(value) for name, value in flags.items()},
        }

    async def close(self) -> None:
        for backend in self._backends:
            for found in await self.objects(backend):
                await backend.destroy(found.engine_id)
            await backend.close()

    async def objects(self, backend: EngineBackend) -> list[BackendObject]:
        return await backend.list()

    def free_port(self) -> int:
        """A port that neither the system nor the other tests hand out by themselves."""
        while True:
            port = random.randrange(10_000, 19_990)
            with contextlib.suppress(OSError), self.bound(port):
                return port

    @contextlib.contextmanager
    def bound(self, port: int) -> Iterator[None]:
        with socket.socket() as holder:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("127.0.0.1", port))
            holder.listen()
            yield

    @abc.abstractmethod
    def make(self, deployment_id: UUID) -> EngineBackend: ...

    @abc.abstractmethod
    def hold_port(self, port: int) -> contextlib.AbstractContextManager[None]:
        """Something that is no engine holds the port."""

    @abc.abstractmethod
    async def run_of(self, engine_id: UUID, endpoint: EngineEndpoint) -> str:
        """A token of the process that answers now: another process, another token. Waits until it answers."""

    @abc.abstractmethod
    async def write(self, engine_id: UUID, endpoint: EngineEndpoint, text: str) -> None:
        """Keep a text in the engine's data."""

    @abc.abstractmethod
    async def read(self, engine_id: UUID, endpoint: EngineEndpoint) -> str | None:
        """The text kept in the engine's data."""

    @abc.abstractmethod
    async def say(self, engine_id: UUID, endpoint: EngineEndpoint, line: str) -> None:
        """Let the engine write a line to its log."""

    @abc.abstractmethod
    async def crash(self, engine_id: UUID, endpoint: EngineEndpoint) -> None:
        """Let the engine exit by itself, with code 3."""

    @abc.abstractmethod
    async def answers(self, engine_id: UUID, endpoint: EngineEndpoint) -> bool:
        """Whether the engine answers at once."""


class MimicHarness(Harness):
    """For every backend whose engines are real mimics: they are asked over HTTP."""

    def __init__(self) -> None:
        super().__init__()
        self._client = httpx.AsyncClient(
            headers={"X-Engine-Key": KEY, "Connection": "close"}, timeout=10, trust_env=False
        )

    async def close(self) -> None:
        await self._client.aclose()
        await super().close()

    def hold_port(self, port: int) -> contextlib.AbstractContextManager[None]:
        return self.bound(port)

    async def run_of(self, engine_id: UUID, endpoint: EngineEndpoint) -> str:
        return str(json.loads((await self._call(endpoint, "GET", "/me")).content)["run"])

    async def write(self, engine_id: UUID, endpoint: EngineEndpoint, text: str) -> None:
        await self._call(endpoint, "POST", "/write", text)

    async def read(self, engine_id: UUID, endpoint: EngineEndpoint) -> str | None:
        answer = await self._call(endpoint, "GET", "/read")
        return answer.text if answer.status_code == 200 else None

    async def say(self, engine_id: UUID, endpoint: EngineEndpoint, line: str) -> None:
        await self._call(endpoint, "POST", "/say", line)

    async def crash(self, engine_id: UUID, endpoint: EngineEndpoint) -> None:
        with contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError):
            await self._call(endpoint, "POST", "/exit", json.dumps({"code": 3}))

    async def answers(self, engine_id: UUID, endpoint: EngineEndpoint) -> bool:
        try:
            await self._client.get(f"http://{endpoint.host}:{endpoint.port}/health", timeout=0.3)
        except httpx.TransportError:
            return False
        return True

    async def _call(self, endpoint: EngineEndpoint, method: str, path: str, body: str = "") -> httpx.Response:
        """One call; a refused connection means that the engine is not up yet."""
        url = f"http://{endpoint.host}:{endpoint.port}{path}"
        while True:  # ended by the time limit of the test
            try:
                return await self._client.request(method, url, content=body)
            except httpx.ConnectError:
                continue


class SubprocessHarness(MimicHarness):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._settings = settings(folder)

    def make(self, deployment_id: UUID) -> EngineBackend:
        return SubprocessBackend.from_settings(self._settings, deployment_id)

    async def close(self) -> None:
        await super().close()
        left = processes_of(self._settings.data_root)
        assert not left, f"processes left behind: {left}"


class MemoryHarness(Harness):
    def __init__(self) -> None:
        super().__init__()
        self._host = MemoryHost()

    def make(self, deployment_id: UUID) -> EngineBackend:
        return MemoryBackend(deployment_id, host=self._host)

    def env(self, engine_id: UUID, incarnation: int = 1, **flags: Any) -> dict[str, str]:
        if flags.get("ignore_sigterm"):
            self._host.deaf.add(engine_id)
        return super().env(engine_id, incarnation, **flags)

    @contextlib.contextmanager
    def hold_port(self, port: int) -> Iterator[None]:
        self._host.held_ports.add(port)
        yield
        self._host.held_ports.discard(port)

    async def run_of(self, engine_id: UUID, endpoint: EngineEndpoint) -> str:
        return str(self._host.objects[engine_id].run)

    async def write(self, engine_id: UUID, endpoint: EngineEndpoint, text: str) -> None:
        self._host.data[engine_id]["note"] = text

    async def read(self, engine_id: UUID, endpoint: EngineEndpoint) -> str | None:
        return self._host.data[engine_id].get("note")

    async def say(self, engine_id: UUID, endpoint: EngineEndpoint, line: str) -> None:
        self._host.say(engine_id, line)

    async def crash(self, engine_id: UUID, endpoint: EngineEndpoint) -> None:
        MemoryBackend(self.deployment_id, host=self._host).exit(engine_id, 3)

    async def answers(self, engine_id: UUID, endpoint: EngineEndpoint) -> bool:
        found = self._host.objects.get(engine_id)
        return found is not None and found.state == "running"


def settings(data_root: Path) -> Settings:
    return load_settings(
        _env_file=None,
        database_url="postgresql://localhost/unused",
        master_key=Fernet.generate_key().decode(),
        admin_key="an-admin-key-for-tests",
        data_root=data_root,
        subprocess_command=f"{shlex.quote(sys.executable)} -I -S {shlex.quote(str(MIMIC))}",
    )


def processes_of(data_root: Path) -> list[int]:
    """Processes whose environment points into a data root (Linux only)."""
    mark = f"SQLITE_DB_PATH={data_root}/".encode()
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in environ.read_bytes():
                found.append(int(environ.parent.name))
    return found


def docker_harness(folder: Path) -> Harness:
    # Skips (in CI: fails) where no Docker Engine answers.
    from tests.docker.daemon import require_docker
    from tests.docker.harness import DockerHarness

    require_docker()
    return DockerHarness(folder)


HARNESSES: dict[str, Callable[[Path], Harness]] = {
    "memory": lambda folder: MemoryHarness(),
    "subprocess": SubprocessHarness,
    "docker": docker_harness,
}


@pytest.fixture(params=HARNESSES)
async def harness(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Harness]:
    made = HARNESSES[request.param](tmp_path)
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture
async def backend(harness: Harness) -> EngineBackend:
    return await harness.backend()
