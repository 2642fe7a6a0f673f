"""Turns answered by a language model: what it is told, and the tools it uses until it has an answer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from engine.errors import EngineError
from engine.llm import Completion, LlmClient
from engine.responder import Thinking, Usage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from engine.catalog import Catalog
    from engine.responder import Desk, Prompt, ToolSpec
    from engine.settings import LlmSettings

MAX_ROUNDS = 16
"""Calls of the model within one turn; the last one is made without tools, so that it ends in words."""
MAX_RESULT_CHARACTERS = 32_000
_CHARACTERS_PER_TOKEN = 4


class ModelResponder:
    def __init__(self, settings: LlmSettings, catalog: Catalog, client: LlmClient | None = None) -> None:
        self._settings = settings
        self._catalog = catalog
        self._client = client or LlmClient(settings)
        self._last_error: dict[str, Any] | None = None
        self._asked = False

    async def close(self) -> None:
        await self._client.close()

    def health(self) -> dict[str, Any]:
        """`ok` until a call fails, `degraded` until the next one succeeds. Nobody asks the provider for this."""
        state: dict[str, Any] = {
            "status": "ok" if self._last_error is None else "degraded",
            "provider": "openai-compatible",
            "host": urlsplit(self._settings.base_url).hostname,
            "model": self._settings.model,
        }
        if self._last_error is not None:
            state["last_error"] = self._last_error
        elif not self._asked:
            state["detail"] = "not asked yet"
        return state

    async def respond(self, prompt: Prompt, desk: Desk) -> AsyncIterator[str | Thinking | Usage]:
        messages = [*await self._conversation(prompt, desk)]
        specs = [_tool(spec) for spec in await desk.tools()]
        spent = Usage(0, 0)
        for number in range(1, MAX_ROUNDS + 1):
            completion = Completion()
            tools = specs if number < MAX_ROUNDS else []
            try:
                async for piece in self._client.complete(messages, tools, completion):
                    yield piece
            except EngineError as error:
                self._asked = True
                self._last_error = {"error": error.code, "message": error.message, "at": int(time.time() * 1000)}
                raise
            self._asked, self._last_error = True, None
            spent = _sum(spent, completion.usage)
            calls = [call for _, call in sorted(completion.calls.items())]
            if not calls or not tools:
                break
            for position, call in enumerate(calls):
                call.id = call.id or f"call-{number}-{position}"
            messages.append(
                {
                    "role": "assistant",
                    "content": "".join(completion.text) or None,
                    "tool_calls": [
                        {
                            "id": call.id,
                            "type": "function",
                            "function": {"name": call.name, "arguments": call.arguments or "{}"},
                        }
                        for call in calls
                    ],
                }
            )
            for call in calls:
                result = await desk.call(call.id, call.name, call.arguments)
                if len(result) > MAX_RESULT_CHARACTERS:
                    result = result[:MAX_RESULT_CHARACTERS] + "\n[cut]"
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        yield spent

    async def _conversation(self, prompt: Prompt, desk: Desk) -> list[dict[str, Any]]:
        """What the model is told: who it is, as much of the history as there is room for, and the message."""
        system = {"role": "system", "content": self._identity(prompt.message)}
        last = {"role": "user", "content": _content(prompt.message, prompt.media)}
        room = (self._settings.context_tokens - self._settings.max_tokens) * _CHARACTERS_PER_TOKEN
        room -= len(system["content"]) + len(prompt.message)
        history = await desk.history()
        kept: list[dict[str, Any]] = []
        for message in reversed(history):
            room -= len(message["content"]) + 16
            if room < 0:
                break
            kept.append({"role": message["role"], "content": _content(message["content"], message["media"])})
        # A history that begins with an answer would be one to nothing.
        while kept and kept[-1]["role"] != "user":
            kept.pop()
        if len(kept) < len(history):
            desk.publish("compaction_event", {"dropped_messages": len(history) - len(kept), "kept_messages": len(kept)})
        return [system, *reversed(kept), last]

    def _identity(self, message: str) -> str:
        lines = ["You are a careful assistant that works for one person."]
        if soul := self._catalog.soul:
            lines = [soul["identity"]]
            lines += [f"- {line}" for line in (*soul["values"], *soul["patterns"])]
        if self._catalog.skills:
            lines += ["", "Skills; a message that begins with /NAME asks for one:"]
            lines += [f"- {name}: {skill['description']}" for name, skill in self._catalog.skills.items()]
        word = message.split(maxsplit=1)[0] if message.split() else ""
        if word.startswith("/") and (skill := self._catalog.skills.get(word[1:])):
            lines += ["", f"Apply this skill now: {skill['instructions']}"]
        return "\n".join(lines)


def _content(text: str, media: Sequence[Any]) -> str | list[dict[str, Any]]:
    """Text, with the images that come with it. Other media are named, so that the model knows of them."""
    if not media:
        return text
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    for item in media:
        kind = item.get("media_type") or item.get("mime_type") or item.get("type")
        url = item.get("url")
        if url is None and isinstance(item.get("data"), str) and isinstance(kind, str) and "/" in kind:
            url = f"data:{kind};base64,{item['data']}"
        if isinstance(url, str) and isinstance(kind, str) and kind.startswith("image"):
            parts.append({"type": "image_url", "image_url": {"url": url}})
        else:
            parts.append({"type": "text", "text": f"[an attachment of type {str(kind)[:100]}, not shown]"})
    return parts


def _tool(spec: ToolSpec) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": spec.name, "description": spec.description, "parameters": spec.parameters},
    }


def _sum(one: Usage, other: Usage) -> Usage:
    return Usage(
        one.input_tokens + other.input_tokens,
        one.output_tokens + other.output_tokens,
        one.cache_hit_tokens + other.cache_hit_tokens,
    )
