"""Which keys are valid now (engine contract: key check and live rotation).

A record says which key is in force, of which generation, and which older keys are still accepted because the overlap
of their rotation has not ended. It survives restarts in `.engine-key.json` (see `key_store`); the environment holds
what the engine was last created with. `effective` settles which of the two wins, `rotated` makes the next record, and
`Keyring` answers, in constant time, whether a presented key is accepted.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from engine.errors import StaleGeneration

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_OVERLAP_S = 86_400


@dataclass(frozen=True, slots=True)
class RetiredKey:
    """A key that was in force and is accepted until `expires_at` (seconds since the epoch)."""

    key_hash: str = field(repr=False)
    generation: int
    expires_at: float
    overlap_seconds: float


@dataclass(frozen=True, slots=True)
class KeyRecord:
    key_hash: str = field(repr=False)
    generation: int
    retired: tuple[RetiredKey, ...] = ()


def effective(env_hash: str, env_generation: int, stored: KeyRecord | None) -> KeyRecord:
    """The record that holds after a start.

    A stored record of a higher generation wins; a tie goes to the environment, and so does a higher generation there.
    Where the environment wins, the stored record's own current key is not valid any more: no overlap was promised for
    it. The overlaps that were promised to still older keys are kept in every case.
    """
    if stored is None:
        return KeyRecord(env_hash, env_generation)
    if stored.generation > env_generation:
        return stored
    return KeyRecord(env_hash, env_generation, tuple(key for key in stored.retired if key.key_hash != env_hash))


def rotated(record: KeyRecord, key_hash: str, generation: int, overlap_seconds: float, now: float) -> KeyRecord:
    """The record after a rotation at wall-clock time `now`; `record` itself when it already says so.

    Raises StaleGeneration for a lower generation, and for the same generation with another key.
    """
    if generation < record.generation:
        raise StaleGeneration("A newer key generation is in force.", record.generation)
    if generation == record.generation:
        if hmac.compare_digest(key_hash, record.key_hash):
            return record
        raise StaleGeneration("This key generation is in force with another key.", record.generation)
    retired = [key for key in record.retired if key.expires_at > now]
    if overlap_seconds > 0:
        retired.append(RetiredKey(record.key_hash, record.generation, now + overlap_seconds, overlap_seconds))
    return KeyRecord(key_hash, generation, tuple(key for key in retired if key.key_hash != key_hash))


class Keyring:
    """The accepted keys of a running engine.

    Overlaps are counted on the monotonic clock once they are in memory, and never last longer than what the rotation
    asked for: a wall clock that is set back neither revives nor prolongs a key by more than its own overlap.
    """

    def __init__(
        self,
        record: KeyRecord,
        *,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self.adopt(record)

    @property
    def record(self) -> KeyRecord:
        return self._record

    def adopt(self, record: KeyRecord) -> None:
        """Makes `record` the one in force, at once and for every request from now on."""
        wall, monotonic = self._wall(), self._monotonic()
        self._record = record
        self._deadlines = [
            (key.key_hash, monotonic + min(key.expires_at - wall, key.overlap_seconds)) for key in record.retired
        ]

    def rotated(self, key_hash: str, generation: int, overlap_seconds: float) -> KeyRecord:
        """The record that a rotation would give. Nothing changes until it is stored and `adopt`ed."""
        return rotated(self._unexpired(), key_hash, generation, overlap_seconds, self._wall())

    def accepts(self, presented: bytes) -> bool:
        """Whether `presented` is a valid key. Takes the same time for every wrong key of a length."""
        digest = hashlib.sha256(presented).hexdigest()
        now = self._monotonic()
        accepted = hmac.compare_digest(digest, self._record.key_hash)
        for key_hash, deadline in self._deadlines:
            accepted |= hmac.compare_digest(digest, key_hash) and now < deadline
        return accepted

    def _unexpired(self) -> KeyRecord:
        """The record without keys whose overlap has ended here, whatever the wall clock says meanwhile."""
        now = self._monotonic()
        live = tuple(
            key for key, (_, deadline) in zip(self._record.retired, self._deadlines, strict=True) if now < deadline
        )
        return self._record if len(live) == len(self._record.retired) else replace(self._record, retired=live)
