"""The subprocess backend on real processes: what outlives whom, what is proven before it is killed, what is hidden."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import pty
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import httpx
import pytest
from cryptography.fernet import Fernet

from orchestrator.backends import engine_files, load_backend, processes, subprocess_backend
from orchestrator.backends.base import ObjectState
from orchestrator.backends.engine_files import EngineFiles
from orchestrator.backends.subprocess_backend import SubprocessBackend
from orchestrator.errors import BackendError, BackendUnavailable, ConfigurationError, ObjectMissing
from orchestrator.settings import load_settings
from tests.integration.commands import hears_ctrl_c

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

MIMIC = Path(__file__).resolve().parents[1] / "mimic.py"
COMMAND = f"{shlex.quote(sys.executable)} -I -S {shlex.quote(str(MIMIC))}"
KEY = "key-of-a-mimic"
SECRET = "value-of-a-secret-variable"

needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")

# A small orchestrator: creates its engines, freezes the second one, says so, and goes on until it is ended. Given
# none, it reads ids and delays: for each it makes a child that creates an engine, killed after the delay.
ORCHESTRATOR = """
import asyncio, fcntl, os, signal, sys, termios, time
from uuid import UUID
from orchestrator.backends import load_backend
from orchestrator.settings import load_settings

deployment, key_hash, port, *engines = sys.argv[1:]
backend = load_backend(load_settings(_env_file=None), UUID(deployment))

async def create(engine, port):
    await backend.create(UUID(engine), port, {"ENGINE_KEY_HASH": key_hash, "ENGINE_INCARNATION": "1"}, "mimic:1")

async def run():
    await backend.open()
    for number, engine in enumerate(engines):
        await create(engine, int(port) + number)
        if number == 1:
            await backend.freeze(UUID(engine))

if engines:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    asyncio.run(run())
    print("created", flush=True)
    signal.pause()
for line in sys.stdin:
    engine, delay = line.split()
    child = os.fork()
    if child == 0:
        asyncio.run(create(engine, int(port)))
        signal.pause()
    time.sleep(float(delay))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("killed", flush=True)
"""

HOLDER = """
import fcntl, sys
file = open(sys.argv[1])
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
input()
"""


class World:
    """A data root, and engines in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.deployment_id = uuid4()
        self.key_hash = hashlib.sha256(KEY.encode()).hexdigest()
        self.backend = self.another()

    def variables(self) -> dict[str, str]:
        return {
            "ORCH_DATABASE_URL": "postgresql://localhost/unused",
            "ORCH_MASTER_KEY": Fernet.generate_key().decode(),
            "ORCH_ADMIN_KEY": "an-admin-key-for-tests",
            "ORCH_ENGINE_BACKEND": "subprocess",
            "ORCH_SUBPROCESS_COMMAND": COMMAND,
            "ORCH_DATA_ROOT": str(self.root),
        }

    def another(self, **changes: Any) -> SubprocessBackend:
        values: dict[str, Any] = {
            name.removeprefix("ORCH_").lower(): value for name, value in self.variables().items()
        } | changes
        made = load_backend(load_settings(_env_file=None, **values), self.deployment_id)
        assert isinstance(made, SubprocessBackend)
        return made

    def files(self, engine_id: UUID) -> EngineFiles:
        return EngineFiles(self.root / "engines", engine_id)

    def env(self, incarnation: int = 1, **flags: object) -> dict[str, str]:
        return {
            "ENGINE_KEY_HASH": self.key_hash,
            "ENGINE_INCARNATION": str(incarnation),
            **{f"MIMIC_{name.upper()}": str(value) for name, value in flags.items()},
        }

    async def make(self, incarnation: int = 1, **flags: object) -> tuple[UUID, int]:
        engine_id, port = uuid4(), free_port()
        await self.backend.create(engine_id, port, self.env(incarnation, **flags), "mimic:1")
        await ask(port, "/me")
        return engine_id, port

    async def state(self, engine_id: UUID) -> ObjectState:
        found = await self.backend.find(engine_id)
        assert found is not None
        return found.state

    async def ended(self, engine_id: UUID) -> None:
        while await self.backend.is_running(engine_id):  # noqa: ASYNC110 (an exit is announced to nobody)
            await asyncio.sleep(0.005)

    @contextlib.contextmanager
    def orchestrator(self, port: int, *engines: UUID) -> Iterator[tuple[subprocess.Popen[str], int]]:
        """The small orchestrator on a terminal of its own; gives it, and our side of the terminal."""
        ours, theirs = pty.openpty()
        words = [sys.executable, "-c", ORCHESTRATOR, self.deployment_id, self.key_hash, port, *engines]
        process = subprocess.Popen(
            [str(word) for word in words],
            stdin=theirs if engines else subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | self.variables(),
            text=True,
            start_new_session=True,
            preexec_fn=hears_ctrl_c,
        )
        os.close(theirs)
        try:
            yield process, ours
        finally:
            process.kill()
            process.communicate()
            with contextlib.suppress(OSError):
                os.close(ours)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    await made.backend.open()
    yield made
    for found in await made.backend.list():
        await made.backend.destroy(found.engine_id)
    assert engines_below(tmp_path) == []


def engines_below(root: Path) -> list[int]:
    """Every process that was started as an engine, or by one, with its data below `root`."""
    mark = f"SQLITE_DB_PATH={root}/".encode()
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in environ.read_bytes():
                found.append(int(environ.parent.name))
    return found


def status_of(pid: int) -> list[str]:
    """The fields of a process in the process table, from its state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def arguments_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


async def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return await asyncio.to_thread(process.stdout.readline)


def free_port(count: int = 1) -> int:
    """The first of some ports that neither the system nor the other tests hand out by themselves."""
    while True:
        port = random.randrange(10_000, 19_990)
        with contextlib.suppress(OSError), contextlib.ExitStack() as probes:
            for number in range(count):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port + number))
            return port


@contextlib.contextmanager
def running(*words: object) -> Iterator[subprocess.Popen[str]]:
    """Some other program, in a session of its own."""
    with subprocess.Popen(
        [str(word) for word in words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


async def ask(port: int, path: str, method: str = "GET", body: str = "") -> dict[str, Any]:
    """Ask a mimic, waiting until it is up; the time limit of the test ends the wait."""
    async with httpx.AsyncClient(headers={"X-Engine-Key": KEY, "Connection": "close"}, trust_env=False) as client:
        while True:
            try:
                answer = await client.request(method, f"http://127.0.0.1:{port}{path}", content=body)
            except httpx.ConnectError:
                continue
            assert answer.is_success
            return dict(json.loads(answer.content or b"{}"))


async def crash(port: int) -> None:
    with contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError):
        await ask(port, "/exit", "POST", '{"code": 3}')


# --- engines outlive the orchestrator ---------------------------------------------------------------------


@pytest.mark.parametrize("death", ["kill -9", "hang-up", "ctrl-c", "its process group"])
async def test_engines_outlive_their_orchestrator_and_are_adopted(world: World, death: str) -> None:
    engines, port = (uuid4(), uuid4()), free_port(2)
    with world.orchestrator(port, *engines) as (orchestrator, terminal):
        assert await line_of(orchestrator) == "created\n"
        if death == "kill -9":
            orchestrator.kill()
        elif death == "hang-up":
            os.close(terminal)
        elif death == "ctrl-c":
            os.write(terminal, b"\x03")
        else:
            os.killpg(orchestrator.pid, signal.SIGTERM)
        assert await asyncio.to_thread(orchestrator.wait) != 0

    states = {found.engine_id: found.state for found in await world.backend.list()}
    assert states == {engines[0]: ObjectState.RUNNING, engines[1]: ObjectState.FROZEN}
    await world.backend.thaw(engines[1])
    for number, engine_id in enumerate(engines):
        assert await world.state(engine_id) is ObjectState.RUNNING
        run = (await ask(port + number, "/me"))["run"]
        await world.backend.create(engine_id, port + number, world.env(), "mimic:1")
        assert (await ask(port + number, "/me"))["run"] == run
        await world.backend.stop(engine_id)
        assert not await world.backend.is_running(engine_id)


@needs_proc
async def test_an_orchestrator_killed_at_any_moment_of_create_leaves_one_engine_or_none(world: World) -> None:
    with world.orchestrator(port := free_port()) as (orchestrator, _):
        assert orchestrator.stdin is not None
        for step in range(24):
            engine_id = uuid4()
            orchestrator.stdin.write(f"{engine_id} {step * 0.001}\n")
            orchestrator.stdin.flush()
            assert await line_of(orchestrator) == "killed\n"
            await world.backend.create(engine_id, port, world.env(), "mimic:1")
            me = await ask(port, "/me")
            assert engines_below(world.files(engine_id).data) == [me["pid"]]
            await world.backend.destroy(engine_id)
            assert engines_below(world.root) == []
            assert os.listdir(world.root / "engines") == []


@needs_proc
async def test_a_zombie_of_another_orchestrator_has_exited(world: World) -> None:
    engine_id, port = uuid4(), free_port()
    with world.orchestrator(port, engine_id) as (orchestrator, _):
        assert await line_of(orchestrator) == "created\n"
        pid = (await ask(port, "/me"))["pid"]
        await crash(port)
        await world.ended(engine_id)
        assert status_of(pid)[0] == "Z"
        await world.backend.start(engine_id)
        assert (await ask(port, "/me"))["pid"] != pid
        await world.backend.stop(engine_id)


# --- what is left of a crash --------------------------------------------------------------------------------


async def test_a_record_that_was_never_finished_is_no_engine(world: World) -> None:
    engine_id, port = await world.make()
    record = world.files(engine_id).record
    whole = record.read_text()
    for end in range(len(whole) - 1):
        record.write_text(whole[:end])
        assert await world.state(engine_id) is ObjectState.EXITED
    record.write_text(whole)
    assert await world.state(engine_id) is ObjectState.RUNNING
    await world.backend.stop(engine_id)
    for part in ("", whole[: len(whole) // 2], whole.removesuffix("end\n")):
        record.write_text(part)
        assert await world.state(engine_id) is ObjectState.EXITED
        await world.backend.stop(engine_id)
        await world.backend.start(engine_id)
        assert await ask(port, "/me")
        await world.backend.stop(engine_id)


@needs_proc
async def test_a_process_that_merely_has_the_number_is_never_touched(world: World) -> None:
    engine_id, _ = await world.make()
    await world.backend.stop(engine_id)
    files = world.files(engine_id)
    with running("sleep", 1000) as innocent:
        start, boot = status_of(innocent.pid)[19], processes.boot_id()
        earlier = str(int(start) - 1)
        for record in ((earlier, boot), (start, "another-boot")):
            files.record.write_text("pid {}\nstart {}\nboot {}\nend\n".format(innocent.pid, *record))
            assert await world.state(engine_id) is ObjectState.EXITED
            with pytest.raises(ObjectMissing):
                await world.backend.freeze(engine_id)
            await world.backend.stop(engine_id, timeout=0)
            await world.backend.start(engine_id)
            await world.backend.stop(engine_id)
            assert innocent.poll() is None
        files.record.write_text(f"pid {innocent.pid}\nstart {earlier}\nboot {boot}\nend\n")
        await world.backend.destroy(engine_id)
        assert innocent.poll() is None


@needs_proc
async def test_another_group_of_the_same_number_is_left_alone(world: World) -> None:
    engine_id, _ = await world.make()
    await world.backend.stop(engine_id)
    files = world.files(engine_id)
    with running("sh", "-c", "sleep 1000 >/dev/null & echo $!") as leader:
        innocent = int(await line_of(leader))
        start = status_of(leader.pid)[19]
        await asyncio.to_thread(leader.wait)
        try:
            assert status_of(innocent)[2] == str(leader.pid)  # its group
            for call in (world.backend.stop, world.backend.start, world.backend.destroy):
                record = f"pid {leader.pid}\nstart {start}\nboot {processes.boot_id()}\nend\n"
                files.record.write_text(record)
                await call(engine_id)
                assert status_of(innocent)[0] in "RSD"  # neither stopped nor gone
                if call == world.backend.start:
                    await world.backend.stop(engine_id)
        finally:
            os.kill(innocent, signal.SIGKILL)


@needs_proc
async def test_children_of_an_engine_are_stopped_and_frozen_with_it(world: World) -> None:
    engine_id, port = await world.make(children=2)
    me = await ask(port, "/me")
    for _ in range(20):  # a stop reaches them one after the other
        await world.backend.freeze(engine_id)
        assert {status_of(pid)[0] for pid in (me["pid"], *me["children"])} == {"T"}
        await world.backend.thaw(engine_id)
    await world.backend.stop(engine_id)
    assert engines_below(world.root) == []


@needs_proc
async def test_an_engine_does_not_stand_still_while_a_child_of_it_runs(world: World) -> None:
    engine_id, port = await world.make(children=2)
    me = await ask(port, "/me")
    identity = world.files(engine_id).read_record()
    assert identity is not None
    for pid in (me["pid"], *me["children"]):
        assert not processes.stands_still(identity)
        os.kill(pid, signal.SIGSTOP)
        while status_of(pid)[0] != "T":  # noqa: ASYNC110 (a stop is announced to its parent only)
            await asyncio.sleep(0)
    assert processes.stands_still(identity)
    await world.backend.stop(engine_id)


@needs_proc
@pytest.mark.parametrize("call", ["start", "create", "stop", "destroy"])
@pytest.mark.parametrize("let_go", [0, 1])
async def test_children_that_a_crash_left_are_ended(world: World, call: str, let_go: int) -> None:
    # They ignore SIGTERM, and keep the lock and the port unless they let go.
    engine_id, port = await world.make(children=2, children_let_go=let_go)
    children = (await ask(port, "/me"))["children"]
    await crash(port)
    await world.ended(engine_id)
    if call == "create":
        await world.backend.create(engine_id, port, world.env(2), "mimic:1")
        assert (await ask(port, "/me"))["children"] == []
    else:
        await getattr(world.backend, call)(engine_id)
    assert not set(children) & set(engines_below(world.root))


@needs_proc
@pytest.mark.parametrize("call", ["start", "stop", "destroy"])
async def test_an_engine_whose_record_was_lost_is_ended(
    world: World, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess_backend, "_LOCK_PATIENCE_S", 0.05)
    engine_id, port = await world.make()
    pid = (await ask(port, "/me"))["pid"]
    world.files(engine_id).record.unlink()
    await getattr(world.backend, call)(engine_id)
    assert pid not in engines_below(world.root)
    if call == "start":
        assert (await ask(port, "/me"))["pid"] != pid


@needs_proc
async def test_a_stranger_who_holds_the_lock_is_named_and_left_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess_backend, "_LOCK_PATIENCE_S", 0.05)
    engine_id, port = await world.make()
    await world.backend.stop(engine_id)
    files = world.files(engine_id)
    with running(sys.executable, "-c", HOLDER, files.lock) as stranger:
        assert await line_of(stranger) == "held\n"
        for call in (world.backend.start, world.backend.destroy, world.backend.stop):
            with pytest.raises(BackendError, match=f"process {stranger.pid}"):
                await call(engine_id)
        assert stranger.poll() is None
        assert files.has_data()
    await world.backend.start(engine_id)
    assert await ask(port, "/me")


async def test_the_engine_itself_holds_the_lock(world: World) -> None:
    engine_id, _ = await world.make()
    files = world.files(engine_id)
    assert files.is_locked()
    await world.backend.freeze(engine_id)
    assert files.is_locked()
    await world.backend.stop(engine_id)
    assert not files.is_locked()


async def test_a_late_stop_spares_the_engine_that_was_started_meanwhile(world: World) -> None:
    engine_id, port = await world.make(ignore_sigterm=True)
    late = asyncio.create_task(world.backend.stop(engine_id, timeout=30))
    await asyncio.sleep(0)  # it has sent its SIGTERM and waits
    other = world.another()
    await other.stop(engine_id, timeout=0)
    await other.start(engine_id)
    await late
    assert await ask(port, "/me")
    await other.stop(engine_id, timeout=0)


async def test_a_removal_that_was_cut_short_is_finished(world: World) -> None:
    engine_id, _ = await world.make()
    files = world.files(engine_id)
    await world.backend.stop(engine_id)
    remains = files.data.with_suffix(".removing")
    files.data.rename(remains)
    assert not await world.backend.has_data(engine_id)
    with pytest.raises(ObjectMissing):
        await world.backend.start(engine_id)
    await world.backend.destroy(engine_id)
    assert os.listdir(world.root / "engines") == []


async def test_lost_data_is_missing_not_empty(world: World) -> None:
    engine_id, _ = await world.make()
    await world.backend.stop(engine_id)
    world.files(engine_id).data.rename(world.root / "elsewhere")
    assert not await world.backend.has_data(engine_id)
    with pytest.raises(ObjectMissing):
        await world.backend.start(engine_id)
    assert not await world.backend.has_data(engine_id)


async def test_a_damaged_spec_is_an_error_of_its_own_engine_only(world: World) -> None:
    damaged, _ = await world.make()
    sound, _ = await world.make()
    spec = world.files(damaged).spec
    content = spec.read_text()
    spec.write_text(content[:20])
    assert [found.engine_id for found in await world.backend.list()] == [sound]
    for call in (world.backend.start, world.backend.stop, world.backend.destroy):
        with pytest.raises(BackendError, match="damaged"):
            await call(damaged)
    spec.write_text(content)
    assert await world.backend.is_running(damaged)


# --- what an engine is given --------------------------------------------------------------------------------


async def test_the_environment_of_an_engine(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ORCH_MASTER_KEY", SECRET)
    monkeypatch.setenv("PASSWORD_OF_THE_ORCHESTRATOR", SECRET)
    backend = world.another(catalog_mount_path=tmp_path)
    engine_id, port = uuid4(), free_port()
    await backend.create(engine_id, port, {**world.env(), "LLM_KEY": "given", "ORCH_ADMIN_KEY": SECRET}, "mimic:9")
    environment = await ask(port, "/env")
    data = world.files(engine_id).data
    assert SECRET not in str(environment)
    assert not [name for name in environment if name.startswith("ORCH_")]
    expected = {
        "SQLITE_DB_PATH": str(data / "brain.sqlite"),
        "HOME": str(data),
        "CATALOG_DIR": str(tmp_path),
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "ENGINE_IMAGE": "mimic:9",
        "LLM_KEY": "given",
    }
    assert expected.items() <= environment.items()
    await backend.stop(engine_id)
    await backend.start(engine_id)
    again = await ask(port, "/env")
    assert expected.items() <= again.items()


@needs_proc
async def test_secrets_are_not_in_arguments_and_files_are_private(world: World) -> None:
    engine_id, port = uuid4(), free_port()
    await world.backend.create(engine_id, port, {**world.env(), "LLM_KEY": SECRET}, "mimic:1")
    pid = (await ask(port, "/me"))["pid"]
    assert SECRET not in arguments_of(pid)
    await ask(port, "/write", "POST", "something")
    files = world.files(engine_id)
    for path in (files.spec, files.record, files.log, files.lock, files.data / "note.txt", world.root / "location_id"):
        assert path.stat().st_mode & 0o777 == 0o600
    for path in (files.data, world.root / "engines"):
        assert path.stat().st_mode & 0o777 == 0o700
    assert SECRET not in files.log.read_text()
    assert SECRET not in repr(files.read_spec())


@pytest.mark.parametrize("value", ["with\0nul", "x" * 3_000_000])
async def test_a_value_that_cannot_be_passed_on_is_an_error_without_it(world: World, value: str) -> None:
    engine_id = uuid4()
    with pytest.raises(BackendError) as raised:
        await world.backend.create(engine_id, free_port(), {**world.env(), "LLM_KEY": SECRET + value}, "mimic:1")
    assert SECRET not in str(raised.value)
    assert not await world.backend.is_running(engine_id)


async def test_the_image_stands_in_the_command(world: World) -> None:
    backend = world.another(subprocess_command=f"{COMMAND} --say='runs {{image}}' --health-delay=0")
    engine_id, port = uuid4(), free_port()
    await backend.create(engine_id, port, world.env(), "engine; echo 'no shell'")
    await ask(port, "/me")
    assert "runs engine; echo 'no shell'" in [line.line async for line in backend.logs(engine_id, tail=10)]


async def test_a_missing_command_is_named(world: World) -> None:
    with pytest.raises(ConfigurationError, match=r"ORCH_SUBPROCESS_COMMAND.*no-such-program"):
        await world.another(subprocess_command="no-such-program --flag").open()
    backend = world.another(subprocess_command="/no/such/{image}")
    await backend.open()
    with pytest.raises(BackendError, match=r"ORCH_SUBPROCESS_COMMAND.*/no/such/mimic:1"):
        await backend.create(uuid4(), free_port(), world.env(), "mimic:1")


async def test_a_program_that_ends_at_once_has_exited_and_said_why(world: World) -> None:
    backend = world.another(subprocess_command="/bin/sh -c 'echo cannot go on >&2; exit 4'")
    engine_id = uuid4()
    await backend.create(engine_id, free_port(), world.env(), "mimic:1")
    await world.ended(engine_id)
    found = await backend.find(engine_id)
    assert found is not None
    assert found.exit_code == 4
    assert [line.line async for line in backend.logs(engine_id, tail=10)] == ["cannot go on"]


async def test_a_launcher_that_fails_leaves_nothing(world: World) -> None:
    engine_id, port = await world.make()
    await world.backend.stop(engine_id)
    record = world.files(engine_id).record
    record.unlink()
    record.symlink_to(world.root / "no-such-folder" / "record")
    with pytest.raises(BackendError, match="launcher"):
        await world.backend.start(engine_id)
    record.unlink()
    assert not world.files(engine_id).is_locked()
    assert await world.state(engine_id) is ObjectState.EXITED
    await world.backend.start(engine_id)
    assert await ask(port, "/me")


# --- the place ------------------------------------------------------------------------------------------------


async def test_one_location_however_many_ask_first(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (world.root / "location_id").unlink()

    def slow_uuid4() -> UUID:
        time.sleep(0.05)  # time enough for the others to find no location either
        return uuid4()

    monkeypatch.setattr(subprocess_backend, "uuid4", slow_uuid4)
    found = await asyncio.gather(*(world.another().location_id() for _ in range(4)))
    assert len(set(found)) == 1
    assert (world.root / "location_id").read_text() == f"{found[0]}\n"


async def test_a_location_that_was_half_written_is_made_anew_and_a_damaged_one_is_not(world: World) -> None:
    path = world.root / "location_id"
    path.write_text("0123-half")
    found = await world.another().location_id()
    assert await world.another().location_id() == found
    path.write_text("x" * 36)
    with pytest.raises(BackendError, match="damaged"):
        await world.another().location_id()


async def test_a_data_root_that_cannot_be_used(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="ORCH_DATA_ROOT"):
        await world.another(data_root=tmp_path / "file").open()
    (tmp_path / "engines").rename(tmp_path / "away")
    with pytest.raises(BackendUnavailable, match="ORCH_DATA_ROOT"):
        await world.backend.check()
    (tmp_path / "away").rename(tmp_path / "engines")
    await world.backend.check()


async def test_other_files_beside_the_engines_are_no_engines(world: World) -> None:
    engine_id, _ = await world.make()
    for name in ("notes.json", "x", f"{uuid4()}.json.new", f"{uuid4()}.log"):
        (world.root / "engines" / name).write_text("{}")
    assert [found.engine_id for found in await world.backend.list()] == [engine_id]


async def test_a_held_port_is_not_free_and_a_closed_connection_does_not_hold_it(world: World) -> None:
    engine_id, port = await world.make()
    assert not await world.backend.is_port_free(port)
    with socket.create_connection(("127.0.0.1", port)):  # our side stays open: the engine's side closes first
        await world.backend.stop(engine_id, timeout=0)
    assert await world.backend.is_port_free(port)
    await world.backend.start(engine_id)
    assert await ask(port, "/me")


async def test_a_long_log_is_put_aside_at_the_next_start(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_files, "_LOG_ROTATED_AT", 10)
    engine_id, port = await world.make(say="a line of the first run")
    await world.backend.stop(engine_id)
    await world.backend.start(engine_id)
    await ask(port, "/me")
    files = world.files(engine_id)
    assert "mimic ends" in files.old_log.read_text()
    assert "mimic ends" not in files.log.read_text()
    await world.backend.destroy(engine_id)
    assert os.listdir(world.root / "engines") == []


async def test_an_error_of_the_system_is_ours_and_says_whether_to_try_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine_id, _ = await world.make()
    await world.backend.stop(engine_id)

    def fail(number: int) -> None:
        def replacement(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(subprocess_backend, "launch", replacement)

    fail(24)  # too many open files
    with pytest.raises(BackendUnavailable):
        await world.backend.start(engine_id)
    fail(1)  # not permitted
    with pytest.raises(BackendError) as raised:
        await world.backend.start(engine_id)
    assert not isinstance(raised.value, BackendUnavailable)


# --- without the conveniences of Linux --------------------------------------------------------------------------


async def test_without_a_process_table_and_process_descriptors(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(processes, "PROC", tmp_path / "no-proc")
    monkeypatch.setattr(processes, "_pidfd", lambda pid: None)
    processes.boot_id.cache_clear()
    try:
        engine_id, port = await world.make(children=1)
        run = (await ask(port, "/me"))["run"]
        await world.another().create(engine_id, port, world.env(), "mimic:1")
        assert (await ask(port, "/me"))["run"] == run
        await world.backend.freeze(engine_id)
        assert await world.state(engine_id) is ObjectState.FROZEN
        await world.backend.thaw(engine_id)
        assert await world.state(engine_id) is ObjectState.RUNNING
        await world.backend.stop(engine_id, timeout=0)
        assert await world.state(engine_id) is ObjectState.EXITED
        await world.backend.start(engine_id)
        await ask(port, "/me")
        await world.backend.destroy(engine_id)
    finally:
        processes.boot_id.cache_clear()


async def test_the_lock_of_removed_data_is_worth_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    files = world.files(uuid4())
    flock = fcntl.flock

    def flock_too_late(descriptor: int, operation: int) -> None:
        monkeypatch.undo()
        files.remove()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_too_late)
    with files.locked(make=True) as lock:
        assert lock is not None
        assert files.is_locked()  # everybody else meets the same lock
    files.remove()
