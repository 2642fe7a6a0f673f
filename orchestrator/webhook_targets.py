"""Where a webhook may lead: what the network's operator did not open is not reached through us.

A name is resolved, every address of it is checked, and exactly those addresses are connected to: a name that
changes its answer in between gains nothing.
"""

from __future__ import annotations

import asyncio
import socket
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING

from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Guard", "GuardedResolver", "RefusedTarget", "url_problem"]

RESOLVE_TIMEOUT_S = 5.0
_NAT64 = IPv6Network("64:ff9b::/96")

Address = IPv4Address | IPv6Address


class RefusedTarget(OSError):
    """The name or address leads into a network that webhooks may not reach."""


def url_problem(url: str) -> str | None:
    """What is wrong with the URL of a webhook, whatever its host resolves to; None when it is well-formed."""
    if len(url) > 2048:
        return "must have at most 2048 characters"
    if not url.isascii() or not url.isprintable() or " " in url:
        return "must be ASCII without spaces or control characters; escape others"
    try:
        parts = URL(url)
        host, port = parts.host, parts.port
    except ValueError:
        return "is not a URL"
    if parts.scheme not in ("http", "https") or not host or port is None:
        return "must begin with http:// or https:// and name a host"
    if parts.user is not None or parts.password is not None:
        return "must not contain a user or password; deliveries are signed"
    if parts.fragment:
        return "must not contain a fragment"
    return None


class Guard:
    """Only public addresses, and the networks that `ORCH_WEBHOOK_ALLOWED_NETWORKS` names."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed: list[IPv4Network | IPv6Network] = [ip_network(network) for network in allowed]

    def refuses(self, address: str) -> bool:
        found = ip_address(address.partition("%")[0])
        return any(not self._reachable(meant) for meant in _meant(found))

    def _reachable(self, address: Address) -> bool:
        if any(address in network for network in self._allowed):
            return True
        if isinstance(address, IPv6Address) and address.is_site_local:
            return False
        return address.is_global and not (address.is_multicast or address.is_reserved)

    async def resolve(self, host: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
        """The addresses of a host. Raises `RefusedTarget` when one of them is refused, `OSError` without any."""
        try:
            async with asyncio.timeout(RESOLVE_TIMEOUT_S):
                found = await asyncio.get_running_loop().getaddrinfo(
                    host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
                )
        except (TimeoutError, UnicodeError):
            raise OSError(f"{host} does not resolve") from None
        addresses: list[tuple[socket.AddressFamily, str]] = [
            (family, str(sockaddr[0])) for family, _, _, _, sockaddr in found
        ]
        if any(self.refuses(address) for _, address in addresses):
            raise RefusedTarget("a private, loopback or link-local address")
        return addresses


def _meant(address: Address) -> list[Address]:
    """The address, and the IPv4 address that it stands for in one of the ways of writing or tunnelling it."""
    if isinstance(address, IPv4Address):
        return [address]
    meant: list[Address] = []
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    if address.sixtofour is not None:
        meant.append(address.sixtofour)
    if address.teredo is not None:
        meant.extend(address.teredo)
    if address in _NAT64:
        return [IPv4Address(int(address) & 0xFFFFFFFF)]
    return [address, *meant]


class GuardedResolver(AbstractResolver):
    """Gives the connector checked addresses only. (An address in a URL is not resolved: check it before.)"""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=found,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for found, address in await self._guard.resolve(host, port)
        ]

    async def close(self) -> None:
        return None
