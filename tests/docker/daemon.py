"""The Docker Engine of these tests: `tests/docker/setup.sh` brings it; without it they are skipped, in CI they fail."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "BASE",
    "IMAGE",
    "OTHER_IMAGE",
    "build_images",
    "docker",
    "image_build",
    "inspect",
    "missing",
    "require_docker",
]

TESTS = Path(__file__).resolve().parents[1]
BASE = os.environ.get("ENGINE_TEST_BASE", "engine-orchestrator-base:dev")
IMAGE = "engine-orchestrator-mimic:1"
OTHER_IMAGE = "engine-orchestrator-mimic:2"
# The project's own, as the tests build them.
ENGINE = "engine-orchestrator-test-engine:dev"
ORCHESTRATOR = "engine-orchestrator-test:dev"

_RECIPE = """\
FROM {base}
RUN mkdir /data && chown 1000:1000 /data
COPY mimic.py /mimic.py
ENV MIMIC_IMAGE={tag}
USER 1000:1000
CMD ["python3", "-I", "-S", "/mimic.py"]
"""


def docker(*arguments: str, given: bytes | None = None, check: bool = True, host: str | None = None) -> str:
    """The docker command, on another daemon by `host`; its output. Fails with what it said."""
    done = subprocess.run(
        ["docker", *arguments],
        input=given,
        capture_output=True,
        timeout=100,
        env={**os.environ, "DOCKER_BUILDKIT": "0", **({"DOCKER_HOST": host} if host else {})},
    )
    if check and done.returncode:
        raise AssertionError(f"docker {arguments[0]}: {done.stderr.decode()[-2000:]}")
    return done.stdout.decode().strip()


def inspect(container: str) -> dict[str, Any]:
    return dict(json.loads(docker("inspect", "--type", "container", container))[0])


@functools.cache
def unavailable() -> str | None:
    if shutil.which("docker") is None:
        return "no docker command"
    try:
        docker("version", "--format", "{{.Server.Version}}")
    except (AssertionError, subprocess.TimeoutExpired) as error:
        return f"no Docker Engine answers ({str(error)[:100]})"
    try:
        docker("image", "inspect", BASE)
    except AssertionError:
        return f"the base image {BASE} is missing"
    return None


def require_docker() -> None:
    """Skip by name; in CI, where a skip would hide a broken set-up, fail."""
    if problem := unavailable():
        missing(problem)


def missing(problem: str) -> None:
    """Something of the set-up is not there."""
    message = f"{problem}; run tests/docker/setup.sh"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


@contextlib.contextmanager
def image_build() -> Iterator[None]:
    """One test process at a time builds the project's images: the others then find its layers."""
    with (Path(tempfile.gettempdir()) / f"engine-orchestrator-images-{os.getuid()}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def build_images() -> None:
    """The mimic as an image, under two names with two contents."""
    for image in (IMAGE, OTHER_IMAGE):
        context = io.BytesIO()
        with tarfile.open(fileobj=context, mode="w") as archive:
            recipe = _RECIPE.format(base=BASE, tag=image).encode()
            for name, content in (("Dockerfile", recipe), ("mimic.py", (TESTS / "mimic.py").read_bytes())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                entry.mode = 0o644
                archive.addfile(entry, io.BytesIO(content))
        docker("build", "--quiet", "--tag", image, "-", given=context.getvalue())
