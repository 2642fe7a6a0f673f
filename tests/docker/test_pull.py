"""Images from real registries on loopback: one that is open, one that wants a login (`tests/docker/setup.sh`)."""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import os
import stat
import urllib.error
import urllib.request
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from orchestrator.backends.docker_client import DockerClient
from orchestrator.backends.docker_host import find_docker_host
from orchestrator.backends.docker_pull import Images
from orchestrator.errors import ImageNotFound
from tests.docker.daemon import IMAGE, build_images, docker, missing, require_docker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from orchestrator.backends.docker_backend import DockerBackend
    from tests.docker.harness import DockerHarness

OPEN = os.environ.get("ENGINE_TEST_REGISTRY", "127.0.0.1:5000")
LOCKED = os.environ.get("ENGINE_TEST_LOCKED_REGISTRY", "127.0.0.1:5001")
USER = os.environ.get("ENGINE_TEST_REGISTRY_USER", "tester")
PASSWORD = os.environ.get("ENGINE_TEST_REGISTRY_PASSWORD", "only-for-the-tests")


@functools.cache
def registries_answer() -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for address in (OPEN, LOCKED):
        try:
            opener.open(f"http://{address}/v2/", timeout=5).close()
        except urllib.error.HTTPError as error:
            error.close()
        except OSError:
            return False
    return True


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Docker configuration of this test's own."""
    require_docker()
    build_images()
    if not registries_answer():
        missing("no registries on loopback")
    folder = tmp_path / "docker-config"
    folder.mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))
    return folder


def login(config: Path, registry: str, password: str = PASSWORD) -> None:
    auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
    (config / "config.json").write_text(json.dumps({"auths": {registry: {"auth": auth}}}))


def pushed(config: Path, registry: str) -> str:
    """The name of an image that only a registry has."""
    image = f"{registry}/mimic-{uuid4().hex[:8]}:1"
    docker("tag", IMAGE, image)
    if registry == LOCKED:
        login(config, registry)
    docker("push", "--quiet", image)
    docker("rmi", image)
    (config / "config.json").unlink(missing_ok=True)
    return image


@pytest.fixture
async def client() -> AsyncIterator[DockerClient]:
    made = DockerClient(find_docker_host())
    yield made
    await made.close()


@pytest.fixture
async def images(client: DockerClient) -> AsyncIterator[Images]:
    made = Images(client, 60)
    yield made
    await made.close()


async def test_a_missing_image_is_pulled_once_for_all(
    config: Path, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pushed(config, OPEN)
    steps: list[str] = []
    pulls: list[str] = []
    original = images._pull

    async def counted(image: str) -> None:
        pulls.append(image)
        await original(image)

    monkeypatch.setattr(images, "_pull", counted)
    resolved = await asyncio.gather(*(images.resolve(image, steps.append) for _ in range(10)))
    assert len(pulls) == 1
    assert len(set(resolved)) == 1
    assert resolved[0].startswith(image.rpartition(":")[0] + "@sha256:")
    assert any("Pull complete" in step or "Downloaded" in step or "Digest" in step for step in steps)
    # What was resolved goes on naming the same content, also where it must be pulled again.
    docker("rmi", image)
    assert await images.resolve(resolved[0]) == resolved[0]
    docker("rmi", resolved[0])


async def test_a_caller_who_goes_away_does_not_end_the_pull(config: Path, images: Images) -> None:
    image = pushed(config, OPEN)
    impatient = asyncio.create_task(images.resolve(image))
    while not images._pulls:  # noqa: ASYNC110 - the moment when the pull is under way
        await asyncio.sleep(0)
    patient = asyncio.create_task(images.resolve(image))
    impatient.cancel()
    assert (await patient).startswith(image.rpartition(":")[0])
    docker("rmi", image)


async def test_an_image_without_a_registry_is_named_by_its_id(images: Images) -> None:
    resolved = await images.resolve(IMAGE)
    assert resolved.startswith("sha256:")
    assert await images.resolve(resolved) == resolved


@pytest.mark.parametrize("name", ["nothing-here:1", "nothing/here"])
async def test_a_missing_image(images: Images, name: str) -> None:
    with pytest.raises(ImageNotFound, match="not in its registry"):
        await images.resolve(f"{OPEN}/{name}")


@pytest.mark.parametrize("name", ["", "UPPER CASE", "a b", "-x", "sha256:" + "0" * 64])
async def test_names_that_no_registry_can_have(images: Images, name: str) -> None:
    with pytest.raises(ImageNotFound):
        await images.resolve(name)


async def test_a_registry_that_does_not_answer(images: Images) -> None:
    with pytest.raises(ImageNotFound, match="cannot be reached"):
        await images.resolve("127.0.0.1:1/engine:1")


async def test_credentials_of_the_docker_configuration(config: Path, images: Images) -> None:
    image = pushed(config, LOCKED)
    with pytest.raises(ImageNotFound, match="credentials"):
        await images.resolve(image)
    login(config, LOCKED, "wrong-password")
    with pytest.raises(ImageNotFound, match="credentials") as raised:
        await images.resolve(image)
    assert "wrong-password" not in str(raised.value.__cause__)
    login(config, LOCKED)
    assert await images.resolve(image)
    docker("rmi", image)


async def test_a_credential_helper(config: Path, images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pushed(config, LOCKED)
    helper = config / "docker-credential-tests"
    answer = json.dumps({"Username": USER, "Secret": PASSWORD})
    helper.write_text(f"#!/bin/sh\ntest \"$1 $(cat)\" = 'get {LOCKED}' && echo '{answer}'\n")
    helper.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{config}:{os.environ['PATH']}")
    (config / "config.json").write_text(json.dumps({"credHelpers": {LOCKED: "tests"}}))
    assert await images.resolve(image)
    docker("rmi", image)


async def test_create_pulls_and_a_missing_image_leaves_nothing(
    config: Path, harness: DockerHarness, backend: DockerBackend
) -> None:
    image = pushed(config, OPEN)
    engine_id = uuid4()
    with pytest.raises(ImageNotFound):
        await backend.create(engine_id, harness.free_port(), harness.env(engine_id), f"{OPEN}/nothing-here:1")
    assert await backend.list() == []
    assert not await backend.has_data(engine_id)
    endpoint = await backend.create(engine_id, harness.free_port(), harness.env(engine_id), image)
    assert await harness.run_of(engine_id, endpoint)
    await backend.destroy(engine_id)
    docker("rmi", image)
