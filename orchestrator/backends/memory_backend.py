"""A backend without processes: the public fake for tests of whatever uses a backend.

It keeps the rules of a real one (adoption by incarnation, ports, data that outlives its object, ownership), and a
test may make any call fail, wait, or take effect without its caller hearing of it:

    backend = MemoryBackend(deployment_id)
    backend.fail_next("create", BackendUnavailable("The daemon does not answer."))
    backend.fail_next("stop", BackendUnavailable("Connection lost."), after=True)  # stopped, but nobody was told
    hold = backend.hold("start")
    task = asyncio.create_task(backend.start(engine_id))
    await hold.entered.wait()  # the call is under way
    hold.release.set()

Objects live as long as their `MemoryHost`. Backends that share one host see the same objects, as two orchestrators
on one machine do: `MemoryBackend(other_deployment, host=backend.host)`.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar
from uuid import NAMESPACE_URL, UUID, uuid4, uuid5

from orchestrator.backends.base import (
    BackendObject,
    Capabilities,
    EngineBackend,
    EngineEndpoint,
    LogLine,
    ObjectState,
)
from orchestrator.errors import BackendError, ImageNotFound, NotSupported, ObjectMissing, PortTaken

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from orchestrator.settings import Settings

__all__ = ["Hold", "MemoryBackend", "MemoryHost", "MemoryObject"]

_EXIT_KILLED = 137
_next_run = itertools.count(1).__next__


@dataclass(slots=True)
class MemoryObject:
    """What a container or a process would be."""

    deployment_id: UUID
    incarnation: int
    port: int
    image: str
    env: dict[str, str] = field(repr=False)
    state: ObjectState = ObjectState.RUNNING
    exit_code: int | None = None
    restart_count: int = 0
    run: int = field(default_factory=_next_run)  # another one at each start


@dataclass(slots=True)
class MemoryHost:
    """The place that objects live in, seen by every backend that was given it."""

    location_id: UUID = field(default_factory=uuid4)
    objects: dict[UUID, MemoryObject] = field(default_factory=dict)
    data: dict[UUID, dict[str, str]] = field(default_factory=dict)
    logs: dict[UUID, list[str]] = field(default_factory=lambda: defaultdict(list))
    held_ports: set[int] = field(default_factory=set)  # by something that is no engine
    missing_images: set[str] = field(default_factory=set)
    deaf: set[UUID] = field(default_factory=set)  # engines that do not listen to SIGTERM
    _written: asyncio.Event = field(default_factory=asyncio.Event)

    def say(self, engine_id: UUID, line: str) -> None:
        """Write a line into an engine's log."""
        self.logs[engine_id].append(line)
        self.wake_readers()

    def wake_readers(self) -> None:
        self._written.set()
        self._written = asyncio.Event()

    async def next_line(self) -> None:
        await self._written.wait()


@dataclass(slots=True)
class Hold:
    """A call made to wait: `entered` says that it has begun, `release` lets it go on."""

    entered: asyncio.Event = field(default_factory=asyncio.Event)
    release: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class _Failure:
    error: Exception
    after: bool


class MemoryBackend(EngineBackend):
    """Objects in a dict. `calls` has every call as `(method, engine_id)`, in order."""

    name: ClassVar[str] = "memory"
    capabilities: ClassVar[Capabilities] = Capabilities(freeze=True, listing=True, logs=True, replace=True)

    def __init__(self, deployment_id: UUID, *, host: MemoryHost | None = None) -> None:
        self.deployment_id = deployment_id
        self.host = host if host is not None else MemoryHost()
        self.calls: list[tuple[str, UUID | None]] = []
        self._keeps_data = False
        self._failures: dict[str, deque[_Failure]] = defaultdict(deque)
        self._holds: dict[str, deque[Hold]] = defaultdict(deque)

    @classmethod
    def from_settings(cls, settings: Settings, deployment_id: UUID) -> MemoryBackend:
        """A host of its own, whose location is the same at each start with the same `ORCH_DATA_ROOT`."""
        location = uuid5(NAMESPACE_URL, settings.data_root.expanduser().absolute().as_uri())
        return cls(deployment_id, host=MemoryHost(location_id=location))

    async def check(self) -> None:
        async with self._call("check", None):
            pass

    # --- for tests ------------------------------------------------------------------------------------

    def fail_next(self, method: str, error: Exception, *, after: bool = False) -> None:
        """Let the next call of a method raise: before it does anything, or `after` it has taken effect."""
        self._failures[_known(method)].append(_Failure(error, after))

    def hold(self, method: str) -> Hold:
        """Let the next call of a method wait, before it does anything, until `release` is set."""
        hold = Hold()
        self._holds[_known(method)].append(hold)
        return hold

    def exit(self, engine_id: UUID, exit_code: int = 1) -> None:
        """The engine's process ends by itself."""
        found = self.host.objects[engine_id]
        found.state = ObjectState.EXITED
        found.exit_code = exit_code

    def unfreeze(self, engine_id: UUID) -> None:
        """Somebody else thaws the engine, as a restart of the Docker daemon does."""
        found = self.host.objects[engine_id]
        if found.state is ObjectState.FROZEN:
            found.state = ObjectState.RUNNING

    def lose(self, engine_id: UUID, *, data: bool = False) -> None:
        """Somebody else removes the engine's object, or only its `data`."""
        if data:
            self.host.data.pop(engine_id, None)
        else:
            self.host.objects.pop(engine_id, None)

    # --- the documented interface ---------------------------------------------------------------------

    async def create(self, engine_id: UUID, port: int, env: dict[str, str], image: str) -> EngineEndpoint:
        async with self._call("create", engine_id):
            incarnation = int(env.get("ENGINE_INCARNATION", "0"))
            found = self._owned(engine_id)
            if found is not None and found.state is not ObjectState.EXITED:
                if found.incarnation == incarnation:
                    return _endpoint(found)
                if found.incarnation > incarnation:
                    raise BackendError(f"Engine {engine_id} runs as a newer incarnation; it is left alone.")
                self._end(engine_id, found)
            if image in self.host.missing_images:
                raise ImageNotFound(image)
            if self._keeps_data and engine_id not in self.host.data:
                raise ObjectMissing(str(engine_id))
            self.host.data.setdefault(engine_id, {})
            if not self._port_is_free(port):
                raise PortTaken(port)
            made = MemoryObject(self.deployment_id, incarnation, port, image, dict(env))
            self.host.objects[engine_id] = made
            self.host.say(engine_id, f"created on port {port}")
            return _endpoint(made)

    async def start(self, engine_id: UUID) -> None:
        async with self._call("start", engine_id):
            found = self._owned(engine_id)
            if found is None or engine_id not in self.host.data:
                raise ObjectMissing(str(engine_id))
            if found.state is not ObjectState.EXITED:
                return
            if not self._port_is_free(found.port):
                raise PortTaken(found.port)
            found.state = ObjectState.RUNNING
            found.exit_code = None
            found.run = _next_run()
            self.host.say(engine_id, f"started on port {found.port}")

    async def stop(self, engine_id: UUID, timeout: int = 30) -> None:
        """See the interface; a `deaf` engine is killed, without waiting for its grace."""
        async with self._call("stop", engine_id):
            found = self._owned(engine_id)
            if found is not None:
                self._end(engine_id, found)

    async def destroy(self, engine_id: UUID) -> None:
        async with self._call("destroy", engine_id):
            self._owned(engine_id)
            self.host.objects.pop(engine_id, None)
            self.host.data.pop(engine_id, None)
            self.host.logs.pop(engine_id, None)
            self.host.wake_readers()

    async def is_running(self, engine_id: UUID) -> bool:
        async with self._call("is_running", engine_id):
            found = self._seen(engine_id)
            return found is not None and found.state is not ObjectState.EXITED

    # --- optional abilities ---------------------------------------------------------------------------

    def keeping_data(self) -> MemoryBackend:
        view = copy.copy(self)
        view._keeps_data = True
        return view

    async def location_id(self) -> UUID:
        async with self._call("location_id", None):
            return self.host.location_id

    async def is_port_free(self, port: int) -> bool:
        async with self._call("is_port_free", None):
            return self._port_is_free(port)

    async def has_data(self, engine_id: UUID) -> bool:
        async with self._call("has_data", engine_id):
            return engine_id in self.host.data

    async def find(self, engine_id: UUID) -> BackendObject | None:
        self._need(self.capabilities.listing, "listing")
        async with self._call("find", engine_id):
            found = self._seen(engine_id)
            return None if found is None else _shown(engine_id, found)

    async def list(self) -> list[BackendObject]:
        self._need(self.capabilities.listing, "listing")
        async with self._call("list", None):
            return [
                _shown(engine_id, found)
                for engine_id, found in self.host.objects.items()
                if found.deployment_id == self.deployment_id
            ]

    async def freeze(self, engine_id: UUID) -> None:
        self._need(self.capabilities.freeze, "freeze")
        async with self._call("freeze", engine_id):
            self._alive(engine_id).state = ObjectState.FROZEN

    async def thaw(self, engine_id: UUID) -> None:
        self._need(self.capabilities.freeze, "freeze")
        async with self._call("thaw", engine_id):
            self._alive(engine_id).state = ObjectState.RUNNING

    async def logs(self, engine_id: UUID, *, tail: int, follow: bool = False) -> AsyncGenerator[LogLine, None]:
        self._need(self.capabilities.logs, "logs")
        async with self._call("logs", engine_id):
            if self._owned(engine_id) is None:
                raise ObjectMissing(str(engine_id))
            lines = self.host.logs[engine_id]
        shown = max(0, len(lines) - tail)
        while True:
            while shown < len(lines):
                shown += 1
                yield LogLine(timestamp=None, stream="stdout", line=lines[shown - 1])
            if not follow or engine_id not in self.host.logs:
                return
            await self.host.next_line()

    # --- inside -----------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _call(self, method: str, engine_id: UUID | None) -> AsyncIterator[None]:
        self.calls.append((method, engine_id))
        await asyncio.sleep(0)  # a real backend always lets others run
        holds = self._holds[method]
        if holds:
            hold = holds.popleft()
            hold.entered.set()
            await hold.release.wait()
        failures = self._failures[method]
        failure = failures.popleft() if failures else None
        if failure is not None and not failure.after:
            raise failure.error
        yield
        if failure is not None:
            raise failure.error

    def _need(self, able: bool, ability: str) -> None:
        if not able:
            raise NotSupported(ability, self.name)

    def _seen(self, engine_id: UUID) -> MemoryObject | None:
        found = self.host.objects.get(engine_id)
        return found if found is not None and found.deployment_id == self.deployment_id else None

    def _owned(self, engine_id: UUID) -> MemoryObject | None:
        found = self.host.objects.get(engine_id)
        if found is not None and found.deployment_id != self.deployment_id:
            raise BackendError(f"Engine {engine_id} belongs to another deployment; it is left alone.")
        return found

    def _alive(self, engine_id: UUID) -> MemoryObject:
        found = self._owned(engine_id)
        if found is None or found.state is ObjectState.EXITED:
            raise ObjectMissing(str(engine_id))
        return found

    def _end(self, engine_id: UUID, found: MemoryObject) -> None:
        if found.state is not ObjectState.EXITED:
            found.state = ObjectState.EXITED
            found.exit_code = _EXIT_KILLED if engine_id in self.host.deaf else 0
            self.host.say(engine_id, f"exited with {found.exit_code}")

    def _port_is_free(self, port: int) -> bool:
        return port not in self.host.held_ports and not any(
            found.port == port and found.state is not ObjectState.EXITED for found in self.host.objects.values()
        )


def _known(method: str) -> str:
    if not hasattr(EngineBackend, method):
        raise ValueError(f"a backend has no method '{method}'")
    return method


def _endpoint(found: MemoryObject) -> EngineEndpoint:
    return EngineEndpoint(host="127.0.0.1", port=found.port, container_id=None)


def _shown(engine_id: UUID, found: MemoryObject) -> BackendObject:
    return BackendObject(
        engine_id=engine_id,
        state=found.state,
        incarnation=found.incarnation,
        endpoint=_endpoint(found),
        restart_count=found.restart_count,
        exit_code=found.exit_code,
    )
