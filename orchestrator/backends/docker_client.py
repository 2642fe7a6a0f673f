"""The connection to the daemon. Each call ends: with an answer, or as `BackendUnavailable` within seconds.

A start may take long on a busy host while a daemon that hangs must be noticed at once. So a call that takes longer than
`PATIENCE_S` goes on only while the daemon answers a ping beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any, TypeVar

import aiodocker
import aiohttp
from yarl import URL

from orchestrator.backends.docker_errors import map_error, mapped
from orchestrator.backends.docker_tunnel import SshTunnel
from orchestrator.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from orchestrator.backends.docker_host import DockerHost

__all__ = ["DockerClient"]

T = TypeVar("T")

PATIENCE_S = 2.0  # before the daemon is asked whether it still lives
PING_S = 2.0
CALL_S = 120.0  # a call that a live daemon does not finish
CONNECT_S = 4.0


class DockerClient:
    """Opens on first use, and again after `close`."""

    def __init__(self, host: DockerHost) -> None:
        self.host = host
        self._docker: aiodocker.Docker | None = None
        self._session: aiohttp.ClientSession | None = None
        self._tunnel = SshTunnel(host.ssh) if host.ssh is not None else None
        self._opening = asyncio.Lock()

    async def call(self, make: Callable[[aiodocker.Docker], Awaitable[T]], *, limit_s: float = CALL_S) -> T:
        """The answer of `make`. Raises `BackendError` or a subclass, and nothing else."""
        with mapped():
            docker = await self._connected()
            task = asyncio.ensure_future(make(docker))
            try:
                await self._attend(task, docker, limit_s)
            except BaseException:
                task.cancel()
                # Its own end is of no interest: the failure on the way out says what happened.
                await asyncio.gather(task, return_exceptions=True)
                raise
            try:
                return task.result()
            except Exception as error:
                if isinstance(map_error(error), BackendUnavailable):
                    # A daemon that comes back may be another version: its API version is asked anew.
                    docker.api_version = "auto"
                raise

    async def _attend(self, task: asyncio.Future[T], docker: aiodocker.Docker, limit_s: float) -> None:
        deadline = asyncio.get_running_loop().time() + limit_s
        while True:
            done, _ = await asyncio.wait({task}, timeout=PATIENCE_S)
            if done:
                return
            if asyncio.get_running_loop().time() > deadline:
                raise BackendUnavailable(f"Docker did not finish a call within {limit_s:g} s.")
            try:
                await self._ping(docker)
            except (aiohttp.ClientError, OSError, TimeoutError):
                if not task.done():
                    raise BackendUnavailable("Docker does not answer.") from None

    async def ping(self) -> None:
        """Raises `BackendUnavailable` when the daemon does not answer at once, `BackendError` when it refuses."""
        with mapped():
            status, answer = await self._ping(await self._connected())
            if status != 200:
                # Something answers that is no Docker Engine, or one that wants TLS.
                raise aiodocker.DockerError(status, answer)

    async def _ping(self, docker: aiodocker.Docker) -> tuple[int, str]:
        async with docker.session.get(
            URL(f"{docker.docker_host}/_ping"), timeout=aiohttp.ClientTimeout(total=PING_S)
        ) as response:
            return response.status, await response.text(errors="replace")

    async def json(self, method: str, path: str, body: Any = None) -> Any:
        """A verb that aiodocker does not offer."""

        async def ask(docker: aiodocker.Docker) -> Any:
            async with self._request(docker, method, path, {}, body) as response:
                content = await response.read()
                return json.loads(content) if content else None

        return await self.call(ask)

    @contextlib.asynccontextmanager
    async def stream(self, path: str, params: dict[str, str]) -> AsyncIterator[aiohttp.StreamReader]:
        """The body of a GET that goes on as long as the daemon has something to say."""
        with mapped():
            docker = await self._connected()
            if docker.api_version == "auto":
                await self.call(lambda docker: docker.version())
            async with self._request(docker, "GET", path, params, None) as response:
                yield response.content

    @contextlib.asynccontextmanager
    async def _request(
        self, docker: aiodocker.Docker, method: str, path: str, params: dict[str, str], body: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        version = "" if docker.api_version == "auto" else f"/{docker.api_version}"
        url = URL(f"{docker.docker_host}{version}/{path}")
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
        async with docker.session.request(method, url, params=params, json=body, timeout=timeout) as response:
            if response.status >= 400:
                try:
                    message = (await response.json())["message"]
                except (ValueError, KeyError, TypeError, aiohttp.ContentTypeError):
                    message = await response.text(errors="replace")
                raise aiodocker.DockerError(response.status, str(message))
            yield response

    async def _connected(self) -> aiodocker.Docker:
        if self._tunnel is not None:
            await self._tunnel.ensure()
        if self._docker is None:
            async with self._opening:
                if self._docker is None:
                    self._docker = self._open()
        return self._docker

    def _open(self) -> aiodocker.Docker:
        # No limit: each follower of a log holds a connection.
        connector: aiohttp.BaseConnector
        if self.host.address is not None:
            tls = self.host.tls()
            name, port = self.host.address
            url = str(URL.build(scheme="https" if tls else "http", host=name, port=port))
            connector = aiohttp.TCPConnector(ssl=tls if tls is not None else True, limit=0)
        else:
            path = self._tunnel.socket if self._tunnel is not None else self.host.socket
            assert path is not None
            url = "unix://localhost"
            connector = aiohttp.UnixConnector(path, limit=0)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        # aiodocker is asked to look up neither the host nor certificates: that is done.
        return aiodocker.Docker(url=url, connector=connector, session=self._session, timeout=timeout)

    async def close(self) -> None:
        docker, self._docker = self._docker, None
        if docker is not None:
            await docker.close()
        session, self._session = self._session, None
        if session is not None:
            await session.close()
        if self._tunnel is not None:
            await self._tunnel.close()
