"""The states of an engine, every transition, and what each call does in each state.

Nothing else in the code decides on a state: `Lifecycle` executes these tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from orchestrator.settings import Settings

__all__ = ["CALLS", "TRANSITIONS", "Call", "Operation", "Rule", "State", "Transition"]


class State(StrEnum):
    """Only `stopped` waits for a person."""

    PROVISIONING = "provisioning"
    RUNNING = "running"
    SLEEPING = "sleeping"
    STOPPED = "stopped"
    FAILED = "failed"
    DESTROYING = "destroying"


class Operation(StrEnum):
    """What can hold the lease on an engine."""

    PROVISION = "provision"
    START = "start"
    WAKE = "wake"
    RECOVER = "recover"
    RESTART = "restart"
    FAIL = "fail"
    REPAIR = "repair"
    SLEEP = "sleep"
    UNLOAD = "unload"
    STOP = "stop"
    ROTATE_KEY = "rotate_key"
    DESTROY = "destroy"


BOOTS: Final = frozenset({Operation.PROVISION, Operation.START, Operation.WAKE, Operation.RECOVER, Operation.RESTART})


@dataclass(frozen=True, slots=True)
class Transition:
    """One row of the table.

    `during` is shown from the claim on (None: the state does not change). `failure` None means: back to the
    former state. `deadline` names what the operation may take in all; `after_deadline` says what follows then.
    """

    operation: Operation
    sources: frozenset[State]
    during: State | None
    success: State | None
    failure: State | None
    trigger: str
    deadline: str
    after_deadline: str
    success_action: str | None
    failure_action: str | None = None

    def deadline_s(self, settings: Settings) -> float:
        """Seconds from the claim to the end of the operation."""
        return {
            "boot": settings.queue_timeout_s + settings.pull_timeout_s + settings.boot_timeout_s,
            "stop": STOP_GRACE_S + 30,
            "destroy": STOP_GRACE_S + 30,
        }[self.deadline]


STOP_GRACE_S: Final = 30  # SIGTERM to SIGKILL: an engine finishes its turns and keeps its memory in this time

_S = State
_EVERY = frozenset(State)


def _row(
    operation: Operation,
    sources: set[State] | frozenset[State],
    during: State | None,
    success: State | None,
    failure: State | None,
    *,
    trigger: str,
    deadline: str,
    after_deadline: str,
    success_action: str | None,
    failure_action: str | None = None,
) -> Transition:
    return Transition(
        operation,
        frozenset(sources),
        during,
        success,
        failure,
        trigger,
        deadline,
        after_deadline,
        success_action,
        failure_action,
    )


TRANSITIONS: Final[Mapping[Operation, Transition]] = {
    row.operation: row
    for row in (
        _row(
            Operation.PROVISION,
            {_S.FAILED},  # besides no engine at all: an engine that never was healthy is tried again
            _S.PROVISIONING,
            _S.RUNNING,
            _S.FAILED,
            trigger="provision, admit with auto_provision",
            deadline="boot",
            after_deadline="failed, object stopped; provision tries again with the same id, port and key",
            success_action="provision",
            failure_action="provision_failed",
        ),
        _row(
            Operation.START,
            {_S.STOPPED, _S.SLEEPING, _S.FAILED},
            _S.PROVISIONING,
            _S.RUNNING,
            _S.FAILED,
            trigger="start",
            deadline="boot",
            after_deadline="failed, object stopped; restarts follow",
            success_action="start",
            failure_action="health_failed",
        ),
        _row(
            Operation.WAKE,
            {_S.SLEEPING},
            _S.PROVISIONING,
            _S.RUNNING,
            _S.FAILED,
            trigger="admit with auto_wake",
            deadline="boot",
            after_deadline="failed, object stopped; restarts follow",
            success_action="wake",
            failure_action="health_failed",
        ),
        _row(
            Operation.RECOVER,
            {_S.FAILED},
            _S.PROVISIONING,
            _S.RUNNING,
            _S.FAILED,
            trigger="recover, admit with auto_wake",
            deadline="boot",
            after_deadline="failed, object stopped; restarts follow",
            success_action="recover",
            failure_action="health_failed",
        ),
        _row(
            Operation.RESTART,
            {_S.FAILED, _S.RUNNING},
            _S.PROVISIONING,
            _S.RUNNING,
            _S.FAILED,
            trigger="a failed engine whose back-off is over; a running one whose object is gone",
            deadline="boot",
            after_deadline="failed, object stopped; the next restart follows with back-off",
            success_action="auto_restart_success",
            failure_action="auto_restart_failed",
        ),
        _row(
            Operation.FAIL,
            {_S.RUNNING},
            _S.FAILED,
            _S.FAILED,
            _S.FAILED,
            trigger="probes that fail, an exit that nothing mends, an object that exits again and again",
            deadline="stop",
            after_deadline="failed; the reconcile loop stops the object",
            success_action="health_failed",
            failure_action="health_failed",
        ),
        _row(
            Operation.REPAIR,
            {_S.RUNNING, _S.SLEEPING, _S.STOPPED, _S.FAILED},
            None,
            None,
            None,
            trigger="an object that is not as its row says: a late call, somebody's hand, a daemon that was restarted",
            deadline="boot",
            after_deadline="the former state; the next reconcile tries again",
            success_action="reconcile_adopt",
        ),
        _row(
            Operation.SLEEP,
            {_S.RUNNING},
            _S.SLEEPING,
            _S.SLEEPING,
            None,
            trigger="sleep, the idle loop",
            deadline="stop",  # a backend that cannot freeze stops it
            after_deadline="running again: thawed",
            success_action="sleep",
        ),
        _row(
            Operation.UNLOAD,
            {_S.RUNNING, _S.SLEEPING},
            _S.SLEEPING,
            _S.SLEEPING,
            None,
            trigger="asleep for long, the end of a development session",
            deadline="stop",
            after_deadline="the former state; tried again when due",
            success_action="sleep",
        ),
        _row(
            Operation.STOP,
            {_S.PROVISIONING, _S.RUNNING, _S.SLEEPING, _S.FAILED},
            _S.STOPPED,
            _S.STOPPED,
            None,
            trigger="stop",
            deadline="stop",
            after_deadline="the former state",
            success_action="stop",
        ),
        _row(
            Operation.ROTATE_KEY,
            _EVERY - {_S.PROVISIONING, _S.DESTROYING},
            None,
            None,
            None,
            trigger="rotate-key",
            deadline="boot",
            after_deadline="the engine is created again with the new key",
            success_action="rotate_key",
        ),
        _row(
            Operation.DESTROY,
            _EVERY,
            _S.DESTROYING,
            None,  # no row any more
            _S.DESTROYING,
            trigger="destroy",
            deadline="destroy",
            after_deadline="tried again until it is done; never undone",
            success_action="destroy",
        ),
    )
}


class Call(StrEnum):
    """Calls whose answer depends on the state."""

    PROVISION = "provision"
    START = "start"
    STOP = "stop"
    SLEEP = "sleep"
    RECOVER = "recover"
    KEEP_ALIVE = "keep_alive"
    ROTATE_KEY = "rotate_key"
    SNAPSHOT = "snapshot"
    RESTORE = "restore"
    UPGRADE = "upgrade"
    DESTROY = "destroy"


class Rule(StrEnum):
    """What a call does in a state."""

    ACT = "act"  # carry out the call's operation
    DONE = "done"  # nothing to do: 200
    JOIN = "join"  # wait for the operation under way and answer as it ends
    CANCEL = "cancel"  # cancel the operation under way, then act
    WAIT = "wait"  # wait for the operation under way, then act
    RETRY = "retry"  # act when the engine never was healthy, else ENGINE_ALREADY_EXISTS
    EXISTS = "exists"  # 409 ENGINE_ALREADY_EXISTS
    ALREADY_RUNNING = "already_running"  # 409 ENGINE_ALREADY_RUNNING
    NOT_RUNNING = "not_running"  # 409 ENGINE_NOT_RUNNING
    BUSY = "busy"  # 409 ENGINE_BUSY


_R = Rule
_STATES = (_S.PROVISIONING, _S.RUNNING, _S.SLEEPING, _S.STOPPED, _S.FAILED, _S.DESTROYING)


def _per_state(*rules: Rule) -> Mapping[State, Rule]:
    return dict(zip(_STATES, rules, strict=True))


CALLS: Final[Mapping[Call, Mapping[State, Rule]]] = {
    # state:                  provisioning  running             sleeping        stopped         failed     destroying
    Call.PROVISION: _per_state(_R.EXISTS, _R.EXISTS, _R.EXISTS, _R.EXISTS, _R.RETRY, _R.BUSY),
    Call.START: _per_state(_R.JOIN, _R.ALREADY_RUNNING, _R.ACT, _R.ACT, _R.ACT, _R.BUSY),
    Call.STOP: _per_state(_R.CANCEL, _R.ACT, _R.ACT, _R.NOT_RUNNING, _R.ACT, _R.BUSY),
    Call.SLEEP: _per_state(_R.BUSY, _R.ACT, _R.DONE, _R.NOT_RUNNING, _R.NOT_RUNNING, _R.BUSY),
    Call.RECOVER: _per_state(_R.JOIN, _R.ALREADY_RUNNING, _R.NOT_RUNNING, _R.NOT_RUNNING, _R.ACT, _R.BUSY),
    Call.KEEP_ALIVE: _per_state(_R.ACT, _R.ACT, _R.NOT_RUNNING, _R.NOT_RUNNING, _R.NOT_RUNNING, _R.BUSY),
    Call.ROTATE_KEY: _per_state(_R.WAIT, _R.ACT, _R.ACT, _R.ACT, _R.ACT, _R.BUSY),
    Call.SNAPSHOT: _per_state(_R.BUSY, _R.ACT, _R.ACT, _R.ACT, _R.ACT, _R.BUSY),
    Call.RESTORE: _per_state(_R.BUSY, _R.ACT, _R.ACT, _R.ACT, _R.ACT, _R.BUSY),
    Call.UPGRADE: _per_state(_R.BUSY, _R.ACT, _R.ACT, _R.ACT, _R.ACT, _R.BUSY),
    Call.DESTROY: _per_state(_R.CANCEL, _R.CANCEL, _R.CANCEL, _R.CANCEL, _R.CANCEL, _R.CANCEL),
}
