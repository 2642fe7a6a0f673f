"""Ceilings of a product's policy for engines that exist already.

A new object gets them when it is made, an exited one when it is next started (it is then made anew). What runs gets
them at once, from the replica that took the new policy; what fails here is made good by the next cold start.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from orchestrator.errors import BackendError, DatabaseUnavailable
from orchestrator.lifecycle.means import ceilings_of
from orchestrator.lifecycle.transitions import State

if TYPE_CHECKING:
    from uuid import UUID

    from orchestrator.lifecycle.means import Means

__all__ = ["CeilingsKeeper"]

log = structlog.get_logger("orchestrator.lifecycle")


class CeilingsKeeper:
    def __init__(self, means: Means) -> None:
        self._means = means
        self._tasks: set[asyncio.Task[None]] = set()

    def apply(self, product_id: UUID) -> None:
        """Bring the product's engines here under the ceilings of its policy. Does not wait."""
        if self._means.backend.capabilities.ceilings:
            task = asyncio.create_task(self._apply(product_id), name="ceilings")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _apply(self, product_id: UUID) -> None:
        means = self._means
        try:
            product = await means.registry.products.by_id(product_id)
            rows = await means.registry.engines.here(means.location_id) if product is not None else []
        except DatabaseUnavailable as error:
            log.warning("ceilings_not_applied", product_id=str(product_id), error=error.message)
            return
        if product is None:
            return
        wanted = ceilings_of(product.policy)
        for row in rows:
            if row["product_id"] != product_id or row["status"] not in (State.RUNNING, State.SLEEPING):
                continue
            try:
                await means.backend.pinned(row["container_id"]).set_ceilings(
                    row["id"], memory=wanted.memory, cpus=wanted.cpus
                )
            except BackendError as error:
                log.warning("ceilings_not_applied", engine_id=str(row["id"]), error=error.message)
