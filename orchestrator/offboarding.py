"""The end of a product: its engines are destroyed, then it is gone. Goes on after a crash, on any replica."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from orchestrator.errors import EngineNotFound, OrchestratorError

if TYPE_CHECKING:
    from uuid import UUID

    from orchestrator.lifecycle import Lifecycle
    from orchestrator.registry import Registry

__all__ = ["Offboarding"]

log = structlog.get_logger("orchestrator.offboarding")

AT_ONCE = 8  # engines destroyed at the same time
PAGE = 100


class Offboarding:
    def __init__(self, registry: Registry, lifecycle: Lifecycle) -> None:
        self._registry = registry
        self._lifecycle = lifecycle
        self._flights: dict[UUID, asyncio.Task[bool]] = {}

    async def delete(self, product_id: UUID, *, force: bool, wait_s: float) -> bool:
        """True when the product is gone; False when that takes longer than `wait_s` and goes on by itself.

        Raises `ProductNotFound`, `ProductNotEmpty`.
        """
        await self._registry.products.begin_delete(product_id, force=force)
        flight = self._launch(product_id)
        done, _ = await asyncio.wait({flight}, timeout=wait_s)
        return bool(done) and flight.result()

    async def round(self) -> None:
        """Go on with every deletion that was begun. Does not wait for the end."""
        for product_id in await self._registry.products.deleting():
            self._launch(product_id)

    async def close(self) -> None:
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        if flights:
            await asyncio.wait(flights)

    def _launch(self, product_id: UUID) -> asyncio.Task[bool]:
        flight = self._flights.get(product_id)
        if flight is None:
            flight = asyncio.create_task(self._carry_out(product_id), name="offboarding")
            self._flights[product_id] = flight

            def landed(task: asyncio.Task[bool]) -> None:
                del self._flights[product_id]
                if not task.cancelled():
                    task.exception()  # retrieved: there may be nobody left to see it

            flight.add_done_callback(landed)
        return flight

    async def _carry_out(self, product_id: UUID) -> bool:
        while users := await self._registry.products.users(product_id, PAGE):
            slots = asyncio.Semaphore(AT_ONCE)
            destroyed = await asyncio.gather(*(self._destroy(slots, product_id, user_id) for user_id in users))
            if not any(destroyed):
                return False  # the next round tries again
        return await self._registry.products.remove(product_id)

    async def _destroy(self, slots: asyncio.Semaphore, product_id: UUID, user_id: str) -> bool:
        async with slots:
            try:
                await self._lifecycle.destroy(product_id, user_id, actor="admin")
            except EngineNotFound:
                return True
            except OrchestratorError as error:
                log.warning("destroy_failed", product_id=str(product_id), code=error.code, error=error.message)
                return False
            return True
