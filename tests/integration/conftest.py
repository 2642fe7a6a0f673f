"""The product as it runs: a real database, real engine processes (mimics), real HTTP.

`plane` serves inside the test's own event loop; `serve` starts real `orchestrator serve` processes.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from cryptography.fernet import Fernet

from orchestrator.api import create_app
from orchestrator.backends.subprocess_backend import SubprocessBackend
from orchestrator.control_plane import ControlPlane
from orchestrator.server import Server, bind, server_config
from orchestrator.settings import Settings, load_settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MIMIC = Path(__file__).resolve().parents[1] / "mimic.py"
ADMIN_KEY = "admin-key-of-the-tests"
MASTER_KEY = Fernet.generate_key().decode()
PORTS_FROM, PORTS_TO = 20_000, 32_500


@cache
def port_range() -> tuple[int, int]:
    """Ports of this test process alone, held by listening on the one below: parallel test processes must not meet."""
    for low in range(PORTS_FROM, PORTS_TO, 500):
        claim = socket.socket()
        try:
            claim.bind(("127.0.0.1", low))
            claim.listen()
        except OSError:
            claim.close()
            continue
        claim.detach()  # until the process ends
        return low + 1, low + 499
    raise AssertionError("too many test processes")


@pytest.fixture
def variables(database_url: str, tmp_path: Path) -> dict[str, str]:
    """The `ORCH_*` variables of a deployment whose engines are mimics; a test may change them before it starts."""
    low, high = port_range()
    return {
        "ORCH_DATABASE_URL": database_url,
        "ORCH_MASTER_KEY": MASTER_KEY,
        "ORCH_ADMIN_KEY": ADMIN_KEY,
        "ORCH_ENGINE_BACKEND": "subprocess",
        "ORCH_ENGINE_IMAGE": "mimic:1",
        "ORCH_SUBPROCESS_COMMAND": f"{shlex.quote(sys.executable)} -I -S {shlex.quote(str(MIMIC))}",
        "ORCH_DATA_ROOT": str(tmp_path / "data"),
        "ORCH_PORT_MIN": str(low),
        "ORCH_PORT_MAX": str(high),
        "ORCH_BOOT_TIMEOUT_S": "20",
        "ORCH_LEASE_S": "3",
        "ORCH_LOG_FORMAT": "json",
    }


def settings_of(variables: dict[str, str]) -> Settings:
    """The variables as settings, whatever stands in the environment of the test run."""
    values = {name.removeprefix("ORCH_").lower(): value for name, value in variables.items()}
    return load_settings(_env_file=None, **values)


class Api:
    """A product's view of the orchestrator at `url`. Answers are `(status, body)`; `last` is the whole response."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        self.url = url
        self.headers = headers
        # Without certificates to load, which takes 50 ms: all is plain HTTP here.
        self.client = httpx.AsyncClient(base_url=url, headers=headers, timeout=60, trust_env=False, verify=False)
        self.last: httpx.Response | None = None

    async def call(self, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        if body is not None:
            options["json"] = body
        response = await self.client.request(method, path, **options)
        self.last = response
        return response.status_code, response.json() if response.content else None

    async def get(self, path: str, **options: Any) -> tuple[int, Any]:
        return await self.call("GET", path, **options)

    async def post(self, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        return await self.call("POST", path, body, **options)

    async def provision(self, user_id: str, **options: Any) -> dict[str, Any]:
        status, body = await self.post("/engines/provision", {"user_id": user_id}, **options)
        assert status == 200, body
        return dict(body)

    async def admit(self, user_id: str, *, auto_provision: bool = True, auto_wake: bool = True) -> dict[str, Any]:
        flags = {"auto_provision": auto_provision, "auto_wake": auto_wake}
        status, body = await self.post(f"/engines/{user_id}/admit", flags)
        assert status == 200, body
        return dict(body)

    async def status_of(self, user_id: str) -> str:
        status, body = await self.get(f"/engines/{user_id}")
        assert status == 200, body
        return str(body["status"])

    async def close(self) -> None:
        await self.client.aclose()


@dataclass
class Replica:
    """A real `orchestrator serve` process."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def kill(self) -> None:
        """As a power cut would: SIGKILL."""
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@dataclass
class Deployment:
    """Everything on one database and one data root; engines are removed at the end of the test."""

    variables: dict[str, str]
    tmp_path: Path
    replicas: list[Replica] = field(default_factory=list)
    apis: list[Api] = field(default_factory=list)

    async def serve(self, **changes: str) -> Replica:
        """Start a replica and wait until it serves."""
        port = free_port()
        log = self.tmp_path / f"serve-{len(self.replicas)}.log"
        environment = {
            **{name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ},
            **self.variables,
            "ORCH_PORT": str(port),
            **changes,
        }
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator", "serve"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd=self.tmp_path,
                start_new_session=True,
            )
        replica = Replica(process, f"http://127.0.0.1:{port}", log)
        self.replicas.append(replica)
        async with httpx.AsyncClient(trust_env=False) as client:
            async with asyncio.timeout(90):
                while True:
                    assert process.poll() is None, log.read_text()
                    with suppress(httpx.TransportError):
                        if (await client.get(f"{replica.url}/health")).status_code == 200:
                            return replica
                    await asyncio.sleep(0.02)

    async def product(self, url: str, slug: str = "acme", policy: dict[str, Any] | None = None) -> Api:
        """Register a product at the orchestrator that serves at `url`."""
        admin = self.admin(url)
        status, body = await admin.post(
            "/products/register", {"slug": slug, "display_name": slug.title(), "policy": policy or {}}
        )
        assert status == 200, body
        api = self.api(url, {"X-Platform-Key": body["platform_api_key"]})
        api.headers["product_id"] = body["product_id"]  # for tests; not sent
        return api

    def api(self, url: str, headers: dict[str, str]) -> Api:
        api = Api(url, headers)
        self.apis.append(api)
        return api

    def admin(self, url: str, product_id: str | None = None) -> Api:
        headers = {"X-Admin-Key": ADMIN_KEY}
        if product_id is not None:
            headers["X-Product-Id"] = product_id
        return self.api(url, headers)

    def mimic_flags(self, engine_id: str, **flags: Any) -> None:
        """Flags for the next start of one engine (see `tests/mimic.py`)."""
        path = Path(self.variables["ORCH_DATA_ROOT"]) / "engines" / engine_id / "mimic.json"
        path.write_text(json.dumps(flags))

    async def close(self) -> None:
        for api in self.apis:
            await api.close()
        for replica in self.replicas:
            if replica.process.poll() is None:
                replica.kill()
        await remove_engines(self.variables)


async def remove_engines(variables: dict[str, str]) -> None:
    """End every engine process of this deployment, whatever the registry says."""
    settings = settings_of(variables)
    import asyncpg

    connection = await asyncpg.connect(variables["ORCH_DATABASE_URL"])
    deployment_id = await connection.fetchval("SELECT id FROM deployment")
    await connection.close()
    backend = SubprocessBackend.from_settings(settings, deployment_id)
    await backend.open()
    for found in await backend.list():
        await backend.destroy(found.engine_id)
    await backend.close()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture
async def deployment(variables: dict[str, str], tmp_path: Path) -> AsyncIterator[Deployment]:
    made = Deployment(variables, tmp_path)
    try:
        yield made
    finally:
        await made.close()


@dataclass
class Served:
    """A control plane that serves in this event loop."""

    plane: ControlPlane
    url: str
    deployment: Deployment


@pytest.fixture
async def served(deployment: Deployment) -> AsyncIterator[Served]:
    """One in-process replica; faster to start than a process, and open to a look inside."""
    sock = bind("127.0.0.1", 0)
    plane = ControlPlane(settings_of(deployment.variables))
    await plane.open()
    server = Server(server_config(create_app(plane), plane.settings))
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        yield Served(plane, f"http://127.0.0.1:{sock.getsockname()[1]}", deployment)
    finally:
        for api in deployment.apis:
            await api.close()
        server.should_exit = True
        await serving
        await plane.close()
        sock.close()


@pytest.fixture
async def api(served: Served) -> Api:
    """A product without limits on the in-process replica."""
    return await served.deployment.product(served.url)


@pytest.fixture
def admin(served: Served) -> Api:
    """The admin key without a product, on the in-process replica."""
    return served.deployment.admin(served.url)
