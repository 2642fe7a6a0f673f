"""Word from the database that an engine changed. A hint: the table is the truth, and every waiter also looks there
once a second."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg
import structlog

from orchestrator.errors import DatabaseUnavailable
from orchestrator.registry.database import connect

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Notifications"]

CHANNEL = "orchestrator_engine"
WISH_CHANNEL = "orchestrator_wish"
AUDIT_CHANNEL = "orchestrator_audit"
POLL_S = 1.0
PROOF_S = 10.0  # of silence, after which the listening connection must show that it still leads somewhere

log = structlog.get_logger("orchestrator.events")


class Notifications:
    """One listening connection per process, opened again with back-off when it is lost."""

    def __init__(self, listen_url: str) -> None:
        self._url = listen_url
        self._waiting: defaultdict[UUID, set[asyncio.Event]] = defaultdict(set)
        self._wishes: defaultdict[UUID, list[asyncio.Event]] = defaultdict(list)
        self._audit: defaultdict[str | None, set[asyncio.Event]] = defaultdict(set)
        self.audit_subscribers = 0
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self._task = asyncio.create_task(self._listen(), name="notifications")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None

    @contextmanager
    def subscription(self, engine_id: UUID) -> Iterator[asyncio.Event]:
        """An event that is set whenever the engine may have changed."""
        changed = asyncio.Event()
        self._waiting[engine_id].add(changed)
        try:
            yield changed
        finally:
            waiting = self._waiting[engine_id]
            waiting.discard(changed)
            if not waiting:
                del self._waiting[engine_id]

    @contextmanager
    def wishes(self, engine_id: UUID, wished: asyncio.Event) -> Iterator[None]:
        """`wished` is set when the holder of the engine's lease is asked for something."""
        # A list: a lease that was lost may end after the next one on the same engine has begun.
        self._wishes[engine_id].append(wished)
        try:
            yield
        finally:
            self._wishes[engine_id].remove(wished)
            if not self._wishes[engine_id]:
                del self._wishes[engine_id]

    @contextmanager
    def audit_subscription(self, chain: str | None) -> Iterator[asyncio.Event]:
        """An event that is set when rows of the chain (None: of any) may have been sequenced."""
        sequenced = asyncio.Event()
        self._audit[chain].add(sequenced)
        self.audit_subscribers += 1
        try:
            yield sequenced
        finally:
            self.audit_subscribers -= 1
            self._audit[chain].discard(sequenced)
            if not self._audit[chain]:
                del self._audit[chain]

    def changed(self, engine_id: UUID) -> None:
        """Wake this process's own waiters."""
        for event in self._waiting.get(engine_id, ()):
            event.set()

    async def _listen(self) -> None:
        delay_s = 0.1
        while True:
            try:
                connection = await connect(self._url)
            except DatabaseUnavailable:
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, 5)
                continue
            lost = asyncio.Event()
            try:
                connection.add_termination_listener(lambda *_, lost=lost: lost.set())
                await connection.add_listener(CHANNEL, self._on_change)
                await connection.add_listener(WISH_CHANNEL, self._on_wish)
                await connection.add_listener(AUDIT_CHANNEL, self._on_audit)
                delay_s = 0.1
                while not await happens_within(lost, PROOF_S):
                    await connection.execute("SELECT 1", timeout=5)
                log.warning("listen_connection_lost")
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                log.warning("listen_failed", error=type(error).__name__)
                await asyncio.sleep(delay_s)
            finally:
                # Closing must not hold up the end of the process when the server is silent.
                with suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                    await connection.close(timeout=1)

    def _on_change(self, _connection: Any, _pid: int, _channel: str, payload: object) -> None:
        with suppress(ValueError):
            self.changed(UUID(str(payload)))

    def _on_audit(self, _connection: Any, _pid: int, _channel: str, payload: object) -> None:
        for chain in (str(payload), None):
            for sequenced in self._audit.get(chain, ()):
                sequenced.set()

    def _on_wish(self, _connection: Any, _pid: int, _channel: str, payload: object) -> None:
        with suppress(ValueError):
            for wished in self._wishes.get(UUID(str(payload)), ()):
                wished.set()


async def happens_within(event: asyncio.Event, timeout_s: float) -> bool:
    """True as soon as the event is set; False after `timeout_s`."""
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            return await event.wait()
    return False


async def wait_briefly(event: asyncio.Event, timeout_s: float = POLL_S) -> None:
    """Until the event, at most `timeout_s`; the event is cleared for the next look."""
    await happens_within(event, timeout_s)
    event.clear()
