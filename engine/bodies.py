"""The bodies that callers send, checked. A field that is unknown, missing or of the wrong type is InvalidRequest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from engine.catalog import is_name
from engine.errors import InvalidRequest
from engine.hitl import APPROVING, DENYING, Answer
from engine.keys import MAX_OVERLAP_S
from engine.settings import MAX_GENERATION, normalised_key_hash
from engine.turns import TurnRequest

if TYPE_CHECKING:
    from collections.abc import Collection

MAX_ID_LENGTH = 256
MAX_TITLE_LENGTH = 1000
MAX_QUERY_LENGTH = 4000
MAX_QUIESCE_S = 300

_EXECUTE = ("message", "task_id", "media", "direct", "edit_message_id", "retry_message_id")
_KEY = ("key_hash", "generation", "overlap_seconds")


class NewKey(NamedTuple):
    key_hash: str
    generation: int
    overlap_seconds: float


def execute(body: dict[str, Any]) -> TurnRequest:
    """`POST /execute`. `direct` asks for an answer without tools."""
    _only(body, _EXECUTE)
    message = body.get("message")
    if not isinstance(message, str) or not message.strip():
        raise _wrong("message", "a non-empty string")
    if not isinstance(body.get("direct", False), bool):
        raise _wrong("direct", "true or false")
    media = body.get("media", [])
    if not isinstance(media, list) or not all(isinstance(item, dict) for item in media):
        raise _wrong("media", "a list of objects")
    edit, retry = (_optional_id(body, name) for name in ("edit_message_id", "retry_message_id"))
    if edit is not None and retry is not None:
        raise InvalidRequest("Set edit_message_id or retry_message_id, not both.", field="retry_message_id")
    replaces = edit if edit is not None else retry
    return TurnRequest(_id(body, "task_id"), message, media, replaces, body.get("direct", False))


class Search(NamedTuple):
    query: str
    limit: int


class Skill(NamedTuple):
    name: str
    description: str
    instructions: str


def search(body: dict[str, Any]) -> Search:
    """`POST /memory/{store}/search`."""
    _only(body, ("query", "limit"))
    wanted = body.get("limit", 20)
    if type(wanted) is not int or not 1 <= wanted <= 100:
        raise _wrong("limit", "a whole number from 1 to 100")
    return Search(_text(body, "query", MAX_QUERY_LENGTH), wanted)


def knowledge(body: dict[str, Any]) -> tuple[str, str, str | None]:
    """`POST /memory/knowledge`: title, content, source."""
    _only(body, ("title", "content", "source"))
    source = None if body.get("source") is None else _text(body, "source", MAX_TITLE_LENGTH)
    title = "" if body.get("title") is None else _text(body, "title", MAX_TITLE_LENGTH)
    return title, _text(body, "content"), source


def person(body: dict[str, Any]) -> tuple[str, str]:
    """`POST /memory/social`: name, content."""
    _only(body, ("name", "content"))
    return _text(body, "name", MAX_TITLE_LENGTH), _text(body, "content")


def skill(body: dict[str, Any]) -> Skill:
    """`POST /skills/create`."""
    _only(body, Skill._fields)
    name = body.get("name")
    if not isinstance(name, str) or not is_name(name) or name == "create":
        raise _wrong("name", "1 to 128 letters, digits, '.', '_' or '-', not 'create'")
    return Skill(name, _text(body, "description"), _text(body, "instructions"))


def skill_change(body: dict[str, Any]) -> tuple[str | None, str | None]:
    """`PUT /skills/{name}`: description and instructions, at least one of them."""
    _only(body, ("description", "instructions"))
    if not body:
        raise InvalidRequest("Set description or instructions.", field="description")
    return tuple(_text(body, name) if name in body else None for name in ("description", "instructions"))  # type: ignore[return-value]  # two names, two values


def answer(body: dict[str, Any]) -> tuple[str, Answer]:
    """`POST /hitl/respond`. `content_blocks` of type text count as feedback."""
    _only(body, ("task_id", "answer", "feedback", "content_blocks"))
    task_id = _id(body, "task_id")
    given = body.get("answer")
    word = given.strip().lower() if isinstance(given, str) else None
    if word not in APPROVING and word not in DENYING:
        raise _wrong("answer", "'approve' or 'deny'")
    feedback = [] if body.get("feedback") is None else [_text(body, "feedback", MAX_QUERY_LENGTH)]
    blocks = body.get("content_blocks") or []
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise _wrong("content_blocks", "a list of objects")
    feedback += [block["text"] for block in blocks if isinstance(block.get("text"), str)]
    return task_id, Answer(word in APPROVING, "\n".join(feedback) or None)


def quiesce(body: dict[str, Any]) -> float:
    """`POST /admin/quiesce`: its `ttl_s`."""
    _only(body, ("ttl_s",))
    ttl = body.get("ttl_s", 30)
    if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 0 < ttl <= MAX_QUIESCE_S:
        raise _wrong("ttl_s", f"a number above 0, at most {MAX_QUIESCE_S}")
    return float(ttl)


def after(text: str | None) -> int:
    """The query parameter `after`: milliseconds since the epoch."""
    if text is None:
        return 0
    if text.isascii() and text.isdigit() and len(text) <= 18:
        return int(text)
    raise _wrong("after", "a whole number of milliseconds, 0 or more")


def new_key(body: dict[str, Any]) -> NewKey:
    """`POST /admin/key`."""
    _only(body, _KEY)
    given = body.get("key_hash")
    key_hash = normalised_key_hash(given) if isinstance(given, str) else None
    if key_hash is None:
        raise _wrong("key_hash", "a SHA-256 in hexadecimal (64 digits)")
    generation = body.get("generation")
    if type(generation) is not int or not 0 <= generation <= MAX_GENERATION:
        raise _wrong("generation", f"a whole number from 0 to {MAX_GENERATION}")
    overlap = body.get("overlap_seconds")
    if isinstance(overlap, bool) or not isinstance(overlap, int | float) or not 0 <= overlap <= MAX_OVERLAP_S:
        raise _wrong("overlap_seconds", f"a number from 0 to {MAX_OVERLAP_S}")
    return NewKey(key_hash, generation, float(overlap))


def limit(text: str | None, *, default: int, high: int) -> int:
    """The query parameter `limit`."""
    if text is None:
        return default
    if text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= high:
        return int(text)
    raise _wrong("limit", f"a whole number from 1 to {high}")


def _only(body: dict[str, Any], known: Collection[str]) -> None:
    for name in body:
        if name not in known:
            raise InvalidRequest(f"Unknown field {name[:100]!r}.", field=name[:100])


def _text(body: dict[str, Any], name: str, longest: int | None = None) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value.strip():
        raise _wrong(name, "a non-empty string")
    if longest is not None and len(value) > longest:
        raise _wrong(name, f"at most {longest} characters")
    return value


def _optional_id(body: dict[str, Any], name: str) -> str | None:
    return None if body.get(name) is None else _id(body, name)


def _id(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if isinstance(value, str) and 0 < len(value) <= MAX_ID_LENGTH and not any(map(_is_control, value)):
        return value
    raise _wrong(name, f"a string of 1 to {MAX_ID_LENGTH} characters without control characters")


def _is_control(character: str) -> bool:
    return character < " " or "\x7f" <= character <= "\x9f"


def _wrong(name: str, must_be: str) -> InvalidRequest:
    return InvalidRequest(f"'{name}' must be {must_be}.", field=name)
