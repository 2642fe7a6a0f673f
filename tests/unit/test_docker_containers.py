"""What the verbs on containers make of the daemon's refusals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

from orchestrator.backends import docker_containers
from orchestrator.backends.docker_containers import Containers
from orchestrator.errors import BackendError, BackendUnavailable

if TYPE_CHECKING:
    from orchestrator.backends.docker_client import DockerClient


class Refusing:
    """A daemon that refuses to pause so many times, and tells what is the case when it is asked."""

    def __init__(self, refusals: int, error: BackendError, *, paused: bool = False) -> None:
        self.refusals = refusals
        self.error = error
        self.state = {"Running": True, "Paused": paused}
        self.asked = 0

    async def call(self, make: Any) -> Any:
        if make.__name__ != "ask":
            return {"State": self.state}
        self.asked += 1
        if self.asked <= self.refusals:
            raise self.error
        return None


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_containers, "_PAUSE_RETRY_S", 0)


BUSY = BackendError("Docker: Cannot pause container: OCI runtime pause failed: unable to freeze: unknown")


async def pauses(daemon: Refusing) -> bool:
    return await Containers(cast("DockerClient", daemon)).set_paused("a-container", paused=True)


async def test_a_pause_that_the_kernel_did_not_finish_is_tried_again() -> None:
    daemon = Refusing(2, BUSY)
    assert await pauses(daemon)
    assert daemon.asked == 3


async def test_a_pause_that_never_comes_is_an_error() -> None:
    daemon = Refusing(100, BUSY)
    with pytest.raises(BackendError, match="unable to freeze"):
        await pauses(daemon)
    assert daemon.asked == 5


async def test_what_is_paused_already_is_fine_and_what_is_gone_is_told() -> None:
    assert await pauses(Refusing(100, BUSY, paused=True))
    ended = Refusing(100, BUSY)
    ended.state["Running"] = False
    assert not await pauses(ended)


async def test_a_daemon_that_is_away_is_not_asked_again() -> None:
    daemon = Refusing(100, BackendUnavailable("Docker does not answer."))
    with pytest.raises(BackendUnavailable):
        await pauses(daemon)
    assert daemon.asked == 1
