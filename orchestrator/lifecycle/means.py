"""What every operation works with."""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, TypeVar

import orjson
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from orchestrator.errors import DatabaseUnavailable
from orchestrator.keys import fingerprint
from orchestrator.lifecycle.leases import Interruption
from orchestrator.lifecycle.metered import metered
from orchestrator.lifecycle.timeline import Timelines
from orchestrator.registry.engines import Then

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from uuid import UUID

    from orchestrator.backends.base import EngineBackend
    from orchestrator.engine_http import EngineHttp
    from orchestrator.keys import KeyRing
    from orchestrator.lifecycle.leases import Lease
    from orchestrator.registry import Registry
    from orchestrator.registry.engines import Finish
    from orchestrator.registry.rows import Engine, EngineKey
    from orchestrator.settings import Settings

T = TypeVar("T")

RESTART_JITTER = 1.2
SHORTEST_SECRET = 6  # a shorter pass-through value is no secret, and would blot out half a log
SETTLE_S = 2.0  # a backend call under way is given this long before an interrupted operation leaves it


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a product's policy says; None: the default of `ORCH_ENGINE_MEMORY` and `ORCH_ENGINE_CPUS`."""

    memory: str | None = None
    cpus: float | None = None


class ProbePace:
    """How long to wait between two probes of a boot: at most a hundredth of it, or 5 ms, is lost.

    Many boots at a time share the pace, so that probing takes no more from them than from one.
    """

    FIRST_S = 0.005
    LONGEST_S = 0.1

    def __init__(self) -> None:
        self._boots = 0

    def __enter__(self) -> Self:
        self._boots += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._boots -= 1

    def delay_s(self, elapsed_s: float) -> float:
        return min(max(self.FIRST_S * self._boots, elapsed_s / 100), self.LONGEST_S)


@dataclass(frozen=True)
class Means:
    """The registry, the backend and the keys, with the rules of how an operation may use them."""

    settings: Settings
    registry: Registry
    backend: EngineBackend
    http: EngineHttp
    keyring: KeyRing
    location_id: UUID
    start_slots: asyncio.Semaphore = field(repr=False)
    timelines: Timelines = field(default_factory=Timelines, repr=False)
    probe_pace: ProbePace = field(default_factory=ProbePace, repr=False)
    unfinished: dict[UUID, asyncio.Task[None]] = field(default_factory=dict, repr=False)

    @property
    def ports(self) -> tuple[int, int] | None:
        """The range of host ports; None where the backend publishes none."""
        if self.settings.engine_backend == "docker" and self.settings.engine_url_mode == "network":
            return None
        return self.settings.port_min, self.settings.port_max

    def object_of(self, engine: Engine) -> EngineBackend:
        """The backend, acting on the object that the row records."""
        return metered(self.backend.pinned(engine.container_id), engine.product_id)

    async def act(self, lease: Lease, call: Callable[[EngineBackend], Awaitable[T]]) -> T:
        """One backend call, under what is left of the lease, on the object that the claim recorded."""
        lease.check()
        if (unfinished := self.unfinished.get(lease.engine.id)) is not None:
            await asyncio.wait({unfinished})
            lease.check()
        with self.timelines.of(lease.engine).reporting():
            task = asyncio.ensure_future(call(self.object_of(lease.engine)))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            # A call half made would land later, behind the back of whoever takes the engine next.
            if lease.why is not Interruption.LOST:
                await asyncio.wait({task}, timeout=SETTLE_S)
            task.cancel()
            raise

    def let_finish(self, engine_id: UUID, call: asyncio.Task[None]) -> None:
        """A backend call whose effect was seen: it ends by itself, and how it ends is of no interest any more.

        The next call for the engine waits for that: none is overtaken by an older one.
        """
        if call.done():
            return
        self.unfinished[engine_id] = call

        def ended(task: asyncio.Task[None]) -> None:
            self.unfinished.pop(engine_id, None)
            if not task.cancelled():
                task.exception()

        call.add_done_callback(ended)

    async def persist(self, write: Callable[[], Awaitable[T]]) -> T:
        """A fenced write, tried again while the database is away and the lease may still hold."""
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(DatabaseUnavailable),
            wait=wait_random_exponential(multiplier=0.05, max=1),
            stop=stop_after_delay(self.settings.lease_s),
            reraise=True,
        ):
            with attempt:
                return await write()
        raise AssertionError("unreachable: the last attempt is raised again")

    async def finish(self, engine: Engine, end: Finish) -> Engine | None:
        """The fenced end of an operation; None when the lease is lost or a stronger wish has come."""
        interval_s = self.settings.health_check_interval_s
        return await self.persist(lambda: self.registry.engines.finish(engine, end, probe_interval_s=interval_s))

    def after_failure(self, engine: Engine, *, refund: bool = False) -> tuple[Then, float | None]:
        """Whether a failed engine is restarted by itself, and in how many seconds.

        `min(base · 2^n, max)` and up to a fifth more, n the attempts so far. One that never was healthy waits for a
        provision; after the last attempt it waits for `recover`, `start` or `admit`.
        """
        if not engine.ever_healthy:
            return Then.NOTHING, None
        attempts = engine.restart_attempt - int(refund)
        if attempts >= self.settings.restart_max_attempts:
            return Then.GIVE_UP, None
        delay_s = min(
            self.settings.restart_backoff_base_s * 2 ** min(attempts, 32), self.settings.restart_backoff_max_s
        )
        return Then.RESTART, delay_s * random.uniform(1, RESTART_JITTER)  # noqa: S311 - jitter, not a secret

    def without_secrets(self, line: str) -> str:
        """A line of an engine's log, without the pass-through values that it may have printed."""
        for name in self.settings.engine_env_passthrough:
            value = os.environ.get(name, "")
            if len(value) >= SHORTEST_SECRET:
                line = line.replace(value, "********")
        return line

    def environment(self, engine: Engine, key: EngineKey) -> dict[str, str]:
        """The variables that `create` is given; the contract's own win over pass-through names."""
        passed = {name: os.environ[name] for name in self.settings.engine_env_passthrough if name in os.environ}
        return {
            **passed,
            "ENGINE_KEY_HASH": key.key_hash,
            "ENGINE_KEY_GENERATION": str(key.generation),
            "ENGINE_INCARNATION": str(engine.incarnation),
        }

    async def ceilings(self, engine: Engine) -> Ceilings:
        if not self.backend.capabilities.ceilings:
            return Ceilings()
        product = await self.registry.products.by_id(engine.product_id)
        return ceilings_of(product.policy) if product is not None else Ceilings()

    def spec_fingerprints(self, engine: Engine, key: EngineKey, ceilings: Ceilings) -> list[str]:
        """A keyed digest of all that an object is created from, under each master key, the current one first.

        An object whose recorded digest is none of these is created again at its next cold start.
        """
        environment = self.environment(engine, key)
        del environment["ENGINE_INCARNATION"]
        settings = self.settings
        spec = orjson.dumps(
            [
                engine.engine_version,
                engine.port,
                environment,
                ceilings.memory or settings.engine_memory,
                ceilings.cpus or settings.engine_cpus,
                settings.engine_pids,
                settings.engine_runtime,
                settings.engine_read_only,
                settings.engine_seccomp,
                str(settings.catalog_mount_path),
                settings.subprocess_command,
            ],
            option=orjson.OPT_SORT_KEYS,
        ).decode()
        return [fingerprint(master_key, spec) for master_key in self.keyring.master_keys]


def ceilings_of(policy: dict[str, Any]) -> Ceilings:
    return Ceilings(policy.get("engine_memory"), policy.get("engine_cpus"))
