"""What a responder works with during one turn: history, tools with a person's permission, events."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from engine.errors import TaskNotFound
from engine.hitl import Hitl, Question

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.brain import Brain
    from engine.responder import ToolSpec
    from engine.tools import Toolbox
    from engine.turns import Turn

logger = logging.getLogger("engine.tools")

HISTORY_TURNS = 200


class TurnDesk:
    """The desk (see `responder.Desk`) of one turn."""

    def __init__(self, turn: Turn, brain: Brain, toolbox: Toolbox, hitl: Hitl, hitl_timeout_s: float) -> None:
        self._turn = turn
        self._task_id = turn.request.task_id
        self._brain = brain
        self._toolbox = toolbox
        self._hitl = hitl
        self._hitl_timeout_s = hitl_timeout_s

    async def history(self) -> Sequence[dict[str, Any]]:
        try:
            stored = await self._brain.history(self._task_id, HISTORY_TURNS)
        except TaskNotFound:
            return []
        messages: list[dict[str, Any]] = stored["messages"]
        return [message for message in messages if message["turn_id"] != self._turn.turn_id]

    async def tools(self) -> Sequence[ToolSpec]:
        return [] if self._turn.request.direct else await self._toolbox.specs()

    def publish(self, kind: str, data: dict[str, Any]) -> None:
        self._turn.publish(kind, data)

    async def call(self, call_id: str, name: str, arguments: str) -> str:
        problem = await self._toolbox.problem(name)
        given = self._toolbox.checked(name, arguments) if problem is None else arguments
        self._turn.tool_call(name, call_id, given if isinstance(given, dict) else {"arguments": arguments})
        if problem is not None:
            return self._result(name, call_id, "", f"the tool {name!r} is off: {problem}")
        if not isinstance(given, dict):
            return self._result(name, call_id, "", given)
        if self._toolbox.needs_permission(name):
            refusal = await self._refusal(name, call_id, given)
            if refusal is not None:
                return self._result(name, call_id, "", refusal)
        outcome = await self._toolbox.use(self._task_id, name, given)
        return self._result(name, call_id, outcome.output, outcome.error)

    async def _refusal(self, name: str, call_id: str, given: dict[str, Any]) -> str | None:
        """Asks a person; None when the tool may be used."""
        question = Question(self._task_id, f"May the tool {name!r} be used?")
        self.publish("hitl_request", {**question.public(), "tool": name, "tool_call_id": call_id, "input": given})
        answer = await self._hitl.ask(question, self._hitl_timeout_s)
        verdict = "expired" if answer is None else "approve" if answer.approved else "deny"
        self.publish("hitl_resolved", {"request_id": question.request_id, "task_id": self._task_id, "answer": verdict})
        if answer is None:
            return "nobody gave permission in time"
        if answer.approved:
            return None
        return "permission was refused" + (f": {answer.feedback}" if answer.feedback else "")

    def _result(self, name: str, call_id: str, output: str, error: str | None) -> str:
        data = {"tool": name, "tool_call_id": call_id, "output": output}
        if error is not None:
            data["error"] = error
        self.publish("tool_result", data)
        logger.info("tool used", extra={"tool": name[:64], "turn_id": self._turn.turn_id, "failed": error is not None})
        if error is None:
            return output
        return f"{output}\n[{error}]" if output else f"[{error}]"
