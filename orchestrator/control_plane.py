"""Everything of one process, put together and opened in order."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from typing import TYPE_CHECKING

import structlog

from orchestrator import audit
from orchestrator.activity import ActivityRecorder
from orchestrator.backends import load_backend
from orchestrator.discovery import Discovery
from orchestrator.engine_http import EngineHttp
from orchestrator.errors import ConfigurationError, DatabaseUnavailable
from orchestrator.events import Notifications
from orchestrator.keys import KeyRing
from orchestrator.lifecycle import Flights, Healing, Lifecycle
from orchestrator.lifecycle.ceilings import CeilingsKeeper
from orchestrator.lifecycle.leases import LeaseKeeper
from orchestrator.lifecycle.means import Means
from orchestrator.loops import reconcile
from orchestrator.loops.health import HealthLoop, RestartLoop
from orchestrator.loops.idle import IdleLoop
from orchestrator.loops.runner import Loop, LoopRunner
from orchestrator.loops.watch import EventWatch
from orchestrator.offboarding import Offboarding
from orchestrator.policy import RateLimiter
from orchestrator.registry import Registry
from orchestrator.registry.database import Database
from orchestrator.registry.migrations import migrate, require_migrated
from orchestrator.rewrap import Rewrap
from orchestrator.webhooks import Webhooks

if TYPE_CHECKING:
    from uuid import UUID

    from orchestrator.backends.base import EngineBackend
    from orchestrator.settings import Settings

__all__ = ["ControlPlane"]

log = structlog.get_logger("orchestrator")

DRAIN_S = 10.0
RECONCILE_S = 60.0


class ControlPlane:
    """One replica. `open` raises `ConfigurationError` or `DatabaseUnavailable` with one clear line."""

    means: Means
    ceilings: CeilingsKeeper
    flights: Flights
    lifecycle: Lifecycle
    healing: Healing
    health: HealthLoop
    watch: EventWatch
    discovery: Discovery
    offboarding: Offboarding
    backend: EngineBackend
    deployment_id: UUID

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.started = time.monotonic()
        self.keyring = KeyRing(settings.master_keys())
        self.database = Database(
            settings.database_url.get_secret_value(), size=settings.database_pool, pooler=settings.database_pooler
        )
        self.registry = Registry(self.database)
        self.http = EngineHttp()
        self.notifications = Notifications(settings.listen_url)
        self.activity = ActivityRecorder(self.registry)
        self.limiter = RateLimiter(self.registry.rate)
        self.rewrap = Rewrap(self.registry.rewrap, self.keyring)
        self.webhooks = Webhooks(self.registry, self.keyring, settings.webhook_allowed_networks)
        owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self.keeper = LeaseKeeper(self.registry.engines, self.notifications, owner, settings.lease_s)
        self.followers = 0  # of engines' logs
        self.loops = LoopRunner([])

    async def open(self, *, loops: bool = True) -> None:
        """Without `loops`, nothing happens by itself: for a command that does one thing."""
        settings = self.settings
        url = settings.database_url.get_secret_value()
        if settings.auto_migrate:
            await migrate(url)
        else:
            await require_migrated(url)
        await self.database.open()
        self.deployment_id = await self.registry.deployment_id()
        self.keyring.require(await self.registry.engines.master_key_ids())
        self.backend = load_backend(settings, self.deployment_id)
        await self.backend.open()
        location_id = await self.backend.location_id()
        await self._require_location(location_id)
        await self.http.open()
        await self.webhooks.open()
        await self.notifications.open()
        await self.keeper.open()
        self.means = Means(
            settings,
            self.registry,
            self.backend,
            self.http,
            self.keyring,
            location_id,
            asyncio.Semaphore(settings.start_concurrency),
        )
        self.ceilings = CeilingsKeeper(self.means)
        self.flights = Flights(self.means, self.keeper, self.notifications)
        self.lifecycle = Lifecycle(self.means, self.flights, self.notifications)
        self.healing = Healing(self.means, self.flights)
        self.discovery = Discovery(settings, self.registry, self.lifecycle, self.limiter, self.activity, self.keyring)
        self.offboarding = Offboarding(self.registry, self.lifecycle)
        if loops:
            self._start_loops()
        log.info(
            "ready",
            deployment=settings.deployment_id or str(self.deployment_id),
            backend=settings.engine_backend,
            location=str(location_id),
        )

    def _start_loops(self) -> None:
        settings = self.settings
        self.health = HealthLoop(self.means, self.healing)
        reconciling = Loop("reconcile", RECONCILE_S, lambda: reconcile.reconcile(self.means, self.healing))
        self.watch = EventWatch(self.means, self.healing, self.health, reconciling.run_now)
        restarts = RestartLoop(self.means, self.healing)
        idle = IdleLoop(self.means, self.healing)
        self.loops = LoopRunner(
            [
                Loop("take_over", 0.8, lambda: reconcile.take_over(self.healing)),
                reconciling,
                Loop("health", min(1.0, settings.health_check_interval_s / 4), self.health.round),
                Loop("restarts", min(1.0, settings.restart_backoff_base_s / 4), restarts.round),
                Loop("idle", 1.0, idle.round),
                Loop("watch", 0.1, self.watch.round),
                Loop("activity", 0.5, self.activity.flush),
                Loop("timelines", 1, lambda: self.means.timelines.flush(self.registry)),
                Loop("rate", 1, self.limiter.settle),
                Loop("audit", 0.5, lambda: audit.sequence(self.registry.audit)),
                Loop("webhooks", 0.5, self.webhooks.round),
                Loop("rewrap", 1, self.rewrap.round),
                Loop("offboarding", 5, self.offboarding.round),
                Loop("housekeeping", 60, self._housekeeping),
            ]
        )
        self.loops.start()
        self.watch.start()

    async def _require_location(self, location_id: UUID) -> None:
        known = await self.registry.engines.locations()
        if known and location_id not in known:
            raise ConfigurationError(
                "The registry has engines, but none of them lives here: this is another data root or Docker daemon "
                "(ORCH_DATA_ROOT, DOCKER_HOST) than the one they were made on."
            )

    async def _housekeeping(self) -> None:
        await self.registry.rate.repair()
        await self.registry.audit.close_denials()
        await self.registry.engines.expire_idempotency_keys()

    async def close(self) -> None:
        """Loops end, operations finish or are handed over, what is in memory is written. No engine is stopped."""
        if hasattr(self, "watch"):
            await self.watch.stop()
        await self.loops.stop()
        if hasattr(self, "health"):
            await self.health.stop()
        if hasattr(self, "offboarding"):
            await self.offboarding.close()
        if hasattr(self, "ceilings"):
            await self.ceilings.close()
        if hasattr(self, "flights"):  # else it was never wholly open, and there is nothing to hand over or write
            await self.flights.drain(DRAIN_S)
            try:
                await self.activity.flush()
                await self.means.timelines.flush(self.registry)
                await self.limiter.close()
                await audit.sequence(self.registry.audit)
            except DatabaseUnavailable as error:
                log.warning("last_flush_failed", error=error.message)
        await self.keeper.close()
        await self.notifications.close()
        await self.webhooks.close()
        await self.http.close()
        if hasattr(self, "backend"):
            await self.backend.close()
        await self.database.close()
