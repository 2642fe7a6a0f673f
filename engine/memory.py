"""What the engine remembers, beyond the history of one task: search, additions, and moving all of it.

Every function here is one transaction of the brain's (`Brain.read`, `Brain.write`).

    episodes    what was said in turns that still count
    knowledge   facts with a title
    social      people and what is known of them
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from engine.brain import new_id, now_ms
from engine.errors import BundleTooNew, InvalidRequest, PayloadTooLarge

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable

STORES = ("knowledge", "episodes", "social")

MAX_BUNDLE_BYTES = 64 * 1024 * 1024
"""Of `GET /memory/export` and `POST /memory/import`. A larger brain is moved as a file, by a snapshot."""
BUNDLE_KIND = "engine-memory"
BUNDLE_VERSION = 1

_MAX_TERMS = 32
_SNIPPET_WORDS = 40

_SEARCH = {
    "episodes": (
        ("id", "task_id", "turn_id", "role", "content", "created_at"),
        "SELECT bm25(messages_fts), snippet(messages_fts, -1, '', '', '…', ?), m.message_id, t.task_id, t.turn_id,"
        " m.role, m.content, m.created_at FROM messages_fts f JOIN messages m ON m.position = f.rowid"
        " JOIN turns t USING (turn_id)"
        " WHERE messages_fts MATCH ? AND t.superseded_by IS NULL ORDER BY 1, m.position DESC LIMIT ?",
    ),
    "knowledge": (
        ("id", "title", "content", "source", "created_at"),
        "SELECT bm25(knowledge_fts), snippet(knowledge_fts, -1, '', '', '…', ?), k.id, k.title, k.content, k.source,"
        " k.created_at FROM knowledge_fts f JOIN knowledge_store k ON k.position = f.rowid"
        " WHERE knowledge_fts MATCH ? ORDER BY 1, k.position DESC LIMIT ?",
    ),
    "social": (
        ("id", "name", "content", "created_at"),
        "SELECT bm25(social_fts), snippet(social_fts, -1, '', '', '…', ?), s.id, s.name, s.content, s.created_at"
        " FROM social_fts f JOIN social_graph_nodes s ON s.position = f.rowid"
        " WHERE social_fts MATCH ? ORDER BY 1, s.position DESC LIMIT ?",
    ),
}

# Part of a bundle → table, its columns, and the type of each ("?" = may be null). The first column identifies a row.
_PARTS: dict[str, tuple[str, dict[str, str]]] = {
    "turns": (
        "turns",
        {
            "turn_id": "str",
            "task_id": "str",
            "status": "str",
            "started_at": "int",
            "ended_at": "int?",
            "input_tokens": "int",
            "output_tokens": "int",
            "superseded_by": "str?",
        },
    ),
    "messages": (
        "messages",
        {"message_id": "str", "turn_id": "str", "role": "str", "content": "str", "media": "str?", "created_at": "int"},
    ),
    "knowledge": (
        "knowledge_store",
        {"id": "str", "title": "str", "content": "str", "source": "str?", "created_at": "int"},
    ),
    "social": ("social_graph_nodes", {"id": "str", "name": "str", "content": "str", "created_at": "int"}),
    "skills": (
        "user_skills",
        {"name": "str", "description": "str", "instructions": "str", "created_at": "int", "updated_at": "int"},
    ),
}
_ALLOWED = {"status": ("completed", "interrupted", "failed"), "role": ("user", "assistant")}
_IS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "str?": lambda value: value is None or isinstance(value, str),
    "int": lambda value: type(value) is int and -(2**63) <= value < 2**63,
    "int?": lambda value: value is None or (type(value) is int and -(2**63) <= value < 2**63),
}


def search(db: sqlite3.Connection, store: str, query: str, limit: int) -> list[dict[str, Any]]:
    """The best matches first: any of the query's words counts, more and rarer ones count more.

    The query is words, never the index's own language, so that no text a user types is an error.
    """
    terms = re.findall(r"\w+", query)[:_MAX_TERMS]
    if not terms:
        return []
    names, statement = _SEARCH[store]
    match = " OR ".join(f'"{term}"' for term in terms)
    return [
        {**dict(zip(names, row[2:], strict=True)), "snippet": row[1], "score": round(-row[0], 6)}
        for row in db.execute(statement, (_SNIPPET_WORDS, match, limit))
    ]


def add_knowledge(db: sqlite3.Connection, title: str, content: str, source: str | None) -> str:
    identity = new_id()
    db.execute(
        "INSERT INTO knowledge_store (id, title, content, source, created_at) VALUES (?, ?, ?, ?, ?)",
        (identity, title, content, source, now_ms()),
    )
    return identity


def add_person(db: sqlite3.Connection, name: str, content: str) -> str:
    identity = new_id()
    db.execute(
        "INSERT INTO social_graph_nodes (id, name, content, created_at) VALUES (?, ?, ?, ?)",
        (identity, name, content, now_ms()),
    )
    return identity


def export(db: sqlite3.Connection) -> bytes:
    """Everything as one JSON object. PayloadTooLarge when no engine could import it.

    A turn that is running now is exported as interrupted: where it is imported, nobody goes on with it.
    """
    from engine.wire import to_json

    bundle: dict[str, Any] = {"kind": BUNDLE_KIND, "version": BUNDLE_VERSION, "exported_at": now_ms()}
    size = 0
    for part, (table, columns) in _PARTS.items():
        rows = bundle[part] = []
        # The names are this module's own.
        for row in db.execute(f"SELECT {', '.join(columns)} FROM {table} ORDER BY rowid"):  # noqa: S608
            entry = dict(zip(columns, row, strict=True))
            if entry.get("status") == "running":
                entry["status"] = "interrupted"
            size += 100 + sum(len(value) for value in row if isinstance(value, str))
            if size > MAX_BUNDLE_BYTES:
                raise PayloadTooLarge(MAX_BUNDLE_BYTES, "The export")
            rows.append(entry)
    text = to_json(bundle)
    if len(text) > MAX_BUNDLE_BYTES:
        raise PayloadTooLarge(MAX_BUNDLE_BYTES, "The export")
    return text


def checked_bundle(bundle: dict[str, Any]) -> dict[str, list[tuple[Any, ...]]]:
    """The rows of a bundle, ready to be inserted. InvalidRequest names the first value that is wrong."""
    version = bundle.get("version")
    if bundle.get("kind") != BUNDLE_KIND or type(version) is not int or version < 1:
        raise InvalidRequest("This is not what GET /memory/export answers.", field="kind")
    if version > BUNDLE_VERSION:
        raise BundleTooNew(version, BUNDLE_VERSION)
    for name in bundle:
        if name not in _PARTS and name not in ("kind", "version", "exported_at"):
            raise InvalidRequest(f"Unknown field {name[:100]!r}.", field=name[:100])
    return {part: _checked_rows(part, bundle.get(part, [])) for part in _PARTS}


def _checked_rows(part: str, rows: Any) -> list[tuple[Any, ...]]:
    if not isinstance(rows, list):
        raise InvalidRequest(f"'{part}' must be a list.", field=part)
    columns = _PARTS[part][1]
    checked = []
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or set(row) != set(columns):
            raise InvalidRequest(f"'{part}[{number}]' must have exactly {', '.join(columns)}.", field=part)
        for name, kind in columns.items():
            value = row[name]
            if not _IS[kind](value) or (name in _ALLOWED and value not in _ALLOWED[name]):
                raise InvalidRequest(f"'{part}[{number}].{name}' has no valid value.", field=f"{part}[{number}].{name}")
        if row.get("media") is not None:
            _check_media(row["media"], number)
        checked.append(tuple(row[name] for name in columns))
    return checked


def _check_media(media: str, number: int) -> None:
    try:
        valid = isinstance(json.loads(media), list)
    except (ValueError, RecursionError):
        valid = False
    if not valid:
        raise InvalidRequest(f"'messages[{number}].media' is not a JSON array.", field=f"messages[{number}].media")


def import_rows(db: sqlite3.Connection, rows: dict[str, list[tuple[Any, ...]]]) -> dict[str, dict[str, int]]:
    """Adds what is not there yet, all of it or nothing; a second import of a bundle changes nothing.

    Answers how many rows of each part were added and how many were there already.
    """
    known = {row[0] for row in rows["turns"]} | {turn_id for (turn_id,) in db.execute("SELECT turn_id FROM turns")}
    for number, message in enumerate(rows["messages"]):
        if message[1] not in known:
            raise InvalidRequest(
                f"'messages[{number}].turn_id' names a turn that neither the bundle nor the brain has.",
                field=f"messages[{number}].turn_id",
            )
    result = {}
    for part, (table, columns) in _PARTS.items():
        added = 0
        statement = (
            f"INSERT INTO {table} ({', '.join(columns)})"  # noqa: S608 - the names are this module's own
            f" VALUES ({', '.join('?' * len(columns))}) ON CONFLICT DO NOTHING"
        )
        for row in rows[part]:
            added += max(0, db.execute(statement, row).rowcount)
        result[part] = {"added": added, "present": len(rows[part]) - added}
    return result


# --- the user's own skills ------------------------------------------------------------------------------

_SKILL = ("name", "description", "instructions", "created_at", "updated_at")


def skills(db: sqlite3.Connection) -> list[dict[str, Any]]:
    return [
        dict(zip(_SKILL, row, strict=True))
        for row in db.execute("SELECT name, description, instructions, created_at, updated_at FROM user_skills")
    ]


def skill(db: sqlite3.Connection, name: str) -> dict[str, Any] | None:
    row = db.execute(
        "SELECT name, description, instructions, created_at, updated_at FROM user_skills WHERE name = ?", (name,)
    ).fetchone()
    return None if row is None else dict(zip(_SKILL, row, strict=True))


def add_skill(db: sqlite3.Connection, name: str, description: str, instructions: str) -> bool:
    """False when there is one of that name."""
    now = now_ms()
    return (
        db.execute(
            "INSERT INTO user_skills VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (name, description, instructions, now, now),
        ).rowcount
        == 1
    )


def change_skill(db: sqlite3.Connection, name: str, description: str | None, instructions: str | None) -> bool:
    """False when there is none of that name. None leaves a part as it is."""
    return (
        db.execute(
            "UPDATE user_skills SET description = coalesce(?, description),"
            " instructions = coalesce(?, instructions), updated_at = ? WHERE name = ?",
            (description, instructions, now_ms(), name),
        ).rowcount
        == 1
    )


def remove_skill(db: sqlite3.Connection, name: str) -> bool:
    return db.execute("DELETE FROM user_skills WHERE name = ?", (name,)).rowcount == 1
