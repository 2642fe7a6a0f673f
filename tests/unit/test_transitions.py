"""The tables of the lifecycle are complete and consistent."""

from __future__ import annotations

import pytest
from cryptography.fernet import Fernet

from orchestrator.lifecycle.lifecycle import OPERATION_OF
from orchestrator.lifecycle.transitions import BOOTS, CALLS, STOP_GRACE_S, TRANSITIONS, Call, Operation, Rule, State
from orchestrator.settings import Settings, load_settings

ON_THE_WAY = {State.PROVISIONING, State.DESTROYING}


@pytest.fixture
def settings() -> Settings:
    return load_settings(
        _env_file=None,
        database_url="postgresql://nobody@nowhere/nothing",
        master_key=Fernet.generate_key().decode(),
        admin_key="0123456789abcdef",
        queue_timeout_s=7,
        pull_timeout_s=11,
        boot_timeout_s=13,
    )


def test_every_call_has_a_rule_in_every_state() -> None:
    assert set(CALLS) == set(Call)
    for call, rules in CALLS.items():
        assert list(rules) == list(State), call


def test_every_operation_has_its_row() -> None:
    assert set(TRANSITIONS) == set(Operation)
    for operation, row in TRANSITIONS.items():
        assert row.operation is operation
        assert row.sources
        assert row.trigger
        assert row.after_deadline


@pytest.mark.parametrize("operation", Operation)
def test_every_operation_ends_in_a_state_to_stay_in(operation: Operation) -> None:
    row = TRANSITIONS[operation]
    if operation is Operation.DESTROY:
        assert (row.success, row.failure) == (None, State.DESTROYING)
        return
    assert row.success not in ON_THE_WAY
    assert row.failure not in ON_THE_WAY
    if row.success is None:  # the state does not change: none of those it may be claimed in is on the way
        assert not row.sources & ON_THE_WAY


@pytest.mark.parametrize("operation", Operation)
def test_every_operation_has_a_deadline(operation: Operation, settings: Settings) -> None:
    row = TRANSITIONS[operation]
    if operation in BOOTS or operation is Operation.ROTATE_KEY:
        assert row.deadline_s(settings) == 7 + 11 + 13
    else:
        assert row.deadline_s(settings) > STOP_GRACE_S


def test_boots_show_provisioning_and_end_running_or_failed() -> None:
    for operation in BOOTS:
        row = TRANSITIONS[operation]
        assert (row.during, row.success, row.failure) == (State.PROVISIONING, State.RUNNING, State.FAILED)
        assert row.success_action
        assert row.failure_action
        assert State.DESTROYING not in row.sources


@pytest.mark.parametrize("call", OPERATION_OF)
def test_a_call_acts_only_where_its_operation_may_be_claimed(call: Call) -> None:
    sources = TRANSITIONS[OPERATION_OF[call]].sources
    for state, rule in CALLS[call].items():
        if rule in (Rule.ACT, Rule.CANCEL, Rule.RETRY):
            assert state in sources, state
        elif rule is Rule.WAIT:
            assert state not in sources, state  # else it would not have to wait


def test_every_state_can_be_left_and_destroyed() -> None:
    for state in State:
        assert CALLS[Call.DESTROY][state] is Rule.CANCEL
        assert state in TRANSITIONS[Operation.DESTROY].sources


def test_only_stopped_waits_for_a_person() -> None:
    """Whatever ends a stop is asked for: nothing but `start`, `destroy` (and another stop) leads out of it."""
    out = {operation for operation, row in TRANSITIONS.items() if State.STOPPED in row.sources}
    assert out == {Operation.START, Operation.ROTATE_KEY, Operation.REPAIR, Operation.DESTROY}
