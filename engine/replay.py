"""The latest events of all turns, for callers who lost their stream. In memory, bounded, oldest forgotten first."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from engine.brain import now_ms

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_BYTES = 4 * 1024 * 1024


class ReplayBuffer:
    """Each event has a time of its own, in milliseconds since the epoch, that only grows, also when the clock does not.

    So `since(time of the last event one has)` gives exactly the later ones.
    """

    def __init__(self, max_bytes: int = MAX_BYTES, clock_ms: Callable[[], int] = now_ms) -> None:
        self._max_bytes = max_bytes
        self._clock_ms = clock_ms
        self._events: deque[tuple[int, str, bytes]] = deque()
        self._bytes = 0
        self._last = 0

    def add(self, task_id: str, event: bytes) -> None:
        self._last = max(self._clock_ms(), self._last + 1)
        self._events.append((self._last, task_id, event))
        self._bytes += len(event)
        while self._bytes > self._max_bytes:
            self._bytes -= len(self._events.popleft()[2])

    def since(self, after_ms: int, task_id: str | None = None) -> bytes:
        """The events after that time, of one task or of all; each with its time as `id`."""
        return b"".join(
            b"id: %d\n%s" % (when, event)
            for when, owner, event in self._events
            if when > after_ms and task_id in (None, owner)
        )
