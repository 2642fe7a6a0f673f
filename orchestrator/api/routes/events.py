"""The sequenced audit rows as they come, as Server-Sent Events."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import Response

from orchestrator.api.auth import plane_of, product_or_all
from orchestrator.api.errors import BY_PRODUCTS, errors
from orchestrator.api.http import dumps
from orchestrator.api.streams import Stream
from orchestrator.audit import event_of
from orchestrator.errors import DatabaseUnavailable, InvalidRequest, RateLimited
from orchestrator.events import wait_briefly
from orchestrator.keys import sha256_hex

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from uuid import UUID

    from orchestrator.control_plane import ControlPlane
    from orchestrator.registry.rows import AuditRow

router = APIRouter(tags=["audit"])

MAX_STREAMS = 1000  # of one process
PAGE = 200
POLL_S = 2.0  # where the word from the database is lost
PING_S = 15.0
ALLOWED_S = 5.0  # until a revoked key ends a stream


@router.get(
    "/events",
    summary="What happens, as it happens",
    description="Server-Sent Events from the audit log: `id` is the `seq` to send back in `Last-Event-ID`, `event` the "
    "action. In order, without a gap, across reconnects and replicas; an event may come twice after a reconnect. "
    "Without `Last-Event-ID` it begins with what comes from now on; with `0` at the oldest event kept. For the admin "
    "key over all products `seq` counts the events of all, and each has its `product_id`. Ends when the key is "
    "revoked.",
    responses={
        200: {
            "description": "a stream without an end",
            "content": {
                "text/event-stream": {
                    "schema": {"$ref": "#/components/schemas/Event"},
                    "example": 'id: 42\nevent: wake\ndata: {"seq":42,"timestamp":"2030-01-02T03:04:05.678Z",'
                    '"action":"wake","user_id":"demo-user-001","engine_id":"…","status":"running","metadata":{}}\n\n',
                }
            },
        },
        **errors("INVALID_REQUEST", "RATE_LIMITED", *BY_PRODUCTS),
    },
    openapi_extra={
        "parameters": [
            {
                "name": "Last-Event-ID",
                "in": "header",
                "required": False,
                "description": "the last `id` that was received",
                "schema": {"type": "string"},
            }
        ]
    },
    response_class=Response,
)
async def events(request: Request) -> Response:
    caller = await product_or_all(request, "read")
    plane = plane_of(request)
    product_id = None if caller is None else caller.product_id
    last = _last_event_id(request)
    if plane.notifications.audit_subscribers >= MAX_STREAMS:
        raise RateLimited(5)
    newest = await plane.registry.audit.last_seq(product_id)
    # Further on than there is: the database was restored, and what it has next is new to this reader.
    after = newest if last is None else min(last, newest)
    key = request.headers.get("x-platform-key")
    key_hash = None if key is None else sha256_hex(key)
    return Stream(_events(plane, product_id, after, key_hash), "text/event-stream")


def _last_event_id(request: Request) -> int | None:
    text = request.headers.get("last-event-id", "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise InvalidRequest("Last-Event-ID", "an id that an event had")
    return int(text)


async def _events(
    plane: ControlPlane, product_id: UUID | None, after: int, key_hash: str | None
) -> AsyncGenerator[bytes, None]:
    yield b": connected\n\n"
    told = allowed = time.monotonic()
    with plane.notifications.audit_subscription(None if product_id is None else str(product_id)) as changed:
        while True:
            try:
                rows = await plane.registry.audit.following(product_id, after, PAGE)
                if key_hash is not None and time.monotonic() - allowed > ALLOWED_S:
                    if await plane.registry.products.caller(key_hash) is None:
                        return
                    allowed = time.monotonic()
            except DatabaseUnavailable:
                rows = []  # it goes on from the same place
            if rows:
                yield b"".join(_event(row, of_all=product_id is None) for row in rows)
                after = _place(rows[-1], of_all=product_id is None)
                told = time.monotonic()
            if len(rows) == PAGE:
                continue
            if time.monotonic() - told > PING_S:
                yield b": nothing new\n\n"
                told = time.monotonic()
            await wait_briefly(changed, POLL_S)


def _place(row: AuditRow, *, of_all: bool) -> int:
    place = row.position if of_all else row.seq
    assert place is not None  # only sequenced rows are read
    return place


def _event(row: AuditRow, *, of_all: bool) -> bytes:
    place = _place(row, of_all=of_all)
    event = event_of(row)
    if of_all:
        event |= {"seq": place, "product_id": None if row.product_id is None else str(row.product_id)}
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (place, row.action.encode(), dumps(event))
