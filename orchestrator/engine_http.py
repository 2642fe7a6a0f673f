"""What the orchestrator asks of an engine over HTTP: its health, and to take a new key (the engine contract)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from orchestrator import tracing

__all__ = ["Activity", "EngineHttp", "Health", "KeyPush"]

MAX_HEALTH_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Activity:
    """`subsystems.activity` of a health answer; only ever built from possible values."""

    in_flight: int
    idle_seconds: float


@dataclass(frozen=True, slots=True)
class Health:
    """One probe. `ok` = 2xx and `status == "ok"`; `reason` says what was wrong, without the body."""

    ok: bool
    reason: str | None = None
    activity: Activity | None = None
    reports_activity: bool = False  # the field was there, whatever it said
    uptime_s: float | None = None


class KeyPush:
    """How an engine took a key: it has it, it has no such endpoint, or it refused."""

    TAKEN = "taken"
    NO_ENDPOINT = "no_endpoint"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"


class EngineHttp:
    """A client of engines. Never raises for what an engine does or fails to do."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        # Connections are not kept: an engine may be frozen, replaced or gone by the next probe.
        connector = aiohttp.TCPConnector(limit=0, force_close=True, use_dns_cache=False)
        self._session = aiohttp.ClientSession(
            connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    @property
    def session(self) -> aiohttp.ClientSession:
        assert self._session is not None, "open() was not called"
        return self._session

    async def health(self, url: str, timeout_s: float) -> Health:
        """`GET /health`, at most `timeout_s` for everything."""
        with tracing.span("engine.health"):
            return await self._health(url, timeout_s)

    async def _health(self, url: str, timeout_s: float) -> Health:
        try:
            async with (
                asyncio.timeout(timeout_s),
                self.session.get(f"{url}/health", headers=tracing.inject({}), allow_redirects=False) as response,
            ):
                if not 200 <= response.status < 300:
                    return Health(False, f"HTTP {response.status}")
                body = await response.content.read(MAX_HEALTH_BYTES)
        except TimeoutError:
            return Health(False, "no answer in time")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return Health(False, type(error).__name__)
        try:
            answer = orjson.loads(body)
        except orjson.JSONDecodeError:
            return Health(False, "the answer is not JSON")
        if not isinstance(answer, dict) or answer.get("status") != "ok":
            status = answer.get("status") if isinstance(answer, dict) else None
            return Health(False, f"status is {str(status)[:40]!r}")
        subsystems = answer.get("subsystems")
        reported = subsystems.get("activity") if isinstance(subsystems, dict) else None
        return Health(
            True,
            activity=_activity(reported),
            reports_activity=reported is not None,
            uptime_s=_seconds(answer.get("uptime_seconds")),
        )

    async def accepts_key(self, url: str, key: str, timeout_s: float) -> bool:
        """False when whoever answers at `url` refuses the key, so that it is not the engine that has it."""
        try:
            async with (
                asyncio.timeout(timeout_s),
                self.session.get(f"{url}/", headers={"X-Engine-Key": key}, allow_redirects=False) as response,
            ):
                return response.status != 401
        except (TimeoutError, aiohttp.ClientError, OSError):
            return True  # no refusal; the next probe tells more

    async def push_key(
        self, url: str, key: str, *, key_hash: str, generation: int, overlap_s: float, timeout_s: float
    ) -> str:
        """`POST /admin/key` under a valid key; one of `KeyPush`."""
        try:
            async with (
                asyncio.timeout(timeout_s),
                self.session.post(
                    f"{url}/admin/key",
                    data=orjson.dumps(
                        {"key_hash": key_hash, "generation": generation, "overlap_seconds": int(overlap_s)}
                    ),
                    headers=tracing.inject({"X-Engine-Key": key, "Content-Type": "application/json"}),
                    allow_redirects=False,
                ) as response,
            ):
                if 200 <= response.status < 300:
                    return KeyPush.TAKEN
                if response.status in (404, 405, 501):
                    return KeyPush.NO_ENDPOINT
                return KeyPush.UNREACHABLE if response.status >= 500 else KeyPush.REFUSED
        except (TimeoutError, aiohttp.ClientError, OSError):
            return KeyPush.UNREACHABLE


def _activity(reported: Any) -> Activity | None:
    if not isinstance(reported, dict):
        return None
    in_flight, idle_s = reported.get("in_flight"), _seconds(reported.get("idle_seconds"))
    if isinstance(in_flight, bool) or not isinstance(in_flight, int) or in_flight < 0:
        return None
    return None if idle_s is None else Activity(in_flight, idle_s)


def _seconds(value: Any) -> float | None:
    """A possible duration, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        return None
    return float(value)
