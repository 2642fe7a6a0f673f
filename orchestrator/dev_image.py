"""The engine's image for `orchestrator dev --backend docker`: found on the Docker Engine, built from this checkout, or
pulled."""

from __future__ import annotations

import asyncio
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.backends.docker_client import DockerClient
from orchestrator.backends.docker_errors import NoSuchObject
from orchestrator.backends.docker_host import find_docker_host
from orchestrator.backends.docker_pull import Images
from orchestrator.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BUILT_IMAGE", "SCRIPT", "provide_image"]

BUILT_IMAGE = "september-engine:dev"
SCRIPT = Path(__file__).resolve().parents[1] / "deploy" / "images.sh"
_END_S = 10.0
_WIDTH = 100
# Steps of a build, and what the scripts themselves say.
_WORTH_TELLING = re.compile(r"Step \d|base image |.*B over ")


async def provide_image(
    image: str, tell: Callable[[str], None], *, pull_timeout_s: float, built: str = BUILT_IMAGE
) -> str:
    """The image is on the Docker Engine when this returns; what was done: `found`, `built` or `pulled`.

    `built` is made from this checkout, and made again when its sources have changed since; any other image is pulled
    when it is missing. `tell` gets progress, a short line at a time. Raises `ConfigurationError`, `ImageNotFound`,
    `BackendUnavailable`.
    """
    client = DockerClient(find_docker_host())
    try:
        await client.ping()
        found = await _exists(client, image)
        if image != built:
            if not found:
                await Images(client, pull_timeout_s).resolve(image, tell)
            return "found" if found else "pulled"
    finally:
        await client.close()
    if not SCRIPT.is_file():
        if found:
            return "found"
        raise ConfigurationError(
            f"The image {image} is not on this Docker Engine: build it in a checkout of engine-orchestrator "
            "(make images), or name another one in ORCH_ENGINE_IMAGE."
        )
    if found and await _script(image, lambda _: None, "--check") == 0:
        return "found"
    said: list[str] = []

    def hear(line: str) -> None:
        said.append(line)
        if _WORTH_TELLING.match(line):
            tell(line[:_WIDTH])

    if await _script(image, hear, "--progress") != 0:
        what = next((line for line in reversed(said) if line.strip()), "no reason given")
        raise ConfigurationError(f"The engine's image could not be built ({what}); see 'deploy/images.sh engine'.")
    return "built"


async def _exists(client: DockerClient, image: str) -> bool:
    try:
        await client.call(lambda docker: docker.images.inspect(image))
    except NoSuchObject:
        return False
    return True


async def _script(image: str, hear: Callable[[str], None], option: str) -> int:
    """Run `deploy/images.sh` to its end; it ends with us."""
    try:
        process = await asyncio.create_subprocess_exec(
            str(SCRIPT),
            option,
            "engine",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "ENGINE_TAG": image},
        )
    except OSError as error:
        raise ConfigurationError(f"{SCRIPT} cannot be run ({error.strerror}).") from None
    assert process.stdout is not None
    try:
        while line := await process.stdout.readline():
            hear(line.decode(errors="replace").strip())
        return await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            with suppress(TimeoutError):
                async with asyncio.timeout(_END_S):
                    await process.wait()
