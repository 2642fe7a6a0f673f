"""Reading requests and writing answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote_to_bytes

import orjson
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from orchestrator.api.errors import invalid_request
from orchestrator.api.models import user_id_problem
from orchestrator.errors import InvalidRequest

if TYPE_CHECKING:
    from typing import Any

    from starlette.requests import Request

__all__ = ["answer", "body_of", "json_body", "path_user_id"]

M = TypeVar("M", bound=BaseModel)


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


def dumps(value: object) -> bytes:
    return orjson.dumps(value)
