"""Whether this engine works, for those who put idle engines to sleep (engine contract: activity)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Activity:
    """Counts turns. Reads, probes, refused requests and key rotations are not activity.

    A turn counts from the moment it is accepted, before anything of it is stored, so that there is no instant at
    which an engine looks idle and has a turn. Relative and monotonic: a clock that jumps does not matter.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._idle_since = monotonic()
        self.in_flight = 0

    def begin(self) -> None:
        self.in_flight += 1

    def end(self, *, worked: bool) -> None:
        """`worked` is False for a turn that was refused before it began: it does not make the engine less idle."""
        self.in_flight -= 1
        if worked:
            self._idle_since = self._monotonic()

    def snapshot(self) -> dict[str, int | float]:
        idle = 0.0 if self.in_flight else round(self._monotonic() - self._idle_since, 3)
        return {"in_flight": self.in_flight, "idle_seconds": idle}
