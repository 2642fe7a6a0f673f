"""The whole orchestrator on Docker, in the test's own event loop."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.api import create_app
from orchestrator.control_plane import ControlPlane
from orchestrator.server import Server, bind, server_config
from tests.docker.daemon import IMAGE
from tests.integration.conftest import ADMIN_KEY, MASTER_KEY, Api, port_range, settings_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.docker.harness import DockerHarness

__all__ = ["Place", "docker_plane", "variables"]


@dataclass
class Place:
    plane: ControlPlane
    url: str
    api: Api
    admin: Api


def variables(harness: DockerHarness, database_url: str, folder: Path, **changes: str) -> dict[str, str]:
    low, high = port_range()
    return {
        "ORCH_DATABASE_URL": database_url,
        "ORCH_MASTER_KEY": MASTER_KEY,
        "ORCH_ADMIN_KEY": ADMIN_KEY,
        "ORCH_ENGINE_BACKEND": "docker",
        "ORCH_ENGINE_IMAGE": IMAGE,
        "ORCH_ENGINE_NETWORK": harness.network,
        "ORCH_DATA_ROOT": str(folder / "data"),
        "ORCH_PORT_MIN": str(low),
        "ORCH_PORT_MAX": str(high),
        "ORCH_LEASE_S": "5",
        **changes,
    }


@asynccontextmanager
async def docker_plane(
    harness: DockerHarness,
    database_url: str,
    folder: Path,
    *,
    policy: dict[str, Any] | None = None,
    **changes: str,
) -> AsyncIterator[Place]:
    """A replica with a product of its own; its containers go with the harness."""
    sock = bind("127.0.0.1", 0)
    plane = ControlPlane(settings_of(variables(harness, database_url, folder, **changes)))
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    admin = Api(url, {"X-Admin-Key": ADMIN_KEY})
    api: Api | None = None
    server, serving = None, None
    try:
        await plane.open()
        harness.will_clean(plane.deployment_id)
        server = Server(server_config(create_app(plane), plane.settings))
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        body = {"slug": f"p{id(plane):x}", "display_name": "P", "policy": policy or {}}
        status, product = await admin.post("/products/register", body)
        assert status == 200, product
        api = Api(url, {"X-Platform-Key": product["platform_api_key"]})
        api.headers["product_id"] = product["product_id"]
        yield Place(plane, url, api, admin)
    finally:
        for client in (api, admin):
            if client is not None:
                await client.close()
        if server is not None and serving is not None:
            server.should_exit = True
            await serving
        await plane.close()
        sock.close()
