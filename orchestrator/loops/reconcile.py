"""Holds the registry against what really is there: finishes what dead owners left, and repairs differences."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import structlog

from orchestrator.backends.base import ObjectState
from orchestrator.errors import BackendError, BackendUnavailable, OrchestratorError
from orchestrator.lifecycle.transitions import State

if TYPE_CHECKING:
    from collections.abc import Iterable
    from uuid import UUID

    import asyncpg

    from orchestrator.backends.base import BackendObject
    from orchestrator.lifecycle import Healing
    from orchestrator.lifecycle.means import Means

__all__ = ["Action", "Step", "apply", "difference", "plan", "reconcile", "take_over"]

log = structlog.get_logger("orchestrator.reconcile")

BATCH = 50
ORPHANS_AT_ONCE = 10


async def take_over(healing: Healing) -> None:
    """Operations and wishes whose owner is gone. Every second: within the lease time + 1 s all are taken over."""
    while await healing.take_over(BATCH) == BATCH:
        pass
    await healing.carry_out_wishes(BATCH)


class Action(StrEnum):
    """What a difference calls for."""

    RESTART = "restart"  # it should run: start it again, on the same data
    THAW = "thaw"  # it should run, and is frozen
    FREEZE = "freeze"  # it should sleep, and runs: frozen again when it is idle
    STOP = "stop"  # it should not run
    REMOVE_ORPHAN = "remove orphan"  # left of a destroyed engine: with its data
    STOP_ORPHAN = "stop orphan"  # nobody knows it: stopped after a grace period, its data kept
    REPORT_ORPHAN = "report orphan"  # nobody knows it: within the grace period, or stopped already
    PURGE_ORPHAN = "purge orphan"  # by a person's order: with its data


@dataclass(frozen=True, slots=True)
class Step:
    """One difference, and what is to be done about it."""

    action: Action
    engine_id: UUID
    user_id: str | None
    expected: str | None  # the state in the registry; None: no row
    found: ObjectState | None
    generation: int = 0
    object: BackendObject | None = None


def difference(row: asyncpg.Record, found: BackendObject | None) -> Step | None:
    """What one settled row calls for; None when the object is as it says, or somebody is at it."""
    if row["operation"] is not None or row["wish"] is not None:
        return None
    state = None if found is None else found.state
    live = state in (ObjectState.RUNNING, ObjectState.FROZEN)
    action = None
    match row["status"]:
        case State.RUNNING if not live:
            # A crash that the backend is about to mend belongs to the health loop.
            if found is None or not found.mending:
                action = Action.RESTART
        case State.RUNNING if found is not None and found.incarnation != row["incarnation"]:
            action = Action.RESTART
        case State.RUNNING if state is ObjectState.FROZEN:
            action = Action.THAW
        case State.SLEEPING if state is ObjectState.RUNNING or (found is not None and found.mending):
            action = Action.FREEZE
        case State.STOPPED | State.FAILED if live or (found is not None and found.mending):
            action = Action.STOP
    if action is None:
        return None
    return Step(action, row["id"], row["user_id"], row["status"], state, row["lease_generation"], found)


async def plan(means: Means, *, purge: bool = False) -> list[Step]:
    """Every difference between the registry and one list of the backend. Changes nothing.

    Raises `BackendUnavailable`, and `BackendError` when this is not the place that the registry's engines live at.
    """
    if not means.backend.capabilities.listing:
        return []
    if await means.backend.location_id() != means.location_id:
        raise BackendError("This is another daemon or data root than the one that this process was started with.")
    # Rows first: an engine that somebody claims after that is none of ours (its generation has changed).
    rows = await means.registry.engines.here(means.location_id)
    objects = {found.engine_id: found for found in await means.backend.list()}
    steps = [step for row in rows if (step := difference(row, objects.pop(row["id"], None))) is not None]
    return steps + await _orphans(means, objects.values(), purge=purge)


async def _orphans(means: Means, unknown: Iterable[BackendObject], *, purge: bool) -> list[Step]:
    """Objects without a row. One that was made after the rows were read has one by now."""
    objects = list(unknown)
    explained = await means.registry.orphans.explained([found.engine_id for found in objects]) if objects else {}
    steps = []
    for found in objects:
        destroyed = explained.get(found.engine_id)
        if destroyed is False:
            continue
        action = Action.REPORT_ORPHAN
        if destroyed:
            action = Action.REMOVE_ORPHAN
        elif purge:
            action = Action.PURGE_ORPHAN
        elif found.state is not ObjectState.EXITED or found.mending:
            action = Action.STOP_ORPHAN
        steps.append(Step(action, found.engine_id, None, None, found.state, object=found))
    return steps


async def apply(means: Means, healing: Healing, steps: list[Step], *, actor: str = "system") -> None:
    """Begin what each step calls for; one that fails does not hold up the others.

    Waits for the end of what is done to orphans, a few at a time: some take all their grace. Engines come first.
    Raises `BackendUnavailable`.
    """
    orphans = [step for step in steps if step.expected is None]
    await means.registry.orphans.forget_others(means.location_id, [step.engine_id for step in orphans])
    for step in steps:
        if step.expected is not None:
            await _try(means, healing, step, actor)
    places = asyncio.Semaphore(ORPHANS_AT_ONCE)

    async def in_turn(step: Step) -> None:
        async with places:
            await _try(means, healing, step, actor)

    try:
        async with asyncio.TaskGroup() as group:
            for step in orphans:
                group.create_task(in_turn(step))
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None  # the first one has ended the others


async def _try(means: Means, healing: Healing, step: Step, actor: str) -> None:
    try:
        await _apply(means, healing, step, actor)
    except BackendUnavailable:
        raise
    except OrchestratorError as error:
        log.warning("step_failed", engine_id=str(step.engine_id), action=step.action.value, error=error.message)


async def _apply(means: Means, healing: Healing, step: Step, actor: str) -> None:
    log.info(
        "difference", engine_id=str(step.engine_id), action=step.action.value, expected=step.expected, found=step.found
    )
    match step.action:
        case Action.RESTART:
            reason = "object_gone" if step.object is None else "exited"
            if step.object is not None and step.found is not ObjectState.EXITED:
                reason = "another_incarnation"
            # Where a backend mends crashes by itself, this was somebody's hand; else it is the engine's own exit.
            by_hand = means.backend.capabilities.restarts
            await healing.restart(step.engine_id, step.generation, reason, adopted=by_hand)
        case Action.THAW | Action.FREEZE | Action.STOP:
            await healing.repair(step.engine_id, step.generation, f"{step.expected} and {step.found}")
        case Action.REMOVE_ORPHAN:
            assert step.object is not None
            await healing.remove_orphan(step.object, actor="system")
        case Action.PURGE_ORPHAN:
            assert step.object is not None
            await healing.remove_orphan(step.object, actor=actor)
        case Action.STOP_ORPHAN | Action.REPORT_ORPHAN:
            assert step.object is not None
            await _orphan(means, healing, step)


async def _orphan(means: Means, healing: Healing, step: Step) -> None:
    assert step.object is not None
    known = await means.registry.orphans.note(
        means.location_id, step.engine_id, state=step.object.state.value, incarnation=step.object.incarnation
    )
    grace_s = means.settings.orphan_grace_s
    if step.action is Action.STOP_ORPHAN and (known.known_for_s >= grace_s or known.known_for_s < 0):
        await healing.stop_orphan(step.object)


async def reconcile(means: Means, healing: Healing) -> None:
    """One list of the backend against the registry. What runs is adopted by doing nothing: its row says where it is."""
    steps = await plan(means)
    await apply(means, healing, steps)
