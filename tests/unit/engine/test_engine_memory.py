from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from engine import memory, migrate
from engine.brain import Brain
from engine.errors import BundleTooNew, InvalidRequest, PayloadTooLarge

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def brain(tmp_path: Path) -> AsyncIterator[Brain]:
    brain = Brain(tmp_path / "brain.sqlite")
    await brain.opened()
    yield brain
    await brain.close()


async def say(brain: Brain, turn_id: str, message: str, *, task: str = "task", replaces: str | None = None) -> None:
    await brain.begin_turn(task, turn_id, message, [{"type": "image"}], replaces)
    await brain.finish_turn(turn_id, "completed", f"Answer to {turn_id}")


async def find(brain: Brain, store: str, query: str, limit: int = 20) -> list[dict[str, Any]]:
    return await brain.read(lambda db: memory.search(db, store, query, limit))


async def exported(brain: Brain) -> dict[str, Any]:
    bundle: dict[str, Any] = json.loads(await brain.read(memory.export))
    del bundle["exported_at"]
    return bundle


async def take(brain: Brain, bundle: dict[str, Any]) -> dict[str, dict[str, int]]:
    rows = memory.checked_bundle(bundle)
    return await brain.write(lambda db: memory.import_rows(db, rows))


async def filled(brain: Brain) -> None:
    await say(brain, "t1", "the zebra crosses the street")
    await say(brain, "t2", "nothing about animals")
    first = (await brain.history("task", 10))["messages"][0]["message_id"]
    await say(brain, "t3", "an okapi instead", replaces=first)
    await say(brain, "t4", "Ünïcode 🙂", task="a/b")
    await brain.write(lambda db: memory.add_knowledge(db, "Zebra", "striped horse", "a book"))
    await brain.write(lambda db: memory.add_person(db, "Ada", "likes zebras and engines"))
    await brain.write(lambda db: memory.add_skill(db, "own", "d", "i"))


async def test_finds_what_was_said_and_still_counts(brain: Brain) -> None:
    await filled(brain)
    assert await find(brain, "episodes", "zebra") == []
    (found,) = await find(brain, "episodes", "OKAPI")
    assert (found["task_id"], found["turn_id"], found["role"]) == ("task", "t3", "user")
    assert "okapi" in found["snippet"]
    assert [row["turn_id"] for row in await find(brain, "episodes", "unicode")] == ["t4"]


async def test_finds_knowledge_and_people_best_first(brain: Brain) -> None:
    await filled(brain)
    await brain.write(lambda db: memory.add_knowledge(db, "", "a horse", None))
    found = await find(brain, "knowledge", "striped horse")
    assert [row["content"] for row in found] == ["striped horse", "a horse"]
    assert found[0]["score"] > found[1]["score"]
    assert found[0]["source"] == "a book"
    assert [row["name"] for row in await find(brain, "social", "engines")] == ["Ada"]
    assert len(await find(brain, "knowledge", "horse", 1)) == 1


@pytest.mark.parametrize(
    "query", ['"', "NEAR(", "a AND", "*", "content:", "^x", "'; --", "🙂", "-", "\x00", "x " * 999]
)
async def test_any_text_is_a_query(brain: Brain, query: str) -> None:
    for store in memory.STORES:
        assert await find(brain, store, query) == []


async def test_round_trip_and_a_second_import_changes_nothing(brain: Brain, tmp_path: Path) -> None:
    await filled(brain)
    bundle = await exported(brain)
    other = Brain(tmp_path / "other.sqlite")
    await other.opened()
    try:
        added = await take(other, bundle)
        assert added["turns"] == {"added": 4, "present": 0}
        assert await exported(other) == bundle
        assert await other.history("task", 10) == await brain.history("task", 10)
        assert [row["turn_id"] for row in await find(other, "episodes", "okapi")] == ["t3"]
        again = await take(other, bundle)
        assert {part: counts["added"] for part, counts in again.items()} == dict.fromkeys(again, 0)
        assert again["messages"]["present"] == len(bundle["messages"])
        assert await exported(other) == bundle
    finally:
        await other.close()


async def test_a_running_turn_is_exported_as_interrupted(brain: Brain) -> None:
    await brain.begin_turn("task", "t1", "hello", [])
    assert [turn["status"] for turn in (await exported(brain))["turns"]] == ["interrupted"]


async def test_an_export_nobody_could_import_is_refused(brain: Brain, monkeypatch: pytest.MonkeyPatch) -> None:
    await filled(brain)
    monkeypatch.setattr(memory, "MAX_BUNDLE_BYTES", 500)
    with pytest.raises(PayloadTooLarge):
        await brain.read(memory.export)


TURN = {
    "turn_id": "t",
    "task_id": "k",
    "status": "completed",
    "started_at": 1,
    "ended_at": None,
    "input_tokens": 0,
    "output_tokens": 0,
    "superseded_by": None,
}
MESSAGE = {"message_id": "m", "turn_id": "t", "role": "user", "content": "c", "media": None, "created_at": 1}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"kind": "other"}, "kind"),
        ({"version": True}, "kind"),
        ({"extra": []}, "extra"),
        ({"turns": {}}, "turns"),
        ({"turns": [1]}, "turns"),
        ({"turns": [{**TURN, "more": 1}]}, "turns"),
        ({"turns": [{**TURN, "status": "running"}]}, "turns[0].status"),
        ({"turns": [{**TURN, "started_at": "1"}]}, "turns[0].started_at"),
        ({"turns": [{**TURN, "input_tokens": 2**63}]}, "turns[0].input_tokens"),
        ({"messages": [{**MESSAGE, "role": "system"}]}, "messages[0].role"),
        ({"messages": [{**MESSAGE, "media": "{"}]}, "messages[0].media"),
        ({"messages": [{**MESSAGE, "turn_id": "unknown"}]}, "messages[0].turn_id"),
    ],
)
async def test_a_wrong_bundle_names_what_is_wrong_and_changes_nothing(
    brain: Brain, change: dict[str, Any], names: str
) -> None:
    before = await exported(brain)
    good = {"kind": memory.BUNDLE_KIND, "version": 1, "turns": [TURN], "messages": [MESSAGE]}
    with pytest.raises(InvalidRequest) as caught:
        await take(brain, {**good, **change})
    assert caught.value.details["field"] == names
    assert await exported(brain) == before


def test_a_bundle_of_a_newer_engine() -> None:
    with pytest.raises(BundleTooNew) as caught:
        memory.checked_bundle({"kind": memory.BUNDLE_KIND, "version": 2})
    assert (caught.value.code, caught.value.status) == ("MIGRATION_REQUIRED", 409)


async def test_what_was_said_before_the_index_existed_is_found(tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        migrate.bring_up_to_date(db, path, migrate.known()[:1])
        db.execute("INSERT INTO turns (turn_id, task_id, status, started_at) VALUES ('t', 'k', 'completed', 1)")
        db.execute("INSERT INTO messages VALUES (1, 'm', 't', 'user', 'an old okapi', NULL, 1)")
    brain = Brain(path)
    await brain.opened()
    assert [row["id"] for row in await find(brain, "episodes", "okapi")] == ["m"]
    await brain.close()
