"""One subscription to the daemon's event stream; it comes back by itself when the daemon does.

Events are hints. Whoever reads them looks at the list on `RESYNC`, which opens every subscription, also each one after
a break: what happened meanwhile is not told again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from typing import TYPE_CHECKING, Any

import structlog

from orchestrator.backends.base import BackendEvent, EventKind
from orchestrator.backends.docker_names import DEPLOYMENT, engine_of
from orchestrator.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from uuid import UUID

    import aiohttp

    from orchestrator.backends.docker_client import DockerClient

__all__ = ["watch"]

log = structlog.get_logger("orchestrator.docker")

_FIRST_DELAY_S = 0.2
_MAX_DELAY_S = 10.0
# A stream that says nothing may be one whose daemon hangs.
_QUIET_S = 20.0


_KINDS = {
    "start": EventKind.STARTED,
    "die": EventKind.EXITED,
    "oom": EventKind.OUT_OF_MEMORY,
    "pause": EventKind.FROZEN,
    "unpause": EventKind.THAWED,
    "destroy": EventKind.REMOVED,
}


async def watch(client: DockerClient, deployment_id: UUID) -> AsyncGenerator[BackendEvent, None]:
    """Endless; ends only with its reader. Trouble with the daemon is waited out."""
    filters = {
        "type": ["container"],
        "event": list(_KINDS),
        "label": [f"{DEPLOYMENT}={deployment_id}"],
    }
    delay = _FIRST_DELAY_S
    lost = False
    while True:
        try:
            async with client.stream("events", {"filters": json.dumps(filters)}) as body:
                if lost:
                    log.info("docker_events_back")
                lost = False
                delay = _FIRST_DELAY_S
                yield BackendEvent(EventKind.RESYNC)
                async with contextlib.aclosing(_lines(client, body)) as lines:
                    async for line in lines:
                        event = _parse(line, deployment_id)
                        if event is not None:
                            yield event
        except BackendError as error:
            if not lost:
                log.warning("docker_events_lost", error=error.message)
            lost = True
        # Also after a stream that ended without an error: a daemon that goes down closes it.
        await asyncio.sleep(delay * random.uniform(0.75, 1.25))  # noqa: S311 - jitter
        delay = min(delay * 2, _MAX_DELAY_S)


async def _lines(client: DockerClient, body: aiohttp.StreamReader) -> AsyncGenerator[bytes, None]:
    while True:
        reading = asyncio.ensure_future(body.readline())
        try:
            while not (await asyncio.wait({reading}, timeout=_QUIET_S))[0]:
                await client.ping()
            line = reading.result()
        finally:
            reading.cancel()
        if not line:
            return
        yield line


def _parse(line: bytes, deployment_id: UUID) -> BackendEvent | None:
    event: dict[str, Any] = json.loads(line)
    kind = _KINDS.get(event.get("Action", ""))
    actor = event.get("Actor") or {}
    labels = actor.get("Attributes") or {}
    engine_id = engine_of(labels, deployment_id)
    if kind is None or engine_id is None:
        return None
    code = labels.get("exitCode", "") if kind is EventKind.EXITED else ""
    return BackendEvent(kind, engine_id, actor.get("ID"), int(code) if code.isdecimal() else None)
