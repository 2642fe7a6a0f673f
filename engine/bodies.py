"""The bodies that callers send, checked. A field that is unknown, missing or of the wrong type is InvalidRequest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from engine.errors import InvalidRequest
from engine.keys import MAX_OVERLAP_S
from engine.settings import MAX_GENERATION, normalised_key_hash
from engine.turns import TurnRequest

if TYPE_CHECKING:
    from collections.abc import Collection

MAX_ID_LENGTH = 256

_EXECUTE = ("message", "task_id", "media", "direct", "edit_message_id", "retry_message_id")
_KEY = ("key_hash", "generation", "overlap_seconds")


class NewKey(NamedTuple):
    key_hash: str
    generation: int
    overlap_seconds: float


def execute(body: dict[str, Any]) -> TurnRequest:
    """`POST /execute`. `direct` is for engines that plan; this one always answers directly."""
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
    return TurnRequest(_id(body, "task_id"), message, media, edit if edit is not None else retry)


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
