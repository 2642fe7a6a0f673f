"""Around every request: an id, the size limit, one log line, and no exception that escapes."""

from __future__ import annotations

import asyncio
import os
import re
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import structlog
from starlette.requests import ClientDisconnect, Request

from orchestrator import metrics, tracing
from orchestrator.api.errors import error_response, ours
from orchestrator.errors import BackendUnavailable, InternalError, OrchestratorError, PayloadTooLarge

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["MAX_BODY_BYTES", "RequestMiddleware"]

MAX_BODY_BYTES = 1024 * 1024
CLIENT_CLOSED_REQUEST = 499  # for the log; nobody is left to read an answer
ENDING = "This orchestrator is ending; what was begun goes on, and another one, or the next, serves the call."
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_ESCAPED_SLASH = re.compile(rb"%2f", re.IGNORECASE)

log = structlog.get_logger("orchestrator.request")


_ADMIT = re.compile(r"/engines/([^/]+)/admit")


class RequestMiddleware:
    """Plain ASGI: it stands on the hot path.

    `admit` is called from here, before the layers of the framework, which would cost as much as the look-up itself;
    it is the same function that the route documents.
    """

    def __init__(self, app: ASGIApp, admit: Callable[[Request], Awaitable[Response]]) -> None:
        self._app = app
        self._admit = admit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif tracing.is_on():
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            method: str = scope["method"]
            with tracing.request_span(f"HTTP {method}", headers, **{"http.request.method": method}):
                await self._answer(scope, receive, send)
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        request_id, length, chunked = None, None, False
        for name, value in scope["headers"]:
            if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
                request_id = value.decode()
            elif name == b"content-length":
                length = value
            elif name == b"transfer-encoding":
                chunked = True
        request_id = request_id or os.urandom(8).hex()
        scope["request_id"] = request_id
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        header = (b"x-request-id", request_id.encode())
        status = 0
        size = 0
        too_large = length is not None and not _within_limit(length)
        if b"%" in scope["raw_path"]:
            # An escaped slash belongs to its segment: it must not lead to another route.
            scope["path"] = unquote(_ESCAPED_SLASH.sub(b"%252F", scope["raw_path"]).decode())

        async def receive_limited() -> Message:
            nonlocal size
            message = await receive()
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                if size > MAX_BODY_BYTES:
                    raise PayloadTooLarge(MAX_BODY_BYTES)
            return message

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], header]
            await send(message)

        try:
            if too_large:
                refused: Any = error_response(PayloadTooLarge(MAX_BODY_BYTES))
                await refused(scope, receive, send_noted)
                return
            if chunked:
                # Its size is known at its end only, and is checked before anything else.
                received = await _read_ahead(receive_limited)
            else:
                received = receive_limited
            if scope["method"] == "POST" and (path := _ADMIT.fullmatch(scope["path"])) is not None:
                scope["path_params"] = {"user_id": path[1]}
                answer = await self._admit(Request(scope, received))
                await answer(scope, receive, send_noted)
            else:
                await self._app(scope, received, send_noted)
        except ClientDisconnect:
            status = CLIENT_CLOSED_REQUEST
        except asyncio.CancelledError:
            # Only the end of the server cancels a request, when it has waited for as long as it may.
            if status:
                raise
            await error_response(BackendUnavailable(ENDING), request_id)(scope, receive, send_noted)
        except OrchestratorError as error:
            if status:
                raise  # the answer has begun; the connection must show that it is broken
            await ours(error, request_id)(scope, receive, send_noted)
        except Exception:  # the last stop: the caller gets an id, the log gets the trace
            log.exception("internal_error", method=scope["method"], path=scope["path"])
            if status:
                raise  # the answer has begun; the connection must show that it is broken
            defect = error_response(InternalError("internal"), request_id)
            await defect(scope, receive, send_noted)
        finally:
            seconds = time.perf_counter() - started
            metrics.requested(scope["method"], status, seconds)
            if tracing.is_on():
                route = getattr(scope.get("route"), "path", "/engines/{user_id}/admit")
                tracing.annotate(**{"http.response.status_code": status, "http.route": route, "request_id": request_id})
            log.info(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=status,
                duration_ms=round(seconds * 1000, 2),
            )


def _within_limit(length: bytes) -> bool:
    return length.isdigit() and len(length) < 10 and int(length) <= MAX_BODY_BYTES


async def _read_ahead(receive: Receive) -> Receive:
    """The whole body, to be received again."""
    messages = [await receive()]
    while messages[-1].get("more_body"):
        messages.append(await receive())
    waiting = iter(messages)

    async def again() -> Message:
        return next(waiting, None) or await receive()

    return again
