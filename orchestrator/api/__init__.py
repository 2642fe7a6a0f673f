"""HTTP, and nothing else: routes, authentication, and errors as JSON. No SQL, no backend."""

from orchestrator.api.app import create_app
from orchestrator.api.protocol import HttpProtocol

__all__ = ["HttpProtocol", "create_app"]
