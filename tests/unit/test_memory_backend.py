"""What the fake offers to tests beyond the conformance suite: failures, holds, and what others do to objects."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from cryptography.fernet import Fernet

from orchestrator.backends import load_backend
from orchestrator.backends.base import Capabilities, EngineEndpoint, ObjectState
from orchestrator.backends.memory_backend import MemoryBackend
from orchestrator.errors import BackendUnavailable, ImageNotFound, NotSupported, ObjectMissing, PortTaken
from orchestrator.settings import Settings, load_settings

if TYPE_CHECKING:
    from pathlib import Path

ENV = {"ENGINE_INCARNATION": "1"}


@pytest.fixture
def backend() -> MemoryBackend:
    return MemoryBackend(uuid4())


def settings(data_root: Path) -> Settings:
    return load_settings(
        _env_file=None,
        database_url="postgresql://localhost/unused",
        master_key=Fernet.generate_key().decode(),
        admin_key="an-admin-key-for-tests",
        engine_backend="memory",
        data_root=data_root,
    )


async def test_it_is_found_by_its_name_and_its_location_lasts(tmp_path: Path) -> None:
    one = load_backend(settings(tmp_path / "a"), uuid4())
    again = load_backend(settings(tmp_path / "a"), uuid4())
    elsewhere = load_backend(settings(tmp_path / "b"), uuid4())
    assert isinstance(one, MemoryBackend)
    assert await one.location_id() == await again.location_id() != await elsewhere.location_id()


async def test_a_failure_before_the_call_changes_nothing(backend: MemoryBackend) -> None:
    engine_id = uuid4()
    backend.fail_next("create", BackendUnavailable("The daemon does not answer."))
    with pytest.raises(BackendUnavailable):
        await backend.create(engine_id, 9001, ENV, "image")
    assert await backend.list() == []
    await backend.create(engine_id, 9001, ENV, "image")  # only the next call fails
    assert await backend.is_running(engine_id)


async def test_a_failure_after_the_call_took_effect(backend: MemoryBackend) -> None:
    engine_id = uuid4()
    backend.fail_next("create", BackendUnavailable("Connection lost."), after=True)
    with pytest.raises(BackendUnavailable):
        await backend.create(engine_id, 9001, ENV, "image")
    assert await backend.is_running(engine_id)
    assert await backend.create(engine_id, 9001, ENV, "image") == EngineEndpoint("127.0.0.1", 9001, None)


async def test_failures_come_in_the_order_in_which_they_were_asked_for(backend: MemoryBackend) -> None:
    backend.fail_next("list", BackendUnavailable("first"))
    backend.fail_next("list", BackendUnavailable("second"))
    for message in ("first", "second"):
        with pytest.raises(BackendUnavailable, match=message):
            await backend.list()
    assert await backend.list() == []


async def test_a_held_call_waits_before_it_does_anything(backend: MemoryBackend) -> None:
    engine_id = uuid4()
    hold = backend.hold("create")
    task = asyncio.create_task(backend.create(engine_id, 9001, ENV, "image"))
    await hold.entered.wait()
    assert not await backend.is_running(engine_id)
    hold.release.set()
    await task
    assert await backend.is_running(engine_id)


async def test_a_held_call_can_be_cancelled(backend: MemoryBackend) -> None:
    engine_id = uuid4()
    hold = backend.hold("create")
    task = asyncio.create_task(backend.create(engine_id, 9001, ENV, "image"))
    await hold.entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await backend.list() == []


@pytest.mark.parametrize("call", ["hold", "fail_next"])
def test_an_unknown_method_is_a_mistake(backend: MemoryBackend, call: str) -> None:
    arguments = [] if call == "hold" else [BackendUnavailable("never")]
    with pytest.raises(ValueError, match="creat"):
        getattr(backend, call)("creat", *arguments)


async def test_calls_are_counted(backend: MemoryBackend) -> None:
    engine_id = uuid4()
    await backend.create(engine_id, 9001, ENV, "image")
    await backend.freeze(engine_id)
    await backend.list()
    assert backend.calls == [("create", engine_id), ("freeze", engine_id), ("list", None)]


async def test_what_others_do_to_an_engine(backend: MemoryBackend) -> None:
    engine_id = uuid4()
    await backend.create(engine_id, 9001, ENV, "image")
    await backend.freeze(engine_id)
    backend.unfreeze(engine_id)
    found = await backend.find(engine_id)
    assert found is not None
    assert found.state is ObjectState.RUNNING
    backend.exit(engine_id, 9)
    found = await backend.find(engine_id)
    assert found is not None
    assert (found.state, found.exit_code) == (ObjectState.EXITED, 9)
    backend.lose(engine_id, data=True)
    assert not await backend.has_data(engine_id)
    with pytest.raises(ObjectMissing):
        await backend.start(engine_id)
    backend.lose(engine_id)
    assert await backend.find(engine_id) is None


async def test_ports_and_images_of_the_host(backend: MemoryBackend) -> None:
    backend.host.held_ports.add(9001)
    backend.host.missing_images.add("nowhere:1")
    assert not await backend.is_port_free(9001)
    with pytest.raises(PortTaken):
        await backend.create(uuid4(), 9001, ENV, "image")
    with pytest.raises(ImageNotFound):
        await backend.create(uuid4(), 9002, ENV, "nowhere:1")
    await backend.create(uuid4(), 9002, ENV, "image")
    with pytest.raises(PortTaken):  # two engines never share one
        await backend.create(uuid4(), 9002, ENV, "image")


async def test_abilities_can_be_taken_away() -> None:
    class Plain(MemoryBackend):
        capabilities = Capabilities()

    backend, engine_id = Plain(uuid4()), uuid4()
    await backend.create(engine_id, 9001, ENV, "image")
    for call in (backend.freeze, backend.thaw, backend.find):
        with pytest.raises(NotSupported):
            await call(engine_id)
    with pytest.raises(NotSupported):
        await backend.list()
    with pytest.raises(NotSupported):
        async for _ in backend.logs(engine_id, tail=1):
            pass


async def test_environment_stays_out_of_what_is_printed(backend: MemoryBackend) -> None:
    engine_id = uuid4()
    await backend.create(engine_id, 9001, {**ENV, "LLM_KEY": "do-not-print"}, "image")
    assert "do-not-print" not in repr(backend.host)
