"""What the dashboard asks: a search over all engines, one engine with its story, and the fleet over time.

The past is read from the audit rows. They are there since the first engine, are the same for every replica, and cost
nothing until somebody looks; samples would need a table, a writer and a clean-up of their own, and could still
disagree with the audit.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from orchestrator.registry.database import Database, sql

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

    import asyncpg

__all__ = ["SORTS", "DashboardRegistry"]

SORTS = ("-created_at", "created_at", "user_id", "-user_id", "status", "-status", "product", "-product",
         "last_health_at", "-last_health_at")  # fmt: skip
TIMEOUT_S = 10  # a person waits, and the audit of a large fleet is long


class DashboardRegistry:
    """`product_id` None means: of all products."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def engines(
        self, product_id: UUID | None, search: str, status: str | None, sort: str, limit: int, offset: int
    ) -> tuple[list[asyncpg.Record], dict[str, int]]:
        """One page in the order `sort` (one of `SORTS`), and how many the search finds in each state.

        `search` is part of a user id or image in any case, or the beginning of an engine id or container name.
        """
        engine_id = _engine_id_prefix(search)
        rows = await self._database.fetch(
            sql("dashboard_engines"), product_id, search, engine_id, status, sort, limit, offset, timeout_s=TIMEOUT_S
        )
        counts = await self._database.fetch(sql("dashboard_counts"), product_id, search, engine_id, timeout_s=TIMEOUT_S)
        return rows, {row["status"]: row["engines"] for row in counts}

    async def products(self) -> list[asyncpg.Record]:
        """All products by slug: `(id, slug, display_name, engines)`."""
        return await self._database.fetch(sql("dashboard_products"), timeout_s=TIMEOUT_S)

    async def engine(self, engine_id: UUID) -> asyncpg.Record | None:
        """The whole row with `slug` and `last_admit_at`; None when there is none (any more)."""
        return await self._database.fetchrow(sql("dashboard_engine"), engine_id)

    async def tombstone(self, engine_id: UUID) -> asyncpg.Record | None:
        return await self._database.fetchrow(sql("dashboard_tombstone"), engine_id)

    async def audit(self, engine_id: UUID, before_id: int | None, limit: int) -> list[asyncpg.Record]:
        """Rows of one engine, the newest first; `before_id` continues."""
        return await self._database.fetch(sql("dashboard_engine_audit"), engine_id, before_id, limit)

    async def states(self, product_id: UUID | None, since: datetime, step_s: float) -> list[asyncpg.Record]:
        """Rows of `(step, state, change)`: by how much a state grew in a step; with step None its present count."""
        return await self._database.fetch(sql("dashboard_states"), product_id, since, step_s, timeout_s=TIMEOUT_S)

    async def series(self, product_id: UUID | None, since: datetime, step_s: float) -> list[asyncpg.Record]:
        """Counts and percentiles of each step in which something happened."""
        return await self._database.fetch(sql("dashboard_series"), product_id, since, step_s, timeout_s=TIMEOUT_S)

    async def now(self) -> datetime:
        """The database's clock, by which everything is timed."""
        found: datetime = await self._database.fetchval(sql("dashboard_now"))
        return found


def _engine_id_prefix(search: str) -> str:
    digits = search.lower().removeprefix("engine-").replace("-", "")
    return digits if re.fullmatch(r"[0-9a-f]{4,32}", digits) else ""
