"""Questions about many engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.registry.database import Database, sql

if TYPE_CHECKING:
    from uuid import UUID

    import asyncpg

__all__ = ["FleetRegistry"]


class FleetRegistry:
    """`product_id` None means: of all products."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def engines(
        self, product_id: UUID | None, status: str | None, limit: int, offset: int
    ) -> tuple[list[asyncpg.Record], int]:
        """One page in order of creation, and how many there are in all."""
        rows = await self._database.fetch(sql("list_engines"), product_id, status, limit, offset)
        total: int = await self._database.fetchval(sql("count_listed"), product_id, status)
        return rows, total

    async def by_status(self, product_id: UUID | None) -> list[asyncpg.Record]:
        """Rows of `(product_id, status, engines)`."""
        return await self._database.fetch(sql("count_by_status"), product_id)

    async def restarts(self, product_id: UUID | None) -> asyncpg.Record:
        """How many failed engines are `pending`, `parked` by an outage, or `gave_up`."""
        row = await self._database.fetchrow(sql("restarts"), product_id)
        assert row is not None  # aggregates always give a row
        return row

    async def slugs(self) -> dict[UUID, str]:
        """Of all products."""
        return {row["id"]: row["slug"] for row in await self._database.fetch(sql("product_slugs"))}

    async def by_slug(self) -> list[asyncpg.Record]:
        """Rows of `(slug, status, engines, pool)`."""
        return await self._database.fetch(sql("engines_by_slug"), timeout_s=5)

    async def metrics(self, product_id: UUID | None) -> asyncpg.Record:
        row = await self._database.fetchrow(sql("metrics"), product_id)
        assert row is not None  # aggregates always give a row
        return row
