"""`python -m engine`: the reference engine.

Exit codes: 0 stopped on request; 2 a setting, the catalog or the key record is wrong; 3 the port is taken; 4 the brain
cannot be opened. Each but the first with one line on stderr.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING, NoReturn

from engine.errors import StartupError

if TYPE_CHECKING:
    from types import FrameType

    from engine.catalog import Catalog
    from engine.responder import Responder
    from engine.settings import Settings


def main() -> int:
    started_at = time.monotonic()
    # Until the server listens to signals itself. As process 1 of a container an engine would otherwise ignore them.
    signal.signal(signal.SIGTERM, _exit)
    os.umask(0o077)  # What the engine writes is one user's data.
    try:
        _run(started_at)
    except StartupError as exc:
        print(f"engine: {exc}", file=sys.stderr, flush=True)
        return exc.exit_code
    return 0


def _run(started_at: float) -> None:
    # Imported as they are needed: callers can connect and the brain is being opened, in its own thread, while the
    # server is still being imported.
    from engine import key_store, keys, logs
    from engine.listener import listen
    from engine.settings import Settings

    settings = Settings.from_env(os.environ)
    logs.configure(settings.log_level)
    stored = key_store.read(key_store.path_beside(settings.brain_path))
    keyring = keys.Keyring(keys.effective(settings.key_hash, settings.key_generation, stored))
    listener = listen(settings.host, settings.port)

    from engine.brain import Brain

    brain = Brain(settings.brain_path)

    import asyncio

    from engine import lean_uvicorn

    lean_uvicorn.prepare()

    from engine.app import EngineApp
    from engine.catalog import Catalog
    from engine.sandbox import Sandbox
    from engine.server import serve

    try:
        import uvloop
    except ImportError:
        loop_factory = None
    else:
        loop_factory = uvloop.new_event_loop

    async def run() -> None:
        catalog, sandbox = Catalog(), Sandbox()
        responder = make_responder(settings, catalog)
        app = EngineApp(settings, keyring, brain, responder, sandbox, loaded=catalog, started_at=started_at)
        await serve(app, brain, listener)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(run())


def make_responder(settings: Settings, catalog: Catalog) -> Responder:
    if settings.llm is None:
        from engine.responder import LocalResponder

        return LocalResponder(missing=settings.llm_missing)
    from engine.model import ModelResponder

    return ModelResponder(settings.llm, catalog)


def _exit(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
