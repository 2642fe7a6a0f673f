"""The platform keys of a product. Only their SHA-256 is stored."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from orchestrator.errors import InvalidRequest, ProductNotFound, TooMany
from orchestrator.registry.database import Database, sql
from orchestrator.registry.rows import PlatformKey

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

__all__ = ["MAX_KEYS", "PlatformKeyRegistry"]

CHANGE_TIMEOUT_S = 10.0  # other processes may be changing the same product
MAX_KEYS = 100  # valid ones, of one product


class PlatformKeyRegistry:
    """Changes are made under the product's row lock, each with its audit row in the same transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._turn = asyncio.Lock()  # one connection at a time waits for the product's row: a burst leaves the pool

    async def issue(
        self, product_id: UUID, key_hash: str, scopes: list[str], expires_at: datetime | None
    ) -> PlatformKey:
        """Raises `ProductNotFound`, `TooMany`, and `InvalidRequest` when it would have expired already."""
        async with self._turn, self._database.transaction(timeout_s=CHANGE_TIMEOUT_S) as connection:
            await _lock(connection, product_id)
            return await _issue(connection, product_id, key_hash, scopes, expires_at, {})

    async def rotate(self, product_id: UUID, key_hash: str, overlap_s: int) -> PlatformKey:
        """A new `manage` key; those that there were end after the overlap. Raises `ProductNotFound`, `TooMany`."""
        async with self._turn, self._database.transaction(timeout_s=CHANGE_TIMEOUT_S) as connection:
            await _lock(connection, product_id)
            await connection.execute(sql("expire_manage_keys"), product_id, overlap_s)
            more = {"rotation": True, "overlap_seconds": overlap_s}
            return await _issue(connection, product_id, key_hash, ["manage"], None, more)

    async def listed(self, product_id: UUID) -> list[PlatformKey]:
        """In order of their making, expired ones too. Raises `ProductNotFound`."""
        async with self._database.transaction() as connection:
            if await connection.fetchrow(sql("product_by_id"), product_id) is None:
                raise ProductNotFound(str(product_id))
            return [PlatformKey(**dict(row)) for row in await connection.fetch(sql("list_keys"), product_id)]

    async def revoke(self, product_id: UUID, key_id: UUID) -> bool:
        """At once: no call passes with it any more. False when there is no such key. Raises `ProductNotFound`."""
        async with self._turn, self._database.transaction(timeout_s=CHANGE_TIMEOUT_S) as connection:
            await _lock(connection, product_id)
            return await connection.fetchval(sql("revoke_key"), product_id, key_id) is not None


async def _lock(connection: Any, product_id: UUID) -> None:
    if await connection.fetchrow(sql("lock_product"), product_id) is None:
        raise ProductNotFound(str(product_id))


async def _issue(
    connection: Any,
    product_id: UUID,
    key_hash: str,
    scopes: list[str],
    expires_at: datetime | None,
    more: dict[str, Any],
) -> PlatformKey:
    await connection.execute(sql("forget_expired_keys"), product_id)
    if await connection.fetchval(sql("count_valid_keys"), product_id) >= MAX_KEYS:
        raise TooMany("keys", MAX_KEYS)
    row = await connection.fetchrow(sql("issue_key"), product_id, key_hash, scopes, expires_at, more)
    if row is None:
        raise InvalidRequest("expires_at", "must be in the future")
    return PlatformKey(**dict(row))
