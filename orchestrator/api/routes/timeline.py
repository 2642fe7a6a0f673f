"""What an engine's operation is doing, or did."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from orchestrator.api.auth import plane_of, product_caller
from orchestrator.api.errors import BY_PRODUCTS, errors
from orchestrator.api.http import answer, path_user_id
from orchestrator.api.models import TimelineAnswer, TimelinePhase
from orchestrator.api.openapi import USER_ID
from orchestrator.lifecycle.timeline import view_of

router = APIRouter(tags=["lifecycle"])


@router.get(
    "/engines/{user_id}/timeline",
    summary="The phases of the operation under way, or of the last one",
    description="Where a slow or failed start spends its time: waiting in the `queue`, in a `pull` (with its "
    "progress), in `create`, `start` or `probe`. At most a second late.",
    responses={200: {"model": TimelineAnswer}, **errors("INVALID_REQUEST", *BY_PRODUCTS, "ENGINE_NOT_FOUND")},
    openapi_extra=USER_ID,
)
async def timeline(request: Request) -> Response:
    caller = await product_caller(request, "read")
    user_id = path_user_id(request)
    view = await view_of(plane_of(request).means, caller.product_id, user_id)
    return answer(
        TimelineAnswer(
            engine_id=view.engine_id,
            operation=view.operation,
            status=view.status,
            started_at=view.started_at,
            duration_ms=view.duration_ms,
            phases=[
                TimelinePhase(name=phase.name, started_at=phase.started_at, duration_ms=phase.duration_ms)
                for phase in view.phases
            ],
            stalled_on=view.stalled_on,
            last_log=view.last_log,
        )
    )
