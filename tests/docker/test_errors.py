"""Docker's failures become our errors, all of them, in one place. Needs no Docker Engine."""

from __future__ import annotations

import asyncio
import inspect
import json
import socket
from typing import TYPE_CHECKING

import aiodocker.exceptions
import aiohttp
import pytest
from aiodocker import DockerError, DockerStreamError

from orchestrator.backends.docker_client import DockerClient
from orchestrator.backends.docker_errors import (
    Conflict,
    NetworkFull,
    NoSuchObject,
    PortBusy,
    RunLeftBehind,
    image_error,
    map_error,
    mapped,
)
from orchestrator.backends.docker_host import DockerHost, find_docker_host
from orchestrator.backends.docker_pull import registry_of
from orchestrator.backends.docker_spec import memory_bytes
from orchestrator.errors import BackendError, BackendUnavailable, ConfigurationError, ImageNotFound

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def kinds_of(module: object, root: type[BaseException]) -> list[type[BaseException]]:
    return [kind for _, kind in inspect.getmembers(module, inspect.isclass) if issubclass(kind, root)]


@pytest.mark.parametrize(
    "kind",
    [
        *kinds_of(aiodocker.exceptions, Exception),
        *kinds_of(aiohttp, aiohttp.ClientError),
        TimeoutError,
        ConnectionResetError,
        asyncio.IncompleteReadError,
        json.JSONDecodeError,
        KeyError,
        UnicodeDecodeError,
    ],
    ids=lambda kind: kind.__name__,
)
def test_every_exception_of_the_libraries_is_mapped(kind: type[Exception]) -> None:
    class Made(kind):  # type: ignore[misc, valid-type]  # the kinds' own constructors want the most different things
        status = 500
        message = "x"

        def __init__(self) -> None:
            pass

        def __str__(self) -> str:
            return "what went wrong"

    ours = map_error(Made.__new__(Made, *([b"", 0] if kind is asyncio.IncompleteReadError else [])))
    assert isinstance(ours, BackendError)
    if issubclass(kind, (aiohttp.ClientError, TimeoutError, OSError, EOFError)):
        assert type(ours) is BackendUnavailable


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (900, "Cannot connect to Docker Engine via unix:///x", BackendUnavailable),
        (503, "", BackendUnavailable),
        (502, "<html>Bad gateway</html>", BackendUnavailable),
        (500, "dockerd is shutting down", BackendUnavailable),
        (404, "No such container: engine-0123", NoSuchObject),
        (409, 'Conflict. The container name "/x" is already in use', Conflict),
        (500, "driver failed …: Bind for 127.0.0.1:9001 failed: port is already allocated", PortBusy),
        (500, "listen tcp4 127.0.0.1:9001: bind: address already in use", PortBusy),
        (500, "adding interface veth1 to bridge br-1 failed: exchange full", NetworkFull),
        (403, "no available IPv4 addresses on this network's address pools: x", NetworkFull),
        (500, "failed to update store for object type *libnetwork.endpoint: open : no such file", BackendUnavailable),
        (500, "failed to start shim: mkdir /run/containerd/x.v2.task/moby/0123: file exists: unknown", RunLeftBehind),
        (409, "task 0123: already exists", RunLeftBehind),
        (500, "container with given ID already exists: unknown", RunLeftBehind),
        (500, "failed to create shim: mkdir /work: file exists", BackendError),
        (400, "invalid mount config", BackendError),
        (418, "", BackendError),
    ],
)
def test_answers_of_the_daemon(status: int, message: str, kind: type[BackendError]) -> None:
    assert type(map_error(DockerError(status, message))) is kind


def test_a_message_is_one_line_of_bounded_length() -> None:
    error = map_error(DockerError(500, "first\nsecond " + "x" * 5000))
    assert "\n" not in error.message
    assert len(error.message) < 400


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (DockerError(404, "manifest for r/i:t not found: manifest unknown"), "not in its registry"),
        (
            DockerError(404, "pull access denied for x, repository does not exist or may require 'docker login'"),
            "login",
        ),
        (DockerError(500, 'Head "…": unauthorized: authentication required'), "credentials"),
        (DockerError(500, 'Get "…": dial tcp 127.0.0.1:1: connect: connection refused'), "cannot be reached"),
        (DockerError(400, "invalid reference format"), "invalid reference"),
        (DockerStreamError("no matching manifest for linux/arm64 in the manifest list entries"), "not in its registry"),
    ],
)
def test_a_failed_pull_says_what_to_mend(error: DockerError, words: str) -> None:
    ours = image_error("some/image:1", error)
    assert type(ours) is ImageNotFound
    assert words in ours.message


def test_a_pull_without_a_daemon_is_no_missing_image() -> None:
    assert type(image_error("x", DockerError(900, "refused"))) is BackendUnavailable


def test_our_own_errors_pass_unchanged() -> None:
    error = ConfigurationError("DOCKER_CERT_PATH: …")
    with pytest.raises(ConfigurationError) as raised, mapped():
        raise error
    assert raised.value is error


# --- a daemon that is not there, or hangs -------------------------------------------------------------------


async def test_no_daemon(tmp_path: Path) -> None:
    client = DockerClient(DockerHost(socket=str(tmp_path / "none.sock")))
    try:
        with pytest.raises(BackendUnavailable) as raised:
            await client.call(lambda docker: docker.version())
        assert raised.value.retry_after_s
        with pytest.raises(BackendUnavailable):
            await client.ping()
    finally:
        await client.close()


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[str]:
    """A socket that accepts and never answers."""
    path = str(tmp_path / "silent.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(50)
        yield path


async def test_a_daemon_that_hangs_is_given_up_in_seconds(silent: str) -> None:
    client = DockerClient(DockerHost(socket=silent))
    try:
        async with asyncio.timeout(5):
            with pytest.raises(BackendUnavailable):
                await client.call(lambda docker: docker.version())
    finally:
        await client.close()


# --- which daemon -----------------------------------------------------------------------------------------------


def test_docker_host_is_read_as_the_docker_command_does(tmp_path: Path) -> None:
    assert find_docker_host({"DOCKER_HOST": "unix:///x/y.sock"}).socket == "/x/y.sock"
    assert find_docker_host({"DOCKER_HOST": "tcp://h"}).address == ("h", 2375)
    secure = find_docker_host({"DOCKER_HOST": "tcp://h", "DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(tmp_path)})
    assert secure.address == ("h", 2376)
    assert secure.certificates == tmp_path
    with pytest.raises(ConfigurationError, match="DOCKER_CERT_PATH"):
        secure.tls()
    ssh = find_docker_host({"DOCKER_HOST": "ssh://me@h:2222/run/user/1/docker.sock"}).ssh
    assert ssh is not None
    assert (ssh.user, ssh.host, ssh.port, ssh.socket) == ("me", "h", 2222, "/run/user/1/docker.sock")


@pytest.mark.parametrize(
    ("value", "remote"),
    [
        ("unix:///x", False),
        ("tcp://127.0.0.1:1", False),
        ("tcp://[::1]:1", False),
        ("tcp://localhost:1", False),
        ("tcp://192.0.2.7:1", True),
        ("ssh://localhost", True),
    ],
)
def test_what_is_remote(value: str, remote: bool) -> None:
    assert find_docker_host({"DOCKER_HOST": value}).is_remote is remote


@pytest.mark.parametrize(
    "value", ["h:1", "tcp://", "ftp://h", "ssh://-oProxyCommand=x", "ssh://me:secret@h", "tcp://h:x"]
)
def test_a_wrong_docker_host(value: str) -> None:
    with pytest.raises(ConfigurationError, match="DOCKER_HOST") as raised:
        find_docker_host({"DOCKER_HOST": value})
    assert "secret" not in raised.value.message


@pytest.mark.parametrize(
    ("image", "registry", "name"),
    [
        ("engine", "docker.io", "docker.io/library/engine"),
        ("me/engine:1", "docker.io", "docker.io/me/engine:1"),
        ("localhost/engine", "localhost", "localhost/engine"),
        ("127.0.0.1:5000/a/b:1", "127.0.0.1:5000", "127.0.0.1:5000/a/b:1"),
    ],
)
def test_the_registry_of_an_image(image: str, registry: str, name: str) -> None:
    assert registry_of(image) == (registry, name)


def test_sizes_are_written_as_docker_writes_them() -> None:
    assert memory_bytes("512m") == 512 << 20
    assert memory_bytes("1.5G") == 3 << 29
    for wrong in ("", "lots", "1k", "-1g"):
        with pytest.raises(ConfigurationError, match="ORCH_ENGINE_MEMORY"):
            memory_bytes(wrong)
