"""The client: typed, the same with and without asyncio, with retries that make nothing twice.

    from orchestrator.client import OrchestratorClient

    with OrchestratorClient("http://127.0.0.1:8000", platform_key=KEY) as orchestrator:
        admission = orchestrator.admit("ann", auto_provision=True, auto_wake=True)
        for event in admission.engine.execute("Hello"):
            print(event.text, end="")

It needs the extra `client` only, and nothing of the server.
"""

from orchestrator.client import errors, models
from orchestrator.client._async import AsyncOrchestratorClient
from orchestrator.client._async_engine import AsyncAdmission, AsyncEngine
from orchestrator.client._sync import OrchestratorClient
from orchestrator.client._sync_engine import Admission, Engine
from orchestrator.client.calls import Retries
from orchestrator.client.errors import (
    ApiError,
    ClientError,
    ConnectionFailed,
    ConnectionLost,
    EngineFailure,
    NotAdmitted,
)
from orchestrator.client.turns import TurnEvent

__all__ = [
    "Admission",
    "ApiError",
    "AsyncAdmission",
    "AsyncEngine",
    "AsyncOrchestratorClient",
    "ClientError",
    "ConnectionFailed",
    "ConnectionLost",
    "Engine",
    "EngineFailure",
    "NotAdmitted",
    "OrchestratorClient",
    "Retries",
    "TurnEvent",
    "errors",
    "models",
]
