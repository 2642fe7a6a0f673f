"""The engine's HTTP surface, as an ASGI application.

    GET  /health               no key. 200 and status "ok" only when turns are taken; 503 "starting" or "draining"
    POST /execute              one turn, as text/event-stream
    GET  /execute/replay       the latest events of all turns after `after` (ms; of one with `task_id`)
    GET  /history/{task_id}    the turns and messages of a task, newest `limit` (1 to 1000, default 200)
    GET  /hitl/pending         what waits for a person; POST /hitl/respond answers
    POST /admin/key            live key rotation; 204 once it is durable
    POST /admin/quiesce        204 once the brain's file alone is the whole brain; POST /admin/resume ends it
    /memory/…  /skills…        see `memory_routes`, `skill_routes`

Every path but /health needs `X-Engine-Key`, before anything else about the request is looked at. Every error is
`{"error", "message", "details"}`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any, Literal

from engine import __version__, bodies, key_store
from engine.activity import Activity
from engine.catalog import Catalog, load
from engine.errors import (
    Draining,
    EngineError,
    InternalError,
    InvalidKey,
    MethodNotAllowed,
    NotFound,
    Starting,
    TurnInFlight,
)
from engine.hitl import Hitl
from engine.memory_routes import MemoryRoutes
from engine.replay import ReplayBuffer
from engine.routing import Route, require_method
from engine.skill_routes import SkillRoutes
from engine.tools import Toolbox
from engine.turns import TurnRunner
from engine.wire import ClientGone, EventStream, Request, Response, is_gone

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from engine.brain import Brain, Opened
    from engine.keys import Keyring
    from engine.responder import Desk, Responder
    from engine.sandbox import Sandbox
    from engine.settings import Settings
    from engine.turns import Turn
    from engine.wire import Receive, Scope, Send

logger = logging.getLogger("engine")

Phase = Literal["starting", "ok", "draining"]


class EngineApp:
    def __init__(
        self,
        settings: Settings,
        keyring: Keyring,
        brain: Brain,
        responder: Responder,
        sandbox: Sandbox,
        *,
        loaded: Catalog | None = None,
        started_at: float | None = None,
    ) -> None:
        """`loaded` is filled in by `boot`, from CATALOG_DIR; whoever needs the catalog as well shares it."""
        self._settings = settings
        self._keyring = keyring
        self._brain = brain
        self._responder = responder
        self._sandbox = sandbox
        self._activity = Activity()
        self._catalog = loaded or Catalog()
        self._hitl = Hitl()
        self._replay = ReplayBuffer()
        self._toolbox = Toolbox(brain, sandbox, self._catalog, settings.bash_timeout_s)
        self._turns = TurnRunner(
            brain, responder, self._activity, desk=self._desk, hitl=self._hitl, replay=self._replay
        )
        self._opened: Opened | None = None
        self._phase: Phase = "starting"
        self._started_at = time.monotonic() if started_at is None else started_at
        self._rotating = asyncio.Lock()
        self._probing: asyncio.Task[None] | None = None
        self._routes = (
            Route("GET", "/history/", self._get_history),
            Route("POST", "/execute", self._execute),
            Route("GET", "/execute/replay", self._get_replay),
            Route("GET", "/hitl/pending", self._list_pending),
            Route("POST", "/hitl/respond", self._respond),
            Route("POST", "/admin/key", self._rotate_key),
            Route("POST", "/admin/quiesce", self._quiesce),
            Route("POST", "/admin/resume", self._resume),
            *SkillRoutes(brain, self._catalog).routes(),
            *MemoryRoutes(brain, self._catalog).routes(),
        )

    def _desk(self, turn: Turn) -> Desk:
        from engine.desk import TurnDesk

        return TurnDesk(turn, self._brain, self._toolbox, self._hitl, self._settings.hitl_timeout_s)

    # --- its life ---------------------------------------------------------------------------------------

    async def boot(self) -> None:
        """Returns when turns are taken. Raises StartupError."""
        directory = self._settings.catalog_dir
        loading = None if directory is None else asyncio.create_task(asyncio.to_thread(load, directory))
        try:
            self._opened = await self._brain.opened()
            if loading is not None:
                self._catalog.fill(await loading)
        finally:
            if loading is not None and not loading.done():
                loading.cancel()
        self._turns.report_interrupted(self._brain.interrupted)
        if self._phase == "starting":
            self._phase = "ok"
        # Nobody waits for this to be healthy; a turn that wants the tool waits for it.
        self._probing = asyncio.create_task(self._sandbox.probe())
        logger.info(
            "ready",
            extra={
                "boot_seconds": round(time.monotonic() - self._started_at, 3),
                "schema_version": self._opened.schema_version,
                "interrupted_turns": self._opened.interrupted_turns,
                "key_generation": self._keyring.record.generation,
            },
        )

    def begin_drain(self) -> None:
        """From now on `/health` says "draining" and new turns are refused; everything else goes on."""
        self._phase = "draining"
        self._brain.resume()
        self._turns.refuse_new_turns()

    async def drain(self, timeout_s: float) -> int:
        """Waits for the turns in flight; returns how many had to be interrupted after `timeout_s`."""
        self.begin_drain()
        return await self._turns.drain(timeout_s)

    async def close(self) -> None:
        """After the last request."""
        await self._sandbox.close()
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait([self._probing])
        await self._responder.close()

    # --- a request --------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise ValueError(f"not an HTTP request: {scope['type']}")
        request = Request(scope, receive)
        try:
            answer = await self._answer(request)
        except ClientGone:
            return
        await answer.send(send)

    async def _answer(self, request: Request) -> Response | EventStream:
        try:
            if request.path == "/health":
                require_method(request, ["GET"])
                return self._health()
            if not self._keyring.accepts(request.header(b"x-engine-key") or b""):
                raise InvalidKey
            handler = self._find(request)
            if self._phase == "starting":
                raise Starting
            return await handler(request)
        except ClientGone:
            raise
        except EngineError as exc:
            return _error(exc)
        except Exception:  # The last line of defence: the log gets the cause, the caller no traceback.
            logger.exception("request failed", extra={"method": request.method, "path": request.path})
            return _error(InternalError())

    def _find(self, request: Request) -> Callable[[Request], Awaitable[Response | EventStream]]:
        found = [route for route in self._routes if route.matches(request.path)]
        if not found:
            raise NotFound(request.path[:1000])
        method = require_method(request, [route.method for route in found])
        return next(route.handler for route in found if route.method == method)

    # --- handlers ---------------------------------------------------------------------------------------

    def _health(self) -> Response:
        payload = {
            "status": self._phase,
            "uptime_seconds": round(time.monotonic() - self._started_at, 3),
            "subsystems": {
                "brain": self._brain_health(),
                "catalog": self._catalog_health(),
                "llm": self._responder.health(),
                "tools": self._tools_health(),
                "engine": {"status": "ok", "version": __version__, "image": self._settings.image},
                "activity": self._activity.snapshot(),
            },
        }
        return Response(200 if self._phase == "ok" else 503, payload, ((b"cache-control", b"no-store"),))

    def _brain_health(self) -> dict[str, Any]:
        if self._opened is None:
            return {"status": "starting"}
        failure = self._brain.failure
        state: dict[str, Any] = {"status": "ok"} if failure is None else {"status": "error", "detail": failure}
        return {**state, **self._opened._asdict()}

    def _tools_health(self) -> dict[str, Any]:
        """`ok` also where one is off: which tools work here is a property of the host, not a failure."""
        tools = self._toolbox.health()
        return {"status": "ok", **tools}

    def _catalog_health(self) -> dict[str, Any]:
        if self._opened is None:
            return {"status": "starting"}
        if self._settings.catalog_dir is None:
            return {"status": "empty", "detail": "CATALOG_DIR is not set"}
        return {
            "status": "empty" if self._catalog.is_empty else "ok",
            "agents": len(self._catalog.agents),
            "skills": len(self._catalog.skills),
            "tools": len(self._catalog.tools),
            "core_soul": self._catalog.soul is not None,
        }

    async def _execute(self, request: Request) -> EventStream:
        if self._phase == "draining":
            raise Draining
        turn_request = bodies.execute(await request.json_object())
        hang_up = asyncio.create_task(request.hang_up())
        try:
            # A frozen engine's host accepts connections for it: on thaw, requests of callers long gone come in.
            if await is_gone(hang_up):
                logger.info("caller gone, no turn begun", extra={"task_id": turn_request.task_id})
                raise ClientGone
            turn = await self._turns.start(turn_request)
        except BaseException:
            hang_up.cancel()
            raise
        return EventStream(turn.follow(), hang_up)

    async def _get_history(self, request: Request) -> Response:
        task_id = request.path.removeprefix("/history/")
        limit = bodies.limit(request.query("limit"), default=200, high=1000)
        return Response(200, await self._brain.history(task_id, limit))

    async def _get_replay(self, request: Request) -> Response:
        events = self._replay.since(bodies.after(request.query("after")), request.query("task_id"))
        return Response(200, events, ((b"cache-control", b"no-store"),), b"text/event-stream; charset=utf-8")

    async def _list_pending(self, _request: Request) -> Response:
        return Response(200, {"pending": [question.public() for question in self._hitl.pending()]})

    async def _respond(self, request: Request) -> Response:
        task_id, answer = bodies.answer(await request.json_object())
        question = self._hitl.answer(task_id, answer)
        return Response(200, {"status": "resumed", "request_id": question.request_id})

    async def _quiesce(self, request: Request) -> Response:
        ttl_s = bodies.quiesce(await request.json_object(optional=True))
        # A turn that waits for the end of a quiesce has written nothing yet.
        if self._activity.in_flight and not self._brain.quiesced:
            raise TurnInFlight(self._activity.in_flight)
        await self._brain.quiesce(ttl_s)
        logger.info("quiesced", extra={"ttl_seconds": ttl_s})
        return Response(204)

    async def _resume(self, _request: Request) -> Response:
        self._brain.resume()
        return Response(204)

    async def _rotate_key(self, request: Request) -> Response:
        new = bodies.new_key(await request.json_object())
        async with self._rotating:
            before = self._keyring.record
            after = self._keyring.rotated(*new)
            if after.generation != before.generation:
                try:
                    await asyncio.to_thread(key_store.write, key_store.path_beside(self._brain.path), after)
                except OSError as exc:
                    logger.error("key record not stored", extra={"errno": exc.errno})
                    raise InternalError from exc
                self._keyring.adopt(after)
                logger.info(
                    "key rotated", extra={"generation": after.generation, "overlap_seconds": new.overlap_seconds}
                )
        return Response(204)


def _error(exc: EngineError) -> Response:
    headers: list[tuple[bytes, bytes]] = []
    if exc.retry_after_s is not None:
        headers.append((b"retry-after", str(exc.retry_after_s).encode()))
    if isinstance(exc, MethodNotAllowed):
        headers.append((b"allow", ", ".join(exc.allowed).encode()))
    return Response(exc.status, {"error": exc.code, "message": exc.message, "details": exc.details}, tuple(headers))
