"""Who is idle, and for how long."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.registry.database import Database, sql

if TYPE_CHECKING:
    from uuid import UUID

    import asyncpg

__all__ = ["IdleRegistry"]


class IdleRegistry:
    """Thresholds are seconds; 0 = never. A product's policy wins over the threshold that is given."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def due_sleeps(self, location_id: UUID, threshold_s: float, limit: int) -> list[asyncpg.Record]:
        return await self._database.fetch(sql("due_sleeps"), location_id, threshold_s, limit)

    async def due_unloads(self, location_id: UUID, threshold_s: float, limit: int) -> list[asyncpg.Record]:
        return await self._database.fetch(sql("due_unloads"), location_id, threshold_s, limit)

    async def idle_for_s(self, engine_id: UUID) -> float:
        """Seconds without an admit, a keep-alive or a change to running; negative in the time of a keep-alive."""
        return float(await self._database.fetchval(sql("idle_for"), engine_id) or 0)

    async def clock(self) -> float:
        """The database's time, as seconds."""
        return float(await self._database.fetchval(sql("clock")))

    async def restart_clocks(self, location_id: UUID) -> int:
        """After a jump of the clock: every engine here counts as active just now. How many are running."""
        return int(await self._database.fetchval(sql("restart_idle_clocks"), location_id, timeout_s=10))
