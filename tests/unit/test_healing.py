"""What the loops see of an engine whose backend cannot list."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import uuid4

import pytest

from orchestrator.backends.base import EngineBackend, EngineEndpoint, ObjectState
from orchestrator.lifecycle.healing import Healing

if TYPE_CHECKING:
    from uuid import UUID


class Blind(EngineBackend):
    """The documented five methods, and no ability besides."""

    name: ClassVar[str] = "blind"

    def __init__(self, *, running: bool) -> None:
        self.running = running

    async def create(self, engine_id: UUID, port: int, env: dict[str, str], image: str) -> EngineEndpoint:
        return EngineEndpoint("127.0.0.1", port, None)

    async def start(self, engine_id: UUID) -> None: ...

    async def stop(self, engine_id: UUID, timeout: int = 30) -> None: ...

    async def destroy(self, engine_id: UUID) -> None: ...

    async def is_running(self, engine_id: UUID) -> bool:
        return self.running


@pytest.mark.parametrize("running", [True, False])
async def test_a_backend_that_cannot_list_still_tells_an_exit(running: bool) -> None:
    means: Any = SimpleNamespace(backend=Blind(running=running))
    nobody: Any = None
    found = await Healing(means, nobody).look(uuid4())
    assert (found is not None and found.state is ObjectState.RUNNING) is running
