"""The rate limit's books: slots for small limits, blocks for large ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.registry.database import Database, sql

if TYPE_CHECKING:
    from uuid import UUID

__all__ = ["SLOT_LIMIT", "RateRegistry"]

SLOT_LIMIT = 600  # up to here each call is counted by itself


class RateRegistry:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def take_slot(self, product_id: UUID) -> bool:
        """Count one call; False when the last 60 s are full."""
        return await self._database.fetchval(sql("rate_take_slot"), product_id) is not None

    async def take_block(self, product_id: UUID, limit_rpm: int) -> tuple[int, int] | None:
        """A block `(id, calls)` to use within one second; None when the last 60 s are full."""
        async with self._database.transaction() as connection:
            await connection.execute(sql("rate_lock"), str(product_id))
            row = await connection.fetchrow(sql("rate_take_block"), product_id, limit_rpm)
            return None if row is None else (row["id"], row["calls"])

    async def settle_blocks(self, used: dict[int, int]) -> None:
        """Give back what was left of these blocks (block id → calls used)."""
        await self._database.execute(sql("rate_settle_blocks"), list(used), list(used.values()))

    async def retry_after_s(self, product_id: UUID) -> int:
        """Seconds until the oldest counted call leaves the window, at least 1."""
        seconds: int = await self._database.fetchval(sql("rate_retry_after"), product_id)
        return min(max(1, seconds), 61)

    async def repair(self) -> None:
        """After a clock that was set back; and blocks that count no more are forgotten."""
        await self._database.execute(sql("rate_repair"))
        await self._database.execute(sql("rate_forget"))
