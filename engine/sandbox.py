"""Commands in a sandbox made by bubblewrap, or not at all.

A command runs in namespaces of its own (users, processes, network, IPC, host name, mounts), without capabilities,
without a network, with an environment of its own. It sees the system's programs read-only, an empty /tmp and the
workspace of its task, which alone it may change. The engine's brain, its key record, its environment and its processes
do not exist there. Time, output, processes and the size of a file are limited.

Where that cannot be had (bubblewrap is missing, user namespaces are refused), `problem` says why and nothing ever runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from asyncio import subprocess
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

MAX_OUTPUT_BYTES = 64 * 1024
MAX_COMMAND_BYTES = 64 * 1024
PROBE_TIMEOUT_S = 30.0

# After output of this size nobody needs more of it: the command is ended.
_FLOOD_BYTES = 16 * 1024 * 1024
# In the shell's own units: blocks of 1024 bytes for a file's size, KiB of address space.
_LIMITS = "ulimit -c 0 -f 262144 -u 256 -v 4194304"
_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/workspace", "LANG": "C.UTF-8", "TMPDIR": "/tmp"}  # noqa: S108 - the sandbox's own
_SYSTEM = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
# Of /etc only what programs need to be found and linked.
_ETC = ("/etc/alternatives", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d")


class Result(NamedTuple):
    output: str
    exit_code: int | None
    """None when the command was ended: `ended` says why."""
    ended: str | None


class Sandbox:
    """`probe` finds out what works here, once; until then, and where nothing does, `problem` is not None."""

    def __init__(self, bubblewrap: str = "bwrap") -> None:
        self._name = bubblewrap
        self._command: list[str] = []
        self._probing: asyncio.Task[None] | None = None
        self.problem: str | None = "not tried yet"

    async def probe(self) -> None:
        """Returns when `problem` is settled. Any number of callers share one attempt."""
        if self._probing is None:
            self._probing = asyncio.create_task(self._probe())
        await asyncio.shield(self._probing)

    async def close(self) -> None:
        if self._probing is not None and not self._probing.done():
            self._probing.cancel()
            await asyncio.wait([self._probing])

    async def _probe(self) -> None:
        program = shutil.which(self._name)
        if program is None:
            self.problem = "bubblewrap (bwrap) is not installed"
            return
        if shutil.which("bash", path=_ENVIRONMENT["PATH"]) is None:
            self.problem = "bash is not installed"
            return
        said = ""
        # Inside a container the kernel refuses a new /proc while parts of the old one are covered. Then there is none:
        # the container's own would show the engine's processes, and the secrets in their environment.
        for proc in (["--proc", "/proc"], []):
            # Nested user namespaces are refused inside where bubblewrap can do that.
            for nested in (["--disable-userns"], []):
                command = [program, *_isolation(), *nested, *proc]
                try:
                    process = await _spawn([*command, "--remount-ro", "/", "--", "/bin/bash", "-c", _LIMITS])
                    async with asyncio.timeout(PROBE_TIMEOUT_S):
                        said = await _everything(process, [])
                        code = await process.wait()
                except TimeoutError:
                    await _end(process)
                    self.problem = "bubblewrap did not answer"
                    return
                except asyncio.CancelledError:
                    self.problem = "not tried to the end"
                    raise
                except OSError as error:
                    self.problem = f"bubblewrap cannot be started: {error.strerror}"
                    return
                if code == 0:
                    self._command, self.problem = command, None
                    return
        self.problem = f"bubblewrap cannot make a sandbox here: {' '.join(said.split())[:300] or 'it gives no reason'}"

    async def run(self, command: str, workspace: Path, timeout_s: float) -> Result:
        """Runs a bash command in a task's workspace. Cancelling ends it. Only after `probe`, where there is no problem.

        When this returns, no process of the command is left.
        """
        if self.problem is not None:
            raise RuntimeError("there is no sandbox")
        process = await _spawn(
            [
                *self._command,
                *("--bind", str(workspace), "/workspace", "--remount-ro", "/", "--chdir", "/workspace", "--"),
                *("/bin/bash", "-c", f'{_LIMITS}; exec /bin/bash -c "$1"', "bash", command),
            ]
        )
        chunks: list[bytes] = []
        ended = None
        try:
            async with asyncio.timeout(timeout_s):
                ended = None if await _drain(process, chunks) else f"its output passed {_FLOOD_BYTES} bytes"
        except TimeoutError:
            ended = f"it ran longer than {timeout_s:g} s"
        finally:
            # The first process of the namespace: with it the kernel ends all others there.
            code = await _end(process)
        raw = b"".join(chunks)
        output = raw[:MAX_OUTPUT_BYTES].decode("utf-8", "replace")
        if len(raw) > MAX_OUTPUT_BYTES:
            output += f"\n[output cut after {MAX_OUTPUT_BYTES} bytes]"
        return Result(output, None if ended else code, ended)


def _isolation() -> list[str]:
    arguments = ["--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    arguments += ["--clearenv"]
    for name, value in _ENVIRONMENT.items():
        arguments += ["--setenv", name, value]
    arguments += ["--ro-bind", "/usr", "/usr"]
    for path in _SYSTEM:
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            arguments += ["--ro-bind", path, path]
    for path in _ETC:
        arguments += ["--ro-bind-try", path, path]
    # Not bubblewrap's own /dev: for the terminals in it, it makes one more user namespace, which a container refuses.
    for name in ("null", "zero", "full", "random", "urandom"):
        arguments += ["--dev-bind-try", f"/dev/{name}", f"/dev/{name}"]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        arguments += ["--symlink", f"/proc/self/fd/{number}", f"/dev/{name}"]
    arguments += ["--symlink", "/proc/self/fd", "/dev/fd"]
    return [*arguments, "--tmpfs", "/dev/shm", "--tmpfs", "/tmp"]  # noqa: S108 - the sandbox's own


async def _spawn(command: list[str]) -> subprocess.Process:
    return await subprocess.create_subprocess_exec(
        *command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={},
        cwd="/",
        start_new_session=True,
    )


async def _everything(process: subprocess.Process, chunks: list[bytes]) -> str:
    await _drain(process, chunks)
    return b"".join(chunks).decode("utf-8", "replace")


async def _drain(process: subprocess.Process, chunks: list[bytes]) -> bool:
    """Reads until the command is done; False when it said far too much. Keeps only what will be shown."""
    assert process.stdout is not None
    kept = read = 0
    while chunk := await process.stdout.read(65536):
        read += len(chunk)
        if kept <= MAX_OUTPUT_BYTES:
            chunks.append(chunk[: MAX_OUTPUT_BYTES + 1 - kept])
            kept += len(chunks[-1])
        if read > _FLOOD_BYTES:
            return False
    await process.wait()
    return True


async def _end(process: subprocess.Process) -> int:
    """Kills what is left and returns the exit code."""
    assert process.stdout is not None
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    # What is in the pipe must be taken out of it: the process counts as ended only then.
    while await process.stdout.read(65536):
        pass
    return await process.wait()
