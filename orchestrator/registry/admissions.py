"""The statements of the hot path, and what is written of admits in batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.registry.database import Database, sql

if TYPE_CHECKING:
    from uuid import UUID

    import asyncpg

__all__ = ["AdmissionRegistry"]


class AdmissionRegistry:
    """Answers are records, not rows of our own: each copy would be a tenth of an admit."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._by_key = sql("admit_by_key")
        self._by_key_counted = sql("admit_by_key_counted")
        self._look_up = sql("look_up")

    async def by_key(self, key_hash: str, user_id: str, *, counted: bool) -> asyncpg.Record | None:
        """Caller, limit and engine in one statement; None when the key is unknown or expired.

        `counted`: take one call of a small rate limit in the same statement; the record's `counted` tells whether
        one was left.
        """
        query = self._by_key_counted if counted else self._by_key
        return await self._database.fetchrow(query, key_hash, user_id)

    async def look_up(self, product_id: UUID, user_id: str) -> asyncpg.Record | None:
        """The user's engine with its newest key in ciphertext."""
        return await self._database.fetchrow(self._look_up, product_id, user_id)

    async def record_activity(self, ages_s: dict[UUID, float]) -> None:
        """Engine → seconds since its last admit."""
        await self._database.execute(sql("record_activity"), list(ages_s), list(ages_s.values()))

    async def record_denials(self, counts: dict[tuple[UUID, str, str], int]) -> None:
        """(product, user, reason) → how often, in the minute of now."""
        await self._database.execute(
            sql("record_denials"),
            [product_id for product_id, _, _ in counts],
            [user_id for _, user_id, _ in counts],
            [reason for _, _, reason in counts],
            list(counts.values()),
        )
