"""The scrape. For a product's own numbers as JSON there is `/metrics`."""

from __future__ import annotations

from collections import defaultdict

from fastapi import APIRouter, Request
from starlette.responses import Response

from orchestrator import metrics
from orchestrator.api.auth import plane_of, require_monitor
from orchestrator.api.errors import EVERYWHERE, errors
from orchestrator.lifecycle import State

router = APIRouter(tags=["admin"])


@router.get(
    "/prometheus",
    summary="Metrics for Prometheus",
    description="In its text format, of all workers of this process. The admin key comes in `X-Admin-Key` or as a "
    "bearer token. Series of every product are there from the first scrape, at zero.",
    responses={
        200: {
            "description": "exposition",
            "content": {
                "text/plain": {
                    "schema": {"type": "string"},
                    "example": 'orchestrator_engines{product="demo",backend="docker",status="running"} 12.0\n',
                }
            },
        },
        **errors("INVALID_ADMIN_KEY", *EVERYWHERE),
    },
    response_class=Response,
)
async def prometheus(request: Request) -> Response:
    require_monitor(request)
    registry = plane_of(request).registry
    metrics.know_products(await registry.fleet.slugs())
    engines: dict[tuple[str, str], int] = {}
    pool: defaultdict[str, int] = defaultdict(int)
    for row in await registry.fleet.by_slug():
        engines[row["slug"], row["status"]] = row["engines"]
        pool[row["slug"]] += row["pool"]
    waiting, age_s = await registry.audit.unsequenced()
    fleet = metrics.Fleet(engines, pool, waiting, age_s)
    text = metrics.exposition(fleet, [state.value for state in State])
    return Response(text, headers={"Content-Type": metrics.CONTENT_TYPE})
