"""The log of an engine: its last lines, and new ones as they come."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from orchestrator.api.auth import plane_of, product_caller
from orchestrator.api.errors import errors
from orchestrator.api.http import dumps, parameter, path_user_id, query_flag, query_integer
from orchestrator.api.models import LogsAnswer, timestamp
from orchestrator.api.openapi import USER_ID
from orchestrator.api.routes.lifecycle import COMMON
from orchestrator.api.streams import Stream
from orchestrator.errors import BackendError, RateLimited

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from orchestrator.backends.base import LogLine
    from orchestrator.control_plane import ControlPlane

router = APIRouter(tags=["lifecycle"])

MAX_TAIL = 10_000
LONGEST_LINE = 16 * 1024  # characters
MOST_CHARACTERS = 4 * 1024 * 1024  # of one answer; the oldest lines give way
MAX_FOLLOWERS = 200  # of one process


@router.get(
    "/engines/{user_id}/logs",
    summary="Read an engine's log",
    description="The last `tail` lines, the oldest first. With `follow` as NDJSON, one line of it for each line, "
    "without an end: it goes on over restarts of the engine and ends when the engine is destroyed. Lines are cut at "
    "16 Ki characters, and an answer without `follow` has at most 4 Mi.",
    responses={
        200: {"model": LogsAnswer, "content": {"application/x-ndjson": {"schema": {"type": "string"}}}},
        **errors(*COMMON, "ENGINE_NOT_FOUND", "NOT_SUPPORTED", "RATE_LIMITED", "BACKEND_ERROR", "BACKEND_UNAVAILABLE"),
    },
    openapi_extra={
        "parameters": [
            *USER_ID["parameters"],
            parameter("tail", {"type": "integer", "minimum": 0, "maximum": MAX_TAIL, "default": 100}),
            parameter("follow", {"type": "boolean", "default": False}),
        ]
    },
)
async def logs(request: Request) -> Response:
    caller = await product_caller(request, "read")
    user_id = path_user_id(request)
    tail = query_integer(request, "tail", 100, 0, MAX_TAIL)
    follow = query_flag(request, "follow")
    plane = plane_of(request)
    lines = await plane.lifecycle.logs(caller.product_id, user_id, tail=tail, follow=follow)
    if not follow:
        return Response(dumps({"lines": await _last(lines)}), media_type="application/json")
    if plane.followers >= MAX_FOLLOWERS:
        await lines.aclose()
        raise RateLimited(5)
    return Stream(_follow(plane, lines), "application/x-ndjson")


async def _last(lines: AsyncGenerator[LogLine, None]) -> list[dict[str, Any]]:
    kept: deque[dict[str, Any]] = deque()
    characters = 0
    async for line in lines:
        shown = _shown(line)
        kept.append(shown)
        characters += len(shown["line"])
        while characters > MOST_CHARACTERS:
            characters -= len(kept.popleft()["line"])
    return list(kept)


async def _follow(plane: ControlPlane, lines: AsyncGenerator[LogLine, None]) -> AsyncGenerator[bytes, None]:
    plane.followers += 1
    try:
        async for line in lines:
            yield dumps(_shown(line)) + b"\n"
    except BackendError:
        return  # the answer has begun; it ends, and the caller may ask again
    finally:
        plane.followers -= 1
        await lines.aclose()


def _shown(line: LogLine) -> dict[str, Any]:
    return {
        "timestamp": None if line.timestamp is None else timestamp(line.timestamp),
        "stream": line.stream,
        "line": line.line[:LONGEST_LINE],
    }
