"""Runs loops: one task each, never two rounds at once, and no failure that ends one."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from orchestrator import metrics
from orchestrator.errors import OrchestratorError
from orchestrator.events import wait_briefly

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["Loop", "LoopRunner"]

log = structlog.get_logger("orchestrator.loops")

STALE_ROUNDS = 5


@dataclass
class Loop:
    """`round` is called every `interval_s`, with a little jitter so that replicas do not march in step."""

    name: str
    interval_s: float
    round: Callable[[], Awaitable[object]]
    last_success: float = field(default_factory=time.monotonic)
    failing: str | None = None
    _now: asyncio.Event = field(default_factory=asyncio.Event)

    def run_now(self) -> None:
        """Do not wait for the next turn: something has happened. Any number of calls make one round."""
        self._now.set()

    async def wait(self) -> None:
        delay_s = self.interval_s * random.uniform(0.9, 1.1)  # noqa: S311 - jitter, not a secret
        await wait_briefly(self._now, delay_s)

    @property
    def lag_s(self) -> float:
        """How much longer ago its last success is than it should be."""
        return max(0.0, time.monotonic() - self.last_success - self.interval_s * 1.1)

    @property
    def is_stale(self) -> bool:
        return time.monotonic() - self.last_success > max(10.0, self.interval_s * STALE_ROUNDS)


class LoopRunner:
    def __init__(self, loops: list[Loop]) -> None:
        self.loops = loops
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._run(loop), name=f"loop-{loop.name}") for loop in self.loops]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._tasks = []

    async def _run(self, loop: Loop) -> None:
        while True:
            ok = False
            try:
                await loop.round()
            except OrchestratorError as error:
                # Said once when it begins and once when it is over, not in every round.
                if loop.failing != error.code:
                    log.warning("loop_failing", loop=loop.name, code=error.code, error=error.message)
                loop.failing = error.code
            except Exception as error:  # a defect in one round must not end the loop for good
                log.exception("loop_crashed", loop=loop.name)
                loop.failing = type(error).__name__
            else:
                if loop.failing is not None:
                    log.info("loop_recovered", loop=loop.name)
                loop.failing = None
                loop.last_success = time.monotonic()
                ok = True
            metrics.loop_round(loop.name, ok=ok)
            await loop.wait()
