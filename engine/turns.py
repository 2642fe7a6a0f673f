"""Turns: one message, answered once, whoever listens.

Guarantees: a task has one turn at a time; a turn goes on when its caller hangs up; what `completed` announces is in the
brain already; a turn that is still running when the time to drain is over ends as `interrupted`, with what was said
until then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.brain import new_id, now_ms
from engine.errors import Draining, EngineError, HitlRequired, InternalError, TaskBusy, TurnInterrupted
from engine.events import event
from engine.hitl import Hitl
from engine.replay import ReplayBuffer
from engine.responder import Prompt, Thinking, Usage

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from engine.activity import Activity
    from engine.brain import Brain, TurnEnd
    from engine.responder import Desk, Responder

logger = logging.getLogger("engine.turns")

HEARTBEAT_AFTER_S = 1.0
"""A listener hears something at least this often."""


@dataclass(frozen=True, slots=True)
class TurnRequest:
    task_id: str
    message: str
    media: list[Any] = field(default_factory=list)
    replaces_message_id: str | None = None
    direct: bool = False


class Turn:
    """A turn and the events it has made so far. Any number of listeners may follow it, from its beginning."""

    def __init__(self, request: TurnRequest, replay: ReplayBuffer) -> None:
        self.request = request
        self._replay = replay
        self._block: str | None = None
        self._blocks = 0
        self.turn_id = new_id()
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done once the turn is stored; an exception when it was refused."""
        self._events: list[bytes] = []
        self._closed = False
        self._changed = asyncio.Event()

    def publish(self, kind: str, data: dict[str, Any]) -> None:
        encoded = event(kind, data)
        self._events.append(encoded)
        self._replay.add(self.request.task_id, encoded)
        self._wake()

    def text(self, text: str) -> None:
        self._in_block("text")
        self.publish("text_delta", {"text": text})

    def thinking(self, text: str) -> None:
        self._in_block("thinking")
        self.publish("thinking_delta", {"text": text})

    def tool_call(self, name: str, call_id: str, given: object) -> None:
        self.end_block()
        self._in_block("tool_use")
        self.publish("tool_call", {"tool": name, "tool_call_id": call_id, "input": given})
        self.end_block()

    def _in_block(self, kind: str) -> None:
        if self._block != kind:
            self.end_block()
            self._block = kind
            self.publish("content_block_start", {"block_index": self._blocks, "block_type": kind})

    def end_block(self) -> None:
        if self._block is not None:
            self.publish("content_block_stop", {"block_index": self._blocks, "block_type": self._block})
            self._block = None
            self._blocks += 1

    def lifecycle(self, phase: str) -> None:
        self.end_block()
        self.publish("thread_lifecycle", {"phase": phase, **self._identity()})

    def fail(self, error: EngineError) -> None:
        self.lifecycle("errored")
        self.publish("error", {"error": error.code, "message": error.message, "details": error.details})

    def close(self) -> None:
        self._closed = True
        self._wake()

    async def follow(self, heartbeat_after_s: float = HEARTBEAT_AFTER_S) -> AsyncGenerator[bytes, None]:
        """All events from the first to the last, and a heartbeat whenever there was none for a while."""
        sent = 0
        while True:
            changed = self._changed  # Taken before looking: what is published after the look is not missed.
            if sent < len(self._events):
                chunk, sent = b"".join(self._events[sent:]), len(self._events)
                yield chunk
                continue
            if self._closed:
                return
            try:
                async with asyncio.timeout(heartbeat_after_s):
                    await changed.wait()
            except TimeoutError:
                yield event("heartbeat", self._identity())

    def _identity(self) -> dict[str, Any]:
        return {"task_id": self.request.task_id, "turn_id": self.turn_id, "timestamp": now_ms()}

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class TurnRunner:
    def __init__(
        self,
        brain: Brain,
        responder: Responder,
        activity: Activity,
        *,
        desk: Callable[[Turn], Desk],
        hitl: Hitl | None = None,
        replay: ReplayBuffer | None = None,
    ) -> None:
        self._brain = brain
        self._responder = responder
        self._activity = activity
        self._desk = desk
        self._hitl = hitl or Hitl()
        self._replay = replay or ReplayBuffer()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._draining = False

    @property
    def in_flight(self) -> int:
        return len(self._running)

    async def start(self, request: TurnRequest) -> Turn:
        """Begins a turn and returns once it is stored.

        Raises Draining, TaskBusy, HitlRequired, MessageNotFound or BrainFailed.
        """
        if self._draining:
            raise Draining
        if request.task_id in self._running:
            waiting = self._hitl.pending_of(request.task_id)
            raise HitlRequired(request.task_id, waiting.request_id) if waiting else TaskBusy(request.task_id)
        turn = Turn(request, self._replay)
        self._activity.begin()
        self._running[request.task_id] = asyncio.create_task(self._run(turn), name=f"turn {turn.turn_id}")
        await asyncio.shield(turn.begun)
        return turn

    def report_interrupted(self, turns: list[tuple[str, str]]) -> None:
        """Tells, by replay, whoever asks after turns that a killed predecessor left unfinished."""
        for task_id, turn_id in turns:
            lost = Turn(TurnRequest(task_id, ""), self._replay)
            lost.turn_id = turn_id
            lost.fail(TurnInterrupted())

    def refuse_new_turns(self) -> None:
        self._draining = True
        # No person answers within the time that a stop grants.
        self._hitl.give_up()

    async def drain(self, timeout_s: float) -> int:
        """Refuses new turns, waits for those in flight, and interrupts what is left. Returns how many that were."""
        self.refuse_new_turns()
        in_flight = list(self._running.values())
        if not in_flight:
            return 0
        _, late = await asyncio.wait(in_flight, timeout=timeout_s)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)
        return len(late)

    async def _run(self, turn: Turn) -> None:
        request = turn.request
        try:
            try:
                number = await self._brain.begin_turn(
                    request.task_id, turn.turn_id, request.message, request.media, request.replaces_message_id
                )
            except EngineError as exc:
                turn.begun.set_exception(exc)
            else:
                turn.begun.set_result(None)
                prompt = Prompt(request.task_id, number, request.message, request.media, request.direct)
                await self._answer(turn, prompt)
        finally:
            worked = turn.begun.done() and turn.begun.exception() is None
            if not turn.begun.done():
                turn.begun.set_exception(TurnInterrupted())
            # No await between the last event and this: whoever reads it finds the task free.
            del self._running[request.task_id]
            self._activity.end(worked=worked)
            turn.close()

    async def _answer(self, turn: Turn, prompt: Prompt) -> None:
        began = time.monotonic()
        answer: list[str] = []
        usage = Usage(0, 0)
        error: EngineError | None = None
        turn.lifecycle("started")
        try:
            async for item in self._responder.respond(prompt, self._desk(turn)):
                if isinstance(item, Usage):
                    usage = item
                elif isinstance(item, Thinking):
                    turn.thinking(item.text)
                else:
                    answer.append(item)
                    turn.text(item)
        except asyncio.CancelledError:  # Only `drain` cancels a turn; its end is told and stored, not lost.
            error = TurnInterrupted()
        except EngineError as exc:
            error = exc
        except Exception:  # Whatever a responder does, it ends this turn and not the engine.
            logger.exception("responder failed", extra={"turn_id": turn.turn_id})
            error = InternalError()
        try:
            await self._brain.finish_turn(
                turn.turn_id,
                _end(error),
                # What a model says may hold what no text file can.
                "".join(answer).encode("utf-8", "replace").decode(),
                input_tokens=usage.input_tokens,
                output_tokens=usage.output_tokens,
            )
        except EngineError as exc:
            error = exc
        turn.end_block()
        if error is None:
            turn.publish(
                "usage",
                {
                    "input_tokens": usage.input_tokens,
                    "output_tokens": usage.output_tokens,
                    "cache_hit_tokens": usage.cache_hit_tokens,
                },
            )
            turn.lifecycle("completed")
        else:
            turn.fail(error)
        logger.info(
            "turn ended",
            extra={
                "task_id": prompt.task_id,
                "turn_id": turn.turn_id,
                "status": _end(error),
                "seconds": round(time.monotonic() - began, 3),
            },
        )


def _end(error: EngineError | None) -> TurnEnd:
    if error is None:
        return "completed"
    return "interrupted" if isinstance(error, TurnInterrupted) else "failed"
