"""Calls on engines: the state × call table, single flight, and joining what is under way.

An operation runs in a task of its own: a caller who goes away never cancels it. A caller that meets an operation of
another process waits for its end in the registry, holding no database connection.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import structlog

from orchestrator.errors import (
    EngineAlreadyExists,
    EngineAlreadyRunning,
    EngineBusy,
    EngineNotFound,
    EngineNotRunning,
    RecordedError,
    WaitTimeout,
)
from orchestrator.events import wait_briefly
from orchestrator.keys import new_engine_key, sha256_hex
from orchestrator.lifecycle.logs import engine_logs
from orchestrator.lifecycle.operations import Parameters
from orchestrator.lifecycle.transitions import CALLS, TRANSITIONS, Call, Operation, Rule, State
from orchestrator.registry.engines import Inserted, NewEngine

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from orchestrator.backends.base import LogLine
    from orchestrator.events import Notifications
    from orchestrator.lifecycle.flights import Flights
    from orchestrator.lifecycle.means import Means
    from orchestrator.registry.rows import Engine

__all__ = ["Lifecycle", "Rotated"]

log = structlog.get_logger("orchestrator.lifecycle")

WAKEABLE = (Operation.SLEEP, Operation.REPAIR)  # a wake that meets these on a sleeping engine wins

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


class Lifecycle:
    def __init__(self, means: Means, flights: Flights, notifications: Notifications) -> None:
        self._means = means
        self._flights = flights
        self._notifications = notifications

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
            self._flights.refuse_when_draining()
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
                    owner=self._flights.keeper.owner,
                    lease_s=self._flights.keeper.lease_s,
                    idempotency=idempotency,
                )
            )
            if found is Inserted.NEW:
                return await self._flights.await_flight(engine, self._flights.launch(engine, claimed_at))
            join = join or found is Inserted.REPLAYED
            state = State(engine.status)
            rule = CALLS[Call.PROVISION][state]
            if rule is Rule.RETRY and not engine.ever_healthy:
                if not engine.is_settled:
                    await self._flights.settled(engine, until)
                    continue
                if idempotency is not None:
                    await means.registry.engines.put_idempotency_key(product_id, idempotency, engine.id)
                claimed = await self._flights.claim(engine, Operation.PROVISION, actor, engine_version=engine_version)
                if claimed is not None:
                    return claimed
            elif join and state is State.PROVISIONING:
                return await self._flights.join(engine)
            elif join and state is State.DESTROYING:
                await self._flights.settled(engine, until)
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
                return await self._flights.join(engine)
            if state is not State.SLEEPING:
                return engine
            if engine.is_settled:
                claimed = await self._flights.claim(engine, Operation.WAKE, actor)
                if claimed is not None:
                    return claimed
            else:
                if engine.operation in WAKEABLE:
                    await self._means.registry.engines.set_wish(engine, "wake", actor)
                await self._flights.settled(engine, until)

    async def recover_failed(self, product_id: UUID, user_id: str, *, actor: str) -> Engine:
        """What `admit` does with a failed engine: as `recover`, joining one under way."""
        engine = await self._require(product_id, user_id)
        if engine.status == State.PROVISIONING:
            return await self._flights.join(engine)
        if engine.status != State.FAILED:
            return engine
        return await self.recover(product_id, user_id, actor=actor)

    async def join(self, product_id: UUID, user_id: str) -> Engine:
        """Wait for the boot under way; raises how it failed."""
        engine = await self._require(product_id, user_id)
        if engine.status == State.PROVISIONING:
            return await self._flights.join(engine)
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

    async def logs(self, product_id: UUID, user_id: str, *, tail: int, follow: bool) -> AsyncGenerator[LogLine, None]:
        """See `engine_logs`."""
        return await engine_logs(self._means, product_id, user_id, tail=tail, follow=follow)

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
                claimed = await self._flights.claim(engine, operation, actor, parameters=parameters)
                if claimed is not None:
                    return claimed
            elif rule is Rule.CANCEL:
                claimed = await self._cancel(engine, operation, actor)
                if claimed is not None:
                    return claimed
            else:
                if call is Call.START and engine.operation in WAKEABLE:
                    wakes = True
                    await self._means.registry.engines.set_wish(engine, "wake", actor)
                await self._flights.settled(engine, until)
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
        await self._flights.settled(engine, time.monotonic() + self._flights.keeper.lease_s + 0.5, released=True)
        return await self._flights.claim(engine, operation, actor, override=True)

    async def _join_same(self, call: Call, engine: Engine, until: float) -> Engine | None:
        """The end of the same operation under way; None: look again."""
        if call in (Call.DESTROY, Call.ROTATE_KEY):
            await self._flights.settled(engine, until)  # each rotation is one of its own
            return None
        return await self._flights.join(engine)
