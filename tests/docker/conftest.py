"""Fixtures of the tests on a real Docker Engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.docker.daemon import require_docker
from tests.docker.harness import DockerHarness

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from orchestrator.backends.docker_backend import DockerBackend


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[DockerHarness]:
    require_docker()
    made = DockerHarness(tmp_path)
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture
async def backend(harness: DockerHarness) -> DockerBackend:
    return await harness.backend()
