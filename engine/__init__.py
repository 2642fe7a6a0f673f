"""The reference engine: one user's agent service. `python -m engine` runs it; nothing here needs the orchestrator."""

__version__ = "0.1.0"
