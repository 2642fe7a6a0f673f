"""Calls on engines: the state × call table, single flight, and joining what is under way.

An operation runs in a task of its own: a caller who goes away never cancels it. A caller that meets an operation of
another process waits for its end in the registry, holding no database connection.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import structlog

from orchestrator.errors import (
    BackendUnavailable,
    BootTimeout,
    EngineAlreadyExists,
    EngineAlreadyRunning,
    EngineBusy,
    EngineNotFound,
    EngineNotRunning,
    QueueTimeout,
    RecordedError,
    WaitTimeout,
)
from orchestrator.events import wait_briefly
from orchestrator.keys import new_engine_key, sha256_hex
from orchestrator.lifecycle.leases import Interrupted, Interruption
from orchestrator.lifecycle.operations import Operations, Parameters
from orchestrator.lifecycle.transitions import BOOTS, CALLS, TRANSITIONS, Call, Operation, Rule, State
from orchestrator.registry.engines import Inserted, NewEngine
from orchestrator.registry.rows import NOBODY

if TYPE_CHECKING:
    from orchestrator.events import Notifications
    from orchestrator.lifecycle.leases import LeaseKeeper
    from orchestrator.lifecycle.means import Means
    from orchestrator.registry.rows import Engine

__all__ = ["Lifecycle", "Rotated"]

log = structlog.get_logger("orchestrator.lifecycle")

LEAST_PATIENCE_S = 5.0  # for an engine taken over at the very end of its time

OPERATION_OF = {
    Call.PROVISION: Operation.PROVISION,
    Call.START: Operation.START,
    Call.STOP: Operation.STOP,
    Call.SLEEP: Operation.SLEEP,
    Call.RECOVER: Operation.RECOVER,
    Call.ROTATE_KEY: Operation.ROTATE_KEY,
    Call.DESTROY: Operation.DESTROY,
}


@dataclass(frozen=True, slots=True)
class Rotated:
    """The end of a rotation: what is in force, and whether the engine had to be created again for it."""

    engine: Engine
    overlap_s: int
    restarted: bool


class _Flight:
    """An operation of this process, and whether it has left the queue for a start slot."""

    __slots__ = ("slot_taken", "task")

    def __init__(self) -> None:
        self.slot_taken = asyncio.Event()
        self.task: asyncio.Task[Engine] | None = None


class Lifecycle:
    def __init__(self, means: Means, keeper: LeaseKeeper, notifications: Notifications) -> None:
        self._means = means
        self._keeper = keeper
        self._notifications = notifications
        self._operations = Operations(means)
        self._flights: dict[UUID, _Flight] = {}
        self._watches: dict[UUID, asyncio.Task[Engine | None]] = {}
        self._draining = False

    # --- calls ----------------------------------------------------------------------------------------

    async def provision(
        self,
        product_id: UUID,
        user_id: str,
        *,
        engine_version: str,
        actor: str,
        idempotency: tuple[str, str] | None = None,
        join: bool = False,
    ) -> Engine:
        """A healthy engine for this user.

        Without `join`, an existing engine is `EngineAlreadyExists`, unless it never was healthy and is tried again
        (same id, port and key; the new `engine_version`). `join` (admit, or an Idempotency-Key that is known): the
        operation under way is awaited instead. Raises `QuotaExceeded`, `PortExhaustion`, `BootTimeout`, ….
        """
        means = self._means
        secret = new_engine_key()
        ciphertext, master_key_id = means.keyring.encrypt(secret)
        transition = TRANSITIONS[Operation.PROVISION]
        until = time.monotonic() + transition.deadline_s(means.settings)
        while True:
            self._refuse_when_draining()
            claimed_at = time.monotonic()
            engine, found = await means.registry.engines.insert(
                NewEngine(
                    engine_id=uuid4(),
                    product_id=product_id,
                    user_id=user_id,
                    engine_version=engine_version,
                    location_id=means.location_id,
                    ports=means.ports,
                    is_port_free=means.backend.is_port_free,
                    key_hash=sha256_hex(secret),
                    key_enc=ciphertext,
                    master_key_id=master_key_id,
                    actor=actor,
                    deadline_s=transition.deadline_s(means.settings),
                    owner=self._keeper.owner,
                    lease_s=self._keeper.lease_s,
                    idempotency=idempotency,
                )
            )
            if found is Inserted.NEW:
                return await self._await_flight(engine, self._launch(engine, claimed_at))
            join = join or found is Inserted.REPLAYED
            state = State(engine.status)
            rule = CALLS[Call.PROVISION][state]
            if rule is Rule.RETRY and not engine.ever_healthy:
                if not engine.is_settled:
                    await self._settled(engine, until)
                    continue
                if idempotency is not None:
                    await means.registry.engines.put_idempotency_key(product_id, idempotency, engine.id)
                claimed = await self._claim(engine, Operation.PROVISION, actor, engine_version=engine_version)
                if claimed is not None:
                    return claimed
            elif join and state is State.PROVISIONING:
                return await self._join(engine)
            elif join and state is State.DESTROYING:
                await self._settled(engine, until)
            elif join:
                return engine
            elif rule is Rule.BUSY:
                raise EngineBusy(user_id, status=engine.status, operation=engine.operation)
            else:
                raise EngineAlreadyExists(user_id, engine.status)
            if time.monotonic() > until:
                raise EngineBusy(user_id, status=engine.status, operation=engine.operation)

    async def start(self, product_id: UUID, user_id: str, *, actor: str) -> Engine:
        """From stopped, sleeping or failed to healthy."""
        return await self._perform(Call.START, product_id, user_id, actor)

    async def stop(self, product_id: UUID, user_id: str, *, actor: str) -> Engine:
        """Exited, data kept; a boot under way is cancelled and restarts end."""
        return await self._perform(Call.STOP, product_id, user_id, actor)

    async def sleep(self, product_id: UUID, user_id: str, *, actor: str) -> Engine:
        """Frozen (or exited, where the backend cannot freeze). Raises `EngineBusy` with a turn in flight."""
        return await self._perform(Call.SLEEP, product_id, user_id, actor)

    async def recover(self, product_id: UUID, user_id: str, *, actor: str) -> Engine:
        """From failed to healthy, whatever the back-off says."""
        return await self._perform(Call.RECOVER, product_id, user_id, actor)

    async def rotate_key(self, product_id: UUID, user_id: str, *, actor: str, overlap_s: int) -> Rotated:
        """A new key is in force; the old one stays valid for the overlap where the engine can do that live."""
        engine = await self._perform(
            Call.ROTATE_KEY, product_id, user_id, actor, parameters=Parameters(overlap_s=overlap_s)
        )
        metadata = await self._means.registry.audit.last_rotation(engine.id)
        return Rotated(engine, int(metadata.get("overlap_seconds", 0)), bool(metadata.get("restarted", False)))

    async def destroy(self, product_id: UUID, user_id: str, *, actor: str) -> UUID:
        """Object, data, port and row are gone; a tombstone stays. The id of what was destroyed.

        The wish is recorded at once and outlives this process. Whatever holds the engine is asked to give up, and
        taken over when it has not after one lease time.
        """
        return (await self._perform(Call.DESTROY, product_id, user_id, actor)).id

    async def keep_alive(self, product_id: UUID, user_id: str, seconds: float) -> Engine:
        """Not put to sleep for `seconds` from now; 0 ends it."""
        while True:
            engine = await self._require(product_id, user_id)
            self._refuse(Call.KEEP_ALIVE, engine)
            allowed = frozenset(s for s in State if CALLS[Call.KEEP_ALIVE][s] is Rule.ACT)
            kept = await self._means.registry.engines.set_keep_alive(engine.id, allowed, seconds)
            if kept is not None:
                return kept

    async def wake(self, product_id: UUID, user_id: str, *, actor: str) -> Engine:
        """From sleeping to healthy; a wake that meets the going to sleep wins."""
        until = time.monotonic() + TRANSITIONS[Operation.WAKE].deadline_s(self._means.settings)
        while True:
            engine = await self._require(product_id, user_id)
            state = State(engine.status)
            if state is State.PROVISIONING:
                return await self._join(engine)
            if state is not State.SLEEPING:
                return engine
            if engine.is_settled:
                claimed = await self._claim(engine, Operation.WAKE, actor)
                if claimed is not None:
                    return claimed
            else:
                if engine.operation == Operation.SLEEP:
                    await self._means.registry.engines.set_wish(engine, "wake", actor)
                await self._settled(engine, until)

    async def recover_failed(self, product_id: UUID, user_id: str, *, actor: str) -> Engine:
        """What `admit` does with a failed engine: as `recover`, joining one under way."""
        engine = await self._require(product_id, user_id)
        if engine.status == State.PROVISIONING:
            return await self._join(engine)
        if engine.status != State.FAILED:
            return engine
        return await self.recover(product_id, user_id, actor=actor)

    async def join(self, product_id: UUID, user_id: str) -> Engine:
        """Wait for the boot under way; raises how it failed."""
        engine = await self._require(product_id, user_id)
        if engine.status == State.PROVISIONING:
            return await self._join(engine)
        if engine.status == State.FAILED and engine.last_error is not None:
            raise RecordedError(engine.last_error)  # it ended just now
        return engine

    async def wait(self, product_id: UUID, user_id: str, wanted: str, timeout_s: float) -> Engine | None:
        """Until the engine is in the state `wanted` with no operation under way (`destroyed`: None is returned).

        Raises `WaitTimeout`; `EngineNotFound` when there is no such engine to begin with.
        """
        until = time.monotonic() + timeout_s
        engine = await self._require(product_id, user_id)
        engine_id = engine.id
        with self._notifications.subscription(engine_id) as changed:
            while True:
                now = await self._means.registry.engines.by_id(engine_id)
                if now is None:
                    if wanted == "destroyed":
                        return None
                    raise EngineNotFound(user_id)
                if now.status == wanted and (now.operation is None or wanted in ("provisioning", "destroying")):
                    return now
                left_s = until - time.monotonic()
                if left_s <= 0:
                    raise WaitTimeout(wanted, now.status, timeout_s)
                await wait_briefly(changed, min(1.0, left_s))

    # --- what loops ask for -----------------------------------------------------------------------------

    async def take_over(self, limit: int) -> int:
        """Go on with operations at this location whose owner is gone; how many were found."""
        claimed_at = time.monotonic()
        found = await self._means.registry.engines.take_over(
            self._means.location_id,
            owner=self._keeper.owner,
            lease_s=self._keeper.lease_s,
            limit=limit,
            operations=list(Operation),
        )
        for engine, left_s in found:
            log.info("operation_taken_over", engine_id=str(engine.id), operation=engine.operation)
            self._launch(engine, claimed_at, patience_s=max(LEAST_PATIENCE_S, left_s))
        return len(found)

    async def carry_out_wishes(self, limit: int) -> None:
        """Stops and destroys that were asked for by a process that is gone."""
        due = await self._means.registry.engines.due_wishes(self._means.location_id, self._keeper.lease_s, limit)
        for row in due:
            engine = await self._means.registry.engines.by_id(row["id"])
            if engine is not None:
                claimed_at = time.monotonic()
                claimed = await self._try_claim(
                    engine,
                    Operation(row["wish"]),
                    row["wish_actor"],
                    override=True,
                    generation=row["lease_generation"],
                )
                if claimed is not None:
                    log.info("wish_carried_out", engine_id=str(claimed.id), operation=claimed.operation)
                    self._launch(claimed, claimed_at)

    async def restart(self, engine_id: UUID, reason: str, generation: int) -> None:
        """Bring an engine up again that should run and does not. Does not wait for the end.

        `generation` is that of the row which the reason was found for: whoever claimed the engine since knows better.
        """
        engine = await self._means.registry.engines.by_id(engine_id)
        if engine is None or not engine.is_settled:
            return
        claimed_at = time.monotonic()
        claimed = await self._try_claim(
            engine,
            Operation.RESTART,
            "system",
            parameters=Parameters(reason=reason),
            generation=generation,
            action="auto_restart_start",
        )
        if claimed is not None:
            self._launch(claimed, claimed_at)

    async def unload_all(self) -> None:
        """Stop the processes of all engines here, leaving them `sleeping`: the next admit wakes them."""
        flights = []
        for row in await self._means.registry.engines.here(self._means.location_id):
            if row["status"] in (State.RUNNING, State.SLEEPING):
                engine = await self._means.registry.engines.by_id(row["id"])
                claimed_at = time.monotonic()
                claimed = engine and await self._try_claim(engine, Operation.UNLOAD, "system")
                if claimed:
                    flights.append(self._launch(claimed, claimed_at))
        await asyncio.gather(*(flight.task for flight in flights if flight.task is not None), return_exceptions=True)

    async def drain(self, grace_s: float) -> None:
        """The end of this process: what is under way may finish; what has not is handed to others."""
        self._draining = True
        tasks = {flight.task for flight in self._flights.values() if flight.task is not None}
        if tasks:
            await asyncio.wait(tasks, timeout=grace_s)
        self._keeper.interrupt_all(Interruption.HANDOVER)
        tasks = {flight.task for flight in self._flights.values() if flight.task is not None}
        if tasks:
            await asyncio.wait(tasks, timeout=5)
        for watch in list(self._watches.values()):
            watch.cancel()

    # --- the table, executed ----------------------------------------------------------------------------

    async def _require(self, product_id: UUID, user_id: str) -> Engine:
        engine = await self._means.registry.engines.by_user(product_id, user_id)
        if engine is None:
            raise EngineNotFound(user_id)
        return engine

    def _refuse(self, call: Call, engine: Engine) -> Rule:
        """The rule of this call in the engine's state; raises those that are errors."""
        rule = CALLS[call][State(engine.status)]
        match rule:
            case Rule.ALREADY_RUNNING:
                raise EngineAlreadyRunning(engine.user_id)
            case Rule.NOT_RUNNING:
                # A stop that is still under way is joined, not refused.
                if not (call is Call.STOP and engine.operation == Operation.STOP):
                    raise EngineNotRunning(engine.user_id, engine.status)
                return Rule.JOIN
            case Rule.BUSY:
                raise EngineBusy(engine.user_id, status=engine.status, operation=engine.operation)
            case Rule.EXISTS:
                raise EngineAlreadyExists(engine.user_id, engine.status)
        return rule

    async def _perform(
        self, call: Call, product_id: UUID, user_id: str, actor: str, *, parameters: Parameters | None = None
    ) -> Engine:
        operation = OPERATION_OF[call]
        until = time.monotonic() + TRANSITIONS[operation].deadline_s(self._means.settings)
        # A call is about the engine that it found first, not about one that comes after it.
        first = engine = await self._require(product_id, user_id)
        wakes = False
        while True:
            rule = self._refuse(call, engine) if not (wakes and engine.status == State.RUNNING) else Rule.DONE
            if rule is Rule.DONE and engine.operation is None:
                return engine
            if rule is Rule.JOIN or (engine.operation == operation and rule is not Rule.WAIT):
                joined = await self._join_same(call, engine, until)
                if joined is not None:
                    return joined
            elif engine.operation is None and (engine.wish is None or rule is Rule.CANCEL):
                claimed = await self._claim(engine, operation, actor, parameters=parameters)
                if claimed is not None:
                    return claimed
            elif rule is Rule.CANCEL:
                claimed = await self._cancel(engine, operation, actor)
                if claimed is not None:
                    return claimed
            else:
                if call is Call.START and engine.operation == Operation.SLEEP:
                    wakes = True
                    await self._means.registry.engines.set_wish(engine, "wake", actor)
                await self._settled(engine, until)
            if time.monotonic() > until:
                raise EngineBusy(user_id, status=engine.status, operation=engine.operation)
            now = await self._means.registry.engines.by_id(first.id)
            if now is None:
                if call is Call.DESTROY:
                    return engine  # gone, as was asked
                raise EngineNotFound(user_id)
            engine = now

    async def _cancel(self, engine: Engine, operation: Operation, actor: str) -> Engine | None:
        """Ask for an end of what is under way, then act; None: look again.

        The holder has one lease time to let go; then it is taken over.
        """
        asked = await self._means.registry.engines.set_wish(engine, operation.value, actor)
        now = engine if asked else await self._means.registry.engines.by_id(engine.id)
        if now is None or now.operation_id != engine.operation_id:
            return None
        await self._settled(engine, time.monotonic() + self._keeper.lease_s + 0.5, released=True)
        return await self._claim(engine, operation, actor, override=True)

    async def _join_same(self, call: Call, engine: Engine, until: float) -> Engine | None:
        """The end of the same operation under way; None: look again."""
        if call in (Call.DESTROY, Call.ROTATE_KEY):
            await self._settled(engine, until)  # each rotation is one of its own
            return None
        return await self._join(engine)

    async def _claim(
        self,
        engine: Engine,
        operation: Operation,
        actor: str,
        *,
        parameters: Parameters | None = None,
        override: bool = False,
        engine_version: str | None = None,
    ) -> Engine | None:
        """Claim and carry out; None when somebody was faster."""
        claimed_at = time.monotonic()
        claimed = await self._try_claim(
            engine, operation, actor, parameters=parameters, override=override, engine_version=engine_version
        )
        if claimed is None:
            return None
        if claimed.lease_owner == NOBODY:
            return await self._follow(claimed)
        return await self._await_flight(claimed, self._launch(claimed, claimed_at))

    async def _try_claim(
        self,
        engine: Engine,
        operation: Operation,
        actor: str,
        *,
        parameters: Parameters | None = None,
        override: bool = False,
        engine_version: str | None = None,
        generation: int | None = None,
        action: str | None = None,
    ) -> Engine | None:
        self._refuse_when_draining()
        row = TRANSITIONS[operation]
        here = engine.location_id == self._means.location_id
        return await self._means.registry.engines.claim(
            engine.id,
            operation=operation,
            from_statuses=row.sources if row.during is not None else row.sources & {State(engine.status)},
            status=row.during if row.during is not None else engine.status,
            owner=self._keeper.owner if here else NOBODY,  # a process acts only on engines of its own location
            lease_s=self._keeper.lease_s,
            actor=actor,
            deadline_s=row.deadline_s(self._means.settings),
            parameters=(parameters or Parameters()).kept(),
            override=override,
            engine_version=engine_version,
            generation=generation,
            action=action,
        )

    def _refuse_when_draining(self) -> None:
        if self._draining:
            raise BackendUnavailable("This orchestrator is ending; another one, or the next, serves the call.")

    # --- flights ----------------------------------------------------------------------------------------

    def _launch(self, engine: Engine, claimed_at: float, *, patience_s: float | None = None) -> _Flight:
        """Carry out the operation that `engine` was claimed for, in a task of its own."""
        assert engine.operation_id is not None
        operation_id = engine.operation_id
        flight = _Flight()
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

    async def _carry_out(self, engine: Engine, claimed_at: float, parameters: Parameters, flight: _Flight) -> Engine:
        engines = self._means.registry.engines
        try:
            return await self._keeper.run(
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

    async def _await_flight(self, engine: Engine, flight: _Flight) -> Engine:
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
            return await self._follow(engine)

    async def _join(self, engine: Engine) -> Engine:
        """The end of the operation under way, wherever it runs; raises how it failed."""
        if engine.operation_id is not None and (flight := self._flights.get(engine.operation_id)) is not None:
            return await self._await_flight(engine, flight)
        return await self._follow(engine)

    async def _follow(self, engine: Engine) -> Engine:
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

    async def _settled(self, engine: Engine, until: float, *, released: bool = False) -> None:
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
