"""Liveness of the orchestrator itself; needs no key."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import Response

from orchestrator import __version__
from orchestrator.api.auth import plane_of
from orchestrator.api.models import HealthAnswer, Subsystem
from orchestrator.errors import BackendError, DatabaseUnavailable
from orchestrator.registry.migrations import HEAD

if TYPE_CHECKING:
    from orchestrator.control_plane import ControlPlane

router = APIRouter(tags=["health"])


@router.get(
    "/health",
    summary="Health of the orchestrator",
    description="503 without the database or before its migrations. For engines, look at `last_health_at`.",
    responses={200: {"model": HealthAnswer}, 503: {"model": HealthAnswer, "description": "not serving"}},
)
async def health(request: Request) -> Response:
    plane = plane_of(request)
    subsystems = {
        "database": await _database(plane),
        "backend": await _backend(plane),
        "loops": _loops(plane),
    }
    serving = subsystems["database"].status == "ok"
    healthy = all(subsystem.status == "ok" for subsystem in subsystems.values())
    body = HealthAnswer(status="ok" if healthy else "degraded", version=__version__, subsystems=subsystems)
    return Response(body.model_dump_json(), 200 if serving else 503, media_type="application/json")


async def _database(plane: ControlPlane) -> Subsystem:
    try:
        revision = await plane.registry.products.revision()
    except DatabaseUnavailable as error:
        return Subsystem(status="down", detail=error.message)
    if revision is None or revision < HEAD:
        return Subsystem(status="down", detail=f"migration {revision or 'none'} of {HEAD}; run 'orchestrator migrate'")
    return Subsystem(status="ok", detail=f"migration {revision}")


async def _backend(plane: ControlPlane) -> Subsystem:
    try:
        await plane.backend.check()
    except BackendError as error:
        return Subsystem(status="down", detail=error.message)
    return Subsystem(status="ok", detail=plane.settings.engine_backend)


def _loops(plane: ControlPlane) -> Subsystem:
    failing = [f"{loop.name}: {loop.failing or 'late'}" for loop in plane.loops.loops if loop.failing or loop.is_stale]
    if failing:
        return Subsystem(status="degraded", detail=", ".join(failing))
    return Subsystem(status="ok", detail=f"{len(plane.loops.loops)} running")
