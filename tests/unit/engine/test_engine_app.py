from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx
import pytest

from engine import catalog, key_store
from engine.app import EngineApp
from engine.brain import Brain
from engine.errors import BrainCorrupt, CatalogError
from engine.keys import KeyRecord, Keyring
from engine.responder import Usage
from engine.sandbox import Sandbox
from engine.settings import Settings
from tests.unit.engine.engine_fakes import ScriptedResponder, parse_events, sha256

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

KEY, NEW_KEY = "sk-sept-first", "sk-sept-second"
AUTH = {"X-Engine-Key": KEY}
TURN = {"message": "hello", "task_id": "task"}


class Engine:
    """An application on a brain of its own, and a client for it."""

    def __init__(self, directory: Path) -> None:
        self.settings = Settings(
            key_hash=sha256(KEY),
            key_generation=1,
            brain_path=directory / "brain.sqlite",
            catalog_dir=Path(catalog.__file__).parent / "catalog",
            host="127.0.0.1",
            port=0,
            image="september-engine:1.2",
            log_level="info",
        )
        self.responder = ScriptedResponder(["one ", "two", Usage(1, 2)])
        self.responder.go.set()
        self.brain = Brain(self.settings.brain_path)
        self.rebuild(self.settings)

    def rebuild(self, settings: Settings) -> None:
        keyring = Keyring(KeyRecord(settings.key_hash, settings.key_generation))
        self.app = EngineApp(settings, keyring, self.brain, self.responder, Sandbox("no-such-bwrap"))
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app=self.app), base_url="http://engine")

    async def get(self, path: str, **headers: str) -> httpx.Response:
        return await self.client.get(path, headers=headers or AUTH)

    async def post(self, path: str, body: object, *, key: str = KEY) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.client.post(path, content=content, headers={"X-Engine-Key": key})

    async def rotate(self, key: str, generation: int, overlap: float = 0, *, using: str = KEY) -> httpx.Response:
        body = {"key_hash": sha256(key), "generation": generation, "overlap_seconds": overlap}
        return await self.post("/admin/key", body, key=using)


@pytest.fixture
async def starting(tmp_path: Path) -> AsyncIterator[Engine]:
    engine = Engine(tmp_path)
    yield engine
    await engine.client.aclose()
    await engine.app.close()
    await engine.brain.close()


@pytest.fixture
async def engine(starting: Engine) -> Engine:
    await starting.app.boot()
    return starting


def error(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "message", "details"}
    assert body["error"] == code
    assert isinstance(body["message"], str)
    assert isinstance(body["details"], dict)
    details: dict[str, Any] = body["details"]
    return details


class TestHealth:
    async def test_ready(self, engine: Engine) -> None:
        response = await engine.client.get("/health")
        assert response.status_code == 200
        body = response.json()
        assert set(body) == {"status", "uptime_seconds", "subsystems"}
        assert body["status"] == "ok"
        assert isinstance(body["uptime_seconds"], float)
        subsystems = body["subsystems"]
        assert subsystems["brain"] == {
            "status": "ok",
            "schema_version": 2,
            "interrupted_turns": 0,
            "integrity": "ok",
        }
        assert (subsystems["catalog"]["status"], subsystems["catalog"]["agents"]) == ("ok", 4)
        assert subsystems["llm"]["status"] == "ok"
        assert subsystems["engine"]["image"] == "september-engine:1.2"
        assert set(subsystems["activity"]) == {"in_flight", "idle_seconds"}
        assert subsystems["activity"]["in_flight"] == 0

    async def test_starting_and_draining_are_not_ok(self, starting: Engine) -> None:
        before = await starting.client.get("/health")
        assert (before.status_code, before.json()["status"]) == (503, "starting")
        details = error(await starting.post("/execute", TURN), 503, "STARTING")
        assert details == {}
        await starting.app.boot()
        starting.app.begin_drain()
        after = await starting.client.get("/health")
        assert (after.status_code, after.json()["status"]) == (503, "draining")

    async def test_a_stop_during_the_start_is_not_undone_by_its_end(self, starting: Engine) -> None:
        starting.app.begin_drain()
        await starting.app.boot()
        assert (await starting.client.get("/health")).json()["status"] == "draining"

    async def test_other_methods(self, engine: Engine) -> None:
        assert (await engine.client.head("/health")).status_code == 200
        response = await engine.client.post("/health")
        error(response, 405, "METHOD_NOT_ALLOWED")
        assert response.headers["allow"] == "GET"

    async def test_a_refusing_brain_shows(self, engine: Engine) -> None:
        engine.brain.failure = "disk full"
        brain = (await engine.client.get("/health")).json()["subsystems"]["brain"]
        assert (brain["status"], brain["detail"]) == ("error", "disk full")

    async def test_no_catalog(self, engine: Engine) -> None:
        engine.rebuild(replace(engine.settings, catalog_dir=None))
        await engine.app.boot()
        body = (await engine.client.get("/health")).json()
        assert body["status"] == "ok"
        assert body["subsystems"]["catalog"]["status"] == "empty"


class TestKeyCheck:
    @pytest.mark.parametrize("path", ["/execute", "/skills", "/history/x", "/admin/key", "/nothing", "/", "/health/"])
    @pytest.mark.parametrize("key", ["", "wrong", KEY + " x", sha256(KEY)])
    async def test_comes_before_everything_else(self, engine: Engine, path: str, key: str) -> None:
        for method in ("GET", "POST", "DELETE"):
            response = await engine.client.request(method, path, content=b"not json", headers={"X-Engine-Key": key})
            error(response, 401, "INVALID_KEY")
            assert KEY not in response.text

    async def test_missing_or_repeated(self, engine: Engine) -> None:
        error(await engine.client.get("/skills"), 401, "INVALID_KEY")
        twice = await engine.client.get("/skills", headers=[("X-Engine-Key", "wrong"), ("X-Engine-Key", KEY)])
        error(twice, 401, "INVALID_KEY")

    async def test_unknown_paths_and_methods_after_it(self, engine: Engine) -> None:
        for path in ("/nothing", "/", "/execute/", "/skills/", "/history/", "/history", "/health/"):
            error(await engine.get(path), 404, "NOT_FOUND")
        response = await engine.get("/execute")
        error(response, 405, "METHOD_NOT_ALLOWED")
        assert response.headers["allow"] == "POST"


class TestExecute:
    async def test_a_turn_and_its_history(self, engine: Engine) -> None:
        response = await engine.post("/execute", TURN)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert [kind for kind, _ in parse_events(response.content)][-1] == "thread_lifecycle"
        history = (await engine.get("/history/task")).json()
        assert [message["content"] for message in history["messages"]] == ["hello", "one two"]

    async def test_edit_replaces_history(self, engine: Engine) -> None:
        await engine.post("/execute", TURN)
        message_id = (await engine.get("/history/task")).json()["messages"][0]["message_id"]
        await engine.post("/execute", {**TURN, "message": "better", "edit_message_id": message_id})
        history = (await engine.get("/history/task?limit=1000")).json()
        assert [message["content"] for message in history["messages"]] == ["better", "one two"]
        missing = await engine.post("/execute", {**TURN, "retry_message_id": message_id})
        assert error(missing, 404, "MESSAGE_NOT_FOUND") == {"message_id": message_id}

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"[]",
            b"null",
            b'"x"',
            b"\xff\xfe",
            b'{"message": "\\ud800", "task_id": "t"}',
            b'{"message": NaN, "task_id": "t"}',
            b"[" * 100_000,
            b'{"message": "x"}',
            b'{"message": "x", "task_id": "t", "extra": 1}',
        ],
    )
    async def test_a_wrong_body_is_400_and_starts_nothing(self, engine: Engine, body: bytes) -> None:
        error(await engine.post("/execute", body), 400, "INVALID_REQUEST")
        assert engine.responder.prompts == []

    async def test_a_huge_body_is_413_announced_or_not(self, engine: Engine) -> None:
        async def endless() -> AsyncIterator[bytes]:
            for _ in range(20):
                yield b" " * 100_000

        limit = 1024 * 1024
        assert error(await engine.post("/execute", b" " * (limit + 1)), 413, "PAYLOAD_TOO_LARGE") == {"limit": limit}
        unannounced = await engine.client.post("/execute", content=endless(), headers=AUTH)
        error(unannounced, 413, "PAYLOAD_TOO_LARGE")
        error(await engine.post("/execute", b" " * limit), 400, "INVALID_REQUEST")

    async def test_draining_refuses_turns_but_not_reads(self, engine: Engine) -> None:
        await engine.post("/execute", TURN)
        engine.app.begin_drain()
        response = await engine.post("/execute", TURN)
        error(response, 503, "DRAINING")
        assert "retry-after" in response.headers
        assert (await engine.get("/history/task")).status_code == 200

    async def test_reads_and_refusals_are_no_activity(self, engine: Engine) -> None:
        async def idle() -> float:
            activity = (await engine.client.get("/health")).json()["subsystems"]["activity"]
            seconds: float = activity["idle_seconds"]
            return seconds

        first = await idle()
        await engine.get("/skills")
        await engine.get("/history/none")
        await engine.post("/execute", {})
        await engine.post("/execute", TURN, key="wrong")
        await engine.rotate(NEW_KEY, 2, 60)
        assert await idle() >= first
        idle_before_turn = await idle()
        engine.app._activity._idle_since -= 100
        await engine.post("/execute", TURN)
        assert await idle() < idle_before_turn + 100

    async def test_nobody_is_told_why_the_engine_failed_but_the_log_is(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def broken(*_args: object) -> None:
            raise RuntimeError("inner detail")

        monkeypatch.setattr(engine.brain, "history", broken)
        with caplog.at_level(logging.ERROR):
            response = await engine.get("/history/task")
        error(response, 500, "INTERNAL_ERROR")
        assert "inner detail" not in response.text
        assert "inner detail" in caplog.text


async def test_history_of_odd_names(engine: Engine) -> None:
    for task_id in ("a/b", "ü 🙂", "%2F", "a?b", "a#b", "/"):
        await engine.post("/execute", {"message": "hi", "task_id": task_id})
        assert (await engine.get("/history/" + quote(task_id, safe=""))).json()["task_id"] == task_id


async def test_history_refusals(engine: Engine) -> None:
    error(await engine.get("/history/unknown"), 404, "TASK_NOT_FOUND")
    assert error(await engine.get("/history/a?limit=x"), 400, "INVALID_REQUEST") == {"field": "limit"}


async def test_skills(engine: Engine) -> None:
    listed = (await engine.get("/skills")).json()["skills"]
    assert {skill["name"] for skill in listed} >= {"summarize", "review-code"}
    assert all(skill["read_only"] for skill in listed)
    one = (await engine.get("/skills/summarize")).json()
    assert one["instructions"]
    assert error(await engine.get("/skills/nope"), 404, "SKILL_NOT_FOUND") == {"name": "nope"}


class TestRotation:
    async def works(self, engine: Engine, key: str) -> bool:
        return (await engine.get("/skills", **{"X-Engine-Key": key})).status_code == 200

    async def test_with_overlap_both_keys_work(self, engine: Engine) -> None:
        response = await engine.rotate(NEW_KEY, 2, 60)
        assert (response.status_code, response.content) == (204, b"")
        assert await self.works(engine, KEY)
        assert await self.works(engine, NEW_KEY)

    async def test_without_overlap_the_old_one_is_refused_at_once(self, engine: Engine) -> None:
        assert (await engine.rotate(NEW_KEY, 2)).status_code == 204
        assert not await self.works(engine, KEY)
        assert await self.works(engine, NEW_KEY)

    async def test_is_durable_before_it_is_confirmed(self, engine: Engine) -> None:
        await engine.rotate(NEW_KEY, 2, 60)
        stored = key_store.read(engine.settings.brain_path.parent / ".engine-key.json")
        assert stored is not None
        assert (stored.key_hash, stored.generation, len(stored.retired)) == (sha256(NEW_KEY), 2, 1)

    async def test_generations(self, engine: Engine) -> None:
        await engine.rotate(NEW_KEY, 5, 60)
        assert error(await engine.rotate("x", 4), 409, "STALE_GENERATION") == {"generation": 5}
        assert error(await engine.rotate("x", 5), 409, "STALE_GENERATION") == {"generation": 5}
        assert (await engine.rotate(NEW_KEY, 5, 0)).status_code == 204
        assert await self.works(engine, KEY)

    async def test_what_cannot_be_stored_is_not_in_force(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        def full_disk(_descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full_disk)
        error(await engine.rotate(NEW_KEY, 2), 500, "INTERNAL_ERROR")
        monkeypatch.undo()
        assert await self.works(engine, KEY)
        assert not await self.works(engine, NEW_KEY)

    async def test_needs_a_key_and_a_right_body(self, engine: Engine) -> None:
        error(await engine.rotate(NEW_KEY, 2, using="wrong"), 401, "INVALID_KEY")
        error(await engine.post("/admin/key", {"key_hash": "x"}), 400, "INVALID_REQUEST")
        assert not (engine.settings.brain_path.parent / ".engine-key.json").exists()

    async def test_no_key_or_hash_in_the_log(self, engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.DEBUG):
            await engine.rotate(NEW_KEY, 2, 60)
            await engine.rotate(KEY, 1)
            await engine.get("/skills", **{"X-Engine-Key": "sk-sept-wrong"})
        printed = caplog.text + repr([vars(record) for record in caplog.records])
        for secret in (KEY, NEW_KEY, sha256(KEY), sha256(NEW_KEY), "sk-sept-wrong"):
            assert secret not in printed


class TestBoot:
    async def test_a_wrong_catalog_stops_it(self, starting: Engine, tmp_path: Path) -> None:
        (tmp_path / "core_soul.json").write_text("{")
        starting.rebuild(replace(starting.settings, catalog_dir=tmp_path))
        with pytest.raises(CatalogError, match="core_soul"):
            await starting.app.boot()

    async def test_a_damaged_brain_stops_it(self, tmp_path: Path) -> None:
        (tmp_path / "brain.sqlite").write_text("no database " * 100)
        engine = Engine(tmp_path)
        with pytest.raises(BrainCorrupt):
            await engine.app.boot()
        assert (await engine.client.get("/health")).json()["status"] == "starting"
        await engine.client.aclose()
        await engine.brain.close()
