"""A Docker Engine on another host: over TLS and over ssh; and one that goes away, hangs, and returns."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest

from orchestrator.backends.base import EventKind
from orchestrator.backends.docker_names import LOCATION_VOLUME
from orchestrator.errors import BackendError, BackendUnavailable, ConfigurationError
from tests.docker.daemon import docker, missing, require_docker
from tests.docker.harness import DockerHarness
from tests.docker.second_daemon import SecondDaemon, second_daemon

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from orchestrator.backends.docker_backend import DockerBackend

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def second() -> Iterator[SecondDaemon]:
    require_docker()
    with second_daemon() as made:
        yield made


class RemoteHarness(DockerHarness):
    """Backends whose daemon is named by `environment`."""

    def __init__(self, folder: Path, second: SecondDaemon, environment: dict[str, str]) -> None:
        super().__init__(folder, engine_publish_address=second.address, engine_host=second.address)
        self.cli_host = second.cli_host
        self.environment = environment

    def make(self, deployment_id: UUID) -> DockerBackend:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("DOCKER_HOST", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH"):
                patch.delenv(name, raising=False)
            for name, value in self.environment.items():
                patch.setenv(name, value)
            return super().make(deployment_id)


@dataclass(frozen=True, slots=True)
class SshServer:
    port: int
    folder: Path


@pytest.fixture(scope="module")
def ssh_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    """An sshd of this test's own on loopback, and an `ssh` on the PATH that knows it."""
    sshd = shutil.which("sshd", path=f"/usr/sbin:{os.environ['PATH']}")
    ssh = shutil.which("ssh")
    if sshd is None or ssh is None:
        missing("no ssh server and client")
    assert sshd is not None
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True, timeout=30)
    shutil.copy(folder / "user.pub", folder / "authorized")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "sshd.conf").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\nPidFile none\n"
    )
    host_key = (folder / "host.pub").read_text()
    (folder / "known").write_text(f"[127.0.0.1]:{port} {host_key}")
    (folder / "ssh.conf").write_text(
        f"IdentityFile {folder}/user\nIdentitiesOnly yes\n"
        f"UserKnownHostsFile {folder}/known\nStrictHostKeyChecking yes\n"
    )
    (folder / "bin").mkdir()
    wrapper = folder / "bin" / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {ssh} -F {folder}/ssh.conf "$@"\n')
    wrapper.chmod(0o700)
    Path("/run/sshd").mkdir(exist_ok=True)
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([sshd, "-D", "-e", "-f", folder / "sshd.conf"], stderr=log)
    try:
        while server.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
        assert server.poll() is None, (folder / "log").read_text()
        yield SshServer(port, folder)
    finally:
        server.terminate()
        server.wait()


def over_tls(second: SecondDaemon) -> dict[str, str]:
    return {
        "DOCKER_HOST": f"tcp://{second.address}:2376",
        "DOCKER_TLS_VERIFY": "1",
        "DOCKER_CERT_PATH": str(second.certificates),
    }


@pytest.fixture
async def tls(tmp_path: Path, second: SecondDaemon) -> AsyncIterator[RemoteHarness]:
    made = RemoteHarness(tmp_path, second, over_tls(second))
    yield made
    await made.close()


@pytest.fixture
async def ssh(
    tmp_path: Path, second: SecondDaemon, ssh_server: SshServer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[RemoteHarness]:
    monkeypatch.setenv("PATH", f"{ssh_server.folder}/bin:{os.environ['PATH']}")
    address = f"ssh://{getpass.getuser()}@127.0.0.1:{ssh_server.port}{second.socket}"
    made = RemoteHarness(tmp_path, second, {"DOCKER_HOST": address})
    yield made
    await made.close()


async def lives(harness: RemoteHarness) -> None:
    """The life of an engine; its URL names the other host."""
    backend = await harness.backend()
    engine_id = uuid4()
    endpoint = await backend.create(engine_id, harness.free_port(), harness.env(engine_id), harness.image)
    assert endpoint.host == harness.settings.engine_host
    run = await harness.run_of(engine_id, endpoint)
    await backend.freeze(engine_id)
    await backend.thaw(engine_id)
    assert await harness.run_of(engine_id, endpoint) == run
    assert [line async for line in backend.logs(engine_id, tail=10)]
    assert [found.engine_id for found in await backend.list()] == [engine_id]
    await backend.stop(engine_id)
    await backend.destroy(engine_id)
    assert await backend.list() == []


async def test_over_tls(tls: RemoteHarness) -> None:
    await lives(tls)


async def test_over_ssh(ssh: RemoteHarness) -> None:
    await lives(ssh)


async def test_two_daemons_are_two_locations(tls: RemoteHarness, ssh: RemoteHarness, tmp_path: Path) -> None:
    local = DockerHarness(tmp_path)
    try:
        places = [await (await harness.backend()).location_id() for harness in (tls, ssh, local)]
        assert places[0] == places[1]
        assert places[0] != places[2]
    finally:
        await local.close()


async def test_a_location_outlives_a_prune_of_its_volume(tls: RemoteHarness) -> None:
    backend = await tls.backend()
    location, engine_id = await backend.location_id(), uuid4()
    await backend.create(engine_id, tls.free_port(), tls.env(engine_id), tls.image)
    await backend.stop(engine_id)
    docker("volume", "rm", LOCATION_VOLUME, host=tls.cli_host)
    assert await (await tls.backend()).location_id() == location
    assert LOCATION_VOLUME in docker("volume", "ls", "--quiet", host=tls.cli_host).split()
    await backend.destroy(engine_id)


async def test_tls_without_the_right_certificate(tls: RemoteHarness, tmp_path: Path) -> None:
    tls.environment = {"DOCKER_HOST": tls.environment["DOCKER_HOST"]}
    with pytest.raises(BackendError, match="HTTPS"):
        await tls.backend()
    strange = tmp_path / "strange"
    shutil.copytree(over_tls_path(tls), strange)
    tls.environment = {**tls.environment, "DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(strange)}
    (strange / "ca.pem").write_text("")
    backend = tls.make(uuid4())
    with pytest.raises(ConfigurationError, match="DOCKER_CERT_PATH"):
        await backend.open()


def over_tls_path(harness: RemoteHarness) -> Path:
    return Path(str(harness.cli_host).removeprefix("unix://")).parent / "client"


async def test_ssh_to_nobody(ssh: RemoteHarness) -> None:
    ssh.environment = {"DOCKER_HOST": "ssh://127.0.0.1:1"}
    async with asyncio.timeout(5):
        with pytest.raises(BackendUnavailable, match="ssh"):
            await ssh.backend()


async def test_an_ssh_client_that_ends_is_started_again(ssh: RemoteHarness) -> None:
    backend = await ssh.backend()
    tunnel = backend._client._tunnel
    assert tunnel is not None
    assert tunnel._process is not None
    tunnel._process.kill()
    await tunnel._process.wait()
    assert await backend.list() == []


async def test_a_loopback_publish_address_stops_the_start(tls: RemoteHarness) -> None:
    for address in ("127.0.0.1", "::1"):
        tls.settings = tls.settings.model_copy(update={"engine_publish_address": address})
        with pytest.raises(ConfigurationError, match="ORCH_ENGINE_PUBLISH_ADDRESS"):
            tls.make(uuid4())


# --- the daemon goes away, hangs, and returns -----------------------------------------------------------------


@pytest.fixture
async def near(tmp_path: Path, second: SecondDaemon) -> AsyncIterator[RemoteHarness]:
    """The same daemon by its socket."""
    made = RemoteHarness(tmp_path, second, {"DOCKER_HOST": second.cli_host})
    yield made
    await made.close()


async def test_a_daemon_that_goes_away_and_returns(near: RemoteHarness, second: SecondDaemon) -> None:
    backend = await near.backend()
    engine_id = uuid4()
    endpoint = await backend.create(engine_id, near.free_port(), near.env(engine_id), near.image)
    run = await near.run_of(engine_id, endpoint)
    async with contextlib.aclosing(backend.events()) as events:
        assert (await anext(events)).kind is EventKind.RESYNC
        await asyncio.to_thread(second.stop)
        async with asyncio.timeout(5):
            with pytest.raises(BackendUnavailable) as raised:
                await backend.list()
        assert raised.value.retry_after_s
        with pytest.raises(BackendUnavailable):
            await backend.is_running(engine_id)
        with pytest.raises(BackendUnavailable):
            await backend.create(engine_id, endpoint.port, near.env(engine_id, 2), near.image)
        await asyncio.to_thread(second.start)
        # The list is the truth again as soon as the stream says so.
        assert (await anext(events)).kind is EventKind.RESYNC
    assert [found.engine_id for found in await backend.list()] == [engine_id]
    assert await near.run_of(engine_id, endpoint) == run
    await backend.stop(engine_id)
    assert not await backend.is_running(engine_id)


async def test_a_daemon_that_hangs(near: RemoteHarness, second: SecondDaemon) -> None:
    backend = await near.backend()
    engine_id = uuid4()
    await backend.create(engine_id, near.free_port(), near.env(engine_id), near.image)
    second.signal(signal.SIGSTOP)
    try:
        calls = (
            backend.list(),
            backend.stop(engine_id),
            backend.freeze(engine_id),
            backend.start(engine_id),
            backend.has_data(engine_id),
            backend.location_id(),
        )
        async with asyncio.timeout(5):
            answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(answer) for answer in answers] == [BackendUnavailable] * len(calls)
    finally:
        second.signal(signal.SIGCONT)
    assert await backend.is_running(engine_id)
