"""A lease on an engine, held while an operation works on it.

Postgres fences rows: a stale owner's write is refused by `lease_generation`. It cannot fence a backend, so an owner
also looks at what is left of its lease, on its own monotonic clock, before each backend call, and is interrupted
when the lease runs out or a stronger wish arrives.
"""

from __future__ import annotations

import asyncio
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from orchestrator.errors import DatabaseUnavailable
from orchestrator.events import wait_briefly

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from uuid import UUID

    from orchestrator.events import Notifications
    from orchestrator.registry.engines import EngineRegistry
    from orchestrator.registry.rows import Engine

__all__ = ["Interrupted", "Interruption", "Lease", "LeaseKeeper"]

T = TypeVar("T")

log = structlog.get_logger("orchestrator.lifecycle")


class Interruption(StrEnum):
    LOST = "lost"  # the lease is not ours any more: stop acting, write nothing
    WISH = "wish"  # stop or destroy was asked for: give up and release
    HANDOVER = "handover"  # this process ends: release the operation to others


class Interrupted(Exception):
    """The operation must stop acting; never reaches a caller of the lifecycle."""

    def __init__(self, why: Interruption) -> None:
        super().__init__(why.value)
        self.why = why


class Lease:
    """What an operation holds. `engine` is the row as last written under this lease."""

    def __init__(self, engine: Engine, until: float) -> None:
        self.engine = engine
        self.wake_wished = asyncio.Event()
        self._until = until  # monotonic
        self.task: asyncio.Task[Any] | None = None
        self._why: Interruption | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def key(self) -> tuple[UUID, int]:
        return self.engine.id, self.engine.lease_generation

    @property
    def why(self) -> Interruption | None:
        return self._why

    def check(self) -> None:
        """Before each backend call. Raises `Interrupted` when nothing is left of the lease."""
        if self._why is None and time.monotonic() >= self._until:
            self._why = Interruption.LOST
        if self._why is not None:
            raise Interrupted(self._why)

    def update(self, engine: Engine | None, *, refused_for: Interruption = Interruption.LOST) -> Engine:
        """Keep the row that a fenced write returned. Raises `Interrupted` when the write was refused."""
        if engine is None:
            self._why = self._why or refused_for
            raise Interrupted(self._why)
        self.engine = engine
        return engine

    def interrupt(self, why: Interruption) -> None:
        if self._why is None:
            self._why = why
            if self.task is not None:
                self.task.cancel()

    def extend(self, until: float) -> None:
        """The lease now lasts until `until` (monotonic); the operation is interrupted when that passes."""
        self._until = until
        self.disarm()
        delay_s = max(0.0, until - time.monotonic())
        self._timer = asyncio.get_running_loop().call_later(delay_s, self.interrupt, Interruption.LOST)

    def disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class LeaseKeeper:
    """Renews every lease of this process in one statement, and hands wishes to their holders."""

    def __init__(self, engines: EngineRegistry, notifications: Notifications, owner: str, lease_s: float) -> None:
        self._engines = engines
        self._notifications = notifications
        self._held: dict[tuple[UUID, int], Lease] = {}
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.owner = owner
        self.lease_s = lease_s

    async def open(self) -> None:
        self._task = asyncio.create_task(self._renew_all(), name="lease-keeper")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None

    async def run(self, engine: Engine, claimed_at: float, operate: Callable[[Lease], Awaitable[T]]) -> T:
        """Carry out `operate` under the lease that a claim, sent at `claimed_at` (monotonic), returned.

        `operate` runs in a task of its own, which is cancelled when the lease ends or is interrupted; then
        `Interrupted` is raised.
        """
        lease = Lease(engine, claimed_at + self.lease_s)
        key = lease.key
        self._held[key] = lease
        lease.task = asyncio.ensure_future(operate(lease))
        lease.extend(claimed_at + self.lease_s)
        try:
            with self._notifications.wishes(engine.id, self._woken):
                await asyncio.wait({lease.task})
        finally:
            lease.task.cancel()  # without effect on a task that is done
            lease.disarm()
            del self._held[key]
        if lease.task.cancelled():
            raise Interrupted(lease.why or Interruption.HANDOVER)
        result: T = lease.task.result()
        return result

    def interrupt_all(self, why: Interruption) -> None:
        for lease in list(self._held.values()):
            lease.interrupt(why)

    async def _renew_all(self) -> None:
        while True:
            await wait_briefly(self._woken, self.lease_s / 3)
            if not self._held:
                continue
            asked = time.monotonic()
            held = dict(self._held)
            try:
                wishes = await self._engines.renew(sorted(held), self.lease_s)
            except DatabaseUnavailable as error:
                log.warning("leases_not_renewed", leases=len(held), error=error.message)
                await self._again_soon()
                continue
            except Exception:  # whatever it was (a deadlock, a full disk): without this task every lease would be lost
                log.exception("leases_not_renewed", leases=len(held))
                await self._again_soon()
                continue
            for key, lease in held.items():
                if key not in self._held:
                    continue  # ended meanwhile
                if key not in wishes:
                    lease.interrupt(Interruption.LOST)
                    continue
                lease.extend(asked + self.lease_s)
                if wishes[key] == "wake":
                    lease.wake_wished.set()
                elif wishes[key] is not None:
                    lease.interrupt(Interruption.WISH)

    async def _again_soon(self) -> None:
        await asyncio.sleep(0.2)
        self._woken.set()
