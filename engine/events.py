"""Server-Sent Events as the engine contract names them.

    thread_lifecycle   {"phase": "started" | "completed" | "errored", "task_id", "turn_id", "timestamp"}
    text_delta         {"text"}
    heartbeat          {"task_id", "turn_id", "timestamp"}
    usage              {"input_tokens", "output_tokens", "cache_hit_tokens"}
    error              {"error", "message", "details"}, the last event of a turn that failed

Timestamps are milliseconds since the epoch.
"""

from __future__ import annotations

from typing import Any

from engine.wire import to_json


def event(kind: str, data: dict[str, Any]) -> bytes:
    """One event, ready to be sent. JSON has no raw line break, so the data is always one line."""
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), to_json(data))
