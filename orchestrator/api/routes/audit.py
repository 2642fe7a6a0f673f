"""The audit log, as far as the sequencer has placed it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from orchestrator.api.admin_models import AuditAnswer
from orchestrator.api.auth import plane_of, product_or_all
from orchestrator.api.errors import BY_PRODUCTS, errors
from orchestrator.api.http import dumps, parameter, query_integer, query_time, text_of
from orchestrator.api.models import timestamp
from orchestrator.errors import InvalidRequest

if TYPE_CHECKING:
    from orchestrator.registry.rows import AuditRow

router = APIRouter(tags=["audit"])

LAST = 2**63 - 1


@router.get(
    "/audit",
    summary="Read the audit log",
    description="In the order of the chain, the oldest first (`order=desc`: the newest), at most a second after the "
    "change. Page by `cursor`: no entry is left out or comes twice, whatever is added meanwhile. For new entries as "
    "they come, use `/events`.",
    responses={200: {"model": AuditAnswer}, **errors("INVALID_REQUEST", *BY_PRODUCTS)},
    openapi_extra={
        "parameters": [
            parameter("user_id", {"type": "string"}),
            parameter("action", {"type": "string"}, "as `provision`, `wake`, `admit_denied`"),
            parameter("since", {"type": "string", "format": "date-time"}, "inclusive"),
            parameter("until", {"type": "string", "format": "date-time"}, "exclusive"),
            parameter("limit", {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}),
            parameter("cursor", {"type": "string"}, "the `next_cursor` of the page before, with the same order"),
            parameter("order", {"type": "string", "enum": ["asc", "desc"], "default": "asc"}),
        ]
    },
)
async def read_audit(request: Request) -> Response:
    caller = await product_or_all(request, "read")
    query = request.query_params
    limit = query_integer(request, "limit", 100, 1, 1000)
    after = query_integer(request, "cursor", 0, 0, LAST) if "cursor" in query else None
    order = query.get("order", "asc")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order", "asc or desc")
    for name in ("user_id", "action"):
        if "\x00" in query.get(name, ""):
            raise InvalidRequest(name, "must not contain control characters")
    rows = await plane_of(request).registry.audit.page(
        None if caller is None else caller.product_id,
        after=after,
        limit=limit + 1,
        newest_first=order == "desc",
        user_id=query.get("user_id"),
        action=query.get("action"),
        since=query_time(request, "since"),
        until=query_time(request, "until"),
    )
    cursor = None
    if len(rows) > limit:
        del rows[limit:]
        cursor = str(rows[-1].position if caller is None else rows[-1].seq)
    entries = [_entry(row, of_all=caller is None) for row in rows]
    return Response(dumps({"entries": entries, "next_cursor": cursor}), media_type="application/json")


def _entry(row: AuditRow, *, of_all: bool) -> dict[str, Any]:
    return {
        "id": row.id,
        "seq": row.seq,
        "timestamp": timestamp(row.timestamp),
        **({"product_id": text_of(row.product_id)} if of_all else {}),
        "user_id": row.user_id,
        "engine_id": text_of(row.engine_id),
        "action": row.action,
        "actor": row.actor,
        "status": row.status,
        "metadata": row.metadata,
        "duration_ms": row.duration_ms,
        "prev_hash": row.prev_hash,
        "hash": row.hash,
    }
