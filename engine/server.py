"""Serves the application: listens at once, answers "starting" until it is ready, drains on SIGTERM.

From SIGTERM to exit: up to DRAIN_S for the turns in flight, then CLOSE_S for their listeners to read the end, well
inside the 30 s that the engine contract grants. A second Ctrl-C does not wait for turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from importlib.util import find_spec
from typing import TYPE_CHECKING

from uvicorn.config import Config
from uvicorn.server import Server

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from engine.app import EngineApp
    from engine.brain import Brain

logger = logging.getLogger("engine.server")

DRAIN_S = 25.0
CLOSE_S = 2


class EngineServer(Server):
    """uvicorn, told to stop by `stop` instead of by signals, and without its ten wake-ups a second."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._stop = asyncio.Event()

    def stop(self) -> None:
        self._stop.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        while not self._stop.is_set():
            await self.on_tick(0)  # Renews the Date header.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._stop.wait()


async def serve(app: EngineApp, brain: Brain, listener: socket.socket) -> None:
    """Runs until SIGTERM or SIGINT, then drains and closes. Raises StartupError when the engine cannot start."""
    told_to_stop = asyncio.Event()
    impatient = asyncio.Event()
    loop = asyncio.get_running_loop()

    def interrupted() -> None:
        (impatient if told_to_stop.is_set() else told_to_stop).set()

    loop.add_signal_handler(signal.SIGTERM, told_to_stop.set)
    loop.add_signal_handler(signal.SIGINT, interrupted)

    server = EngineServer(
        Config(
            app,
            http="httptools" if find_spec("httptools") else "h11",
            ws="none",
            loop="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=CLOSE_S,
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    host, port = listener.getsockname()[:2]
    logger.info("listening", extra={"host": host, "port": port, "pid": os.getpid()})
    try:
        booting = asyncio.create_task(app.boot())
        stopping = asyncio.create_task(told_to_stop.wait())
        await asyncio.wait({booting, stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        if booting.done():
            booting.result()
            await asyncio.wait({stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
            if told_to_stop.is_set():
                await _drain(app, impatient)
        else:
            app.begin_drain()
        for task in (booting, stopping):
            task.cancel()
    finally:
        server.stop()
        await serving
        await app.close()
        await brain.close()
    logger.info("stopped")


async def _drain(app: EngineApp, impatient: asyncio.Event) -> None:
    logger.info("draining")
    app.begin_drain()
    waiting = asyncio.create_task(app.drain(DRAIN_S))
    hurry = asyncio.create_task(impatient.wait())
    await asyncio.wait({waiting, hurry}, return_when=asyncio.FIRST_COMPLETED)
    hurry.cancel()
    interrupted = 0 if waiting.done() else await app.drain(0)
    interrupted += await waiting
    logger.info("drained", extra={"interrupted_turns": interrupted})
