"""What is remembered of admits, and written in batches: never a write per call."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uuid import UUID

    from orchestrator.registry import Registry

__all__ = ["ActivityRecorder"]

MAX_DENIALS = 10_000  # distinct (product, user, reason) between two flushes; the rest is counted as one


class ActivityRecorder:
    """Collects in memory; `flush` writes everything in a few statements. Called every half second and at the end."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._admitted: dict[UUID, float] = {}
        self._keys: set[UUID] = set()
        self._denied: Counter[tuple[UUID, str, str]] = Counter()
        self._flushing = asyncio.Lock()

    def admitted(self, engine_id: UUID) -> None:
        self._admitted[engine_id] = time.monotonic()

    def key_used(self, key_id: UUID) -> None:
        self._keys.add(key_id)

    def denied(self, product_id: UUID, user_id: str, reason: str) -> None:
        entry = (product_id, user_id, reason)
        if entry not in self._denied and len(self._denied) >= MAX_DENIALS:
            entry = (product_id, "", reason)
        self._denied[entry] += 1

    async def flush(self) -> None:
        """Returns when everything noted before is written. What cannot be written now is kept for the next flush.

        Raises `DatabaseUnavailable`.
        """
        async with self._flushing:  # one that is under way holds what was noted before
            await self._flush()

    async def _flush(self) -> None:
        if self._admitted:
            admitted, self._admitted = self._admitted, {}
            now = time.monotonic()
            try:
                await self._registry.admissions.record_activity({id_: now - at for id_, at in admitted.items()})
            except BaseException:
                self._admitted = admitted | self._admitted
                raise
        if self._keys:
            keys, self._keys = self._keys, set()
            await self._registry.products.record_key_use(list(keys))
        if self._denied:
            denied, self._denied = self._denied, Counter()
            try:
                await self._registry.admissions.record_denials(denied)
            except BaseException:
                self._denied += denied
                raise
