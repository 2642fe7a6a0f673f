"""What every backend must do, whatever it runs engines in."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest

from orchestrator.backends.base import EngineBackend, EngineEndpoint, ObjectState
from orchestrator.errors import BackendError, NotSupported, ObjectMissing, PortTaken

if TYPE_CHECKING:
    from tests.conformance.conftest import Harness

KILLED = 137


class Engine:
    """An engine made for a test."""

    def __init__(self, harness: Harness, endpoint: EngineEndpoint, engine_id: UUID) -> None:
        self._harness = harness
        self.id = engine_id
        self.endpoint = endpoint

    async def run(self) -> str:
        return await self._harness.run_of(self.id, self.endpoint)

    async def write(self, text: str) -> None:
        await self._harness.write(self.id, self.endpoint, text)

    async def read(self) -> str | None:
        return await self._harness.read(self.id, self.endpoint)

    async def say(self, line: str) -> None:
        await self._harness.say(self.id, self.endpoint, line)

    async def logged(self, backend: EngineBackend, line: str) -> None:
        """Wait until its log holds the line: Docker writes it down some time after the engine said it."""
        async with contextlib.aclosing(backend.logs(self.id, tail=1000, follow=True)) as lines:
            async for one in lines:
                if one.line == line:
                    return

    async def crash(self) -> None:
        await self._harness.crash(self.id, self.endpoint)

    async def answers(self) -> bool:
        return await self._harness.answers(self.id, self.endpoint)


async def make(harness: Harness, backend: EngineBackend, **flags: Any) -> Engine:
    """A new engine that answers."""
    engine_id = uuid4()
    endpoint = await backend.create(engine_id, harness.free_port(), harness.env(engine_id, **flags), harness.image)
    engine = Engine(harness, endpoint, engine_id)
    await engine.run()
    return engine


async def gone(backend: EngineBackend, engine_id: UUID) -> None:
    """Wait until an engine that ends by itself has ended; the time limit of the test ends the wait."""
    while await backend.is_running(engine_id):  # noqa: ASYNC110 (a backend tells nobody of an exit)
        await asyncio.sleep(0.005)


# --- create ------------------------------------------------------------------------------------------------


async def test_create_starts_an_engine(harness: Harness, backend: EngineBackend) -> None:
    engine_id, port = uuid4(), harness.free_port()
    endpoint = await backend.create(engine_id, port, harness.env(engine_id), harness.image)
    engine = Engine(harness, endpoint, engine_id)
    assert await engine.run()
    assert await backend.is_running(engine_id)
    assert await backend.has_data(engine_id)


async def test_create_again_adopts_the_running_engine(harness: Harness, backend: EngineBackend) -> None:
    engine = await make(harness, backend)
    run = await engine.run()
    again = await backend.create(engine.id, engine.endpoint.port, harness.env(engine.id), harness.image)
    assert again == engine.endpoint
    assert await engine.run() == run


async def test_create_of_a_newer_incarnation_replaces_the_object_and_keeps_its_data(
    harness: Harness, backend: EngineBackend
) -> None:
    engine = await make(harness, backend)
    await engine.write("before")
    run = await engine.run()
    image = harness.other_image if backend.capabilities.replace else harness.image
    endpoint = await backend.create(engine.id, engine.endpoint.port, harness.env(engine.id, 2), image)
    newer = Engine(harness, endpoint, engine.id)
    assert await newer.run() != run
    assert await newer.read() == "before"


async def test_data_that_is_gone_is_not_made_anew(harness: Harness, backend: EngineBackend) -> None:
    keeper, engine_id, port = backend.keeping_data(), uuid4(), harness.free_port()
    with pytest.raises(ObjectMissing):
        await keeper.create(engine_id, port, harness.env(engine_id), harness.image)
    assert not await backend.has_data(engine_id)
    assert not await backend.is_running(engine_id)
    engine = await make(harness, backend)
    await engine.write("before")
    await backend.stop(engine.id)
    endpoint = await keeper.create(engine.id, engine.endpoint.port, harness.env(engine.id, 2), harness.image)
    assert await Engine(harness, endpoint, engine.id).read() == "before"


async def test_create_of_an_older_incarnation_leaves_the_running_engine_alone(
    harness: Harness, backend: EngineBackend
) -> None:
    engine = await make(harness, backend)
    port = engine.endpoint.port
    newer = Engine(harness, await backend.create(engine.id, port, harness.env(engine.id, 7), harness.image), engine.id)
    run = await newer.run()
    with pytest.raises(BackendError):
        await backend.create(engine.id, port, harness.env(engine.id, 6), harness.image)
    assert await newer.run() == run


async def test_create_replaces_a_dead_object_of_the_same_incarnation(harness: Harness, backend: EngineBackend) -> None:
    engine = await make(harness, backend)
    await engine.write("kept")
    await backend.stop(engine.id)
    endpoint = await backend.create(engine.id, engine.endpoint.port, harness.env(engine.id), harness.image)
    again = Engine(harness, endpoint, engine.id)
    assert await again.run()
    assert await again.read() == "kept"


async def test_create_on_a_held_port_leaves_no_object(harness: Harness, backend: EngineBackend) -> None:
    engine_id, port = uuid4(), harness.free_port()
    with harness.hold_port(port), pytest.raises(PortTaken) as raised:
        await backend.create(engine_id, port, harness.env(engine_id), harness.image)
    assert raised.value.port == port
    assert not await backend.is_running(engine_id)
    with pytest.raises(ObjectMissing):
        await backend.start(engine_id)
    other = harness.free_port()
    endpoint = await backend.create(engine_id, other, harness.env(engine_id), harness.image)
    assert await Engine(harness, endpoint, engine_id).run()


async def test_concurrent_creates_make_one_engine(harness: Harness, backend: EngineBackend) -> None:
    engine_id, port = uuid4(), harness.free_port()
    other = await harness.backend()
    endpoints = await asyncio.gather(
        *(
            one.create(engine_id, port, harness.env(engine_id), harness.image)
            for one in (backend, other, backend, other, backend, other)
        )
    )
    assert len(set(endpoints)) == 1
    engine = Engine(harness, endpoints[0], engine_id)
    run = await engine.run()
    assert [found.engine_id for found in await harness.objects(backend)] == [engine_id]
    await backend.stop(engine_id)
    assert not await engine.answers()
    assert run


async def test_a_cancelled_create_can_be_repeated(harness: Harness, backend: EngineBackend) -> None:
    engine_id, port = uuid4(), harness.free_port()
    for rounds in range(12):
        task = asyncio.create_task(backend.create(engine_id, port, harness.env(engine_id), harness.image))
        for _ in range(rounds):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    endpoint = await backend.create(engine_id, port, harness.env(engine_id), harness.image)
    assert await Engine(harness, endpoint, engine_id).run()


# --- start and stop -----------------------------------------------------------------------------------------


async def test_stop_and_start_keep_data_and_address(harness: Harness, backend: EngineBackend) -> None:
    engine = await make(harness, backend)
    await engine.write("kept")
    run = await engine.run()
    await backend.stop(engine.id)
    assert not await backend.is_running(engine.id)
    assert not await engine.answers()
    assert await backend.has_data(engine.id)
    await backend.start(engine.id)
    assert await backend.is_running(engine.id)
    assert await engine.run() != run
    assert await engine.read() == "kept"


async def test_start_leaves_a_running_engine_alone(harness: Harness, backend: EngineBackend) -> None:
    engine = await make(harness, backend)
    run = await engine.run()
    await backend.start(engine.id)
    assert await engine.run() == run


async def test_start_of_a_missing_object(backend: EngineBackend) -> None:
    with pytest.raises(ObjectMissing):
        await backend.start(uuid4())


async def test_start_on_a_lost_port(harness: Harness, backend: EngineBackend) -> None:
    engine = await make(harness, backend)
    await backend.stop(engine.id)
    with harness.hold_port(engine.endpoint.port), pytest.raises(PortTaken):
        await backend.start(engine.id)
    assert not await backend.is_running(engine.id)
    await backend.start(engine.id)
    assert await engine.run()


async def test_start_after_a_crash(harness: Harness, backend: EngineBackend) -> None:
    engine = await make(harness, backend)
    await engine.write("kept")
    await engine.crash()
    if not backend.capabilities.restarts:
        await gone(backend, engine.id)
    await backend.start(engine.id)
    assert await engine.read() == "kept"


async def test_stop_twice_and_of_a_missing_object(harness: Harness, backend: EngineBackend) -> None:
    engine = await make(harness, backend)
    await backend.stop(engine.id)
    await backend.stop(engine.id)
    await backend.stop(uuid4())
    assert not await backend.is_running(engine.id)


async def test_stop_kills_an_engine_that_ignores_sigterm(harness: Harness, backend: EngineBackend) -> None:
    engine = await make(harness, backend, ignore_sigterm=True)
    await backend.stop(engine.id, timeout=0)
    assert not await backend.is_running(engine.id)
    assert not await engine.answers()
    if backend.capabilities.listing:
        found = await backend.find(engine.id)
        assert found is not None
        assert found.exit_code == KILLED


async def test_concurrent_stops(harness: Harness, backend: EngineBackend) -> None:
    engine = await make(harness, backend)
    other = await harness.backend()
    await asyncio.gather(*(one.stop(engine.id) for one in (backend, other, backend, other)))
    assert not await backend.is_running(engine.id)


async def test_concurrent_starts_make_one_engine(harness: Harness, backend: EngineBackend) -> None:
    engine = await make(harness, backend)
    await backend.stop(engine.id)
    other = await harness.backend()
    await asyncio.gather(*(one.start(engine.id) for one in (backend, other, backend, other)))
    assert await engine.run()
    await backend.stop(engine.id)
    assert not await engine.answers()


async def test_stop_and_start_at_once_leave_an_engine_that_obeys(harness: Harness, backend: EngineBackend) -> None:
    engine = await make(harness, backend)
    await engine.write("kept")
    other = await harness.backend()
    for _ in range(3):
        await asyncio.gather(backend.stop(engine.id), other.start(engine.id), other.stop(engine.id))
    await other.stop(engine.id)
    assert not await backend.is_running(engine.id)
    assert not await engine.answers()
    await backend.start(engine.id)
    assert await engine.read() == "kept"


async def test_a_cancelled_stop_can_be_repeated(harness: Harness, backend: EngineBackend) -> None:
    engine = await make(harness, backend, ignore_sigterm=True)
    task = asyncio.create_task(backend.stop(engine.id, timeout=30))
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await backend.stop(engine.id, timeout=0)
    assert not await backend.is_running(engine.id)
    await backend.start(engine.id)
    assert await engine.run()


async def test_a_claim_names_its_object(harness: Harness, backend: EngineBackend) -> None:
    engine = await make(harness, backend)
    claimed = backend.pinned(engine.endpoint.container_id)
    assert await claimed.is_running(engine.id)
    await claimed.stop(engine.id)
    assert not await backend.is_running(engine.id)
    await claimed.start(engine.id)
    assert await engine.run()


# --- destroy ------------------------------------------------------------------------------------------------


async def test_destroy_removes_object_and_data(harness: Harness, backend: EngineBackend) -> None:
    engine = await make(harness, backend)
    await engine.write("secret of a user")
    await backend.destroy(engine.id)
    assert not await backend.is_running(engine.id)
    assert not await backend.has_data(engine.id)
    assert not await engine.answers()
    with pytest.raises(ObjectMissing):
        await backend.start(engine.id)
    await backend.destroy(engine.id)
    await backend.destroy(uuid4())
    endpoint = await backend.create(engine.id, engine.endpoint.port, harness.env(engine.id, 2), harness.image)
    again = Engine(harness, endpoint, engine.id)
    assert await again.read() is None


async def test_destroy_of_a_stopped_engine(harness: Harness, backend: EngineBackend) -> None:
    engine = await make(harness, backend)
    await backend.stop(engine.id)
    await backend.destroy(engine.id)
    assert not await backend.has_data(engine.id)


async def test_concurrent_destroys(harness: Harness, backend: EngineBackend) -> None:
    engine = await make(harness, backend)
    other = await harness.backend()
    await asyncio.gather(*(one.destroy(engine.id) for one in (backend, other, backend, other)))
    assert not await backend.is_running(engine.id)
    assert not await backend.has_data(engine.id)


async def test_destroy_and_create_at_once_leave_all_or_nothing(harness: Harness, backend: EngineBackend) -> None:
    engine_id, port = uuid4(), harness.free_port()
    other = await harness.backend()
    for incarnation in range(1, 4):
        await asyncio.gather(
            backend.create(engine_id, port, harness.env(engine_id, incarnation), harness.image),
            other.destroy(engine_id),
            return_exceptions=True,
        )
        assert not await backend.is_running(engine_id) or await backend.has_data(engine_id)
    await backend.destroy(engine_id)
    assert not await backend.is_running(engine_id)
    assert not await backend.has_data(engine_id)


# --- looking ------------------------------------------------------------------------------------------------


async def test_a_missing_engine(backend: EngineBackend) -> None:
    engine_id = uuid4()
    assert not await backend.is_running(engine_id)
    assert not await backend.has_data(engine_id)


async def test_a_port_nobody_uses_is_free(harness: Harness, backend: EngineBackend) -> None:
    assert await backend.is_port_free(harness.free_port())


async def test_the_location_is_the_same_for_all(harness: Harness, backend: EngineBackend) -> None:
    others = [await harness.backend(), await harness.backend(uuid4())]
    locations = await asyncio.gather(*(one.location_id() for one in (backend, *others)))
    assert len(set(locations)) == 1


async def test_another_instance_adopts(harness: Harness, backend: EngineBackend) -> None:
    engine = await make(harness, backend)
    await backend.close()
    other = await harness.backend()
    assert await other.is_running(engine.id)
    assert await engine.run()
    await other.stop(engine.id)
    assert not await other.is_running(engine.id)


async def test_list_and_find(harness: Harness, backend: EngineBackend) -> None:
    if not backend.capabilities.listing:
        with pytest.raises(NotSupported):
            await backend.list()
        return
    assert await backend.list() == []
    assert await backend.find(uuid4()) is None
    running = await make(harness, backend)
    stopped = await make(harness, backend)
    await backend.stop(stopped.id)
    found = {one.engine_id: one for one in await backend.list()}
    assert found.keys() == {running.id, stopped.id}
    assert found[running.id].state is ObjectState.RUNNING
    assert found[running.id].incarnation == 1
    assert found[running.id].endpoint == running.endpoint
    assert found[stopped.id].state is ObjectState.EXITED
    assert found[stopped.id].exit_code == 0
    for engine_id, listed in found.items():
        one = await backend.find(engine_id)
        assert one is not None
        assert replace(one, started_at=None) == listed  # told by `find` only


async def test_an_exit_is_seen(harness: Harness, backend: EngineBackend) -> None:
    if backend.capabilities.restarts or not backend.capabilities.listing:
        return  # an exit does not last, or cannot be looked at
    engine = await make(harness, backend)
    await engine.crash()
    await gone(backend, engine.id)
    found = await backend.find(engine.id)
    assert found is not None
    assert (found.state, found.exit_code) == (ObjectState.EXITED, 3)


# --- freeze and thaw ------------------------------------------------------------------------------------------


async def test_freeze_and_thaw(harness: Harness, backend: EngineBackend) -> None:
    engine = await make(harness, backend)
    if not backend.capabilities.freeze:
        with pytest.raises(NotSupported):
            await backend.freeze(engine.id)
        with pytest.raises(NotSupported):
            await backend.thaw(engine.id)
        return
    run = await engine.run()
    await backend.freeze(engine.id)
    await backend.freeze(engine.id)
    assert await backend.is_running(engine.id)
    assert not await engine.answers()
    if backend.capabilities.listing:
        found = await backend.find(engine.id)
        assert found is not None
        assert found.state is ObjectState.FROZEN
    await backend.thaw(engine.id)
    await backend.thaw(engine.id)
    assert await engine.run() == run


async def test_freeze_and_thaw_of_what_is_not_there(harness: Harness, backend: EngineBackend) -> None:
    if not backend.capabilities.freeze:
        return  # answered in the test above
    engine = await make(harness, backend)
    await backend.stop(engine.id)
    for engine_id in (engine.id, uuid4()):
        with pytest.raises(ObjectMissing):
            await backend.freeze(engine_id)
        with pytest.raises(ObjectMissing):
            await backend.thaw(engine_id)


async def test_a_frozen_engine_can_be_stopped_replaced_and_destroyed(harness: Harness, backend: EngineBackend) -> None:
    if not backend.capabilities.freeze:
        return  # answered in the test above
    engine = await make(harness, backend)
    await engine.write("kept")
    await backend.freeze(engine.id)
    await backend.stop(engine.id)
    assert not await backend.is_running(engine.id)
    await backend.start(engine.id)
    assert await engine.read() == "kept"
    await backend.freeze(engine.id)
    endpoint = await backend.create(engine.id, engine.endpoint.port, harness.env(engine.id, 2), harness.image)
    newer = Engine(harness, endpoint, engine.id)
    assert await newer.read() == "kept"
    await backend.freeze(engine.id)
    await backend.destroy(engine.id)
    assert not await backend.is_running(engine.id)


async def test_freezing_and_thawing_at_once(harness: Harness, backend: EngineBackend) -> None:
    if not backend.capabilities.freeze:
        return  # answered in the test above
    engine = await make(harness, backend)
    other = await harness.backend()
    await asyncio.gather(*(call for _ in range(4) for call in (backend.freeze(engine.id), other.freeze(engine.id))))
    await asyncio.gather(*(call for _ in range(4) for call in (backend.thaw(engine.id), other.thaw(engine.id))))
    assert await engine.answers()


# --- logs -------------------------------------------------------------------------------------------------------


async def test_logs(harness: Harness, backend: EngineBackend) -> None:
    engine = await make(harness, backend)
    if not backend.capabilities.logs:
        with pytest.raises(NotSupported):
            backend.logs(engine.id, tail=1)
        return
    for number in range(5):
        await engine.say(f"line {number}")
    await engine.logged(backend, "line 4")
    assert [one.line async for one in backend.logs(engine.id, tail=2)] == ["line 3", "line 4"]
    assert [one.line async for one in backend.logs(engine.id, tail=0)] == []
    everything = [one.line async for one in backend.logs(engine.id, tail=1000)]
    assert everything[-5:] == [f"line {number}" for number in range(5)]
    await backend.stop(engine.id)
    assert "line 4" in [one.line async for one in backend.logs(engine.id, tail=1000)]


async def test_logs_are_followed_until_the_engine_is_destroyed(harness: Harness, backend: EngineBackend) -> None:
    if not backend.capabilities.logs:
        return  # answered in the test above
    engine = await make(harness, backend)
    await engine.say("before")
    await engine.logged(backend, "before")
    seen: asyncio.Queue[str] = asyncio.Queue()

    async def follow() -> None:
        async for one in backend.logs(engine.id, tail=1, follow=True):
            await seen.put(one.line)

    reader = asyncio.create_task(follow())
    assert await seen.get() == "before"
    await engine.say("after")
    assert await seen.get() == "after"
    await backend.stop(engine.id)
    await backend.start(engine.id)
    await engine.run()
    await engine.say("later")
    while await seen.get() != "later":
        pass
    await backend.destroy(engine.id)
    await reader


async def test_logs_of_a_missing_engine(backend: EngineBackend) -> None:
    if not backend.capabilities.logs:
        return  # answered in the test above
    with pytest.raises(ObjectMissing):
        async for _ in backend.logs(uuid4(), tail=1):
            pass


# --- whose is it --------------------------------------------------------------------------------------------------


async def test_objects_of_another_deployment_are_left_alone(harness: Harness, backend: EngineBackend) -> None:
    engine = await make(harness, backend)
    await engine.write("kept")
    run = await engine.run()
    stranger = await harness.backend(uuid4())
    assert not await stranger.is_running(engine.id)
    with pytest.raises(BackendError):
        await stranger.create(engine.id, harness.free_port(), harness.env(engine.id, 9), harness.image)
    for call in (stranger.start, stranger.stop, stranger.destroy):
        with contextlib.suppress(BackendError):
            await call(engine.id)
    if stranger.capabilities.freeze:
        with contextlib.suppress(BackendError):
            await stranger.freeze(engine.id)
    if stranger.capabilities.listing:
        assert await stranger.list() == []
        assert await stranger.find(engine.id) is None
    assert await engine.run() == run
    assert await engine.read() == "kept"
    await backend.stop(engine.id)
    for call in (stranger.start, stranger.destroy):
        with contextlib.suppress(BackendError):
            await call(engine.id)
    assert not await backend.is_running(engine.id)
    await backend.start(engine.id)
    assert await engine.read() == "kept"
