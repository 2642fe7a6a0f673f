from __future__ import annotations

import pytest

from engine.responder import LocalResponder, Prompt, Usage
from tests.unit.engine.engine_fakes import FakeDesk


async def answer(message: str, turn_number: int = 1) -> tuple[list[str], Usage, list[float]]:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    items = [item async for item in LocalResponder(sleep).respond(Prompt("task", turn_number, message), FakeDesk())]
    usage = items.pop()
    assert isinstance(usage, Usage)
    return [item for item in items if isinstance(item, str)], usage, slept


async def test_says_what_it_is_counts_the_turn_and_echoes() -> None:
    pieces, usage, slept = await answer("good  morning\nworld", 3)
    text = "".join(pieces)
    assert text.startswith("[local responder]")
    assert "turn 3" in text
    assert text.endswith("You said: good  morning\nworld")
    assert len(pieces) > 1
    assert usage == Usage(3, len(text.split()), 0)
    assert slept == []


async def test_is_deterministic() -> None:
    assert await answer("same") == await answer("same")


async def test_a_huge_message_is_not_a_huge_answer() -> None:
    pieces, usage, _ = await answer("x " * 400_000)
    assert sum(map(len, pieces)) < 3_000
    assert usage.input_tokens == 400_000


@pytest.mark.parametrize(
    ("message", "sleeps"),
    [
        ("/slow 5", [2.0, 2.0, 1.0]),
        ("/slow 2 and some words", [2.0]),
        ("/slow 0.5", [0.5]),
        ("/slow 0", [0.0]),
        ("/slow 999999", [2.0] * 150),
        ("/slow", []),
        ("/slowly 5", []),
        ("/slow -5", []),
        ("/slow 5x", []),
        ("please /slow 5", []),
    ],
)
async def test_slow_turns(message: str, sleeps: list[float]) -> None:
    pieces, _, slept = await answer(message)
    assert slept == sleeps
    assert "".join(pieces).endswith(f"You said: {message}")


async def test_a_slow_turn_says_something_before_it_waits() -> None:
    responder = LocalResponder()
    stream = responder.respond(Prompt("task", 1, "/slow 300"), FakeDesk())
    first = await anext(stream)
    assert isinstance(first, str)
    assert "slow turn of 300 s" in first


async def test_a_tool_on_request() -> None:
    desk = FakeDesk(results={"bash": "hello"})
    prompt = Prompt("task", 3, '/tool bash {"command": "echo hello"}')
    items = [item async for item in LocalResponder().respond(prompt, desk)]
    assert desk.calls == [("local-3", "bash", '{"command": "echo hello"}')]
    assert "".join(item for item in items if isinstance(item, str)).endswith("It said: hello")


async def test_no_tool_where_a_direct_answer_is_wanted() -> None:
    desk = FakeDesk()
    prompt = Prompt("task", 1, "/tool bash {}", direct=True)
    assert [item async for item in LocalResponder().respond(prompt, desk)]
    assert desk.calls == []


def test_says_what_is_missing_for_a_model() -> None:
    assert "LLM_MODEL is not set" in LocalResponder(missing="LLM_MODEL").health()["detail"]
