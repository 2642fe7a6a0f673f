"""`orchestrator dev` as a newcomer meets it: real database, real reference engine, real terminal signals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


class Dev:
    """One state directory, and the `dev` processes on it."""

    def __init__(self, state_dir: Path, **environment: str) -> None:
        self.state_dir = state_dir
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(state_dir.parent),
            "TERM": "dumb",
            **({"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}),
            **environment,
        }
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *flags: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator", "dev", "--state-dir", str(self.state_dir), "--port", "0", *flags],
            env=self.environment,
            cwd=self.state_dir.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def run(self, *flags: str, within_s: float = 90) -> str:
        """To its end, which must be good; what it printed."""
        process = self.start(*flags)
        output, _ = process.communicate(timeout=within_s)
        assert process.returncode == 0, output
        return output

    async def serving(self, process: subprocess.Popen[str], *, within_s: float = 90) -> dict[str, Any]:
        """`dev.json`, once the server answers."""
        path = self.state_dir / "dev.json"
        async with asyncio.timeout(within_s):
            while True:
                assert process.poll() is None, process.communicate()[0]
                with suppress(FileNotFoundError, httpx.TransportError):
                    told: dict[str, Any] = json.loads(path.read_text())
                    async with httpx.AsyncClient(trust_env=False) as client:
                        if (await client.get(told["url"] + "/health")).status_code == 200:
                            return told
                await asyncio.sleep(0.05)

    def engines(self) -> list[psutil.Process]:
        """The engine processes that live on this state directory."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                if (
                    environment.get("SQLITE_DB_PATH", "").startswith(str(self.state_dir))
                    and process.status() != "zombie"
                ):
                    found.append(process)
        return found

    def postgres(self) -> int | None:
        """The number of the database's process, if it lives."""
        with suppress(FileNotFoundError, ValueError, psutil.NoSuchProcess):
            number = int((self.state_dir / "postgres" / "postmaster.pid").read_text().split("\n")[0])
            if "postgres" in psutil.Process(number).name():
                return number
        return None

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        for engine in self.engines():
            with suppress(psutil.Error):
                engine.kill()
        if (number := self.postgres()) is not None:
            psutil.Process(number).send_signal(signal.SIGINT)
            psutil.wait_procs([psutil.Process(number)] if psutil.pid_exists(number) else [], timeout=10)


@pytest.fixture
def dev() -> Iterator[Dev]:
    with tempfile.TemporaryDirectory(prefix="orchestrator-dev-", ignore_cleanup_errors=True) as directory:
        made = Dev(Path(directory) / "state")
        try:
            yield made
        finally:
            made.close()


async def admit(told: dict[str, Any], user_id: str) -> dict[str, Any]:
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        answer = await client.post(
            f"{told['url']}/engines/{user_id}/admit",
            headers={"X-Platform-Key": told["platform_key"]},
            json={"auto_provision": True, "auto_wake": True},
        )
        assert answer.status_code == 200, answer.text
        engine: dict[str, Any] = answer.json()["engine"]
        return engine


def test_once_demonstrates_and_leaves_nothing_running(dev: Dev) -> None:
    first = dev.run("--once")
    assert "This is turn 1 of this task" in first
    assert dev.engines() == []
    assert dev.postgres() is None

    second = dev.run("--once")  # the brain remembers
    assert "This is turn 2 of this task" in second

    told = json.loads((dev.state_dir / "dev.json").read_text())
    assert set(told) == {"url", "admin_key", "platform_key", "product_id", "database_url"}
    for name in ("dev.json", "admin_key", "platform_key", "master_key"):
        assert stat.S_IMODE((dev.state_dir / name).stat().st_mode) == 0o600, name
    for output in (first, second):
        for secret in (told["admin_key"], told["platform_key"], "sk-sept-"):
            assert secret not in output


async def test_serves_until_ctrl_c(dev: Dev) -> None:
    process = dev.start("--no-demo")
    told = await dev.serving(process)
    engine = await admit(told, "ann")
    assert engine["status"] == "running"
    again = subprocess.run(
        [sys.executable, "-m", "orchestrator", "dev", "--state-dir", str(dev.state_dir), "--port", "0"],
        env={"PATH": os.environ["PATH"], "HOME": str(dev.state_dir.parent)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert again.returncode == 1
    assert "already running" in again.stderr
    assert "Traceback" not in again.stderr
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to everyone in the foreground
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "curl" in output
    assert dev.engines() == []
    assert dev.postgres() is None


async def test_a_killed_dev_leaves_all_running_and_the_next_adopts_it(dev: Dev) -> None:
    process = dev.start("--no-demo")
    told = await dev.serving(process)
    engine = await admit(told, "ann")
    (before,) = dev.engines()
    database = dev.postgres()
    assert database is not None
    process.kill()
    process.communicate()

    process = dev.start("--no-demo")
    told = await dev.serving(process)
    assert dev.postgres() == database
    adopted = await admit(told, "ann")
    assert adopted == {**engine, "last_health_at": adopted["last_health_at"]}
    assert [found.pid for found in dev.engines()] == [before.pid]
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert dev.engines() == []


async def test_keep_engines_keeps_them_through_a_hang_up_too(dev: Dev) -> None:
    dev.run("--once", "--keep-engines")
    (engine,) = dev.engines()
    assert dev.postgres() is not None
    process = dev.start("--no-demo", "--keep-engines")
    await dev.serving(process)
    os.killpg(process.pid, signal.SIGHUP)  # the terminal is closed
    process.communicate(timeout=60)
    assert [found.pid for found in dev.engines()] == [engine.pid]
    assert dev.postgres() is not None


def test_a_taken_port_is_one_clear_line(dev: Dev) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        process = subprocess.run(
            [sys.executable, "-m", "orchestrator", "dev", "--state-dir", str(dev.state_dir), "--port", str(port)],
            env={"PATH": os.environ["PATH"], "HOME": str(dev.state_dir.parent)},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert process.returncode == 1
    assert f"Port {port}" in process.stderr
    assert "--port" in process.stderr
    assert "Traceback" not in process.stderr
    assert dev.postgres() is None
