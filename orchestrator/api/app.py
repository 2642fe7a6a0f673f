"""The FastAPI application on an opened control plane."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi_offline import FastAPIOffline

from orchestrator import __version__
from orchestrator.api import errors
from orchestrator.api.middleware import RequestMiddleware
from orchestrator.api.openapi import describe
from orchestrator.api.routes import (
    admin,
    audit,
    discovery,
    events,
    fleet,
    health,
    keys,
    lifecycle,
    logs,
    timeline,
    webhooks,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi import FastAPI

    from orchestrator.control_plane import ControlPlane

__all__ = ["create_app"]

DESCRIPTION = (
    "The control plane for products that give each of their users a process of their own. One call, `admit`, and the "
    "user's engine is found, created or woken, healthy, with URL and key; then the product talks to it directly."
)


def create_app(plane: ControlPlane, *, manage_plane: bool = False) -> FastAPI:
    """`manage_plane`: open the plane when the application starts and close it at its end (worker processes)."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if manage_plane:
            await plane.open()
        try:
            yield
        finally:
            if manage_plane:
                await plane.close()

    app: FastAPI = FastAPIOffline(
        title="engine-orchestrator",
        version=__version__,
        description=DESCRIPTION,
        docs_url="/docs",
        redoc_url=None,
        openapi_url="/openapi.json",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.plane = plane
    for routes in (health, lifecycle, timeline, logs, discovery, fleet, audit, events, webhooks, admin, keys):
        app.include_router(routes.router)
    errors.install(app)
    app.add_middleware(RequestMiddleware, admit=discovery.admit)
    describe(app)
    return app
