"""A load generator that costs little itself: keep-alive connections, prepared bytes, no parsing but the length."""

from __future__ import annotations

import asyncio
import re
import time
from typing import cast
from urllib.parse import urlsplit

__all__ = ["hammer", "once", "request_bytes"]


def request_bytes(method: str, url: str, headers: dict[str, str], body: bytes = b"") -> bytes:
    parts = urlsplit(url)
    lines = [f"{method} {parts.path} HTTP/1.1", f"Host: {parts.netloc}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


class _Connection(asyncio.Protocol):
    """Sends the next request as soon as an answer is whole; notes the time each one took."""

    def __init__(self, request: bytes, times: list[float], until: float, done: asyncio.Future[None]) -> None:
        self.request, self.times, self.until, self.done = request, times, until, done
        self.buffer = b""
        self.sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # not a subclass on every event loop
        self._send()

    def _send(self) -> None:
        self.sent = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, separator, rest = self.buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        found = _LENGTH.search(head)
        if found is None:
            self.done.set_exception(RuntimeError(f"an answer without a length: {head[:300]!r}"))
            self.transport.close()
            return
        length = int(found[1])
        if len(rest) < length:
            return
        now = time.perf_counter()
        self.times.append(now - self.sent)
        if not head.startswith(b"HTTP/1.1 200"):
            self.done.set_exception(RuntimeError(f"unexpected answer: {self.buffer[:300]!r}"))
            self.transport.close()
            return
        self.buffer = b""
        if now < self.until:
            self._send()
        else:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


async def hammer(url: str, request: bytes, connections: int, seconds: float) -> list[float]:
    """Seconds that each request took, over `connections` connections for `seconds`."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    loop = asyncio.get_running_loop()
    times: list[float] = []
    until = time.perf_counter() + seconds
    ends = []
    for _ in range(connections):
        end: asyncio.Future[None] = loop.create_future()
        ends.append(end)
        await loop.create_connection(
            lambda end=end: _Connection(request, times, until, end),  # type: ignore[misc]  # bound per connection
            parts.hostname,
            parts.port,
        )
    await asyncio.gather(*ends)
    return times


async def once(request: bytes, url: str) -> float:
    """Seconds that one request took on a connection of its own, opened before."""
    (took,) = await hammer(url, request, 1, 0)
    return took
