"""All stored keys under the current master key again: a job in the database that any replica carries on.

`old,new` → `new,old` in `ORCH_MASTER_KEY` of every replica, then this, then `new` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from orchestrator.keys import KeyRing
    from orchestrator.registry.rewrap import RewrapRegistry

__all__ = ["Progress", "Rewrap"]

log = structlog.get_logger("orchestrator.rewrap")

BATCH = 200


@dataclass(frozen=True, slots=True)
class Progress:
    """`idle`: keys wait for a job to be started; `done`: none is stored under another master key."""

    status: str  # idle | running | done
    total: int
    done: int

    @property
    def remaining(self) -> int:
        return self.total - self.done


class Rewrap:
    def __init__(self, registry: RewrapRegistry, keyring: KeyRing) -> None:
        self._registry = registry
        self._keyring = keyring

    async def start(self) -> Progress:
        """Have it done; a job that is under way goes on."""
        await self._registry.start(self._keyring.current_id)
        return await self.progress()

    async def progress(self) -> Progress:
        """Of the job, whichever replica's master key it is for."""
        job = await self._registry.wanted()
        master_key_id, finished = job or (self._keyring.current_id, True)
        if finished:
            master_key_id = self._keyring.current_id
        total, done = await self._registry.progress(master_key_id)
        status = "running" if not finished else "done" if done == total else "idle"
        return Progress(status, total, done)

    async def round(self) -> None:
        """Do what there is to do. A replica that encrypts with another master key leaves the job to others.

        Raises `ConfigurationError` when a key is stored under a master key that this replica does not have.
        """
        job = await self._registry.wanted()
        current = self._keyring.current_id
        if job is None or job != (current, False):
            return
        while await self._registry.batch(current, self._keyring.rewrap, BATCH):
            pass
        total, done = await self._registry.progress(current)
        if done == total:
            await self._registry.finish(current, total)
            log.info("keys_rewrapped", total=total, master_key_id=current)
