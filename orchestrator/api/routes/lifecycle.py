"""Provision, start, stop, sleep, recover, keys, destroy: calls that change an engine."""

from __future__ import annotations

import hashlib
import re

from fastapi import APIRouter, Request
from starlette.responses import Response

from orchestrator import metrics
from orchestrator.api.auth import plane_of, product_caller
from orchestrator.api.errors import BY_PRODUCTS, errors
from orchestrator.api.http import answer, body_of, json_body, path_user_id
from orchestrator.api.models import (
    KeepAliveAnswer,
    KeepAliveRequest,
    NoBody,
    ProvisionAnswer,
    ProvisionRequest,
    RotateKeyAnswer,
    RotateKeyRequest,
    StartAnswer,
    StatusAnswer,
)
from orchestrator.api.openapi import USER_ID
from orchestrator.errors import InvalidRequest, ProductNotFound, QuotaExceeded
from orchestrator.policy import image_of

router = APIRouter(tags=["lifecycle"])

COMMON = ("INVALID_REQUEST", *BY_PRODUCTS)
ON_ENGINE = (*COMMON, "ENGINE_NOT_FOUND", "ENGINE_BUSY")
BOOTING = ("BOOT_TIMEOUT", "BACKEND_ERROR", "BACKEND_UNAVAILABLE", "IMAGE_NOT_FOUND")

_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e][\x20-\x7e]{0,254}")


@router.post(
    "/engines/provision",
    summary="Create an engine",
    description="Answers when the engine is healthy. With `Idempotency-Key` (kept for 24 h) the same call gives the "
    "same answer and joins one that is under way.",
    responses={
        200: {"model": ProvisionAnswer},
        **errors(
            *COMMON,
            *BOOTING,
            "ENGINE_ALREADY_EXISTS",
            "ENGINE_BUSY",
            "IDEMPOTENCY_CONFLICT",
            "QUOTA_EXCEEDED",
            "PORT_EXHAUSTION",
        ),
    },
    openapi_extra=json_body(ProvisionRequest)
    | {
        "parameters": [
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": False,
                "schema": {"type": "string", "maxLength": 255},
            }
        ]
    },
)
async def provision(request: Request) -> Response:
    caller = await product_caller(request, "manage")
    body = await body_of(request, ProvisionRequest)
    idempotency = None
    if (key := request.headers.get("idempotency-key")) is not None:
        if not _IDEMPOTENCY_KEY.fullmatch(key):
            raise InvalidRequest("Idempotency-Key", "must be 1 to 255 printable ASCII characters")
        idempotency = key, hashlib.sha256(body.model_dump_json().encode()).hexdigest()
    plane = plane_of(request)
    product = await plane.registry.products.by_id(caller.product_id)
    if product is None:
        raise ProductNotFound(str(caller.product_id))
    image = image_of(product.policy, body.engine_version, plane.settings.engine_image)
    try:
        await plane.lifecycle.provision(
            caller.product_id, body.user_id, engine_version=image, actor=caller.actor, idempotency=idempotency
        )
    except QuotaExceeded:
        metrics.quota_exceeded(caller.product_id)
        raise
    found = await plane.discovery.look_up(caller, body.user_id)
    return answer(
        ProvisionAnswer(
            engine_id=found.engine_id,
            user_id=found.user_id,
            status=found.status,
            url=found.url,
            api_key=found.api_key,
        ),
        exclude_none={"api_key"} if caller.is_admin else None,
    )


@router.delete(
    "/engines/{user_id}",
    summary="Destroy an engine with its data",
    description="Cancels whatever is under way. Irreversible.",
    responses={200: {"model": StatusAnswer}, **errors(*COMMON, "ENGINE_NOT_FOUND", "BACKEND_UNAVAILABLE")},
    openapi_extra=USER_ID,
)
async def destroy(request: Request) -> Response:
    caller = await product_caller(request, "manage")
    user_id = path_user_id(request)
    engine_id = await plane_of(request).lifecycle.destroy(caller.product_id, user_id, actor=caller.actor)
    return answer(StatusAnswer(status="destroyed", engine_id=engine_id))


@router.post(
    "/engines/{user_id}/start",
    summary="Start a stopped, sleeping or failed engine",
    responses={200: {"model": StartAnswer}, **errors(*ON_ENGINE, *BOOTING, "ENGINE_ALREADY_RUNNING")},
    openapi_extra=USER_ID,
)
async def start(request: Request) -> Response:
    caller = await product_caller(request, "manage")
    user_id = path_user_id(request)
    await body_of(request, NoBody, optional=True)
    engine = await plane_of(request).lifecycle.start(caller.product_id, user_id, actor=caller.actor)
    return answer(StartAnswer(status=engine.status, url=engine.url))


@router.post(
    "/engines/{user_id}/stop",
    summary="Stop an engine, keeping its data",
    description="SIGTERM, 30 s, SIGKILL. A boot under way is cancelled; restarts of a failed engine end.",
    responses={200: {"model": StatusAnswer}, **errors(*ON_ENGINE, "ENGINE_NOT_RUNNING", "BACKEND_UNAVAILABLE")},
    openapi_extra=USER_ID,
)
async def stop(request: Request) -> Response:
    caller = await product_caller(request, "manage")
    user_id = path_user_id(request)
    await body_of(request, NoBody, optional=True)
    engine = await plane_of(request).lifecycle.stop(caller.product_id, user_id, actor=caller.actor)
    return answer(StatusAnswer(status=engine.status, engine_id=engine.id))


@router.post(
    "/engines/{user_id}/sleep",
    summary="Put an engine to sleep now",
    description="Frozen in memory where the backend can. An engine with a turn in flight is `ENGINE_BUSY`.",
    responses={200: {"model": StatusAnswer}, **errors(*ON_ENGINE, "ENGINE_NOT_RUNNING", "BACKEND_UNAVAILABLE")},
    openapi_extra=USER_ID,
)
async def sleep(request: Request) -> Response:
    caller = await product_caller(request, "manage")
    user_id = path_user_id(request)
    await body_of(request, NoBody, optional=True)
    engine = await plane_of(request).lifecycle.sleep(caller.product_id, user_id, actor=caller.actor)
    return answer(StatusAnswer(status=engine.status, engine_id=engine.id))


@router.post(
    "/engines/{user_id}/recover",
    summary="Bring a failed engine up again now",
    responses={
        200: {"model": StatusAnswer},
        **errors(*ON_ENGINE, *BOOTING, "ENGINE_ALREADY_RUNNING", "ENGINE_NOT_RUNNING"),
    },
    openapi_extra=USER_ID,
)
async def recover(request: Request) -> Response:
    caller = await product_caller(request, "manage")
    user_id = path_user_id(request)
    await body_of(request, NoBody, optional=True)
    engine = await plane_of(request).lifecycle.recover(caller.product_id, user_id, actor=caller.actor)
    return answer(StatusAnswer(status=engine.status, engine_id=engine.id))


@router.post(
    "/engines/{user_id}/keep-alive",
    summary="Keep an engine awake for a while",
    responses={200: {"model": KeepAliveAnswer}, **errors(*ON_ENGINE, "ENGINE_NOT_RUNNING")},
    openapi_extra=USER_ID | json_body(KeepAliveRequest),
)
async def keep_alive(request: Request) -> Response:
    caller = await product_caller(request, "admit")
    user_id = path_user_id(request)
    body = await body_of(request, KeepAliveRequest)
    engine = await plane_of(request).lifecycle.keep_alive(caller.product_id, user_id, body.seconds)
    return answer(KeepAliveAnswer(engine_id=engine.id, keep_alive_until=engine.keep_alive_until))


@router.post(
    "/engines/{user_id}/rotate-key",
    summary="Give an engine a new key",
    description="Live, with an overlap in which both keys are valid, where the engine supports it.",
    responses={200: {"model": RotateKeyAnswer}, **errors(*ON_ENGINE, "BACKEND_UNAVAILABLE")},
    openapi_extra=USER_ID | json_body(RotateKeyRequest, optional=True),
)
async def rotate_key(request: Request) -> Response:
    caller = await product_caller(request, "manage")
    user_id = path_user_id(request)
    body = await body_of(request, RotateKeyRequest, optional=True)
    plane = plane_of(request)
    rotated = await plane.lifecycle.rotate_key(
        caller.product_id, user_id, actor=caller.actor, overlap_s=body.overlap_seconds
    )
    found = await plane.discovery.look_up(caller, user_id)
    return answer(
        RotateKeyAnswer(
            engine_id=found.engine_id,
            api_key=found.api_key,
            overlap_seconds=rotated.overlap_s,
            restarted=rotated.restarted,
        ),
        exclude_none={"api_key"} if caller.is_admin else None,
    )
