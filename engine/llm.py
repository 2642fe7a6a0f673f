"""One call of an OpenAI-compatible chat endpoint, streamed.

Guarantees: a call that fails before its first word is tried again, a bounded number of times, waiting longer each time
(or as long as the provider asks, up to RETRY_AFTER_MAX_S); one that fails later is not, since half of it has been told
already. A provider that says nothing for the time-out counts as failed. What is raised is LlmProviderError,
LlmRateLimited or ContextOverflow, and holds neither the key nor any text of the provider's.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import random
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.errors import ContextOverflow, EngineError, LlmProviderError, LlmRateLimited
from engine.responder import Thinking, Usage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    import httpx

    from engine.settings import LlmSettings

BACKOFF_BASE_S = 0.5
BACKOFF_MAX_S = 8.0
RETRY_AFTER_MAX_S = 30.0
CONNECT_TIMEOUT_S = 10.0
MAX_CALL_S = 1800.0
MAX_EVENT_BYTES = 4 * 1024 * 1024
MAX_ANSWER_CHARACTERS = 2_000_000
MAX_TOOL_CALLS = 64

_CODE = re.compile(r"[a-z0-9_.-]{1,64}", re.IGNORECASE)
_WORTH_ANOTHER_TRY = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})


@dataclass(slots=True)
class ToolCall:
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(slots=True)
class Completion:
    """What a call came to, filled in while it streams."""

    text: list[str] = field(default_factory=list)
    calls: dict[int, ToolCall] = field(default_factory=dict)
    usage: Usage = field(default_factory=lambda: Usage(0, 0))
    finish: str | None = None
    characters: int = 0


class LlmClient:
    """Opens connections when the first call is made, and keeps them."""

    def __init__(self, settings: LlmSettings, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep) -> None:
        self._settings = settings
        self._sleep = sleep
        self._http: httpx.AsyncClient | None = None
        self._usage_wanted = True

    async def close(self) -> None:
        if self._http is not None:
            await self._http.aclose()
            self._http = None

    async def complete(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], completion: Completion
    ) -> AsyncIterator[str | Thinking]:
        """Yields the answer piece by piece and fills `completion`."""
        attempt = 0
        while True:
            told = False
            try:
                async for piece in self._once(messages, tools, completion):
                    told = True
                    yield piece
            except _Failed as failed:
                if told or not failed.again or attempt >= self._settings.max_retries:
                    raise failed.error(attempt + 1, partial=told) from None
                completion.calls.clear()
                if failed.at_once:
                    continue
                await self._sleep(_pause(attempt, failed.retry_after_s))
                attempt += 1
            else:
                return

    async def _once(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], completion: Completion
    ) -> AsyncIterator[str | Thinking]:
        # Costs time and memory that an engine without a model, or without a turn, has no use for; and not the loop's.
        await asyncio.to_thread(importlib.import_module, "httpx")
        import httpx

        if self._http is None:
            headers = {"Accept": "text/event-stream"}
            if self._settings.api_key is not None:
                headers["Authorization"] = f"Bearer {self._settings.api_key}"
            limit = self._settings.timeout_s
            timeout = httpx.Timeout(limit, connect=min(limit, CONNECT_TIMEOUT_S))
            self._http = httpx.AsyncClient(headers=headers, timeout=timeout, follow_redirects=False)
        body: dict[str, Any] = {
            "model": self._settings.model,
            "messages": messages,
            "stream": True,
            "max_tokens": self._settings.max_tokens,
        }
        if self._usage_wanted:
            body["stream_options"] = {"include_usage": True}
        if tools:
            body["tools"] = tools
        try:
            async with self._http.stream("POST", f"{self._settings.base_url}/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise await self._refused(response)
                async for chunk in _events(response, completion):
                    for piece in _take(chunk, completion):
                        yield piece
        except httpx.TimeoutException:
            raise _Failed(f"The model's provider said nothing for {self._settings.timeout_s:g} s.") from None
        except httpx.TransportError as error:
            raise _Failed(f"The model's provider cannot be reached or hung up ({type(error).__name__}).") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _Failed(f"The call of the model failed ({type(error).__name__}).", again=False) from None
        if completion.finish is None:
            raise _Failed("The model's answer ended in the middle.")

    async def _refused(self, response: httpx.Response) -> _Failed:
        status = response.status_code
        code = await _error_code(response)
        details = {"status": status, **({"provider_code": code} if code else {})}
        if status == 400 and self._usage_wanted and code != "context_length_exceeded":
            # Some endpoints do not know this option and say so in words of their own.
            self._usage_wanted = False
            return _Failed("", at_once=True)
        if code in ("context_length_exceeded", "string_above_max_length") or status == 413:
            return _Failed("This conversation is longer than the model takes.", ContextOverflow, details, again=False)
        if status == 429:
            # A used-up budget does not come back within seconds.
            return _Failed(
                "The model's provider limits how often it is asked.",
                LlmRateLimited,
                details,
                again=code != "insufficient_quota",
                retry_after_s=_retry_after(response.headers.get("retry-after")),
            )
        said = f"The model's provider answered {status}"
        if status in (401, 403):
            said += ": LLM_API_KEY is not accepted"
        elif status == 404:
            said += ": LLM_BASE_URL or LLM_MODEL is not known there"
        retry_after_s = _retry_after(response.headers.get("retry-after"))
        return _Failed(f"{said}.", details=details, again=status in _WORTH_ANOTHER_TRY, retry_after_s=retry_after_s)


class _Failed(Exception):
    """One attempt failed."""

    def __init__(
        self,
        message: str,
        kind: type[EngineError] = LlmProviderError,
        details: dict[str, Any] | None = None,
        *,
        again: bool = True,
        at_once: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.kind = kind
        self.details = details or {}
        self.again = again
        self.at_once = at_once
        self.retry_after_s = retry_after_s

    def error(self, attempts: int, *, partial: bool) -> EngineError:
        return self.kind(self.message, **self.details, attempts=attempts, partial=partial)


def _pause(attempt: int, asked_s: float | None) -> float:
    grown = min(BACKOFF_MAX_S, BACKOFF_BASE_S * 2.0**attempt)
    jittered = grown * random.uniform(0.5, 1.0)  # noqa: S311 - spreads calls, guards nothing
    return jittered if asked_s is None else max(jittered, min(asked_s, RETRY_AFTER_MAX_S))


def _retry_after(text: str | None) -> float | None:
    return float(text) if text and re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text) else None


async def _error_code(response: httpx.Response) -> str | None:
    """The provider's own code of an error, when it looks like one. Its words may quote a key or a message."""
    raw = bytearray()
    async for chunk in response.aiter_bytes():
        raw += chunk
        if len(raw) > 65536:
            return None
    try:
        error = json.loads(raw)["error"]
        code = error.get("code") or error.get("type")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return code if isinstance(code, str) and _CODE.fullmatch(code) else None


async def _events(response: httpx.Response, completion: Completion) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of the stream's data lines, until `[DONE]` or its end."""
    buffer = bytearray()
    until = time.monotonic() + MAX_CALL_S
    async for raw in response.aiter_bytes():
        if time.monotonic() > until:
            raise _Failed(f"The model's answer took longer than {MAX_CALL_S:g} s.", again=False)
        buffer += raw
        *lines, rest = bytes(buffer).split(b"\n")
        buffer = bytearray(rest)
        if len(buffer) > MAX_EVENT_BYTES:
            raise _Failed("The model's provider sent a line without an end.", again=False)
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                completion.finish = completion.finish or "stop"
                return
            try:
                chunk = json.loads(data)
            except (ValueError, RecursionError):
                raise _Failed("The model's provider sent something that is not JSON.") from None
            if not isinstance(chunk, dict):
                raise _Failed("The model's provider sent something that is no chunk of an answer.")
            if chunk.get("error"):
                raise _in_stream(chunk["error"])
            yield chunk


def _in_stream(error: Any) -> _Failed:
    code = (error.get("code") or error.get("type")) if isinstance(error, dict) else None
    known = code if isinstance(code, str) and _CODE.fullmatch(code) else None
    details = {"provider_code": known} if known else {}
    if known is not None and "rate_limit" in known:
        return _Failed("The model's provider limits how often it is asked.", LlmRateLimited, details)
    return _Failed("The model's provider broke off with an error.", details=details)


def _take(chunk: dict[str, Any], completion: Completion) -> list[str | Thinking]:
    """Adds a chunk to the completion and returns what there is to tell."""
    pieces: list[str | Thinking] = []
    try:
        if usage := chunk.get("usage"):
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            completion.usage = Usage(
                int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0), int(cached)
            )
        choices = chunk.get("choices") or []
        if not choices:
            return pieces
        choice = choices[0]
        delta = choice.get("delta") or {}
        # Two names for it are in use.
        if thought := delta.get("reasoning_content") or delta.get("reasoning"):
            pieces.append(Thinking(_text(thought)))
        if content := delta.get("content"):
            completion.text.append(_text(content))
            completion.characters += len(content)
            pieces.append(completion.text[-1])
        for position, part in enumerate(delta.get("tool_calls") or []):
            _add_call(part, int(part.get("index", position)), completion)
        completion.finish = choice.get("finish_reason") or completion.finish
    except (AttributeError, TypeError, ValueError, KeyError, IndexError):
        raise _Failed("The model's provider sent something that is no chunk of an answer.") from None
    if completion.characters > MAX_ANSWER_CHARACTERS:
        raise _Failed("The model's answer has no end.", again=False)
    return pieces


def _add_call(part: dict[str, Any], index: int, completion: Completion) -> None:
    if index not in completion.calls and len(completion.calls) >= MAX_TOOL_CALLS:
        raise _Failed("The model asked for too many tools at once.", again=False)
    call = completion.calls.setdefault(index, ToolCall())
    call.id = call.id or _text(part.get("id") or "")
    function = part.get("function") or {}
    call.name += _text(function.get("name") or "")
    call.arguments += _text(function.get("arguments") or "")
    if len(call.arguments) > MAX_ANSWER_CHARACTERS:
        raise _Failed("The arguments of a tool have no end.", again=False)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not text")
    return value
