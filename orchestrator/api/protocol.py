"""Below the application: a request that is no HTTP gets the same shape of error as every other one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from orchestrator.api.errors import error_response
from orchestrator.errors import InvalidRequest

if TYPE_CHECKING:
    import asyncio

__all__ = ["HttpProtocol"]


class HttpProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]  # Uvicorn chooses the class by what is installed
    transport: asyncio.Transport

    def send_400_response(self, msg: str) -> None:
        answer = error_response(InvalidRequest("request", "is not valid HTTP"))
        head = b"".join(b"%s: %s\r\n" % header for header in answer.raw_headers)
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n" + head + b"connection: close\r\n\r\n" + bytes(answer.body))
        self.transport.close()
