"""Containers by their id: each verb once, with what its refusal means."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import structlog

from orchestrator.backends.docker_errors import Conflict, NoSuchObject
from orchestrator.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import aiodocker

    from orchestrator.backends.docker_client import DockerClient

__all__ = ["Containers", "is_live"]

log = structlog.get_logger("orchestrator.docker")

Inspected = dict[str, Any]

_KILL_PATIENCE_S = 10.0
_PAUSE_TRIES = 5
_PAUSE_RETRY_S = 0.1
# One question of a longer wait.
_WAIT_S = 2.0


def is_live(found: Inspected) -> bool:
    """A process exists. (Between two restarts Docker calls a container running, too.)"""
    state = found["State"]
    return bool(state.get("Running")) and not state.get("Restarting") and not state.get("Dead")


class Containers:
    """Raises `NoSuchObject` where the object is needed; where it should be gone, a missing one is fine."""

    def __init__(self, client: DockerClient) -> None:
        self._client = client

    async def create(self, name: str, config: dict[str, Any]) -> str:
        created = await self._client.call(lambda docker: docker.containers.create(config, name=name))
        return created.id

    async def show(self, reference: str) -> Inspected | None:
        """Everything about a container; None when there is none."""
        try:
            return await self._client.call(lambda docker: docker.containers.container(reference).show())
        except NoSuchObject:
            return None

    async def labelled(self, labels: Mapping[str, str | None]) -> list[Any]:
        """Containers with these labels (None: of any value), in every state, in one call."""
        filters = {"label": [name if value is None else f"{name}={value}" for name, value in labels.items()]}
        return await self._client.call(lambda docker: docker.containers.list(all=True, filters=filters))

    async def start(self, container: str) -> None:
        """Started already is fine."""
        await self._client.call(lambda docker: docker.containers.container(container).start())

    async def update(self, container: str, limits: dict[str, Any]) -> None:
        await self._client.json("POST", f"containers/{container}/update", limits)

    async def set_paused(self, container: str, *, paused: bool) -> bool:
        """False when there is no process to pause or unpause. Paused (unpaused) already is fine."""

        async def ask(docker: aiodocker.Docker) -> None:
            handle = docker.containers.container(container)
            await (handle.pause() if paused else handle.unpause())

        for attempt in range(1, _PAUSE_TRIES + 1):
            try:
                await self._client.call(ask)
            except BackendError as error:
                if error.code != BackendError.code:
                    raise
                # The state tells more than the words of the refusal, which differ between versions.
                found = await self.show(container)
                if found is None or not is_live(found):
                    return False
                if bool(found["State"].get("Paused")) is paused:
                    return True
                # On a busy host the kernel may not have frozen every process when the runtime gives up.
                if attempt == _PAUSE_TRIES:
                    raise
                await asyncio.sleep(_PAUSE_RETRY_S * attempt)
            else:
                return True
        raise AssertionError("unreachable: the last refusal is raised again")

    async def stop(self, found: Inspected, grace_s: float) -> None:
        """SIGTERM, wait, SIGKILL, in short calls. A kill through the API ends the daemon's own restarts as well."""
        container = found["Id"]
        started = found["State"].get("StartedAt")
        if not found["State"].get("Running") or not await self._kill(container, "SIGTERM"):
            return
        if found["State"].get("Paused"):
            # Some versions do it with the signal, some do not.
            await self.set_paused(container, paused=False)
        if await self._ended(container, started, grace_s):
            return
        log.warning("engine_killed", container=container[:12], grace_s=grace_s)
        if await self._kill(container, "SIGKILL") and not await self._ended(container, started, _KILL_PATIENCE_S):
            raise BackendError(f"The container {container[:12]} does not end, even by SIGKILL.")

    async def _kill(self, container: str, signal: str) -> bool:
        """False when there is no process any more."""
        try:
            await self._client.call(lambda docker: docker.containers.container(container).kill(signal=signal))
        except BackendError as error:
            if error.code != BackendError.code:
                raise
            if isinstance(error, Conflict) and "is not running" in error.message:
                return False  # what was meant has ended; somebody may have started it again since
            found = await self.show(container)
            if found is not None and found["State"].get("Running"):
                raise
            return False
        return True

    async def _ended(self, container: str, started: str, within_s: float) -> bool:
        """Wait for the end of the process started then, by questions that may be given up without a trace.

        One that somebody has started since is not ours to wait for, nor to kill.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + within_s
        while True:
            left_s = deadline - loop.time()
            try:
                async with asyncio.timeout(max(0.05, min(left_s, _WAIT_S))):
                    await self._client.call(lambda docker: docker.containers.container(container).wait())
            except NoSuchObject:
                return True
            except TimeoutError:
                now = await self.show(container)
                if now is None or not now["State"].get("Running") or now["State"].get("StartedAt") != started:
                    return True
                if left_s <= _WAIT_S:
                    return False
            else:
                return True

    async def remove(self, container: str) -> None:
        """The container and its process, never a named volume."""
        try:
            await self._client.call(lambda docker: docker.containers.container(container).delete(force=True))
        except NoSuchObject:
            return
        except Conflict as error:
            if "already in progress" not in error.message:
                raise
            await self._until_gone(container)

    async def _until_gone(self, container: str) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _KILL_PATIENCE_S
        while await self.show(container) is not None:
            if loop.time() > deadline:
                raise BackendError(f"The container {container[:12]} is being removed and does not go away.")
            await asyncio.sleep(0.1)
