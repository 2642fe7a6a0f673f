"""The one place where an error becomes an answer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import orjson
import structlog
from fastapi.exceptions import RequestValidationError
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import compile_path

from orchestrator.api.models import Answer
from orchestrator.errors import (
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    OrchestratorError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastapi import FastAPI
    from starlette.requests import Request

__all__ = ["BY_PRODUCTS", "EVERYWHERE", "STATUS", "error_response", "errors", "invalid_request", "ours"]

log = structlog.get_logger("orchestrator.api")

STATUS: Final[dict[str, int]] = {
    "INVALID_PLATFORM_KEY": 401,
    "INVALID_ADMIN_KEY": 401,
    "PRODUCT_NOT_FOUND": 404,
    "PRODUCT_SLUG_EXISTS": 409,
    "ENGINE_NOT_FOUND": 404,
    "ENGINE_ALREADY_EXISTS": 409,
    "ENGINE_NOT_RUNNING": 409,
    "ENGINE_ALREADY_RUNNING": 409,
    "QUOTA_EXCEEDED": 429,
    "RATE_LIMITED": 429,
    "POLICY_DENIED": 403,
    "PORT_EXHAUSTION": 503,
    "BOOT_TIMEOUT": 504,
    "INVALID_REQUEST": 400,
    "IDEMPOTENCY_CONFLICT": 409,
    "ENGINE_BUSY": 409,
    "BACKEND_ERROR": 502,
    "BACKEND_UNAVAILABLE": 503,
    "DATABASE_UNAVAILABLE": 503,
    "IMAGE_NOT_FOUND": 502,
    "NOT_SUPPORTED": 409,
    "WAIT_TIMEOUT": 408,
    "KEY_NOT_FOUND": 404,
    "WEBHOOK_NOT_FOUND": 404,
    "PRODUCT_NOT_EMPTY": 409,
    "NOT_FOUND": 404,
    "METHOD_NOT_ALLOWED": 405,
    "PAYLOAD_TOO_LARGE": 413,
    "INTERNAL_ERROR": 500,
    "CONFIGURATION_ERROR": 500,
}

# What every call may answer, and what every call that carries a platform key (or an admin key in its place) may.
EVERYWHERE: Final = ("PAYLOAD_TOO_LARGE", "DATABASE_UNAVAILABLE", "INTERNAL_ERROR")
BY_PRODUCTS: Final = (
    "INVALID_PLATFORM_KEY",
    "INVALID_ADMIN_KEY",
    "PRODUCT_NOT_FOUND",
    "POLICY_DENIED",
    *EVERYWHERE,
)

DEFAULT_RETRY_AFTER_S = 5


class ErrorBody(Answer):
    code: str = Field(description="stable; compare this", examples=["ENGINE_NOT_FOUND"])
    message: str = Field(description="one line for a person")
    details: dict[str, Any] | None = Field(None, description="typed data of this code")


class ErrorAnswer(Answer):
    """Every answer that is not 2xx."""

    error: ErrorBody


def error_response(error: OrchestratorError, request_id: str | None = None) -> Response:
    status = STATUS.get(error.code, 500)
    body: dict[str, Any] = {"code": error.code, "message": error.message}
    details = dict(error.details or {})
    if status == 500:
        # Whatever went wrong inside stays inside; the id leads to the log.
        body = {"code": "INTERNAL_ERROR", "message": "An internal error; the request id leads to the log."}
        details = {"request_id": request_id}
    if details:
        body["details"] = details
    headers = {}
    retry_after_s = error.retry_after_s
    if retry_after_s is None and status in (429, 503):
        retry_after_s = DEFAULT_RETRY_AFTER_S
    if retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    return Response(orjson.dumps({"error": body}), status, headers, "application/json")


def invalid_request(problems: Sequence[Any]) -> InvalidRequest:
    """Pydantic's findings as one error that names the first field, and lists all."""
    found = []
    for problem in problems:
        location = [str(part) for part in problem["loc"] if part not in ("body", "query", "path", "header")]
        field = ".".join(location) or "body"
        reason = str(problem["msg"]).removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            reason = "unknown field"
        elif problem["type"] == "json_invalid":
            field, reason = "body", "is not valid JSON"
        elif problem["type"] == "missing":
            reason = "required"
        found.append({"field": field, "reason": reason})
    return InvalidRequest(found[0]["field"], found[0]["reason"], errors=found)


def ours(error: OrchestratorError, request_id: str | None) -> Response:
    """The answer to an error of our own; one that is our fault is logged."""
    if STATUS.get(error.code, 500) == 500:
        log.error("internal_error", error=error.message, code=error.code)
    return error_response(error, request_id)


def install(app: FastAPI) -> None:
    @app.exception_handler(OrchestratorError)
    async def _ours(request: Request, error: OrchestratorError) -> Response:
        return ours(error, request.scope.get("request_id"))

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> Response:
        return error_response(invalid_request(error.errors()))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            response = error_response(MethodNotAllowed(f"{request.method} is not allowed here."))
            response.headers["Allow"] = ", ".join(sorted(_methods(request)))
            return response
        if error.status_code == 404:
            return error_response(NotFound(f"No such path: {request.url.path[:200]}"))
        return error_response(InvalidRequest("body", str(error.detail)))


def _methods(request: Request) -> set[str]:
    """What all routes of this path allow together, as the documentation tells it."""
    documented = request.app.openapi()["paths"].items()
    matching = (routes for path, routes in documented if compile_path(path)[0].match(request.scope["path"]))
    return {method.upper() for routes in matching for method in routes}


def errors(*codes: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` for these codes, an example for each."""
    by_status: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        status = STATUS[code]
        entry = by_status.setdefault(
            status, {"model": ErrorAnswer, "description": "", "content": {"application/json": {"examples": {}}}}
        )
        entry["description"] = " · ".join(filter(None, (entry["description"], f"`{code}`")))
        example = {"error": {"code": code, "message": "…"}}
        entry["content"]["application/json"]["examples"][code] = {"value": example}
        if status in (429, 503):
            entry["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}
    return by_status
