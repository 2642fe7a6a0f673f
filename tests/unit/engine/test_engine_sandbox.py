"""The sandbox with the real bubblewrap; what happens where there is none; the files of a workspace."""

from __future__ import annotations

import asyncio
import os
import stat
from typing import TYPE_CHECKING

import pytest

from engine import sandbox as sandbox_module
from engine.sandbox import Result, Sandbox
from engine.workspace import MAX_FILE_BYTES, Workspace, WorkspaceError

if TYPE_CHECKING:
    from pathlib import Path

LONG = 100.0


class Box:
    def __init__(self, sandbox: Sandbox, workspace: Path) -> None:
        self.sandbox = sandbox
        self.workspace = workspace

    async def run(self, command: str, timeout_s: float = LONG) -> Result:
        return await self.sandbox.run(command, self.workspace, timeout_s)


@pytest.fixture
async def box(tmp_path: Path) -> Box:
    sandbox = Sandbox()
    await sandbox.probe()
    if sandbox.problem is not None:
        pytest.skip(f"no sandbox on this machine: {sandbox.problem}")
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    return Box(sandbox, workspace)


async def test_runs_in_the_workspace(box: Box) -> None:
    result = await box.run("pwd; echo err >&2; echo hello > file; exit 3")
    assert result == Result("/workspace\nerr\n", 3, None)
    assert (box.workspace / "file").read_text() == "hello\n"


async def test_writes_nowhere_else(box: Box) -> None:
    for path in ("/x", "/usr/x", "/etc/x", "/dev/x/y"):
        assert (await box.run(f"touch {path}")).exit_code == 1, path


async def test_sees_nothing_of_the_engine(box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "sk-sept-secret-of-this-process"
    monkeypatch.setenv("ENGINE_API_KEY", secret)
    (tmp_path / "brain.sqlite").write_text(secret)
    program = f"""
        cat {tmp_path}/brain.sqlite ../brain.sqlite /etc/passwd
        env; cat /proc/*/environ | tr '\\0' '\\n'
        ls {tmp_path} /data /home /root /proc/{os.getpid()}/fd
        grep -rs {secret[:9]}-secret /workspace /tmp /etc /dev/shm
        kill -9 {os.getpid()}
        true"""
    result = await box.run(program)
    assert result.exit_code == 0
    assert secret not in result.output


async def test_has_no_network(box: Box) -> None:
    server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    result = await box.run(f"exec 3<>/dev/tcp/127.0.0.1/{port} && echo reached")
    assert "reached" not in result.output
    assert result.exit_code == 1
    server.close()
    await server.wait_closed()


async def test_one_task_does_not_see_the_other(box: Box, tmp_path: Path) -> None:
    await box.run("echo mine > file; echo mine > /tmp/file")
    (tmp_path / "other").mkdir()
    other = Box(box.sandbox, tmp_path / "other")
    assert (await other.run("cat /workspace/file /tmp/file")).exit_code == 1


async def test_a_command_that_takes_too_long_is_ended_with_all_it_started(box: Box) -> None:
    result = await box.run("(sleep 5000; echo late > /workspace/late) & sleep 5000", 1.0)
    assert (result.output, result.exit_code) == ("", None)
    assert result.ended is not None
    assert "longer than 1 s" in result.ended


async def test_what_it_leaves_behind_ends_with_it(box: Box) -> None:
    assert await box.run("sleep 5000 & echo done") == Result("done\n", 0, None)


async def test_long_output_is_cut_and_endless_output_ended(box: Box) -> None:
    long = await box.run("head -c 200000 /dev/zero | tr '\\0' x")
    assert long.exit_code == 0
    assert long.output.endswith(f"[output cut after {sandbox_module.MAX_OUTPUT_BYTES} bytes]")
    assert len(long.output) < sandbox_module.MAX_OUTPUT_BYTES + 100
    endless = await box.run("yes")
    assert endless.ended is not None
    assert "output" in endless.ended


async def test_a_huge_file_is_refused(box: Box) -> None:
    assert (await box.run("head -c 300000000 /dev/zero > big")).exit_code != 0
    assert (box.workspace / "big").stat().st_size <= 256 * 1024 * 1024


async def test_cancelling_ends_the_command(box: Box) -> None:
    running = asyncio.create_task(box.run("echo > begun; sleep 5000; echo > late"))
    while not (box.workspace / "begun").exists():  # noqa: ASYNC110 - made by another process, which knows no event
        await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


class TestWithout:
    async def test_bubblewrap_is_missing(self, tmp_path: Path) -> None:
        sandbox = Sandbox("no-such-program")
        await sandbox.probe()
        assert sandbox.problem == "bubblewrap (bwrap) is not installed"
        with pytest.raises(RuntimeError):
            await sandbox.run("echo unsandboxed > file", tmp_path, LONG)
        assert list(tmp_path.iterdir()) == []

    async def test_bubblewrap_is_refused(self, tmp_path: Path) -> None:
        fake = tmp_path / "bwrap"
        fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n")
        fake.chmod(0o755)
        sandbox = Sandbox(str(fake))
        await asyncio.gather(sandbox.probe(), sandbox.probe())
        assert sandbox.problem is not None
        assert "No permissions to create a new namespace" in sandbox.problem

    async def test_bubblewrap_does_not_answer(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = tmp_path / "bwrap"
        fake.write_text("#!/bin/sh\nexec sleep 5000\n")
        fake.chmod(0o755)
        monkeypatch.setattr(sandbox_module, "PROBE_TIMEOUT_S", 0.1)
        sandbox = Sandbox(str(fake))
        await sandbox.probe()
        assert sandbox.problem == "bubblewrap did not answer"


class TestWorkspace:
    @pytest.fixture
    def workspace(self, tmp_path: Path) -> Workspace:
        (tmp_path / "secret").write_text("brain")
        workspace = Workspace(tmp_path, "task")
        workspace.make()
        return workspace

    def test_writes_and_reads(self, workspace: Workspace) -> None:
        assert workspace.write("a/b/ü.txt", "hello") == 5
        assert workspace.read("./a/b/ü.txt") == workspace.read("/workspace/a/b/ü.txt") == "hello"
        workspace.write("a/b/ü.txt", "x")
        assert workspace.read("a/b/ü.txt") == "x"
        assert stat.S_IMODE(workspace.path.stat().st_mode) == 0o700

    def test_each_task_has_its_own(self, tmp_path: Path) -> None:
        assert Workspace(tmp_path, "../a").path.parent == Workspace(tmp_path, "b").path.parent
        assert Workspace(tmp_path, "a").path != Workspace(tmp_path, "b").path

    @pytest.mark.parametrize(
        "path", ["", "/", ".", "..", "../secret", "a/../../secret", "/etc/passwd", "a\0b", "x/" * 50 + "y", "n" * 300]
    )
    def test_a_path_that_leads_out_is_refused(self, workspace: Workspace, path: str) -> None:
        with pytest.raises(WorkspaceError):
            workspace.read(path)
        with pytest.raises(WorkspaceError):
            workspace.write(path, "x")

    def test_links_are_not_followed(self, workspace: Workspace, tmp_path: Path) -> None:
        (workspace.path / "file").symlink_to(tmp_path / "secret")
        (workspace.path / "dir").symlink_to(tmp_path)
        for path in ("file", "dir/secret"):
            with pytest.raises(WorkspaceError):
                workspace.read(path)
            with pytest.raises(WorkspaceError):
                workspace.write(path, "x")
        assert (tmp_path / "secret").read_text() == "brain"

    def test_only_regular_files(self, workspace: Workspace) -> None:
        os.mkfifo(workspace.path / "pipe")
        (workspace.path / "dir").mkdir()
        for path in ("pipe", "dir"):
            with pytest.raises(WorkspaceError):
                workspace.read(path)
            with pytest.raises(WorkspaceError):
                workspace.write(path, "x")

    def test_sizes(self, workspace: Workspace) -> None:
        with pytest.raises(WorkspaceError, match="larger"):
            workspace.write("big", "x" * (MAX_FILE_BYTES + 1))
        (workspace.path / "big").write_bytes(b"\xff" + b"x" * MAX_FILE_BYTES)
        assert workspace.read("big").endswith(f"[cut after {MAX_FILE_BYTES} bytes]")
