"""Images: found, or pulled once however many ask for them, with the credentials of the usual Docker configuration."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from orchestrator.backends.docker_errors import NoSuchObject, image_error
from orchestrator.errors import ImageNotFound

if TYPE_CHECKING:
    from collections.abc import Callable

    import aiodocker

    from orchestrator.backends.docker_client import DockerClient

__all__ = ["Images", "credentials", "is_lasting", "registry_of"]

log = structlog.get_logger("orchestrator.docker")

_HUB = "docker.io"
_HUB_KEYS = ("https://index.docker.io/v1/", "index.docker.io", "docker.io")
_HELPER_S = 10.0
_LOG_EVERY_S = 5.0
_HELPER_NAME = re.compile(r"[A-Za-z0-9._-]+")
_REFERENCE = re.compile(r"[a-z0-9][A-Za-z0-9._:/@\[\]-]{0,511}")


class Images:
    """`resolve` names what an image is now; engines are re-created from that name, whatever its tag says later."""

    def __init__(self, client: DockerClient, pull_timeout_s: float) -> None:
        self._client = client
        self._pull_timeout_s = pull_timeout_s
        self._pulls: dict[str, asyncio.Task[None]] = {}
        self._watchers: dict[str, list[Callable[[str], None]]] = {}
        self._next_word: dict[str, float] = {}

    async def resolve(self, image: str, progress: Callable[[str], None] | None = None) -> str:
        """The image's name by digest, or its id when it came from no registry; pulled when it is missing.

        Raises `ImageNotFound`, `BackendUnavailable`.
        """
        if not _REFERENCE.fullmatch(image):
            raise ImageNotFound(image[:256], "not the name of an image")
        found = await self._inspect(image)
        if found is None:
            if image.startswith("sha256:"):
                raise ImageNotFound(image, "not on this host, and an id alone cannot be pulled")
            await self._pulled(image, progress)
            found = await self._inspect(image)
            if found is None:
                raise ImageNotFound(image, "pulled, and gone again")
        if is_lasting(image):
            return image
        repository = image.rpartition(":")[0] if ":" in image.rpartition("/")[2] else image
        for digest in found.get("RepoDigests") or []:
            if str(digest).partition("@")[0] == repository:
                return str(digest)
        return str(found["Id"])

    async def _inspect(self, image: str) -> dict[str, Any] | None:
        try:
            return await self._client.call(lambda docker: docker.images.inspect(image))
        except NoSuchObject:
            return None

    async def _pulled(self, image: str, progress: Callable[[str], None] | None) -> None:
        """Wait for the one pull of this image. A caller who goes away does not end it."""
        pull = self._pulls.get(image)
        if pull is None:
            pull = self._pulls[image] = asyncio.create_task(self._pull(image))
            pull.add_done_callback(lambda task: self._done(image, task))
        watchers = self._watchers.setdefault(image, [])
        if progress is not None:
            watchers.append(progress)
            progress(f"pulling {image}")
        try:
            await asyncio.shield(pull)
        finally:
            if progress is not None:
                watchers.remove(progress)

    def _done(self, image: str, task: asyncio.Task[None]) -> None:
        self._pulls.pop(image, None)
        self._watchers.pop(image, None)
        self._next_word.pop(image, None)
        if not task.cancelled():
            task.exception()  # those who wait have it; without them nobody does

    async def _pull(self, image: str) -> None:
        log.info("image_pull", image=image)
        registry, name = registry_of(image)
        auth = await credentials(registry)

        async def pull(docker: aiodocker.Docker) -> None:
            try:
                async for step in docker.images.pull(name, auth=auth, stream=True):
                    self._tell(image, step)
            except Exception as error:
                raise image_error(image, error) from error

        try:
            async with asyncio.timeout(self._pull_timeout_s):
                await self._client.call(pull, limit_s=self._pull_timeout_s)
        except TimeoutError:
            raise ImageNotFound(image, f"not pulled within {self._pull_timeout_s:g} s") from None
        log.info("image_pulled", image=image)

    def _tell(self, image: str, step: dict[str, Any]) -> None:
        detail = step.get("progressDetail") or {}
        current, total = detail.get("current"), detail.get("total")
        part = f" {100 * current // total}%" if current and total else ""
        line = f"{step.get('id', '')} {step.get('status', '')}{part}".strip()
        now = asyncio.get_running_loop().time()
        if now >= self._next_word.get(image, 0):
            self._next_word[image] = now + _LOG_EVERY_S
            log.info("image_pull_progress", image=image, progress=line)
        for watcher in list(self._watchers.get(image, ())):
            watcher(line)

    async def close(self) -> None:
        pulls = list(self._pulls.values())
        for pull in pulls:
            pull.cancel()
        await asyncio.gather(*pulls, return_exceptions=True)


def is_lasting(image: str) -> bool:
    """A digest or an id: what it names never changes."""
    return "@" in image or image.startswith("sha256:")


def registry_of(image: str) -> tuple[str, str]:
    """The registry of an image, and its name in full."""
    first, slash, _ = image.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return first, image
    return _HUB, f"{_HUB}/{image}" if slash else f"{_HUB}/library/{image}"


async def credentials(registry: str) -> dict[str, Any] | None:
    """What the Docker configuration has for a registry: a login, or the answer of its credential helper."""
    directory = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
    try:
        config = json.loads((directory / "config.json").read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("docker_config_unreadable", path=str(directory / "config.json"), error=type(error).__name__)
        return None
    keys = _HUB_KEYS if registry == _HUB else (registry, f"https://{registry}", f"http://{registry}")
    helpers = config.get("credHelpers") or {}
    for key in keys:
        helper = helpers.get(key) or config.get("credsStore")
        if helper and (found := await _ask_helper(str(helper), key)):
            return found
        if found := _login((config.get("auths") or {}).get(key)):
            return found
    return None


def _login(entry: Any) -> dict[str, Any] | None:
    if not isinstance(entry, dict):
        return None
    if token := entry.get("identitytoken"):
        return {"identitytoken": token}
    try:
        user, _, password = base64.b64decode(entry.get("auth", "")).decode().partition(":")
    except ValueError:
        return None
    return {"username": user, "password": password.rstrip("\0")} if user else None


async def _ask_helper(helper: str, server: str) -> dict[str, Any] | None:
    """The helper's protocol: the server on its input, a JSON with user name and secret on its output."""
    program = shutil.which(f"docker-credential-{helper}") if _HELPER_NAME.fullmatch(helper) else None
    if program is None:
        log.warning("docker_credential_helper_missing", helper=helper)
        return None
    process = await asyncio.create_subprocess_exec(
        program,
        "get",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(_HELPER_S):
            output, _ = await process.communicate(server.encode())
        answer = json.loads(output) if process.returncode == 0 else {}
    except (TimeoutError, ValueError):
        return None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    user, secret = answer.get("Username"), answer.get("Secret")
    if not user or not secret:
        return None
    return {"identitytoken": secret} if user == "<token>" else {"username": user, "password": secret}
