"""The conformance suite's way into engines that are containers."""

from __future__ import annotations

import contextlib
import secrets
from typing import TYPE_CHECKING, Any

import httpx

from orchestrator.backends.docker_backend import DockerBackend
from tests.conformance.conftest import MimicHarness, settings
from tests.docker.daemon import IMAGE, OTHER_IMAGE, build_images, docker

if TYPE_CHECKING:
    from pathlib import Path
    from uuid import UUID

    from orchestrator.backends.base import EngineEndpoint
    from orchestrator.settings import Settings

__all__ = ["DockerHarness"]


class DockerHarness(MimicHarness):
    """Networks of its own; everything that it made is gone after `close`, also what a failed test left."""

    cli_host: str | None = None
    image = IMAGE
    other_image = OTHER_IMAGE

    def __init__(self, folder: Path, **overrides: Any) -> None:
        super().__init__()
        build_images()
        self.network = f"orch-test-{secrets.token_hex(4)}"
        self.settings: Settings = settings(folder).model_copy(update={"engine_network": self.network, **overrides})
        self._deployments: set[UUID] = set()

    def make(self, deployment_id: UUID) -> DockerBackend:
        self._deployments.add(deployment_id)
        return DockerBackend.from_settings(self.settings, deployment_id)

    async def backend(self, deployment_id: UUID | None = None) -> DockerBackend:
        made = self.make(deployment_id or self.deployment_id)
        await made.open()
        self._backends.append(made)
        return made

    def adopt(self, backend: DockerBackend) -> None:
        """A backend made by a test is closed, and what it made is removed, as well."""
        self._backends.append(backend)
        self.will_clean(self.deployment_id)

    def will_clean(self, deployment_id: UUID) -> None:
        """What a deployment made elsewhere is removed as well."""
        self._deployments.add(deployment_id)

    async def close(self) -> None:
        await self._client.aclose()
        for backend in self._backends:
            await backend.close()
        for deployment in self._deployments:
            mark = f"label=engine-orchestrator.deployment={deployment}"
            if left := self._docker("ps", "--all", "--quiet", "--filter", mark).split():
                self._docker("rm", "--force", *left, check=False)
            if left := self._docker("volume", "ls", "--quiet", "--filter", mark).split():
                self._docker("volume", "rm", "--force", *left)
        mark = f"label=engine-orchestrator.network={self.network}"
        if left := self._docker("network", "ls", "--quiet", "--filter", mark).split():
            self._docker("network", "rm", *left)

    def _docker(self, *arguments: str, check: bool = True) -> str:
        return docker(*arguments, check=check, host=self.cli_host)

    async def _call(self, endpoint: EngineEndpoint, method: str, path: str, body: str = "") -> httpx.Response:
        # Docker accepts connections before the engine does: only an answer shows that it is up.
        url = f"http://{endpoint.host}:{endpoint.port}"
        while True:  # ended by the time limit of the test
            with contextlib.suppress(httpx.TransportError):
                if (await self._client.get(f"{url}/health")).status_code == 200:
                    break
        return await self._client.request(method, f"{url}{path}", content=body)
