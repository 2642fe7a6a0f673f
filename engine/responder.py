"""Who answers a message. The built-in local responder needs no model, is deterministic, and says that it is one."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

SLOW_LIMIT_S = 300.0
SLOW_DELTA_EVERY_S = 2.0

_ECHO_LIMIT = 2_000
_WORDS_PER_DELTA = 4
_SLOW = re.compile(r"/slow\s+([0-9]{1,6}(?:\.[0-9]{1,3})?)(?:\s|$)")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a responder is given. `turn_number` counts this task's turns, this one included."""

    task_id: str
    turn_number: int
    message: str


@dataclass(frozen=True, slots=True)
class Usage:
    input_tokens: int
    output_tokens: int
    cache_hit_tokens: int = 0


class Responder(Protocol):
    def respond(self, prompt: Prompt) -> AsyncIterator[str | Usage]:
        """Yields pieces of the answer and, last, what it cost."""

    def health(self) -> dict[str, Any]:
        """What `/health` says under `subsystems.llm`."""


class LocalResponder:
    """Echoes the message and counts the turns of its task. A token is a word.

    A message that begins with `/slow N` makes a turn of N seconds (at most 300): a delta at once, one every two
    seconds, and the usual answer at the end. That is how to see a turn in flight without a model.
    """

    def __init__(self, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep) -> None:
        self._sleep = sleep

    def health(self) -> dict[str, Any]:
        return {
            "status": "ok",
            "provider": "local",
            "detail": "built-in deterministic responder; no language model is configured",
        }

    async def respond(self, prompt: Prompt) -> AsyncIterator[str | Usage]:
        spoken = 0
        async for piece in self._pieces(prompt):
            spoken += len(piece.split())
            yield piece
        yield Usage(input_tokens=len(prompt.message.split()), output_tokens=spoken)

    async def _pieces(self, prompt: Prompt) -> AsyncIterator[str]:
        slow = _SLOW.match(prompt.message)
        if slow:
            seconds = min(float(slow[1]), SLOW_LIMIT_S)
            yield f"[local responder] A slow turn of {seconds:g} s. "
            waited = 0.0
            while seconds - waited > SLOW_DELTA_EVERY_S:
                await self._sleep(SLOW_DELTA_EVERY_S)
                waited += SLOW_DELTA_EVERY_S
                yield f"{waited:g} s passed. "
            await self._sleep(seconds - waited)
        said = prompt.message if len(prompt.message) <= _ECHO_LIMIT else prompt.message[:_ECHO_LIMIT] + "…"
        text = (
            "[local responder] No language model is configured, so this is an echo. "
            f"This is turn {prompt.turn_number} of this task. You said: {said}"
        )
        words = re.findall(r"\S+\s*|\s+", text)
        for start in range(0, len(words), _WORDS_PER_DELTA):
            yield "".join(words[start : start + _WORDS_PER_DELTA])
