"""What a check found, and how a check is run: within a time, and without ending the others."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from orchestrator.errors import OrchestratorError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["Finding", "Level", "fail", "ok", "run_check", "skipped", "warn"]

CHECK_S = 20.0


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"  # it works, but not as it should
    FAIL = "fail"  # `serve` will not start, or engines will not
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """`advice` is what to do about a warning or failure. No field contains a secret."""

    check: str
    level: Level
    detail: str
    advice: str | None = None


def ok(check: str, detail: str) -> Finding:
    return Finding(check, Level.OK, detail)


def warn(check: str, detail: str, advice: str) -> Finding:
    return Finding(check, Level.WARN, detail, advice)


def fail(check: str, detail: str, advice: str) -> Finding:
    return Finding(check, Level.FAIL, detail, advice)


def skipped(check: str, detail: str) -> Finding:
    return Finding(check, Level.SKIPPED, detail)


async def run_check(
    name: str, check: Callable[[], Awaitable[list[Finding]]], advice: str, *, limit_s: float = CHECK_S
) -> list[Finding]:
    """What the check found; a check that breaks, or takes too long, is itself a finding with `advice`."""
    try:
        async with asyncio.timeout(limit_s):
            return await check()
    except TimeoutError:
        return [fail(name, f"no result within {limit_s:g} s", advice)]
    except OrchestratorError as error:
        return [fail(name, error.message, advice)]
    except Exception as error:  # noqa: BLE001 - the other checks still have something to say
        return [fail(name, f"could not be checked ({type(error).__name__})", advice)]
