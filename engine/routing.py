"""Which handler answers a request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from engine.errors import MethodNotAllowed
from engine.wire import EventStream, Request, Response

Handler = Callable[[Request], Awaitable[Response | EventStream]]


class Route(NamedTuple):
    method: str
    path: str
    """Exact; or, where it ends in a slash, the beginning of a path whose rest is a name."""
    handler: Handler

    def matches(self, path: str) -> bool:
        if self.path.endswith("/"):
            return path.startswith(self.path) and path != self.path
        return path == self.path


def require_method(request: Request, allowed: list[str]) -> str:
    """The method to look for; HEAD is GET without its body. Raises MethodNotAllowed."""
    method = "GET" if request.method == "HEAD" else request.method
    if method not in allowed:
        raise MethodNotAllowed(request.method, sorted(set(allowed)))
    return method
