"""`orchestrator dev --backend docker`: the same demonstration in a container, its image found or built by itself."""

from __future__ import annotations

import os
import secrets
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from orchestrator.dev_image import BUILT_IMAGE, provide_image
from orchestrator.errors import BackendUnavailable, ImageNotFound
from tests.docker.daemon import docker, image_build, inspect, require_docker
from tests.integration.test_dev import Dev, admit

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(600)
BUILD_S = 500


class DockerDev(Dev):
    """Networks of its own, so that its containers can be told from those of others."""

    def __init__(self, state_dir: Path) -> None:
        self.network = f"orch-dev-{secrets.token_hex(4)}"
        passed = {name: value for name, value in os.environ.items() if name.startswith(("DOCKER_", "PIP_", "SSL_"))}
        super().__init__(state_dir, ORCH_ENGINE_NETWORK=self.network, **passed)

    def containers(self, *filters: str) -> list[dict[str, Any]]:
        """Running and stopped ones."""
        given = (part for text in (f"network={self.network}", *filters) for part in ("--filter", text))
        return [inspect(container) for container in docker("ps", "--all", "--quiet", *given).split()]

    def close(self) -> None:
        super().close()
        deployments = {
            found["Config"]["Labels"]["engine-orchestrator.deployment"]
            for found in self.containers("label=engine-orchestrator.deployment")
        }
        for deployment in deployments:
            mark = f"label=engine-orchestrator.deployment={deployment}"
            docker("rm", "--force", *docker("ps", "--all", "--quiet", "--filter", mark).split(), check=False)
            docker("volume", "rm", "--force", *docker("volume", "ls", "--quiet", "--filter", mark).split(), check=False)
        docker("network", "rm", self.network, check=False)


@pytest.fixture
def dev() -> Iterator[DockerDev]:
    require_docker()
    there = docker("image", "ls", "--quiet", BUILT_IMAGE)
    with image_build(), tempfile.TemporaryDirectory(prefix="orchestrator-dev-", ignore_cleanup_errors=True) as folder:
        made = DockerDev(Path(folder) / "state")
        try:
            yield made
        finally:
            made.close()
            if not there:
                docker("image", "rm", "--no-prune", BUILT_IMAGE, check=False)


def state(container: dict[str, Any]) -> str:
    return str(container["State"]["Status"])


def test_once_demonstrates_and_leaves_nothing_running(dev: DockerDev) -> None:
    first = dev.run("--backend", "docker", "--once", within_s=BUILD_S)
    assert f"Engine image {BUILT_IMAGE}" in first
    assert "This is turn 1 of this task" in first
    (container,) = dev.containers()
    assert state(container) == "exited"
    assert {mount["Destination"] for mount in container["Mounts"]} == {"/data", "/catalog"}
    assert dev.postgres() is None

    second = dev.run("--backend", "docker", "--once")  # the brain remembers
    assert "This is turn 2 of this task" in second

    # The other backend on the same state directory starts with nothing, and disturbs nothing.
    assert "This is turn 1 of this task" in dev.run("--once")
    assert "This is turn 3 of this task" in dev.run("--backend", "docker", "--once")


async def test_ctrl_c_stops_engines_and_a_kill_leaves_them_to_the_next(dev: DockerDev) -> None:
    process = dev.start("--backend", "docker", "--no-demo")
    told = await dev.serving(process, within_s=BUILD_S)
    engine = await admit(told, "ann")
    (before,) = dev.containers()
    assert state(before) == "running"
    process.kill()
    process.communicate()
    database = dev.postgres()
    assert database is not None

    process = dev.start("--backend", "docker", "--no-demo")
    told = await dev.serving(process)
    assert dev.postgres() == database
    adopted = await admit(told, "ann")
    assert adopted == {**engine, "last_health_at": adopted["last_health_at"]}
    (after,) = dev.containers()
    assert (after["Id"], after["State"]["StartedAt"]) == (before["Id"], before["State"]["StartedAt"])
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to everyone in the foreground
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    (stopped,) = dev.containers()
    assert state(stopped) == "exited"
    assert dev.postgres() is None


def test_without_docker_it_says_so_in_one_line(dev: DockerDev) -> None:
    dev.environment["DOCKER_HOST"] = f"unix://{dev.state_dir.parent}/nothing.sock"
    process = dev.start("--backend", "docker", "--once")
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 1
    (line,) = [line for line in output.splitlines() if "error:" in line]
    assert "Docker cannot be reached" in line
    assert "Traceback" not in output
    assert dev.postgres() is None


# --- the image ------------------------------------------------------------------------------------------------


async def test_the_image_is_built_once_and_again_when_its_sources_change() -> None:
    require_docker()
    name = f"engine-orchestrator-test-{secrets.token_hex(4)}:dev"
    said: list[str] = []
    try:
        with image_build():
            assert await provide_image(name, said.append, pull_timeout_s=60, built=name) == "built"
            assert any(line.startswith("Step ") for line in said)
            assert any(name in line for line in said)
            assert await provide_image(name, said.append, pull_timeout_s=60, built=name) == "found"
            # As if it came from another checkout: the label says what it was made from.
            docker(
                *("build", "--quiet", "--label", "engine-orchestrator.source=other", "--tag", name, "-"),
                given=f"FROM {name}\n".encode(),
            )
            assert await provide_image(name, said.append, pull_timeout_s=60, built=name) == "built"
            # Somebody's own image of that name is taken as it is.
            docker(
                *("build", "--quiet", "--label", "engine-orchestrator.source=", "--tag", name, "-"),
                given=f"FROM {name}\n".encode(),
            )
            assert await provide_image(name, said.append, pull_timeout_s=60, built=name) == "found"
    finally:
        docker("image", "rm", "--force", name, check=False)


async def test_another_image_is_found_or_pulled_never_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_docker()
    missing = "127.0.0.1:1/nothing:dev"
    with pytest.raises(ImageNotFound):
        await provide_image(missing, lambda _: None, pull_timeout_s=60)
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nothing.sock")
    with pytest.raises(BackendUnavailable):
        await provide_image(missing, lambda _: None, pull_timeout_s=60)
