"""What an engine says during a turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.client.errors import EngineFailure

__all__ = ["TurnEvent"]


@dataclass(frozen=True, slots=True)
class TurnEvent:
    """`type` is the engine's: `thread_lifecycle`, `text_delta`, `usage`, `heartbeat`, `tool_call` …"""

    type: str
    data: dict[str, Any]

    @property
    def text(self) -> str:
        """The piece of the answer in a `text_delta`; empty in every other event."""
        return str(self.data.get("text", "")) if self.type == "text_delta" else ""

    def failure(self) -> EngineFailure:
        """An `error` event as an exception."""
        details = self.data.get("details")
        return EngineFailure(
            str(self.data.get("message") or "The turn failed."),
            code=str(self.data.get("error") or "ERROR"),
            details=details if isinstance(details, dict) else None,
        )
