"""A human in the loop: questions that pause a turn until a person answers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from engine.brain import new_id, now_ms
from engine.errors import TaskNotFound, TurnInterrupted

APPROVING = frozenset({"approve", "approved", "allow", "allowed", "yes", "y", "ok", "true"})
DENYING = frozenset({"deny", "denied", "reject", "rejected", "refuse", "no", "n", "false"})


class Answer(NamedTuple):
    approved: bool
    feedback: str | None


@dataclass(frozen=True, slots=True)
class Question:
    task_id: str
    question: str
    kind: str = "permission"
    request_id: str = field(default_factory=new_id)
    created_at: int = field(default_factory=now_ms)

    def public(self) -> dict[str, Any]:
        return {
            "request_id": self.request_id,
            "task_id": self.task_id,
            "kind": self.kind,
            "question": self.question,
            "created_at": self.created_at,
        }


class Hitl:
    """At most one question a task, since a task has one turn and a turn asks one thing at a time."""

    def __init__(self) -> None:
        self._pending: dict[str, tuple[Question, asyncio.Future[Answer]]] = {}
        self._given_up = False

    async def ask(self, question: Question, timeout_s: float) -> Answer | None:
        """Waits for a person; None when nobody answered in time. Raises TurnInterrupted when the engine stops."""
        if self._given_up:
            raise TurnInterrupted
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._pending[question.task_id] = (question, future)
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            return None
        finally:
            del self._pending[question.task_id]

    def pending(self) -> list[Question]:
        """The oldest first."""
        return [question for question, future in self._pending.values() if not future.done()]

    def pending_of(self, task_id: str) -> Question | None:
        found = self._pending.get(task_id)
        return found[0] if found is not None and not found[1].done() else None

    def answer(self, task_id: str, answer: Answer) -> Question:
        """Gives the answer to whoever waits and returns what had been asked. TaskNotFound when nothing was."""
        question = self.pending_of(task_id)
        if question is None:
            raise TaskNotFound(task_id, "Nothing of this task waits for an answer.")
        self._pending[task_id][1].set_result(answer)
        return question

    def give_up(self) -> None:
        """From now on nobody waits: who does is told that the engine stops."""
        self._given_up = True
        for _, future in self._pending.values():
            if not future.done():
                future.set_exception(TurnInterrupted())
