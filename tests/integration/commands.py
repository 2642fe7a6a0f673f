"""`orchestrator …` as a person or a script runs it: a real process, on pipes or on a terminal."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import re
import signal
import struct
import sys
import termios
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

__all__ = ["Commands", "Ended", "Terminal"]

PATIENCE_S = 120.0  # for a process on a busy machine
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def hears_ctrl_c() -> None:
    """A run in the background may have been told to ignore it, and what tests start would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _on_its_terminal() -> None:
    hears_ctrl_c()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C reaches it


@dataclass
class Ended:
    code: int | None
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self
        return json.loads(self.out)


@dataclass
class Terminal:
    """A running command and what it drew."""

    process: asyncio.subprocess.Process
    descriptor: int
    drawn: str = ""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def text(self) -> str:
        return ESCAPES.sub("", self.drawn)

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    async def shows(self, text: str, times: int = 1) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.text.count(text) < times:
                self._changed.clear()
                await self._changed.wait()

    async def hides(self) -> None:
        """What is typed is not drawn any more: before that, a prompt for a secret throws away what was typed."""
        async with asyncio.timeout(PATIENCE_S):
            while termios.tcgetattr(self.descriptor)[3] & termios.ECHO:  # noqa: ASYNC110 - it is in another process
                await asyncio.sleep(0.01)

    def read(self) -> None:
        with suppress(OSError):  # the other end is closed
            self.drawn += os.read(self.descriptor, 65536).decode(errors="replace")
        self._changed.set()

    async def ends(self) -> int:
        async with asyncio.timeout(PATIENCE_S):
            return await self.process.wait()


@dataclass
class Commands:
    """Commands with these variables; nothing of the user who runs the tests is seen."""

    variables: dict[str, str]
    home: Path

    def environment(self, **changes: str | None) -> dict[str, str]:
        given = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "HOME": str(self.home),
            "XDG_CONFIG_HOME": str(self.home / "config"),
            "XDG_STATE_HOME": str(self.home / "state"),
            "LANG": "C.UTF-8",
            "TERM": "xterm-256color",
            **self.variables,
            **changes,
        }
        return {name: value for name, value in given.items() if value is not None}

    async def __call__(self, *arguments: str, given: str | None = None, **changes: str | None) -> Ended:
        process = await self._start(*arguments, **changes)
        try:
            async with asyncio.timeout(PATIENCE_S):
                out, err = await process.communicate(None if given is None else given.encode())
        except TimeoutError:
            process.kill()
            await process.wait()
            raise
        return Ended(process.returncode, out.decode(), err.decode())

    async def _start(self, *arguments: str, **changes: str | None) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "orchestrator",
            *arguments,
            env=self.environment(**changes),
            cwd=self.home,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            preexec_fn=hears_ctrl_c,
        )

    @asynccontextmanager
    async def following(self, *arguments: str, **changes: str | None) -> AsyncIterator[asyncio.subprocess.Process]:
        """A command that goes on; ended with SIGINT, as by Ctrl-C, after which its code is 130."""
        process = await self._start(*arguments, **changes)
        try:
            yield process
            process.send_signal(signal.SIGINT)
            async with asyncio.timeout(PATIENCE_S):
                _, err = await process.communicate()
            assert (process.returncode, err.decode()) == (130, "")
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    @asynccontextmanager
    async def terminal(self, *arguments: str, **changes: str | None) -> AsyncIterator[Terminal]:
        """The command on a terminal of 120 by 40."""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "orchestrator",
            *arguments,
            env=self.environment(**changes),
            cwd=self.home,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_on_its_terminal,
        )
        os.close(theirs)
        shown = Terminal(process, ours)
        loop = asyncio.get_running_loop()
        loop.add_reader(ours, shown.read)
        try:
            yield shown
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            loop.remove_reader(ours)
            os.close(ours)


async def line_of(process: asyncio.subprocess.Process) -> str:
    """Its next line on stdout."""
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE_S):
        return (await process.stdout.readline()).decode()
