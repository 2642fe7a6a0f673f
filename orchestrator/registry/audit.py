"""The audit log as rows; what a chain is, `orchestrator.audit` knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orchestrator.registry.database import Database, sql
from orchestrator.registry.rows import AuditHead, AuditRow

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from datetime import datetime
    from uuid import UUID

__all__ = ["AuditRegistry"]

PAGE = 1000
PAGE_TIMEOUT_S = 10.0  # a filter that few rows pass may have to look at many


class AuditRegistry:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def insert(
        self,
        *,
        action: str,
        product_id: UUID | None = None,
        user_id: str | None = None,
        engine_id: UUID | None = None,
        actor: str = "system",
        status: str | None = None,
        metadata: dict[str, Any] | None = None,
        duration_ms: int | None = None,
    ) -> None:
        await self._database.execute(
            sql("insert_audit"), product_id, user_id, engine_id, action, actor, status, metadata or {}, duration_ms
        )

    async def last_rotation(self, engine_id: UUID) -> dict[str, Any]:
        """What the newest key rotation of an engine recorded: `overlap_seconds`, `restarted`."""
        return await self._database.fetchval(sql("last_rotation"), engine_id) or {}

    async def unsequenced_chains(self) -> list[str]:
        return [row["chain"] for row in await self._database.fetch(sql("unsequenced_chains"))]

    async def place(
        self, chain: str, place: Callable[[int, str, list[AuditRow]], list[tuple[int, int, str, str]]]
    ) -> int:
        """Give positions to up to 1,000 committed rows of a chain; returns how many, 0 also when another works.

        `place(head_seq, head_hash, rows)` returns `(id, seq, prev_hash, hash)` for each row, in order.
        """
        async with self._database.transaction(timeout_s=10) as connection:
            if not await connection.fetchval(sql("lock_chain"), chain):
                return 0
            head = await connection.fetchrow(sql("chain_head"), chain)
            rows = [AuditRow.of(row) for row in await connection.fetch(sql("unsequenced_rows"), chain)]
            if not rows:
                return 0
            placed = place(head["seq"] if head else 0, head["hash"] if head else "", rows)
            columns = (list(column) for column in zip(*placed, strict=True))
            last = await connection.fetchval(sql("take_positions"), len(placed))
            await connection.execute(sql("place_rows"), *columns, last - len(placed))
            await connection.execute(sql("set_chain_head"), chain, placed[-1][1], placed[-1][3])
            return len(placed)

    async def heads(self) -> list[AuditHead]:
        """The head of every chain that has one, or has rows."""
        return [AuditHead(**dict(row)) for row in await self._database.fetch(sql("chain_heads"), timeout_s=30)]

    async def sequenced(self, chain: str) -> AsyncIterator[AuditRow]:
        """The rows of one chain in order, read a page at a time."""
        after = 0
        while page := await self._database.fetch(sql("sequenced_rows"), chain, after, PAGE, timeout_s=30):
            for record in page:
                yield AuditRow.of(record)
            after = page[-1]["seq"]

    async def page(
        self,
        product_id: UUID | None,
        *,
        after: int | None,
        limit: int,
        newest_first: bool = False,
        user_id: str | None = None,
        action: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> list[AuditRow]:
        """Sequenced rows in order: of one product's chain after (or, newest first, before) a `seq`; of all chains
        after (or before) a `position`. `since` is inclusive, `until` is not."""
        if after is None:
            after = 2**63 - 1 if newest_first else 0
        if product_id is None:
            chain: tuple[str, ...] = ()
            query = sql("audit_of_all_newest") if newest_first else sql("audit_of_all")
        else:
            chain = (str(product_id),)
            query = sql("audit_of_chain_newest") if newest_first else sql("audit_of_chain")
        async with self._database.transaction(timeout_s=PAGE_TIMEOUT_S) as connection:
            await connection.execute(sql("custom_plans"))
            rows = await connection.fetch(query, *chain, after, user_id, action, since, until, limit)
        return [AuditRow.of(row) for row in rows]

    async def following(self, product_id: UUID | None, after: int, limit: int) -> list[AuditRow]:
        """The next sequenced rows: of one product's chain after a `seq`, or of all after a `position`."""
        if product_id is None:
            rows = await self._database.fetch(sql("sequenced_rows_of_all"), after, limit)
        else:
            rows = await self._database.fetch(sql("sequenced_rows"), str(product_id), after, limit)
        return [AuditRow.of(row) for row in rows]

    async def last_seq(self, product_id: UUID | None) -> int:
        """The last `seq` of a product's chain, or the last `position` of all; 0 before the first."""
        if product_id is None:
            return int(await self._database.fetchval(sql("last_position")))
        return int(await self._database.fetchval(sql("last_seq"), str(product_id)) or 0)

    async def unsequenced(self) -> tuple[int, float]:
        """How many rows wait for their position, and the age of the oldest in seconds."""
        row = await self._database.fetchrow(sql("oldest_unsequenced"))
        assert row is not None  # aggregates always give a row
        return row["rows"], row["age_s"]

    async def close_denials(self) -> None:
        """Turn the refusals of past minutes into audit rows."""
        await self._database.execute(sql("close_denials"))
