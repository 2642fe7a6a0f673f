"""Who calls. The platform key is the tenant; the admin key may act as any."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING
from uuid import UUID

from orchestrator.errors import (
    InvalidAdminKey,
    InvalidPlatformKey,
    InvalidRequest,
    PolicyDenied,
    ProductNotFound,
)
from orchestrator.keys import sha256_hex
from orchestrator.registry.rows import ALL_SCOPES, Caller

if TYPE_CHECKING:
    from starlette.requests import Request

    from orchestrator.control_plane import ControlPlane

__all__ = ["plane_of", "product_caller", "product_or_all", "require_admin", "require_monitor"]


def plane_of(request: Request) -> ControlPlane:
    plane: ControlPlane = request.app.state.plane
    return plane


def require_admin(request: Request) -> None:
    """Raises `InvalidAdminKey`. Compares with every configured key, in constant time each."""
    _require_admin_key(request, request.headers.get("x-admin-key", ""))


def require_monitor(request: Request) -> None:
    """As `require_admin`; the key may also come as a bearer token, which is what Prometheus sends."""
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    if "x-admin-key" not in request.headers and kind.lower() == "bearer":
        _require_admin_key(request, token.strip())
    else:
        require_admin(request)


def _require_admin_key(request: Request, text: str) -> None:
    given = text.encode("latin-1")  # the bytes as they came
    matches = [hmac.compare_digest(given, key.encode()) for key in plane_of(request).settings.admin_keys()]
    if not any(matches):
        raise InvalidAdminKey


async def product_caller(request: Request, scope: str) -> Caller:
    """The product that calls, allowed to use `scope`.

    Raises `InvalidPlatformKey`, `InvalidAdminKey`, `PolicyDenied`; for an admin who names no product
    `InvalidRequest`.
    """
    caller = await _caller(request)
    if caller is None:
        raise InvalidRequest("X-Product-Id", "required with X-Admin-Key on this path")
    if not caller.may(scope):
        raise PolicyDenied.scope(scope)
    return caller


async def product_or_all(request: Request, scope: str) -> Caller | None:
    """As `product_caller`; None for an admin who names no product and so means all."""
    caller = await _caller(request)
    if caller is not None and not caller.may(scope):
        raise PolicyDenied.scope(scope)
    return caller


async def _caller(request: Request) -> Caller | None:
    plane = plane_of(request)
    headers = request.headers
    if (key := headers.get("x-platform-key")) is not None:
        caller = await plane.registry.products.caller(sha256_hex(key))
        if caller is None:
            raise InvalidPlatformKey
        if caller.key_id is not None:
            plane.activity.key_used(caller.key_id)
        return caller
    if "x-admin-key" not in headers:
        raise InvalidPlatformKey
    require_admin(request)
    if (product := headers.get("x-product-id")) is None:
        return None
    return await _as_product(plane, product)


async def _as_product(plane: ControlPlane, product: str) -> Caller:
    try:
        product_id = UUID(product)
    except ValueError:
        raise ProductNotFound(product[:100]) from None
    found = await plane.registry.products.by_id(product_id)
    if found is None:
        raise ProductNotFound(product)
    return Caller(found.id, found.slug, ALL_SCOPES, None)
