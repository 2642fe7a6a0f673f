"""`admit`: who calls, does the call count, where is the user's engine; and what to do when it is not up.

A running engine is answered after one statement. Everything slower branches off that path, and callers who want the
same thing of the same engine share one flight.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator import metrics
from orchestrator.errors import (
    EngineBusy,
    EngineNotFound,
    EngineNotRunning,
    InvalidPlatformKey,
    PolicyDenied,
    ProductNotFound,
    QuotaExceeded,
    RateLimited,
)
from orchestrator.keys import sha256_hex
from orchestrator.lifecycle.transitions import State
from orchestrator.policy import image_of
from orchestrator.registry.rate import SLOT_LIMIT
from orchestrator.registry.rows import Caller, Sight, engine_url

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from datetime import datetime
    from uuid import UUID

    import asyncpg

    from orchestrator.activity import ActivityRecorder
    from orchestrator.keys import KeyRing
    from orchestrator.lifecycle import Lifecycle
    from orchestrator.policy import RateLimiter
    from orchestrator.registry import Registry
    from orchestrator.settings import Settings

    Row = asyncpg.Record | Mapping[str, Any]

__all__ = ["Admission", "Discovery", "Found"]


@dataclass(slots=True)
class Found:
    """An engine as a product sees it; `api_key` is None for callers who may not have it."""

    engine_id: UUID
    user_id: str
    status: str
    url: str | None
    api_key: str | None
    engine_version: str
    created_at: datetime
    last_health_at: datetime | None


@dataclass(slots=True)
class Admission:
    """`engine` when admitted, else `reason` (and when to try again, where that is known)."""

    engine: Found | None
    reason: str | None = None
    retry_after_s: float | None = None


class Discovery:
    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        lifecycle: Lifecycle,
        limiter: RateLimiter,
        activity: ActivityRecorder,
        keyring: KeyRing,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._lifecycle = lifecycle
        self._limiter = limiter
        self._activity = activity
        self._keyring = keyring
        self._flights: dict[tuple[str, UUID, str], asyncio.Task[Any]] = {}
        # Which keys belong to products with a small limit: it chooses the statement, and the statement decides.
        self._counted_keys: set[str] = set()

    # --- look-up --------------------------------------------------------------------------------------

    async def look_up(self, caller: Caller, user_id: str) -> Found:
        """The engine, whatever its state; never changes it. Raises `EngineNotFound`."""
        row = await self._look_up(caller.product_id, user_id)
        if row is None:
            raise EngineNotFound(user_id)
        return self._found(row, with_key=not caller.is_admin and caller.may("admit"))

    async def _look_up(self, product_id: UUID, user_id: str) -> asyncpg.Record | None:
        return await self._registry.admissions.look_up(product_id, user_id)

    def _found(self, row: Row, *, with_key: bool) -> Found:
        key = self._keyring.decrypt(row["key_enc"], row["master_key_id"]) if with_key else None
        return Found(
            row["id"],
            row["user_id"],
            row["status"],
            engine_url(row["host"], row["endpoint_port"]),
            key,
            row["engine_version"],
            row["created_at"],
            row["last_health_at"],
        )

    # --- admit ----------------------------------------------------------------------------------------

    async def admit(self, platform_key: str, user_id: str, *, auto_provision: bool, auto_wake: bool) -> Admission:
        """Authentication, scope, rate limit and look-up in one statement.

        Raises `InvalidPlatformKey`, `PolicyDenied`, `RateLimited`, and what a provision or a wake may raise.
        """
        began = time.perf_counter()
        key_hash = sha256_hex(platform_key)
        counted = key_hash in self._counted_keys
        row = await self._registry.admissions.by_key(key_hash, user_id, counted=counted)
        if row is None:
            self._counted_keys.discard(key_hash)
            raise InvalidPlatformKey
        scopes = row["scopes"]
        if "manage" not in scopes and "admit" not in scopes:
            raise PolicyDenied.scope("admit")
        limit_rpm = row["rate_limit_rpm"]
        if limit_rpm is not None or counted:
            await self._count(row, key_hash, user_id, limit_rpm, counted)
        self._activity.key_used(row["key_id"])
        if row["status"] == State.RUNNING:
            self._activity.admitted(row["id"])
            admission = Admission(self._found(row, with_key=True))
            metrics.admitted(row["slug"], "running", time.perf_counter() - began)
            return admission
        caller = Caller(row["product_id"], row["slug"], frozenset(scopes), row["key_id"])
        return await self._measured(began, caller, user_id, row, auto_provision, auto_wake)

    async def admit_as_admin(self, caller: Caller, user_id: str, *, auto_provision: bool, auto_wake: bool) -> Admission:
        """The same for an admin acting as a product; the answer has no key."""
        product = await self._registry.products.by_id(caller.product_id)
        if product is None:
            raise ProductNotFound(str(caller.product_id))
        began = time.perf_counter()
        limit_rpm = product.policy.get("rate_limit_rpm")
        if limit_rpm is not None:
            await self._count_one(caller.product_id, user_id, limit_rpm)
        row = await self._look_up(caller.product_id, user_id)
        if row is not None and row["status"] == State.RUNNING:
            self._activity.admitted(row["id"])
            metrics.admitted(caller.slug, "running", time.perf_counter() - began)
            return Admission(self._found(row, with_key=False))
        return await self._measured(began, caller, user_id, row, auto_provision, auto_wake)

    async def _measured(
        self,
        began: float,
        caller: Caller,
        user_id: str,
        row: asyncpg.Record | None,
        auto_provision: bool,
        auto_wake: bool,
    ) -> Admission:
        result = "failed"
        try:
            admission = await self._admit_slowly(caller, user_id, row, auto_provision, auto_wake)
            result = "denied" if admission.engine is None else "brought_up"
            return admission
        finally:
            metrics.admitted(caller.slug, result, time.perf_counter() - began)

    async def _count(
        self, row: asyncpg.Record, key_hash: str, user_id: str, limit_rpm: int | None, counted: bool
    ) -> None:
        product_id: UUID = row["product_id"]
        if limit_rpm is not None and limit_rpm <= SLOT_LIMIT:
            if not counted:
                self._counted_keys.add(key_hash)  # the next call counts within its one statement
                await self._count_one(product_id, user_id, limit_rpm)
            elif not row["counted"]:
                raise await self._refused(product_id, user_id)
            return
        self._counted_keys.discard(key_hash)
        if limit_rpm is not None:
            await self._count_one(product_id, user_id, limit_rpm)

    async def _count_one(self, product_id: UUID, user_id: str, limit_rpm: int) -> None:
        if limit_rpm > SLOT_LIMIT:
            counted = await self._limiter.count(product_id, limit_rpm)
        else:
            counted = await self._registry.rate.take_slot(product_id)
        if not counted:
            raise await self._refused(product_id, user_id)

    async def _refused(self, product_id: UUID, user_id: str) -> RateLimited:
        self._activity.denied(product_id, user_id, "RATE_LIMITED")
        metrics.rate_limited(product_id)
        return RateLimited(await self._registry.rate.retry_after_s(product_id))

    async def _admit_slowly(
        self,
        caller: Caller,
        user_id: str,
        row: asyncpg.Record | None,
        auto_provision: bool,
        auto_wake: bool,
    ) -> Admission:
        """An engine that is not running: bring it up where the caller allows that, else say why not."""
        status = None if row is None or row["id"] is None else State(row["status"])
        never_healthy = status is State.FAILED and row is not None and row["first_healthy_at"] is None
        match status:
            case None | State.DESTROYING:
                if auto_provision:
                    return await self._provisioned(caller, user_id)
                return self._denied(caller, user_id, "engine_destroying" if status else "engine_not_found")
            case State.PROVISIONING:
                if auto_provision or auto_wake:
                    return await self._shared(
                        "join", caller, user_id, lambda: self._lifecycle.join(caller.product_id, user_id)
                    )
                return self._denied(caller, user_id, "engine_provisioning")
            case State.SLEEPING:
                seen = row
                assert seen is not None
                if auto_wake:
                    return await self._shared(
                        "wake",
                        caller,
                        user_id,
                        lambda: self._woken(caller, user_id, seen),
                    )
                return self._denied(caller, user_id, "engine_sleeping")
            case State.FAILED if never_healthy:
                if auto_provision:
                    return await self._provisioned(caller, user_id)
                return self._denied(caller, user_id, "engine_unhealthy")
            case State.FAILED:
                return await self._failed(caller, user_id, auto_wake)
            case State.STOPPED:
                return self._denied(caller, user_id, "engine_stopped")
            case State.RUNNING:
                # Came up since the first look.
                return await self._answer(caller, user_id)
        raise AssertionError(f"unhandled state {status}")

    async def _woken(self, caller: Caller, user_id: str, row: asyncpg.Record) -> Row | None:
        """Woken by what the admit's own look has found; that and the wake's end say all that the answer needs."""
        seen = Sight(row["id"], row["location_id"], row["status"])
        engine = await self._lifecycle.wake(caller.product_id, user_id, actor=caller.actor, seen=seen)
        if engine.id != row["id"] or engine.key_generation != row["key_generation"]:
            return None
        return {
            **row,
            "status": engine.status,
            "host": engine.host,
            "endpoint_port": engine.endpoint_port,
            "engine_version": engine.engine_version,
            "last_health_at": engine.last_health_at,
        }

    async def _provisioned(self, caller: Caller, user_id: str) -> Admission:
        async def provision() -> object:
            product = await self._registry.products.by_id(caller.product_id)
            if product is None:
                raise ProductNotFound(str(caller.product_id))
            image = image_of(product.policy, None, self._settings.engine_image)
            return await self._lifecycle.provision(
                caller.product_id, user_id, engine_version=image, actor=caller.actor, join=True
            )

        try:
            return await self._shared("provision", caller, user_id, provision)
        except QuotaExceeded:
            self._activity.denied(caller.product_id, user_id, "QUOTA_EXCEEDED")
            metrics.quota_exceeded(caller.product_id)
            raise

    async def _failed(self, caller: Caller, user_id: str, auto_wake: bool) -> Admission:
        engine = await self._registry.engines.by_user(caller.product_id, user_id)
        if engine is None or engine.status != State.FAILED:
            return await self._answer(caller, user_id)
        wait_s = await self._registry.engines.restart_wait_s(engine.id, self._settings.restart_backoff_base_s)
        if wait_s > 0 or not auto_wake:
            return self._denied(caller, user_id, "engine_unhealthy", wait_s if wait_s > 0 else None)
        return await self._shared(
            "recover",
            caller,
            user_id,
            lambda: self._lifecycle.recover_failed(caller.product_id, user_id, actor=caller.actor),
        )

    async def _shared(
        self, what: str, caller: Caller, user_id: str, bring_up: Callable[[], Awaitable[object]]
    ) -> Admission:
        """One flight for everybody in this process who wants the same of the same user; its look-up too.

        The flight is a task of its own: a caller who goes away does not end it.
        """
        key = (what, caller.product_id, user_id)
        flight = self._flights.get(key)
        if flight is None:

            async def fly() -> Row | None:
                known = await bring_up()
                return known if isinstance(known, dict) else await self._look_up(caller.product_id, user_id)

            flight = asyncio.create_task(fly(), name=f"admit-{what}")
            self._flights[key] = flight

            def landed(task: asyncio.Task[Any]) -> None:
                self._flights.pop(key, None)
                if not task.cancelled():
                    task.exception()  # retrieved: there may be nobody left to see it

            flight.add_done_callback(landed)
        try:
            row = await asyncio.shield(flight)
        except EngineNotRunning as error:
            return self._denied(caller, user_id, _REASONS[str((error.details or {})["status"])])
        except EngineBusy as error:
            status = str((error.details or {})["status"])
            if status not in _REASONS:
                raise
            return self._denied(caller, user_id, _REASONS[status])
        return self._answer_of(caller, user_id, row)

    async def _answer(self, caller: Caller, user_id: str) -> Admission:
        return self._answer_of(caller, user_id, await self._look_up(caller.product_id, user_id))

    def _answer_of(self, caller: Caller, user_id: str, row: Row | None) -> Admission:
        if row is None:
            return self._denied(caller, user_id, "engine_not_found")
        if row["status"] != State.RUNNING:
            return self._denied(caller, user_id, _REASONS[row["status"]])
        self._activity.admitted(row["id"])
        return Admission(self._found(row, with_key=not caller.is_admin))

    def _denied(self, caller: Caller, user_id: str, reason: str, retry_after_s: float | None = None) -> Admission:
        self._activity.denied(caller.product_id, user_id, reason)
        return Admission(None, reason, retry_after_s)


_REASONS: dict[str, str] = {
    State.PROVISIONING: "engine_provisioning",
    State.SLEEPING: "engine_sleeping",
    State.STOPPED: "engine_stopped",
    State.FAILED: "engine_unhealthy",
    State.DESTROYING: "engine_destroying",
}
