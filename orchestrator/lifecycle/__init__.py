"""The state machine: the only layer that calls a backend."""

from orchestrator.lifecycle.lifecycle import Lifecycle
from orchestrator.lifecycle.transitions import State

__all__ = ["Lifecycle", "State"]
