"""What a backend tells at once: an exit, a thaw by somebody's hand. Hints, which save the wait for the next look."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import structlog

from orchestrator.backends.base import EventKind
from orchestrator.errors import BackendUnavailable, DatabaseUnavailable, OrchestratorError
from orchestrator.loops.reconcile import apply, difference

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from orchestrator.lifecycle import Healing
    from orchestrator.lifecycle.means import Means
    from orchestrator.loops.health import HealthLoop

__all__ = ["EventWatch"]

log = structlog.get_logger("orchestrator.watch")

STORM = 50  # engines touched since the last round; beyond that one list is cheaper than a look at each
AGAIN_S = 1.0


class EventWatch:
    """Collects which engines were touched; `round` looks at them. A storm becomes one reconcile."""

    def __init__(self, means: Means, healing: Healing, health: HealthLoop, reconcile_now: Callable[[], None]) -> None:
        self._means = means
        self._healing = healing
        self._health = health
        self._reconcile_now = reconcile_now
        self._touched: set[UUID] = set()
        self._later: set[UUID] = set()
        self._later_at = 0.0
        self._subscribed = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._means.backend.capabilities.events:
            self._task = asyncio.create_task(self._listen(), name="backend-events")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None

    async def _listen(self) -> None:
        while True:
            try:
                async for event in self._means.backend.events():
                    if event.kind is EventKind.RESYNC:
                        if self._subscribed:  # not the first time: it was away
                            self._health.backend_is_back()
                        self._subscribed = True
                        self._reconcile_now()
                    elif event.engine_id is not None:
                        if event.kind is EventKind.OUT_OF_MEMORY:
                            log.warning("engine_out_of_memory", engine_id=str(event.engine_id))
                        self._touched.add(event.engine_id)
            except Exception:  # a stream that broke in a new way must not leave the loops without word for good
                log.exception("backend_events_broken")
            await asyncio.sleep(AGAIN_S)

    async def round(self) -> None:
        """Look at what was touched since the last round. What cannot be looked at now is kept for the next one."""
        touched, self._touched = self._touched, set()
        if self._later and time.monotonic() >= self._later_at:
            touched |= self._later
            self._later = set()
        if len(touched) > STORM:
            self._reconcile_now()
            return
        try:
            while touched:
                engine_id = next(iter(touched))
                try:
                    await self._look(engine_id)
                except (BackendUnavailable, DatabaseUnavailable):
                    raise
                except OrchestratorError as error:  # of this one object; the others are looked at all the same
                    log.warning("look_failed", engine_id=str(engine_id), error=error.message)
                touched.discard(engine_id)
        finally:
            self._touched |= touched

    async def _look(self, engine_id: UUID) -> None:
        rows = await self._means.registry.engines.here(self._means.location_id, engine_id)
        if not rows:
            return  # an orphan, for the reconcile loop
        if rows[0]["operation"] is not None:
            # Somebody is at it, and these may be his doings; what was not is seen when he is done.
            self._later.add(engine_id)
            self._later_at = time.monotonic() + AGAIN_S
            return
        row = rows[0]
        found = await self._healing.look(engine_id)
        if row["status"] == "running" and found is not None:
            await self._health.note_restarts(engine_id, row["lease_generation"], found)
        step = difference(row, found)
        if step is not None:
            await apply(self._means, self._healing, [step])
        elif row["status"] == "running":
            await self._means.registry.health.probe_now([engine_id])
