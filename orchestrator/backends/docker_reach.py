"""Can this process reach the engines that it will probe? Asked once, at the start, before anything is promised."""

from __future__ import annotations

import errno
import ipaddress
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.backends.docker_host import is_loopback
from orchestrator.errors import ConfigurationError

if TYPE_CHECKING:
    from orchestrator.backends.docker_client import DockerClient
    from orchestrator.backends.docker_networks import Networks
    from orchestrator.settings import Settings

__all__ = ["check_reach"]

_CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv")


async def check_reach(client: DockerClient, networks: Networks, settings: Settings) -> str | None:
    """Raises `ConfigurationError`. In address mode `network`: the id of the container that this process runs in."""
    await networks.ensure()
    network = await networks.find(settings.engine_network)
    if network is None:
        return None
    if settings.engine_url_mode == "network":
        own = _own_container(network)
        if own is None:
            raise ConfigurationError(
                f"ORCH_ENGINE_URL_MODE=network: this process is not on the network '{settings.engine_network}' and "
                "could not reach an engine; run it in a container on that network, or use the mode 'host'."
            )
        return own
    if not is_loopback(settings.engine_host) or client.host.is_remote:
        return None  # an address that we were told of: only the engine itself can show whether it is right
    # Published on the loopback of the daemon's host: ours is the same one when we have its side of the bridge.
    if in_container() and not any(_is_own_address(gateway) for gateway in _gateways(network)):
        raise ConfigurationError(
            f"ORCH_ENGINE_HOST: {settings.engine_host} inside this container is not the host's; give the container "
            "host networking, or set ORCH_ENGINE_URL_MODE=network."
        )
    return None


def in_container() -> bool:
    return any(Path(mark).exists() for mark in _CONTAINER_MARKS)


def _own_container(network: dict[str, Any]) -> str | None:
    for container, endpoint in (network.get("Containers") or {}).items():
        for field in ("IPv4Address", "IPv6Address"):
            address = str(endpoint.get(field) or "").partition("/")[0]
            if address and _is_own_address(address):
                return str(container)
    return None


def _gateways(network: dict[str, Any]) -> list[str]:
    configurations = (network.get("IPAM") or {}).get("Config") or []
    return [str(entry["Gateway"]) for entry in configurations if entry.get("Gateway")]


def _is_own_address(address: str) -> bool:
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
        with socket.socket(family) as probe:
            probe.bind((address, 0))
    except ValueError:
        return False
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            return False
        raise
    return True
