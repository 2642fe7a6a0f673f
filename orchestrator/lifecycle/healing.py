"""What happens to engines without a request: the loops find it, this acts on it.

Nothing here waits for the end of what it begins, except where it says so. Each act names the generation of the row
that it was decided for: whoever has claimed the engine since knows better.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import structlog

from orchestrator import metrics
from orchestrator.backends.base import BackendObject, EngineEndpoint, ObjectState
from orchestrator.lifecycle.operations import Parameters
from orchestrator.lifecycle.transitions import STOP_GRACE_S, Operation, State

if TYPE_CHECKING:
    from uuid import UUID

    from orchestrator.lifecycle.flights import Flights
    from orchestrator.lifecycle.means import Means

__all__ = ["Healing"]

log = structlog.get_logger("orchestrator.healing")

LEAST_PATIENCE_S = 5.0  # for an engine taken over at the very end of its time


class Healing:
    def __init__(self, means: Means, flights: Flights) -> None:
        self._means = means
        self._flights = flights

    # --- what dead owners left --------------------------------------------------------------------------

    async def take_over(self, limit: int) -> int:
        """Go on with operations at this location whose owner is gone; how many were found."""
        claimed_at = time.monotonic()
        found = await self._means.registry.engines.take_over(
            self._means.location_id,
            owner=self._flights.keeper.owner,
            lease_s=self._flights.keeper.lease_s,
            limit=limit,
            operations=list(Operation),
        )
        for engine, left_s in found:
            metrics.taken_over(engine.product_id)
            log.info("operation_taken_over", engine_id=str(engine.id), operation=engine.operation)
            self._flights.launch(engine, claimed_at, patience_s=max(LEAST_PATIENCE_S, left_s))
        return len(found)

    async def carry_out_wishes(self, limit: int) -> int:
        """Stops and destroys that were asked for by a process that is gone; how many were found."""
        registry, keeper = self._means.registry.engines, self._flights.keeper
        due = await registry.due_wishes(self._means.location_id, keeper.lease_s, limit)
        for row in due:
            await self._begin(
                row["id"], row["lease_generation"], Operation(row["wish"]), actor=row["wish_actor"], override=True
            )
        return len(due)

    # --- what is not as it should be --------------------------------------------------------------------

    def under_way(self, operation: Operation) -> int:
        """How many of these this process is at."""
        return self._flights.count(operation)

    async def look(self, engine_id: UUID, container_id: str | None = None) -> BackendObject | None:
        """What really is there; only whether it runs where the backend cannot list.

        Raises `BackendUnavailable`, `BackendError`.
        """
        backend = self._means.backend.pinned(container_id)
        if backend.capabilities.listing:
            return await backend.find(engine_id)
        if not await backend.is_running(engine_id):
            return None
        return BackendObject(engine_id, ObjectState.RUNNING, 0, EngineEndpoint("", 0, container_id))

    async def restart(self, engine_id: UUID, generation: int, reason: str, *, adopted: bool = False) -> bool:
        """Bring an engine up that should run. `adopted`: its object was found gone or stopped by somebody's hand."""
        action = "reconcile_adopt" if adopted else "auto_restart_start"
        return await self._begin(
            engine_id, generation, Operation.RESTART, parameters=Parameters(reason=reason), action=action
        )

    async def fail(self, engine_id: UUID, generation: int, reason: str, message: str) -> bool:
        """A running engine is not well: stop it; restarts follow. `reason`: `unhealthy` or `exited`."""
        return await self._begin(
            engine_id, generation, Operation.FAIL, parameters=Parameters(reason=reason, message=message)
        )

    async def repair(self, engine_id: UUID, generation: int, reason: str) -> bool:
        """Make an object what its row says."""
        return await self._begin(engine_id, generation, Operation.REPAIR, parameters=Parameters(reason=reason))

    # --- idle -------------------------------------------------------------------------------------------

    async def sleep_idle(self, engine_id: UUID, generation: int, idle_s: float) -> bool:
        """Put an engine to sleep if nothing has happened to it for `idle_s` when its turn comes."""
        return await self._begin(engine_id, generation, Operation.SLEEP, parameters=Parameters(idle_s=idle_s))

    async def unload(self, engine_id: UUID, generation: int) -> bool:
        """End the process of an engine that sleeps; it wakes by a start."""
        return await self._begin(engine_id, generation, Operation.UNLOAD)

    async def unload_all(self) -> None:
        """Stop the processes of all engines here, leaving them `sleeping`: the next admit wakes them. Waits."""
        flights = []
        for row in await self._means.registry.engines.here(self._means.location_id):
            if row["status"] in (State.RUNNING, State.SLEEPING):
                engine = await self._means.registry.engines.by_id(row["id"])
                claimed_at = time.monotonic()
                claimed = engine and await self._flights.try_claim(engine, Operation.UNLOAD, "system")
                if claimed:
                    flights.append(self._flights.launch(claimed, claimed_at))
        await asyncio.gather(*(flight.task for flight in flights if flight.task is not None), return_exceptions=True)

    # --- orphans ----------------------------------------------------------------------------------------

    async def stop_orphan(self, orphan: BackendObject) -> None:
        """Its data stays. Waits for its end."""
        await self._means.backend.pinned(orphan.endpoint.container_id).stop(orphan.engine_id, STOP_GRACE_S)
        await self._means.registry.orphans.stopped(self._means.location_id, orphan.engine_id)
        log.warning("orphan_stopped", engine_id=str(orphan.engine_id))

    async def remove_orphan(self, orphan: BackendObject, *, actor: str) -> None:
        """With its data: only what has a tombstone, or by a person's order. Waits for its end."""
        await self._means.backend.destroy(orphan.engine_id)
        await self._means.registry.orphans.removed(self._means.location_id, orphan.engine_id, actor)
        log.warning("orphan_removed", engine_id=str(orphan.engine_id), actor=actor)

    async def _begin(
        self,
        engine_id: UUID,
        generation: int,
        operation: Operation,
        *,
        actor: str = "system",
        parameters: Parameters | None = None,
        action: str | None = None,
        override: bool = False,
    ) -> bool:
        """Claim, and carry out in a task of its own; False when somebody was faster."""
        engine = await self._means.registry.engines.by_id(engine_id)
        if engine is None or engine.lease_generation != generation or not (override or engine.is_settled):
            return False
        claimed_at = time.monotonic()
        claimed = await self._flights.try_claim(
            engine,
            operation,
            actor,
            parameters=parameters,
            generation=generation,
            action=action,
            override=override,
        )
        if claimed is None:
            return False
        kept = (parameters or Parameters()).kept()
        log.info("operation_begun", engine_id=str(engine_id), operation=operation.value, **kept)
        self._flights.launch(claimed, claimed_at)
        return True
