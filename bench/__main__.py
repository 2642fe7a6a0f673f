"""`make bench`: each gate beside its floor."""

from __future__ import annotations

import asyncio
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import httpx
import typer
from rich.console import Console
from rich.table import Table

from bench import docker, fleet
from bench.load import hammer, once, request_bytes
from bench.world import MIMIC, World, free_port, until_answers, world

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

console = Console()
ROUNDS = 5
USER = "bench-user"
ENGINES = 1000


def main(
    only: str = typer.Option("", help="Run only the measurements whose name contains this."),
    seconds: float = typer.Option(1.5, help="Length of each round of load."),
) -> None:
    asyncio.run(_run(only, seconds))


async def _run(only: str, seconds: float) -> None:
    if not any(only in name for name in MEASUREMENTS):
        raise typer.BadParameter(
            f"--only: no measurement has '{only}' in its name; there are {', '.join(MEASUREMENTS)}."
        )
    table = Table(title="engine-orchestrator: ours beside the floor of the same run", title_justify="left")
    for column in ("measurement", "floor", "ours", "ratio or difference", "gate", ""):
        table.add_column(column, overflow="fold")
    async with world() as here:
        for name, measure in MEASUREMENTS.items():
            if only not in name:
                continue
            with console.status(f"{name} …"):
                for row in await measure(here, seconds):
                    table.add_row(*row)
    console.print(table)


def _row(name: str, floor: str, ours: str, figure: str, gate: str, holds: bool | None) -> tuple[str, ...]:
    mark = "" if holds is None else "[green]✓[/]" if holds else "[red]✗[/]"
    return name, floor, ours, figure, gate, mark


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms"


def _more(seconds: float) -> str:
    return f"{'-' if seconds < 0 else '+'} {_ms(abs(seconds))}"


def _percentile(times: list[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(len(times) * share))]


# --- admit ----------------------------------------------------------------------------------------------


async def _admit(here: World, seconds: float) -> list[tuple[str, ...]]:
    """Look-ups with one connection (p50) and with 16 (requests a second), floor and ours in turn."""
    url = await here.serve(ORCH_SUBPROCESS_COMMAND=f"{shlex.quote(sys.executable)} -I -S {shlex.quote(str(MIMIC))}")
    key = await here.register(url, "bench", {"rate_limit_rpm": 1_000_000})
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        answer = await client.post(f"{url}/engines/provision", headers={"X-Platform-Key": key}, json={"user_id": USER})
        answer.raise_for_status()
    floor_url = await here.floor()
    headers = {"X-Platform-Key": key}
    ours = request_bytes("POST", f"{url}/engines/{USER}/admit", headers, b'{"auto_provision":true,"auto_wake":true}')
    floor = request_bytes("POST", f"{floor_url}/lookup/{USER}", headers)

    single: dict[str, list[float]] = {"floor": [], "ours": []}
    rates: dict[str, list[float]] = {"floor": [], "ours": []}
    tail: list[float] = []
    await hammer(url, ours, 4, 0.5)
    await hammer(floor_url, floor, 4, 0.5)
    for _ in range(ROUNDS):
        for name, target, request in (("floor", floor_url, floor), ("ours", url, ours)):
            single[name].append(statistics.median(await hammer(target, request, 1, seconds)))
            times = await hammer(target, request, 16, seconds)
            rates[name].append(len(times) / seconds)
            if name == "ours":
                tail += times
    floor_p50, ours_p50 = statistics.median(single["floor"]), statistics.median(single["ours"])
    floor_rate, ours_rate = statistics.median(rates["floor"]), statistics.median(rates["ours"])
    rows = [
        _row(
            "admit of a running engine, p50",
            _ms(floor_p50),
            _ms(ours_p50),
            f"{ours_p50 / floor_p50:.2f} ×",
            "≤ 1.5 × bare FastAPI + asyncpg",
            ours_p50 <= 1.5 * floor_p50,
        ),
        _row(
            "the same, 16 connections, one process",
            f"{floor_rate:,.0f}/s",
            f"{ours_rate:,.0f}/s (p99 {_ms(_percentile(tail, 0.99))})",
            f"{ours_rate / floor_rate:.2f} ×",
            "≥ 2,000/s",
            ours_rate >= 2000,
        ),
    ]
    await _fill(here, 100_000)
    full = statistics.median([statistics.median(await hammer(url, ours, 1, seconds)) for _ in range(ROUNDS)])
    rows.append(
        _row(
            "the same with 100,000 engines",
            _ms(ours_p50),
            _ms(full),
            f"{full / ours_p50:.2f} ×",
            "within 10 %",
            full <= 1.1 * ours_p50,
        )
    )
    await _empty(here)
    return rows


async def _fill(here: World, engines: int) -> None:
    connection = await asyncpg.connect(here.database_url)
    await connection.execute(
        "INSERT INTO engines (id, product_id, user_id, status, engine_version, location_id, first_healthy_at) "
        "SELECT gen_random_uuid(), p.id, 'filler-' || g, 'stopped', 'filler', e.location_id, now() "
        "FROM generate_series(1, $1) g, (SELECT id FROM products LIMIT 1) p, "
        "(SELECT location_id FROM engines LIMIT 1) e",
        engines,
    )
    await connection.execute("ANALYZE engines")
    await connection.close()


async def _empty(here: World) -> None:
    connection = await asyncpg.connect(here.database_url)
    await connection.execute("DELETE FROM engines WHERE engine_version = 'filler'")
    await connection.execute("VACUUM ANALYZE engines")
    await connection.close()


# --- cold provision and wake ----------------------------------------------------------------------------


async def _boot_floor() -> float:
    """The reference engine alone: from the spawn to its first 200."""
    with tempfile.TemporaryDirectory() as data:
        port = free_port()
        environment = {
            "PATH": os.environ["PATH"],
            "HOST": "127.0.0.1",
            "PORT": str(port),
            "ENGINE_KEY_HASH": "0" * 64,
            "SQLITE_DB_PATH": str(Path(data) / "brain.sqlite"),
        }
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "engine"],
            env=environment,
            cwd=data,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        await until_answers(f"http://127.0.0.1:{port}/health", process)
        took = time.perf_counter() - began
        process.terminate()
        process.wait(30)
        return took


async def _provision(here: World, _: float) -> list[tuple[str, ...]]:
    """Cold provisions beside boots of the same engine alone, in turn; then wakes from frozen."""
    url = await here.serve()
    key = await here.register(url, "cold", {})
    headers = {"X-Platform-Key": key}
    floors, ours, wakes = [], [], []
    async with httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, timeout=60) as client:
        for number in range(9):
            floors.append(await _boot_floor())
            began = time.perf_counter()
            answer = await client.post("/engines/provision", json={"user_id": f"cold-{number}"})
            ours.append(time.perf_counter() - began)
            answer.raise_for_status()
        for number in range(9):
            (await client.post(f"/engines/cold-{number}/sleep")).raise_for_status()
            wake = request_bytes("POST", f"{url}/engines/cold-{number}/admit", headers, b'{"auto_wake":true}')
            wakes.append(await once(wake, url))
        for number in range(9):
            (await client.delete(f"/engines/cold-{number}")).raise_for_status()
    floor, mine = statistics.median(floors), statistics.median(ours)
    woken = statistics.median(wakes)
    commit = await _commit_floor(here)
    return [
        _row(
            "cold provision, reference engine",
            _ms(floor),
            _ms(mine),
            _more(mine - floor),
            "≤ the engine's own boot + 20 ms",
            mine - floor <= 0.020,
        ),
        _row(
            "wake from frozen, whole admit (floor: two commits)",
            _ms(2 * commit),
            _ms(woken),
            _more(woken - 2 * commit),
            "≤ 3 ms",
            woken <= 0.003,
        ),
    ]


# --- Docker ---------------------------------------------------------------------------------------------


async def _docker(here: World, _: float) -> list[tuple[str, ...]]:
    """The same through the Docker backend, beside the raw Docker API with the same image."""
    try:
        figures = await docker.measure(here)
    except RuntimeError as error:
        return [_row("Docker", "–", "–", str(error), "", None)]
    cold_floor, cold = docker.median(figures.cold_floor), docker.median(figures.cold_ours)
    wake_floor, wake = docker.median(figures.wake_floor), docker.median(figures.wake_ours)
    cold_more = docker.paired(figures.cold_ours, figures.cold_floor)
    wake_more = docker.paired(figures.wake_ours, figures.wake_floor)
    health_more = docker.paired(figures.wake_ours, figures.wake_health)
    return [
        _row(
            "Docker: cold provision",
            _ms(cold_floor),
            _ms(cold),
            _more(cold_more),
            "≤ create + start + the engine's boot + 20 ms",
            cold_more <= 0.020,
        ),
        _row(
            "Docker: wake from frozen, whole admit",
            _ms(wake_floor),
            _ms(wake),
            _more(wake_more),
            "≤ unpause + 4 ms",
            wake_more <= 0.004,
        ),
        _row(
            "the same beside an unpause and one GET /health",
            _ms(docker.median(figures.wake_health)),
            _ms(wake),
            _more(health_more),
            "",
            None,
        ),
        _row(
            f"Docker: burst of {docker.BURST}, each to healthy",
            f"{figures.burst_floor:.1f}/s",
            f"{figures.burst_ours:.1f}/s",
            f"{figures.burst_ours / figures.burst_floor:.2f} ×",
            "≥ 0.9 × the raw start rate",
            figures.burst_ours >= 0.9 * figures.burst_floor,
        ),
    ]


# --- a fleet --------------------------------------------------------------------------------------------


async def _fleet(here: World, _: float) -> list[tuple[str, ...]]:
    """What a thousand engines cost when nobody asks for anything, and what a crowd costs that asks for one."""
    figures = await fleet.measure(here, ENGINES)
    share = figures.idle_share
    memory = " · ".join(f"{rss / 1e6:.0f}" for rss in figures.idle_rss)
    extra = figures.admits - figures.admits_floor
    name = f"{ENGINES:,} engines: "
    return [
        _row(
            f"{name}sweep of health probes",
            f"{figures.sweep_floor:.2f} s",
            f"{figures.sweep:.2f} s, {figures.sweep_cpu:.2f} CPU-s",
            f"{figures.sweep / figures.sweep_floor:.2f} ×",
            "< 3 s, < 1 CPU-s for 1,000",
            figures.sweep < 3 and figures.sweep_cpu < 1,
        ),
        _row(
            f"{name}reconcile pass (floor: the list alone)",
            f"{figures.list_floor:.2f} s",
            f"{figures.reconcile:.2f} s",
            f"{figures.reconcile / figures.list_floor:.2f} ×",
            "< 1 s for 1,000",
            figures.reconcile < 1,
        ),
        _row(
            f"{fleet.ADMITS} admits at once of a sleeping engine (floor: of a running one)",
            _ms(figures.admits_floor),
            f"{_ms(figures.admits)}, {figures.wakes} wake",
            _more(extra),
            "one wake; within wake + 50 ms",
            figures.wakes == 1 and extra <= 0.050,
        ),
        _row(
            f"{name}restart, first admit answered (floor: imports of the libraries alone)",
            f"{figures.import_floor:.2f} s",
            f"{figures.serving:.2f} s",
            f"+ {figures.serving - figures.import_floor:.2f} s",
            "< 1 s with 500",
            figures.serving < 1,
        ),
        _row(f"{name}restart, all adopted", "–", f"{figures.adopted:.2f} s", "", "< 3 s with 500", figures.adopted < 3),
        _row(
            f"{name}idle",
            "–",
            f"{share * 100:.1f} % of a core, {memory} MB",
            "",
            "< 5 %, < 120 MB, flat",
            share < 0.05 and max(figures.idle_rss) < 120e6,
        ),
    ]


async def _commit_floor(here: World) -> float:
    """What the database alone takes for one small commit: a wake needs two, the claim and the end."""
    connection = await asyncpg.connect(here.database_url)
    times = []
    for _ in range(50):
        began = time.perf_counter()
        await connection.execute("UPDATE deployment SET created_at = now()")
        times.append(time.perf_counter() - began)
    await connection.close()
    return statistics.median(times)


MEASUREMENTS: dict[str, Callable[[World, float], Awaitable[list[tuple[str, ...]]]]] = {
    "admit": _admit,
    "provision": _provision,
    "docker": _docker,
    "fleet": _fleet,
}

if __name__ == "__main__":
    typer.run(main)
