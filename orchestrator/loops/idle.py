"""Engines without real work go to sleep; those asleep for long give their memory back."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import structlog

from orchestrator.lifecycle.transitions import Operation

if TYPE_CHECKING:
    from orchestrator.lifecycle import Healing
    from orchestrator.lifecycle.means import Means

__all__ = ["IdleLoop"]

log = structlog.get_logger("orchestrator.idle")

MAX_AT_ONCE = 100
CLOCK_JUMP_S = 5.0  # more than that between two rounds is no drift


class IdleLoop:
    def __init__(self, means: Means, healing: Healing) -> None:
        self._means = means
        self._healing = healing
        self._clock: tuple[float, float] | None = None  # the database's time, and ours (monotonic) at that moment

    async def round(self) -> None:
        """Begin what is due, at most `MAX_AT_ONCE` at the same time."""
        await self._watch_clock()
        settings, here = self._means.settings, self._means.location_id
        idle, healing = self._means.registry.idle, self._healing
        free = MAX_AT_ONCE - healing.under_way(Operation.SLEEP) - healing.under_way(Operation.UNLOAD)
        if free <= 0:
            return
        sleeps = await idle.due_sleeps(here, settings.idle_sleep_threshold_s, free)
        unloads = await idle.due_unloads(here, settings.idle_stop_threshold_s, free)
        if (sleeps or unloads) and await self._watch_clock():
            return  # it jumped between the two looks at it, and so nobody may be idle at all
        for row in sleeps:
            await healing.sleep_idle(row["id"], row["lease_generation"], row["threshold_s"])
        for row in unloads:
            await healing.unload(row["id"], row["lease_generation"])

    async def _watch_clock(self) -> bool:
        """A database whose clock jumps must not put the fleet to sleep: then every idle time begins anew.

        True when it has jumped since the last look.
        """
        jumped = False
        asked = time.monotonic()
        now = await self._means.registry.idle.clock()
        answered = time.monotonic()
        if self._clock is not None:
            then, at = self._clock
            jump_s = (now - then) - ((asked + answered) / 2 - at)
            if abs(jump_s) > CLOCK_JUMP_S + (answered - asked):
                engines = await self._means.registry.idle.restart_clocks(self._means.location_id)
                jumped = True
                log.warning("clock_jumped", seconds=round(jump_s, 1), idle_times_restarted=engines)
                now, answered = await self._means.registry.idle.clock(), time.monotonic()
                asked = answered
        self._clock = now, (asked + answered) / 2
        return jumped
