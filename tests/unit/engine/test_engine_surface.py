"""Replay, a human in the loop, tools, memory, skills and quiescing, over the application's HTTP surface."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from engine.replay import ReplayBuffer
from engine.responder import LocalResponder
from tests.unit.engine.engine_fakes import Clock, parse_events
from tests.unit.engine.test_engine_app import TURN, Engine, error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import httpx

GIVE_UP_S = 60.0


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    """With the real local responder, which uses a tool when it is told to."""
    engine = Engine(tmp_path)
    engine.responder = LocalResponder()  # type: ignore[assignment]  # a responder as good as the scripted one
    engine.rebuild(engine.settings)
    await engine.app.boot()
    yield engine
    engine.app.begin_drain()
    await engine.app.drain(0)
    await engine.client.aclose()
    await engine.app.close()
    await engine.brain.close()


def kinds(response: httpx.Response) -> list[str]:
    return [kind for kind, _ in parse_events(response.content)]


def of_kind(response: httpx.Response, kind: str) -> dict[str, Any]:
    (found,) = [data for name, data in parse_events(response.content) if name == kind]
    return found


async def put(engine: Engine, method: str, path: str, body: object = None) -> httpx.Response:
    content = b"" if body is None else json.dumps(body).encode()
    return await engine.client.request(method, path, content=content, headers={"X-Engine-Key": "sk-sept-first"})


async def pending(engine: Engine) -> dict[str, Any]:
    """Waits until something waits for a person."""
    async with asyncio.timeout(GIVE_UP_S):
        while True:
            waiting: list[dict[str, Any]] = (await engine.get("/hitl/pending")).json()["pending"]
            if waiting:
                return waiting[0]
            await asyncio.sleep(0.01)


async def in_flight(engine: Engine) -> None:
    """Waits until a turn has been taken, whether or not it has begun."""
    async with asyncio.timeout(GIVE_UP_S):
        while not (await engine.client.get("/health")).json()["subsystems"]["activity"]["in_flight"]:  # noqa: ASYNC110 - seen from outside
            await asyncio.sleep(0)


WRITE = {"message": '/tool write_file {"path": "notes/a.txt", "content": "hello"}', "task_id": "task"}
READ = {"message": '/tool read_file {"path": "notes/a.txt"}', "task_id": "task"}


class TestHitl:
    async def test_a_permission_pauses_the_turn_and_lets_it_go_on(self, engine: Engine) -> None:
        turn = asyncio.create_task(engine.post("/execute", WRITE))
        question = await pending(engine)
        assert set(question) == {"request_id", "task_id", "kind", "question", "created_at"}
        assert (question["task_id"], question["kind"]) == ("task", "permission")
        details = error(await engine.post("/execute", TURN), 409, "HITL_REQUIRED")
        assert details["request_id"] == question["request_id"]
        answered = await engine.post("/hitl/respond", {"task_id": "task", "answer": "approve"})
        assert (answered.status_code, answered.json()) == (
            200,
            {"status": "resumed", "request_id": question["request_id"]},
        )
        response = await turn
        assert of_kind(response, "hitl_request")["input"] == {"path": "notes/a.txt", "content": "hello"}
        assert of_kind(response, "hitl_resolved")["answer"] == "approve"
        assert of_kind(response, "tool_call")["tool"] == "write_file"
        assert of_kind(response, "tool_result")["output"] == "5 bytes written"
        assert of_kind(await engine.post("/execute", READ), "tool_result")["output"] == "hello"
        assert (await engine.get("/hitl/pending")).json() == {"pending": []}

    async def test_a_refusal_is_told_and_nothing_done(self, engine: Engine) -> None:
        turn = asyncio.create_task(engine.post("/execute", WRITE))
        await pending(engine)
        await engine.post("/hitl/respond", {"task_id": "task", "answer": "Deny", "feedback": "not there"})
        response = await turn
        assert of_kind(response, "tool_result")["error"] == "permission was refused: not there"
        assert kinds(response)[-1] == "thread_lifecycle"
        assert "error" in of_kind(await engine.post("/execute", READ), "tool_result")

    async def test_nothing_pending(self, engine: Engine) -> None:
        answer = {"task_id": "unknown", "answer": "approve"}
        assert error(await engine.post("/hitl/respond", answer), 404, "TASK_NOT_FOUND") == {"task_id": "unknown"}

    @pytest.mark.parametrize(
        "body",
        [{}, {"task_id": "t"}, {"task_id": "t", "answer": "perhaps"}, {"task_id": "t", "answer": True},
         {"task_id": 5, "answer": "yes"}, {"task_id": "t", "answer": "yes", "content_blocks": "x"},
         {"task_id": "t", "answer": "yes", "more": 1}],
    )  # fmt: skip
    async def test_wrong_answers(self, engine: Engine, body: object) -> None:
        error(await engine.post("/hitl/respond", body), 400, "INVALID_REQUEST")

    async def test_nobody_answers(self, engine: Engine) -> None:
        from dataclasses import replace

        engine.rebuild(replace(engine.settings, hitl_timeout_s=0.05))
        await engine.app.boot()
        response = await engine.post("/execute", WRITE)
        assert of_kind(response, "hitl_resolved")["answer"] == "expired"
        assert of_kind(response, "tool_result")["error"] == "nobody gave permission in time"

    async def test_a_stop_does_not_wait_for_a_person(self, engine: Engine) -> None:
        turn = asyncio.create_task(engine.post("/execute", WRITE))
        await pending(engine)
        assert await engine.app.drain(GIVE_UP_S) == 0
        assert of_kind(await turn, "error")["error"] == "TURN_INTERRUPTED"


class TestTools:
    async def test_without_a_sandbox_bash_is_off_and_health_says_why(self, engine: Engine) -> None:
        response = await engine.post("/execute", {"message": '/tool bash {"command": "id"}', "task_id": "t"})
        result = of_kind(response, "tool_result")
        assert (result["output"], "bubblewrap" in result["error"]) == ("", True)
        assert "hitl_request" not in kinds(response)
        health = (await engine.client.get("/health")).json()
        assert health["status"] == "ok"
        assert health["subsystems"]["tools"]["bash"] == {
            "status": "off",
            "detail": "bubblewrap (bwrap) is not installed",
        }
        assert health["subsystems"]["tools"]["read_file"] == {"status": "ok"}

    @pytest.mark.parametrize(
        ("call", "says"),
        [
            ("read_file {", "not valid JSON"),
            ("read_file []", "JSON object"),
            ("read_file {}", "'path' is missing"),
            ('read_file {"path": 5}', "must be a string"),
            ('read_file {"path": "a", "x": 1}', "no argument 'x'"),
            ('read_file {"path": "../../brain.sqlite"}', "inside the workspace"),
            ('memory_search {"query": "x", "store": "all"}', "one of knowledge"),
            ('memory_search {"query": "x", "limit": 0}', "from 1 to 100"),
            ("no_such_tool {}", "does not bring"),
        ],
    )
    async def test_a_wrong_call_is_told_in_its_result(self, engine: Engine, call: str, says: str) -> None:
        response = await engine.post("/execute", {"message": f"/tool {call}", "task_id": "t"})
        assert says in of_kind(response, "tool_result")["error"]
        assert parse_events(response.content)[-1][1]["phase"] == "completed"

    async def test_memory_search(self, engine: Engine) -> None:
        await engine.post("/memory/knowledge", {"title": "Okapi", "content": "a shy animal"})
        response = await engine.post("/execute", {"message": '/tool memory_search {"query": "okapi"}', "task_id": "t"})
        found = json.loads(of_kind(response, "tool_result")["output"])
        assert found["knowledge"][0]["content"] == "a shy animal"


class TestReplay:
    async def test_the_events_of_a_turn_again_and_what_came_after(self, engine: Engine) -> None:
        first = await engine.post("/execute", TURN)
        again = await engine.get("/execute/replay?after=0")
        assert again.headers["content-type"].startswith("text/event-stream")
        blocks = again.text.split("\n\n")[:-1]
        assert "".join(block.split("\n", 1)[1] + "\n\n" for block in blocks) == first.text
        ids = [int(block.split("\n")[0].removeprefix("id: ")) for block in blocks]
        assert ids == sorted(set(ids))
        assert (await engine.get(f"/execute/replay?after={ids[-1]}")).text == ""
        await engine.post("/execute", {**TURN, "task_id": "other"})
        assert (await engine.get(f"/execute/replay?after={ids[-1]}&task_id=task")).text == ""
        assert '"task_id":"other"' in (await engine.get(f"/execute/replay?after={ids[-1]}")).text

    @pytest.mark.parametrize("after", ["-1", "x", "1.5", "٣", "9" * 30, ""])
    async def test_wrong_times(self, engine: Engine, after: str) -> None:
        error(await engine.get(f"/execute/replay?after={after}"), 400, "INVALID_REQUEST")

    async def test_a_turn_lost_with_the_process_is_told(self, engine: Engine) -> None:
        await engine.brain.begin_turn("task", "lost", "hello", [])
        engine.brain.interrupted = [("task", "lost")]  # as the next start finds it
        engine.rebuild(engine.settings)
        await engine.app.boot()
        told = (await engine.get("/execute/replay?after=0")).text
        assert '"phase":"errored","task_id":"task","turn_id":"lost"' in told
        assert "TURN_INTERRUPTED" in told

    def test_a_bound_and_a_clock_that_goes_back(self) -> None:
        clock = Clock(1000)
        buffer = ReplayBuffer(100, lambda: int(clock.now))
        for number in range(20):
            buffer.add("t", b"x" * 10)
            clock.now = 1000 - number
        assert buffer.since(0).count(b"id: ") == 10
        assert buffer.since(1018).count(b"id: ") == 1


class TestQuiesce:
    async def test_the_file_alone_is_the_brain_and_writes_wait(self, engine: Engine) -> None:
        await engine.post("/execute", TURN)
        assert (await engine.post("/admin/quiesce", {"ttl_s": 300})).status_code == 204
        wal = engine.brain.path.with_name("brain.sqlite-wal")
        assert not wal.exists() or wal.stat().st_size == 0
        before = engine.brain.path.read_bytes()
        writing = asyncio.create_task(engine.post("/execute", TURN))
        await in_flight(engine)
        # The brain works in order: a write that did not wait would be seen by this read.
        assert len((await engine.get("/history/task")).json()["turns"]) == 1
        assert not wal.exists() or wal.stat().st_size == 0
        assert (await engine.client.get("/health")).json()["status"] == "ok"
        assert (await engine.post("/admin/quiesce", {"ttl_s": 300})).status_code == 204
        assert engine.brain.path.read_bytes() == before
        assert not writing.done()
        assert (await engine.post("/admin/resume", b"")).status_code == 204
        assert kinds(await writing)[-1] == "thread_lifecycle"

    async def test_ends_by_itself(self, engine: Engine) -> None:
        assert (await engine.post("/admin/quiesce", {"ttl_s": 0.05})).status_code == 204
        assert (await engine.post("/execute", TURN)).status_code == 200

    async def test_not_with_a_turn_in_flight(self, engine: Engine) -> None:
        turn = asyncio.create_task(engine.post("/execute", WRITE))
        await pending(engine)
        assert error(await engine.post("/admin/quiesce", {}), 409, "TURN_IN_FLIGHT") == {"in_flight": 1}
        await engine.post("/hitl/respond", {"task_id": "task", "answer": "no"})
        await turn
        assert (await engine.post("/admin/quiesce", b"")).status_code == 204
        await engine.post("/admin/resume", b"")

    @pytest.mark.parametrize("body", [{"ttl_s": 0}, {"ttl_s": "1"}, {"ttl_s": True}, {"ttl_s": 301}, {"x": 1}])
    async def test_wrong_bodies(self, engine: Engine, body: object) -> None:
        error(await engine.post("/admin/quiesce", body), 400, "INVALID_REQUEST")

    async def test_a_stop_does_not_wait_for_it(self, engine: Engine) -> None:
        await engine.post("/admin/quiesce", {"ttl_s": 300})
        turn = asyncio.create_task(engine.post("/execute", TURN))
        await in_flight(engine)
        assert await engine.app.drain(GIVE_UP_S) == 0
        assert (await turn).status_code == 200


class TestMemory:
    async def test_search(self, engine: Engine) -> None:
        await engine.post("/execute", {**TURN, "message": "where do okapis live"})
        assert (await engine.post("/memory/social", {"name": "Ada", "content": "feeds okapis"})).status_code == 201
        for store, query in (("episodes", "live"), ("social", "ada")):
            results = (await engine.post(f"/memory/{store}/search", {"query": query})).json()["results"]
            assert results, store
        limited = await engine.post("/memory/episodes/search", {"query": "okapis", "limit": 1})
        assert len(limited.json()["results"]) == 1
        assert (await engine.post("/memory/knowledge/search", {"query": "okapis"})).json() == {"results": []}

    @pytest.mark.parametrize(
        "body",
        [{}, {"query": ""}, {"query": 5}, {"query": "x", "limit": 0}, {"query": "x", "limit": 101},
         {"query": "x", "limit": True}, {"query": "x", "limit": "5"}, {"query": "x" * 5000}, {"query": "x", "a": 1}],
    )  # fmt: skip
    async def test_wrong_searches(self, engine: Engine, body: object) -> None:
        error(await engine.post("/memory/knowledge/search", body), 400, "INVALID_REQUEST")

    async def test_soul(self, engine: Engine) -> None:
        soul = (await engine.get("/memory/soul")).json()
        assert set(soul) == {"identity", "values", "patterns"}
        assert soul["identity"].startswith("A careful assistant")
        assert (await engine.get("/memory/soul/full")).json() == soul

    async def test_export_and_import(self, engine: Engine, tmp_path: Path) -> None:
        await engine.post("/execute", TURN)
        bundle = (await engine.get("/memory/export")).json()
        (tmp_path / "other").mkdir()
        other = Engine(tmp_path / "other")
        await other.app.boot()
        imported = (await other.post("/memory/import", bundle)).json()["imported"]
        assert imported["messages"]["added"] == 2
        assert (await other.get("/history/task")).json() == (await engine.get("/history/task")).json()
        error(await other.post("/memory/import", {"kind": "x"}), 400, "INVALID_REQUEST")
        error(await other.post("/memory/import", {**bundle, "version": 99}), 409, "MIGRATION_REQUIRED")
        await other.client.aclose()
        await other.app.close()
        await other.brain.close()


class TestSkills:
    NEW = {"name": "mine", "description": "d", "instructions": "i"}  # noqa: RUF012 - never changed

    async def test_the_users_own(self, engine: Engine) -> None:
        created = await put(engine, "POST", "/skills/create", self.NEW)
        assert (created.status_code, created.json()["read_only"]) == (201, False)
        error(await put(engine, "POST", "/skills/create", self.NEW), 409, "SKILL_EXISTS")
        listed = {skill["name"]: skill["source"] for skill in (await engine.get("/skills")).json()["skills"]}
        assert listed == {"review-code": "platform", "summarize": "platform", "mine": "user"}
        changed = await put(engine, "PUT", "/skills/mine", {"instructions": "better"})
        assert (changed.json()["description"], changed.json()["instructions"]) == ("d", "better")
        assert (await put(engine, "DELETE", "/skills/mine")).status_code == 204
        for method in ("GET", "DELETE"):
            error(await put(engine, method, "/skills/mine"), 404, "SKILL_NOT_FOUND")
        error(await put(engine, "PUT", "/skills/mine", {"description": "x"}), 404, "SKILL_NOT_FOUND")

    async def test_platform_skills_are_read_only(self, engine: Engine) -> None:
        error(await put(engine, "PUT", "/skills/summarize", {"description": "x"}), 403, "PERMISSION_DENIED")
        error(await put(engine, "DELETE", "/skills/summarize"), 403, "PERMISSION_DENIED")
        taken = {**self.NEW, "name": "summarize"}
        error(await put(engine, "POST", "/skills/create", taken), 409, "SKILL_EXISTS")
        whole = (await engine.get("/skills/summarize")).json()
        assert (whole["source"], whole["read_only"]) == ("platform", True)
        assert whole["instructions"]

    @pytest.mark.parametrize(
        "change", [{"name": ""}, {"name": "a b"}, {"name": "create"}, {"name": 5}, {"description": " "}, {"x": 1}]
    )
    async def test_wrong_bodies(self, engine: Engine, change: dict[str, Any]) -> None:
        error(await put(engine, "POST", "/skills/create", {**self.NEW, **change}), 400, "INVALID_REQUEST")
        error(await put(engine, "PUT", "/skills/mine", {}), 400, "INVALID_REQUEST")
