"""What a container of an engine is like, seen from Docker and from inside."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest

from orchestrator.backends.base import ObjectState, id12
from orchestrator.backends.docker_backend import DockerBackend
from orchestrator.backends.docker_client import DockerClient
from orchestrator.backends.docker_host import find_docker_host
from orchestrator.backends.docker_networks import Networks
from orchestrator.errors import BackendError, ConfigurationError, ObjectMissing
from tests.docker.daemon import IMAGE, docker, inspect, require_docker
from tests.docker.harness import DockerHarness

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from orchestrator.backends.base import BackendObject, EngineEndpoint, LogLine


class Engine:
    """A running engine, and a Python inside its container."""

    def __init__(self, harness: DockerHarness, engine_id: UUID, endpoint: EngineEndpoint) -> None:
        self._harness = harness
        self.id = engine_id
        self.endpoint = endpoint
        self.container = endpoint.container_id or ""

    async def run(self) -> str:
        return await self._harness.run_of(self.id, self.endpoint)

    def inside(self, program: str, *, user: str = "") -> str:
        """What a Python program prints inside; a process of the engine's could do the same."""
        identity = ["--user", user] if user else []
        return docker("exec", *identity, self.container, "python3", "-c", program)

    @property
    def address(self) -> str:
        (network,) = inspect(self.container)["NetworkSettings"]["Networks"].values()
        return str(network["IPAddress"])


async def make(harness: DockerHarness, backend: DockerBackend, **flags: Any) -> Engine:
    engine_id = uuid4()
    endpoint = await backend.create(engine_id, harness.free_port(), harness.env(engine_id, **flags), harness.image)
    engine = Engine(harness, engine_id, endpoint)
    await engine.run()
    return engine


async def restarted(backend: DockerBackend, engine_id: UUID, times: int) -> BackendObject:
    """Wait until Docker has restarted an engine this often."""
    while True:
        found = await backend.find(engine_id)
        if found is not None and found.restart_count >= times:
            return found
        await asyncio.sleep(0.02)


def ip(*arguments: str, script: str = "") -> bool:
    """The ip command; with a script it goes on where a line fails."""
    done = subprocess.run(["ip", *arguments], input=script.encode(), capture_output=True, timeout=100)
    return done.returncode == 0


def reach(host: str, port: int) -> str:
    """A program that prints `reached`, or why not."""
    return (
        "import socket\n"
        f"try:\n socket.create_connection(({host!r}, {port}), timeout=1).close(); print('reached')\n"
        "except OSError as error:\n print(type(error).__name__)"
    )


# --- the container as Docker sees it ----------------------------------------------------------------------


async def test_hardened_and_limited_by_default(harness: DockerHarness, backend: DockerBackend) -> None:
    engine = await make(harness, backend)
    found = inspect(engine.container)
    host = found["HostConfig"]
    assert found["Name"] == f"/engine-{id12(engine.id)}"
    assert host["CapDrop"] == ["ALL"]
    assert not host["Privileged"]
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert host["PidsLimit"] == 256
    assert (host["Memory"], host["MemorySwap"]) == (1 << 30, 1 << 30)
    assert host["NanoCpus"] == 1_000_000_000
    assert host["Init"] is True
    assert host["RestartPolicy"]["Name"] == "unless-stopped"
    assert host["LogConfig"] == {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "3"}}
    assert found["Config"]["Healthcheck"] == {"Test": ["NONE"]}
    (bindings,) = host["PortBindings"].values()
    assert bindings == [{"HostIp": "127.0.0.1", "HostPort": str(engine.endpoint.port)}]
    (mount,) = found["Mounts"]
    assert (mount["Type"], mount["Name"], mount["Destination"], mount["RW"]) == (
        "volume",
        f"engine-data-{id12(engine.id)}",
        "/data",
        True,
    )
    environment = dict(entry.split("=", 1) for entry in found["Config"]["Env"])
    assert environment["SQLITE_DB_PATH"] == "/data/brain.sqlite"
    assert (environment["HOST"], environment["PORT"]) == ("0.0.0.0", "8000")
    assert "CATALOG_DIR" not in environment
    status = engine.inside("print(open('/proc/self/status').read())")
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    assert engine.inside("import os; print(os.getuid(), os.stat('/data').st_uid)") == "1000 1000"


@pytest.fixture
async def tuned(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[DockerHarness]:
    """A harness with the settings that a test is parametrised with."""
    require_docker()
    made = DockerHarness(tmp_path, **request.param)
    try:
        yield made
    finally:
        await made.close()


@pytest.mark.parametrize("tuned", [{"engine_read_only": True}], indirect=True)
async def test_a_read_only_root_leaves_data_and_tmp(tuned: DockerHarness) -> None:
    engine = await make(tuned, await tuned.backend())
    writes = (
        "import os\n"
        "for path in ('/data/x', '/tmp/x', '/x', '/mimic.py', '/var/tmp/x'):\n"
        " try: open(path, 'w').close(); print(path, 'written')\n"
        " except OSError as error: print(path, error.strerror)"
    )
    said = dict(line.split(" ", 1) for line in engine.inside(writes, user="0").splitlines())
    assert said.pop("/tmp/x") == "written"
    # Root without capabilities is nobody special: /data belongs to the engine's user.
    assert said.pop("/data/x") == "Permission denied"
    assert set(said.values()) == {"Read-only file system"}
    assert engine.inside("open('/data/x', 'w').close(); print('written')") == "written"


@pytest.mark.parametrize("tuned", [{"engine_memory": "48m"}], indirect=True)
async def test_the_memory_ceiling_kills_the_greedy_one_alone(tuned: DockerHarness) -> None:
    backend = await tuned.backend()
    modest = await make(tuned, backend)
    run = await modest.run()
    greedy_id = uuid4()
    greedy = await backend.create(greedy_id, tuned.free_port(), tuned.env(greedy_id, leak=400), tuned.image)
    assert (await restarted(backend, greedy_id, 1)).endpoint == greedy
    await backend.stop(greedy_id)
    assert await modest.run() == run


@pytest.mark.parametrize("tuned", [{"engine_pids": 24}], indirect=True)
async def test_the_process_limit_stops_a_fork_bomb(tuned: DockerHarness) -> None:
    engine = await make(tuned, await tuned.backend())
    bomb = (
        "import os, time, signal\n"
        "made = []\n"
        "try:\n"
        " while len(made) < 500:\n"
        "  pid = os.fork()\n"
        "  if not pid: time.sleep(60)\n"
        "  made.append(pid)\n"
        "except BlockingIOError: print('stopped', len(made) < 24)\n"
        "for pid in made: os.kill(pid, signal.SIGKILL)"
    )
    assert engine.inside(bomb) == "stopped True"


async def test_engines_cannot_reach_each_other(harness: DockerHarness, backend: DockerBackend) -> None:
    one, other = await make(harness, backend), await make(harness, backend)
    assert one.inside(reach(one.address, 8000)) == "reached"
    assert one.inside(reach(other.address, 8000)) in ("TimeoutError", "timeout")
    assert "gaierror" in one.inside(reach("engine-ffffffffffff", 8000))


async def test_a_published_port_is_on_the_loopback_only(harness: DockerHarness, backend: DockerBackend) -> None:
    engine = await make(harness, backend)
    (network,) = inspect(engine.container)["NetworkSettings"]["Networks"].values()
    assert engine.inside(reach(network["Gateway"], engine.endpoint.port)) == "ConnectionRefusedError"


async def test_other_ceilings_for_a_running_engine(harness: DockerHarness, backend: DockerBackend) -> None:
    engine = await make(harness, backend)
    run = await engine.run()
    await backend.set_ceilings(engine.id, memory="256m", cpus=0.5)
    host = inspect(engine.container)["HostConfig"]
    assert (host["Memory"], host["NanoCpus"]) == (256 << 20, 500_000_000)
    assert await engine.run() == run


@pytest.mark.parametrize("tuned", [{"engine_runtime": "no-such-runtime"}], indirect=True)
async def test_an_unknown_runtime_is_an_error_and_leaves_nothing(tuned: DockerHarness) -> None:
    backend = await tuned.backend()
    engine_id = uuid4()
    with pytest.raises(BackendError, match="no-such-runtime"):
        await backend.create(engine_id, tuned.free_port(), tuned.env(engine_id), tuned.image)
    assert await backend.list() == []


async def test_a_seccomp_profile_from_a_file(tmp_path: Path) -> None:
    require_docker()
    profile = tmp_path / "profile.json"
    profile.write_text(
        json.dumps(
            {
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}],
            }
        )
    )
    harness = DockerHarness(tmp_path, engine_seccomp=str(profile))
    try:
        engine = await make(harness, await harness.backend())
        refused = "import os\ntry: os.mkdir('/tmp/x')\nexcept PermissionError: print('refused')"
        assert engine.inside(refused) == "refused"
        harness.settings = harness.settings.model_copy(update={"engine_seccomp": str(tmp_path / "missing")})
        with pytest.raises(ConfigurationError, match="ORCH_ENGINE_SECCOMP"):
            harness.make(uuid4())
    finally:
        await harness.close()


async def test_the_catalog_is_mounted_read_only(tmp_path: Path) -> None:
    require_docker()
    catalog = tmp_path / "catalog"
    catalog.mkdir(mode=0o755)
    (catalog / "entry.md").write_text("hello")
    # Each directory on the way must let others pass for the engine's user to read it; the mount starts at the catalog.
    harness = DockerHarness(tmp_path, catalog_mount_path=catalog)
    try:
        engine = await make(harness, await harness.backend())
        program = (
            "import os\nprint(os.environ['CATALOG_DIR'], open('/catalog/entry.md').read())\n"
            "try: open('/catalog/x', 'w')\nexcept OSError as error: print(error.strerror)"
        )
        assert engine.inside(program).splitlines() == ["/catalog hello", "Read-only file system"]
    finally:
        await harness.close()


async def test_a_missing_catalog_is_an_error_not_an_empty_one(tmp_path: Path) -> None:
    require_docker()
    missing = tmp_path / "nowhere"
    harness = DockerHarness(tmp_path, catalog_mount_path=missing)
    try:
        backend = await harness.backend()
        engine_id = uuid4()
        with pytest.raises(BackendError, match="nowhere"):
            await backend.create(engine_id, harness.free_port(), harness.env(engine_id), IMAGE)
        assert not missing.exists()
        assert await backend.list() == []
    finally:
        await harness.close()


# --- whose is it --------------------------------------------------------------------------------------------


async def test_a_strangers_container_of_the_same_name_is_never_removed(
    harness: DockerHarness, backend: DockerBackend
) -> None:
    engine_id = uuid4()
    stranger = docker("create", "--name", f"engine-{id12(engine_id)}", IMAGE)
    try:
        with pytest.raises(BackendError, match="does not belong"):
            await backend.create(engine_id, harness.free_port(), harness.env(engine_id, 99), IMAGE)
        await backend.stop(engine_id)
        await backend.destroy(engine_id)
        assert inspect(stranger)["State"]["Status"] == "created"
    finally:
        docker("rm", stranger)


async def test_a_strangers_volume_is_never_used(harness: DockerHarness, backend: DockerBackend) -> None:
    engine_id = uuid4()
    volume = docker("volume", "create", f"engine-data-{id12(engine_id)}")
    try:
        assert not await backend.has_data(engine_id)
        with pytest.raises(BackendError, match="does not belong"):
            await backend.create(engine_id, harness.free_port(), harness.env(engine_id), IMAGE)
        await backend.destroy(engine_id)
        docker("volume", "inspect", volume)
    finally:
        docker("volume", "rm", volume)


async def replaced_by_docker(harness: DockerHarness, backend: DockerBackend, engine: Engine, network: str) -> None:
    """The volume goes, and a replica dies just after the create for which Docker made an empty one."""
    docker("volume", "rm", f"engine-data-{id12(engine.id)}")
    image, env = await backend.resolve_image(harness.image), harness.env(engine.id, 2)
    config = backend._spec.container(engine.id, engine.endpoint.port, env, image, network, has_data=True)
    await backend._containers.create(f"engine-{id12(engine.id)}", config)


def left_of(engine: Engine) -> str:
    containers = docker("ps", "--all", "--quiet", "--filter", f"name=^engine-{id12(engine.id)}$")
    return containers + docker("volume", "ls", "--quiet", "--filter", f"name=^engine-data-{id12(engine.id)}$")


@pytest.mark.parametrize("by_hand", ["volume rm", "volume rm, and another replica dies after its create"])
async def test_data_that_goes_in_the_middle_of_a_create_is_not_made_anew(
    harness: DockerHarness, backend: DockerBackend, monkeypatch: pytest.MonkeyPatch, by_hand: str
) -> None:
    engine = await make(harness, backend)
    docker("rm", "--force", engine.container)
    pick = backend._networks.pick

    async def removed_meanwhile() -> str:
        network = await pick()
        monkeypatch.undo()
        if "replica" in by_hand:
            await replaced_by_docker(harness, backend, engine, network)
        else:
            docker("volume", "rm", f"engine-data-{id12(engine.id)}")
        return network

    monkeypatch.setattr(backend._networks, "pick", removed_meanwhile)
    with pytest.raises(ObjectMissing):
        await backend.keeping_data().create(engine.id, engine.endpoint.port, harness.env(engine.id, 2), harness.image)
    assert left_of(engine) == ""


async def test_what_docker_made_in_place_of_data_goes_with_the_engine(
    harness: DockerHarness, backend: DockerBackend
) -> None:
    engine = await make(harness, backend)
    docker("rm", "--force", engine.container)
    await replaced_by_docker(harness, backend, engine, harness.network)
    assert left_of(engine) != ""
    assert not await backend.has_data(engine.id)
    await backend.destroy(engine.id)
    assert left_of(engine) == ""


async def test_a_claim_never_touches_the_object_that_came_after(harness: DockerHarness, backend: DockerBackend) -> None:
    engine = await make(harness, backend)
    claimed = backend.pinned(engine.container)
    port = engine.endpoint.port
    newer = Engine(harness, engine.id, await backend.create(engine.id, port, harness.env(engine.id, 2), harness.image))
    run = await newer.run()
    await claimed.stop(engine.id)
    assert await claimed.find(engine.id) is None
    assert await newer.run() == run


# --- Docker's own restarts ------------------------------------------------------------------------------------


async def test_docker_restarts_what_crashes_and_leaves_down_what_was_stopped(
    harness: DockerHarness, backend: DockerBackend
) -> None:
    engine = await make(harness, backend)
    await harness.crash(engine.id, engine.endpoint)
    await restarted(backend, engine.id, 1)
    assert await engine.run()
    await backend.stop(engine.id)
    state = inspect(engine.container)["State"]
    assert (state["Status"], state["Restarting"]) == ("exited", False)


async def test_stop_ends_a_crash_loop(harness: DockerHarness, backend: DockerBackend) -> None:
    engine_id = uuid4()
    env = harness.env(engine_id, crash_after=0.01)
    await backend.create(engine_id, harness.free_port(), env, harness.image)
    await restarted(backend, engine_id, 3)
    await backend.stop(engine_id)
    found = await backend.find(engine_id)
    assert found is not None
    assert found.state is ObjectState.EXITED
    state = inspect(found.endpoint.container_id or "")["State"]
    assert (state["Status"], state["Restarting"]) == ("exited", False)


# --- networks -----------------------------------------------------------------------------------------------------


async def test_a_network_is_added_when_one_has_enough(harness: DockerHarness) -> None:
    client = DockerClient(find_docker_host())
    networks = Networks(client, harness.network, isolated=True, endpoints=1)
    backend = DockerBackend(harness.settings, harness.deployment_id, client, networks)
    harness.adopt(backend)
    used = [set(inspect((await make(harness, backend)).container)["NetworkSettings"]["Networks"]) for _ in range(3)]
    assert used == [{harness.network}, {f"{harness.network}-2"}, {f"{harness.network}-3"}]


async def test_a_full_bridge_is_left_for_the_next_one(harness: DockerHarness, backend: DockerBackend) -> None:
    await make(harness, backend)
    option = '{{index .Options "com.docker.network.bridge.name"}}'
    bridge = docker("network", "inspect", "--format", option, harness.network)
    if not ip("link", "show", bridge):
        pytest.skip("the bridges of this Docker Engine are on another host")
    pairs = [(f"ot{harness.network[-4:]}{number}a", f"ot{harness.network[-4:]}{number}b") for number in range(540)]
    script = "".join(
        f"link add {one} type veth peer name {two}\nlink set {one} master {bridge}\nlink set {two} master {bridge}\n"
        for one, two in pairs
    )
    try:
        # Goes on where the bridge takes no more.
        ip("-force", "-batch", "-", script=script)
        engine = await make(harness, backend)
        assert set(inspect(engine.container)["NetworkSettings"]["Networks"]) == {f"{harness.network}-2"}
        assert len(await backend.list()) == 2
    finally:
        script = "".join(f"link del {one}\n" for one, _ in pairs)
        ip("-force", "-batch", "-", script=script)


async def test_a_network_that_does_not_isolate_is_refused(harness: DockerHarness) -> None:
    docker("network", "create", "--label", f"engine-orchestrator.network={harness.network}", harness.network)
    with pytest.raises(ConfigurationError, match="ORCH_ENGINE_NETWORK"):
        await harness.backend()


async def test_a_network_that_was_removed_is_made_again(harness: DockerHarness, backend: DockerBackend) -> None:
    docker("network", "rm", harness.network)
    engine = await make(harness, backend)
    await backend.stop(engine.id)
    assert await backend.list()


# --- logs -----------------------------------------------------------------------------------------------------------


async def test_log_lines_know_their_stream_and_time(harness: DockerHarness, backend: DockerBackend) -> None:
    engine = await make(harness, backend)
    await harness.say(engine.id, engine.endpoint, "grüße " + "x" * 40_000)
    lines: list[LogLine] = []
    # Followed: Docker writes a line down some time after the engine said it.
    async with contextlib.aclosing(backend.logs(engine.id, tail=1000, follow=True)) as log:
        async for line in log:
            lines.append(line)
            if sum(line.line.count("x") for line in lines) >= 40_000:
                break
    assert {line.stream for line in lines} <= {"stdout", "stderr"}
    assert all(line.timestamp is not None and line.timestamp.tzinfo is not None for line in lines)
    assert "grüße" in "".join(line.line for line in lines)
