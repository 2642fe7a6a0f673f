"""Fixtures of the tests on a real Docker Engine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.docker.daemon import ENGINE, ORCHESTRATOR, build_images, image_build, require_docker
from tests.docker.fleet import Fleet, fleet_variables
from tests.docker.harness import DockerHarness

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from orchestrator.backends.docker_backend import DockerBackend

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.fixture
def variables(database_url: str, tmp_path: Path) -> dict[str, str]:
    """The `ORCH_*` variables of a deployment on Docker; a test file may change them."""
    return fleet_variables(database_url, tmp_path)


@pytest.fixture
async def fleet(variables: dict[str, str]) -> AsyncIterator[Fleet]:
    """No replica yet: `open` brings one."""
    require_docker()
    build_images()
    made = Fleet(variables)
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture(scope="session")
def images() -> None:
    """The images of this project, built from this checkout."""
    require_docker()
    environment = {**os.environ, "ENGINE_TAG": ENGINE, "ORCHESTRATOR_TAG": ORCHESTRATOR}
    with image_build():
        done = subprocess.run([ROOT / "deploy/images.sh"], capture_output=True, env=environment, timeout=590)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


@pytest.fixture
async def place(images: None, tmp_path: Path) -> AsyncIterator[DockerHarness]:
    made = DockerHarness(tmp_path)
    yield made
    await made.close()
