"""Which engine belongs to a user: look-up, admit, wait."""

from __future__ import annotations

import math
from dataclasses import replace

from fastapi import APIRouter, Request
from starlette.responses import Response

from orchestrator.api.auth import plane_of, product_caller
from orchestrator.api.errors import errors
from orchestrator.api.http import body_of, dumps, json_body, path_user_id
from orchestrator.api.models import AdmitAnswer, AdmitRequest, EngineAnswer, timestamp
from orchestrator.api.openapi import USER_ID
from orchestrator.api.routes.lifecycle import BOOTING, COMMON
from orchestrator.discovery import Admission, Found
from orchestrator.errors import InvalidRequest
from orchestrator.lifecycle import State

router = APIRouter(tags=["discovery"])

_NO_FLAGS = AdmitRequest()


@router.get(
    "/engines/{user_id}",
    summary="Look an engine up",
    description="Never changes anything. `api_key` is null for a key with the scope `read`.",
    responses={200: {"model": EngineAnswer}, **errors(*COMMON, "ENGINE_NOT_FOUND")},
    openapi_extra=USER_ID,
)
async def look_up(request: Request) -> Response:
    caller = await product_caller(request, "read")
    found = await plane_of(request).discovery.look_up(caller, path_user_id(request))
    return Response(dumps(_engine(found, to_admin=caller.is_admin)), media_type="application/json")


@router.post(
    "/engines/{user_id}/admit",
    summary="Find, create or wake a user's engine",
    description="The call to make before every request to an engine. Idempotent. `admitted: false` says why in "
    "`reason`.",
    responses={
        200: {"model": AdmitAnswer},
        **errors(*COMMON, *BOOTING, "ENGINE_BUSY", "RATE_LIMITED", "QUOTA_EXCEEDED", "PORT_EXHAUSTION"),
    },
    openapi_extra=USER_ID | json_body(AdmitRequest, optional=True),
)
async def admit(request: Request) -> Response:
    plane = plane_of(request)
    platform_key = request.headers.get("x-platform-key")
    try:
        user_id = path_user_id(request)
        raw = await request.body()
        flags = _NO_FLAGS if not raw else await body_of(request, AdmitRequest, optional=True)
    except InvalidRequest:
        await product_caller(request, "admit")  # who may not call learns nothing of the input
        raise
    if platform_key is not None:
        admission = await plane.discovery.admit(
            platform_key, user_id, auto_provision=flags.auto_provision, auto_wake=flags.auto_wake
        )
    else:
        caller = await product_caller(request, "admit")
        admission = await plane.discovery.admit_as_admin(
            caller, user_id, auto_provision=flags.auto_provision, auto_wake=flags.auto_wake
        )
    return _admission(admission, to_admin=platform_key is None)


@router.get(
    "/engines/{user_id}/wait",
    summary="Wait until an engine is in a state",
    responses={200: {"model": EngineAnswer}, **errors(*COMMON, "ENGINE_NOT_FOUND", "WAIT_TIMEOUT")},
    openapi_extra={
        "parameters": [
            *USER_ID["parameters"],
            {
                "name": "status",
                "in": "query",
                "required": True,
                "schema": {"type": "string", "enum": [*(state.value for state in State), "destroyed"]},
            },
            {
                "name": "timeout_s",
                "in": "query",
                "schema": {"type": "number", "default": 30, "minimum": 0, "maximum": 300},
            },
        ]
    },
)
async def wait(request: Request) -> Response:
    caller = await product_caller(request, "admit")
    user_id = path_user_id(request)
    wanted = request.query_params.get("status", "")
    if wanted != "destroyed" and wanted not in set(State):
        raise InvalidRequest("status", f"one of {', '.join(State)}, destroyed")
    timeout_s = _number(request.query_params.get("timeout_s", "30"))
    plane = plane_of(request)
    found = await plane.discovery.look_up(caller, user_id)
    if await plane.lifecycle.wait(caller.product_id, user_id, wanted, timeout_s) is None:
        found = replace(found, status="destroyed", url=None, api_key=None)
    else:
        found = await plane.discovery.look_up(caller, user_id)
    return Response(dumps(_engine(found, to_admin=caller.is_admin)), media_type="application/json")


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 300:
        raise InvalidRequest("timeout_s", "a number of seconds from 0 to 300")
    return value


def _engine(found: Found, *, to_admin: bool) -> dict[str, object]:
    key = {} if to_admin else {"api_key": found.api_key}
    return {
        "engine_id": str(found.engine_id),
        "user_id": found.user_id,
        "status": found.status,
        "url": found.url,
        **key,
        "engine_version": found.engine_version,
        "created_at": timestamp(found.created_at),
        "last_health_at": None if found.last_health_at is None else timestamp(found.last_health_at),
    }


def _admission(admission: Admission, *, to_admin: bool) -> Response:
    if admission.engine is not None:
        body = dumps({"admitted": True, "engine": _engine(admission.engine, to_admin=to_admin)})
        return Response(body, media_type="application/json")
    headers = {}
    if admission.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(admission.retry_after_s)))
    body = dumps({"admitted": False, "engine": None, "reason": admission.reason})
    return Response(body, headers=headers, media_type="application/json")
