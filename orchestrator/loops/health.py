"""Probes of running engines, what follows from them, and restarts of those that failed."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import structlog

from orchestrator import metrics
from orchestrator.backends.base import ObjectState
from orchestrator.errors import BackendError, BackendUnavailable
from orchestrator.lifecycle.transitions import Operation
from orchestrator.registry.health import ProbeResult
from orchestrator.registry.rows import engine_url

if TYPE_CHECKING:
    from uuid import UUID

    import asyncpg

    from orchestrator.backends.base import BackendObject
    from orchestrator.lifecycle import Healing
    from orchestrator.lifecycle.means import Means

__all__ = ["HealthLoop", "RestartLoop"]

log = structlog.get_logger("orchestrator.health")

MAX_PROBES = 200  # at the same time
BATCH_S = 0.2  # results are written together, and wait for each other no longer than that
SAMPLE = 100  # one good probe in so many is audited; each change from good to bad and back is
LOOK_TIMEOUT_S = 5.0
RESTART_WINDOW_S = 600


@dataclass(frozen=True, slots=True)
class _Probe:
    """What one probe found: the result as it is written, and the object where it was looked at."""

    result: ProbeResult
    found: BackendObject | None = None
    looked: bool = False


class HealthLoop:
    """Claims engines whose probe is due, in batches; hung ones do not hold up the others.

    A probe that fails is followed by a look at the object, which tells an exit from an engine that is not well. A
    backend that is away says nothing: then nothing is counted.
    """

    def __init__(self, means: Means, healing: Healing) -> None:
        self._means = means
        self._healing = healing
        self._probing: set[asyncio.Task[_Probe]] = set()
        self._sampled = 0
        # A backend that restarts engines by itself may have come up just before us, together with them.
        self._back_at = time.monotonic() if means.backend.capabilities.restarts else float("-inf")
        self._away = False

    def backend_is_back(self) -> None:
        """The backend was away until just now: engines that are not well get the time of a boot."""
        self._back_at = time.monotonic()

    async def round(self) -> None:
        """Everything that is due; returns when the rest is on its way."""
        settings = self._means.settings
        while True:
            capacity = MAX_PROBES - len(self._probing)
            claimed = []
            if capacity > 0:
                claimed = await self._means.registry.health.claim(
                    self._means.location_id, settings.health_check_interval_s, capacity
                )
            self._probing |= {asyncio.create_task(self._probe(row)) for row in claimed}
            if self._probing:
                await asyncio.wait(self._probing, timeout=BATCH_S)
                await self._record()
            if len(claimed) < capacity or not claimed:
                return

    async def stop(self) -> None:
        for task in self._probing:
            task.cancel()
        if self._probing:
            await asyncio.wait(self._probing)

    # --- one engine -------------------------------------------------------------------------------------

    async def _probe(self, row: asyncpg.Record) -> _Probe:
        settings = self._means.settings
        url = engine_url(row["host"], row["endpoint_port"])
        assert url is not None  # it was healthy once
        health = await self._means.http.health(url, settings.health_check_timeout_s)
        metrics.probed(row["product_id"], health.ok)
        activity = health.activity
        active_ago_s = None if activity is None else 0.0 if activity.in_flight else activity.idle_seconds
        if health.reports_activity and activity is None:
            active_ago_s = 0.0  # impossible values count as busy
        changed = health.ok == (row["consecutive_failures"] > 0)
        result = ProbeResult(
            row["id"],
            row["lease_generation"],
            health.ok,
            active_ago_s=active_ago_s,
            audited=changed or (health.ok and self._is_sampled()),
            reason=health.reason,
        )
        reborn = (
            health.uptime_s is not None
            and row["last_good_age_s"] is not None
            and health.uptime_s < row["last_good_age_s"] - 1
        )
        if health.ok and not (reborn and self._means.backend.capabilities.restarts):
            return _Probe(result)
        return await self._looked_at(result)

    async def _looked_at(self, result: ProbeResult) -> _Probe:
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                found = await self._healing.look(result.engine_id)
        except (BackendError, TimeoutError) as error:
            if isinstance(error, BackendUnavailable | TimeoutError):
                self._is_away()
            return _Probe(replace(result, audited=False))
        if self._away:
            self._away = False
            self.backend_is_back()
        exited = found is None or found.state is ObjectState.EXITED
        return _Probe(
            replace(
                result,
                counted=not result.ok,
                restarts=None if found is None else found.restart_count,
                started_at=None if found is None else found.started_at,
                exited=exited and not result.ok,
            ),
            found,
            looked=True,
        )

    def _is_away(self) -> None:
        if not self._away:
            log.warning("backend_away", effect="failed probes are not counted")
        self._away = True

    def _is_back_lately(self) -> bool:
        return time.monotonic() - self._back_at < self._means.settings.boot_timeout_s

    def _is_sampled(self) -> bool:
        self._sampled = (self._sampled + 1) % SAMPLE
        return self._sampled == 0

    # --- what follows -----------------------------------------------------------------------------------

    async def _record(self) -> None:
        done = {task for task in self._probing if task.done()}
        self._probing -= done
        probes = [task.result() for task in done if task.exception() is None]
        for task in done:
            if (defect := task.exception()) is not None:
                log.error("probe_crashed", exc_info=defect)
        if not probes:
            return
        rows = await self._means.registry.health.record([probe.result for probe in probes])
        troubled = [probe for probe in probes if probe.looked and probe.result.engine_id in rows]
        if any(probe.result.counted and not probe.result.exited for probe in troubled):
            await self._park_outages()
        for probe in troubled:
            await self._judge(probe, rows[probe.result.engine_id])

    async def _park_outages(self) -> None:
        settings = self._means.settings
        sweep_s = settings.health_check_interval_s * 1.6 + settings.health_check_timeout_s
        for row in await self._means.registry.health.park_outages(sweep_s):
            log.warning("restarts_parked", product_id=str(row["product_id"]), engines=row["engines"], seconds=60)

    async def _judge(self, probe: _Probe, row: asyncpg.Record) -> None:
        """A failed probe, or an engine that was restarted by its backend: does it go on?"""
        settings, healing, result, found = self._means.settings, self._healing, probe.result, probe.found
        engine_id, generation = result.engine_id, result.generation
        if row["restarts"] >= settings.health_max_failures:
            await healing.fail(
                engine_id,
                generation,
                "exited",
                f"it exited {row['restarts']} times within ten minutes; see its log.",
            )
        elif result.ok:
            return
        elif found is None or (found.state is ObjectState.EXITED and not found.mending):
            if self._means.backend.capabilities.restarts:
                # Its backend mends crashes; this was somebody's hand.
                await healing.restart(engine_id, generation, "object_gone" if found is None else "exited", adopted=True)
            else:
                code = "" if found is None or found.exit_code is None else f" with code {found.exit_code}"
                await healing.fail(engine_id, generation, "exited", f"it exited{code}; see its log.")
        elif found.state is ObjectState.EXITED:
            if (row["exited_for_s"] or 0) > settings.boot_timeout_s:
                await healing.fail(
                    engine_id, generation, "exited", f"it has been down for {row['exited_for_s']:.0f} s; see its log."
                )
        elif found.state is ObjectState.FROZEN:
            await healing.repair(engine_id, generation, "frozen")
        elif row["consecutive_failures"] >= settings.health_max_failures and not self._is_young(row):
            await healing.fail(
                engine_id,
                generation,
                "unhealthy",
                f"{row['consecutive_failures']} probes in a row failed ({result.reason}).",
            )

    def _is_young(self, row: asyncpg.Record) -> bool:
        """It, or its backend, came up just now: not well yet is not ill."""
        restarted_ago_s = row["restarted_ago_s"]
        if restarted_ago_s is not None and restarted_ago_s < self._means.settings.boot_timeout_s:
            return True
        return self._is_back_lately()

    async def note_restarts(self, engine_id: UUID, generation: int, found: BackendObject) -> None:
        """What an event told of a running engine; one that exits again and again has failed."""
        restarts = await self._means.registry.health.note_restart_count(
            engine_id, generation, found.restart_count, found.started_at
        )
        if restarts >= self._means.settings.health_max_failures:
            await self._healing.fail(
                engine_id, generation, "exited", f"it exited {restarts} times within ten minutes; see its log."
            )


class RestartLoop:
    """Restarts failed engines when their back-off is over; never more at once than there are places to start."""

    def __init__(self, means: Means, healing: Healing) -> None:
        self._means = means
        self._healing = healing

    async def round(self) -> None:
        settings = self._means.settings
        free = settings.start_concurrency * 2 - self._healing.under_way(Operation.RESTART)
        if free <= 0:
            return
        longest_s = settings.restart_backoff_max_s * 1.3
        for row in await self._means.registry.health.due_restarts(self._means.location_id, longest_s, free):
            await self._healing.restart(row["id"], row["lease_generation"], "failed")
