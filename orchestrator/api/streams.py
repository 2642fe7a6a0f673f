"""Answers without an end: events and logs. Memory stays bounded whatever the reader does."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog
from starlette.responses import Response

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.types import Receive, Scope, Send

    from orchestrator.api.protocol import HttpProtocol

__all__ = ["Stream"]

SEND_TIMEOUT_S = 30.0  # for a reader that takes nothing
LAST_WORD_S = 1.0

log = structlog.get_logger("orchestrator.api")


class Stream(Response):
    """Sends chunks as they come.

    One chunk at a time waits for the reader; one that takes nothing for `SEND_TIMEOUT_S` is cut off. Ends with the
    chunks, when the reader has gone, and when the server is told to stop.
    """

    def __init__(self, chunks: AsyncGenerator[bytes, None], media_type: str) -> None:
        super().__init__(
            media_type=media_type,
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
        del self.headers["content-length"]
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection: HttpProtocol | None = scope.get("connection")
        ending = asyncio.Event() if connection is None else connection.ending
        sending = asyncio.create_task(self._send(send), name="stream")
        leaving = asyncio.create_task(_gone(receive), name="stream-reader")
        stopping = asyncio.create_task(ending.wait(), name="stream-end")
        tasks = {sending, leaving, stopping}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await self._chunks.aclose()
        if not sending.cancelled() and (error := sending.exception()) is not None:
            if not isinstance(error, TimeoutError):
                raise error
            log.warning("slow_reader_cut_off", path=scope["path"])
            if connection is not None:
                connection.transport.abort()
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORD_S):
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        # At once, so that the caller knows that it is connected.
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        async for chunk in self._chunks:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
