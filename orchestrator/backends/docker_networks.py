"""The networks that engines live on: bridges on which containers cannot reach each other, and more when one is full."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import structlog

from orchestrator.backends.docker_names import NETWORK
from orchestrator.errors import BackendError, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from orchestrator.backends.docker_client import DockerClient

__all__ = ["Networks"]

log = structlog.get_logger("orchestrator.docker")

_ICC = "com.docker.network.bridge.enable_icc"
_BRIDGE = "com.docker.network.bridge.name"
# deploy/firewall.sh knows the bridges of engines by this, also those that are made after it ran.
BRIDGE_PREFIX = "oeng-"
# A Linux bridge has 1,024 ports; some are left to others.
ENDPOINTS = 1000


class Networks:
    """`{name}`, `{name}-2`, …; the first one with room is used."""

    def __init__(self, client: DockerClient, name: str, *, isolated: bool, endpoints: int = ENDPOINTS) -> None:
        self._client = client
        self._name = name
        self._isolated = isolated
        self._endpoints = endpoints
        self._known: set[str] = set()
        self._used: dict[str, int] = {}
        self._full: set[str] = set()
        # In address mode `network` this process itself must be on every network.
        self._own_container: str | None = None

    def _nth(self, n: int) -> str:
        return self._name if n == 1 else f"{self._name}-{n}"

    async def pick(self) -> str:
        """The network for one more container; made when missing."""
        n = 1
        while (name := self._nth(n)) in self._full or self._used.get(name, 0) >= self._endpoints:
            n += 1
        await self.ensure(name)
        self._used[name] = self._used.get(name, 0) + 1
        return name

    def count(self, networks: Iterable[str]) -> None:
        """What a list of all our containers showed: the counts start again from the truth."""
        self._used.clear()
        self._full.clear()
        for name in networks:
            self._used[name] = self._used.get(name, 0) + 1

    def is_full(self, name: str) -> None:
        """The daemon refused a container on this network; others fill it too."""
        self._full.add(name)

    def forget(self, name: str) -> None:
        """The network was not there when it was used."""
        self._known.discard(name)

    async def ensure(self, name: str | None = None) -> None:
        """Raises `ConfigurationError` when a network of this name does not isolate as the address mode wants."""
        name = name or self._name
        if name in self._known:
            return
        found = await self.find(name)
        if found is None:
            await self._create(name)
            found = await self.find(name)
        options: dict[str, str] = (found or {}).get("Options") or {}
        open_between = options.get(_ICC, "true") != "false"
        if self._isolated and open_between:
            raise ConfigurationError(
                f"ORCH_ENGINE_NETWORK: engines on the network '{name}' could reach each other; remove it "
                f"(the orchestrator makes it), make it with the option {_ICC}=false, or choose another name."
            )
        if not self._isolated and not open_between:
            raise ConfigurationError(
                f"ORCH_ENGINE_NETWORK: the network '{name}' lets nobody reach an engine "
                f"(option {_ICC}=false), as ORCH_ENGINE_URL_MODE=network needs; choose another name."
            )
        if self._own_container is not None:
            await self._join(name, self._own_container)
        self._known.add(name)

    async def join_all(self, own_container: str) -> None:
        """Put the container of this process on every network of engines, and on each one that is made from now on."""
        self._own_container = own_container
        self._known.clear()
        filters = {"label": [f"{NETWORK}={self._name}"]}
        for network in await self._client.call(lambda docker: docker.networks.list(filters=filters)):
            await self.ensure(str(network["Name"]))

    async def find(self, name: str) -> dict[str, Any] | None:
        """The network of exactly this name, with its containers."""
        found = await self._client.call(lambda docker: docker.networks.list(filters={"name": [f"^{name}$"]}))
        for network in found:
            if network["Name"] == name:
                return dict(await self._client.json("GET", f"networks/{network['Id']}"))
        return None

    async def _create(self, name: str) -> None:
        config = {
            "Name": name,
            "Driver": "bridge",
            "CheckDuplicate": True,
            "Labels": {NETWORK: self._name},
            "Options": {
                _ICC: "false" if self._isolated else "true",
                _BRIDGE: BRIDGE_PREFIX + hashlib.sha256(name.encode()).hexdigest()[:8],
            },
        }
        try:
            await self._client.call(lambda docker: docker.networks.create(config))
            log.info("network_created", network=name)
        except BackendError:
            # Another replica may have been first; the name or the bridge is then taken.
            if await self.find(name) is None:
                raise

    async def _join(self, name: str, container: str) -> None:
        try:
            await self._client.call(lambda docker: _connect(docker, name, container))
        except BackendError as error:
            if "already exists in network" not in error.message:
                raise


async def _connect(docker: Any, name: str, container: str) -> None:
    network = await docker.networks.get(name)
    await network.connect({"Container": container})
