"""Webhooks of a product, and what was delivered."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from orchestrator.api.admin_models import (
    CreatedWebhook,
    DeletedWebhook,
    DeliveriesAnswer,
    Delivery,
    ListedWebhook,
    WebhookRequest,
    WebhooksAnswer,
)
from orchestrator.api.auth import plane_of, product_caller
from orchestrator.api.errors import BY_PRODUCTS, errors
from orchestrator.api.http import answer, body_of, json_body, path_parameter, path_uuid
from orchestrator.errors import WebhookNotFound

router = APIRouter(tags=["webhooks"])

COMMON = ("INVALID_REQUEST", *BY_PRODUCTS)
WEBHOOK_ID = path_parameter("webhook_id")


@router.post(
    "/webhooks",
    summary="Have events delivered",
    description="Every event from now on, in order, at least once, as a POST whose body is the `data` of `/events`. "
    "`X-Orchestrator-Signature: t=…,v1=…` is the hex HMAC-SHA256 of `{t}.{body}` under the secret, which is shown only "
    "in this answer; `X-Orchestrator-Delivery` is the same for every attempt at one event. Whatever is not 2xx within "
    "10 s is tried again with growing pauses and holds back later events; it is parked when the event is a day old. "
    "Redirects are not followed. Targets in private networks are refused unless the operator allows them.",
    responses={200: {"model": CreatedWebhook}, **errors(*COMMON, "QUOTA_EXCEEDED")},
    openapi_extra=json_body(WebhookRequest),
)
async def create_webhook(request: Request) -> Response:
    caller = await product_caller(request, "manage")
    body = await body_of(request, WebhookRequest)
    row, secret = await plane_of(request).webhooks.create(caller.product_id, body.url, body.actions())
    created = CreatedWebhook(
        webhook_id=row["id"], url=row["url"], events=row["events"], created_at=row["created_at"], secret=secret
    )
    return answer(created)


@router.get(
    "/webhooks",
    summary="List webhooks",
    responses={200: {"model": WebhooksAnswer}, **errors(*COMMON)},
)
async def list_webhooks(request: Request) -> Response:
    caller = await product_caller(request, "read")
    rows = await plane_of(request).registry.webhooks.of_product(caller.product_id)
    return answer(
        WebhooksAnswer(
            webhooks=[
                ListedWebhook(webhook_id=row["id"], url=row["url"], events=row["events"], created_at=row["created_at"])
                for row in rows
            ]
        )
    )


@router.delete(
    "/webhooks/{webhook_id}",
    summary="Delete a webhook",
    responses={200: {"model": DeletedWebhook}, **errors(*COMMON, "WEBHOOK_NOT_FOUND")},
    openapi_extra={"parameters": [WEBHOOK_ID]},
)
async def delete_webhook(request: Request) -> Response:
    caller = await product_caller(request, "manage")
    webhook_id = path_uuid(request, "webhook_id", WebhookNotFound)
    if not await plane_of(request).registry.webhooks.delete(caller.product_id, webhook_id):
        raise WebhookNotFound(str(webhook_id))
    return answer(DeletedWebhook(webhook_id=webhook_id, status="deleted"))


@router.get(
    "/webhooks/{webhook_id}/deliveries",
    summary="What was delivered",
    description="The newest first; the last 200 are kept.",
    responses={200: {"model": DeliveriesAnswer}, **errors(*COMMON, "WEBHOOK_NOT_FOUND")},
    openapi_extra={"parameters": [WEBHOOK_ID]},
)
async def list_deliveries(request: Request) -> Response:
    caller = await product_caller(request, "read")
    webhook_id = path_uuid(request, "webhook_id", WebhookNotFound)
    rows = await plane_of(request).registry.webhooks.deliveries(caller.product_id, webhook_id)
    if rows is None:
        raise WebhookNotFound(str(webhook_id))
    return answer(
        DeliveriesAnswer(deliveries=[Delivery(delivery_id=f"{webhook_id}:{row['seq']}", **dict(row)) for row in rows])
    )
