from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from engine import brain as brain_module
from engine import migrate
from engine.brain import Brain
from engine.errors import (
    BrainCorrupt,
    BrainError,
    BrainFailed,
    BrainInUse,
    MessageNotFound,
    MigrationRequired,
    TaskNotFound,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "brain.sqlite"


@pytest.fixture
async def brain(path: Path) -> AsyncIterator[Brain]:
    brain = Brain(path)
    await brain.opened()
    yield brain
    await brain.close()


async def open_fails(path: Path) -> BrainError:
    brain = Brain(path)
    with pytest.raises(BrainError) as caught:
        await brain.opened()
    await brain.close()
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return caught.value


async def turn(brain: Brain, turn_id: str, message: str = "hello", *, replaces: str | None = None) -> int:
    number = await brain.begin_turn("task", turn_id, message, [], replaces)
    await brain.finish_turn(turn_id, "completed", f"re: {message}", input_tokens=1, output_tokens=2)
    return number


class TestHistory:
    async def test_turns_and_messages_in_order(self, brain: Brain) -> None:
        assert [await turn(brain, "t1", "one"), await turn(brain, "t2", "two")] == [1, 2]
        history = await brain.history("task", 10)
        assert [t["turn_id"] for t in history["turns"]] == ["t1", "t2"]
        assert [(m["role"], m["content"]) for m in history["messages"]] == [
            ("user", "one"),
            ("assistant", "re: one"),
            ("user", "two"),
            ("assistant", "re: two"),
        ]
        assert history["turns"][0]["status"] == "completed"
        assert history["turns"][0]["output_tokens"] == 2

    async def test_survives_close_and_open(self, brain: Brain, path: Path) -> None:
        await turn(brain, "t1")
        before = await brain.history("task", 10)
        await brain.close()
        again = Brain(path)
        assert (await again.opened()).interrupted_turns == 0
        assert await again.history("task", 10) == before
        await again.close()

    async def test_limit_takes_the_newest_turns(self, brain: Brain) -> None:
        for name in ("t1", "t2", "t3"):
            await turn(brain, name, name)
        history = await brain.history("task", 2)
        assert [t["turn_id"] for t in history["turns"]] == ["t2", "t3"]
        assert {m["turn_id"] for m in history["messages"]} == {"t2", "t3"}

    async def test_unknown_task(self, brain: Brain) -> None:
        with pytest.raises(TaskNotFound):
            await brain.history("nobody", 10)

    async def test_tasks_do_not_see_each_other(self, brain: Brain) -> None:
        await brain.begin_turn("other", "x1", "hi", [])
        assert await turn(brain, "t1") == 1
        assert [t["turn_id"] for t in (await brain.history("task", 10))["turns"]] == ["t1"]

    async def test_any_text_and_media_come_back_as_they_were(self, brain: Brain) -> None:
        text = "a\x00b\n'; DROP TABLE turns; -- 🙂"
        await brain.begin_turn("task", "t1", text, [{"url": "x", "n": [1, None]}])
        (message,) = (await brain.history("task", 10))["messages"]
        assert (message["content"], message["media"]) == (text, [{"url": "x", "n": [1, None]}])

    async def test_edit_takes_that_turn_and_later_ones_out_of_the_history(self, brain: Brain) -> None:
        for name in ("t1", "t2", "t3"):
            await turn(brain, name, name)
        answer_of_t2 = (await brain.history("task", 10))["messages"][3]
        assert answer_of_t2["content"] == "re: t2"
        assert await turn(brain, "t4", "again", replaces=answer_of_t2["message_id"]) == 2
        assert [t["turn_id"] for t in (await brain.history("task", 10))["turns"]] == ["t1", "t4"]
        with pytest.raises(MessageNotFound):
            await turn(brain, "t5", replaces=answer_of_t2["message_id"])

    async def test_edit_of_another_tasks_message_changes_nothing(self, brain: Brain) -> None:
        await turn(brain, "t1")
        message_id = (await brain.history("task", 10))["messages"][0]["message_id"]
        with pytest.raises(MessageNotFound):
            await brain.begin_turn("other", "x1", "hi", [], message_id)
        assert len((await brain.history("task", 10))["turns"]) == 1
        with pytest.raises(TaskNotFound):
            await brain.history("other", 10)


class TestRunningTurns:
    async def test_a_turn_left_running_is_interrupted_at_the_next_start(self, brain: Brain, path: Path) -> None:
        await brain.begin_turn("task", "t1", "hello", [])
        assert (await brain.history("task", 10))["turns"][0]["status"] == "running"
        await brain.close()
        again = Brain(path)
        assert (await again.opened()).interrupted_turns == 1
        history = await again.history("task", 10)
        assert history["turns"][0]["status"] == "interrupted"
        assert history["turns"][0]["ended_at"] is not None
        assert history["messages"][0]["content"] == "hello"
        await again.close()

    async def test_a_turn_whose_end_could_not_be_stored_does_not_block_its_task(self, brain: Brain) -> None:
        await brain.begin_turn("task", "t1", "hello", [])
        await brain.begin_turn("task", "t2", "hello", [])
        turns = (await brain.history("task", 10))["turns"]
        assert [t["status"] for t in turns] == ["interrupted", "running"]

    async def test_a_failed_operation_is_undone_and_told_until_the_next_one_works(self, brain: Brain) -> None:
        await turn(brain, "t1")
        with pytest.raises(BrainFailed):
            await brain.begin_turn("task", "t1", "the same turn id", [])
        assert brain.failure is not None
        assert len((await brain.history("task", 10))["turns"]) == 1
        assert brain.failure is None

    async def test_an_operation_on_a_closed_brain_fails_cleanly(self, path: Path) -> None:
        path.write_text("not a database, but long enough to be looked at" * 10)
        brain = Brain(path)
        with pytest.raises(BrainCorrupt):
            await brain.opened()
        with pytest.raises(BrainFailed):
            await brain.history("task", 10)
        await brain.close()


class TestOpening:
    async def test_write_ahead_log_full_sync(self, brain: Brain) -> None:
        def pragmas(db: sqlite3.Connection) -> list[object]:
            return [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]

        assert await brain.read(pragmas) == ["wal", 2]

    async def test_closing_folds_the_log_into_the_file(self, brain: Brain, path: Path) -> None:
        await turn(brain, "t1")
        await brain.close()
        assert [entry.name for entry in path.parent.iterdir()] == ["brain.sqlite"]

    async def test_second_engine_is_shut_out_and_the_first_goes_on(
        self, brain: Brain, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(brain_module, "LOCK_WAIT_S", 0.0)
        assert isinstance(await open_fails(path), BrainInUse)
        assert await turn(brain, "t1") == 1

    async def test_newer_brain_is_refused_and_left_alone(self, brain: Brain, path: Path) -> None:
        await brain.close()
        with closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA user_version = 999")
        before = path.read_bytes()
        error = await open_fails(path)
        assert isinstance(error, MigrationRequired)
        assert "MIGRATION_REQUIRED" in str(error)
        assert path.read_bytes() == before

    async def test_what_is_no_database_is_refused_and_kept(self, path: Path) -> None:
        path.write_bytes(b"precious but not SQLite\n" * 400)
        before = path.read_bytes()
        assert isinstance(await open_fails(path), BrainCorrupt)
        assert path.read_bytes() == before

    async def test_damaged_pages_are_found_and_kept(self, brain: Brain, path: Path) -> None:
        for number in range(200):
            await turn(brain, f"t{number}", "x" * 500)
        await brain.close()
        damaged = bytearray(path.read_bytes())
        damaged[8192 : len(damaged) - 4096] = b"\xa5" * (len(damaged) - 4096 - 8192)
        path.write_bytes(damaged)
        assert isinstance(await open_fails(path), BrainCorrupt)
        assert path.read_bytes() == damaged

    async def test_somebody_elses_database_is_refused_and_kept(self, path: Path) -> None:
        with closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TABLE theirs (x)")
        assert "not an engine's brain" in str(await open_fails(path))
        with closing(sqlite3.connect(path)) as db:
            assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("theirs",)]

    async def test_closing_breaks_off_an_opening(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        endless = path.parent / "0001_endless.sql"
        endless.write_text("WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n;")
        monkeypatch.setattr(migrate, "known", lambda: [migrate.Migration(1, endless)])
        brain = Brain(path)
        while brain._connection is None or not brain._connection.in_transaction:  # noqa: ASYNC110 - another thread's state
            await asyncio.sleep(0)
        await brain.close()
        with pytest.raises(BrainError, match="interrupted"):
            await brain.opened()


class TestMigrations:
    def test_numbered_without_a_gap(self, tmp_path: Path) -> None:
        (tmp_path / "0001_a.sql").touch()
        (tmp_path / "0003_c.sql").touch()
        with pytest.raises(BrainError, match="without a gap"):
            migrate.known(tmp_path)

    def test_the_shipped_ones_are(self) -> None:
        assert [migration.version for migration in migrate.known()] == [1, 2]

    def test_only_what_is_missing_is_applied(self, tmp_path: Path) -> None:
        (tmp_path / "0001_a.sql").write_text("CREATE TABLE a (x);")
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
            assert migrate.bring_up_to_date(db, tmp_path, migrate.known(tmp_path)) == 1
            (tmp_path / "0002_b.sql").write_text("CREATE TABLE b (x); INSERT INTO b VALUES (1)")
            assert migrate.bring_up_to_date(db, tmp_path, migrate.known(tmp_path)) == 2
            assert migrate.bring_up_to_date(db, tmp_path, migrate.known(tmp_path)) == 2
            assert db.execute("SELECT count(*) FROM b").fetchone() == (1,)

    def test_a_failing_one_is_undone_completely_and_named(self, tmp_path: Path) -> None:
        (tmp_path / "0001_a.sql").write_text("CREATE TABLE a (x);")
        (tmp_path / "0002_bad.sql").write_text("CREATE TABLE b (x); INSERT INTO nowhere VALUES (1);")
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
            with pytest.raises(BrainError, match=r"0002_bad\.sql"):
                migrate.bring_up_to_date(db, tmp_path, migrate.known(tmp_path))
            assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("a",)]
            assert db.execute("PRAGMA user_version").fetchone() == (1,)
            assert not db.in_transaction
