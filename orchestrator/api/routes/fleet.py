"""Many engines at once: list, status, metrics. For the admin key without a product: of all products."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import Response

from orchestrator.api.auth import plane_of, product_or_all
from orchestrator.api.errors import BY_PRODUCTS, errors
from orchestrator.api.http import answer, dumps, parameter, query_integer
from orchestrator.api.models import (
    FleetAnswer,
    ListAnswer,
    MetricsAnswer,
    Percentiles,
    ProductFleet,
    Restarts,
    timestamp,
)
from orchestrator.errors import InvalidRequest
from orchestrator.lifecycle import State
from orchestrator.registry.rows import engine_url

if TYPE_CHECKING:
    from uuid import UUID

router = APIRouter(tags=["fleet"])

COMMON = errors(*BY_PRODUCTS)
MAX_OFFSET = 2**31 - 1


@router.get(
    "/engines",
    summary="List engines",
    description="In order of creation; pages by `limit` and `offset`. Never contains keys.",
    responses={200: {"model": ListAnswer}, **errors("INVALID_REQUEST"), **COMMON},
    openapi_extra={
        "parameters": [
            parameter("status", {"type": "string", "enum": [state.value for state in State]}),
            parameter("limit", {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}),
            parameter("offset", {"type": "integer", "minimum": 0, "default": 0}),
        ]
    },
)
async def list_engines(request: Request) -> Response:
    caller = await product_or_all(request, "read")
    status = request.query_params.get("status")
    if status is not None and status not in set(State):
        raise InvalidRequest("status", f"one of {', '.join(State)}")
    limit = query_integer(request, "limit", 100, 1, 1000)
    offset = query_integer(request, "offset", 0, 0, MAX_OFFSET)
    product_id = None if caller is None else caller.product_id
    rows, total = await plane_of(request).registry.fleet.engines(product_id, status, limit, offset)
    engines = [
        {
            "engine_id": str(row["id"]),
            "user_id": row["user_id"],
            "status": row["status"],
            "url": engine_url(row["host"], row["endpoint_port"]),
            "engine_version": row["engine_version"],
            "created_at": timestamp(row["created_at"]),
            "last_health_at": None if row["last_health_at"] is None else timestamp(row["last_health_at"]),
            **({"product_id": str(row["product_id"])} if caller is None else {}),
        }
        for row in rows
    ]
    return Response(dumps({"engines": engines, "total": total}), media_type="application/json")


@router.get(
    "/status",
    summary="The fleet now",
    responses={200: {"model": FleetAnswer}, **COMMON},
)
async def status(request: Request) -> Response:
    caller = await product_or_all(request, "read")
    fleet_registry = plane_of(request).registry.fleet
    scope = None if caller is None else caller.product_id
    rows = await fleet_registry.by_status(scope)
    restarts = Restarts(**dict(await fleet_registry.restarts(scope)))
    per_product: defaultdict[UUID, dict[str, int]] = defaultdict(_no_engines)
    by_status = _no_engines()
    for row in rows:
        per_product[row["product_id"]][row["status"]] = row["engines"]
        by_status[row["status"]] += row["engines"]
    total, failed = sum(by_status.values()), by_status[State.FAILED]
    health = "ok" if not failed else "critical" if failed * 4 >= total else "degraded"
    products = None
    if caller is None:
        products = [
            ProductFleet(product_id=product_id, total=sum(counts.values()), by_status=counts)
            for product_id, counts in per_product.items()
        ]
    fleet = FleetAnswer(
        total=total,
        by_status=by_status,
        health=health,
        unhealthy_count=failed,
        restarts=restarts,
        products=products,
    )
    return answer(fleet, exclude_none={"products"})


def _no_engines() -> dict[str, int]:
    return dict.fromkeys((state.value for state in State), 0)


@router.get(
    "/metrics",
    summary="Numbers of the last hour, and totals",
    description="JSON for a product's own use; `/prometheus` is for monitoring.",
    responses={200: {"model": MetricsAnswer}, **COMMON},
)
async def metrics(request: Request) -> Response:
    caller = await product_or_all(request, "read")
    row = await plane_of(request).registry.fleet.metrics(None if caller is None else caller.product_id)
    p50, p95, p99 = row["boot_ms"] or (None, None, None)
    return answer(
        MetricsAnswer(
            provisions_1h=row["provisions"],
            crashes_1h=row["crashes"],
            restarts_1h=row["restarts"],
            avg_boot_ms=row["avg_boot_ms"],
            boot_ms=Percentiles(p50=p50, p95=p95, p99=p99),
            total_provisions=row["total_provisions"],
            total_destroys=row["total_destroys"],
        )
    )
