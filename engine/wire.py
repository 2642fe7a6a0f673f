"""The little of HTTP that the engine needs on top of ASGI: a request, a JSON answer, a stream."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from engine.errors import InvalidRequest, PayloadTooLarge

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping

    Message = MutableMapping[str, Any]
    Scope = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]

MAX_BODY_BYTES = 1024 * 1024

# Turns of the event loop in which a hang-up that the kernel already knows reaches the application.
_LOOP_TURNS_TO_SEE_A_HANG_UP = 10


class ClientGone(Exception):
    """The caller hung up before an answer was begun; there is nobody to answer."""


def to_json(value: object) -> bytes:
    """Compact UTF-8. A lone surrogate, which UTF-8 cannot hold, stays a JSON escape."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


class Request:
    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self._scope = scope
        self._receive = receive

    def header(self, name: bytes) -> bytes | None:
        """The value of a header that is sent once; None when it is absent or repeated."""
        values = [value for key, value in self._scope["headers"] if key == name]
        return values[0] if len(values) == 1 else None

    def query(self, name: str) -> str | None:
        values = parse_qs(self._scope["query_string"].decode("latin-1"), keep_blank_values=True).get(name)
        return values[-1] if values else None

    async def json_object(self, limit: int = MAX_BODY_BYTES, *, optional: bool = False) -> dict[str, Any]:
        """The body as a JSON object. Never holds more than `limit` bytes of it. `optional`: no body is {}."""
        import orjson  # Not needed to become healthy.

        raw = await self._body(limit)
        if optional and not raw:
            return {}
        try:
            # Refuses what others let through: NaN, lone surrogates, invalid UTF-8, bottomless nesting.
            value = orjson.loads(raw)
        except orjson.JSONDecodeError as exc:
            raise InvalidRequest(f"The body is not valid JSON: {exc}.") from None
        if not isinstance(value, dict):
            raise InvalidRequest("The body must be a JSON object.")
        return value

    async def _body(self, limit: int) -> bytes:
        announced = self.header(b"content-length")
        if announced is not None and announced.isdigit() and int(announced) > limit:
            raise PayloadTooLarge(limit)
        body = bytearray()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if len(body) > limit:
                raise PayloadTooLarge(limit)
            if not message.get("more_body", False):
                return bytes(body)

    async def hang_up(self) -> None:
        """Returns when the caller is gone. Only after the body was read, and only once per request."""
        while (await self._receive())["type"] != "http.disconnect":
            pass


async def is_gone(hang_up: asyncio.Task[None]) -> bool:
    """Whether the caller's hang-up has already arrived at this host, even if the loop has not looked yet."""
    for _ in range(_LOOP_TURNS_TO_SEE_A_HANG_UP):
        if hang_up.done():
            return True
        await asyncio.sleep(0)
    return hang_up.done()


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    payload: object = None
    """Sent as JSON; bytes are sent as they are."""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    content_type: bytes = b"application/json"

    async def send(self, send: Send) -> None:
        payload = self.payload
        body = payload if isinstance(payload, bytes) else b"" if payload is None else to_json(payload)
        headers = [*self.headers]
        if payload is not None:
            headers.append((b"content-type", self.content_type))
        if self.status != 204:
            headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@dataclass(frozen=True, slots=True)
class EventStream:
    """`text/event-stream` for as long as there are events and somebody listens."""

    events: AsyncGenerator[bytes, None]
    hang_up: asyncio.Task[None]

    async def send(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for chunk in self.events:
                if self.hang_up.done():
                    return
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            self.hang_up.cancel()
            await self.events.aclose()
