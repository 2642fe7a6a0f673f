"""Serving: one process, or several workers on one socket."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import signal
import socket
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.supervisors import Multiprocess

from orchestrator import metrics
from orchestrator.api import HttpProtocol, create_app
from orchestrator.control_plane import ControlPlane
from orchestrator.errors import ConfigurationError
from orchestrator.logs import configure_logging
from orchestrator.settings import load_settings
from orchestrator.tracing import configure_tracing

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from typing import Any

    from fastapi import FastAPI

    from orchestrator.settings import Settings

__all__ = ["Server", "bind", "run", "serve", "server_config", "worker_app"]

WORKER_ANSWERS_S = 60  # a worker that starts on a busy machine must not be taken for dead
GRACEFUL_S = 10  # for requests in flight, at SIGTERM


def run(main: Coroutine[Any, Any, None]) -> None:
    """`asyncio.run` on uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main)


def bind(host: str, port: int) -> socket.socket:
    """A bound socket. Raises `ConfigurationError` that names the variable to change."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named: asyncio sets TCP_NODELAY on no other, and each answer would wait 40 ms for an ACK.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        reason = "is taken by another process" if taken else f"cannot be bound ({error})"
        raise ConfigurationError(f"ORCH_HOST/ORCH_PORT: {host}:{port} {reason}; choose another port.") from None
    sock.set_inheritable(True)
    return sock


class Server(uvicorn.Server):
    """Uvicorn, telling when it accepts connections, and leaving the end of the process to its caller."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None] | None = None) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self._on_started is not None and not self.should_exit:
            self._on_started()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the serving, and nothing else: the caller still closes what it opened."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


def keep_for_good() -> None:
    """What is here now lives as long as the process: no collection of garbage need look at it again."""
    gc.freeze()
    gc.enable()  # `serve` does without while it imports: a tenth of its start


def server_config(app: Any, settings: Settings, *, factory: bool = False) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        factory=factory,
        http=HttpProtocol,
        workers=settings.workers,
        lifespan="on" if factory else "off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACEFUL_S,
        timeout_keep_alive=75,
        timeout_worker_healthcheck=WORKER_ANSWERS_S,
    )


def worker_app() -> FastAPI:
    """What each worker process runs; the parent has checked the settings already."""
    settings = load_settings()
    configure_logging(settings.log_level, settings.log_format)
    configure_tracing()
    app = create_app(ControlPlane(settings), manage_plane=True)
    keep_for_good()
    return app


async def _serve_here(settings: Settings, sock: socket.socket, on_started: Callable[[], None] | None) -> None:
    configure_tracing()
    plane = ControlPlane(settings)
    try:
        await plane.open()
        app = create_app(plane)
        keep_for_good()
        await Server(server_config(app, settings), on_started).serve(sockets=[sock])
    finally:
        await plane.close()


async def _preflight(settings: Settings) -> None:
    plane = ControlPlane(settings)
    try:
        await plane.open()
    finally:
        await plane.close()


def serve(settings: Settings, on_started: Callable[[], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT. Raises `ConfigurationError` or `DatabaseUnavailable` before it serves."""
    sock = bind(settings.host, settings.port)
    if settings.workers == 1:
        run(_serve_here(settings, sock, on_started))
        return
    run(_preflight(settings))
    # Each worker counts for itself, in files that a scrape of any one adds up.
    with TemporaryDirectory(prefix="orchestrator-metrics-") as directory:
        os.environ[metrics.MULTIPROCESS] = directory
        _serve_workers(settings, sock, on_started)


def _serve_workers(settings: Settings, sock: socket.socket, on_started: Callable[[], None] | None) -> None:
    config = server_config("orchestrator.server:worker_app", settings, factory=True)
    if on_started is not None:
        on_started()
    Multiprocess(config, sockets=[sock]).run()
