"""The model's client against a real HTTP server that speaks the protocol: well, slowly, brokenly, too often asked."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from engine.catalog import Catalog
from engine.errors import ContextOverflow, EngineError, LlmProviderError, LlmRateLimited
from engine.llm import RETRY_AFTER_MAX_S, LlmClient
from engine.model import MAX_ROUNDS, ModelResponder
from engine.responder import Prompt, Thinking, ToolSpec, Usage
from engine.settings import LlmSettings
from tests.fake_llm import FakeLlm, Script, answer, refusal, tool
from tests.unit.engine.engine_fakes import FakeDesk

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

KEY = "sk-live-key-of-the-provider"
SPEC = ToolSpec("bash", "Runs a command.", {"type": "object", "properties": {"command": {"type": "string"}}})


class World:
    """A provider, an engine's responder for it, and what the responder slept between its tries."""

    def __init__(self, provider: FakeLlm, **settings: Any) -> None:
        self.provider = provider
        self.slept: list[float] = []
        self.settings = LlmSettings(**{"base_url": provider.url, "model": "m", "api_key": KEY, **settings})
        self.catalog = Catalog()
        self.responder = ModelResponder(self.settings, self.catalog, LlmClient(self.settings, self._sleep))
        self.desk = FakeDesk()

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    async def ask(self, message: str = "hello", **prompt: Any) -> list[str | Thinking | Usage]:
        return [item async for item in self.responder.respond(Prompt("task", 1, message, **prompt), self.desk)]

    async def fails(self, kind: type[EngineError]) -> EngineError:
        with pytest.raises(kind) as caught:
            await self.ask()
        for secret in (KEY, "sk-live-shown-by-provider"):
            assert secret not in caught.value.message + json.dumps(caught.value.details)
            assert secret not in json.dumps(self.responder.health())
        return caught.value


@pytest.fixture
async def world() -> AsyncIterator[Callable[..., Any]]:
    providers: list[FakeLlm] = []
    worlds: list[World] = []

    async def make(*script: Script, **settings: Any) -> World:
        provider = await FakeLlm(*script).__aenter__()
        providers.append(provider)
        worlds.append(World(provider, **settings))
        return worlds[-1]

    yield make
    for made in worlds:
        await made.responder.close()
    for provider in providers:
        await provider.__aexit__()


def text(items: list[str | Thinking | Usage]) -> str:
    return "".join(item for item in items if isinstance(item, str))


async def test_an_answer_as_it_comes(world: Callable[..., Any]) -> None:
    made = await world(answer("one ", "two 🙂"))
    assert made.responder.health()["detail"] == "not asked yet"
    assert await made.ask() == ["one ", "two 🙂", Usage(10, 2, 4)]
    (body,) = made.provider.bodies
    assert (body["model"], body["stream"], body["max_tokens"]) == ("m", True, 4096)
    assert body["messages"][-1] == {"role": "user", "content": "hello"}
    assert "tools" not in body
    assert made.provider.headers[0]["authorization"] == f"Bearer {KEY}"
    assert made.responder.health() == {
        "status": "ok",
        "provider": "openai-compatible",
        "host": "127.0.0.1",
        "model": "m",
    }


async def test_without_a_key_none_is_sent(world: Callable[..., Any]) -> None:
    made = await world(answer("hi"), api_key=None)
    await made.ask()
    assert "authorization" not in made.provider.headers[0]


async def test_words_arrive_before_the_answer_is_whole(world: Callable[..., Any]) -> None:
    rest = asyncio.Event()
    made = await world([{"delta": {"content": "first"}}, {"wait": rest}, *answer("second")])
    stream = made.responder.respond(Prompt("task", 1, "hello"), made.desk)
    assert await anext(stream) == "first"
    rest.set()
    assert text([item async for item in stream]) == "second"


async def test_thoughts_are_no_part_of_the_answer(world: Callable[..., Any]) -> None:
    made = await world([{"delta": {"reasoning_content": "hm"}}, *answer("yes")])
    assert (await made.ask())[:2] == [Thinking("hm"), "yes"]


async def test_the_history_and_who_it_is(world: Callable[..., Any]) -> None:
    made = await world(answer("hi"))
    made.catalog.soul = {"identity": "You are Ada.", "values": ["Be kind."], "patterns": []}
    made.catalog.skills = {"short": {"name": "short", "description": "Shortens.", "instructions": "Use ten words."}}
    made.desk.past = [
        {"role": "user", "content": "before", "media": []},
        {"role": "assistant", "content": "then", "media": []},
    ]
    await made.ask("/short this", media=[{"type": "image/png", "data": "QUJD"}, {"type": "audio"}])
    system, *past, last = made.provider.bodies[0]["messages"]
    assert "You are Ada." in system["content"]
    assert "Use ten words." in system["content"]
    assert [message["content"] for message in past] == ["before", "then"]
    assert [part["type"] for part in last["content"]] == ["text", "image_url", "text"]
    assert last["content"][1]["image_url"]["url"] == "data:image/png;base64,QUJD"


async def test_a_history_too_long_loses_its_beginning_and_says_so(world: Callable[..., Any]) -> None:
    made = await world(answer("hi"), context_tokens=1000, max_tokens=100)
    made.desk.past = [
        {"role": role, "content": f"{number} " + "x" * 1000, "media": []}
        for number in range(3)
        for role in ("user", "assistant")
    ]
    await made.ask()
    kept = [message["content"][0] for message in made.provider.bodies[0]["messages"][1:-1]]
    assert kept == ["2", "2"]
    assert made.desk.events == [("compaction_event", {"dropped_messages": 4, "kept_messages": 2})]


class TestTools:
    async def test_a_tool_and_then_the_answer(self, world: Callable[..., Any]) -> None:
        made = await world(tool("bash", '{"comm', 'and": "ls"}'), answer("done"))
        made.desk.specs, made.desk.results = [SPEC], {"bash": "file.txt"}
        items = await made.ask()
        assert text(items) == "done"
        assert made.desk.calls == [("call_1", "bash", '{"command": "ls"}')]
        first, second = made.provider.bodies
        assert first["tools"][0]["function"]["name"] == "bash"
        assert second["messages"][-2]["tool_calls"][0]["function"]["arguments"] == '{"command": "ls"}'
        assert second["messages"][-1] == {"role": "tool", "tool_call_id": "call_1", "content": "file.txt"}

    async def test_several_at_once_in_their_order(self, world: Callable[..., Any]) -> None:
        calls = [
            {"index": number, "id": f"c{number}", "function": {"name": "bash", "arguments": "{}"}} for number in (1, 0)
        ]
        made = await world([{"delta": {"tool_calls": calls}, "finish": "tool_calls"}, {"done": True}], answer("ok"))
        made.desk.specs, made.desk.results = [SPEC], {"bash": "x"}
        await made.ask()
        assert [call_id for call_id, _, _ in made.desk.calls] == ["c0", "c1"]

    async def test_a_model_that_never_ends_is_made_to_speak(self, world: Callable[..., Any]) -> None:
        made = await world(tool("bash", "{}"))
        made.desk.specs, made.desk.results = [SPEC], {"bash": "again"}
        await made.ask()
        assert len(made.desk.calls) == MAX_ROUNDS - 1
        assert "tools" not in made.provider.bodies[-1]


class TestTryingAgain:
    async def test_an_outage_that_passes(self, world: Callable[..., Any]) -> None:
        made = await world(refusal(503), [{"hang_up": True}], answer("back"))
        assert text(await made.ask()) == "back"
        assert len(made.slept) == 2
        assert 0 < made.slept[0] <= 0.5 < 2 * made.slept[1] <= 2
        assert made.responder.health()["status"] == "ok"

    async def test_an_outage_that_does_not(self, world: Callable[..., Any]) -> None:
        made = await world(refusal(500), max_retries=2)
        error = await made.fails(LlmProviderError)
        assert (error.details["status"], error.details["attempts"], len(made.provider.bodies)) == (500, 3, 3)
        health = made.responder.health()
        assert (health["status"], health["last_error"]["error"]) == ("degraded", "LLM_PROVIDER_ERROR")

    async def test_as_long_as_the_provider_asks_but_not_for_ever(self, world: Callable[..., Any]) -> None:
        made = await world(
            refusal(429, "rate_limit_exceeded", retry_after="7"),
            refusal(429, "rate_limit_exceeded", retry_after="86400"),
            answer("ok"),
        )
        assert text(await made.ask()) == "ok"
        assert made.slept == [7.0, RETRY_AFTER_MAX_S]

    async def test_rate_limited_to_the_end(self, world: Callable[..., Any]) -> None:
        made = await world(refusal(429, "rate_limit_exceeded"), max_retries=1)
        error = await made.fails(LlmRateLimited)
        assert (error.code, error.details["attempts"]) == ("LLM_RATE_LIMITED", 2)

    @pytest.mark.parametrize(
        ("script", "kind"),
        [
            (refusal(401, "invalid_api_key"), LlmProviderError),
            (refusal(404, "model_not_found"), LlmProviderError),
            (refusal(429, "insufficient_quota"), LlmRateLimited),
            (refusal(400, "context_length_exceeded"), ContextOverflow),
        ],
    )
    async def test_what_will_not_get_better_is_not_tried_again(
        self, world: Callable[..., Any], script: Script, kind: type[EngineError]
    ) -> None:
        made = await world(script)
        await made.fails(kind)
        assert len(made.provider.bodies) == 1
        assert made.slept == []

    async def test_an_endpoint_without_the_usage_option(self, world: Callable[..., Any]) -> None:
        made = await world(refusal(400, "unknown_parameter"), answer("ok", usage=False))
        assert await made.ask() == ["ok", Usage(0, 0)]
        assert ["stream_options" in body for body in made.provider.bodies] == [True, False]
        assert made.slept == []

    async def test_nobody_there(self, world: Callable[..., Any]) -> None:
        made = await world(answer("x"), base_url="http://127.0.0.1:1/v1", max_retries=1)
        error = await made.fails(LlmProviderError)
        assert error.details["attempts"] == 2


class TestBroken:
    @pytest.mark.parametrize(
        "rest",
        [
            [{"hang_up": True}],
            [],
            [{"raw": "data: {not json\n\n"}],
            [{"raw": 'data: ["no object"]\n\n'}],
            [{"raw": 'data: {"choices": "no list"}\n\n'}],
            [{"raw": 'data: {"choices": [{"delta": {"content": 5}}]}\n\n'}],
            [{"raw": 'data: {"error": {"message": "sk-live-shown-by-provider", "code": "overloaded"}}\n\n'}],
        ],
    )
    async def test_in_the_middle_of_an_answer(self, world: Callable[..., Any], rest: Script) -> None:
        made = await world([{"delta": {"content": "half"}}, *rest])
        error = await made.fails(LlmProviderError)
        assert error.details["partial"] is True
        assert len(made.provider.bodies) == 1

    async def test_a_silent_provider(self, world: Callable[..., Any]) -> None:
        never = asyncio.Event()
        made = await world([{"wait": never}], timeout_s=0.2, max_retries=0)
        error = await made.fails(LlmProviderError)
        assert "said nothing" in error.message
        never.set()

    async def test_a_line_without_an_end(self, world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("engine.llm.MAX_EVENT_BYTES", 1000)
        made = await world([{"raw": "data: " + "x" * 5000}])
        error = await made.fails(LlmProviderError)
        assert "without an end" in error.message

    async def test_comments_and_empty_lines_are_skipped(self, world: Callable[..., Any]) -> None:
        made = await world([{"raw": ": keep-alive\n\n\r\nevent: x\n"}, *answer("ok")])
        assert text(await made.ask()) == "ok"
