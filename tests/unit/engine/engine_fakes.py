"""What the engine's unit tests share."""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from engine.responder import Prompt, Usage


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
class ScriptedResponder:
    """Yields `items`, but waits for `go` before the last of them; raises what it finds among them."""

    items: list[str | Usage | Exception]
    go: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: asyncio.Event = field(default_factory=asyncio.Event)
    prompts: list[Prompt] = field(default_factory=list)

    def health(self) -> dict[str, Any]:
        return {"status": "ok", "provider": "scripted"}

    async def respond(self, prompt: Prompt) -> AsyncIterator[str | Usage]:
        self.prompts.append(prompt)
        for position, item in enumerate(self.items):
            if position == len(self.items) - 1:
                self.waiting.set()
                await self.go.wait()
            if isinstance(item, Exception):
                raise item
            yield item
