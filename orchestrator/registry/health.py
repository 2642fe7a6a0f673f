"""Probes and restarts: due work is claimed in batches, results are written in batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.registry.database import Database, sql

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

    import asyncpg

__all__ = ["HealthRegistry", "ProbeResult"]


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """One probe of the engine at `generation`, as it is written.

    `counted`: it failed, and that says something about the engine (not about its backend). `exited`: its process is
    gone and the backend is about to start it again. `active_ago_s`: since the last work that the engine tells of.
    `restarts`: the backend's own count, where it was looked at, and `started_at` of the process that it was seen with.
    `audited`: also an audit row.
    """

    engine_id: UUID
    generation: int
    ok: bool
    counted: bool = False
    active_ago_s: float | None = None
    restarts: int | None = None
    started_at: datetime | None = None
    exited: bool = False
    audited: bool = False
    reason: str | None = None


class HealthRegistry:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def claim(self, location_id: UUID, interval_s: float, limit: int) -> list[asyncpg.Record]:
        """Engines whose probe is due, each for this process alone until its next one."""
        return await self._database.fetch(sql("claim_probes"), location_id, interval_s, limit, timeout_s=10)

    async def record(self, results: list[ProbeResult]) -> dict[UUID, asyncpg.Record]:
        """Write a batch; what each engine's row says now. Engines that somebody has claimed since are left out."""
        columns = list(
            zip(
                *(
                    (
                        result.engine_id,
                        result.generation,
                        result.ok,
                        result.counted,
                        result.active_ago_s,
                        result.restarts,
                        result.exited,
                        result.audited,
                        result.reason,
                        result.started_at,
                    )
                    for result in sorted(results, key=lambda one: one.engine_id)
                ),
                strict=True,
            )
        )
        rows = await self._database.fetch(sql("record_probes"), *columns, timeout_s=10)
        return {row["id"]: row for row in rows}

    async def note_restart_count(
        self, engine_id: UUID, generation: int, count: int, started_at: datetime | None
    ) -> int:
        """The backend's count of restarts, as an event told; how many fell within the last ten minutes.

        `started_at`: of the process that it was seen with. What comes after a later look changes nothing.
        """
        noted = await self._database.fetchval(sql("note_restart_count"), engine_id, generation, count, started_at)
        return int(noted or 0)

    async def probe_now(self, engine_ids: list[UUID]) -> None:
        await self._database.execute(sql("probe_now"), engine_ids)

    async def park_outages(self, sweep_s: float) -> list[asyncpg.Record]:
        """Park the restarts of products and images that fail as a whole; `product_id`, `engines` of those new to it."""
        return await self._database.fetch(sql("park_outages"), sweep_s, timeout_s=10)

    async def due_restarts(self, location_id: UUID, longest_s: float, limit: int) -> list[asyncpg.Record]:
        return await self._database.fetch(sql("due_restarts"), location_id, longest_s, limit)
