"""Memory over HTTP.

POST /memory/{knowledge,episodes,social}/search   {"query", "limit": 20}: {"results": […]}, best first
POST /memory/knowledge   {"title"?, "content", "source"?}: 201 {"id"}
POST /memory/social      {"name", "content"}: 201 {"id"}
GET  /memory/soul        {"identity", "values", "patterns"} of the catalog; /memory/soul/full with all its fields
GET  /memory/export      everything as one bundle; POST /memory/import adds what is not there yet
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from engine import bodies, memory
from engine.routing import Route
from engine.wire import Request, Response

if TYPE_CHECKING:
    from engine.brain import Brain
    from engine.catalog import Catalog


class MemoryRoutes:
    def __init__(self, brain: Brain, catalog: Catalog) -> None:
        self._brain = brain
        self._catalog = catalog

    def routes(self) -> tuple[Route, ...]:
        return (
            *(
                Route("POST", f"/memory/{store}/search", functools.partial(self._search, store))
                for store in memory.STORES
            ),
            Route("POST", "/memory/knowledge", self._add_knowledge),
            Route("POST", "/memory/social", self._add_person),
            Route("GET", "/memory/soul", self._soul),
            Route("GET", "/memory/soul/full", self._whole_soul),
            Route("GET", "/memory/export", self._export),
            Route("POST", "/memory/import", self._import),
        )

    async def _search(self, store: str, request: Request) -> Response:
        wanted = bodies.search(await request.json_object())
        found = await self._brain.read(lambda db: memory.search(db, store, wanted.query, wanted.limit))
        return Response(200, {"results": found})

    async def _add_knowledge(self, request: Request) -> Response:
        new = bodies.knowledge(await request.json_object())
        return Response(201, {"id": await self._brain.write(lambda db: memory.add_knowledge(db, *new))})

    async def _add_person(self, request: Request) -> Response:
        new = bodies.person(await request.json_object())
        return Response(201, {"id": await self._brain.write(lambda db: memory.add_person(db, *new))})

    async def _soul(self, _request: Request) -> Response:
        soul = self._catalog.soul or {"identity": "", "values": [], "patterns": []}
        return Response(200, {name: soul[name] for name in ("identity", "values", "patterns")})

    async def _whole_soul(self, _request: Request) -> Response:
        return Response(200, self._catalog.soul or {"identity": "", "values": [], "patterns": []})

    async def _export(self, _request: Request) -> Response:
        return Response(200, await self._brain.read(memory.export), ((b"cache-control", b"no-store"),))

    async def _import(self, request: Request) -> Response:
        rows = memory.checked_bundle(await request.json_object(memory.MAX_BUNDLE_BYTES))
        return Response(200, {"imported": await self._brain.write(lambda db: memory.import_rows(db, rows))})
