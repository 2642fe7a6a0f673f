"""Platform keys of a product, and the re-encryption of stored engine keys. Admin key only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import Response

from orchestrator.api.admin_models import (
    IssuedKey,
    KeyRequest,
    KeysAnswer,
    ListedKey,
    RevokedKey,
    RewrapAnswer,
    RotatePlatformKeyRequest,
)
from orchestrator.api.auth import plane_of, require_admin
from orchestrator.api.errors import EVERYWHERE, errors
from orchestrator.api.http import answer, body_of, json_body, path_parameter, path_uuid
from orchestrator.api.models import NoBody
from orchestrator.errors import KeyNotFound, ProductNotFound
from orchestrator.keys import new_platform_key, sha256_hex

if TYPE_CHECKING:
    from orchestrator.registry.rows import PlatformKey
    from orchestrator.rewrap import Progress

router = APIRouter(tags=["admin"])

ON_PRODUCT = ("INVALID_ADMIN_KEY", "PRODUCT_NOT_FOUND", *EVERYWHERE)
PRODUCT_ID = {"parameters": [path_parameter("product_id")]}
KEY_ID = {"parameters": [path_parameter("product_id"), path_parameter("key_id")]}


def _issued(key: PlatformKey, secret: str) -> Response:
    issued = IssuedKey(key_id=key.id, platform_api_key=secret, scopes=key.scopes, expires_at=key.expires_at)
    return answer(issued)


@router.post(
    "/products/{product_id}/keys",
    summary="Issue a platform key",
    description="The key is shown only in this answer. A product has at most 100 valid ones.",
    responses={200: {"model": IssuedKey}, **errors("INVALID_REQUEST", "QUOTA_EXCEEDED", *ON_PRODUCT)},
    openapi_extra=PRODUCT_ID | json_body(KeyRequest),
)
async def issue_key(request: Request) -> Response:
    require_admin(request)
    body = await body_of(request, KeyRequest)
    product_id = path_uuid(request, "product_id", ProductNotFound)
    secret = new_platform_key()
    key = await plane_of(request).registry.platform_keys.issue(
        product_id, sha256_hex(secret), list(body.scopes), body.expires_at
    )
    return _issued(key, secret)


@router.get(
    "/products/{product_id}/keys",
    summary="List platform keys",
    description="Without the keys themselves, of which only a hash is stored.",
    responses={200: {"model": KeysAnswer}, **errors(*ON_PRODUCT)},
    openapi_extra=PRODUCT_ID,
)
async def list_keys(request: Request) -> Response:
    require_admin(request)
    keys = await plane_of(request).registry.platform_keys.listed(path_uuid(request, "product_id", ProductNotFound))
    return answer(
        KeysAnswer(
            keys=[
                ListedKey(
                    key_id=key.id,
                    scopes=key.scopes,
                    created_at=key.created_at,
                    expires_at=key.expires_at,
                    last_used_at=key.last_used_at,
                )
                for key in keys
            ]
        )
    )


@router.delete(
    "/products/{product_id}/keys/{key_id}",
    summary="Revoke a platform key",
    description="At once: the next call with it is `INVALID_PLATFORM_KEY`, on every replica.",
    responses={200: {"model": RevokedKey}, **errors("KEY_NOT_FOUND", *ON_PRODUCT)},
    openapi_extra=KEY_ID,
)
async def revoke_key(request: Request) -> Response:
    require_admin(request)
    product_id = path_uuid(request, "product_id", ProductNotFound)
    key_id = path_uuid(request, "key_id", KeyNotFound)
    if not await plane_of(request).registry.platform_keys.revoke(product_id, key_id):
        raise KeyNotFound(str(key_id))
    return answer(RevokedKey(key_id=key_id, status="revoked"))


@router.post(
    "/products/{product_id}/rotate-platform-key",
    summary="Replace the product's platform key",
    description="A new key with the scope `manage`; every other key with it ends after the overlap. Keys of the scopes "
    "`read` and `admit` stay.",
    responses={200: {"model": IssuedKey}, **errors("INVALID_REQUEST", "QUOTA_EXCEEDED", *ON_PRODUCT)},
    openapi_extra=PRODUCT_ID | json_body(RotatePlatformKeyRequest, optional=True),
)
async def rotate_platform_key(request: Request) -> Response:
    require_admin(request)
    body = await body_of(request, RotatePlatformKeyRequest, optional=True)
    product_id = path_uuid(request, "product_id", ProductNotFound)
    secret = new_platform_key()
    key = await plane_of(request).registry.platform_keys.rotate(product_id, sha256_hex(secret), body.overlap_seconds)
    return _issued(key, secret)


def _progress(progress: Progress) -> Response:
    return answer(
        RewrapAnswer(status=progress.status, total=progress.total, done=progress.done, remaining=progress.remaining)
    )


@router.post(
    "/admin/rewrap-keys",
    summary="Encrypt all stored keys under the current master key",
    description="A job that goes on after a crash, on any replica whose first master key is the same. When it is "
    "`done`, the older master key can leave `ORCH_MASTER_KEY`.",
    responses={200: {"model": RewrapAnswer}, **errors("INVALID_REQUEST", "INVALID_ADMIN_KEY", *EVERYWHERE)},
)
async def rewrap_keys(request: Request) -> Response:
    require_admin(request)
    await body_of(request, NoBody, optional=True)
    return _progress(await plane_of(request).rewrap.start())


@router.get(
    "/admin/rewrap-keys",
    summary="How far the re-encryption is",
    responses={200: {"model": RewrapAnswer}, **errors("INVALID_ADMIN_KEY", *EVERYWHERE)},
)
async def rewrap_progress(request: Request) -> Response:
    require_admin(request)
    return _progress(await plane_of(request).rewrap.progress())
