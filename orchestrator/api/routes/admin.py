"""Products: onboarding and policy. Admin key only."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from orchestrator.api.admin_models import DeletedProduct, ListedProduct, ProductsAnswer
from orchestrator.api.auth import plane_of, require_admin
from orchestrator.api.errors import EVERYWHERE, errors
from orchestrator.api.http import answer, body_of, json_body, parameter, path_parameter, path_uuid, query_flag
from orchestrator.api.models import PolicyAnswer, PolicyRequest, RegisterAnswer, RegisterRequest
from orchestrator.errors import ProductNotFound, ProductSlugExists
from orchestrator.keys import new_platform_key, sha256_hex

router = APIRouter(tags=["admin"])

DELETE_WAIT_S = 60.0


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
    openapi_extra=json_body(PolicyRequest) | {"parameters": [path_parameter("product_id")]},
)
async def replace_policy(request: Request) -> Response:
    require_admin(request)
    body = await body_of(request, PolicyRequest)
    product_id = path_uuid(request, "product_id", ProductNotFound)
    policy = body.policy.model_dump(exclude_unset=True, exclude_none=True)
    if not await plane_of(request).registry.products.replace_policy(product_id, policy):
        raise ProductNotFound(str(product_id))
    plane_of(request).ceilings.apply(product_id)
    return answer(PolicyAnswer(policy=policy))


@router.get(
    "/products",
    summary="List products",
    responses={200: {"model": ProductsAnswer}, **errors("INVALID_ADMIN_KEY", *EVERYWHERE)},
)
async def list_products(request: Request) -> Response:
    require_admin(request)
    rows = await plane_of(request).registry.products.listed()
    return answer(
        ProductsAnswer(
            products=[
                ListedProduct(
                    product_id=row["id"],
                    slug=row["slug"],
                    display_name=row["display_name"],
                    policy=row["policy"],
                    engines=row["engines"],
                )
                for row in rows
            ]
        )
    )


@router.delete(
    "/products/{product_id}",
    summary="Delete a product",
    description="Refused while it has engines, unless `force`: then all are destroyed with their data. Its keys "
    "are revoked at once, and a deletion that was begun goes on after a crash. The audit log stays.",
    responses={
        200: {"model": DeletedProduct},
        **errors("INVALID_REQUEST", "INVALID_ADMIN_KEY", "PRODUCT_NOT_FOUND", "PRODUCT_NOT_EMPTY", *EVERYWHERE),
    },
    openapi_extra={
        "parameters": [path_parameter("product_id"), parameter("force", {"type": "boolean", "default": False})]
    },
)
async def delete_product(request: Request) -> Response:
    require_admin(request)
    force = query_flag(request, "force")
    product_id = path_uuid(request, "product_id", ProductNotFound)
    gone = await plane_of(request).offboarding.delete(product_id, force=force, wait_s=DELETE_WAIT_S)
    return answer(DeletedProduct(product_id=product_id, status="deleted" if gone else "deleting"))
