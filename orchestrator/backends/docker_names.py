"""What our objects are called on the daemon, and the labels that say whose they are."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from orchestrator.backends.base import id12

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "DEPLOYMENT",
    "ENGINE",
    "INCARNATION",
    "LOCATION",
    "LOCATION_VOLUME",
    "NETWORK",
    "PORT",
    "container_name",
    "engine_of",
    "number",
    "volume_name",
]

# The ownership label: the deployment's random id, which its database keeps.
DEPLOYMENT = "engine-orchestrator.deployment"
ENGINE = "engine-orchestrator.engine"
INCARNATION = "engine-orchestrator.incarnation"
# The port of the engine's URL; Docker lists published ports of running containers only.
PORT = "engine-orchestrator.port"
# On networks that we made; they are shared by the deployments of one daemon.
NETWORK = "engine-orchestrator.network"

# One per daemon, shared by its deployments: made once and never changed. Containers carry it too: they remember it
# when somebody prunes the volume, which no container uses.
LOCATION = "engine-orchestrator.location"
LOCATION_VOLUME = "engine-orchestrator-location"


def container_name(engine_id: UUID) -> str:
    return f"engine-{id12(engine_id)}"


def volume_name(engine_id: UUID) -> str:
    return f"engine-data-{id12(engine_id)}"


def engine_of(labels: Mapping[str, str] | None, deployment_id: UUID) -> UUID | None:
    """The engine that an object belongs to; None when it is not ours."""
    if not labels or labels.get(DEPLOYMENT) != str(deployment_id):
        return None
    try:
        return UUID(labels.get(ENGINE, ""))
    except ValueError:
        return None


def number(labels: Mapping[str, str], name: str, default: int) -> int:
    value = labels.get(name, "")
    return int(value) if value.isdecimal() else default
