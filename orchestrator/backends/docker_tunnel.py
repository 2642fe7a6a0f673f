"""`DOCKER_HOST=ssh://…`: a local socket that the `ssh` client forwards to the daemon's socket on the other host.

The client reads its own configuration: keys, known hosts, jumps. It ends when this process ends, however that happens,
since the command that it runs over there reads our end of a pipe.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import BackendUnavailable, ConfigurationError

if TYPE_CHECKING:
    from orchestrator.backends.docker_host import SshTarget

__all__ = ["SshTunnel"]

_READY = b"tunnel-ready"
_CONNECT_S = 4.0


class SshTunnel:
    """`socket` may be used after each `ensure()`."""

    def __init__(self, target: SshTarget) -> None:
        self._target = target
        self._process: asyncio.subprocess.Process | None = None
        self._directory: Path | None = None
        self._opening: asyncio.Task[None] | None = None

    @property
    def socket(self) -> str:
        assert self._directory is not None
        return str(self._directory / "docker.sock")

    async def ensure(self) -> None:
        """Open the tunnel, or open it again when the client has ended. Raises `BackendUnavailable`."""
        if self._opening is None:
            if self._process is not None and self._process.returncode is None:
                return
            self._opening = asyncio.create_task(self._start())
            self._opening.add_done_callback(self._opened)
        # All who call meanwhile share the attempt and its failure: nobody waits twice.
        await asyncio.shield(self._opening)

    def _opened(self, task: asyncio.Task[None]) -> None:
        self._opening = None
        if not task.cancelled():
            task.exception()

    async def _start(self) -> None:
        await self._end()
        if self._directory is None:
            # Short, as paths of sockets must be, and readable by us alone.
            self._directory = Path(tempfile.mkdtemp(prefix="orch-ssh-"))
        target = self._target
        ssh = shutil.which("ssh")
        if ssh is None:
            raise ConfigurationError("DOCKER_HOST=ssh://…: the command 'ssh' is not installed.")
        options = {
            "BatchMode": "yes",
            "ClearAllForwardings": "no",
            "ConnectTimeout": f"{_CONNECT_S:.0f}",
            "ControlMaster": "no",
            "ControlPath": "none",
            "ExitOnForwardFailure": "yes",
            # Said when forwarding is set up.
            "LocalCommand": f"printf {_READY.decode()}\\\\n",
            "PermitLocalCommand": "yes",
            "ServerAliveInterval": "2",
            "ServerAliveCountMax": "2",
            "StreamLocalBindUnlink": "yes",
        }
        arguments = ["-T", "-L", f"{self.socket}:{target.socket}"]
        for name, value in options.items():
            arguments += ["-o", f"{name}={value}"]
        if target.port is not None:
            arguments += ["-p", str(target.port)]
        if target.user is not None:
            arguments += ["-l", target.user]
        process = await asyncio.create_subprocess_exec(
            ssh,
            *arguments,
            "--",
            target.host,
            "cat >/dev/null",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C on a terminal is ours to handle
        )
        self._process = process
        assert process.stdout is not None
        assert process.stderr is not None
        said = b""
        try:
            async with asyncio.timeout(_CONNECT_S + 0.5):
                said = await process.stdout.readline()
        except TimeoutError:
            pass
        except BaseException:
            await self._end()
            raise
        if said.strip() != _READY:
            problem = ""
            if process.returncode is None and not process.stdout.at_eof():
                problem = "no answer in time"
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        problem = (await process.stderr.read(4096)).decode(errors="replace")
            await self._end()
            lines = problem.strip().splitlines() or ["the ssh client ended"]
            raise BackendUnavailable(f"Docker cannot be reached over ssh at {target.host}: {lines[-1][:200]}")

    async def close(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        await self._end()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        # Reads what is left, so that its pipes are closed.
        await process.communicate()
