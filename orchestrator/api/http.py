"""Reading requests and writing answers."""

from __future__ import annotations

import re
from datetime import datetime
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote_to_bytes
from uuid import UUID

import orjson
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from orchestrator.api.errors import invalid_request
from orchestrator.api.models import user_id_problem
from orchestrator.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from starlette.requests import Request

    from orchestrator.errors import OrchestratorError

__all__ = [
    "answer",
    "body_of",
    "dumps",
    "json_body",
    "parameter",
    "path_parameter",
    "path_user_id",
    "path_uuid",
    "query_flag",
    "query_integer",
    "query_time",
    "text_of",
]

M = TypeVar("M", bound=BaseModel)

_PLUS = re.compile(r" (?=\d\d:?\d\d$)")  # a plus that was not escaped has arrived as a space


async def body_of(request: Request, model: type[M], *, optional: bool = False) -> M:
    """The body as `model`; an empty one stands for `{}` where `optional`. Raises `InvalidRequest`."""
    raw = await request.body()
    if not raw.strip():
        if not optional:
            raise InvalidRequest("body", "a JSON object is required")
        raw = b"{}"
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False, include_input=False)) from None


def path_user_id(request: Request) -> str:
    """The user id in the path, decoded strictly. Raises `InvalidRequest`."""
    try:
        user_id = unquote_to_bytes(request.scope["raw_path"].split(b"/")[2]).decode()
    except UnicodeDecodeError:
        raise InvalidRequest("user_id", "must be valid UTF-8") from None
    if (problem := user_id_problem(user_id)) is not None:
        raise InvalidRequest("user_id", problem)
    return user_id


def answer(model: BaseModel, *, exclude_none: set[str] | None = None) -> Response:
    """A 200 with every field of the model, but those of `exclude_none` that are None."""
    left_out = {name for name in exclude_none or () if getattr(model, name) is None}
    return Response(model.model_dump_json(exclude=left_out), media_type="application/json")


def json_body(model: type[BaseModel], *, optional: bool = False) -> dict[str, Any]:
    """OpenAPI's description of a body that the route reads itself, after authentication."""
    return {
        "requestBody": {
            "required": not optional,
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}},
        }
    }


def parameter(name: str, schema: dict[str, object], description: str = "") -> dict[str, object]:
    """OpenAPI's description of a query parameter that the route reads itself."""
    described = {"description": description} if description else {}
    return {"name": name, "in": "query", "required": False, **described, "schema": schema}


def path_parameter(name: str) -> dict[str, object]:
    """OpenAPI's description of an id in the path; a malformed one is the 404 of its kind."""
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def path_uuid(request: Request, name: str, missing: Callable[[str], OrchestratorError]) -> UUID:
    """The id called `name` in the path. Raises what `missing` makes of a malformed one."""
    text: str = request.path_params[name]
    try:
        return UUID(text)
    except ValueError:
        raise missing(text[:100]) from None


def query_integer(request: Request, name: str, default: int, low: int, high: int) -> int:
    """Raises `InvalidRequest`."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 19) or not low <= int(text) <= high:
        raise InvalidRequest(name, f"an integer from {low} to {high}")
    return int(text)


def query_flag(request: Request, name: str) -> bool:
    """`true` or `false` (also 1, 0, and the bare name); absent is false. Raises `InvalidRequest`."""
    text = request.query_params.get(name)
    if text is None or text.lower() in ("false", "0"):
        return False
    if text.lower() in ("true", "1", ""):
        return True
    raise InvalidRequest(name, "true or false")


def query_time(request: Request, name: str) -> datetime | None:
    """A moment in ISO 8601 with its zone. Raises `InvalidRequest`."""
    text = request.query_params.get(name)
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(_PLUS.sub("+", text))
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise InvalidRequest(name, "a time in ISO 8601 with its zone, as 2030-01-31T12:00:00Z")
    return moment


def text_of(identity: UUID | None) -> str | None:
    """An id as JSON has it: the driver's own class is none that a serialiser knows."""
    return None if identity is None else str(identity)


def dumps(value: object) -> bytes:
    return orjson.dumps(value)
