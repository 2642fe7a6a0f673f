"""What an operation is doing, and what it did: phases with their times, for `GET /engines/{user_id}/timeline`.

Phases are noted in memory, which costs an operation nothing, and written in batches at most once a second. Any replica
answers: at most that second late for an operation of another one.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from orchestrator.backends.base import reporting
from orchestrator.errors import BackendError, DatabaseUnavailable, EngineNotFound

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from uuid import UUID

    from orchestrator.lifecycle.means import Means
    from orchestrator.registry import Registry
    from orchestrator.registry.rows import Engine

__all__ = ["Phase", "Timeline", "TimelineView", "Timelines", "view_of"]

MAX_PHASES = 100
MAX_LINE = 1000
LOG_S = 2.0


@dataclass(slots=True)
class Phase:
    """`duration_ms` is None while it lasts."""

    name: str
    started_at: datetime
    duration_ms: int | None = None


@dataclass(slots=True)
class TimelineView:
    """The operation under way, or else the last one. `stalled_on`: the phase that it is in, or that it failed in."""

    engine_id: UUID
    operation: str | None
    status: str
    started_at: datetime | None
    duration_ms: int | None
    phases: list[Phase]
    stalled_on: str | None
    last_log: str | None


class Timeline:
    """One operation as this process carries it out."""

    def __init__(self, engine: Engine) -> None:
        self.engine_id = engine.id
        self.operation_id = engine.operation_id
        self.operation = engine.operation
        self.generation = engine.lease_generation
        now = datetime.now(UTC)
        self.started_at = engine.operation_started_at or now
        # The database's clock where the operation begins now; one that was taken over began earlier.
        self._origin = self.started_at if abs((now - self.started_at).total_seconds()) < 1 else now
        self._began = time.monotonic()
        self._phase_began = self._began
        self.phases: list[Phase] = []
        self.ended_at: datetime | None = None
        self.stalled_on: str | None = None
        self.last_log: str | None = None
        self.changed = True

    def _now(self) -> datetime:
        return self._origin + timedelta(seconds=time.monotonic() - self._began)

    def enter(self, name: str) -> None:
        """The phase before it ends; entering the same one again goes on with it."""
        if self.ended_at is not None or (self.phases and self.phases[-1].name == name):
            return
        self._close()
        self._phase_began = time.monotonic()
        if len(self.phases) < MAX_PHASES:
            self.phases.append(Phase(name, self._now()))
        self.stalled_on = name
        self.changed = True

    def tell(self, phase: str, line: str | None = None) -> None:
        """What a backend reports from inside a call."""
        self.enter(phase)
        if line:
            self.last_log = line[:MAX_LINE]
            self.changed = True

    def end(self, *, failed: bool) -> None:
        if self.ended_at is None:
            self._close()
            self.ended_at = self._now()
            if not failed:
                self.stalled_on = self.last_log = None
            self.changed = True

    def reporting(self) -> AbstractContextManager[None]:
        """Backend calls made inside report here."""
        return reporting(self.tell)

    def _close(self) -> None:
        if self.phases and self.phases[-1].duration_ms is None:
            self.phases[-1].duration_ms = round((time.monotonic() - self._phase_began) * 1000)

    def row(self) -> dict[str, Any]:
        return {
            "engine_id": str(self.engine_id),
            "operation_id": str(self.operation_id),
            "operation": self.operation,
            "generation": self.generation,
            "ended_at": self.ended_at,
            "phases": [
                {"name": phase.name, "started_at": phase.started_at, "duration_ms": phase.duration_ms}
                for phase in self.phases
            ],
            "stalled_on": self.stalled_on,
            "last_log": self.last_log,
        }


@dataclass
class Timelines:
    """Those of this process that are under way, or not written yet."""

    _known: dict[tuple[UUID, int], Timeline] = field(default_factory=dict)

    def begin(self, engine: Engine) -> Timeline:
        timeline = Timeline(engine)
        self._known[engine.id, engine.lease_generation] = timeline
        return timeline

    def of(self, engine: Engine) -> Timeline:
        """The one of the operation that holds `engine`; one that nobody reads when there is none."""
        return self._known.get((engine.id, engine.lease_generation)) or Timeline(engine)

    def find(self, engine: Engine) -> Timeline | None:
        """The newest one of this process of the operation that the row shows."""
        found = self._known.get((engine.id, engine.lease_generation))
        return found if found is not None and found.operation_id == engine.operation_id else None

    async def flush(self, registry: Registry) -> None:
        """Write what has changed since the last time; called about once a second."""
        due = sorted(
            (timeline for timeline in self._known.values() if timeline.changed), key=lambda due: due.generation
        )
        for timeline in due:
            timeline.changed = False
        try:
            while due:
                # Operations of one engine follow one another: each has its turn in a statement of its own.
                batch = {timeline.engine_id: timeline for timeline in reversed(due)}.values()
                await registry.timelines.write([timeline.row() for timeline in batch])
                due = [timeline for timeline in due if timeline not in batch]
        except DatabaseUnavailable:
            for timeline in due:
                timeline.changed = True
            raise
        self._known = {
            key: timeline for key, timeline in self._known.items() if timeline.ended_at is None or timeline.changed
        }


async def view_of(means: Means, product_id: UUID, user_id: str) -> TimelineView:
    """Raises `EngineNotFound`."""
    engine = await means.registry.engines.by_user(product_id, user_id)
    if engine is None:
        raise EngineNotFound(user_id)
    written = await means.registry.timelines.read(engine.id)
    if written is not None and written["operation_id"] != engine.operation_id:
        written = None  # of an operation before
    here = means.timelines.find(engine)
    told: dict[str, Any] = here.row() if here is not None else written or {}
    phases = [] if written is None else list(written["earlier"])
    if here is not None and written is not None and written["generation"] < here.generation:
        phases += written["phases"]  # of the one that it was taken over from
    phases += told.get("phases", [])
    started_at, under_way = engine.operation_started_at, engine.operation is not None
    until = datetime.now(UTC) if under_way else told.get("ended_at")
    duration_ms = None
    if until is not None and started_at is not None:
        duration_ms = max(0, round((until - started_at).total_seconds() * 1000))
    failed = under_way or engine.last_error is not None
    return TimelineView(
        engine_id=engine.id,
        operation=engine.operation or told.get("operation"),
        status=engine.status,
        started_at=started_at,
        duration_ms=duration_ms,
        phases=[_phase(phase) for phase in phases],
        stalled_on=told.get("stalled_on") if failed else None,
        last_log=told.get("last_log") or await _last_line(means, engine),
    )


def _phase(kept: dict[str, Any]) -> Phase:
    at = kept["started_at"]
    return Phase(kept["name"], at if isinstance(at, datetime) else datetime.fromisoformat(at), kept["duration_ms"])


async def _last_line(means: Means, engine: Engine) -> str | None:
    """The last line of the engine's own log; None when it cannot be had here and soon."""
    if engine.location_id != means.location_id or not means.backend.capabilities.logs:
        return None
    try:
        async with asyncio.timeout(LOG_S):
            lines = [line.line async for line in means.object_of(engine).logs(engine.id, tail=1)]
    except (BackendError, TimeoutError):
        return None
    return means.without_secrets(lines[-1])[:MAX_LINE] if lines else None
