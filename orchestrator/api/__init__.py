"""HTTP, and nothing else: routes, authentication, and errors as JSON. No SQL, no backend."""

from orchestrator.api.app import create_app

__all__ = ["create_app"]
