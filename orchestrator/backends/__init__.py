"""Backends: what runs engines. `load_backend` finds one by its name."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from orchestrator.backends.base import (
    BackendObject,
    Capabilities,
    EngineBackend,
    EngineEndpoint,
    LogLine,
    ObjectState,
)
from orchestrator.errors import ConfigurationError

if TYPE_CHECKING:
    from uuid import UUID

    from orchestrator.settings import Settings

GROUP = "orchestrator.backends"

__all__ = [
    "BackendObject",
    "Capabilities",
    "EngineBackend",
    "EngineEndpoint",
    "LogLine",
    "ObjectState",
    "load_backend",
]


def load_backend(settings: Settings, deployment_id: UUID) -> EngineBackend:
    """The backend named by `ORCH_ENGINE_BACKEND`, not yet opened.

    Raises `ConfigurationError` when no installed package provides it.
    """
    known = {entry.name: entry for entry in entry_points(group=GROUP)}
    entry = known.get(settings.engine_backend)
    if entry is None:
        raise ConfigurationError(
            f"ORCH_ENGINE_BACKEND: '{settings.engine_backend}' is not installed; known: {', '.join(sorted(known))}."
        )
    backend_class: type[EngineBackend] = entry.load()
    return backend_class.from_settings(settings, deployment_id)
