"""The OpenAPI document: what FastAPI derives, less the 422 that never happens, plus security and body schemas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from orchestrator.api import admin_models, models

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["USER_ID", "describe"]

USER_ID: Final[dict[str, Any]] = {
    "parameters": [
        {
            "name": "user_id",
            "in": "path",
            "required": True,
            "description": "1 to 256 code points, no control characters, no `/`, not `.` or `..`",
            "schema": {"type": "string", "minLength": 1, "maxLength": 256},
            "example": "demo-user-001",
        }
    ]
}

_PRODUCT_ID: Final[dict[str, Any]] = {
    "name": "X-Product-Id",
    "in": "header",
    "required": False,
    "description": "the product that an admin key acts as",
    "schema": {"type": "string", "format": "uuid"},
}

_BODIES = (
    models.ProvisionRequest,
    models.AdmitRequest,
    models.RotateKeyRequest,
    models.KeepAliveRequest,
    models.RegisterRequest,
    models.PolicyRequest,
    *admin_models.BODIES,
)

_TAGS = [
    {"name": "discovery", "description": "Which engine belongs to a user. `admit` is the call to make."},
    {"name": "lifecycle", "description": "Calls that change one engine."},
    {"name": "fleet", "description": "Many engines at once."},
    {"name": "audit", "description": "What happened, in order."},
    {"name": "webhooks", "description": "Events, delivered."},
    {"name": "admin", "description": "Products, their policies and their keys."},
    {"name": "health", "description": "The orchestrator itself."},
]


def describe(app: FastAPI) -> None:
    """Let `app.openapi()` give the whole document; computed once."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the document


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, tags=_TAGS
    )
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    _, bodies = models_json_schema(
        [(body, "validation") for body in _BODIES], ref_template="#/components/schemas/{model}"
    )
    schemas.update(bodies.get("$defs", {}))
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    components["securitySchemes"] = {
        "platform": {"type": "apiKey", "in": "header", "name": "X-Platform-Key"},
        "admin": {"type": "apiKey", "in": "header", "name": "X-Admin-Key"},
    }
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if path == "/health":
                operation["security"] = []
            elif path.startswith(("/products", "/admin/")):
                operation["security"] = [{"admin": []}]
            else:
                operation["security"] = [{"platform": []}, {"admin": []}]
                operation.setdefault("parameters", []).append(_PRODUCT_ID)
    return document
