"""Products and their platform keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import asyncpg

from orchestrator.errors import ProductNotEmpty, ProductNotFound
from orchestrator.registry.database import Database, sql
from orchestrator.registry.rows import Caller, Product

if TYPE_CHECKING:
    from uuid import UUID

__all__ = ["ProductRegistry"]


class ProductRegistry:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def register(self, slug: str, display_name: str, policy: dict[str, Any], key_hash: str) -> UUID | None:
        """The new product's id, with one `manage` key and its audit row; None when the slug is taken."""
        async with self._database.transaction() as connection:
            product_id: UUID | None = await connection.fetchval(
                sql("insert_product"), slug, display_name, policy, key_hash
            )
            if product_id is not None:
                await _resize_rate(connection, product_id, policy)
            return product_id

    async def replace_policy(self, product_id: UUID, policy: dict[str, Any]) -> bool:
        """True when the product exists; the new policy is in force for the next call."""
        async with self._database.transaction() as connection:
            await connection.execute(sql("rate_lock"), str(product_id))
            former = await connection.fetchrow(sql("lock_product"), product_id)
            if former is None:
                return False
            await connection.execute(sql("update_policy"), product_id, policy)
            if policy.get("rate_limit_rpm") != former["policy"].get("rate_limit_rpm"):
                await _resize_rate(connection, product_id, policy)
            return True

    async def listed(self) -> list[asyncpg.Record]:
        """Rows of `(id, slug, display_name, policy, engines)`, in order of registration."""
        return await self._database.fetch(sql("list_products"))

    async def begin_delete(self, product_id: UUID, *, force: bool) -> None:
        """Record that the product shall go: its keys are revoked and it takes no call any more.

        Raises `ProductNotFound`, and `ProductNotEmpty` without `force` while it has engines. One that is being
        deleted already is no error.
        """
        async with self._database.transaction(timeout_s=10) as connection:
            row = await connection.fetchrow(sql("lock_product_to_delete"), product_id)
            if row is None:
                raise ProductNotFound(str(product_id))
            if row["deleting_at"] is not None:
                return
            engines = await connection.fetchval(sql("count_engines"), product_id)
            if engines and not force:
                raise ProductNotEmpty(engines)
            await connection.execute(sql("mark_product_deleting"), product_id)

    async def deleting(self) -> list[UUID]:
        """Products whose deletion is under way."""
        return [row["id"] for row in await self._database.fetch(sql("deleting_products"))]

    async def users(self, product_id: UUID, limit: int) -> list[str]:
        """Up to `limit` users that have an engine."""
        return [row["user_id"] for row in await self._database.fetch(sql("users_of_product"), product_id, limit)]

    async def remove(self, product_id: UUID) -> bool:
        """End a deletion; False while an engine is left."""
        return await self._database.fetchval(sql("remove_product"), product_id) is not None

    async def by_id(self, product_id: UUID) -> Product | None:
        row = await self._database.fetchrow(sql("product_by_id"), product_id)
        return None if row is None else Product(**dict(row))

    async def by_slug(self, slug: str) -> Product | None:
        row = await self._database.fetchrow(sql("product_by_slug"), slug)
        return None if row is None else Product(**dict(row))

    async def add_key(self, product_id: UUID, key_hash: str) -> None:
        await self._database.execute(sql("replace_platform_key"), product_id, key_hash)

    async def caller(self, key_hash: str) -> Caller | None:
        """Who calls with this key; None when it is unknown or expired."""
        row = await self._database.fetchrow(sql("caller_by_key"), key_hash)
        return None if row is None else caller_of(row)

    async def revision(self) -> str | None:
        """The migration that the database is at; None before the first one."""
        try:
            revision: str | None = await self._database.fetchval(sql("revision"))
        except asyncpg.UndefinedTableError:
            return None
        return revision

    async def record_key_use(self, key_ids: list[UUID]) -> None:
        await self._database.execute(sql("record_key_use"), key_ids)


def caller_of(row: asyncpg.Record) -> Caller:
    return Caller(row["product_id"], row["slug"], frozenset(row["scopes"]), row["key_id"])


async def _resize_rate(connection: Any, product_id: UUID, policy: dict[str, Any]) -> None:
    limit_rpm = policy.get("rate_limit_rpm")
    if limit_rpm is not None:  # without one the books stay: another limit may follow within the minute
        await connection.execute(sql("rate_lock_slots"), product_id)
        await connection.execute(sql("rate_resize"), product_id, limit_rpm)
