"""Reading what an engine writes. Changes nothing, and so needs no lease."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

from orchestrator.errors import BackendUnavailable, EngineNotFound, NotSupported, ObjectMissing

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from uuid import UUID

    from orchestrator.backends.base import LogLine
    from orchestrator.lifecycle.means import Means

__all__ = ["engine_logs"]

LOOK_AGAIN_S = 0.5


async def engine_logs(
    means: Means, product_id: UUID, user_id: str, *, tail: int, follow: bool
) -> AsyncGenerator[LogLine, None]:
    """The last `tail` lines, then, with `follow`, new ones until the engine is destroyed.

    An engine that has no object yet has no lines. Raises `EngineNotFound`, `NotSupported`, and `BackendUnavailable`
    for an engine of another location; while it is read, what the backend raises.
    """
    engine = await means.registry.engines.by_user(product_id, user_id)
    if engine is None:
        raise EngineNotFound(user_id)
    if not means.backend.capabilities.logs:
        raise NotSupported("logs", means.backend.name)
    if engine.location_id != means.location_id:
        raise BackendUnavailable("The engine lives at another location; ask an orchestrator there for its log.")
    return _lines(means, engine.id, tail, follow)


async def _lines(means: Means, engine_id: UUID, tail: int, follow: bool) -> AsyncGenerator[LogLine, None]:
    while True:
        try:
            async with aclosing(means.backend.logs(engine_id, tail=tail, follow=follow)) as lines:
                async for line in lines:
                    yield line
            return
        except ObjectMissing:
            if not follow or await means.registry.engines.by_id(engine_id) is None:
                return
        await asyncio.sleep(LOOK_AGAIN_S)
