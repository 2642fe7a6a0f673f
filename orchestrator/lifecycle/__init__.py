"""The state machine: the only layer that calls a backend."""

from orchestrator.lifecycle.flights import Flights
from orchestrator.lifecycle.healing import Healing
from orchestrator.lifecycle.lifecycle import Lifecycle
from orchestrator.lifecycle.transitions import State

__all__ = ["Flights", "Healing", "Lifecycle", "State"]
