"""Holds the registry against what really is there: finishes what dead owners left, and repairs differences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from orchestrator.backends.base import ObjectState
from orchestrator.lifecycle.transitions import State

if TYPE_CHECKING:
    from orchestrator.lifecycle import Lifecycle
    from orchestrator.lifecycle.means import Means

__all__ = ["reconcile", "take_over"]

log = structlog.get_logger("orchestrator.reconcile")

BATCH = 50


async def take_over(lifecycle: Lifecycle) -> None:
    """Operations and wishes whose owner is gone. Every second: within the lease time + 1 s all are taken over."""
    while await lifecycle.take_over(BATCH) == BATCH:
        pass
    await lifecycle.carry_out_wishes(BATCH)


async def reconcile(means: Means, lifecycle: Lifecycle) -> None:
    """One list of the backend against the registry: an engine that should run and does not is brought up again.

    What runs is adopted by doing nothing: the row already says where it is.
    """
    if not means.backend.capabilities.listing:
        return
    # Rows first: an engine that somebody claims after that is none of ours (its generation has changed).
    rows = await means.registry.engines.here(means.location_id)
    objects = {found.engine_id: found for found in await means.backend.list()}
    for row in rows:
        if row["operation"] is not None or row["status"] != State.RUNNING:
            continue
        found = objects.get(row["id"])
        if found is None or (found.state is ObjectState.EXITED and not means.backend.capabilities.restarts):
            log.warning("running_engine_gone", engine_id=str(row["id"]))
            await lifecycle.restart(row["id"], "object_gone", row["lease_generation"])
        elif found.state is ObjectState.FROZEN:
            # a late freeze of a dead owner
            await lifecycle.restart(row["id"], "frozen", row["lease_generation"])
