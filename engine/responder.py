"""Who answers a message. The built-in local responder needs no model, is deterministic, and says that it is one."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

SLOW_LIMIT_S = 300.0
SLOW_DELTA_EVERY_S = 2.0

_ECHO_LIMIT = 2_000
_WORDS_PER_DELTA = 4
_TOOL = re.compile(r"/tool\s+([A-Za-z0-9_.-]{1,64})(?:\s+(.*))?", re.DOTALL)
_SLOW = re.compile(r"/slow\s+([0-9]{1,6}(?:\.[0-9]{1,3})?)(?:\s|$)")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a responder is given. `turn_number` counts this task's turns, this one included."""

    task_id: str
    turn_number: int
    message: str
    media: list[Any] = field(default_factory=list)
    direct: bool = False
    """Answer at once, without tools."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """A piece of what a model thinks aloud; no part of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Usage:
    input_tokens: int
    output_tokens: int
    cache_hit_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool as a model is told of it; `parameters` is a JSON schema."""

    name: str
    description: str
    parameters: dict[str, Any]


class Desk(Protocol):
    """What a responder may use while it answers one turn."""

    async def history(self) -> Sequence[dict[str, Any]]:
        """The task's messages before this turn, oldest first: `role`, `content`, `media`."""

    async def tools(self) -> Sequence[ToolSpec]:
        """The tools that work on this engine now."""

    async def call(self, call_id: str, name: str, arguments: str) -> str:
        """Uses a tool, with its events, and a person's permission where it needs one. Returns what came of it.

        Whatever is wrong with the call or the tool is told in the result; only the end of the turn is raised.
        """

    def publish(self, kind: str, data: dict[str, Any]) -> None:
        """An event of this turn that is no part of the answer."""


class Responder(Protocol):
    def respond(self, prompt: Prompt, desk: Desk) -> AsyncIterator[str | Thinking | Usage]:
        """Yields pieces of the answer and, last, what it cost."""

    def health(self) -> dict[str, Any]:
        """What `/health` says under `subsystems.llm`."""

    async def close(self) -> None:
        """After the last turn."""


class LocalResponder:
    """Echoes the message and counts the turns of its task. A token is a word.

    A message that begins with `/slow N` makes a turn of N seconds (at most 300): a delta at once, one every two
    seconds, and the usual answer at the end. That is how to see a turn in flight without a model. One that begins with
    `/tool NAME {"argument": …}` uses a tool, with permission and sandbox as a model would, and answers its output.
    """

    def __init__(
        self, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep, *, missing: str | None = None
    ) -> None:
        """`missing` names the variable for want of which no model is asked, where others are set."""
        self._sleep = sleep
        self._missing = missing

    def health(self) -> dict[str, Any]:
        return {
            "status": "ok",
            "provider": "local",
            "detail": "built-in deterministic responder; no language model is configured"
            + (f" ({self._missing} is not set)" if self._missing else ""),
        }

    async def close(self) -> None:
        pass

    async def respond(self, prompt: Prompt, desk: Desk) -> AsyncIterator[str | Thinking | Usage]:
        spoken = 0
        async for piece in self._pieces(prompt, desk):
            spoken += len(piece.split())
            yield piece
        yield Usage(input_tokens=len(prompt.message.split()), output_tokens=spoken)

    async def _pieces(self, prompt: Prompt, desk: Desk) -> AsyncIterator[str]:
        tool = _TOOL.fullmatch(prompt.message)
        if tool and not prompt.direct:
            yield f"[local responder] Using the tool {tool[1]}. "
            output = await desk.call(f"local-{prompt.turn_number}", tool[1], tool[2] or "{}")
            yield f"It said: {output}"
            return
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
