"""The tool `bash` in a real container: off under Docker's own profile, sandboxed under the one in deploy/."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import pytest

from tests.docker.daemon import docker, image_build, missing, require_docker
from tests.docker.harness import DockerHarness

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "september-engine:dev"
PROFILE = ROOT / "deploy" / "seccomp-sandbox.json"
KEY = "sk-sept-of-the-sandbox-tests"
SECRET = "sk-live-secret-in-the-environment-of-the-engine"
GIVE_UP_S = 100.0


def provide_image() -> None:
    require_docker()
    with image_build():
        if subprocess.run([ROOT / "deploy" / "images.sh", "--check", "engine"], capture_output=True).returncode == 0:
            return
        built = subprocess.run(
            [ROOT / "deploy" / "images.sh", "engine"], capture_output=True, text=True, timeout=500, env=os.environ
        )
    if built.returncode:
        missing(f"the engine's image cannot be built ({built.stderr[-500:]})")


class Engine:
    def __init__(self, url: str, container: str) -> None:
        self.container = container
        self.client = httpx.AsyncClient(base_url=url, headers={"X-Engine-Key": KEY}, timeout=GIVE_UP_S, trust_env=False)

    async def bash_state(self) -> dict[str, Any]:
        """What /health says of the tool, once it has been tried."""
        async with asyncio.timeout(GIVE_UP_S):
            while True:
                try:
                    tools = (await self.client.get("/health")).json()["subsystems"]["tools"]
                except (httpx.HTTPError, KeyError):  # not up yet
                    await asyncio.sleep(0.05)
                    continue
                state: dict[str, Any] = tools["bash"]
                if state.get("detail") != "not tried yet":
                    return state
                await asyncio.sleep(0.05)

    async def bash(self, command: str) -> dict[str, Any]:
        """The result of a command, permission given when it is asked for."""
        body = {"message": f"/tool bash {json.dumps({'command': command})}", "task_id": "task"}
        text, answered = "", False
        async with self.client.stream("POST", "/execute", json=body) as response:
            async for chunk in response.aiter_text():
                text += chunk
                if "event: hitl_request" in text and not answered:
                    answered = True
                    await self.client.post("/hitl/respond", json={"task_id": "task", "answer": "approve"})
        (line,) = [block.split("\n")[1] for block in text.split("\n\n") if block.startswith("event: tool_result")]
        result: dict[str, Any] = json.loads(line.removeprefix("data: "))
        return result


@pytest.fixture
async def run(tmp_path: Path) -> AsyncIterator[Callable[[str], Awaitable[Engine]]]:
    """An engine in a container hardened as in production, with a seccomp profile as ORCH_ENGINE_SECCOMP names it."""
    provide_image()
    harnesses: list[DockerHarness] = []
    engines: list[Engine] = []

    async def make(profile: str) -> Engine:
        harness = DockerHarness(tmp_path, engine_seccomp=profile)
        harnesses.append(harness)
        backend = await harness.backend()
        port = harness.free_port()
        env = {
            "ENGINE_KEY_HASH": hashlib.sha256(KEY.encode()).hexdigest(),
            "ENGINE_KEY_GENERATION": "1",
            "LLM_API_KEY": SECRET,
        }
        endpoint = await backend.create(uuid4(), port, env, IMAGE)
        engines.append(Engine(f"http://{endpoint.host}:{endpoint.port}", endpoint.container_id or ""))
        return engines[-1]

    yield make
    for engine in engines:
        await engine.client.aclose()
    for harness in harnesses:
        await harness.close()


async def test_under_dockers_own_profile_the_tool_is_off_and_nothing_runs(
    run: Callable[[str], Awaitable[Engine]],
) -> None:
    engine = await run("default")
    state = await engine.bash_state()
    assert state["status"] == "off"
    assert "bubblewrap cannot make a sandbox here" in state["detail"]
    result = await engine.bash("touch /data/ran-unsandboxed")
    assert state["detail"] in result["error"]
    assert "ran-unsandboxed" not in docker("exec", engine.container, "ls", "-a", "/data")


async def test_under_the_shipped_profile_it_runs_in_its_sandbox(run: Callable[[str], Awaitable[Engine]]) -> None:
    engine = await run(str(PROFILE))
    assert await engine.bash_state() == {"status": "ok"}
    result = await engine.bash("echo hello | tr a-z A-Z > f; cat f; pwd; id -u")
    assert (result["output"], result.get("error")) == ("HELLO\n/workspace\n10001\n", None)
    looks = await engine.bash(
        "cat /data/brain.sqlite /data/.engine-key.json; cat /proc/*/environ; ls /data /proc/1;"
        " touch /x /usr/x; exec 3<>/dev/tcp/127.0.0.1/8000 && echo reached"
    )
    for secret in (SECRET, "SQLite format", "brain.sqlite\n", "reached"):
        assert secret not in looks["output"].replace("brain.sqlite: No such", "")
    assert looks["output"].count("Read-only file system") == 2


async def test_the_shipped_profile_still_refuses_what_a_container_must_not_do(
    run: Callable[[str], Awaitable[Engine]],
) -> None:
    engine = await run(str(PROFILE))
    await engine.bash_state()
    # x86-64 and arm64 do not share numbers, so the C library's own functions are called.
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def refused(name, *arguments):
    ctypes.set_errno(0)
    result = getattr(libc, name)(*arguments)
    print(name, result, os.strerror(ctypes.get_errno()))
refused('unshare', 0x10000000)
refused('setns', 0, 0)
refused('ptrace', 0, 0, 0, 0)
refused('mount', b'none', b'/tmp', b'tmpfs', 0, None)
refused('umount2', b'/proc', 2)
refused('swapoff', b'/x')
refused('sethostname', b'x', 1)
refused('process_vm_readv', 1, None, 0, None, 0, 0)
"""
    said = docker("exec", engine.container, "python3", "-c", program).splitlines()
    assert len(said) == 8
    assert [line.split(" ", 2)[1:] for line in said] == [["-1", "Operation not permitted"]] * 8


def test_the_profile_opens_only_what_the_notes_say() -> None:
    """Every rule that is not the plain list is written down in docs/security-sandbox.md."""
    profile = json.loads(PROFILE.read_text())
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    plain, *special = profile["syscalls"]
    assert "args" not in plain
    for name in ("ptrace", "bpf", "setns", "unshare", "keyctl", "mount", "clone3", "io_uring_setup", "kexec_load"):
        assert name not in plain["names"]
    notes = (ROOT / "docs" / "security-sandbox.md").read_text()
    for rule in special:
        for name in rule["names"]:
            assert f"`{name}`" in notes, name
