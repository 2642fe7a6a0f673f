"""The operations, each carried out under a lease and ended with one fenced write.

Each may be started again by another process at any point: it looks at what is there and goes on from it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import structlog

from orchestrator.backends.base import ObjectState
from orchestrator.engine_http import KeyPush
from orchestrator.errors import (
    BackendError,
    BackendUnavailable,
    BootTimeout,
    DatabaseUnavailable,
    EngineBusy,
    EngineFailed,
    InternalError,
    OrchestratorError,
    PortExhaustion,
    error_record,
)
from orchestrator.events import happens_within
from orchestrator.keys import new_engine_key, sha256_hex
from orchestrator.lifecycle.boot import boot, push_pending_keys
from orchestrator.lifecycle.leases import Interrupted, Interruption
from orchestrator.lifecycle.transitions import STOP_GRACE_S, TRANSITIONS, Operation, State
from orchestrator.registry.engines import Finish, Then
from orchestrator.registry.rows import EngineKey

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from orchestrator.backends.base import EngineBackend
    from orchestrator.lifecycle.leases import Lease
    from orchestrator.lifecycle.means import Means
    from orchestrator.registry.rows import Engine

__all__ = ["Operations", "Parameters"]

log = structlog.get_logger("orchestrator.lifecycle")

FAILED_STOP_GRACE_S = 5
THAWED_IDLE_S = 0.5  # an engine that was thawed behind our back rests at least so long before it is frozen again
LAST_LINES = 20
LAST_LINE_CHARS = 500
LAST_LINES_S = 3.0
WAY_OUT_S = FAILED_STOP_GRACE_S + 15.0  # a backend that hangs must not keep a failure from being recorded
RETRY_S = 5.0
ACTIVITY_FLUSH_S = 1.0


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a call asks of its operation; kept in the engine's row, so that a take-over goes on with the same.

    `idle_s`: go to sleep only if the engine is idle for that long after one activity flush. `reason`, `message`: what
    a loop has found. `patience_s` is not kept: what is left of the deadline at a take-over.
    """

    overlap_s: float = 0
    idle_s: float | None = None
    reason: str | None = None
    message: str | None = None
    patience_s: float | None = None

    def kept(self) -> dict[str, float | str]:
        wanted = {
            "overlap_s": self.overlap_s,
            "idle_s": self.idle_s,
            "reason": self.reason,
            "message": self.message,
        }
        return {name: value for name, value in wanted.items() if value}

    @classmethod
    def of(cls, engine: Engine, *, patience_s: float | None = None) -> Parameters:
        kept = engine.operation_parameters
        return cls(kept.get("overlap_s", 0), kept.get("idle_s"), kept.get("reason"), kept.get("message"), patience_s)


class Operations:
    """`carry_out` runs the operation that the lease's row names, and returns the row as it ended."""

    def __init__(self, means: Means) -> None:
        self._means = means

    async def carry_out(self, lease: Lease, parameters: Parameters, slot_taken: asyncio.Event) -> Engine:
        """Raises the typed reason when the operation failed; its end is recorded before.

        `Interrupted` comes out of the lease when another takes over; then nothing is recorded here.
        """
        operation = Operation(lease.engine.operation or "")
        row = TRANSITIONS[operation]
        if operation not in (
            Operation.PROVISION,
            Operation.START,
            Operation.WAKE,
            Operation.RECOVER,
            Operation.RESTART,
            Operation.ROTATE_KEY,
        ):
            slot_taken.set()
        limit_s = row.deadline_s(self._means.settings)
        timeline = self._means.timelines.begin(lease.engine)
        failed = True
        try:
            ended = await self._carry_out(operation, lease, parameters, slot_taken, limit_s)
            failed = False
            return ended
        finally:
            timeline.end(failed=failed)

    async def _carry_out(
        self,
        operation: Operation,
        lease: Lease,
        parameters: Parameters,
        slot_taken: asyncio.Event,
        limit_s: float,
    ) -> Engine:
        try:
            async with asyncio.timeout(limit_s):
                match operation:
                    case Operation.SLEEP:
                        return await self._sleep(lease, parameters)
                    case Operation.UNLOAD:
                        return await self._stop(lease, metadata={"unloaded": True}, unloaded=True)
                    case Operation.STOP:
                        return await self._stop(lease)
                    case Operation.FAIL:
                        return await self._fail_running(lease, parameters)
                    case Operation.REPAIR:
                        return await self._repair(lease, parameters, slot_taken)
                    case Operation.ROTATE_KEY:
                        return await self._rotate_key(lease, parameters, slot_taken)
                    case Operation.DESTROY:
                        return await self._destroy(lease)
                    case _:
                        return await self._boot(lease, parameters, slot_taken)
        except TimeoutError:
            late = BackendError(f"{operation} took longer than {limit_s:g} s.")
            await self._fail(lease, late)
            raise late from None
        except DatabaseUnavailable:
            raise  # nothing can be recorded; whoever finds the lease expired goes on
        except OrchestratorError as error:
            await self._fail(lease, error)
            raise
        except Interrupted:
            raise
        except Exception as error:  # a defect of ours, or of a backend: it must not leave an engine stuck
            log.exception("operation_crashed", engine_id=str(lease.engine.id), operation=operation.value)
            defect = InternalError(f"{operation} met a defect ({type(error).__name__}).")
            await self._fail(lease, defect)
            raise defect from error

    def _enter(self, lease: Lease, phase: str) -> None:
        self._means.timelines.of(lease.engine).enter(phase)

    async def _finish(self, lease: Lease, end: Finish) -> Engine:
        ended = await self._means.finish(lease.engine, end)
        return lease.update(ended, refused_for=Interruption.LOST if ended else await self._why_refused(lease))

    async def _why_refused(self, lease: Lease) -> Interruption:
        """A wish may arrive before its word does; then the engine is still ours to release."""
        engine = lease.engine
        now = await self._means.registry.engines.by_id(engine.id)
        ours = now is not None and now.operation is not None and now.lease_generation == engine.lease_generation
        return Interruption.WISH if ours else Interruption.LOST

    async def _fail(self, lease: Lease, error: OrchestratorError) -> None:
        """Record how the operation failed, and leave the engine in the state that the table names."""
        row = TRANSITIONS[Operation(lease.engine.operation or "")]
        engine = lease.engine
        unavailable = isinstance(error, BackendUnavailable)
        rotating = row.operation is Operation.ROTATE_KEY and unavailable and await self._has_next_key(engine)
        if row.operation is Operation.DESTROY or rotating:
            # Never undone, and a key that the engine may have heard of is never forgotten: tried again until done.
            delay_s = min(RETRY_S, self._means.settings.lease_s)
            await self._means.registry.engines.requeue(engine, error_record(error), delay_s)
            return
        metadata: dict[str, object] = {"operation": engine.operation, "code": error.code, "message": error.message}
        if isinstance(error, PortExhaustion) and row.operation is Operation.PROVISION and not engine.ever_healthy:
            # As when no port is found to begin with: no row is left, nor what `create` may have made.
            await self._attempt(lease, "destroy", lambda backend: backend.destroy(engine.id))
            remove = self._means.registry.engines.remove
            if not await self._means.persist(lambda: remove(engine, "provision_failed", "failed", metadata)):
                lease.update(None)
            return
        former = State(engine.former_status or State.FAILED)
        # A backend that is away says nothing about the engine.
        back = row.failure is None or (unavailable and engine.ever_healthy)
        status = former if back else State.FAILED
        action = None if back else row.failure_action
        refund = row.operation is Operation.RESTART and back
        then, restart_in_s = Then.KEEP, None
        if not back or (refund and status is State.FAILED):
            then, restart_in_s = self._means.after_failure(engine, refund=refund)
        lines = [] if back else await self._last_lines(lease)
        if lines:
            metadata |= {"log": lines}
        if status in (State.FAILED, State.STOPPED):
            # Also after a call without an answer, which may have had its effect.
            await self._attempt(lease, "stop", lambda backend: backend.stop(engine.id, FAILED_STOP_GRACE_S))
        if row.operation is Operation.SLEEP and self._means.backend.capabilities.freeze:
            await self._attempt(lease, "thaw", lambda backend: backend.thaw(engine.id))
        log.warning(
            "operation_failed",
            engine_id=str(engine.id),
            operation=engine.operation,
            status=status.value,
            code=error.code,
            error=error.message,
        )
        await self._finish(
            lease,
            Finish(
                status=status,
                action=action,
                metadata=metadata,
                error=error_record(error),
                answers_wish="wake",  # whoever wished it sees the end, and wakes the engine anew
                then=then,
                restart_in_s=restart_in_s,
                refund=refund,
                last_log=lines or None,
            ),
        )

    async def _has_next_key(self, engine: Engine) -> bool:
        keys = await self._means.registry.engines.keys(engine.id)
        return keys[-1].generation > engine.key_generation

    async def _attempt(self, lease: Lease, what: str, call: Callable[[EngineBackend], Awaitable[None]]) -> None:
        """A backend call on the way out of a failure, which must not be made worse by a second one."""
        try:
            async with asyncio.timeout(WAY_OUT_S):
                await self._means.act(lease, call)
        except Interrupted:
            raise
        except BackendError as error:
            log.warning("engine_left_as_it_is", engine_id=str(lease.engine.id), call=what, error=error.message)
        except TimeoutError:
            log.warning("engine_left_as_it_is", engine_id=str(lease.engine.id), call=what, error="no end in time")
        except Exception:  # a defect of the backend: the end must be recorded all the same
            log.exception("engine_left_as_it_is", engine_id=str(lease.engine.id), call=what)

    # --- up -------------------------------------------------------------------------------------------

    async def _boot(self, lease: Lease, parameters: Parameters, slot_taken: asyncio.Event) -> Engine:
        engine = lease.engine
        row = TRANSITIONS[Operation(engine.operation or "")]
        booted = await boot(
            self._means,
            lease,
            slot_taken=slot_taken,
            fresh=engine.former_status == State.FAILED and engine.ever_healthy and parameters.patience_s is None,
            patience_s=parameters.patience_s,
        )
        metadata = {
            "boot_ms": booted.boot_ms,
            "cold": booted.cold,
            "engine_version": engine.engine_version,
            "incarnation": lease.engine.incarnation,
        }
        return await self._finish(
            lease,
            Finish(
                status=State.RUNNING,
                action=row.success_action,
                metadata=metadata,
                healthy=True,
                boot_ms=booted.boot_ms if booted.cold else None,
                applied_generation=booted.applied_generation,
                key_generation=booted.applied_generation,  # one whose rotation was cut short is in force now
                restarts_seen=await self._restarts_so_far(lease) if booted.cold else None,
            ),
        )

    async def _restarts_so_far(self, lease: Lease) -> int | None:
        """How often the backend itself has started it until it was healthy."""
        if not self._means.backend.capabilities.restarts:
            return None
        found = await self._means.act(lease, lambda backend: backend.find(lease.engine.id))
        return None if found is None else found.restart_count

    # --- down -----------------------------------------------------------------------------------------

    async def _stop(self, lease: Lease, metadata: dict[str, bool] | None = None, *, unloaded: bool = False) -> Engine:
        engine = lease.engine
        row = TRANSITIONS[Operation(engine.operation or "")]
        self._enter(lease, "stop")
        await self._means.act(lease, lambda backend: backend.stop(engine.id, STOP_GRACE_S))
        assert row.success is not None
        return await self._finish(
            lease,
            Finish(
                status=row.success,
                action=row.success_action,
                metadata=metadata,
                unloaded=unloaded,
            ),
        )

    async def _sleep(self, lease: Lease, parameters: Parameters) -> Engine:
        """The state is `sleeping` since the claim, so admits take the wake path; a wake that arrives wins."""
        means, engine = self._means, lease.engine
        assert engine.url is not None
        if engine.wish == "wake":
            return await self._awake_after_all(lease)  # asked of a dead owner
        if means.backend.capabilities.freeze:
            found = await means.act(lease, lambda backend: backend.find(engine.id))
            if found is not None and found.state is ObjectState.FROZEN:
                return await self._asleep(lease)  # a dead owner had come this far
        if parameters.idle_s is not None:
            # One activity flush of every replica: an admit of just now is seen by the look below.
            self._enter(lease, "settle")
            await happens_within(lease.wake_wished, ACTIVITY_FLUSH_S)
        self._enter(lease, "probe")
        health = await means.http.health(engine.url, means.settings.health_check_timeout_s)
        in_flight = health.activity.in_flight if health.activity is not None else 0
        unknown = not health.ok or (health.reports_activity and health.activity is None)
        if parameters.idle_s is not None:
            idle_s = await means.registry.idle.idle_for_s(engine.id)
            active_ago_s = 0.0 if unknown or in_flight else None
            if active_ago_s is None and health.activity is not None:
                active_ago_s = health.activity.idle_seconds
            if idle_s < parameters.idle_s or (active_ago_s is not None and active_ago_s < parameters.idle_s):
                # It has worked since, or the clock has jumped: nobody but the engine itself knows how long it rests.
                return await self._finish(
                    lease, Finish(status=State.RUNNING, answers_wish="wake", active_ago_s=active_ago_s)
                )
        if unknown or in_flight > 0:
            # A failed probe, or impossible values, count as busy.
            raise EngineBusy(
                engine.user_id, status=State.RUNNING, operation="a turn in flight" if in_flight else "not answering"
            )
        if lease.wake_wished.is_set():
            return await self._awake_after_all(lease)
        return await self._asleep(lease)

    async def _asleep(self, lease: Lease) -> Engine:
        means, engine = self._means, lease.engine
        frozen = means.backend.capabilities.freeze
        self._enter(lease, "freeze" if frozen else "stop")
        if frozen:
            await means.act(lease, lambda backend: backend.freeze(engine.id))
        else:
            await means.act(lease, lambda backend: backend.stop(engine.id, STOP_GRACE_S))
        end = Finish(status=State.SLEEPING, action="sleep", metadata={"frozen": frozen}, unloaded=not frozen)
        slept = await means.finish(engine, end)
        if slept is not None:
            return lease.update(slept)
        now = await means.registry.engines.by_id(engine.id)
        if now is not None and now.lease_generation == engine.lease_generation and now.wish == "wake":
            return await self._awake_after_all(lease, stopped=not frozen)
        return lease.update(None, refused_for=await self._why_refused(lease))

    async def _awake_after_all(self, lease: Lease, *, stopped: bool = False) -> Engine:
        means, engine = self._means, lease.engine
        if stopped:
            # Stay asleep, the wake starts it.
            return await self._finish(
                lease, Finish(status=State.SLEEPING, action="sleep", answers_wish="wake", unloaded=True)
            )
        if means.backend.capabilities.freeze:
            await means.act(lease, lambda backend: backend.thaw(engine.id))
        return await self._finish(lease, Finish(status=State.RUNNING, answers_wish="wake"))

    # --- what the loops have found -----------------------------------------------------------------------

    async def _fail_running(self, lease: Lease, parameters: Parameters) -> Engine:
        """A running engine is not well: keep its last words, stop it, and say when it is restarted."""
        means, engine = self._means, lease.engine
        assert engine.url is not None
        if parameters.reason == "unhealthy":
            health = await means.http.health(engine.url, means.settings.health_check_timeout_s)
            if health.ok:  # it has come back since the verdict
                return await self._finish(lease, Finish(status=State.RUNNING))
        lines = await self._last_lines(lease)
        await means.act(lease, lambda backend: backend.stop(engine.id, STOP_GRACE_S))
        failure = EngineFailed(
            engine.user_id, parameters.reason or "unhealthy", parameters.message or "it is not well."
        )
        then, restart_in_s = means.after_failure(engine)
        metadata: dict[str, object] = {"reason": failure.reason, "message": parameters.message}
        return await self._finish(
            lease,
            Finish(
                status=State.FAILED,
                action="health_failed",
                metadata=metadata | ({"log": lines} if lines else {}),
                error=error_record(failure),
                then=then,
                restart_in_s=restart_in_s,
                last_log=lines or None,
            ),
        )

    async def _last_lines(self, lease: Lease) -> list[str]:
        """What a dead engine said last; pass-through values are cut out. Empty when it cannot be had soon."""
        means, engine_id = self._means, lease.engine.id
        if not means.backend.capabilities.logs:
            return []

        async def read(backend: EngineBackend) -> list[str]:
            lines = backend.logs(engine_id, tail=LAST_LINES)
            return [line.line[:LAST_LINE_CHARS] async for line in lines]

        try:
            async with asyncio.timeout(LAST_LINES_S):
                return [means.without_secrets(line) for line in (await means.act(lease, read))[-LAST_LINES:]]
        except (BackendError, TimeoutError) as error:
            log.info("no_last_lines", engine_id=str(engine_id), error=type(error).__name__)
            return []

    async def _repair(self, lease: Lease, parameters: Parameters, slot_taken: asyncio.Event) -> Engine:
        """Make the object what its row says; or the row what the object is, where that is safer."""
        means, engine = self._means, lease.engine
        state = State(engine.status)
        found = await means.act(lease, lambda backend: backend.find(engine.id))
        slot_taken.set()
        # A wake that arrives is answered by every end: whoever wished it looks again, and wakes what still sleeps.
        end = Finish(
            status=state, action="reconcile_adopt", metadata={"reason": parameters.reason}, answers_wish="wake"
        )
        if found is None or found.state is ObjectState.EXITED:
            return await self._finish(lease, replace(end, action=None))
        if state in (State.STOPPED, State.FAILED):
            await means.act(lease, lambda backend: backend.stop(engine.id, STOP_GRACE_S))
            return await self._finish(lease, end)
        if state is State.RUNNING:
            if found.state is not ObjectState.FROZEN:
                return await self._finish(lease, replace(end, action=None))
            await means.act(lease, lambda backend: backend.thaw(engine.id))
            return await self._finish(lease, end)
        if found.state is ObjectState.FROZEN:
            return await self._finish(lease, replace(end, action=None))
        return await self._back_to_sleep(lease, end)

    async def _back_to_sleep(self, lease: Lease, end: Finish) -> Engine:
        """An engine that should sleep and runs: frozen again when it is idle, else it is running."""
        means, engine = self._means, lease.engine
        try:
            booted = await boot(means, lease, slot_taken=asyncio.Event())
        except (BootTimeout, EngineFailed):
            # Nobody knows what it does: it gets the time to end in order, and wakes by a start.
            await means.act(lease, lambda backend: backend.stop(engine.id, STOP_GRACE_S))
            return await self._finish(lease, replace(end, unloaded=True))
        assert engine.url is not None
        idle = means.backend.capabilities.freeze and not lease.wake_wished.is_set()
        for at_rest_s, pause_s in ((0, THAWED_IDLE_S), (THAWED_IDLE_S, 0)):
            # What came while it was frozen is only now being read from its socket: it must rest between two looks.
            health = await means.http.health(engine.url, means.settings.health_check_timeout_s)
            activity = health.activity
            busy = not health.ok or (health.reports_activity and activity is None)
            if busy or (activity is not None and (activity.in_flight > 0 or activity.idle_seconds < at_rest_s)):
                idle = False
            if not idle or await happens_within(lease.wake_wished, pause_s):
                return await self._finish(
                    lease,
                    replace(
                        end,
                        status=State.RUNNING,
                        healthy=True,
                        applied_generation=booted.applied_generation,
                    ),
                )
        await means.act(lease, lambda backend: backend.freeze(engine.id))
        return await self._finish(lease, replace(end, applied_generation=booted.applied_generation))

    # --- keys -----------------------------------------------------------------------------------------

    async def _rotate_key(self, lease: Lease, parameters: Parameters, slot_taken: asyncio.Event) -> Engine:
        """The next key is recorded before the engine hears of it; a take-over goes on with the same one."""
        means, engine = self._means, lease.engine
        state = State(engine.status)
        found = None
        if means.backend.capabilities.listing:
            found = await means.act(lease, lambda backend: backend.find(engine.id))
            live = found is not None and found.state is ObjectState.RUNNING
            frozen = found is not None and found.state is ObjectState.FROZEN
        else:
            live = await means.act(lease, lambda backend: backend.is_running(engine.id))
            frozen = False
        self._enter(lease, "key")
        generation = engine.key_generation + 1
        secret = new_engine_key()
        ciphertext, master_key_id = means.keyring.encrypt(secret)
        key = EngineKey(generation, sha256_hex(secret), ciphertext, master_key_id, None)
        await means.persist(lambda: means.registry.engines.record_next_key(engine, key, parameters.overlap_s))
        lease.check()
        metadata: dict[str, object] = {"generation": generation, "overlap_seconds": parameters.overlap_s}
        end = Finish(
            status=state, action="rotate_key", metadata=metadata | {"restarted": False}, key_generation=generation
        )
        if state is State.RUNNING:
            if frozen:  # by somebody who has lost the engine
                await means.act(lease, lambda backend: backend.thaw(engine.id))
            if (live or frozen) and await push_pending_keys(means, engine, engine.applied_generation) == KeyPush.TAKEN:
                return await self._finish(lease, replace(end, applied_generation=generation))
            return await self._replace_for_key(lease, end, slot_taken)
        slot_taken.set()
        if not frozen:
            # Nothing of it runs: the next start carries the new key, and the old one is dead at once.
            end = replace(end, metadata=metadata | {"restarted": False, "overlap_seconds": 0})
        return await self._finish(lease, end)

    async def _replace_for_key(self, lease: Lease, end: Finish, slot_taken: asyncio.Event) -> Engine:
        """An engine that cannot take a key while it runs is created again with it."""
        metadata = (end.metadata or {}) | {"restarted": True, "overlap_seconds": 0}
        assert end.key_generation is not None
        try:
            booted = await boot(self._means, lease, slot_taken=slot_taken, fresh=True)
        except BackendUnavailable:
            raise
        except DatabaseUnavailable:
            raise
        except OrchestratorError as error:
            # The key is in force all the same: a leaked one must be revocable.
            engine_id = lease.engine.id
            await self._attempt(lease, "stop", lambda backend: backend.stop(engine_id, FAILED_STOP_GRACE_S))
            then, restart_in_s = self._means.after_failure(lease.engine)
            await self._finish(
                lease,
                replace(
                    end,
                    status=State.FAILED,
                    error=error_record(error),
                    metadata=metadata,
                    then=then,
                    restart_in_s=restart_in_s,
                ),
            )
            return lease.engine
        return await self._finish(
            lease,
            replace(
                end,
                status=State.RUNNING,
                metadata=metadata,
                healthy=True,
                boot_ms=booted.boot_ms,
                applied_generation=booted.applied_generation,
            ),
        )

    # --- out ------------------------------------------------------------------------------------------

    async def _destroy(self, lease: Lease) -> Engine:
        means, engine = self._means, lease.engine
        self._enter(lease, "destroy")
        await means.act(lease, lambda backend: backend.destroy(engine.id))
        if not await means.persist(lambda: means.registry.engines.remove(engine, "destroy", "destroyed")):
            lease.update(None)
        return engine
