"""Webhooks: where they stand in their product's chain, and what was delivered."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from orchestrator.errors import ProductNotFound, TooMany
from orchestrator.registry.database import Database, sql
from orchestrator.registry.rows import Attempt, ClaimedWebhook

if TYPE_CHECKING:
    from uuid import UUID

    import asyncpg

__all__ = ["KEPT_DELIVERIES", "MAX_WEBHOOKS", "WebhookRegistry"]

MAX_WEBHOOKS = 20  # of one product
CHANGE_TIMEOUT_S = 10.0  # other processes may be changing the same product
KEPT_DELIVERIES = 200  # of one webhook


class WebhookRegistry:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._turn = asyncio.Lock()

    async def create(
        self, product_id: UUID, url: str, events: list[str], secret_enc: str, master_key_id: str
    ) -> asyncpg.Record:
        """`id`, `url`, `events`, `created_at`. Their number is exact: it is counted under the product's row lock.

        Raises `ProductNotFound`, `TooMany`.
        """
        # One connection at a time waits for the product's row, so that a burst leaves the pool to others.
        async with self._turn, self._database.transaction(timeout_s=CHANGE_TIMEOUT_S) as connection:
            if await connection.fetchrow(sql("lock_product"), product_id) is None:
                raise ProductNotFound(str(product_id))
            if await connection.fetchval(sql("count_webhooks"), product_id) >= MAX_WEBHOOKS:
                raise TooMany("webhooks", MAX_WEBHOOKS)
            row = await connection.fetchrow(sql("insert_webhook"), product_id, url, events, secret_enc, master_key_id)
            assert row is not None  # an INSERT of values returns its row
            return row

    async def of_product(self, product_id: UUID) -> list[asyncpg.Record]:
        """Rows as `create` gives them, the oldest first."""
        return await self._database.fetch(sql("list_webhooks"), product_id)

    async def delete(self, product_id: UUID, webhook_id: UUID) -> bool:
        """With its deliveries; one under way may still arrive. False when there is none."""
        return await self._database.fetchval(sql("delete_webhook"), product_id, webhook_id) is not None

    async def deliveries(self, product_id: UUID, webhook_id: UUID) -> list[asyncpg.Record] | None:
        """The newest first; None when the product has no such webhook."""
        if await self._database.fetchval(sql("webhook"), product_id, webhook_id) is None:
            return None
        return await self._database.fetch(sql("list_deliveries"), webhook_id, KEPT_DELIVERIES)

    async def claim(self, *, lease_s: float, longest_wait_s: float, limit: int) -> list[ClaimedWebhook]:
        """Webhooks that have something to deliver now, for this worker alone until the lease ends."""
        rows = await self._database.fetch(sql("claim_webhooks"), lease_s, longest_wait_s, limit)
        return [ClaimedWebhook(**dict(row)) for row in rows]

    async def record(self, hook: ClaimedWebhook, attempt: Attempt, *, lease_s: float) -> bool:
        """An attempt and what follows from it, in one statement; False when the webhook is gone or another's.

        After a failure that is to be tried again the lease is given up; else it is renewed.
        """
        row = await self._database.fetchval(
            sql("record_delivery"),
            hook.id,
            hook.lease_generation,
            attempt.seq,
            attempt.action,
            attempt.status,
            attempt.response_status,
            attempt.error,
            attempt.delay_s,
            lease_s,
        )
        return row is not None

    async def release(self, hook: ClaimedWebhook, seq: int) -> None:
        """Everything up to `seq` is dealt with."""
        await self._database.execute(sql("release_webhook"), hook.id, hook.lease_generation, seq)
        await self._database.execute(sql("prune_deliveries"), hook.id, KEPT_DELIVERIES)
