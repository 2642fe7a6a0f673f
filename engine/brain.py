"""The brain: one user's data in one SQLite file in WAL mode.

One connection, used by one thread of its own: the event loop never waits for the disk. The connection holds the file
exclusively for as long as the engine lives, so that a second engine on the same brain cannot start. What is committed
survives a kill and a power cut (`synchronous = FULL`).
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from engine import migrate
from engine.errors import BrainCorrupt, BrainError, BrainFailed, BrainInUse, MessageNotFound, TaskNotFound

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")

TurnEnd = Literal["completed", "interrupted", "failed"]

# Another engine's lock: long enough for a killed predecessor to leave, short enough for a clear answer.
LOCK_WAIT_S = 2.0
# A larger brain is not read through at every start.
CHECKED_AT_START_BYTES = 64 * 1024 * 1024
# Steps of SQLite's machine, a few milliseconds, after which an opening looks whether it is still wanted.
LOOKS_UP_EVERY = 100_000


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def new_id() -> str:
    return os.urandom(16).hex()


class Opened(NamedTuple):
    """What the start found; `interrupted_turns` is how many turns a killed predecessor left unfinished."""

    schema_version: int
    interrupted_turns: int
    integrity: Literal["ok", "not checked"]
    """A brain of more than CHECKED_AT_START_BYTES is not read through at every start."""


class Brain:
    """Opening begins at once, in the brain's own thread; `opened` waits for it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failure: str | None = None
        """What the last failed operation said; None again after the next one that works."""
        self.interrupted: list[tuple[str, str]] = []
        """Task and turn of what a killed predecessor left unfinished; known once it is opened."""
        self._closing = False
        self._writable = asyncio.Event()
        self._writable.set()
        self._resuming: asyncio.TimerHandle | None = None
        self._connection: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="brain")
        self._opening = self._thread.submit(self._open)

    async def opened(self) -> Opened:
        """Returns when the brain is migrated and usable. Raises BrainError, the file left as it was found."""
        return await asyncio.wrap_future(self._opening)

    async def begin_turn(
        self, task_id: str, turn_id: str, message: str, media: list[Any], replaces_message_id: str | None = None
    ) -> int:
        """Stores a running turn with its message and returns its number in the task's history, from 1.

        With `replaces_message_id`, the turn of that message and all later ones leave the history in the same
        transaction; MessageNotFound when the history has no such message.
        """
        return await self.write(lambda db: _begin_turn(db, task_id, turn_id, message, media, replaces_message_id))

    async def finish_turn(
        self, turn_id: str, status: TurnEnd, answer: str, *, input_tokens: int = 0, output_tokens: int = 0
    ) -> None:
        """Ends a turn and stores what was answered, a partial answer included."""
        await self.write(lambda db: _finish_turn(db, turn_id, status, answer, input_tokens, output_tokens))

    async def history(self, task_id: str, limit: int) -> dict[str, Any]:
        """The newest `limit` turns of a task, oldest first, with their messages. TaskNotFound when it has none."""
        return await self.read(lambda db: _history(db, task_id, limit))

    async def read(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        """One consistent look at the brain, in its thread."""
        return await self._submit(lambda: self._transaction(operation, "BEGIN"))

    async def write(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        """One transaction in the brain's thread: committed when this returns, undone when it raises.

        Waits while the brain is quiesced.
        """
        while not self._writable.is_set():
            await self._writable.wait()
        return await self._submit(lambda: self._transaction(operation, "BEGIN IMMEDIATE"))

    # --- quiescing --------------------------------------------------------------------------------------

    @property
    def quiesced(self) -> bool:
        return not self._writable.is_set()

    async def quiesce(self, ttl_s: float) -> None:
        """From the return on, for `ttl_s` or until `resume`, the file alone is the whole brain and does not change.

        Quiescing again counts the time anew.
        """
        self._writable.clear()
        if self._resuming is not None:
            self._resuming.cancel()
        self._resuming = asyncio.get_running_loop().call_later(ttl_s, self.resume)
        try:
            # The thread works in order: writes that were let in before are done when this is.
            await self._submit(self._fold)
        except BrainFailed:
            self.resume()
            raise

    def resume(self) -> None:
        if self._resuming is not None:
            self._resuming.cancel()
            self._resuming = None
        self._writable.set()

    async def close(self) -> None:
        """Folds the write-ahead log into the file and lets go of it. An opening still under way is broken off."""
        if self._closing:
            return
        self._closing = True
        self.resume()
        await self._submit(self._close)
        self._thread.shutdown()

    async def _submit(self, work: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._thread.submit(work))

    # --- in the brain's thread --------------------------------------------------------------------------

    def _fold(self) -> None:
        """The write-ahead log goes into the file and is emptied."""
        try:
            busy, _, _ = self._connected().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error as exc:
            self.failure = str(exc)
            raise BrainFailed(f"The write-ahead log could not be folded in: {exc}.") from exc
        if busy:
            raise BrainFailed("The write-ahead log could not be folded in: the brain is busy.")

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            raise BrainFailed("The brain is not open.")
        return self._connection

    def _transaction(self, operation: Callable[[sqlite3.Connection], T], begin: str) -> T:
        db = self._connected()
        try:
            db.execute(begin)
            result = operation(db)
            db.execute("COMMIT")
        except sqlite3.Error as exc:
            self.failure = str(exc)
            raise BrainFailed(f"The brain refused the operation: {exc}.") from exc
        else:
            self.failure = None
            return result
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")

    def _open(self) -> Opened:
        migrations = migrate.known()
        try:
            self._connection = db = sqlite3.connect(
                self.path, isolation_level=None, check_same_thread=False, timeout=LOCK_WAIT_S
            )
            db.set_progress_handler(lambda: self._closing, LOOKS_UP_EVERY)
            _configure(db)
            checked = self.path.stat().st_size <= CHECKED_AT_START_BYTES
            if checked:
                _check(db, self.path)
            version = migrate.bring_up_to_date(db, self.path, migrations)
            self.interrupted = db.execute(
                "UPDATE turns SET status = 'interrupted', ended_at = ? WHERE status = 'running'"
                " RETURNING task_id, turn_id",
                (now_ms(),),
            ).fetchall()
            db.set_progress_handler(None, 0)
        except sqlite3.Error as exc:
            self._close()
            raise _opening_error(exc, self.path) from None
        except BaseException:
            self._close()
            raise
        return Opened(version, len(self.interrupted), "ok" if checked else "not checked")

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _configure(db: sqlite3.Connection) -> None:
    # Exclusive before the first access to the log: no shared-memory file, and a second engine is shut out.
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = ON")
    db.execute("BEGIN EXCLUSIVE")
    db.execute("COMMIT")


def _check(db: sqlite3.Connection, path: Path) -> None:
    found: str = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise BrainCorrupt(f"{path} is damaged ({' '.join(found.split())}); the file was left as it is")


def _opening_error(exc: sqlite3.Error, path: Path) -> BrainError:
    # Extended codes carry the primary one in their low byte.
    code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return BrainInUse(f"{path} is in use by another engine")
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return BrainCorrupt(f"{path} is damaged ({exc}); the file was left as it is")
    return BrainError(f"{path} cannot be opened: {exc}")


def _begin_turn(
    db: sqlite3.Connection, task_id: str, turn_id: str, message: str, media: list[Any], replaces: str | None
) -> int:
    now = now_ms()
    # The caller holds the only running turn of a task; one that is stored besides could not be ended (a full disk).
    db.execute(
        "UPDATE turns SET status = 'interrupted', ended_at = ? WHERE task_id = ? AND status = 'running'", (now, task_id)
    )
    if replaces is not None:
        first = db.execute(
            "SELECT t.position FROM messages m JOIN turns t USING (turn_id)"
            " WHERE m.message_id = ? AND t.task_id = ? AND t.superseded_by IS NULL",
            (replaces, task_id),
        ).fetchone()
        if first is None:
            raise MessageNotFound(replaces)
        db.execute(
            "UPDATE turns SET superseded_by = ? WHERE task_id = ? AND position >= ? AND superseded_by IS NULL",
            (turn_id, task_id, first[0]),
        )
    db.execute(
        "INSERT INTO turns (turn_id, task_id, status, started_at) VALUES (?, ?, 'running', ?)", (turn_id, task_id, now)
    )
    _add_message(db, turn_id, "user", message, json.dumps(media) if media else None, now)
    number: int = db.execute(
        "SELECT count(*) FROM turns WHERE task_id = ? AND superseded_by IS NULL", (task_id,)
    ).fetchone()[0]
    return number


def _finish_turn(
    db: sqlite3.Connection, turn_id: str, status: TurnEnd, answer: str, input_tokens: int, output_tokens: int
) -> None:
    now = now_ms()
    db.execute(
        "UPDATE turns SET status = ?, ended_at = ?, input_tokens = ?, output_tokens = ? WHERE turn_id = ?",
        (status, now, input_tokens, output_tokens, turn_id),
    )
    if answer:
        _add_message(db, turn_id, "assistant", answer, None, now)


def _add_message(db: sqlite3.Connection, turn_id: str, role: str, content: str, media: str | None, now: int) -> None:
    db.execute(
        "INSERT INTO messages (message_id, turn_id, role, content, media, created_at) VALUES (?, ?, ?, ?, ?, ?)",
        (new_id(), turn_id, role, content, media, now),
    )


def _history(db: sqlite3.Connection, task_id: str, limit: int) -> dict[str, Any]:
    turns = [
        dict(zip(("turn_id", "status", "started_at", "ended_at", "input_tokens", "output_tokens"), row, strict=True))
        for row in db.execute(
            "SELECT turn_id, status, started_at, ended_at, input_tokens, output_tokens FROM turns"
            " WHERE task_id = ? AND superseded_by IS NULL ORDER BY position DESC LIMIT ?",
            (task_id, limit),
        )
    ][::-1]
    if not turns:
        raise TaskNotFound(task_id)
    messages = [
        {
            "message_id": message_id,
            "turn_id": turn_id,
            "role": role,
            "content": content,
            "media": json.loads(media) if media else [],
            "created_at": created_at,
        }
        for message_id, turn_id, role, content, media, created_at in db.execute(
            "SELECT m.message_id, m.turn_id, m.role, m.content, m.media, m.created_at"
            " FROM messages m JOIN turns t USING (turn_id)"
            " WHERE t.task_id = ? AND t.superseded_by IS NULL"
            " AND t.position >= (SELECT position FROM turns WHERE turn_id = ?) ORDER BY m.position",
            (task_id, turns[0]["turn_id"]),
        )
    ]
    return {"task_id": task_id, "turns": turns, "messages": messages}
