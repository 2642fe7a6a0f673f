"""What the engine's unit tests share."""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from engine.responder import Desk, Prompt, Thinking, ToolSpec, Usage


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def parse_events(raw: bytes | str) -> list[tuple[str, dict[str, Any]]]:
    """Every event of a stream, strictly: two lines and a blank one each."""
    text = raw.decode() if isinstance(raw, bytes) else raw
    assert text == "" or text.endswith("\n\n")
    events = []
    for block in text.split("\n\n")[:-1]:
        kind, data = block.split("\n")
        assert kind.startswith("event: ")
        assert data.startswith("data: ")
        events.append((kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


class Clock:
    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeDesk:
    """A desk without a turn: it notes what is done at it."""

    past: list[dict[str, Any]] = field(default_factory=list)
    specs: list[ToolSpec] = field(default_factory=list)
    results: dict[str, str] = field(default_factory=dict)
    calls: list[tuple[str, str, str]] = field(default_factory=list)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    async def history(self) -> list[dict[str, Any]]:
        return self.past

    async def tools(self) -> list[ToolSpec]:
        return self.specs

    async def call(self, call_id: str, name: str, arguments: str) -> str:
        self.calls.append((call_id, name, arguments))
        return self.results[name]

    def publish(self, kind: str, data: dict[str, Any]) -> None:
        self.events.append((kind, data))


def no_desk(_turn: object) -> Desk:
    return FakeDesk()


@dataclass
class ScriptedResponder:
    """Yields `items`, but waits for `go` before the last of them; raises what it finds among them."""

    items: list[str | Thinking | Usage | Exception]
    go: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: asyncio.Event = field(default_factory=asyncio.Event)
    prompts: list[Prompt] = field(default_factory=list)

    def health(self) -> dict[str, Any]:
        return {"status": "ok", "provider": "scripted"}

    async def close(self) -> None:
        pass

    async def respond(self, prompt: Prompt, desk: Desk) -> AsyncIterator[str | Thinking | Usage]:
        self.prompts.append(prompt)
        for position, item in enumerate(self.items):
            if position == len(self.items) - 1:
                self.waiting.set()
                await self.go.wait()
            if isinstance(item, Exception):
                raise item
            yield item
