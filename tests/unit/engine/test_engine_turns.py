from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from engine.activity import Activity
from engine.brain import Brain
from engine.errors import BrainFailed, Draining, MessageNotFound, TaskBusy, TurnInterrupted
from engine.responder import Usage
from engine.turns import Turn, TurnRequest, TurnRunner
from tests.unit.engine.engine_fakes import Clock, ScriptedResponder, no_desk, parse_events

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

HELLO = TurnRequest("task", "hello")


@pytest.fixture
async def brain(tmp_path: Path) -> AsyncIterator[Brain]:
    brain = Brain(tmp_path / "brain.sqlite")
    await brain.opened()
    yield brain
    await brain.close()


def scripted(*items: str | Usage | Exception) -> ScriptedResponder:
    return ScriptedResponder(list(items) or ["one ", "two", Usage(1, 2)])


async def events(turn: Turn, heartbeat_after_s: float = 60.0) -> list[tuple[str, dict[str, Any]]]:
    return parse_events(b"".join([chunk async for chunk in turn.follow(heartbeat_after_s)]))


async def stored(brain: Brain) -> tuple[str, list[str]]:
    history = await brain.history("task", 10)
    return history["turns"][-1]["status"], [message["content"] for message in history["messages"]]


async def test_the_events_of_a_turn(brain: Brain) -> None:
    responder = scripted()
    runner = TurnRunner(brain, responder, Activity(), desk=no_desk)
    turn = await runner.start(HELLO)
    responder.go.set()
    seen = await events(turn)
    assert [kind for kind, _ in seen] == [
        "thread_lifecycle",
        "content_block_start",
        "text_delta",
        "text_delta",
        "content_block_stop",
        "usage",
        "thread_lifecycle",
    ]
    started, completed = seen[0][1], seen[-1][1]
    assert (started["phase"], completed["phase"]) == ("started", "completed")
    for data in (started, completed):
        assert (data["task_id"], data["turn_id"]) == ("task", turn.turn_id)
        assert isinstance(data["timestamp"], int)
    assert "".join(data["text"] for kind, data in seen if kind == "text_delta") == "one two"
    assert seen[-2][1] == {"input_tokens": 1, "output_tokens": 2, "cache_hit_tokens": 0}
    assert await stored(brain) == ("completed", ["hello", "one two"])


async def test_late_and_several_listeners_hear_all_of_it(brain: Brain) -> None:
    responder = scripted()
    turn = await TurnRunner(brain, responder, Activity(), desk=no_desk).start(HELLO)
    await responder.waiting.wait()
    early = asyncio.create_task(events(turn))
    responder.go.set()
    assert await early == await events(turn)


async def test_heartbeats_while_nothing_else_happens(brain: Brain) -> None:
    responder = scripted()
    turn = await TurnRunner(brain, responder, Activity(), desk=no_desk).start(HELLO)
    await responder.waiting.wait()
    stream = turn.follow(heartbeat_after_s=0.001)
    await anext(stream)
    ((kind, data),) = parse_events(await anext(stream))
    assert kind == "heartbeat"
    assert data["turn_id"] == turn.turn_id
    responder.go.set()
    assert [kind async for chunk in stream for kind, _ in parse_events(chunk) if kind != "heartbeat"] == [
        "content_block_stop",
        "usage",
        "thread_lifecycle",
    ]


async def test_a_turn_needs_no_listener(brain: Brain) -> None:
    responder = scripted()
    runner = TurnRunner(brain, responder, Activity(), desk=no_desk)
    turn = await runner.start(HELLO)
    stream = turn.follow()
    await anext(stream)
    await stream.aclose()
    responder.go.set()
    assert await runner.drain(60) == 0
    assert await stored(brain) == ("completed", ["hello", "one two"])


async def test_a_busy_task_is_refused_and_free_again_with_the_last_event(brain: Brain) -> None:
    responder = scripted()
    runner = TurnRunner(brain, responder, Activity(), desk=no_desk)
    first = await runner.start(HELLO)
    with pytest.raises(TaskBusy):
        await runner.start(HELLO)
    other = await runner.start(TurnRequest("another task", "hello"))
    responder.go.set()
    await events(other)
    async for chunk in first.follow():
        if b"completed" in chunk:
            second = await runner.start(HELLO)
    await events(second)
    assert [prompt.turn_number for prompt in responder.prompts if prompt.task_id == "task"] == [1, 2]


async def test_of_simultaneous_starts_one_wins(brain: Brain) -> None:
    responder = scripted()
    responder.go.set()
    runner = TurnRunner(brain, responder, Activity(), desk=no_desk)
    results = await asyncio.gather(*(runner.start(HELLO) for _ in range(20)), return_exceptions=True)
    assert sum(isinstance(result, Turn) for result in results) == 1
    assert sum(isinstance(result, TaskBusy) for result in results) == 19
    await runner.drain(60)


async def test_a_responder_that_breaks_ends_its_turn_only(brain: Brain) -> None:
    responder = scripted("half an ans", RuntimeError("secret detail"))
    responder.go.set()
    runner = TurnRunner(brain, responder, Activity(), desk=no_desk)
    seen = await events(await runner.start(HELLO))
    assert [kind for kind, _ in seen] == [
        "thread_lifecycle",
        "content_block_start",
        "text_delta",
        "content_block_stop",
        "thread_lifecycle",
        "error",
    ]
    assert seen[-2][1]["phase"] == "errored"
    assert set(seen[-1][1]) == {"error", "message", "details"}
    assert seen[-1][1]["error"] == "INTERNAL_ERROR"
    assert "secret detail" not in str(seen)
    assert await stored(brain) == ("failed", ["hello", "half an ans"])


async def test_an_end_that_cannot_be_stored_is_not_announced_as_completed(
    brain: Brain, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full_disk(*_args: object, **_kwargs: object) -> None:
        raise BrainFailed("The brain refused the operation: disk full.")

    responder = scripted()
    responder.go.set()
    runner = TurnRunner(brain, responder, Activity(), desk=no_desk)
    monkeypatch.setattr(brain, "finish_turn", full_disk)
    seen = await events(await runner.start(HELLO))
    assert seen[-1] == (
        "error",
        {"error": "BRAIN_FAILED", "message": "The brain refused the operation: disk full.", "details": {}},
    )
    assert "usage" not in [kind for kind, _ in seen]
    monkeypatch.undo()
    assert (await events(await runner.start(HELLO)))[-1][1]["phase"] == "completed"


class TestDrain:
    async def test_waits_for_turns_in_flight_and_refuses_new_ones(self, brain: Brain) -> None:
        responder = scripted()
        runner = TurnRunner(brain, responder, Activity(), desk=no_desk)
        turn = await runner.start(HELLO)
        await responder.waiting.wait()
        draining = asyncio.create_task(runner.drain(60))
        runner.refuse_new_turns()
        with pytest.raises(Draining):
            await runner.start(TurnRequest("another task", "hello"))
        assert not draining.done()
        responder.go.set()
        assert await draining == 0
        assert (await events(turn))[-1][1]["phase"] == "completed"

    async def test_interrupts_what_is_left_and_says_so_to_listener_and_brain(self, brain: Brain) -> None:
        responder = scripted()
        activity = Activity()
        runner = TurnRunner(brain, responder, activity, desk=no_desk)
        turn = await runner.start(HELLO)
        await responder.waiting.wait()
        assert await runner.drain(0) == 1
        seen = await events(turn)
        assert [kind for kind, _ in seen] == [
            "thread_lifecycle",
            "content_block_start",
            "text_delta",
            "text_delta",
            "content_block_stop",
            "thread_lifecycle",
            "error",
        ]
        assert seen[-1][1]["error"] == "TURN_INTERRUPTED"
        assert await stored(brain) == ("interrupted", ["hello", "one two"])
        assert activity.in_flight == 0

    async def test_a_turn_not_stored_yet_is_interrupted_too(
        self, brain: Brain, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reached = asyncio.Event()

        async def hanging(*_args: object) -> int:
            reached.set()
            await asyncio.Event().wait()
            raise AssertionError

        monkeypatch.setattr(brain, "begin_turn", hanging)
        runner = TurnRunner(brain, scripted(), Activity(), desk=no_desk)
        starting = asyncio.create_task(runner.start(HELLO))
        await reached.wait()
        assert await runner.drain(0) == 1
        with pytest.raises(TurnInterrupted):
            await starting


class TestActivity:
    async def test_a_turn_is_in_flight_from_its_acceptance_to_its_end(self, brain: Brain) -> None:
        clock = Clock(100.0)
        activity = Activity(clock)
        clock.now = 160.0
        assert activity.snapshot() == {"in_flight": 0, "idle_seconds": 60.0}
        responder = scripted()
        runner = TurnRunner(brain, responder, activity, desk=no_desk)
        starting = asyncio.create_task(runner.start(HELLO))
        await asyncio.sleep(0)
        assert activity.snapshot() == {"in_flight": 1, "idle_seconds": 0.0}
        await starting
        clock.now = 200.0
        responder.go.set()
        await runner.drain(60)
        clock.now = 230.0
        assert activity.snapshot() == {"in_flight": 0, "idle_seconds": 30.0}

    async def test_a_refused_turn_is_no_activity(self, brain: Brain) -> None:
        clock = Clock(100.0)
        activity = Activity(clock)
        clock.now = 160.0
        runner = TurnRunner(brain, scripted(), activity, desk=no_desk)
        with pytest.raises(MessageNotFound):
            await runner.start(TurnRequest("task", "hello", replaces_message_id="unknown"))
        assert activity.snapshot() == {"in_flight": 0, "idle_seconds": 60.0}
