"""A backend whose calls are counted and traced, each with its product where that is known."""

from __future__ import annotations

import inspect
import time
from functools import wraps
from typing import TYPE_CHECKING, Any, cast

from orchestrator import metrics, tracing
from orchestrator.errors import ObjectMissing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from uuid import UUID

    from orchestrator.backends.base import EngineBackend

__all__ = ["metered"]

COUNTED = frozenset(metrics.BACKEND_CALLS)


def metered(backend: EngineBackend, product_id: UUID | None = None) -> EngineBackend:
    """The same backend; calls that are not counted pass through untouched."""
    return cast("EngineBackend", _Metered(backend, product_id))


class _Metered:
    __slots__ = ("_backend", "_product_id")

    def __init__(self, backend: EngineBackend, product_id: UUID | None) -> None:
        self._backend = backend
        self._product_id = product_id

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._backend, name)
        if name in COUNTED and inspect.iscoroutinefunction(attribute):
            return self._counted(name, attribute)
        return attribute

    def pinned(self, container_id: str | None) -> EngineBackend:
        return metered(self._backend.pinned(container_id), self._product_id)

    def _counted(self, name: str, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        @wraps(call)
        async def counted(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            ok = False
            try:
                with tracing.span(f"backend.{name}"):
                    result = await call(*args, **kwargs)
                ok = True
                return result
            except ObjectMissing:
                ok = True  # an answer, not a failure
                raise
            finally:
                metrics.backend_called(self._product_id, name, ok, time.perf_counter() - began)

        return counted
