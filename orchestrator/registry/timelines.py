"""What operations are doing, as their processes last told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orchestrator.registry.database import Database, sql

if TYPE_CHECKING:
    from uuid import UUID

__all__ = ["TimelineRegistry"]


class TimelineRegistry:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def write(self, rows: list[dict[str, Any]]) -> None:
        """One statement for all. The word of an owner whose lease has passed on is left out."""
        await self._database.execute(sql("write_timelines"), rows, timeout_s=5)

    async def read(self, engine_id: UUID) -> dict[str, Any] | None:
        row = await self._database.fetchrow(sql("read_timeline"), engine_id)
        return None if row is None else dict(row)
