"""Operations under way: each in a task of its own, followed by everybody who waits for it.

A caller who goes away never cancels an operation. Who meets one of another process waits for its end in the
registry, holding no database connection.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from orchestrator import metrics, tracing
from orchestrator.errors import (
    BackendUnavailable,
    BootTimeout,
    EngineBusy,
    EngineNotFound,
    EngineNotRunning,
    QueueTimeout,
    RecordedError,
)
from orchestrator.events import wait_briefly
from orchestrator.lifecycle.leases import Interrupted, Interruption
from orchestrator.lifecycle.operations import Operations, Parameters
from orchestrator.lifecycle.transitions import BOOTS, TRANSITIONS, Operation, State
from orchestrator.registry.rows import NOBODY

if TYPE_CHECKING:
    from uuid import UUID

    from orchestrator.events import Notifications
    from orchestrator.lifecycle.leases import LeaseKeeper
    from orchestrator.lifecycle.means import Means
    from orchestrator.registry.rows import Engine, Sight

__all__ = ["Flight", "Flights"]

log = structlog.get_logger("orchestrator.lifecycle")


class Flight:
    """An operation of this process, and whether it has left the queue for a start slot."""

    __slots__ = ("operation", "slot_taken", "task")

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        self.slot_taken = asyncio.Event()
        self.task: asyncio.Task[Engine] | None = None


class Flights:
    """Claims engines for operations, carries these out, and lets everybody who asks wait for their end."""

    def __init__(self, means: Means, keeper: LeaseKeeper, notifications: Notifications) -> None:
        self._means = means
        self._notifications = notifications
        self._operations = Operations(means)
        self._flights: dict[UUID, Flight] = {}
        self._watches: dict[UUID, asyncio.Task[Engine | None]] = {}
        self._draining = False
        self.keeper = keeper

    def count(self, operation: Operation) -> int:
        """How many operations of this kind this process is at."""
        return sum(flight.operation is operation for flight in self._flights.values())

    async def drain(self, grace_s: float) -> None:
        """The end of this process: what is under way may finish; what has not is handed to others."""
        self._draining = True
        tasks = {flight.task for flight in self._flights.values() if flight.task is not None}
        if tasks:
            await asyncio.wait(tasks, timeout=grace_s)
        self.keeper.interrupt_all(Interruption.HANDOVER)
        tasks = {flight.task for flight in self._flights.values() if flight.task is not None}
        if tasks:
            await asyncio.wait(tasks, timeout=5)
        for watch in list(self._watches.values()):
            watch.cancel()

    async def claim(
        self,
        engine: Engine | Sight,
        operation: Operation,
        actor: str,
        *,
        parameters: Parameters | None = None,
        override: bool = False,
        engine_version: str | None = None,
    ) -> Engine | None:
        """Claim and carry out; None when somebody was faster."""
        claimed_at = time.monotonic()
        claimed = await self.try_claim(
            engine, operation, actor, parameters=parameters, override=override, engine_version=engine_version
        )
        if claimed is None:
            return None
        if claimed.lease_owner == NOBODY:
            return await self.follow(claimed)
        return await self.await_flight(claimed, self.launch(claimed, claimed_at))

    async def try_claim(
        self,
        engine: Engine | Sight,
        operation: Operation,
        actor: str,
        *,
        parameters: Parameters | None = None,
        override: bool = False,
        engine_version: str | None = None,
        generation: int | None = None,
        action: str | None = None,
    ) -> Engine | None:
        self.refuse_when_draining()
        row = TRANSITIONS[operation]
        here = engine.location_id == self._means.location_id
        return await self._means.registry.engines.claim(
            engine.id,
            operation=operation,
            from_statuses=row.sources if row.during is not None else row.sources & {State(engine.status)},
            status=row.during if row.during is not None else engine.status,
            owner=self.keeper.owner if here else NOBODY,  # a process acts only on engines of its own location
            lease_s=self.keeper.lease_s,
            actor=actor,
            deadline_s=row.deadline_s(self._means.settings),
            parameters=(parameters or Parameters()).kept(),
            override=override,
            engine_version=engine_version,
            generation=generation,
            action=action,
        )

    def refuse_when_draining(self) -> None:
        if self._draining:
            raise BackendUnavailable("This orchestrator is ending; another one, or the next, serves the call.")

    # --- flights ----------------------------------------------------------------------------------------

    def launch(self, engine: Engine, claimed_at: float, *, patience_s: float | None = None) -> Flight:
        """Carry out the operation that `engine` was claimed for, in a task of its own."""
        assert engine.operation_id is not None
        operation_id = engine.operation_id
        flight = Flight(Operation(engine.operation or ""))
        flight.task = asyncio.create_task(
            self._carry_out(engine, claimed_at, Parameters.of(engine, patience_s=patience_s), flight),
            name=f"{engine.operation}",
        )
        self._flights[operation_id] = flight

        def landed(task: asyncio.Task[Engine]) -> None:
            if self._flights.get(operation_id) is flight:  # else: lost, and taken over by ourselves
                del self._flights[operation_id]
            self._notifications.changed(engine.id)
            if not task.cancelled():
                task.exception()  # retrieved: there may be nobody left to see it

        flight.task.add_done_callback(landed)
        return flight

    async def _carry_out(self, engine: Engine, claimed_at: float, parameters: Parameters, flight: Flight) -> Engine:
        outcome = "failed"
        with tracing.span(f"operation.{engine.operation}", engine_id=str(engine.id)), metrics.waking() as calls:
            try:
                ended = await self._carried_out(engine, claimed_at, parameters, flight)
                outcome = "succeeded"
                return ended
            except Interrupted:
                outcome = "interrupted"
                raise
            finally:
                seconds = time.monotonic() - claimed_at
                metrics.operation_ended(engine.product_id, engine.operation or "", outcome, seconds, calls)

    async def _carried_out(self, engine: Engine, claimed_at: float, parameters: Parameters, flight: Flight) -> Engine:
        engines = self._means.registry.engines
        try:
            return await self.keeper.run(
                engine,
                claimed_at,
                lambda lease: self._operations.carry_out(lease, parameters, flight.slot_taken),
            )
        except Interrupted as interrupted:
            if interrupted.why is Interruption.WISH:
                await self._means.persist(lambda: engines.release(engine))
            elif interrupted.why is Interruption.HANDOVER:
                await engines.requeue(engine, None, 0)
            log.info("operation_left", engine_id=str(engine.id), operation=engine.operation, why=interrupted.why.value)
            raise

    async def await_flight(self, engine: Engine, flight: Flight) -> Engine:
        assert flight.task is not None
        queue_timeout_s = self._means.settings.queue_timeout_s
        if not flight.slot_taken.is_set():
            slot = asyncio.create_task(flight.slot_taken.wait())
            try:
                done, _ = await asyncio.wait(
                    {flight.task, slot}, timeout=queue_timeout_s, return_when=asyncio.FIRST_COMPLETED
                )
            finally:
                slot.cancel()
            if not done:
                raise QueueTimeout(queue_timeout_s)
        try:
            return await asyncio.shield(flight.task)
        except Interrupted:
            return await self.follow(engine)

    async def join(self, engine: Engine) -> Engine:
        """The end of the operation under way, wherever it runs; raises how it failed."""
        if engine.operation_id is not None and (flight := self._flights.get(engine.operation_id)) is not None:
            return await self.await_flight(engine, flight)
        return await self.follow(engine)

    async def follow(self, engine: Engine) -> Engine:
        """The end of an operation that runs elsewhere, as the registry tells it."""
        operation_id = engine.operation_id
        assert operation_id is not None
        watch = self._watches.get(operation_id)
        if watch is None:
            until = (
                time.monotonic()
                + self._means.settings.lease_s * 2
                + sum(
                    (
                        self._means.settings.queue_timeout_s,
                        self._means.settings.pull_timeout_s,
                        self._means.settings.boot_timeout_s,
                    )
                )
            )
            watch = asyncio.create_task(self._watch(engine, until))
            self._watches[operation_id] = watch
            watch.add_done_callback(lambda _: self._watches.pop(operation_id, None))
        now = await asyncio.shield(watch)
        if now is None:
            if engine.operation == Operation.DESTROY:
                return engine
            raise EngineNotFound(engine.user_id)
        if now.operation_id == operation_id:
            if now.last_error is not None:
                raise RecordedError(now.last_error)
            return now
        # Something else came after it.
        if now.status == State.DESTROYING:
            raise EngineBusy(engine.user_id, status=now.status, operation=now.operation)
        if engine.operation in BOOTS and now.status != State.RUNNING:
            if now.operation is not None and now.status != State.STOPPED:
                raise EngineBusy(engine.user_id, status=now.status, operation=now.operation)
            raise EngineNotRunning(engine.user_id, now.status)
        ended_as = TRANSITIONS[Operation(engine.operation)].success if engine.operation in set(Operation) else None
        return now if ended_as is None else replace(now, status=ended_as)

    async def _watch(self, engine: Engine, until: float) -> Engine | None:
        """The row when this operation is over, or will be tried again later; None when the row is gone."""
        with self._notifications.subscription(engine.id) as changed:
            while True:
                now = await self._look(engine)
                if now is None or now.operation_id != engine.operation_id or now.is_settled or now.gave_up_for_now:
                    return now
                if time.monotonic() > until:
                    raise BootTimeout(engine.user_id, self._means.settings.boot_timeout_s)
                await wait_briefly(changed)

    async def _look(self, engine: Engine) -> Engine | None:
        return await self._means.registry.engines.by_id(engine.id)

    async def settled(self, engine: Engine, until: float, *, released: bool = False) -> None:
        """Until the operation that `engine` shows is over, and a wish for its end is carried out.

        Raises `EngineBusy` at `until`, and how it failed when it will be tried again later. `released`: returns as
        soon as its holder has let go, and at `until`.
        """
        with self._notifications.subscription(engine.id) as changed:
            while True:
                now = await self._look(engine)
                if now is None or now.operation_id != engine.operation_id or now.is_settled:
                    return
                left_s = until - time.monotonic()
                if released and (now.operation is None or left_s <= 0):
                    return
                if now.gave_up_for_now and now.last_error is not None and not released:
                    raise RecordedError(now.last_error)
                if left_s <= 0:
                    raise EngineBusy(engine.user_id, status=now.status, operation=now.operation)
                await wait_briefly(changed, min(1.0, left_s))
