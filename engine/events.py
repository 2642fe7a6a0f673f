"""Server-Sent Events as the engine contract names them.

    thread_lifecycle   {"phase": "started" | "completed" | "errored", "task_id", "turn_id", "timestamp"}
    content_block_start, content_block_stop
                       {"block_index", "block_type": "text" | "thinking" | "tool_use"}
    text_delta, thinking_delta
                       {"text"}
    tool_call          {"tool", "tool_call_id", "input"}
    tool_result        {"tool", "tool_call_id", "output", "error"?}
    hitl_request       {"request_id", "task_id", "kind", "question", "created_at", "tool", "tool_call_id", "input"}
    hitl_resolved      {"request_id", "task_id", "answer": "approve" | "deny" | "expired"}
    compaction_event   {"dropped_messages", "kept_messages"}, when a model cannot take the whole history
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
