"""Stored keys under their master keys, and the job that encrypts them all again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.registry.database import Database, sql

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RewrapRegistry"]


class RewrapRegistry:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def start(self, master_key_id: str) -> None:
        """Record that all keys shall be stored under this master key."""
        await self._database.execute(sql("start_rewrap"), master_key_id)

    async def wanted(self) -> tuple[str, bool] | None:
        """The master key of the job, and whether it is finished; None when there never was one."""
        row = await self._database.fetchrow(sql("rewrap_job"))
        return None if row is None else (row["master_key_id"], row["finished_at"] is not None)

    async def progress(self, master_key_id: str) -> tuple[int, int]:
        """How many keys are stored, and how many of them under this master key."""
        row = await self._database.fetchrow(sql("rewrap_progress"), master_key_id, timeout_s=10)
        assert row is not None  # aggregates always give a row
        return row["total"], row["done"]

    async def batch(self, master_key_id: str, rewrap: Callable[[str, str], str], limit: int) -> int:
        """Store up to `limit` keys, and as many secrets of webhooks, again; how many it was.

        `rewrap(ciphertext, master_key_id)` gives the new ciphertext.
        Rows that another replica works on are left to it.
        """
        async with self._database.transaction(timeout_s=10) as connection:
            rows = await connection.fetch(sql("rewrap_batch"), master_key_id, limit)
            if rows:
                await connection.execute(
                    sql("rewrapped"),
                    [row["engine_id"] for row in rows],
                    [row["generation"] for row in rows],
                    [rewrap(row["key_enc"], row["master_key_id"]) for row in rows],
                    master_key_id,
                )
            hooks = await connection.fetch(sql("rewrap_webhooks_batch"), master_key_id, limit)
            if hooks:
                await connection.execute(
                    sql("rewrapped_webhooks"),
                    [row["id"] for row in hooks],
                    [rewrap(row["secret_enc"], row["master_key_id"]) for row in hooks],
                    master_key_id,
                )
            return len(rows) + len(hooks)

    async def finish(self, master_key_id: str, total: int) -> None:
        await self._database.execute(sql("finish_rewrap"), master_key_id, total)
