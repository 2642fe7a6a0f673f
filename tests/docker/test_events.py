"""The event stream: what happens to our containers, and only to them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING
from uuid import uuid4

from orchestrator.backends.base import BackendEvent, EventKind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from orchestrator.backends.docker_backend import DockerBackend
    from tests.docker.harness import DockerHarness


async def until(events: AsyncIterator[BackendEvent], kind: EventKind) -> BackendEvent:
    async for event in events:
        if event.kind is kind:
            return event
    raise AssertionError("the stream of events ended")


async def test_the_life_of_an_engine(harness: DockerHarness, backend: DockerBackend) -> None:
    stranger = await harness.backend(uuid4())
    engine_id, other_id = uuid4(), uuid4()
    async with contextlib.aclosing(backend.events()) as events:
        assert await anext(events) == BackendEvent(EventKind.RESYNC)
        await stranger.create(other_id, harness.free_port(), harness.env(other_id), harness.image)
        endpoint = await backend.create(engine_id, harness.free_port(), harness.env(engine_id), harness.image)
        container = endpoint.container_id
        assert await anext(events) == BackendEvent(EventKind.STARTED, engine_id, container)
        await harness.run_of(engine_id, endpoint)
        await backend.freeze(engine_id)
        assert await anext(events) == BackendEvent(EventKind.FROZEN, engine_id, container)
        await backend.thaw(engine_id)
        assert await anext(events) == BackendEvent(EventKind.THAWED, engine_id, container)
        await harness.crash(engine_id, endpoint)
        assert await anext(events) == BackendEvent(EventKind.EXITED, engine_id, container, 3)
        # Docker's own restart.
        assert await anext(events) == BackendEvent(EventKind.STARTED, engine_id, container)
        await backend.stop(engine_id)
        assert (await until(events, EventKind.EXITED)).container_id == container
        await backend.destroy(engine_id)
        assert await anext(events) == BackendEvent(EventKind.REMOVED, engine_id, container)
