"""`orchestrator serve`. Imports nothing that only other commands need: a replica that starts should serve at once."""

from __future__ import annotations

import gc

__all__ = ["serve"]


def serve() -> None:
    """Serve in production, as the ORCH_* variables and .env say."""
    from orchestrator.settings import load_settings

    settings = load_settings()  # first: a bad one is told at once, before everything else is imported
    gc.disable()  # until everything is imported
    from orchestrator.logs import configure_logging
    from orchestrator.server import serve as serve_forever

    configure_logging(settings.log_level, settings.log_format)
    serve_forever(settings)
