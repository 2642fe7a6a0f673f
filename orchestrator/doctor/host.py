"""This host: ports, directories, permissions, and the command of subprocess engines."""

from __future__ import annotations

import asyncio
import os
import resource
import shlex
import shutil
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from orchestrator.doctor.checks import Finding, fail, ok, skipped, warn
from orchestrator.profiles import profiles_path

if TYPE_CHECKING:
    from orchestrator.settings import Settings

__all__ = ["address", "engine_command", "permissions", "ports"]

NO_ROOM = 0.9  # of the range taken
FILES = 4096
FREE_BYTES = 1_000_000_000


async def address(settings: Settings) -> list[Finding]:
    """Where `serve` listens: free, or held by an orchestrator."""
    host, port = settings.host, settings.port
    if port == 0:
        return [ok("address", "any free port")]
    where = f"{host}:{port}"
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            return [ok("address", f"{where} is free")]
    except PermissionError:
        return [fail("address", f"{where} is a port for root", "set ORCH_PORT to one above 1023")]
    except OSError:
        pass
    reached = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104 - compared
    try:
        async with httpx.AsyncClient(timeout=10, trust_env=False) as client:
            health = (await client.get(f"http://{reached}:{port}/health")).json()
        status, version = str(health["status"]), str(health["version"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return [fail("address", f"{where} cannot be bound", "end what holds it, or set ORCH_HOST and ORCH_PORT")]
    if status != "ok":
        troubles = [name for name, part in health.get("subsystems", {}).items() if part.get("status") != "ok"]
        line = f"an orchestrator {version} serves on {where} and is {status} ({', '.join(troubles)})"
        return [warn("address", line, "look at GET /health and its log")]
    return [ok("address", f"an orchestrator {version} serves on {where}")]


async def ports(settings: Settings) -> list[Finding]:
    """The range for engines: large enough, not taken by others, out of the way of outgoing connections."""
    low, high = settings.port_min, settings.port_max
    if settings.engine_backend == "docker" and settings.engine_url_mode == "network":
        return [skipped("ports", "engines publish none (ORCH_ENGINE_URL_MODE=network)")]
    size = high - low + 1
    taken = {port for port in await asyncio.to_thread(_listening) if low <= port <= high}
    if len(taken) >= size:
        return [fail("ports", f"all of {low}-{high} are taken", "widen ORCH_PORT_MIN and ORCH_PORT_MAX")]
    found = [ok("ports", f"{low}-{high}: {size - len(taken)} of {size} are free")]
    if len(taken) > size * NO_ROOM:
        line = f"{len(taken)} of {size} ports in {low}-{high} are taken"
        found = [warn("ports", line, "widen ORCH_PORT_MIN and ORCH_PORT_MAX")]
    if low <= settings.port <= high:
        line = f"ORCH_PORT {settings.port} lies in the range for engines"
        found.append(warn("ports", line, "move one of them: an engine may be given that port"))
    first, last = _outgoing()
    if low <= last and first <= high:
        line = f"{low}-{high} overlaps with the ports of outgoing connections ({first}-{last})"
        found.append(warn("ports", line, f"set ORCH_PORT_MAX below {first}: a connection may hold an engine's port"))
    return found


def _listening() -> set[int]:
    """The ports that something listens on, as the kernel tells."""
    held = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == "0A":
                held.add(int(fields[1].rpartition(":")[2], 16))
    return held


def _outgoing() -> tuple[int, int]:
    try:
        first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()
        return int(first), int(last)
    except (OSError, ValueError):
        return 65536, 65536


async def permissions(settings: Settings) -> list[Finding]:
    """What must be writable is, what holds secrets is nobody else's, and there is room."""
    found = [_data_root(settings.data_root)]
    for path in (Path(".env"), profiles_path()):
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except OSError:
            continue
        if mode & 0o077:
            line = f"{path} holds keys and may be read by others (mode {mode:04o})"
            found.append(warn("permissions", line, f"run: chmod 600 '{path}'"))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files < FILES:
        line = f"this process may open {files} files"
        found.append(warn("permissions", line, f"raise it to {FILES} or more (ulimit -n, LimitNOFILE=)"))
    catalog = settings.catalog_mount_path
    if catalog is not None and settings.engine_backend != "docker" and not os.access(catalog, os.R_OK | os.X_OK):
        line = f"the catalog {catalog} cannot be read"
        found.append(fail("permissions", line, "mend ORCH_CATALOG_MOUNT_PATH, or its permissions"))
    return found


def _data_root(path: Path) -> Finding:
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        return fail("permissions", f"{nearest} is no directory", "set ORCH_DATA_ROOT to a directory of this user")
    if not os.access(nearest, os.W_OK | os.X_OK):
        line = f"{nearest} cannot be written to by this user"
        return fail("permissions", line, f"set ORCH_DATA_ROOT, or: chown {os.geteuid()} '{nearest}'")
    free = shutil.disk_usage(nearest).free
    if free < FREE_BYTES:
        return warn("permissions", f"{free / 1e6:.0f} MB are free at {path}", "make room, or set ORCH_DATA_ROOT")
    return ok("permissions", f"{path} can be written to, {free / 1e9:.0f} GB are free")


async def engine_command(settings: Settings) -> list[Finding]:
    """The program of subprocess engines."""
    program = shlex.split(settings.subprocess_command)[0]
    if "{image}" in program:
        return [skipped("engine", "ORCH_SUBPROCESS_COMMAND is chosen by the image's name")]
    if shutil.which(program) is None:
        line = f"ORCH_SUBPROCESS_COMMAND: there is no program {program}"
        return [fail("engine", line, "mend ORCH_SUBPROCESS_COMMAND, or install what it names")]
    return [ok("engine", f"{settings.subprocess_command}")]
