"""Webhooks: each product's sequenced audit rows, signed and POSTed, in order, at least once.

A webhook is a place in the product's chain. One worker at a time (a lease in the database) carries it on: a delivery
that fails holds back those behind it, is tried again with growing pauses, and is parked when the event is a day old.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import random
import secrets
import time
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import aiohttp
import orjson
import structlog
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential
from yarl import URL

from orchestrator import __version__, metrics
from orchestrator.audit import event_of
from orchestrator.errors import DatabaseUnavailable, InvalidRequest, OrchestratorError
from orchestrator.registry.rows import Attempt
from orchestrator.webhook_targets import Guard, GuardedResolver, RefusedTarget, url_problem

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from uuid import UUID

    import asyncpg

    from orchestrator.keys import KeyRing
    from orchestrator.registry import Registry
    from orchestrator.registry.rows import AuditRow, ClaimedWebhook

__all__ = ["Webhooks", "retry_delay_s", "signature"]

T = TypeVar("T")

log = structlog.get_logger("orchestrator.webhooks")

LEASE_S = 60.0
TURN_S = 20.0  # then other webhooks have their turn
ATTEMPT_TIMEOUT_S = 10.0
AT_ONCE = 32  # webhooks that one process works on
PAGE = 100
LONGEST_DELAY_S = 3600.0
PARK_AFTER_S = 86_400.0
LEAST_ATTEMPTS = 5  # before an event is parked, however old it is


def signature(secret: str, timestamp: int, body: bytes) -> str:
    """The value of `X-Orchestrator-Signature`: HMAC-SHA256 of `{timestamp}.{body}` in hex, under the secret."""
    digest = hmac.new(secret.encode(), f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={timestamp},v1={digest}"


def retry_delay_s(attempts: int) -> float:
    """The pause after this many failures: 1 s, doubling up to an hour, less up to half of it at random."""
    longest = min(LONGEST_DELAY_S, 2.0 ** min(attempts - 1, 20))
    return longest * random.uniform(0.5, 1)  # noqa: S311 - jitter, not a secret


class Webhooks:
    def __init__(self, registry: Registry, keyring: KeyRing, allowed_networks: Sequence[str]) -> None:
        self._registry = registry
        self._keyring = keyring
        self._guard = Guard(allowed_networks)
        self._session: aiohttp.ClientSession | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        # No proxy, no cookies, no kept connections: every delivery resolves and checks its target again.
        connector = aiohttp.TCPConnector(
            resolver=GuardedResolver(self._guard), use_dns_cache=False, force_close=True, limit=AT_ONCE
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=ATTEMPT_TIMEOUT_S),
            headers={"User-Agent": f"engine-orchestrator/{__version__}", "Content-Type": "application/json"},
        )

    async def close(self) -> None:
        """Deliveries under way are given up; whoever claims the webhook next makes them again."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._session is not None:
            await self._session.close()
            self._session = None

    # --- calls ----------------------------------------------------------------------------------------

    async def create(self, product_id: UUID, url: str, events: list[str]) -> tuple[asyncpg.Record, str]:
        """The webhook, and its secret, which is shown only now.

        Raises `InvalidRequest` for a target that may not be reached, `ProductNotFound`, `TooMany`.
        """
        if (problem := url_problem(url)) is not None:
            raise InvalidRequest("url", problem)
        try:
            await self._require_allowed(URL(url))
        except RefusedTarget as refused:
            raise InvalidRequest(
                "url", f"leads to {refused}; an operator can allow it in ORCH_WEBHOOK_ALLOWED_NETWORKS"
            ) from None
        except OSError:
            pass  # it may resolve later; every delivery checks again
        secret = "whsec-sept-" + secrets.token_urlsafe(32)
        ciphertext, master_key_id = self._keyring.encrypt(secret)
        return await self._registry.webhooks.create(product_id, url, events, ciphertext, master_key_id), secret

    async def _require_allowed(self, url: URL) -> None:
        assert url.host is not None
        assert url.port is not None
        await self._guard.resolve(url.host, url.port)

    # --- delivery -------------------------------------------------------------------------------------

    async def round(self) -> None:
        """Claim webhooks that have something to deliver and work on them, in tasks of their own."""
        free = AT_ONCE - len(self._tasks)
        if free <= 0:
            return
        claimed_at = time.monotonic()
        hooks = await self._registry.webhooks.claim(lease_s=LEASE_S, longest_wait_s=LONGEST_DELAY_S, limit=free)
        for hook in hooks:
            task = asyncio.create_task(self._work(hook, claimed_at), name="webhook")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _work(self, hook: ClaimedWebhook, claimed_at: float) -> None:
        try:
            seq = await self._deliver_pending(hook, claimed_at)
            if seq is not None:
                await _patiently(lambda: self._registry.webhooks.release(hook, seq))
        except OrchestratorError as error:
            # The lease runs out, and the webhook is taken up again where it stands.
            log.warning("webhook_left", webhook_id=str(hook.id), code=error.code, error=error.message)
        except Exception:  # a defect with one webhook must not be silent, nor touch others
            log.exception("webhook_crashed", webhook_id=str(hook.id))

    async def _deliver_pending(self, hook: ClaimedWebhook, claimed_at: float) -> int | None:
        """Deliver in order; the last row dealt with, None when the lease is not ours any more."""
        secret = self._keyring.decrypt(hook.secret_enc, hook.master_key_id)
        seq, attempts, leased_at = hook.seq, hook.attempts, claimed_at
        while True:
            rows = await _patiently(partial(self._registry.audit.following, hook.product_id, seq, PAGE))
            if not rows:
                return seq
            for row in rows:
                assert row.seq is not None
                if hook.events and row.action not in hook.events:
                    seq = row.seq
                    continue
                now = time.monotonic()
                if now - claimed_at > TURN_S or now - leased_at > LEASE_S - 2 * ATTEMPT_TIMEOUT_S:
                    return seq
                attempt = await self._attempt(hook, row, secret, attempts, hook.now_s + now - claimed_at)
                leased_at = time.monotonic()
                if not await self._record(hook, attempt):
                    return None
                metrics.delivered(hook.product_id, "failed" if attempt.status == "pending" else attempt.status)
                if attempt.status == "pending":
                    return None
                seq, attempts = row.seq, 0

    async def _record(self, hook: ClaimedWebhook, attempt: Attempt) -> bool:
        return await _patiently(lambda: self._registry.webhooks.record(hook, attempt, lease_s=LEASE_S))

    async def _attempt(self, hook: ClaimedWebhook, row: AuditRow, secret: str, attempts: int, now_s: float) -> Attempt:
        """One POST. `attempts`: how often it has failed so far; `now_s`: the database's time."""
        assert row.seq is not None
        response_status, error = await self._post(hook, row, secret, int(now_s))
        if error is None:
            return Attempt(row.seq, row.action, "delivered", response_status, None, 0)
        failures = attempts + 1
        age_s = (datetime.fromtimestamp(now_s, UTC) - row.timestamp).total_seconds()
        if age_s > PARK_AFTER_S and failures >= LEAST_ATTEMPTS:
            log.warning("delivery_parked", webhook_id=str(hook.id), seq=row.seq, attempts=failures)
            return Attempt(row.seq, row.action, "parked", response_status, error, 0)
        return Attempt(row.seq, row.action, "pending", response_status, error, retry_delay_s(failures))

    async def _post(
        self, hook: ClaimedWebhook, row: AuditRow, secret: str, timestamp: int
    ) -> tuple[int | None, str | None]:
        """The status of the answer, and what was wrong: None after a 2xx. Redirects are not followed."""
        assert self._session is not None, "open() was not called"
        body = orjson.dumps(event_of(row))
        headers = {
            "X-Orchestrator-Signature": signature(secret, timestamp, body),
            "X-Orchestrator-Event": row.action,
            "X-Orchestrator-Delivery": f"{hook.id}:{row.seq}",
        }
        url = URL(hook.url)
        try:
            async with asyncio.timeout(ATTEMPT_TIMEOUT_S):
                if _is_literal(url):  # the connector resolves, and so checks, names only
                    await self._require_allowed(url)
                async with self._session.post(url, data=body, headers=headers, allow_redirects=False) as response:
                    status = response.status
        except TimeoutError:
            return None, "no answer in time"
        except RefusedTarget as refused:
            return None, f"the target is {refused}"
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, RefusedTarget):
                return None, f"the target is {error.os_error}"
            return None, _reason(error.os_error)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return None, _reason(error)
        return status, None if 200 <= status < 300 else f"HTTP {status}"


async def _patiently(call: Callable[[], Awaitable[T]]) -> T:
    """Again while the database is away and the lease lasts: what was delivered must not be delivered twice for that."""
    async for attempt in AsyncRetrying(
        retry=retry_if_exception_type(DatabaseUnavailable),
        wait=wait_random_exponential(multiplier=0.1, max=2),
        stop=stop_after_delay(LEASE_S / 3),
        reraise=True,
    ):
        with attempt:
            return await call()
    raise AssertionError("unreachable: the last attempt is raised again")


def _is_literal(url: URL) -> bool:
    host: Any = url.host
    return ":" in host or host.replace(".", "").isdigit()


def _reason(error: BaseException) -> str:
    """What kind of failure, without words of the other side."""
    return {"ConnectionRefusedError": "connection refused", "gaierror": "the name does not resolve"}.get(
        type(error).__name__, type(error).__name__
    )
