"""Products: onboarding and policy. Admin key only."""

from __future__ import annotations

from uuid import UUID

from fastapi import APIRouter, Request
from starlette.responses import Response

from orchestrator.api.auth import plane_of, require_admin
from orchestrator.api.errors import EVERYWHERE, errors
from orchestrator.api.http import answer, body_of, json_body
from orchestrator.api.models import PolicyAnswer, PolicyRequest, RegisterAnswer, RegisterRequest
from orchestrator.errors import ProductNotFound, ProductSlugExists
from orchestrator.keys import new_platform_key, sha256_hex

router = APIRouter(tags=["admin"])


@router.post(
    "/products/register",
    summary="Onboard a product",
    description="The platform key is shown only in this answer.",
    responses={
        200: {"model": RegisterAnswer},
        **errors("INVALID_REQUEST", "INVALID_ADMIN_KEY", "PRODUCT_SLUG_EXISTS", *EVERYWHERE),
    },
    openapi_extra=json_body(RegisterRequest),
)
async def register(request: Request) -> Response:
    require_admin(request)
    body = await body_of(request, RegisterRequest)
    key = new_platform_key()
    policy = body.policy.model_dump(exclude_unset=True, exclude_none=True)
    product_id = await plane_of(request).registry.products.register(
        body.slug, body.display_name, policy, sha256_hex(key)
    )
    if product_id is None:
        raise ProductSlugExists(body.slug)
    return answer(RegisterAnswer(product_id=product_id, slug=body.slug, platform_api_key=key))


@router.put(
    "/products/{product_id}/policy",
    summary="Replace a product's policy",
    description="Whole, in force for the next call. A lower `max_engines` destroys nothing.",
    responses={
        200: {"model": PolicyAnswer},
        **errors("INVALID_REQUEST", "INVALID_ADMIN_KEY", "PRODUCT_NOT_FOUND", *EVERYWHERE),
    },
    openapi_extra=json_body(PolicyRequest)
    | {"parameters": [{"name": "product_id", "in": "path", "required": True, "schema": {"type": "string"}}]},
)
async def replace_policy(request: Request) -> Response:
    require_admin(request)
    body = await body_of(request, PolicyRequest)
    text: str = request.path_params["product_id"]
    try:
        product_id = UUID(text)
    except ValueError:
        raise ProductNotFound(text[:100]) from None
    policy = body.policy.model_dump(exclude_unset=True, exclude_none=True)
    if not await plane_of(request).registry.products.replace_policy(product_id, policy):
        raise ProductNotFound(text)
    return answer(PolicyAnswer(policy=policy))
