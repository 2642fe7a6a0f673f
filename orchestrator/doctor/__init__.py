"""Looks at everything that an orchestrator on this host needs, and says what to do about what is amiss.

It changes nothing: no network is made, no image pulled, no migration applied.
"""

from __future__ import annotations

from functools import partial
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from orchestrator.backends import GROUP
from orchestrator.doctor.checks import Finding, Level, fail, ok, run_check
from orchestrator.doctor.database import database
from orchestrator.doctor.docker import docker
from orchestrator.doctor.host import address, engine_command, permissions, ports

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from orchestrator.settings import Settings

__all__ = ["Finding", "Level", "examine"]


ALL_OF_ONE_S = 100.0  # a group of checks, each of which has its own time


async def examine(settings: Settings) -> AsyncIterator[Finding]:
    """Every finding, as soon as its check is done."""
    checks: list[tuple[str, Callable[[Settings], Awaitable[list[Finding]]]]] = [
        ("database", database),
        ("backend", _backend),
    ]
    if settings.engine_backend == "docker":
        checks.append(("docker", docker))
    elif settings.engine_backend == "subprocess":
        checks.append(("engine", engine_command))
    checks += [("address", address), ("ports", ports), ("permissions", permissions)]
    for name, check in checks:
        for finding in await run_check(name, partial(check, settings), "look at the log", limit_s=ALL_OF_ONE_S):
            yield finding


async def _backend(settings: Settings) -> list[Finding]:
    name = settings.engine_backend
    known = sorted(entry.name for entry in entry_points(group=GROUP))
    if name not in known:
        line = f"'{name}' is not installed"
        return [fail("backend", line, f"set ORCH_ENGINE_BACKEND to one of: {', '.join(known)}")]
    return [ok("backend", name)]
