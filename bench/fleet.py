"""A fleet of mimics on one orchestrator: sweeps, reconcile, one wake for many, a restart, and what idling costs."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import statistics
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import asyncpg
import httpx

from bench.load import once, request_bytes
from bench.world import MIMIC, World
from orchestrator.control_plane import ControlPlane
from orchestrator.loops import reconcile
from orchestrator.loops.health import MAX_PROBES, HealthLoop
from orchestrator.settings import load_settings

if TYPE_CHECKING:
    from uuid import UUID

__all__ = ["Figures", "measure"]

STARTS_AT_ONCE = 16
ADMITS = 500
IDLE_S = 30.0
ROUNDS = 3
CLOCK_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass
class Figures:
    """Seconds, unless named otherwise."""

    engines: int
    sweep_floor: float = 0.0
    sweep: float = 0.0
    sweep_cpu: float = 0.0
    list_floor: float = 0.0
    reconcile: float = 0.0
    admits_floor: float = 0.0
    admits: float = 0.0
    wakes: int = 0
    serving: float = 0.0
    adopted: float = 0.0
    import_floor: float = 0.0
    idle_share: float = 0.0
    idle_rss: list[int] = field(default_factory=list)  # bytes


async def measure(here: World, engines: int) -> Figures:
    """Provision a fleet, measure, destroy it."""
    figures = Figures(engines)
    changes = {
        "ORCH_SUBPROCESS_COMMAND": f"{shlex.quote(sys.executable)} -I -S {shlex.quote(str(MIMIC))}",
        "ORCH_START_CONCURRENCY": "4",
        "ORCH_DATABASE_POOL": "10",
        "ORCH_QUEUE_TIMEOUT_S": "600",
        "ORCH_IDLE_SLEEP_THRESHOLD_S": "0",
    }
    url = await here.serve(**changes)
    process = here.processes[-1]
    key = await here.register(url, "fleet", {})
    headers = {"X-Platform-Key": key}
    async with httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, timeout=600) as client:
        places = asyncio.Semaphore(STARTS_AT_ONCE)

        async def provision(number: int) -> None:
            async with places:
                (await client.post("/engines/provision", json={"user_id": f"u{number}"})).raise_for_status()

        await asyncio.gather(*(provision(number) for number in range(engines)))
        await _idle(process.pid, figures)
        await _one_wake(client, url, headers, here, figures)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    here.processes.remove(process)
    await _by_hand(here, changes, figures)
    await _restart(here, changes, headers, figures)
    return figures


async def _one_wake(
    client: httpx.AsyncClient, url: str, headers: dict[str, str], here: World, figures: Figures
) -> None:
    """So many admits at once of one engine: running (the floor), and asleep."""
    body = b'{"auto_wake":true}'
    request = request_bytes("POST", f"{url}/engines/u0/admit", headers, body)

    async def all_at_once() -> float:
        began = time.perf_counter()
        await asyncio.gather(*(once(request, url) for _ in range(ADMITS)))
        return time.perf_counter() - began

    floors, ours = [], []
    connection = await asyncpg.connect(here.database_url)
    for _ in range(ROUNDS):
        floors.append(await all_at_once())
        (await client.post("/engines/u0/sleep")).raise_for_status()
        ours.append(await all_at_once())
    figures.wakes = await connection.fetchval("SELECT count(*) FROM audit_log WHERE action = 'wake'") // ROUNDS
    await connection.close()
    figures.admits_floor, figures.admits = statistics.median(floors), statistics.median(ours)


async def _idle(pid: int, figures: Figures) -> None:
    """CPU and memory of the serving process while nothing is asked of it, in three windows."""
    before, began = _cpu_s(pid), time.monotonic()
    for _ in range(3):
        await asyncio.sleep(IDLE_S / 3)
        figures.idle_rss.append(_rss(pid))
    figures.idle_share = (_cpu_s(pid) - before) / (time.monotonic() - began)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * CLOCK_TICK_S


def _rss(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def _by_hand(here: World, changes: dict[str, str], figures: Figures) -> None:
    """A sweep and a reconcile pass in this process, beside what they cannot do without."""
    values = {
        name.removeprefix("ORCH_").lower(): value
        for name, value in {**here.environment, **changes}.items()
        if name.startswith("ORCH_")
    }
    plane = ControlPlane(load_settings(_env_file=None, **values))
    await plane.open(loops=False)
    try:
        loop = HealthLoop(plane.means, plane.healing)
        floors, sweeps, cpu, lists, passes = [], [], [], [], []
        for _ in range(ROUNDS):
            floors.append(await _bare_sweep(here))
            async with plane.database.transaction() as connection:
                await connection.execute("UPDATE engines SET next_probe_at = now() - interval '1 s'")
            began, cpu_began = time.perf_counter(), time.process_time()
            await loop.round()
            sweeps.append(time.perf_counter() - began)
            cpu.append(time.process_time() - cpu_began)
            began = time.perf_counter()
            found = await plane.backend.list()
            lists.append(time.perf_counter() - began)
            assert len(found) == figures.engines, len(found)
            began = time.perf_counter()
            await reconcile.reconcile(plane.means, plane.healing)
            passes.append(time.perf_counter() - began)
        figures.sweep_floor, figures.sweep = statistics.median(floors), statistics.median(sweeps)
        figures.sweep_cpu = statistics.median(cpu)
        figures.list_floor, figures.reconcile = statistics.median(lists), statistics.median(passes)
    finally:
        await plane.close()


async def _bare_sweep(here: World) -> float:
    """The same requests with nothing around them."""
    connection = await asyncpg.connect(here.database_url)
    ports = [row[0] for row in await connection.fetch("SELECT endpoint_port FROM engines WHERE status = 'running'")]
    await connection.close()
    places = asyncio.Semaphore(MAX_PROBES)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:

        async def probe(port: int) -> None:
            async with places, session.get(f"http://127.0.0.1:{port}/health") as response:
                await response.read()

        began = time.perf_counter()
        await asyncio.gather(*(probe(port) for port in ports))
        return time.perf_counter() - began


async def _restart(here: World, changes: dict[str, str], headers: dict[str, str], figures: Figures) -> None:
    """From the start of the process to the first admit that is answered, and to the last engine looked at."""
    began = time.perf_counter()
    imports = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "import fastapi, uvicorn, asyncpg, aiohttp, pydantic_settings, cryptography.fernet"
    )
    await imports.wait()
    figures.import_floor = time.perf_counter() - began
    connection = await asyncpg.connect(here.database_url)
    frozen = await connection.fetchrow("SELECT id, user_id FROM engines ORDER BY id DESC LIMIT 1")
    assert frozen is not None
    pid = _pid_of(here, frozen["id"])
    os.kill(pid, signal.SIGSTOP)  # the last one that a reconcile pass comes to; thawed when it is adopted
    began = time.perf_counter()
    serving = asyncio.create_task(here.serve(**changes))
    url = await serving
    with suppress(httpx.HTTPError):
        async with httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, timeout=60) as client:
            (await client.post("/engines/u1/admit", json={})).raise_for_status()
            figures.serving = time.perf_counter() - began
    while not await connection.fetchval(  # noqa: ASYNC110 - it is in another process
        "SELECT count(*) FROM audit_log WHERE action = 'reconcile_adopt' AND engine_id = $1", frozen["id"]
    ):
        await asyncio.sleep(0.01)
    figures.adopted = time.perf_counter() - began
    await connection.close()


def _pid_of(here: World, engine_id: UUID) -> int:
    """The process whose data directory is this engine's."""
    wanted = f"/engines/{engine_id}/".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted in (process / "environ").read_bytes():
                return int(process.name)
    raise RuntimeError(f"engine {engine_id} does not run")
