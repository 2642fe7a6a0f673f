"""Whole control planes in this process, on a Docker Engine; and the hands of a person with the `docker` command."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import secrets
import tarfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg
import httpx

from orchestrator.api import create_app
from orchestrator.backends.docker_names import container_name, volume_name
from orchestrator.control_plane import ControlPlane
from orchestrator.loops.reconcile import apply, plan
from tests.docker.daemon import IMAGE, docker
from tests.integration.conftest import ADMIN_KEY, MASTER_KEY, Api, port_range, settings_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

__all__ = ["PATIENCE_S", "Engine", "Fleet", "fleet_variables", "until"]

_STAMPS = itertools.count(1_000_000_000)
PATIENCE_S = 100.0  # for what comes by itself; the machine may be busy


async def until(holds: Callable[[], Awaitable[object]], what: Callable[[], Awaitable[object]] | None = None) -> None:
    """Look until it holds; `what` tells what was the case when it never did."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not await holds():  # noqa: ASYNC110 - it is in another process
                await asyncio.sleep(0.03)
    except TimeoutError:
        raise AssertionError(f"never came true: {await what() if what is not None else ''}") from None


def fleet_variables(database_url: str, folder: Path) -> dict[str, str]:
    """A deployment on Docker that looks often; networks and ports of its own."""
    low, high = port_range()
    return {
        "ORCH_DATABASE_URL": database_url,
        "ORCH_MASTER_KEY": MASTER_KEY,
        "ORCH_ADMIN_KEY": ADMIN_KEY,
        "ORCH_ENGINE_BACKEND": "docker",
        "ORCH_ENGINE_IMAGE": IMAGE,
        "ORCH_ENGINE_NETWORK": f"orch-test-{secrets.token_hex(4)}",
        "ORCH_ENGINE_MEMORY": "64m",
        "ORCH_DATA_ROOT": str(folder),
        "ORCH_PORT_MIN": str(low),
        "ORCH_PORT_MAX": str(high),
        "ORCH_BOOT_TIMEOUT_S": "40",
        "ORCH_LEASE_S": "5",
        "ORCH_HEALTH_CHECK_INTERVAL_S": "1",
        "ORCH_RESTART_BACKOFF_BASE_S": "0.2",
        "ORCH_LOG_FORMAT": "json",
    }


class PatientApi(Api):
    """Asks again when the database had no time: containers that start can stall a small machine for seconds."""

    async def call(self, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                status, answer = await super().call(method, path, body, **dict(options))
                if status != 503 or answer["error"]["code"] != "DATABASE_UNAVAILABLE":
                    return status, answer
                await asyncio.sleep(1)


@dataclass(frozen=True, slots=True)
class Engine:
    """A provisioned engine, as its product knows it."""

    id: UUID
    user_id: str
    url: str
    api_key: str

    @property
    def container(self) -> str:
        return container_name(self.id)

    @property
    def volume(self) -> str:
        return volume_name(self.id)


@dataclass
class Fleet:
    """Everything on one database; what it made on the daemon is gone after `close`."""

    variables: dict[str, str]
    cli_host: str | None = None
    planes: list[ControlPlane] = field(default_factory=list)
    _apis: list[Api] = field(default_factory=list)
    _headers: dict[str, str] = field(default_factory=dict)
    _engines: httpx.AsyncClient = field(
        default_factory=lambda: httpx.AsyncClient(timeout=30, trust_env=False, headers={"Connection": "close"})
    )

    async def open(self, *, loops: bool = True, policy: dict[str, Any] | None = None) -> Api:
        """Another replica; the API of the one product there, at this replica."""
        plane = ControlPlane(settings_of(self.variables))
        await plane.open(loops=loops)
        self.planes.append(plane)
        transport = httpx.ASGITransport(app=create_app(plane))
        if not self._headers:
            async with httpx.AsyncClient(transport=transport, base_url="http://plane") as admin:
                answer = await admin.post(
                    "/products/register",
                    json={"slug": "acme", "display_name": "Acme", "policy": policy or {}},
                    headers={"X-Admin-Key": ADMIN_KEY},
                )
            self._headers = {"X-Platform-Key": answer.json()["platform_api_key"]}
        api = PatientApi("http://plane", self._headers)
        await api.client.aclose()
        api.client = httpx.AsyncClient(transport=transport, base_url="http://plane", headers=self._headers, timeout=90)
        self._apis.append(api)
        return api

    async def close_planes(self) -> None:
        """The end of every replica; engines go on."""
        apis, self._apis = self._apis, []
        for api in apis:
            await api.close()
        planes, self.planes = self.planes, []
        for plane in planes:
            await plane.close()

    async def close(self) -> None:
        await self.close_planes()
        await self._engines.aclose()
        async with self.database() as connection:
            mark = f"label=engine-orchestrator.deployment={await connection.fetchval('SELECT id FROM deployment')}"
        if left := await self.docker("ps", "--all", "--quiet", "--filter", mark):
            await self.docker("rm", "--force", *left.split(), check=False)
        if left := await self.docker("volume", "ls", "--quiet", "--filter", mark):
            await self.docker("volume", "rm", "--force", *left.split(), check=False)
        mark = f"label=engine-orchestrator.network={self.variables['ORCH_ENGINE_NETWORK']}"
        if left := await self.docker("network", "ls", "--quiet", "--filter", mark):
            await self.docker("network", "rm", *left.split(), check=False)

    # --- hands ------------------------------------------------------------------------------------------

    async def docker(self, *arguments: str, given: bytes | None = None, check: bool = True) -> str:
        return await asyncio.to_thread(docker, *arguments, given=given, check=check, host=self.cli_host)

    async def inspect(self, engine: Engine) -> dict[str, Any]:
        return dict(json.loads(await self.docker("inspect", "--type", "container", engine.container))[0])

    async def state_of(self, engine: Engine) -> str:
        """What Docker says: `running`, `paused`, `exited`, …, or `gone`."""
        listed = await self.docker("ps", "--all", "--filter", f"name=^{engine.container}$", "--format", "{{.State}}")
        return listed or "gone"

    async def flags(self, engine: Engine, **flags: Any) -> None:
        """Flags of the mimic in its data: most hold at once, those of a start from the next start on."""
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as archive:
            body = json.dumps(flags).encode()
            entry = tarfile.TarInfo("mimic.json")
            entry.size = len(body)
            entry.mode = 0o644
            entry.mtime = next(_STAMPS)  # the mimic reads it again by its time and inode, and inodes are used again
            archive.addfile(entry, io.BytesIO(body))
        await self.docker("cp", "-", f"{engine.container}:/data/", given=content.getvalue())

    # --- engines ----------------------------------------------------------------------------------------

    async def provision(self, api: Api, *user_ids: str) -> list[Engine]:
        made = await asyncio.gather(*(api.provision(user_id) for user_id in user_ids))
        return [Engine(UUID(one["engine_id"]), one["user_id"], one["url"], one["api_key"]) for one in made]

    async def ask(self, engine: Engine, method: str, path: str, body: Any = None) -> httpx.Response:
        content = body if isinstance(body, str) else json.dumps(body)
        return await self._engines.request(
            method, engine.url + path, headers={"X-Engine-Key": engine.api_key}, content=content
        )

    async def crash(self, engine: Engine) -> None:
        """It exits by itself, with code 3."""
        with contextlib.suppress(httpx.TransportError):
            await self.ask(engine, "POST", "/exit", {"code": 3})

    async def remember(self, engine: Engine) -> None:
        """Its brain knows something that no other brain knows."""
        answer = await self.ask(engine, "POST", "/write", f"the brain of {engine.user_id}")
        assert answer.status_code == 204

    async def remembers(self, api: Api, engine: Engine) -> None:
        """Admitted, it answers under the same URL and key, and its brain is not empty."""
        admitted = await api.admit(engine.user_id)
        assert admitted["admitted"], admitted
        told = admitted["engine"]
        assert (told["engine_id"], told["url"], told["api_key"]) == (str(engine.id), engine.url, engine.api_key)
        answer = await self.ask(engine, "GET", "/read")
        assert (answer.status_code, answer.text) == (200, f"the brain of {engine.user_id}")

    # --- the registry -------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def database(self) -> Any:
        connection = await asyncpg.connect(self.variables["ORCH_DATABASE_URL"])
        try:
            await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
            yield connection
        finally:
            await connection.close()

    async def row(self, engine: Engine) -> dict[str, Any]:
        async with self.database() as connection:
            return dict(await connection.fetchrow("SELECT * FROM engines WHERE id = $1", engine.id))

    async def audit(self, engine: Engine | UUID, action: str | None = None) -> list[dict[str, Any]]:
        """The engine's audit rows in the order in which they were written; all, or those of an action."""
        async with self.database() as connection:
            rows = await connection.fetch(
                "SELECT * FROM audit_log WHERE engine_id = $1 AND ($2::text IS NULL OR action = $2) ORDER BY id",
                engine.id if isinstance(engine, Engine) else engine,
                action,
            )
        return [dict(row) for row in rows]

    async def actions(self, engine: Engine | UUID) -> list[str]:
        """What was done to the engine, without the samples of its health."""
        return [row["action"] for row in await self.audit(engine) if row["action"] != "health_check"]

    async def story(self, engine: Engine) -> object:
        """For the message of a failed test."""
        row = await self.row(engine)
        shown = ("status", "operation", "wish", "consecutive_failures", "restarts_seen", "restarted_at", "last_error")
        return {name: row[name] for name in shown} | {
            "docker": await self.state_of(engine),
            "audit": [(one["action"], one["status"], one["metadata"]) for one in await self.audit(engine)],
        }

    async def becomes(self, engine: Engine, status: str, *states: str) -> None:
        """The row settles in `status` and Docker's container is one of `states`, both at the same time."""

        async def holds() -> bool:
            row = await self.row(engine)
            settled = row["operation"] is None and row["wish"] is None
            return settled and row["status"] == status and await self.state_of(engine) in states

        await until(holds, lambda: self.story(engine))

    async def does(self, engine: Engine | UUID, action: str, times: int = 1) -> list[dict[str, Any]]:
        """The audit says that `action` was done at least so often."""

        async def holds() -> bool:
            return len(await self.audit(engine, action)) >= times

        await until(holds, lambda: self.actions(engine))
        return await self.audit(engine, action)

    async def reconcile(self, *, purge: bool = False) -> list[str]:
        """One pass, as the loop and the command make it; what it planned."""
        plane = self.planes[0]
        steps = await plan(plane.means, purge=purge)
        await apply(plane.means, plane.healing, steps, actor="tester")
        return [step.action.value for step in steps]

    async def has_volume(self, engine: Engine) -> bool:
        return bool(await self.docker("volume", "ls", "--quiet", "--filter", f"name=^{engine.volume}$"))
