"""The engine as a process with a model behind it: a real HTTP server that speaks the provider's protocol."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.fake_llm import FakeLlm, Script, answer, refusal, tool
from tests.integration.test_engine_process import GIVE_UP_S, EngineProcess, parse_events
from tests.integration.test_engine_process import env as env
from tests.integration.test_engine_process import launch as launch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LLM_KEY = "sk-live-key-of-the-agent-tests"


class Provider:
    """The fake provider in a loop and a thread of its own, since these tests block."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.fake = FakeLlm(answer("unused"))
        self._run(self.fake.__aenter__())

    def _run(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(GIVE_UP_S)

    def says(self, *script: Script) -> None:
        self.fake.script = list(script)

    def close(self) -> None:
        self._run(self.fake.__aexit__())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture
def provider() -> Iterator[Provider]:
    made = Provider()
    yield made
    made.close()


@pytest.fixture
def engine(launch: Callable[..., EngineProcess], provider: Provider) -> EngineProcess:
    return launch(
        LLM_BASE_URL=provider.fake.url, LLM_MODEL="test-model", LLM_API_KEY=LLM_KEY, LLM_MAX_RETRIES="0"
    ).ready()


def test_a_model_answers_and_remembers(engine: EngineProcess, provider: Provider) -> None:
    provider.says(answer("Hello ", "there"))
    events = parse_events(engine.execute("hi").text)
    assert "".join(data["text"] for kind, data in events if kind == "text_delta") == "Hello there"
    assert [data for kind, data in events if kind == "usage"] == [
        {"input_tokens": 10, "output_tokens": 2, "cache_hit_tokens": 4}
    ]
    engine.execute("and again")
    assert [message["content"] for message in provider.fake.bodies[1]["messages"][1:]] == [
        "hi",
        "Hello there",
        "and again",
    ]


def test_an_outage_is_the_turns_and_the_subsystems_never_the_engines(engine: EngineProcess, provider: Provider) -> None:
    provider.says(refusal(503))
    assert parse_events(engine.execute("hi").text)[-1][1]["error"] == "LLM_PROVIDER_ERROR"
    health = engine.health()
    assert (health.status_code, health.json()["status"]) == (200, "ok")
    assert health.json()["subsystems"]["llm"]["status"] == "degraded"
    provider.says(refusal(429, "rate_limit_exceeded"))
    assert parse_events(engine.execute("hi").text)[-1][1]["error"] == "LLM_RATE_LIMITED"
    provider.says(answer("back"))
    assert parse_events(engine.execute("hi").text)[-1][1]["phase"] == "completed"
    assert engine.health().json()["subsystems"]["llm"]["status"] == "ok"


def test_a_tool_with_permission_while_the_caller_is_away(engine: EngineProcess, provider: Provider) -> None:
    provider.says(tool("write_file", '{"path": "a.txt", ', '"content": "from the model"}'), answer("Written."))
    with engine.client.stream("POST", "/execute", json={"message": "write", "task_id": "task"}) as response:
        seen = ""
        for chunk in response.iter_text():
            seen += chunk
            if "hitl_request" in seen:
                break
    (waiting,) = engine.client.get("/hitl/pending").json()["pending"]
    assert waiting["task_id"] == "task"
    answered = engine.client.post("/hitl/respond", json={"task_id": "task", "answer": "approve"})
    assert answered.json() == {"status": "resumed", "request_id": waiting["request_id"]}
    engine.wait_for_log("turn ended")
    replayed = engine.client.get("/execute/replay", params={"after": 0, "task_id": "task"}).text
    assert replayed.count("event: hitl_resolved") == 1
    assert '"output":"14 bytes written"' in replayed
    assert engine.history()["messages"][-1]["content"] == "Written."


def test_the_sandbox_cannot_reach_brain_or_secrets(engine: EngineProcess, provider: Provider, tmp_path: Path) -> None:
    """Or, where there is no sandbox, nothing runs and /health says so."""
    command = f"echo ran; cat {tmp_path}/brain.sqlite {tmp_path}/.engine-key.json; cat /proc/*/environ; ls {tmp_path}"
    provider.says(tool("bash", f'{{"command": "{command}"}}'), answer("done"))
    results: list[dict[str, Any]] = []
    with engine.client.stream("POST", "/execute", json={"message": "look", "task_id": "task"}) as response:
        text = ""
        for chunk in response.iter_text():
            text += chunk
            if "hitl_request" in text and not results:
                engine.client.post("/hitl/respond", json={"task_id": "task", "answer": "approve"})
                results.append({})
    (result,) = [data for kind, data in parse_events(text) if kind == "tool_result"]
    state = engine.health().json()["subsystems"]["tools"]["bash"]
    if state["status"] == "off":
        assert result["output"] == ""
        assert state["detail"] in result["error"]
        return
    assert result["output"].startswith("ran\n")
    assert LLM_KEY not in text
    assert "SQLite format" not in text


def test_nothing_secret_is_printed(launch: Callable[..., EngineProcess], provider: Provider) -> None:
    engine = launch(
        LLM_BASE_URL=provider.fake.url,
        LLM_MODEL="m",
        LLM_API_KEY=LLM_KEY,
        LLM_MAX_RETRIES="0",
        ENGINE_LOG_LEVEL="debug",
    ).ready()
    provider.says(answer("a private answer"))
    engine.execute("a private question")
    provider.says(refusal(401, "invalid_api_key"))
    refused = engine.execute("again").text
    health = engine.health().text
    assert engine.terminate() == 0
    engine._reader.join()
    printed = "".join(engine.raw) + engine.outcome()[1] + health + refused
    for secret in (LLM_KEY, "a private answer", "a private question", "sk-live-shown-by-provider"):
        assert secret not in printed


def test_half_a_configuration_is_the_local_responder_and_says_so(launch: Callable[..., EngineProcess]) -> None:
    engine = launch(LLM_API_KEY=LLM_KEY).ready()
    assert "LLM_BASE_URL is not set" in engine.health().json()["subsystems"]["llm"]["detail"]
    assert "local responder" in engine.execute("hi").text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"LLM_BASE_URL": "not a url", "LLM_MODEL": "m"}, "LLM_BASE_URL"),
        ({"LLM_BASE_URL": "http://x/v1", "LLM_MODEL": "m", "LLM_API_KEY": "a b"}, "LLM_API_KEY"),
        ({"BASH_TIMEOUT_S": "0"}, "BASH_TIMEOUT_S"),
    ],
)
def test_a_bad_setting(launch: Callable[..., EngineProcess], changes: dict[str, str], says: str) -> None:
    code, stderr = launch(**changes).outcome()
    assert (code, stderr.count("\n")) == (2, 1)
    assert says in stderr


def test_a_killed_turn_is_told_by_the_next_start(launch: Callable[..., EngineProcess]) -> None:
    engine = launch().ready()
    with contextlib.suppress(httpx.HTTPError), engine.turn_in_flight("/slow 300"):
        engine.kill()
    again = launch().ready()
    assert "TURN_INTERRUPTED" in again.client.get("/execute/replay?after=0").text
    assert again.health().json()["subsystems"]["brain"]["interrupted_turns"] == 1


def test_what_is_not_used_is_not_imported(launch: Callable[..., EngineProcess]) -> None:
    engine = launch().ready()
    engine.execute("hi")
    with open(f"/proc/{engine.process.pid}/maps") as file:
        assert "orjson" in (maps := file.read())
    for unused in ("pydantic", "aiohttp", "ssl"):
        assert f"/{unused}" not in maps, unused
