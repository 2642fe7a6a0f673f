"""What the lifecycle needs of a backend, and nothing more.

The five abstract methods are the documented interface. Everything else is an optional ability: declared as data
in `Capabilities`, never faked; its default raises `NotSupported`. A third party registers a subclass under the
entry point group `orchestrator.backends` (name → class with `from_settings`).

Rules for every implementation:

- Each method is idempotent and may be called again after a crash of the caller at any point.
- Transient trouble raises `BackendUnavailable`, a permanent one `BackendError` (or a subclass); nothing else escapes.
- No object of another deployment, and none without our ownership mark, is ever changed.
- No method waits on the server's side: what takes long is made of short calls that can be given up.
"""

from __future__ import annotations

import abc
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, Self

from orchestrator.errors import NotSupported

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator
    from datetime import datetime
    from uuid import UUID

    from orchestrator.settings import Settings

__all__ = [
    "BackendEvent",
    "BackendObject",
    "Capabilities",
    "EngineBackend",
    "EngineEndpoint",
    "EventKind",
    "LogLine",
    "ObjectState",
    "id12",
    "report",
    "reporting",
]

_REPORTS: ContextVar[Callable[[str, str | None], None] | None] = ContextVar("reports", default=None)


@contextmanager
def reporting(hear: Callable[[str, str | None], None]) -> Iterator[None]:
    """Calls made inside, and tasks begun inside, tell `hear` the phase that they enter, and a line of progress."""
    token = _REPORTS.set(hear)
    try:
        yield
    finally:
        _REPORTS.reset(token)


def report(phase: str, line: str | None = None) -> None:
    """For a backend: what it is doing now (`pull`, `create`, `start`, …), for the engine's timeline."""
    hear = _REPORTS.get()
    if hear is not None:
        hear(phase, line)


def id12(engine_id: UUID) -> str:
    """The first 12 hex digits of an engine's id, as used in names of containers and volumes."""
    return engine_id.hex[:12]


@dataclass(frozen=True, slots=True)
class EngineEndpoint:
    """Where the orchestrator (and the product) reaches an engine."""

    host: str
    port: int
    container_id: str | None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The optional abilities of a backend; a missing one is answered with `NOT_SUPPORTED`."""

    freeze: bool = False  # freeze(), thaw()
    listing: bool = False  # list(), find()
    logs: bool = False  # logs()
    copy: bool = False  # a copy of the data
    replace: bool = False  # another image on the same data
    ceilings: bool = False  # memory and CPU limits
    events: bool = False  # a stream of what happens to objects
    restarts: bool = False  # the backend itself starts an object again that has exited
    holds_port: bool = False  # a started object has its port: nobody else can answer there


class ObjectState(StrEnum):
    """What an object really is, whatever the registry says."""

    RUNNING = "running"
    FROZEN = "frozen"
    EXITED = "exited"


@dataclass(frozen=True, slots=True)
class BackendObject:
    """One object that this deployment owns, as the backend sees it now."""

    engine_id: UUID
    state: ObjectState
    incarnation: int
    endpoint: EngineEndpoint
    restart_count: int = 0  # restarts made by the backend itself
    started_at: datetime | None = None  # of the last process, by the backend's clock
    exit_code: int | None = None
    mending: bool = False  # exited, and the backend is about to start it again by itself


class EventKind(StrEnum):
    """What happened to an object, as its backend tells at once."""

    RESYNC = "resync"  # a subscription begins, at first or after a break: look at the list
    STARTED = "started"
    EXITED = "exited"
    OUT_OF_MEMORY = "out_of_memory"
    FROZEN = "frozen"
    THAWED = "thawed"
    REMOVED = "removed"


@dataclass(frozen=True, slots=True)
class BackendEvent:
    """A hint: the list is the truth."""

    kind: EventKind
    engine_id: UUID | None = None
    container_id: str | None = None
    exit_code: int | None = None


@dataclass(frozen=True, slots=True)
class LogLine:
    timestamp: datetime | None
    stream: str  # stdout | stderr
    line: str


class EngineBackend(abc.ABC):
    """Makes, starts, stops and removes the objects (containers, processes) that engines run in."""

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities] = Capabilities()

    @classmethod
    def from_settings(cls, settings: Settings, deployment_id: UUID) -> Self:
        """Build the backend; opens nothing yet.

        `deployment_id` is the random id kept in the database: the mark of ownership of every object.
        """
        raise NotImplementedError(f"{cls.__name__} cannot be built from settings")

    async def open(self) -> None:
        """Connect, and check what can be checked. Raises `BackendUnavailable` or `ConfigurationError`."""
        return None

    async def check(self) -> None:
        """Raises `BackendUnavailable` when the backend does not answer now."""
        return None

    async def close(self) -> None:
        """Let go of connections and tasks. Never stops an engine."""
        return None

    # --- the documented interface ---------------------------------------------------------------------

    @abc.abstractmethod
    async def create(self, engine_id: UUID, port: int, env: dict[str, str], image: str) -> EngineEndpoint:
        """Make the engine's object and data, and start it. Does not wait for the engine to be healthy.

        `env` has `ENGINE_KEY_HASH`, `ENGINE_KEY_GENERATION`, `ENGINE_INCARNATION` and the pass-through values; the
        backend adds what it alone knows (`SQLITE_DB_PATH`, `CATALOG_DIR`, `HOST`, `PORT`). `ENGINE_INCARNATION`
        marks the object: a running object of the same incarnation is adopted, a dead one or one of an older
        incarnation is replaced (its data kept). Raises `PortTaken`, `ImageNotFound`, `BackendError`,
        `BackendUnavailable`; after `PortTaken` nothing of this call is left but the data.
        """

    @abc.abstractmethod
    async def start(self, engine_id: UUID) -> None:
        """Start the existing object again on the same data, port and environment; a running one is left alone.

        Raises `ObjectMissing` when it must be created, `PortTaken` when its port was lost.
        """

    @abc.abstractmethod
    async def stop(self, engine_id: UUID, timeout: int = 30) -> None:
        """SIGTERM, at most `timeout` seconds of grace, SIGKILL; returns when it has exited.

        A frozen object is stopped as well. A missing or exited one is no error.
        """

    @abc.abstractmethod
    async def destroy(self, engine_id: UUID) -> None:
        """Remove the object and its data for good. A missing one is no error."""

    @abc.abstractmethod
    async def is_running(self, engine_id: UUID) -> bool:
        """True when the object's process exists (frozen counts as running)."""

    # --- optional abilities ---------------------------------------------------------------------------

    def pinned(self, container_id: str | None) -> EngineBackend:
        """This backend, acting only on the object that the claim recorded.

        The registry cannot fence a backend whose objects can be re-created under the same name, so the lifecycle
        makes every call through `pinned(row.container_id)`. Backends with a fence of their own return themselves.
        """
        return self

    def limited(self, *, memory: str | None, cpus: float | None) -> EngineBackend:
        """This backend, making objects with these ceilings instead of the default ones (needs `ceilings`)."""
        return self

    def keeping_data(self) -> EngineBackend:
        """This backend, for an engine that has data: `create` never makes it anew. Raises `ObjectMissing` instead."""
        return self

    async def set_ceilings(self, engine_id: UUID, *, memory: str | None = None, cpus: float | None = None) -> None:
        """Other ceilings for an existing object, running or not; None: the default one (needs `ceilings`)."""
        raise NotSupported("ceilings", self.name)

    async def resolve_image(self, image: str) -> str:
        """The lasting name of what `image` is now; fetched when it is missing here, whose progress is reported.

        What the registry keeps, and hands to each later `create`. Raises `ImageNotFound`.
        """
        return image

    async def location_id(self) -> UUID:
        """The id of the place (daemon, data root) whose objects this backend sees; made on first use."""
        raise NotSupported("location", self.name)

    async def is_port_free(self, port: int) -> bool:
        """False when something else on the host is known to hold `port`. Only a hint: `create` decides."""
        return True

    async def has_data(self, engine_id: UUID) -> bool:
        """True when the engine's data exists. Asked before an engine that was ever healthy is brought up."""
        return True

    async def find(self, engine_id: UUID) -> BackendObject | None:
        """The object of one engine (needs `listing`)."""
        for found in await self.list():
            if found.engine_id == engine_id:
                return found
        return None

    async def list(self) -> list[BackendObject]:
        """Every object of this deployment at this location, in one call (needs `listing`)."""
        raise NotSupported("listing", self.name)

    async def freeze(self, engine_id: UUID) -> None:
        """Stop giving CPU to a running object, keeping its memory (needs `freeze`). Frozen: no error."""
        raise NotSupported("freeze", self.name)

    async def thaw(self, engine_id: UUID) -> None:
        """Undo `freeze`. Running: no error. Raises `ObjectMissing` when there is no process left."""
        raise NotSupported("freeze", self.name)

    def logs(self, engine_id: UUID, *, tail: int, follow: bool = False) -> AsyncGenerator[LogLine, None]:
        """The last `tail` lines, then new ones while `follow` (needs `logs`)."""
        raise NotSupported("logs", self.name)

    def events(self) -> AsyncGenerator[BackendEvent, None]:
        """What happens to this deployment's objects, for ever; comes back by itself after a break (needs `events`)."""
        raise NotSupported("events", self.name)
