"""Below the application: a request that is no HTTP gets the same shape of error as every other one, and an answer
without an end is told when the server stops."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from orchestrator.api.errors import error_response
from orchestrator.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["HttpProtocol"]


class HttpProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]  # Uvicorn chooses the class by what is installed
    """One connection; requests find it in their scope as `connection`. `ending`: the server has been told to stop."""

    app: ASGIApp
    transport: asyncio.Transport

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ending = asyncio.Event()
        app: ASGIApp = self.app

        def connected(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
            scope["connection"] = self
            return app(scope, receive, send)

        self.app = connected

    def shutdown(self) -> None:
        self.ending.set()
        super().shutdown()

    def send_400_response(self, msg: str) -> None:
        answer = error_response(InvalidRequest("request", "is not valid HTTP"))
        head = b"".join(b"%s: %s\r\n" % header for header in answer.raw_headers)
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n" + head + b"connection: close\r\n\r\n" + bytes(answer.body))
        self.transport.close()
