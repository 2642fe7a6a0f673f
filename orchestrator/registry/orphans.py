"""Objects of this deployment that no engine explains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.registry.database import Database, sql

if TYPE_CHECKING:
    from uuid import UUID

__all__ = ["KnownOrphan", "OrphanRegistry"]


@dataclass(frozen=True, slots=True)
class KnownOrphan:
    """Since when an orphan is known, and whether it was stopped."""

    known_for_s: float
    stopped: bool


class OrphanRegistry:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def explained(self, engine_ids: list[UUID]) -> dict[UUID, bool]:
        """Those that have a row (False) or a tombstone (True) now."""
        rows = await self._database.fetch(sql("explained"), engine_ids)
        return {row["engine_id"]: row["destroyed"] for row in rows}

    async def note(self, location_id: UUID, engine_id: UUID, *, state: str, incarnation: int) -> KnownOrphan:
        """Remember an orphan; audited when it is new."""
        row = await self._database.fetchrow(sql("note_orphan"), location_id, engine_id, state, incarnation)
        assert row is not None
        return KnownOrphan(row["known_for_s"], row["stopped"])

    async def stopped(self, location_id: UUID, engine_id: UUID) -> None:
        await self._database.execute(sql("orphan_stopped"), location_id, engine_id)

    async def removed(self, location_id: UUID, engine_id: UUID, actor: str) -> None:
        await self._database.execute(sql("orphan_removed"), location_id, engine_id, actor)

    async def forget_others(self, location_id: UUID, engine_ids: list[UUID]) -> None:
        """Orphans that are not there any more."""
        await self._database.execute(sql("forget_orphans"), location_id, engine_ids)
